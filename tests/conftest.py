import pytest

from remanence.ops import dispatch


@pytest.fixture(autouse=True, scope="session")
def _small_inputs_are_compiled_too():
    """Tests are small, and are to test the forms that long inputs meet; those of other sizes and devices say so."""
    dispatch.COMPILED_FROM = 0
