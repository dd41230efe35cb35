"""Recurrences as pure functions, each beside the plain loop that defines it."""

from remanence.ops.conv import causal_conv, causal_conv_reference
from remanence.ops.delta import gated_delta_rule, gated_delta_rule_carry, gated_delta_rule_reference
from remanence.ops.fast_weight import fast_weight, fast_weight_reference, fast_weight_state
from remanence.ops.linear_attention import (
    linear_attention,
    linear_attention_carry,
    linear_attention_reference,
)
from remanence.ops.scan import scan, scan_carry, scan_reference
from remanence.ops.window import window_attention, window_attention_reference

__all__ = [
    "causal_conv",
    "causal_conv_reference",
    "fast_weight",
    "fast_weight_reference",
    "fast_weight_state",
    "gated_delta_rule",
    "gated_delta_rule_carry",
    "gated_delta_rule_reference",
    "linear_attention",
    "linear_attention_carry",
    "linear_attention_reference",
    "scan",
    "scan_carry",
    "scan_reference",
    "window_attention",
    "window_attention_reference",
]
