"""What is asked of everybody: operators, variants and shapes, each with the contenders that can answer it.

FLOP per token of one head, k = v = D, in chunks of C = 64, are those of the chunk forms whatever a contender really
does, so that a share of the machine's rate means the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit

import ttr_np
from ttr_np.backends import available_backends, has_operator
from ttr_np.measure import TOLERANCE, Case, Contender, Skipped, ours, softened
from ttr_np.notation import axes_of, draw

from . import filter_peers
from .fla_peers import fla_peers
from .torch_peers import torch_peers

__all__ = ["OURS", "QUESTIONS", "Question", "Setting", "arrays_of", "backends_of", "channels"]

OURS = ("numpy", "numba", "stream", "numba-cuda", "cupy")
C = 64
VARIANTS = {"": (), "scalar": ("log_decay",), "channel": ("log_decay",)}


class Setting(NamedTuple):
    """What the command line chose."""

    lengths: Sequence[int] = (2048, 8192)
    widths: Sequence[int] = (64, 128)
    heads: int = 8
    seed: int = 0
    compiled: bool = True


class Question(NamedTuple):
    """A case, its sizes, who answers it, the FLOP per token of one head, the error that is still right, yardsticks."""

    case: Case
    shape: dict[str, int]
    contenders: list[Contender | Skipped]
    flop: float | None
    tolerance: float
    yardsticks: Sequence[Contender] = ()


def arrays_of(operator: str, setting: Setting, variant: str = "", extra: tuple[str, ...] = (), **sizes: int) -> Any:
    """Random float32 inputs of one batch of heads."""
    arrays = draw(
        operator,
        np.random.default_rng(setting.seed),
        optional=VARIANTS[variant] + extra,
        lead=(1, setting.heads),
        per_channel=variant == "channel",
        dtype=np.float32,
        **sizes,
    )
    return softened(arrays)


def backends_of(case: Case) -> list[Contender | Skipped]:
    """Our backends: those that run, and why the others do not."""
    return [
        Skipped(name, reason)
        if reason != "ok"
        else ours(case, name)
        if has_operator(name, case.operator)
        else Skipped(name, f"has no {case.operator}")
        for name, reason in available_backends().items()
    ]


def asked(case: Case, shape: dict[str, int], peers: Sequence[Any], flop: float | None = None) -> Question:
    """A question to our backends and to peers."""
    dtype = str(next(iter(case.arrays.values())).dtype)
    return Question(case, shape, [*backends_of(case), *peers], flop, TOLERANCE[dtype])


def grid(setting: Setting) -> Iterator[dict[str, int]]:
    """All shapes, small ones first."""
    for t in setting.lengths:
        for d in setting.widths:
            yield {"B": 1, "H": setting.heads, "T": t, "D": d}


def over_shapes(
    operator: str,
    flop: Callable[[int, int], float] | None,
    variants: Sequence[str] = ("",),
    extra: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    peer_options: dict[str, Any] | None = None,
    label: str = "",
) -> Callable[[Setting], Iterator[Question]]:
    """The questions of an operator that takes queries, keys and values: every variant at every shape."""

    def questions(setting: Setting) -> Iterator[Question]:
        for shape in grid(setting):
            t, d = shape["T"], shape["D"]
            for variant in variants:
                arrays = arrays_of(operator, setting, variant, extra, t=t, k=d, v=d, d=d)
                case = Case(operator, variant + label, arrays, options or {})
                peers = [*torch_peers(case, operator, setting.compiled, **(peer_options or {})), *fla_peers(case)]
                yield asked(case, shape, peers, flop(t, d) if flop else None)

    return questions


def softmax_attention(setting: Setting) -> Iterator[Question]:
    """Causal and full."""
    for shape in grid(setting):
        t, d = shape["T"], shape["D"]
        arrays = arrays_of("softmax_attention", setting, t=t, k=d, v=d)
        for variant, causal, pairs in (("causal", True, t / 2), ("full", False, t)):
            case = Case("softmax_attention", variant, arrays, {"causal": causal})
            yield asked(case, shape, torch_peers(case, case.operator, setting.compiled, causal=causal), 4 * pairs * d)


def mesa(setting: Setting) -> Iterator[Question]:
    """A factor for every token, then conjugate gradients to the default tolerance; peers take thirty steps for both."""
    for solver, label in (("exact", ""), ("cg", ", cg")):
        options = {"ridge": 1.0, "solver": solver}
        yield from over_shapes("mesa", None, ("scalar",), ("beta",), options, {"ridge": 1.0}, label)(setting)


def channels(setting: Setting, t: int, d: int) -> dict[str, np.ndarray]:
    """Inputs of a selective scan: all heads' channels side by side, with states of 16."""
    rng = np.random.default_rng(setting.seed)
    return draw("selective_scan", rng, lead=(1,), dtype=np.float32, t=t, v=setting.heads * d, n=16)


def selective_scan(setting: Setting) -> Iterator[Question]:
    """Against both of torch's ways: token by token, and its associative scan."""
    for shape in grid(setting):
        case = Case("selective_scan", "n 16", channels(setting, shape["T"], shape["D"]))
        yield asked(case, shape, torch_peers(case, case.operator, setting.compiled))


def series(count: int, t: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy linear systems: inputs ``(count, t, k)`` and what is observed, ``(count, t)``, in float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, t, k)) / np.sqrt(k)
    return x, np.einsum("stk,sk->st", x, rng.standard_normal((count, k))) + 0.1 * rng.standard_normal((count, t))


def filters(setting: Setting) -> Iterator[tuple[str, dict[str, int], np.ndarray, np.ndarray]]:
    """One long series, and 256 shorter ones side by side, these also in float32, which no peer has."""
    for count, t in ((1, max(setting.lengths)), (256, min(setting.lengths[0], 256))):
        x, d = series(count, t, 16, setting.seed)
        yield f"{count} series", {"B": count, "H": 1, "T": t, "D": 16}, x, d
    yield f"{count} series, float32", {"B": count, "H": 1, "T": t, "D": 16}, np.float32(x), np.float32(d)


def recursive_least_squares(setting: Setting) -> Iterator[Question]:
    """As a layer, then as a filter: without forgetting, which every peer has."""
    yield from over_shapes("recursive_least_squares", lambda t, d: 10 * d * d + 8 * C * d + C * C / 3, ("scalar",))(
        setting._replace(compiled=False)
    )
    for variant, shape, x, d in filters(setting):
        case = Case("recursive_least_squares", variant, {"q": x, "k": x, "v": d[..., None]}, {"ridge": 1.0})
        peers = filter_peers.recursive_least_squares(x, d, 1.0)
        yield asked(case, shape, peers + (filter_peers.ridge_refits(x, d, 1.0) if len(x) == 1 else []))


def affine_projection(setting: Setting) -> Iterator[Question]:
    """The affine projection filter of order two."""
    for variant, shape, x, d in filters(setting):
        arrays = {"q": x, "k": x, "v": d[..., None], "beta": np.full(d.shape, 0.5)}
        case = Case("affine_projection", variant, arrays, {"order": 2, "ridge": 1e-3})
        yield asked(case, shape, filter_peers.affine_projection(x, d, 0.5, 1e-3, 2))


def nlms(setting: Setting) -> Iterator[Question]:
    """Normalised LMS is the delta rule with its step over the squared length."""
    for variant, shape, x, d in filters(setting):
        beta = 0.5 / (1e-3 + np.sum(x * x, axis=-1))
        case = Case("delta_rule", f"NLMS, {variant}", {"q": x, "k": x, "v": d[..., None], "beta": beta})
        yield asked(case, shape, filter_peers.nlms(x, d, 0.5, 1e-3))


def local_polynomial(setting: Setting) -> Iterator[Question]:
    """Local linear attention, and local linear regression in the plane."""
    t, d = min(setting.lengths[0], 512), setting.widths[0]
    case = Case("local_polynomial", "causal", arrays_of("local_polynomial", setting, t=t, k=d, v=d))
    yield asked(case, {"B": 1, "H": setting.heads, "T": t, "D": d}, [])
    rng = np.random.default_rng(setting.seed)
    x = rng.uniform(size=(1, t, 2))
    y = np.sin(6 * x[..., 0]) + x[..., 1]
    options = {"kernel": "gaussian", "bandwidth": 0.2, "ridge": 1e-9, "causal": False}
    case = Case("local_polynomial", "gaussian, full", {"q": x, "k": x, "v": y[..., None]}, options)
    yield asked(case, {"B": 1, "H": 1, "T": t, "D": 2}, filter_peers.kernel_regression(x, y, 0.2))


def kernel_ridge(setting: Setting) -> Iterator[Question]:
    """One fit of all pairs, every key a query."""
    t = min(setting.lengths[0], 512)
    x, d = series(1, t, 16, setting.seed)
    options = {"kernel": "gaussian", "bandwidth": 1.0, "ridge": 1.0, "causal": False}
    case = Case("kernel_ridge", "gaussian, full", {"q": x, "k": x, "v": d[..., None]}, options)
    yield asked(case, {"B": 1, "H": 1, "T": t, "D": 16}, filter_peers.kernel_ridge(x, d, 1.0, 1.0))


def alone(operator: str, longest: int = 2048) -> Callable[[Setting], Iterator[Question]]:
    """The question of an operator that has no peer here, at the first shape."""

    def questions(setting: Setting) -> Iterator[Question]:
        t, d = min(setting.lengths[0], longest), setting.widths[0]
        arrays = arrays_of(operator, setting, t=t, k=d, v=d, l=t.bit_length() + 1)
        yield asked(Case(operator, "", arrays), {"B": 1, "H": setting.heads, "T": t, "D": d}, [])

    return questions


def short_convolution(setting: Setting) -> Iterator[Question]:
    """Four taps."""
    for shape in grid(setting):
        arrays = arrays_of("short_convolution", setting, t=shape["T"], d=shape["D"], w=4)
        case = Case("short_convolution", "4 taps", arrays)
        yield asked(case, shape, torch_peers(case, case.operator, setting.compiled))


@njit
def nothing(q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: np.ndarray, S: np.ndarray, o: np.ndarray) -> None:
    """The cheapest compiled call with a step's arguments."""


def empty_call(case: Case) -> Contender:
    """What a call costs before it computes anything."""
    a, S = case.arrays, case.options["initial_state"][0]
    o = np.empty_like(a["v"])
    return Contender("empty compiled call", lambda: nothing(a["q"], a["k"], a["v"], a.get("beta", a["v"]), S, o))


def streams_of(case: Case) -> list[Contender]:
    """Our way for one token per call, which asks once what a call asks every time.

    Its state moves on with every call: the first answer is the one that is checked.
    """
    token = {
        name: np.ascontiguousarray(np.take(x, 0, axis=-len(axes_of(name, x, case.arrays))))
        for name, x in case.arrays.items()
    }
    shapes = {name: x.shape for name, x in token.items()}
    step = ttr_np.Stream(case.operator, dtype=np.float32, initial_state=case.options["initial_state"], **shapes)
    return [Contender("stream", lambda: step(*token.values())[..., None, :])]


def decode(setting: Setting) -> Iterator[Question]:
    """One token with a carried state."""
    d = setting.widths[0]
    S = np.random.default_rng(setting.seed).standard_normal((1, setting.heads, d, d)).astype(np.float32)
    for operator, kind in (("linear_attention", "decode linear"), ("delta_rule", "decode delta")):
        options = {"initial_state": (S,), "output_final_state": True}
        case = Case(operator, "decode", arrays_of(operator, setting, t=1, k=d, v=d), options)
        peers = [*streams_of(case), *torch_peers(case, kind, setting.compiled)]
        question = asked(case, {"B": 1, "H": setting.heads, "T": 1, "D": d}, peers)
        yield question._replace(yardsticks=[empty_call(case)])


QUESTIONS: dict[str, Callable[[Setting], Iterator[Question]]] = {
    "linear_attention": over_shapes("linear_attention", lambda t, d: 4 * d * d + 4 * C * d, tuple(VARIANTS)),
    "delta_rule": over_shapes("delta_rule", lambda t, d: 6 * d * d + 10 * C * d + C * C, tuple(VARIANTS)),
    "dplr": over_shapes("dplr", lambda t, d: 8 * d * d + 16 * C * d, ("channel",)),
    "softmax_attention": softmax_attention,
    "mesa": mesa,
    "recursive_least_squares": recursive_least_squares,
    "nlms": nlms,
    "affine_projection": affine_projection,
    "kalman_filter": alone("kalman_filter"),
    "selective_scan": selective_scan,
    "diagonal_scan": over_shapes("diagonal_scan", None),
    "short_convolution": short_convolution,
    "local_polynomial": local_polynomial,
    "kernel_ridge": kernel_ridge,
    "sparse_attention": alone("sparse_attention"),
    "path_attention": alone("path_attention"),
    "stick_breaking_attention": alone("stick_breaking_attention"),
    "wall_attention": alone("wall_attention"),
    "delta_attention": alone("delta_attention"),
    "log_linear_attention": alone("log_linear_attention"),
    "test_time_training": over_shapes(
        "test_time_training", lambda t, d: 6 * d * d + 4 * 16 * d, options={"memory": ttr_np.Linear()}
    ),
    "decode": decode,
}
