"""Local polynomial regression on the GPU: ``local_polynomial.cu``, for lines of many channels ``local_lines.cu``.

Those have up to 128 channels under a smooth kernel and are solved directly; others are lines of ``local_line.cu``, a
warp each, by conjugate gradients. Degree 0 is softmax attention with any kernel. All of it computes in double precision
but lines of bfloat16, which ``local_lines_tensor.cu`` tries in single precision first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ttr_np.notation import CacheState
from ttr_np.solvers._cache import append, check_options, empty_cache
from ttr_np.solvers.local_polynomial import UNDETERMINED, Fit, check_fit, polynomial

from .._attention import EXPONENTIAL, NAMES, TOLERANCE, WARP, Pairs, pairs_of, refusal_of, report, room_of, width_of
from .._calls import Grid, placed
from .._sequences import BOTH, ROW, Sequences
from . import _launch
from ._launch import Kernel, empty, launch, run, side_by_side
from .softmax_attention import average

__all__ = ["local_polynomial", "refusal"]

FIT = Kernel("local_polynomial", "pairs.cuh", "neighbours.cuh")
LINE = Kernel("local_line", "pairs.cuh", "neighbours.cuh")
LINES = Kernel("local_lines", "pairs.cuh", "mma_f64.cuh", "doubles.cuh")
LINES_IN_FLOATS = Kernel("local_lines_tensor", "pairs.cuh", "tensor.cuh")
COLUMNS = 128  # of the values that share one line
SMOOTH = (EXPONENTIAL, NAMES.index("gaussian"))  # kernels whose weights need no exact distance
WIDEST = 128  # channels whose sums registers hold
MOST = 256  # threads of a block of lines, for each of which registers hold sums
WAVES = 8  # blocks of lines for each multiprocessor, at most: what is left to do may be few rows of many
WARPS = 4  # of a block of lines in single precision, with 16 queries each
HALF_TOLERANCE = 1e-7  # there: an error of 1e-4 where all that holds a slope is a ridge of 1e-6
IN_REGISTERS = 64  # channels whose lines are beside each other in registers, on tensor cores
BROADEST = 1e-10  # ridge: what is less may be lost beside moments of single precision
STEPS = 8  # of conjugate gradients by themselves, times channels: in exact arithmetic one each would do


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
    gated = log_decay is not None or pairs.cached > 0
    cut = lines_cut(sequences, tokens, size) if options["kind"] in SMOOTH and values else None
    if cut is None:
        line_by_line(q, sequences, arrays, types, options)
        return o
    smooth_lines(q, sequences, arrays, types, cut, options | {"gated": int(gated)})
    return o


def polynomials(
    q: Any, sequences: Sequences, arrays: dict[str, Any], types: Any, degree: int, room: int, options: dict[str, Any]
) -> None:
    """Fits by reflections, one block of 32 threads for each query and some of its value columns."""
    (tokens, size), columns = q.shape[-2:], max(room, 1)
    tables = dict(zip(("bounds", "parents", "factors", "scales"), polynomial(size, degree), strict=True))
    arrays = arrays | {name: (placed(x, x.dtype, q), ROW) for name, x in tables.items()}
    constants = {"D": size, "COLUMNS": columns, "LANES": WARP}
    constants |= {"P": len(tables["parents"]), "DEGREE": degree, "UNDETERMINED": UNDETERMINED}
    parts = max(-(-options["columns"] // columns), 1)
    grid = Grid(tokens * sequences.groups * parts, WARP)
    launch(FIT, sequences, arrays, ("o",), types, constants, grid, parts=parts, **options)


def line_by_line(q: Any, sequences: Sequences, arrays: dict[str, Any], types: Any, options: dict[str, Any]) -> None:
    """Lines by conjugate gradients, one block of 32 threads for each query and some of its value columns."""
    tokens, size = q.shape[-2:]
    residual, steps = empty(sequences, (tokens,), np.float64, q), STEPS * size
    constants = {"D": size, "COLUMNS": max(min(options["columns"], COLUMNS), 1), "LANES": WARP}
    parts = max(-(-options["columns"] // constants["COLUMNS"]), 1)
    grid = Grid(tokens * sequences.groups * parts, WARP)
    arrays, limits = arrays | {"residual": (residual, ROW)}, {"steps": steps, "tolerance": TOLERANCE, "parts": parts}
    launch(LINE, sequences, arrays, ("o", "residual"), types, constants, grid, **options, **limits)
    report(residual, steps)


@side_by_side()
def smooth_lines(
    q: Any,
    sequences: Sequences,
    arrays: dict[str, Any],
    types: dict[str, Any],
    cut: tuple[dict[str, int], Grid],
    options: dict[str, Any],
) -> None:
    """Lines that share tiles of keys, tried in single precision first where that may be enough."""
    undone = None
    if options["kind"] == EXPONENTIAL and not options["gated"] and options["ridge"] >= BROADEST:
        undone = lines_in_floats(q, sequences, arrays, types, options)
    lines(sequences, arrays, undone, types, cut, options)


def lines(
    sequences: Sequences,
    arrays: dict[str, Any],
    undone: Any,
    types: dict[str, Any],
    cut: tuple[dict[str, int], Grid],
    options: dict[str, Any],
) -> None:
    """Lines solved directly: all, or those that are undone."""
    constants, grid = cut
    constants |= {"KIND": options["kind"], "GATED": options["gated"], "LANES": WARP, "REST": int(undone is not None)}
    others = {name: x for name, x in arrays.items() if name != "o"}
    answers = {"undone": (undone, ROW), "answers": arrays["o"]}  # not all of which are written, so they go there too
    launch(LINES, sequences, others | answers, ("answers",), types, constants, grid, **options)


def lines_cut(sequences: Sequences, tokens: int, size: int) -> tuple[dict[str, int], Grid] | None:
    """Sizes and blocks of lines that share tiles of keys; None where a block has no room for two of them.

    There is room for a tile of keys and one of values, and later in their place for the lower triangles of all queries.
    """
    device, wide = _launch.machine.device(), -(-size // 32) * 32
    for queries in (4, 2):
        tiles, triangles = 2 * 8 * 32 * (wide + 2), 4 * queries * wide * (wide + 16)
        declared = 8 * wide + 8 * queries * (5 * wide + 56) + 12 * queries**2 * wide + 1024
        shared = max(tiles, triangles)
        if wide <= WIDEST and queries * wide <= MOST and shared + declared <= device.shared:
            parts = -(-sequences.groups * tokens // queries)
            blocks = min(parts, max(WAVES * device.multiprocessors // sequences.memories, 1))
            return {"D": size, "KD": wide, "QUERIES": queries}, Grid(blocks, queries * wide, shared)
    return None


def lines_in_floats(
    q: Any, sequences: Sequences, arrays: dict[str, Any], types: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Lines that single precision is enough for; which of them it is not, None if it was not tried."""
    (tokens, size), stored = q.shape[-2:], types["stored"]
    cut = floats_cut(sequences.groups * tokens, size, q.dtype, stored)
    if cut is None:
        return None
    undone = empty(sequences, (tokens,), np.bool_, q)
    constants, grid = cut
    arrays = {name: x for name, x in arrays.items() if name not in ("left", "log_decay")} | {"undone": (undone, ROW)}
    types, options = types | {"real": np.float32}, options | {"tolerance": HALF_TOLERANCE}
    launch(LINES_IN_FLOATS, sequences, arrays, ("o", "undone"), types, constants | {"LANES": 4}, grid, **options)
    return undone


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
