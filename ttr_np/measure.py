"""Measuring side by side: correct first, then interleaved, with spread, error, and peak memory.

    error = max |o - o64| / max |o64|,    o64 of the NumPy solver in float64

All contenders run in one process, round after round, in an order shuffled each round: whatever else the machine does
meets them alike. A wrong answer is refused and not timed. Times are those of calls with warm caches and compiled code;
the first call's time, which compiles, stands beside them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np

import ttr_np

from .backends import ON_GPU
from .notation import axes_of

__all__ = [
    "TOLERANCE",
    "Case",
    "Contender",
    "Skipped",
    "at_once",
    "busy",
    "contest",
    "first_line",
    "gated",
    "gemm_rate",
    "machine",
    "on_host",
    "ours",
    "prefix",
    "products",
    "reference",
    "relative_error",
    "sample",
    "seconds",
    "softened",
    "spread",
    "using",
]

TOLERANCE = {"float16": 3e-2, "float32": 1e-3, "float64": 1e-6}  # of the largest answer: wrong, not merely rounded
LEAST = 2e-2  # seconds: a sample of shorter calls holds several
SOFT = 16  # log gates of the tests over this at least
QUIET = 0.12  # seconds after which threads that spin for more work have gone to sleep: OpenBLAS gives up after 0.1
BRIEF = 1.0  # seconds: shorter calls run untimed before their sample
SETTLED = 6e-2  # seconds of calls after which threads that slept run at their pace: on two cores 30 ms were measured
GEMM = 1024  # size of the matrices whose product is the machine's rate
PACKAGES = ("numpy", "scipy", "numba", "torch", "scikit-learn", "statsmodels", "padasip", "flash-linear-attention")


class Case(NamedTuple):
    """One question: an operator, its arrays, its options, and in words which of its variants it is."""

    operator: str
    variant: str
    arrays: Mapping[str, np.ndarray]
    options: Mapping[str, Any] = {}


def at_once() -> None:
    """A call on the CPU has finished when it returns."""


class Contender(NamedTuple):
    """Somebody who answers: ``call()`` gives the answers, ``finish()`` waits until a device has them."""

    name: str
    call: Callable[[], Any]
    finish: Callable[[], None] = at_once
    detail: str = ""


class Skipped(NamedTuple):
    """Somebody who does not run, and why."""

    name: str
    reason: str


def on_host(o: Any) -> np.ndarray:
    """Answers as a NumPy array, wherever they are, without the state that may follow them."""
    o = o[0] if isinstance(o, tuple) else o
    if hasattr(o, "get"):
        return o.get()
    return np.asarray(o.cpu() if hasattr(o, "cpu") else o)


def reference(case: Case) -> np.ndarray:
    """The answers of the NumPy solver in float64."""
    arrays = {name: x.astype(np.result_type(x, np.float64)) for name, x in case.arrays.items()}
    return on_host(getattr(ttr_np, case.operator)(**arrays, **case.options, backend="numpy"))


def prefix(case: Case, t: int) -> Case:
    """The first t steps of a case: views, no copies."""
    arrays = dict(case.arrays)
    for name, x in case.arrays.items():
        axes = axes_of(name, x, arrays)
        if axes[0] == "t":
            arrays[name] = x[(..., slice(t)) + (slice(None),) * (len(axes) - 1)]
    return case._replace(arrays=arrays)


def ours(case: Case, backend: str) -> Contender:
    """One of our backends; arrays of a GPU backend are on the GPU before the clock starts."""
    arrays, finish = dict(case.arrays), at_once
    if backend in ON_GPU:
        cupy = import_module("cupy")
        arrays = {name: cupy.asarray(x) for name, x in arrays.items()}
        finish = cupy.cuda.Device().synchronize
    operator = getattr(ttr_np, case.operator)
    return Contender(backend, lambda: operator(**arrays, **case.options, backend=backend), finish)


def relative_error(o: Any, exact: np.ndarray) -> float:
    """Largest difference over the largest answer; infinite if an answer is missing or not finite."""
    o = on_host(o)
    if o.shape != exact.shape or not np.isfinite(o).all():
        return float("inf")
    return float(np.abs(o - exact).max(initial=0) / max(np.abs(exact).max(initial=0), np.finfo(float).tiny))


def seconds(contender: Contender, calls: int = 1) -> float:
    """Wall time of one call, the mean of several in a row."""
    start = perf_counter()
    for _ in range(calls):
        contender.call()
    contender.finish()
    return (perf_counter() - start) / calls


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, the least (what a busy machine lets through), and of how many samples."""
    least, low, middle, high = np.percentile(times, [0, 20, 50, 80])
    return {
        "median": float(middle),
        "p20": float(low),
        "p80": float(high),
        "least": float(least),
        "samples": len(times),
    }


def sample(
    contenders: Sequence[Contender], rounds: int, rng: np.random.Generator, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, all of them in each round, in an order shuffled each time.

    One that has used up its budget of seconds sits the later rounds out; each has one sample at least. A sample follows
    untimed calls, so that nobody is charged for arrays that others drove out of the caches or for waking threads.
    """
    warm = {c.name: seconds(c) for c in contenders}
    calls = {name: max(1, int(LEAST / max(each, 1e-9))) for name, each in warm.items()}
    times = {name: [each] if each > budget else [] for name, each in warm.items()}
    for _ in range(rounds):
        for i in rng.permutation(len(contenders)):
            contender = contenders[i]
            if sum(times[contender.name]) * calls[contender.name] > budget:
                continue
            sleep(QUIET)
            if warm[contender.name] < BRIEF:
                seconds(contender, max(1, int(SETTLED / max(warm[contender.name], 1e-9))))
            times[contender.name].append(seconds(contender, calls[contender.name]))
    return times


def trial(contender: Contender, exact: np.ndarray, tolerance: float) -> dict[str, Any]:
    """First call: its seconds and its error, or why the contender is not timed."""
    start = perf_counter()
    try:
        o = contender.call()
        contender.finish()
        error = relative_error(o, exact)
    except Exception as problem:  # a peer may fail in any way; the others still run
        return {"contender": contender.name, "reason": f"{type(problem).__name__}: {first_line(problem)}"}
    first = perf_counter() - start
    if not error <= tolerance:
        return {"contender": contender.name, "reason": f"wrong: error {error:.1e}, allowed {tolerance:.0e}"}
    return {"contender": contender.name, "detail": contender.detail, "error": error, "first_call_seconds": first}


def first_line(problem: BaseException) -> str:
    """An exception in one line."""
    return (str(problem).strip().splitlines() or [""])[0][:200]


def gated(
    contenders: Sequence[Contender | Skipped], exact: np.ndarray, tolerance: float
) -> tuple[list[Contender], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The contenders that were right, their first calls by name, and the others with their reasons."""
    skipped = [{"contender": c.name, "reason": c.reason} for c in contenders if isinstance(c, Skipped)]
    able = [c for c in contenders if isinstance(c, Contender)]
    trials = {c.name: trial(c, exact, tolerance) for c in able}
    right = [c for c in able if "reason" not in trials[c.name]]
    return right, trials, skipped + [entry for entry in trials.values() if "reason" in entry]


def contest(
    contenders: Sequence[Contender | Skipped],
    exact: np.ndarray,
    *,
    tolerance: float,
    rounds: int,
    rng: np.random.Generator,
    budget: float = float("inf"),
    yardsticks: Sequence[Contender] = (),
) -> dict[str, Any]:
    """All contenders against the exact answers: who was right is timed, who was not is told.

    Returns
    -------
    dict
        ``results``: ``contender, detail, error, first_call_seconds, seconds, peak_bytes`` each; ``skipped``:
        ``contender, reason`` each, of those that do not run and of those that were refused; ``yardsticks``: the
        seconds of other calls in the same rounds, by name; they answer nothing.
    """
    right, trials, skipped = gated(contenders, exact, tolerance)
    quick = [c for c in right if trials[c.name]["first_call_seconds"] <= budget]
    peaks = {c.name: peak_bytes(c) for c in quick}
    for yardstick in yardsticks:
        yardstick.call()  # compiled, as the others are by now
    times = sample([*right, *yardsticks], rounds, rng, budget)
    results = [trials[c.name] | {"seconds": spread(times[c.name]), "peak_bytes": peaks.get(c.name)} for c in right]
    return {"results": results, "skipped": skipped, "yardsticks": {c.name: spread(times[c.name]) for c in yardsticks}}


def resident(field: str) -> int:
    """Bytes of this process in physical memory, now (``VmRSS``) or at most (``VmHWM``)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def peak_bytes(contender: Contender) -> int | None:
    """Physical memory that one call needs above what the process held before, answers included; None off Linux.

    The kernel keeps the highest mark and is asked to forget it before the call, so threads and libraries count too.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would hide what the call takes from it
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")
        before = resident("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None
    contender.call()
    contender.finish()
    return max(0, resident("VmHWM") - before)


@contextmanager
def using(threads: int) -> Iterator[None]:
    """Numba, torch and BLAS on a number of threads, as far as they are imported and can be told."""
    with limited(threads):
        numba, torch = sys.modules.get("numba"), sys.modules.get("torch")
        before = numba.get_num_threads() if numba else 0, torch.get_num_threads() if torch else 0
        if numba:
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if numba:
                numba.set_num_threads(before[0])
            if torch:
                torch.set_num_threads(before[1])


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """BLAS on a number of threads; without threadpoolctl it keeps those it has."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(threads):
        yield


def gemm_rate(threads: int, dtype: Any = np.float32, rounds: int = 30) -> float:
    """FLOP per second of large matrix products, the best of several: what the machine can do."""
    with limited(threads):
        product = products(dtype)
        return 2 * GEMM**3 / min(seconds(product) for _ in range(rounds))


def products(dtype: Any = np.float32) -> Contender:
    """One large matrix product, ``2 GEMM^3`` FLOP: what the machine does while others use it too."""
    a, b = np.random.default_rng(0).standard_normal((2, GEMM, GEMM)).astype(dtype)
    return Contender("matrix product", lambda: a @ b)


def installed(package: str) -> str | None:
    """Version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the processor."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def softened(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same, with gates that keep a hundred tokens and more, as trained layers do.

    They keep some times as many tokens as keys have directions: a least-squares memory that forgets faster has too few
    pairs for one answer, and its error says nothing of a backend.
    """
    if "log_decay" not in arrays:
        return arrays
    d = arrays["k" if "k" in arrays else "x"].shape[-1]
    return arrays | {"log_decay": arrays["log_decay"] / max(SOFT, d / 4)}


def busy(machine: Mapping[str, Any]) -> str:
    """A warning that others kept a core before the start; empty if they did not."""
    load = machine["load"][0] if machine["load"] else 0.0
    return f"BUSY: load {load:.1f} before the start; other work makes times too long, some of them by far" * (load > 1)


def machine() -> dict[str, Any]:
    """What the figures were measured on: versions, hardware, and how busy it was with other work."""
    return {
        "ttr_np": ttr_np.__version__,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "platform": f"{sys.platform} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
