"""flash-linear-attention's naive references as contenders: plain torch, but importing them needs Triton.

Triton comes with torch's wheels for CUDA and can be installed beside its wheel for CPUs; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

from ttr_np.measure import Case, Contender, Skipped, first_line

__all__ = ["fla_peers"]


class Naive(NamedTuple):
    """A reference: where it is, its names of our arrays, and whether heads come before time in its arrays."""

    module: str
    function: str
    names: dict[str, str] = {}
    heads_first: bool = False


NAIVE: dict[str, Naive] = {
    "linear_attention": Naive("linear_attn", "naive_chunk_linear_attn"),
    "linear_attention scalar": Naive("simple_gla", "naive_chunk_simple_gla", {"log_decay": "g"}),
    "linear_attention channel": Naive("gla", "naive_recurrent_gla", {"log_decay": "gk"}),
    "delta_rule": Naive("delta_rule", "delta_rule_chunkwise", {}, True),
    "delta_rule scalar": Naive("gated_delta_rule", "naive_chunk_gated_delta_rule", {"log_decay": "g"}),
    "delta_rule channel": Naive("kda", "naive_chunk_kda", {"log_decay": "g"}),
    "dplr channel": Naive(
        "generalized_delta_rule.dplr", "dplr_chunkwise", {"a": "alpha", "b": "beta", "log_decay": "gk"}, True
    ),
    "mesa scalar": Naive("mesa_net", "naive_mesa_net_CG", {"log_decay": "g"}),
    "mesa scalar, cg": Naive("mesa_net", "naive_mesa_net_CG", {"log_decay": "g"}),
}
CHUNK = 64  # of those that take chunks


def fla_peers(case: Case) -> list[Contender | Skipped]:
    """The naive reference of a case, if there is one and it imports."""
    kind = " ".join(part for part in (case.operator, case.variant) if part)
    if kind not in NAIVE:
        return []
    naive = NAIVE[kind]
    try:
        function = getattr(import_module(f"fla.ops.{naive.module}.naive"), naive.function)
    except Exception as problem:  # without Triton, or with another torch, it fails in its own ways
        return [Skipped("fla naive", f"flash-linear-attention does not import: {first_line(problem)}")]
    if "recurrent" not in naive.function and case.arrays["q"].shape[-2] % CHUNK:
        return [Skipped("fla naive", f"{naive.function} takes whole chunks of {CHUNK} tokens")]
    return [Contender("fla naive", bound(function, naive, case), detail=naive.function)]


def bound(function: Callable[..., Any], naive: Naive, case: Case) -> Callable[[], Any]:
    """A call on views in its order of axes, its answers turned back."""
    import torch

    turn = (lambda x: x) if naive.heads_first else (lambda x: x.transpose(1, 2))
    arrays = {naive.names.get(name, name): turn(torch.from_numpy(x)) for name, x in case.arrays.items()}
    arrays |= options_of(function, case)
    if "scale" not in arrays and case.operator != "mesa":  # it divides by sqrt(k) unasked
        arrays["q"] = arrays["q"] * arrays["q"].shape[-1] ** 0.5

    def call() -> Any:
        o = function(**arrays)
        return turn(o[0] if isinstance(o, tuple) else o)

    return call


def options_of(function: Callable[..., Any], case: Case) -> dict[str, Any]:
    """What it takes beside arrays."""
    import torch

    if case.operator == "mesa":
        heads, k = np.shape(case.arrays["q"])[1::2]
        return {"lamb": torch.full((heads, k), float(case.options["ridge"])), "chunk_size": CHUNK}
    return {"scale": 1.0} if "scale" in signature(function).parameters else {}
