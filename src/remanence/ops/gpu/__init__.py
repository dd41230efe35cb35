"""The main recurrences as Triton kernels. Only `dispatch` leads here, so that Triton is loaded only when used."""
