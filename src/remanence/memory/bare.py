"""Whether a layer may read a module's weights itself instead of calling it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.modules.module import _global_forward_hooks as _for_all
from torch.nn.modules.module import _global_forward_pre_hooks as _before_all

PLAIN: set[type[nn.Module]] = {nn.Linear, nn.LayerNorm, nn.Softplus, nn.Sigmoid}
Class = TypeVar("Class", bound=type[nn.Module])


def transparent(kind: Class) -> Class:
    """A class of modules whose weights may be read so."""
    PLAIN.add(kind)
    return kind


def unhooked(module: nn.Module) -> bool:
    """Whether nobody waits for this module's call."""
    return not (module._forward_hooks or module._forward_pre_hooks or _for_all or _before_all)


def bare(*modules: nn.Module) -> bool:
    """Whether calling these does no more than their class says: nobody has replaced, parametrised or hooked them."""
    return all(type(module) in PLAIN and unhooked(module) for module in modules)
