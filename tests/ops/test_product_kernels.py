import numpy as np
import pytest

from remanence.ops.compiled import jit
from remanence.ops.product_kernels import gemm

SIZES = [(1, 1, 1), (8, 3, 16), (7, 5, 32), (64, 65, 64), (16, 16, 65), (3, 0, 32), (33, 64, 96), (9, 40, 128)]


@jit
def product(sign, x, x_turned, y, y_turned, keep, out):
    gemm(sign, x, x_turned, y, y_turned, keep, out)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_of_parts_of_wider_matrices(size, dtype):
    m, k, n = size
    draw = np.random.default_rng(0)
    for x_turned in (False, True):
        for y_turned in (False, True):
            for keep in (0.0, 1.0, 0.5):
                x = draw.standard_normal((k, m + 3) if x_turned else (m, k + 3)).astype(dtype)
                y = draw.standard_normal((n, k + 2) if y_turned else (k, n + 2)).astype(dtype)
                x, y = x[:, : m if x_turned else k], y[:, : k if y_turned else n]
                out = draw.standard_normal((m, n + 4)).astype(dtype)
                if not keep:
                    out[:, :n] = np.nan  # what is not kept is not read
                beyond = out[:, n:].copy()
                want = -2 * (x.T if x_turned else x) @ (y.T if y_turned else y)
                want = want + (keep * out[:, :n] if keep else 0)
                product(-2.0, x, x_turned, y, y_turned, keep, out[:, :n])
                np.testing.assert_allclose(out[:, :n], want, atol=1e-12 if dtype == np.float64 else 1e-4)
                np.testing.assert_array_equal(out[:, n:], beyond)
