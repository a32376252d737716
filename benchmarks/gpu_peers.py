"""The contenders on a GPU: our backends, flash-linear-attention's Triton kernels, and torch, on the same memory.

Arrays are ``(B, T, H, D)`` tensors of torch, in bfloat16, with gates in float32; ours are views of them with heads
before time. A call that a CUDA graph can record is a contender twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

import ttr_np
from ttr_np.backends import available_backends
from ttr_np.measure import Case, Contender, Skipped, first_line, reference
from ttr_np.notation import GATES

from . import torch_forms
from .floors import Rates, Shape

__all__ = ["Question", "measured_rates", "question", "seconds_of"]

CHECKED = 256  # tokens of two heads: what the solver in float64 is asked on the CPU
NAIVE = 2**18  # token-heads up to which torch's forms in float32 are asked
SLOW = 2**22  # tokens times heads beyond which a kernel that goes token by token in float32 is not asked


class Kind(NamedTuple):
    """One line of ``floors.KINDS``: our operator, and flash-linear-attention's functions for chunks and one token."""

    operator: str
    gate: str  # none, step or channel
    module: str
    chunk: str
    token: str
    names: dict[str, str]
    options: dict[str, Any] = {}


PLAIN, G = {"q": "q", "k": "k", "v": "v"}, {"log_decay": "g"}
BETA = PLAIN | {"beta": "beta"}
KINDS = {
    "linear": Kind(
        "linear_attention", "none", "linear_attn", "chunk_linear_attn", "fused_recurrent_linear_attn", PLAIN,
        {"normalize": False},
    ),
    "scalar gate": Kind(
        "linear_attention", "step", "simple_gla", "chunk_simple_gla", "fused_recurrent_simple_gla", PLAIN | G
    ),
    "channel gate": Kind("linear_attention", "channel", "gla", "chunk_gla", "fused_recurrent_gla", PLAIN | G),
    "delta": Kind("delta_rule", "none", "delta_rule", "chunk_delta_rule", "fused_recurrent_delta_rule", BETA),
    "gated delta": Kind(
        "delta_rule", "step", "gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", BETA | G
    ),
    "KDA": Kind("delta_rule", "channel", "kda", "chunk_kda", "fused_recurrent_kda", BETA | G),
}  # fmt: skip


class Question(NamedTuple):
    """A kind and a shape, who answers, and what the beginning of the answer must be."""

    kind: str
    shape: Shape
    contenders: list[Contender | Skipped]
    exact: np.ndarray


def drawn(kind: Kind, shape: Shape, seed: int) -> dict[str, Any]:
    """Random tensors: keys and queries of unit length, gates that keep some hundred tokens."""
    import torch

    random = torch.Generator("cuda").manual_seed(seed)
    normal = partial(torch.randn, generator=random, device="cuda")
    b, t, h, d = shape
    unit = {name: torch.nn.functional.normalize(normal(b, t, h, d), dim=-1).bfloat16() for name in ("q", "k")}
    arrays = unit | {"v": normal(b, t, h, d).bfloat16()}
    if "beta" in kind.names:
        arrays["beta"] = torch.sigmoid(normal(b, t, h))
    if kind.gate != "none":
        sizes = (b, t, h) if kind.gate == "step" else (b, t, h, d)
        arrays["log_decay"] = -torch.nn.functional.softplus(normal(*sizes)) / 64
    if shape.T == 1:
        arrays["S"] = normal(b, h, d, d)
    return arrays


def heads_first(x: Any) -> Any:
    """A tensor as an array of CuPy in our order of axes: the same memory."""
    import cupy
    import torch

    view = x.transpose(1, 2)
    if x.dtype != torch.bfloat16:
        return cupy.from_dlpack(view)
    from ml_dtypes import bfloat16

    return cupy.from_dlpack(view.view(torch.int16)).view(bfloat16)


def question(kind: str, shape: Shape, seed: int = 0) -> Question:
    """Everybody's calls on the same memory."""
    about, arrays = KINDS[kind], drawn(KINDS[kind], shape, seed)
    makers = {backend: partial(ours, backend) for backend in ("cupy", "numba-cuda")} | {"fla": triton, "torch": naive}
    contenders = [each for name, make in makers.items() for each in attempted(name, make, about, shape, arrays)]
    return Question(kind, shape, contenders, exact_beginning(about, shape, arrays))


def attempted(
    name: str, make: Callable[..., Any], kind: Kind, shape: Shape, arrays: dict[str, Any]
) -> Iterator[Contender | Skipped]:
    """A contender and its graph, or why there is none."""
    try:
        contender, graph = make(kind, shape, arrays)
    except Exception as problem:  # each package fails in its own ways; the others still run
        yield Skipped(name, f"{type(problem).__name__}: {first_line(problem)}")
        return
    yield contender
    if isinstance(contender, Contender):
        yield Contender(f"{contender.name}, graph", Graph(contender.call, graph), detail=contender.detail)


class Graph:
    """A call recorded at its first use and played from then on."""

    def __init__(self, call: Callable[[], Any], record: Callable[..., Any]) -> None:
        self.call, self.record = call, record
        self.play: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self.play is None:
            self.play = self.record(self.call)
        return self.play()


def by_cupy(call: Callable[[], Any], again: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """Record with CuPy: two calls on the stream first, so that all memory is there; then from the start again."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call(), call()
        stream.synchronize()
        stream.begin_capture()
        o = call()
        graph = stream.end_capture()
        again()
        stream.synchronize()

    def play() -> Any:
        graph.launch(cupy.cuda.get_current_stream())
        return o

    return play


def by_torch(call: Callable[[], Any]) -> Callable[[], Any]:
    """Record with torch."""
    import torch

    call(), call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()

    def play() -> Any:
        graph.replay()
        return o

    return play


def ours(backend: str, kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender | Skipped, Any]:
    """One of our backends; for one token a stream on the caller's arrays."""
    reason = available_backends()[backend]
    if reason != "ok":
        return Skipped(backend, reason), None
    if backend == "numba-cuda" and shape.token_heads > SLOW:
        return Skipped(backend, f"goes token by token: not asked beyond {SLOW} tokens of heads"), None
    views = {name: heads_first(x) for name, x in arrays.items() if name != "S"}
    if shape.T == 1:
        call, again = stream(backend, kind, views, heads_first(arrays["S"].transpose(1, 2)))
        return Contender(backend, call), partial(by_cupy, again=again)
    return Contender(backend, partial(operator, backend, kind, views)), by_cupy


def operator(backend: str, kind: Kind, views: dict[str, Any]) -> Any:
    """A call of the operator."""
    return getattr(ttr_np, kind.operator)(**views, backend=backend)


def stream(
    backend: str, kind: Kind, views: dict[str, Any], start: Any
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step of a stream whose token, state and answer stay where they are, and what takes it back to its start."""
    import cupy

    S, dtype = start.copy(), views["v"].dtype if backend == "cupy" else np.dtype(np.float32)
    narrow = {name: np.float32 if name in GATES else dtype for name in views}
    token = {name: cupy.ascontiguousarray(x.squeeze(2).astype(narrow[name])) for name, x in views.items()}
    shapes = {name: x.shape for name, x in token.items()}
    step = ttr_np.Stream(kind.operator, dtype=dtype, state=(S,), backend=backend, **shapes)
    out = cupy.empty_like(token["v"])
    return lambda: step(**token, out=out)[..., None, :], lambda: cupy.copyto(S, start)


def triton(kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender | Skipped, Any]:
    """flash-linear-attention on its own order of axes; its answers are turned to ours."""
    name = kind.token if shape.T == 1 else kind.chunk
    function = getattr(import_module(f"fla.ops.{kind.module}"), name)
    given = {name_of(kind, name, key): x for key, x in arrays.items() if key in kind.names}
    more = kind.options | ({"initial_state": arrays["S"], "output_final_state": True} if shape.T == 1 else {})

    def call() -> Any:
        return function(**given, scale=1.0, **more)[0].transpose(1, 2)

    return Contender("fla", call, detail=name), by_torch


def name_of(kind: Kind, function: str, array: str) -> str:
    """What a function calls one of our arrays; one of them differs from its sisters."""
    return "gk" if (function, array) == ("fused_recurrent_gla", "log_decay") else kind.names[array]


def naive(kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender | Skipped, Any]:
    """Torch's own operations in float32, in chunks of 64."""
    if shape.token_heads > NAIVE or shape.T % 64:
        return Skipped("torch", f"its forms are asked for whole chunks, up to {NAIVE} tokens of heads"), None
    flat = {name: x.transpose(1, 2).flatten(0, 1).float().contiguous() for name, x in arrays.items()}
    form = getattr(torch_forms, kind.operator)
    b, t, h, d = shape
    return Contender("torch", lambda: form(**flat, c=64).reshape(b, h, t, d), detail="float32, chunk 64"), by_torch


def exact_beginning(kind: Kind, shape: Shape, arrays: dict[str, Any]) -> np.ndarray:
    """The first tokens of two heads by the solver in float64."""
    t = min(shape.T, CHECKED)
    part = {
        name: x.transpose(1, 2)[:1, :2, :t].double().cpu().numpy() for name, x in arrays.items() if name != "S"
    }
    options = {"initial_state": (arrays["S"][:1, :2].double().cpu().numpy(),)} if shape.T == 1 else {}
    return reference(Case(kind.operator, "", part, options))


def beginning(o: Any, exact: np.ndarray) -> np.ndarray:
    """What of an answer was computed exactly too, on the host."""
    o = o[tuple(slice(0, size) for size in exact.shape)]
    if hasattr(o, "float"):
        return o.float().cpu().numpy()
    return o.get().astype(np.float64)


def seconds_of(call: Callable[[], Any], calls: int) -> float:
    """Of one call among several in a row, between two events of the device."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3 / calls


def measured_rates() -> Rates:
    """What this machine's copies and products reach: the best of several."""
    import torch

    x = torch.ones(2**28, dtype=torch.bfloat16, device="cuda")
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    y = torch.empty_like(x)
    copy = min(seconds_of(lambda: y.copy_(x), 3) for _ in range(5))
    product = min(seconds_of(lambda: a @ a, 3) for _ in range(5))
    return Rates(2 * x.nbytes / copy, 2 * 8192**3 / product)
