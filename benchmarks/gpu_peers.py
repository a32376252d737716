"""The contenders on a GPU: our backends, flash-linear-attention's Triton kernels, and torch, on the same memory.

Arrays are ``(B, T, H, D)`` tensors of torch, in bfloat16, with gates in float32; ours are views of them with heads
before time. A call that a CUDA graph can record is a contender twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

import ttr_np
from ttr_np.backends import available_backends
from ttr_np.measure import Case, Contender, Skipped, first_line, reference, using
from ttr_np.notation import GATES, CacheState

from . import torch_forms
from .floors import CG, Rates, Shape, work

__all__ = ["Question", "measured_rates", "question", "seconds_of"]

OURS = ("cupy", "numba-cuda")
CHECKED = 256  # tokens of two heads: what the solver in float64 is asked on the CPU
AMONG_ALL = 64  # queries of two heads, where each sees all pairs
NAIVE = 2**18  # token-heads up to which torch's forms in float32 are asked
SLOW = 4e11  # FLOP beyond which a backend is not asked that goes token by token or without tensor cores
RECORDED = 0.1  # seconds of a call, at most, for its graph to be asked too
RESIDUAL = 4e-4  # what the peer's 30 steps leave, whose products have factors of 16 bits

Maker = Callable[..., tuple[Contender | Skipped, Any]]  # of a kind, a shape and arrays: a contender, what records it


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def drawn(kind: Kind, shape: Shape, seed: int, device: str = "cuda") -> dict[str, Any]:
    """Random tensors; for one token that comes alone also the state that it finds."""
    import torch

    random = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=random, device=device)
    b, t, h, d = shape
    sizes = {"q": kind.queries or t, "k": t}
    arrays = {name: kind.keys(normal(b, tokens, h, d)).bfloat16() for name, tokens in sizes.items()}
    arrays["v"] = normal(b, t, h, d).bfloat16()
    arrays |= {name: draw(normal, shape) for name, draw in kind.gates.items()}
    return arrays | ({"S": normal(b, h, d, d)} if t == 1 else {})


def unit(x: Any) -> Any:
    """Keys and queries of unit length, as recurrences need them."""
    import torch

    return torch.nn.functional.normalize(x, dim=-1)


def as_drawn(x: Any) -> Any:
    """Keys and queries whose logits vary by one: attention that looks at some pairs more than at others."""
    return x


def weight(normal: Callable[..., Any], shape: Shape) -> Any:
    """Step sizes, or weights of pairs, in (0, 1)."""
    return normal(*shape[:3]).sigmoid()


def per_step(normal: Callable[..., Any], shape: Shape) -> Any:
    """Log gates that keep some hundred tokens."""
    return kept(normal(*shape[:3]))


def per_channel(normal: Callable[..., Any], shape: Shape) -> Any:
    """The same for every channel."""
    return kept(normal(*shape))


def kept(x: Any) -> Any:
    """Log gates from any numbers."""
    import torch

    return -torch.nn.functional.softplus(x) / 64


def heads_first(x: Any) -> Any:
    """A tensor as an array of CuPy in our order of axes: the same memory."""
    import cupy
    import torch

    view = x.transpose(1, 2)
    if x.dtype != torch.bfloat16:
        return cupy.from_dlpack(view)
    from ml_dtypes import bfloat16

    return cupy.from_dlpack(view.view(torch.int16)).view(bfloat16)


# ---- who answers -----------------------------------------------------------------------------------------------------


def ours(backend: str, kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender, Any]:
    """One of our backends; for one token a stream on the caller's arrays."""
    views = {name: heads_first(x) for name, x in arrays.items() if name != "S"}
    if shape.T == 1:
        call, again = stream(backend, kind, views, heads_first(arrays["S"].transpose(1, 2)))
        return Contender(backend, call), partial(by_cupy, again=again)
    return called(backend, kind, views), by_cupy


def cached(backend: str, kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender, Any]:
    """One of our backends, one query and one pair new to it: a cache of the others, in float32 as it returns it."""
    q, k, v = (heads_first(arrays[name][:, :1]) for name in "qkv")
    others = (heads_first(arrays[name][:, 1:].float()) for name in "kv")
    return called(backend, kind, {"q": q, "k": k, "v": v}, initial_state=cache(*others)), by_cupy


def called(backend: str, kind: Kind, views: dict[str, Any], **more: Any) -> Contender:
    """A call of the operator."""
    options = kind.options | kind.how | more | {"backend": backend}
    detail = ", ".join(f"{name} {x}" for name, x in kind.how.items())
    return Contender(backend, partial(getattr(ttr_np, kind.operator), **views, **options), detail=detail)


def stream(backend: str, kind: Kind, views: dict[str, Any], start: Any) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A step of a stream whose token, state and answer stay where they are, and what takes it back to its start."""
    import cupy

    S, dtype = start.copy(), views["v"].dtype if backend == "cupy" else np.dtype(np.float32)
    narrow = {name: np.float32 if name in GATES else dtype for name in views}
    token = {name: cupy.ascontiguousarray(x.squeeze(2).astype(narrow[name])) for name, x in views.items()}
    shapes = {name: x.shape for name, x in token.items()}
    step = ttr_np.Stream(kind.operator, dtype=dtype, state=(S,), backend=backend, **shapes)
    out = cupy.empty_like(token["v"])
    return lambda: step(**token, out=out)[..., None, :], lambda: cupy.copyto(S, start)


class Triton(NamedTuple):
    """flash-linear-attention's functions for chunks and for one token: their module, and what they call our arrays."""

    module: str
    chunk: str
    token: str
    names: dict[str, str]
    options: dict[str, Any] = {}

    def __call__(self, kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender, Any]:
        """On its own order of axes; its answers are turned to ours."""
        name = self.token if shape.T == 1 else self.chunk
        function = getattr(import_module(f"fla.ops.{self.module}"), name)
        given = {self.name_of(name, key): x for key, x in arrays.items() if key in self.names}
        more = {"initial_state": arrays["S"], "output_final_state": True} if shape.T == 1 else {}

        def call() -> Any:
            return function(**given, scale=1.0, **self.options, **more)[0].transpose(1, 2)

        return Contender("fla", call, detail=name), by_torch

    def name_of(self, function: str, array: str) -> str:
        """What a function calls one of our arrays; one of them differs from its sisters."""
        return "gk" if (function, array) == ("fused_recurrent_gla", "log_decay") else self.names[array]


def mesa_net(kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender, Any]:
    """flash-linear-attention's Mesa layer: plain steps of conjugate gradients."""
    import torch
    from fla.ops.mesa_net import chunk_mesa_net

    given = {name: arrays[key] for key, name in (BETA | G).items()}
    lamb = torch.full((shape.H, shape.D), kind.options["ridge"], device=arrays["k"].device)
    call = partial(chunk_mesa_net, **given, lamb=lamb, max_CG_iteration=CG)
    return Contender("fla", lambda: call()[0].transpose(1, 2), detail=f"chunk_mesa_net, {CG} steps"), by_torch


def attention(
    name: str, backend: str, kind: Kind, shape: Shape, arrays: dict[str, Any]
) -> tuple[Contender, Callable[..., Any]]:
    """Torch's attention by one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (arrays[name].transpose(1, 2) for name in "qkv")
    only = getattr(SDPBackend, backend)

    def call() -> Any:
        with sdpa_kernel(only):
            return scaled_dot_product_attention(q, k, v, is_causal=kind.options["causal"])

    return Contender(name, call), by_torch


def naive(kind: Kind, shape: Shape, arrays: dict[str, Any]) -> tuple[Contender | Skipped, Any]:
    """Torch's own operations in float32, in chunks of 64."""
    if shape.token_heads > NAIVE or shape.T % 64:
        return Skipped("torch", f"its forms are asked for whole chunks, up to {NAIVE} tokens of heads"), None
    flat = {name: x.transpose(1, 2).flatten(0, 1).float().contiguous() for name, x in arrays.items()}
    form = getattr(torch_forms, kind.operator)
    b, t, h, d = shape
    return Contender("torch", lambda: form(**flat, c=64).reshape(b, h, t, d), detail="float32, chunk 64"), by_torch


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class Graph:
    """A call recorded at its first use and played from then on."""

    def __init__(self, call: Callable[[], Any], record: Callable[..., Any]) -> None:
        self.call, self.record = call, record
        self.play: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self.play is None:
            if seconds_of(self.call, 1) > RECORDED:
                raise RuntimeError(f"a graph spares launches only, and a call takes more than {RECORDED} s")
            self.play = self.record(self.call)
        return self.play()


def by_cupy(call: Callable[[], Any], again: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """Record with CuPy: two calls on the stream first, so that all memory is there; then from the start again."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call(), call()
        stream.synchronize()
        o, graph = captured(stream, call)
        again()
        stream.synchronize()

    def play() -> Any:
        graph.launch(cupy.cuda.get_current_stream())
        return o

    return play


def captured(stream: Any, call: Callable[[], Any]) -> tuple[Any, Any]:
    """The answer and the graph of a call; a stream that cannot record it is left as it was."""
    stream.begin_capture()
    try:
        o = call()
    except BaseException:
        with suppress(Exception):  # what the call did wrong says more
            stream.end_capture()
        raise
    return o, stream.end_capture()


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


# ---- what is exact ---------------------------------------------------------------------------------------------------


def first(kind: Kind, arrays: dict[str, Any]) -> Case:
    """The first tokens of two heads."""
    part = {name: on_host(x[:, :CHECKED]) for name, x in arrays.items() if name != "S"}
    start = {"initial_state": (on_host(arrays["S"].transpose(1, 2)),)} if "S" in arrays else {}
    return Case(kind.operator, "", part, kind.options | start)


def among_all(kind: Kind, arrays: dict[str, Any]) -> Case:
    """The first queries of two heads among all pairs: those after theirs are already there, as no order matters."""
    n = min(AMONG_ALL, arrays["q"].shape[1])
    part = {name: on_host(arrays[name][:, :n]) for name in "qkv"}
    others = cache(*(on_host(arrays[name][:, n:]) for name in "kv"))
    return Case(kind.operator, "", part, kind.options | {"initial_state": others})


def on_host(x: Any) -> np.ndarray:
    """Two heads of a tensor in float64, in our order of axes."""
    return x.transpose(1, 2)[:1, :2].double().cpu().numpy()


def cache(k: Any, v: Any) -> CacheState:
    """Pairs that are already there, as an operator returns them."""
    place = np.zeros_like(k, shape=k.shape[:-1], dtype=np.int64) + np.arange(k.shape[-2], like=k)
    return CacheState(k, v, np.zeros_like(k, shape=k.shape[:-1]), place)


# ---- the kinds -------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """One line of ``KINDS``, which are those of ``floors``: a question, and who answers it beside our operator.

    ``gates`` and ``keys`` draw it, ``queries`` says how many (None: one per pair), ``options`` what else is asked, and
    ``how`` by which way ours find the answer. ``ours`` and each peer make a contender and what records its graph.
    ``exact`` is the part of the question that the solver in float64 answers.
    """

    operator: str
    gates: dict[str, Callable[..., Any]]
    peers: dict[str, Maker]
    options: dict[str, Any] = {}
    how: dict[str, Any] = {}
    keys: Callable[[Any], Any] = unit
    queries: int | None = None
    ours: Maker = ours
    exact: Callable[..., Case] = first


PLAIN, G = {"q": "q", "k": "k", "v": "v"}, {"log_decay": "g"}
BETA = PLAIN | {"beta": "beta"}
STEP, CHANNEL, WEIGHT = {"log_decay": per_step}, {"log_decay": per_channel}, {"beta": weight}
SDPA = {
    name: partial(attention, name, backend)
    for name, backend in (("torch flash", "FLASH_ATTENTION"), ("torch cuDNN", "CUDNN_ATTENTION"))
}


def chunks(*function: Any, **options: Any) -> dict[str, Maker]:
    """The peers of what goes in chunks."""
    return {"fla": Triton(*function, options), "torch": naive}


KINDS = {
    "linear": Kind(
        "linear_attention", {},
        chunks("linear_attn", "chunk_linear_attn", "fused_recurrent_linear_attn", PLAIN, normalize=False),
    ),
    "scalar gate": Kind(
        "linear_attention", STEP, chunks("simple_gla", "chunk_simple_gla", "fused_recurrent_simple_gla", PLAIN | G)
    ),
    "channel gate": Kind("linear_attention", CHANNEL, chunks("gla", "chunk_gla", "fused_recurrent_gla", PLAIN | G)),
    "delta": Kind(
        "delta_rule", WEIGHT, chunks("delta_rule", "chunk_delta_rule", "fused_recurrent_delta_rule", BETA)
    ),
    "gated delta": Kind(
        "delta_rule", WEIGHT | STEP,
        chunks("gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", BETA | G),
    ),
    "KDA": Kind("delta_rule", WEIGHT | CHANNEL, chunks("kda", "chunk_kda", "fused_recurrent_kda", BETA | G)),
    "softmax": Kind("softmax_attention", {}, SDPA, {"causal": True}, keys=as_drawn),
    "softmax full": Kind("softmax_attention", {}, SDPA, {"causal": False}, keys=as_drawn, exact=among_all),
    "softmax decode": Kind(
        "softmax_attention", {}, SDPA, {"causal": False}, keys=as_drawn, queries=1, ours=cached, exact=among_all
    ),
    "mesa": Kind(
        "mesa", WEIGHT | STEP, {"fla": mesa_net}, {"ridge": 1.0}, {"solver": "cg", "tolerance": RESIDUAL}
    ),
    "least squares": Kind("recursive_least_squares", WEIGHT | STEP, {}, {"ridge": 1.0}),
    "local linear": Kind("local_polynomial", {}, {}, keys=as_drawn),
}  # fmt: skip


# ---- the question ----------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A kind and a shape, who answers, and what the beginning of the answer must be."""

    kind: str
    shape: Shape
    contenders: list[Contender | Skipped]
    exact: np.ndarray


def question(name: str, shape: Shape, seed: int = 0) -> Question:
    """Everybody's calls on the same memory."""
    kind = KINDS[name]
    arrays, reasons = drawn(kind, shape, seed), refusals(name, shape)
    contenders: list[Contender | Skipped] = []
    for who, make in ({backend: partial(kind.ours, backend) for backend in OURS} | kind.peers).items():
        if who in reasons:
            contenders.append(Skipped(who, reasons[who]))
        else:
            contenders.extend(attempted(who, make, kind, shape, arrays))
    with using(1):  # matrices of one head: threads of BLAS would only wait for each other
        exact = reference(kind.exact(kind, arrays))
    return Question(name, shape, contenders, exact)


def refusals(name: str, shape: Shape) -> dict[str, str]:
    """Who is not asked, and why."""
    slow = {"numba-cuda": f"has no tensor cores: not asked beyond {SLOW:.0e} FLOP"}
    absent = {backend: reason for backend, reason in available_backends().items() if reason != "ok"}
    return slow | absent if work(name, shape).flop > SLOW else absent


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


def beginning(o: Any, exact: np.ndarray) -> np.ndarray:
    """What of an answer was computed exactly too, on the host."""
    o = o[tuple(slice(0, size) for size in exact.shape)]
    if hasattr(o, "float"):
        return o.float().cpu().numpy()
    return o.get().astype(np.float64)


# ---- the clock -------------------------------------------------------------------------------------------------------


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
