"""Torch as a contender: the fastest of its forms and chunk sizes, eager and compiled, on every device it has.

Which form is fastest is found on the spot, on the very inputs, before anything is timed. Compiled are the two fastest
ways of every form: as a whole, or, where there is a loop, its body (unrolled, a loop takes minutes to compile and is
not faster). The fastest of these is the contender.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature
from time import perf_counter
from typing import Any, NamedTuple

from ttr_np.measure import Case, Contender, Skipped, at_once, first_line, on_host, relative_error, seconds
from ttr_np.notation import ARRAYS

__all__ = ["no_gradients", "torch_peers"]

TRIES = 5
COMPILED = 2  # chunk sizes of a form that are compiled
AGREE = 1e-3  # two forms of one question may differ by rounding only
PER_TOKEN = (None,)  # no chunk to choose
WHOLE = 0  # the chunk is the sequence
CHUNKS, SHORT = (64, 128, 256), (32, 64, 128)
FORMS: dict[str, dict[str, list[tuple[str, tuple[int | None, ...]]]]] = {
    "linear_attention": {"torch": [("linear_attention", CHUNKS), ("linear_attention_loop", CHUNKS)]},
    "delta_rule": {"torch": [("delta_rule", SHORT)]},
    "dplr": {"torch": [("dplr", SHORT)]},
    "softmax_attention": {"torch SDPA": [("attention", PER_TOKEN)]},
    "mesa": {"torch 30 CG": [("mesa", CHUNKS)]},
    "selective_scan": {
        "torch loop": [("selective_scan_loop", PER_TOKEN)],
        "torch scan": [("selective_scan", (16, 64, 256))],
    },
    "diagonal_scan": {
        "torch loop": [("diagonal_scan_loop", PER_TOKEN)],
        "torch scan": [("diagonal_scan", (16, 64, 256, WHOLE))],
    },
    "test_time_training": {"torch": [("test_time_training", (16,))]},
    "short_convolution": {"torch conv1d": [("short_convolution", PER_TOKEN)]},
    "decode linear": {"torch": [("linear_step", PER_TOKEN)]},
    "decode delta": {"torch": [("delta_step", PER_TOKEN)]},
}


class Form(NamedTuple):
    """One way to compute it: its name, its chunk, how it is called, and how it can be compiled: whole, body or not."""

    name: str
    chunk: int | None
    call: Callable[..., Any]
    compiles: str

    @property
    def label(self) -> str:
        return self.name if self.chunk is None else f"{self.name}, chunk {self.chunk}"


def torch_peers(case: Case, kind: str, compiled: bool, **options: Any) -> list[Contender | Skipped]:
    """Torch's contenders for a case; ``kind`` names a line of ``FORMS``, ``options`` go to its forms."""
    if kind not in FORMS:
        return []
    if find_spec("torch") is None:
        return [Skipped("torch", "torch is not installed")]
    import torch

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    found: list[Contender | Skipped] = []
    for device in devices:
        for form, sizes in FORMS[kind].items():
            name = f"{form} {device}".removesuffix(" cpu")
            try:
                found += on_device(name, sizes, case, device, compiled, options)
            except Exception as problem:  # out of memory, say: the others still run
                found.append(Skipped(name, f"{type(problem).__name__}: {first_line(problem)}"))
    return found


def on_device(
    name: str, forms: list[tuple[str, tuple[int | None, ...]]], case: Case, device: str, compiled: bool, options: Any
) -> Iterator[Contender | Skipped]:
    """The fastest form, and the fastest of what can be compiled."""
    import torch

    finish = torch.cuda.synchronize if device == "cuda" else at_once
    shape = data_of(case).shape
    bound = partial_of(tensors(case, device), options)
    ways = [way for form, sizes in forms for way in ways_of(form, sizes, shape[-2], bound)]
    order = sorted(agreeing(ways), key=lambda way: fastest(way.call, finish))
    yield Contender(name, answers(order[0].call, shape), finish, order[0].label)
    yield compiled_of(f"{name} compiled", order, shape, finish) if compiled else Skipped(f"{name} compiled", SWITCHED)


SWITCHED = "left out by --quick or --no-compile"


def agreeing(ways: list[Form]) -> list[Form]:
    """Those that answer as the first does: with a long chunk a form may leave float32, and would only seem fast."""
    if len(ways) == 1:
        return ways
    plain = on_host(answers(ways[0].call, None)())
    return [ways[0], *(way for way in ways[1:] if relative_error(answers(way.call, None)(), plain) < AGREE)]


def compiled_of(name: str, order: list[Form], shape: tuple[int, ...], finish: Callable[[], None]) -> Any:
    """The fastest of every form's compiled ways, or why there is none."""
    import torch

    torch._dynamo.reset()  # else it soon gives up on a function that it has met in many shapes, and says nothing
    found, reason = [], "its loop over all tokens is too long to unroll"
    for way in order:
        same = [other for other in order if other.name == way.name]
        if way.compiles == "not" or way not in same[:COMPILED]:
            continue
        call, start = compiled_call(way), perf_counter()
        try:
            answers(call, None)()
        except Exception as problem:  # it may fail in any way; the other forms still run
            reason = f"{type(problem).__name__}: {first_line(problem)}"
            continue
        label = f"{way.label}, {way.compiles} compiled in {perf_counter() - start:.0f} s"
        found.append((fastest(call, finish), label, call))
    if not found:
        return Skipped(name, reason)
    _, label, call = min(found, key=lambda one: one[0])
    return Contender(name, answers(call, shape), finish, label)


def compiled_call(way: Form) -> Callable[[], Any]:
    """A form compiled as a whole, or with a compiled body in its loop."""
    import torch

    return torch.compile(way.call, dynamic=False) if way.compiles == "whole" else partial(way.call, wrap=compiled_body)


@cache
def compiled_body(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body of a loop, compiled once."""
    import torch

    return torch.compile(body, dynamic=False)


def partial_of(arrays: dict[str, Any], options: dict[str, Any]) -> Callable[[str, int | None], Callable[[], Any]]:
    """A form of ``torch_forms`` on its arguments."""
    from . import torch_forms

    def bound(form: str, c: int | None) -> Callable[[], Any]:
        chunk = {} if c is None else {"c": c}
        return partial(getattr(torch_forms, form), **arrays, **options, **chunk)

    return bound


def ways_of(form: str, sizes: tuple[int | None, ...], t: int, bound: Any) -> list[Form]:
    """A form with every chunk size that divides t; with t itself if none does."""
    from . import torch_forms

    looped = "wrap" in signature(getattr(torch_forms, form)).parameters
    compiles = "body" if looped else "not" if form.endswith("loop") else "whole"
    if sizes == PER_TOKEN:
        return [Form(form, None, bound(form, None), compiles)]
    fitting = [c or t for c in sizes if c is not None and t % (c or t) == 0] or [t]
    return [Form(form, c, bound(form, c), compiles) for c in fitting]


def data_of(case: Case) -> Any:
    """The array that the answers resemble."""
    return next(case.arrays[name] for name in ("v", "u", "x") if name in case.arrays)


def tensors(case: Case, device: str) -> dict[str, Any]:
    """The arrays as tensors with all leading axes in one; those without a time axis as they are."""
    import torch

    arrays, lead = {}, len(data_of(case).shape) - 2
    for name, x in case.arrays.items():
        flat = x.reshape((-1, *x.shape[lead:])) if ARRAYS[name].axes.startswith("t") else x
        arrays[name] = torch.from_numpy(flat).to(device)
    if "initial_state" in case.options:
        S = case.options["initial_state"][0]
        arrays["S"] = torch.from_numpy(S.reshape((-1, *S.shape[-2:]))).to(device)
    return arrays


def fastest(call: Callable[[], Any], finish: Callable[[], None]) -> float:
    """Seconds of the best of a few calls; one call is enough to know a slow form."""
    contender = Contender("", answers(call, None), finish)
    first = seconds(contender)
    return first if first > 1 else min(seconds(contender) for _ in range(TRIES))


def answers(call: Callable[[], Any], shape: tuple[int, ...] | None) -> Callable[[], Any]:
    """A call that answers in the shape of ours, without a state."""

    def answer() -> Any:
        o = call()
        o = o[0] if isinstance(o, tuple) else o
        return o if shape is None else o.reshape(shape)

    return answer


def no_gradients() -> AbstractContextManager[Any]:
    """Torch records nothing: entered once, for at every call it would cost a small step a third of its time."""
    if find_spec("torch") is None:
        return nullcontext()
    import torch

    return torch.inference_mode()
