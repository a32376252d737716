"""How far the NumPy backend is from the machine's matrix products: ``python -m benchmarks.gemm_share``.

Chunked linear attention at B 1, H 8, float32 against stacked matrix products with the same number of FLOP, interleaved
in one process, medians of several rounds. Correct first: a wrong answer is not timed.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import numpy as np

import ttr_np
from ttr_np.notation import draw

CHUNK = 64


def flop(heads: int, t: int, d: int) -> int:
    """Of chunked linear attention: four products per chunk."""
    return heads * t * (4 * d * d + 4 * CHUNK * d)


def products(heads: int, t: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two stacks of square matrices whose product has that many FLOP."""
    n = round(flop(heads, t, d) / (2 * CHUNK**3))
    return tuple(rng.standard_normal((n, CHUNK, CHUNK)).astype(np.float32) for _ in range(2))


def seconds(f, *args, **kwargs) -> float:
    """Wall time of one call."""
    start = perf_counter()
    f(*args, **kwargs)
    return perf_counter() - start


def compare(heads: int, t: int, d: int, rounds: int = 15) -> dict[str, float]:
    """Medians of both, in milliseconds, the ratio, and the error against float64."""
    rng = np.random.default_rng(0)
    x = draw("linear_attention", rng, lead=(1, heads), t=t, k=d, v=d)
    low = {name: a.astype(np.float32) for name, a in x.items()}
    exact = ttr_np.linear_attention(**x, backend="numpy")
    error = np.abs(ttr_np.linear_attention(**low, backend="numpy") - exact).max() / np.abs(exact).max()
    if not error < 1e-5:
        raise SystemExit(f"linear_attention is wrong by {error:.1e}: not timed")
    a, b = products(heads, t, d, rng)
    ours, gemm = [], []
    for _ in range(rounds):
        ours.append(seconds(ttr_np.linear_attention, **low, backend="numpy"))
        gemm.append(seconds(np.matmul, a, b))
    ms = 1e3 * median(ours[1:]), 1e3 * median(gemm[1:])
    return {"ours_ms": ms[0], "gemm_ms": ms[1], "ratio": ms[0] / ms[1], "error": float(error)}


if __name__ == "__main__":
    for t, d in ((2048, 64), (8192, 64), (2048, 128)):
        row = compare(8, t, d)
        print(
            f"B 1 H 8 T {t} D {d}: linear attention {row['ours_ms']:.2f} ms, "
            f"products of its FLOP {row['gemm_ms']:.2f} ms, ratio {row['ratio']:.2f}, error {row['error']:.1e}"
        )
