"""flash-linear-attention's naive references as contenders: plain torch, but importing them needs Triton."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np

from ttr_np.measure import Case, Contender, Skipped

__all__ = ["fla_peers"]

# Its names of our arrays, in the order of its functions: [batch, t, heads, ...].
NAIVE: dict[str, tuple[str, str, dict[str, str]]] = {
    "linear_attention": ("linear_attn", "naive_chunk_linear_attn", {}),
    "linear_attention scalar": ("simple_gla", "naive_chunk_simple_gla", {"log_decay": "g"}),
    "linear_attention channel": ("gla", "naive_recurrent_gla", {"log_decay": "gk"}),
    "delta_rule scalar": ("gated_delta_rule", "naive_chunk_gated_delta_rule", {"log_decay": "g"}),
    "delta_rule channel": ("kda", "naive_chunk_kda", {"log_decay": "g"}),
}


def fla_peers(case: Case) -> list[Contender | Skipped]:
    """The naive reference of a case, if there is one and it imports."""
    kind = " ".join(part for part in (case.operator, case.variant) if part)
    if kind not in NAIVE:
        return []
    module, function, names = NAIVE[kind]
    try:
        naive = getattr(import_module(f"fla.ops.{module}.naive"), function)
    except Exception as problem:  # without Triton, or with another torch, it fails in its own ways
        return [Skipped("fla naive", f"fla.ops.{module}.naive does not import: {problem}")]
    return [Contender("fla naive", bound(naive, case, names), detail=function)]


def bound(naive: Callable[..., Any], case: Case, names: dict[str, str]) -> Callable[[], np.ndarray]:
    """A call on views with time before heads, its answers turned back."""
    import torch

    arrays = {names.get(name, name): torch.from_numpy(x).transpose(1, 2) for name, x in case.arrays.items()}
    scale = {"scale": 1.0}
    if "scale" not in signature(naive).parameters:  # it divides by sqrt(k) unasked
        arrays["q"], scale = arrays["q"] * arrays["q"].shape[-1] ** 0.5, {}

    def call() -> Any:
        with torch.inference_mode():
            o = naive(**arrays, **scale)
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return call
