"""Torch as a contender: the fastest of its forms and chunk sizes, eager and compiled, on every device it has.

Which form is fastest is found on the spot, on the very inputs, before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

from ttr_np.measure import Case, Contender, Skipped, at_once, seconds
from ttr_np.notation import ARRAYS

__all__ = ["torch_peers"]

UNROLLED = 16  # loops of more chunks than this take torch.compile minutes
TRIES = 3
PER_TOKEN = (None,)  # a loop over tokens: no chunk to choose
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
        "torch scan": [("diagonal_scan", (16, 64, 256))],
    },
    "test_time_training": {"torch": [("test_time_training", (16,))]},
    "decode linear": {"torch": [("linear_step", PER_TOKEN)]},
    "decode delta": {"torch": [("delta_step", PER_TOKEN)]},
}


class Form(NamedTuple):
    """One way to compute it: how it is called, and how many steps its loop has."""

    label: str
    call: Callable[[], Any]
    steps: int


def torch_peers(case: Case, kind: str, compiled: bool, **options: Any) -> list[Contender | Skipped]:
    """Torch's contenders for a case; ``kind`` names a line of ``FORMS``, ``options`` go to its forms."""
    if kind not in FORMS:
        return []
    if find_spec("torch") is None:
        return [Skipped("torch", "torch is not installed")]
    import torch

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [
        contender
        for device in devices
        for name, forms in FORMS[kind].items()
        for contender in on_device(f"{name} {device}".removesuffix(" cpu"), forms, case, device, compiled, options)
    ]


def on_device(
    name: str, forms: list[tuple[str, tuple[int | None, ...]]], case: Case, device: str, compiled: bool, options: Any
) -> Iterator[Contender | Skipped]:
    """The fastest form, and the fastest that can be compiled."""
    import torch

    arrays = tensors(case, device)
    finish = torch.cuda.synchronize if device == "cuda" else at_once
    shape = data_of(case).shape
    ways = [way for form, sizes in forms for way in ways_of(form, sizes, shape[-2], partial_of(arrays, options))]
    order = sorted(ways, key=lambda way: fastest(way, finish))
    yield Contender(name, answers(order[0].call, shape), finish, order[0].label)
    if not compiled:
        yield Skipped(f"{name} compiled", "--no-compile")
        return
    short = [way for way in order if way.steps <= UNROLLED]
    if not short:
        yield Skipped(f"{name} compiled", f"its loop has {order[0].steps} steps, which torch.compile unrolls")
        return
    yield Contender(f"{name} compiled", answers(torch.compile(short[0].call), shape), finish, short[0].label)


def partial_of(arrays: dict[str, Any], options: dict[str, Any]) -> Callable[[str, int | None], Callable[[], Any]]:
    """A form of ``torch_forms`` on its arguments."""
    from . import torch_forms

    def bound(form: str, c: int | None) -> Callable[[], Any]:
        chunk = {} if c is None else {"c": c}
        return partial(getattr(torch_forms, form), **arrays, **options, **chunk)

    return bound


def ways_of(form: str, sizes: tuple[int | None, ...], t: int, bound: Any) -> list[Form]:
    """A form with every chunk size that divides t; with t itself if none does."""
    if sizes == PER_TOKEN:
        steps = t if form.endswith("loop") else 1
        return [Form(form, bound(form, None), steps)]
    fitting = [c for c in sizes if c is not None and t % c == 0] or [t]
    return [Form(f"{form}, chunk {c}", bound(form, c), t // c) for c in fitting]


def data_of(case: Case) -> Any:
    """The array that the answers resemble."""
    return next(case.arrays[name] for name in ("v", "x", "u") if name in case.arrays)


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


def fastest(way: Form, finish: Callable[[], None]) -> float:
    """Seconds of the best of a few calls; one call is enough to know a slow form."""
    contender = Contender(way.label, answers(way.call, None), finish)
    first = seconds(contender)
    return first if first > 1 else min(seconds(contender) for _ in range(TRIES))


def answers(call: Callable[[], Any], shape: tuple[int, ...] | None) -> Callable[[], Any]:
    """A call that records no gradients and answers in the shape of ours, without a state."""
    import torch

    def answer() -> Any:
        with torch.inference_mode():
            o = call()
        o = o[0] if isinstance(o, tuple) else o
        return o if shape is None else o.reshape(shape)

    return answer
