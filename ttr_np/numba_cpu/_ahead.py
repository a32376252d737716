"""Kernels compiled before they are needed, by as many processes as there are cores, which take them off one list.

One process compiles one kernel at a time. What is on disk already is only read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

import numpy as np

import ttr_np

from ..notation import draw
from ._lanes import NARROW

__all__ = ["compile_ahead", "compile_one", "jobs_of"]

# Those that take longest come first, so that no process is left with a long one at the end.
LONGEST_FIRST = ("recursive_least_squares", "mesa", "linear_attention", "delta_rule", "test_time_training")
ONE_WAY: list[tuple[int, dict[str, Any]]] = [(2 * NARROW, {})]  # outputs, and options of a call
# Operators that have other kernels for other calls. With a ridge of zero the Mesa layer needs double precision too.
WAYS = dict.fromkeys(("delta_rule", "recursive_least_squares"), [*ONE_WAY, (1, {})]) | {
    "mesa": [(2 * NARROW, {"ridge": 0.0}), (2 * NARROW, {"solver": "cg"})],
    "test_time_training": [(2 * NARROW, {"memory": ttr_np.Linear()})],
}


def jobs_of(operators: Sequence[str], dtypes: Sequence[str]) -> list[tuple[str, str, int]]:
    """An operator, a dtype and the number of one of its ways for each call, those that take longest first."""
    order = sorted(operators, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else 99)
    cases = product(order, dtypes)
    return [(operator, dtype, way) for operator, dtype in cases for way in range(len(WAYS.get(operator, ONE_WAY)))]


def compile_one(operator: str, dtype: str, way: int) -> None:
    """Call an operator on a few tokens."""
    outputs, options = WAYS.get(operator, ONE_WAY)[way]
    arrays = draw(operator, np.random.default_rng(0), per_channel=False, dtype=dtype, v=outputs)
    getattr(ttr_np, operator)(**arrays, **options, backend="numba")


def compile_ahead(operators: Sequence[str], dtypes: Sequence[str]) -> None:
    """Every kernel of some operators, in several processes; what one of them raises is raised here."""
    jobs = jobs_of(operators, dtypes)
    count = min(os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*jobs, strict=True)))
