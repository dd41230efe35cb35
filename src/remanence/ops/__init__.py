"""Recurrences as pure functions, each beside the plain loop that defines it."""

from remanence.ops.chunk_attention import chunk_attention, chunk_attention_reference
from remanence.ops.complex_scan import (
    complex_scan,
    complex_scan_carry,
    complex_scan_reference,
    diagonal_ssm,
    diagonal_ssm_reference,
)
from remanence.ops.conv import causal_conv, causal_conv_reference
from remanence.ops.delta import gated_delta_rule, gated_delta_rule_carry, gated_delta_rule_reference
from remanence.ops.delta_network import delta_network, delta_network_reference
from remanence.ops.dense_ssm import dense_ssm, dense_ssm_carry, dense_ssm_reference
from remanence.ops.dplr import dplr, dplr_carry, dplr_reference
from remanence.ops.expgate import expgate, expgate_carry, expgate_reference
from remanence.ops.exponential import deep_exponential, deep_exponential_reference
from remanence.ops.fast_weight import fast_weight, fast_weight_reference, fast_weight_state
from remanence.ops.hippo import legs, legs_carry, legs_reference
from remanence.ops.lattice import lattice, lattice_reference
from remanence.ops.least_squares import (
    least_squares,
    least_squares_reference,
    local_regression,
    local_regression_reference,
    recursive_least_squares,
    recursive_least_squares_reference,
    recursive_least_squares_state,
)
from remanence.ops.linear import linear
from remanence.ops.linear_attention import linear_attention, linear_attention_carry, linear_attention_reference
from remanence.ops.linear_cde import linear_cde, linear_cde_carry, linear_cde_reference
from remanence.ops.long_conv import long_conv, long_conv_reference
from remanence.ops.neighborhood import neighborhood_attention, neighborhood_attention_reference
from remanence.ops.norm import normalise, normalise_reference
from remanence.ops.omega import omega_delta, omega_delta_reference
from remanence.ops.scan import scan, scan_carry, scan_reference
from remanence.ops.selective_scan import selective_scan, selective_scan_carry, selective_scan_reference
from remanence.ops.signature import signature, signature_reference
from remanence.ops.slots import slots, slots_carry, slots_reference
from remanence.ops.softmax_scan import softmax_scan, softmax_scan_carry, softmax_scan_reference
from remanence.ops.ttt import ttt, ttt_reference, ttt_state
from remanence.ops.window import window_attention, window_attention_reference

__all__ = [
    "causal_conv",
    "causal_conv_reference",
    "chunk_attention",
    "chunk_attention_reference",
    "complex_scan",
    "complex_scan_carry",
    "complex_scan_reference",
    "deep_exponential",
    "deep_exponential_reference",
    "delta_network",
    "delta_network_reference",
    "dense_ssm",
    "dense_ssm_carry",
    "dense_ssm_reference",
    "diagonal_ssm",
    "diagonal_ssm_reference",
    "dplr",
    "dplr_carry",
    "dplr_reference",
    "expgate",
    "expgate_carry",
    "expgate_reference",
    "fast_weight",
    "fast_weight_reference",
    "fast_weight_state",
    "gated_delta_rule",
    "gated_delta_rule_carry",
    "gated_delta_rule_reference",
    "lattice",
    "lattice_reference",
    "least_squares",
    "least_squares_reference",
    "legs",
    "legs_carry",
    "legs_reference",
    "linear",
    "linear_attention",
    "linear_attention_carry",
    "linear_attention_reference",
    "linear_cde",
    "linear_cde_carry",
    "linear_cde_reference",
    "local_regression",
    "local_regression_reference",
    "long_conv",
    "long_conv_reference",
    "neighborhood_attention",
    "neighborhood_attention_reference",
    "normalise",
    "normalise_reference",
    "omega_delta",
    "omega_delta_reference",
    "recursive_least_squares",
    "recursive_least_squares_reference",
    "recursive_least_squares_state",
    "scan",
    "scan_carry",
    "scan_reference",
    "selective_scan",
    "selective_scan_carry",
    "selective_scan_reference",
    "signature",
    "signature_reference",
    "slots",
    "slots_carry",
    "slots_reference",
    "softmax_scan",
    "softmax_scan_carry",
    "softmax_scan_reference",
    "ttt",
    "ttt_reference",
    "ttt_state",
    "window_attention",
    "window_attention_reference",
]
