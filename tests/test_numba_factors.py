"""Factorisations of panels inside kernels, against NumPy's of the same matrices, with NaN wherever none may look."""

import numba
import numpy as np
import pytest
from test_numba_chunks import scratch

from ttr_np.numba_cpu import _factors, _panels, _triangles

SIZES = [1, 3, 7, 8, 9, 16, 31, 32, 33, 64, 70]
DTYPES = [np.float32, np.float64]


@numba.njit
def cholesky(table, n, like):
    return _factors.cholesky(_panels.panel(table, 0, like), _panels.panel(table, 1, like), n, like)


@numba.njit
def invert(table, n, like):
    _triangles.invert_lower(_panels.panel(table, 0, like), _panels.panel(table, 1, like), n, like)


@numba.njit
def solve(table, m, n, like):
    _triangles.solve_lower(_panels.panel(table, 0, like), _panels.panel(table, 1, like), m, n)


@numba.njit
def reflect(table, n, d, like):
    into = _factors.Reflections(
        _panels.panel(table, 2, like), _panels.panel(table, 3, like), _panels.panel(table, 4, like),
        _panels.panel(table, 5, like), _panels.panel(table, 6, like),
    )  # fmt: skip
    _factors.reflect(_panels.panel(table, 0, like), _panels.row(_panels.panel(table, 1, like), 0), n, d, into, like)


def hidden(L, k=1):
    """A lower triangle with NaN above its diagonal."""
    return L + np.triu(np.full_like(L, np.nan), k)


def triangle(n, dtype, rng):
    """A well-conditioned lower triangle."""
    return (np.tril(rng.standard_normal((n, n)), -1) / max(n, 4) + np.diag(rng.uniform(0.5, 2, n))).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_cholesky_is_the_factor_of_a_lower_triangle(n, dtype):
    rng = np.random.default_rng(n)
    L = triangle(n, dtype, rng)
    A = (L.astype(float) @ L.T).astype(dtype)
    (factor, _), table, _room = scratch(hidden(np.tril(A)), np.empty((n, _factors.BLOCK), dtype))
    assert cholesky(table, n, dtype(1))
    np.testing.assert_allclose(np.tril(factor), np.linalg.cholesky(A), rtol=0, atol=50 * np.finfo(dtype).eps)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
@pytest.mark.parametrize("at", [0, 5, 31, 32, 39])
def test_cholesky_refuses_a_pivot_that_is_not_positive(at, value):
    A = np.eye(40)
    A[at, at] = value
    _, table, _room = scratch(A, np.empty((40, _factors.BLOCK)))
    assert not cholesky(table, 40, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_the_inverse_of_a_triangle_is_one(n, dtype):
    L = triangle(n, dtype, np.random.default_rng(n))
    (_, X), table, _room = scratch(hidden(L), np.empty((n, n), dtype))
    invert(table, n, dtype(1))
    np.testing.assert_allclose(X, np.linalg.inv(L.astype(float)), rtol=0, atol=100 * np.finfo(dtype).eps)
    assert not np.triu(X, 1).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 5), (8, 16), (9, 33), (40, 70)])
def test_a_triangle_is_solved_with_its_own_diagonal(m, n, dtype):
    rng = np.random.default_rng(m)
    L, x = triangle(m, dtype, rng), rng.standard_normal((m, n)).astype(dtype)
    (_, view), table, _room = scratch(hidden(L), x)
    solve(table, m, n, dtype(1))
    np.testing.assert_allclose(view, np.linalg.solve(L.astype(float), x), rtol=0, atol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("m", [9, 40])
def test_rows_and_columns_that_are_left_out_change_no_bit(m):
    rng = np.random.default_rng(m)
    L, x = triangle(m, np.float32, rng), rng.standard_normal((m, 40)).astype(np.float32)
    (_, whole), table, _room = scratch(L, x)
    solve(table, m, 40, np.float32(1))
    (_, part), table, _room = scratch(L[:-2, :-2], x[:-2, :-3])
    solve(table, m - 2, 37, np.float32(1))
    assert np.array_equal(part, whole[:-2, :-3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (8, 16), (32, 64), (33, 17), (64, 64), (70, 20)])
def test_reflections_take_rows_into_the_triangle_of_their_products(n, d, dtype):
    """[diag(sqrt left)  A] (I - Y T Y^T) = -[L  0] with Y = [I; V^T], and that matrix is orthogonal."""
    rng = np.random.default_rng(n)
    A, left = rng.standard_normal((n, d)).astype(dtype) / d**0.5, rng.uniform(0.1, 1, (1, n)).astype(dtype)
    square, zeros = np.zeros((n, n), dtype), np.zeros((max(n, _factors.BLOCK), n), dtype)
    (V, _, L, T, columns, *_), table, _room = scratch(A, left, square, square, np.zeros((d, n), dtype), square, zeros)
    reflect(table, n, d, dtype(1))
    Y = np.vstack([np.eye(n), V.T.astype(float)])
    Q, both = np.eye(n + d) - Y @ T.astype(float) @ Y.T, np.hstack([np.diag(np.sqrt(left[0])), A]).astype(float)
    tolerance = 200 * np.finfo(dtype).eps
    np.testing.assert_allclose(Q @ Q.T, np.eye(n + d), rtol=0, atol=tolerance)
    np.testing.assert_allclose(both @ Q, -np.hstack([np.tril(L), np.zeros((n, d))]), rtol=0, atol=tolerance)
    assert np.array_equal(columns, V.T) and not np.tril(T, -1).any() and (np.diag(L) > 0).all()
