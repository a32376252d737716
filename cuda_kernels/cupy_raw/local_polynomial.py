"""Local polynomial regression on the GPU: ``local_polynomial.cu``, for lines of many channels ``local_lines.cu``.

Those have up to 128 channels under a smooth kernel; others are lines of ``local_line.cu``, a warp each. Degree 0 is
softmax attention with any kernel. All of it computes in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ttr_np.notation import CacheState
from ttr_np.solvers._cache import append, check_options, empty_cache
from ttr_np.solvers.local_polynomial import UNDETERMINED, Fit, check_fit, polynomial

from .._attention import EXPONENTIAL, NAMES, TOLERANCE, WARP, Pairs, pairs_of, refusal_of, report, room_of, width_of
from .._calls import Grid
from .._sequences import BOTH, ROW, Sequences
from . import _launch
from ._launch import Kernel, empty, launch, run
from .softmax_attention import average

__all__ = ["local_polynomial", "refusal"]

FIT = Kernel("local_polynomial", "pairs.cuh", "neighbours.cuh")
LINE = Kernel("local_line", "pairs.cuh", "neighbours.cuh")
LINES = Kernel("local_lines", "pairs.cuh", "mma_f64.cuh", "doubles.cuh")
LINES_IN_FLOATS = Kernel("local_lines_tensor", "pairs.cuh", "tensor.cuh")
COLUMNS = 128  # of the values that share one line
SMOOTH = (EXPONENTIAL, NAMES.index("gaussian"))  # kernels whose weights need no exact distance
WIDEST = 128  # channels whose sums registers hold
WARPS = 4  # of a block of lines, at most, with 16 queries each
HALF_TOLERANCE = 1e-7  # for data of 16 bits: an error of 1e-4 where all that holds a slope is a ridge of 1e-6
IN_REGISTERS = 64  # channels whose lines are beside each other in registers, on tensor cores
BROADEST = 1e-10  # ridge: what is less may be lost beside moments of single precision
STEPS = 8  # of conjugate gradients, times channels: in exact arithmetic one each would do


def local_polynomial(
    q: Any,
    k: Any,
    v: Any,
    *,
    degree: int = 1,
    kernel: str | Callable[[np.ndarray], np.ndarray] = "exponential",
    scale: float | None = None,
    bandwidth: float | None = None,
    ridge: float = 1e-6,
    causal: bool = True,
    window: int | None = None,
    log_decay: Any = None,
    **common: Any,
) -> Any:
    """Local polynomial regression; see ``ttr_np.local_polynomial``."""
    check_options(q, log_decay, causal, window)
    check_fit(Fit(degree, kernel, scale, bandwidth, ridge))
    problem = refusal(q=q, kernel=kernel, degree=degree, ridge=ridge)
    if problem:
        raise NotImplementedError(problem)
    options = {"degree": degree, "kernel": kernel, "scale": scale, "bandwidth": bandwidth, "ridge": ridge}
    options |= {"causal": bool(causal), "window": window, "keep": bool(common.get("output_final_state"))}
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    return run(core, "local_polynomial", arrays, options, start=empty_cache, **common)


def refusal(
    *, q: Any = None, kernel: Any = NAMES[0], degree: int = 1, ridge: float = 1e-6, **options: Any
) -> str | None:
    """Why a call with these options cannot be served, or None."""
    return refusal_of("cupy", kernel, degree, ridge, np.shape(q)[-1] if np.ndim(q) else 0)


def core(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    mask: Any,
    *,
    degree: int,
    kernel: str,
    scale: float | None,
    bandwidth: float | None,
    ridge: float,
    causal: bool,
    window: int | None,
    keep: bool,
    state: CacheState,
) -> tuple[Any, CacheState]:
    """One launch, or two; the cache grows only to be returned."""
    options = {"causal": causal, "window": window or 0}
    weights = {"kind": NAMES.index(kernel), "width": width_of(scale, bandwidth, q.shape[-1])}
    if degree == 0:
        code, width = weights.values()
        real, options = np.dtype(np.float64), options | {"sinks": 0}
        o = average(q, k, v, log_decay, mask, state, code, real, width, options)
    else:
        pairs = pairs_of(state, k, v, mask)
        o = fitted(q, pairs, log_decay, state, degree, options | weights | {"ridge": ridge})
    return o, append(state, k, v, log_decay, mask, window) if keep else state


def fitted(q: Any, pairs: Pairs, log_decay: Any, state: CacheState, degree: int, options: dict[str, Any]) -> Any:
    """Fits around all queries."""
    (tokens, size), values = q.shape[-2:], pairs.v.shape[-1]
    sequences = Sequences(state.k.shape[:-2], np.broadcast_shapes(q.shape[:-2], state.k.shape[:-2]))
    o = empty(sequences, (tokens, values), q.dtype, q)
    arrays = {"q": (q, BOTH), **pairs.arrays, "log_decay": (log_decay, ROW), "o": (o, BOTH)}
    types = {"data": q.dtype, "stored": pairs.k.dtype, "logs": state.k.dtype, "real": np.float64}
    options = options | {"tokens": tokens, "columns": values, "pairs": pairs.k.shape[-2], "cached": pairs.cached}
    room = room_of(size, degree, values)
    if room is not None:
        polynomials(q, sequences, arrays, types, degree, room, options)
        return o
    residual, steps = empty(sequences, (tokens,), np.float64, q), STEPS * size
    tolerance = HALF_TOLERANCE if q.dtype.itemsize == 2 else TOLERANCE
    arrays["residual"], limits = (residual, ROW), {"steps": steps, "tolerance": tolerance}
    gated, kind = log_decay is not None or pairs.cached > 0, options["kind"]
    cut = lines_cut(sequences.groups * tokens, size, q.dtype, gated) if kind in SMOOTH and values else None
    if cut is None:
        constants = {"D": size, "COLUMNS": max(min(values, COLUMNS), 1), "LANES": WARP}
        parts = max(-(-values // constants["COLUMNS"]), 1)
        grid = Grid(tokens * sequences.groups * parts, WARP)
        launch(LINE, sequences, arrays, ("o", "residual"), types, constants, grid, parts=parts, **options, **limits)
    else:
        constants, grid = cut
        easy = kind == EXPONENTIAL and not gated and options["ridge"] >= BROADEST
        first = floats_cut(sequences.groups * tokens, size, q.dtype, pairs.k.dtype) if easy else None
        if first is not None:
            lines_in_floats(sequences, arrays, types, *first, options | {"tolerance": tolerance})
        constants |= {"KIND": kind, "GATED": int(gated), "LANES": WARP, "REST": int(first is not None)}
        types["narrow"] = np.float64 if q.dtype == np.float64 else np.float32
        arrays["answers"] = arrays.pop("o")  # not all of which are written, so they go there too
        order = (*[name for name in arrays if name not in ("answers", "residual")], "answers", "residual")
        arrays = {name: arrays[name] for name in order}
        launch(LINES, sequences, arrays, ("answers", "residual"), types, constants, grid, **options, **limits)
    report(residual, steps, tolerance)
    return o


def polynomials(
    q: Any, sequences: Sequences, arrays: dict[str, Any], types: Any, degree: int, room: int, options: dict[str, Any]
) -> None:
    """Fits by reflections, one block of 32 threads for each query and some of its value columns."""
    (tokens, size), columns = q.shape[-2:], max(room, 1)
    tables = dict(zip(("bounds", "parents", "factors", "scales"), polynomial(size, degree), strict=True))
    arrays = arrays | {name: (np.asarray(x, like=q), ROW) for name, x in tables.items()}
    constants = {"D": size, "COLUMNS": columns, "LANES": WARP}
    constants |= {"P": len(tables["parents"]), "DEGREE": degree, "UNDETERMINED": UNDETERMINED}
    parts = max(-(-options["columns"] // columns), 1)
    grid = Grid(tokens * sequences.groups * parts, WARP)
    launch(FIT, sequences, arrays, ("o",), types, constants, grid, parts=parts, **options)


def lines_in_floats(
    sequences: Sequences, arrays: dict[str, Any], types: Any, constants: dict[str, int], grid: Grid, options: Any
) -> None:
    """Lines that single precision is enough for; a residual of -1 in place of the others."""
    arrays = {name: x for name, x in arrays.items() if name not in ("left", "log_decay")}
    types = types | {"real": np.float32}
    written = ("o", "residual")
    launch(LINES_IN_FLOATS, sequences, arrays, written, types, constants | {"LANES": 4}, grid, **options)


def floats_cut(rows: int, size: int, dtype: Any, stored: Any) -> tuple[dict[str, int], Grid] | None:
    """Sizes and blocks of lines in single precision; None where data or channels are not for them."""
    wide, lines = -(-size // 16) * 16, 16 * WARPS
    if dtype.name != "bfloat16" or stored.name != "bfloat16" or wide > IN_REGISTERS:
        return None
    shared = 4 * 2 * 32 * (wide + 8) + 3 * 4 * lines * wide  # four tiles; three lines of each query
    if shared > _launch.machine.device().shared:
        return None
    constants = {"D": size, "KD": wide, "WARPS": WARPS, "TOGETHER": 2}
    return constants, Grid(-(-rows // lines), 32 * WARPS, shared)


def lines_cut(rows: int, size: int, dtype: Any, gated: bool) -> tuple[dict[str, int], Grid] | None:
    """Sizes and blocks of lines that share tiles of keys; None where a block has no room for them.

    As many queries share a block as its shared memory has room for: of each it holds four lines of double precision.
    """
    wide = -(-size // 8) * 8
    pairs = 32 if wide <= 64 else 16  # whose logits are in registers beside the sums
    for warps in range(min(WARPS, -(-rows // 16)), 0, -1):
        lines = 16 * warps
        shared = (32 + max(dtype.itemsize, 4)) * lines * (wide + 8) + 16 * pairs * (wide + 2)
        declared = 8 * (wide + lines * (pairs if gated else 1)) + 32 * (lines + pairs) + 512
        if wide <= WIDEST and shared + declared <= _launch.machine.device().shared:
            constants = {"D": size, "KD": wide, "WARPS": warps, "PAIRS": pairs}
            return constants, Grid(-(-rows // lines), 32 * warps, shared)
    return None
