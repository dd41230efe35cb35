import os

import pytest
import torch

from remanence.memory import linear
from remanence.ops import dispatch

# read when Triton is first imported, which PyTorch does by itself: without a GPU, its kernels are interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


SHIPPED = dispatch.COMPILED_FROM, linear.FEW


@pytest.fixture(autouse=True, scope="session")
def _small_inputs_are_compiled_too():
    """Tests are small, and are to test the forms that long inputs meet; those of other sizes and devices say so."""
    dispatch.COMPILED_FROM = 0
    linear.FEW = 0  # and products of few inputs kept


@pytest.fixture(scope="module")
def as_shipped(_small_inputs_are_compiled_too):
    """Where results are compared with those of another process, both take the forms that users get."""
    dispatch.COMPILED_FROM, linear.FEW = SHIPPED
    yield
    dispatch.COMPILED_FROM, linear.FEW = 0, 0
