"""Kernels compiled before they are needed, by as many processes as there are cores, which take them off one list.

One process compiles one kernel at a time. What is on disk already is only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from typing import Any

import numpy as np

import ttr_np

from ..notation import draw
from ._lanes import NARROW

__all__ = ["compile_ahead", "compile_layers", "compile_one", "jobs_of"]

# Those that take longest come first, so that no process is left with a long one at the end.
LONGEST_FIRST = ("mesa", "recursive_least_squares", "delta_rule", "linear_attention", "test_time_training")
SIZE = 64  # of a layer's keys and values: that of ``ttr recall``
ONE_WAY: list[tuple[int, dict[str, Any]]] = [(2 * NARROW, {})]  # outputs, and options of a call
# Operators that have other kernels for other calls. With a ridge of zero the Mesa layer needs double precision too.
WAYS = dict.fromkeys(("delta_rule", "recursive_least_squares"), [*ONE_WAY, (1, {})]) | {
    "mesa": [(2 * NARROW, {"ridge": 0.0}), (2 * NARROW, {"solver": "cg"})],
    "test_time_training": [(2 * NARROW, {"memory": ttr_np.Linear()})],
}


def jobs_of(operators: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str, int]]:
    """An operator, a dtype and the number of one of its ways for each call, those that take longest first."""
    cases = product(longest_first(operators), dtypes)
    return [(operator, dtype, way) for operator, dtype in cases for way in range(len(WAYS.get(operator, ONE_WAY)))]


def longest_first(operators: Sequence[str]) -> list[str]:
    """Operators by the time that their kernels take to compile."""
    return sorted(operators, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else 99)


def compile_one(operator: str, dtype: str, way: int) -> None:
    """Call an operator on a few tokens."""
    outputs, options = WAYS.get(operator, ONE_WAY)[way]
    arrays = draw(operator, np.random.default_rng(0), per_channel=False, dtype=dtype, v=outputs)
    getattr(ttr_np, operator)(**arrays, **options, backend="numba")


def compile_ahead(operators: Sequence[str], dtypes: Sequence[str]) -> None:
    """Every kernel of some operators, in several processes; what one of them raises is raised here."""
    side_by_side(compile_one, jobs_of(operators, dtypes))


def compile_layers(names: Sequence[str], dtypes: Sequence[str]) -> None:
    """The kernels that some layers of queries, keys and values call: fewer than their operators have."""
    by_operator: dict[str, list[str]] = {}
    for name in names:
        by_operator.setdefault(ttr_np.layers[name].operator, []).append(name)
    cases = product(longest_first(list(by_operator)), dtypes)
    side_by_side(call_layers, [(by_operator[operator], dtype) for operator, dtype in cases])


def call_layers(names: Sequence[str], dtype: str) -> None:
    """Call layers of one operator on a few tokens."""
    x = np.random.default_rng(0).standard_normal((2, SIZE)).astype(dtype)
    for name in names:
        with suppress(NotImplementedError):  # what cannot be compiled is not called either
            ttr_np.layers[name](x, x, x, backend="numba")


def side_by_side(call: Callable[..., None], jobs: Sequence[tuple[Any, ...]]) -> None:
    """Calls in as many processes as there are cores; what one of them raises is raised here."""
    count = min(os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        list(pool.map(call, *zip(*jobs, strict=True)))
