"""Whether a compiled token may read a module's weights itself."""

from __future__ import annotations

from torch import nn

PLAIN = frozenset({nn.Linear, nn.Softplus, nn.Sigmoid})


def bare(*modules: nn.Module) -> bool:
    """Whether calling these does no more than their class says: nobody has replaced, parametrised or hooked them."""
    for module in modules:
        if type(module) not in PLAIN or module._forward_hooks or module._forward_pre_hooks:
            return False
    return True
