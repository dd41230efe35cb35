"""Whether a compiled token may read a module's weights itself."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

PLAIN: set[type[nn.Module]] = {nn.Linear, nn.Softplus, nn.Sigmoid}
Class = TypeVar("Class", bound=type[nn.Module])


def transparent(kind: Class) -> Class:
    """A class of modules whose weights compiled tokens may read."""
    PLAIN.add(kind)
    return kind


def bare(*modules: nn.Module) -> bool:
    """Whether calling these does no more than their class says: nobody has replaced, parametrised or hooked them."""
    for module in modules:
        if type(module) not in PLAIN or module._forward_hooks or module._forward_pre_hooks:
            return False
    return True
