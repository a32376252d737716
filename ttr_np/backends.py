"""The switch: which implementation of an operator runs.

Container and device always follow the input; the switch chooses only the implementation. In order: the keyword
``backend=``, ``with use_backend(...)``, ``set_backend(...)``, the environment variable ``TTR_BACKEND``, ``auto``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from .calling import HOST, on_device, through_dlpack
from .notation import OPERATORS
from .recording import lasting

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "available_backends",
    "call",
    "resolve_backend",
    "set_backend",
    "show_config",
    "use_backend",
]

BACKENDS: dict[str, str] = {
    "numpy": "ttr_np.solvers",
    "numba": "ttr_np.numba_cpu",
    "numba-cuda": "cuda_kernels.numba_cuda",
    "cupy": "cuda_kernels.cupy_raw",
}
ON_GPU = ("cupy", "numba-cuda")

Choice = str | tuple[str, ...]
_scoped: ContextVar[Choice | None] = ContextVar("ttr_np_backend", default=None)
_global: list[Choice | None] = [None]


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot run here; the message says why, as ``ttr_np.available_backends()`` does."""


def validated(choice: Any, source: str = "") -> Choice:
    """A backend name, ``auto``, or a tuple of names to try in turn.

    Raises
    ------
    TypeError
        If it is neither a name nor a sequence of names.
    ValueError
        If a name is unknown or there is none.
    """
    if not isinstance(choice, (str, tuple, list)):
        raise TypeError(f"backend is {choice!r}; it needs a name or a tuple of names")
    names = (choice,) if isinstance(choice, str) else tuple(choice)
    if not names:
        raise ValueError("backend is an empty tuple; name at least one backend")
    for name in names:
        if name not in BACKENDS and name != "auto":
            raise ValueError(f"unknown backend {name!r}{source}; the backends are {', '.join(BACKENDS)} and auto")
    return choice if isinstance(choice, str) else names


def set_backend(backend: Choice | None) -> None:
    """Choose the backend of every later call in this process; None takes the choice back.

    Parameters
    ----------
    backend : str, tuple of str or None
        ``numpy``, ``numba``, ``numba-cuda``, ``cupy``, ``auto``, or several to try in turn.

    Raises
    ------
    TypeError, ValueError
        If it is neither a name nor names, or a name is unknown.

    Examples
    --------
    >>> import ttr_np
    >>> ttr_np.set_backend("numpy")
    >>> ttr_np.resolve_backend("delta_rule")
    'numpy'
    >>> ttr_np.set_backend(None)
    """
    _global[0] = None if backend is None else validated(backend)


@contextmanager
def use_backend(backend: Choice) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, for this thread or task only.

    Parameters
    ----------
    backend : str or tuple of str
        As in ``set_backend``.

    Raises
    ------
    TypeError, ValueError
        If it is neither a name nor names, or a name is unknown.

    Examples
    --------
    >>> import ttr_np
    >>> with ttr_np.use_backend("numpy"):
    ...     ttr_np.resolve_backend("mesa")
    'numpy'
    """
    token = _scoped.set(validated(backend))
    try:
        yield
    finally:
        _scoped.reset(token)


def chosen(backend: Choice | None) -> Choice:
    """The choice in force: keyword, scope, process, environment, auto."""
    for choice in (backend, _scoped.get(), _global[0]):
        if choice is not None:
            return validated(choice)
    return from_environment() or "auto"


def from_environment() -> Choice | None:
    """The choice in ``TTR_BACKEND``; None where it is unset or empty."""
    name = os.environ.get("TTR_BACKEND")
    return validated(name, " in the environment variable TTR_BACKEND") if name else None


def has_package(backend: str) -> bool:
    """Whether this version ships kernels of a backend."""
    package = BACKENDS[backend]
    return find_spec(package.split(".")[0]) is not None and find_spec(package) is not None


@cache
def reason(backend: str) -> str:
    """``ok``, or why a backend cannot run here."""
    if backend == "numpy":
        return "ok"
    if not has_package(backend):
        return "not part of this version of ttr_np"
    needed = {"numba": "numba", "numba-cuda": "numba_cuda", "cupy": "cupy"}[backend]
    if find_spec(needed) is None:
        return f"{needed} is not installed"
    try:
        import_module(needed)
    except Exception as problem:  # a package built for another NumPy or driver fails in its own ways
        return f"{needed} does not import: {problem}"
    if backend == "numba":
        off = import_module("numba").config.DISABLE_JIT
        return "Numba's compiler is switched off (NUMBA_DISABLE_JIT)" if off else "ok"
    return import_module(BACKENDS[backend]).reason()


def available_backends() -> dict[str, str]:
    """Every backend with ``ok`` or the reason why it cannot run here.

    Returns
    -------
    dict
        Name of the backend to ``ok`` or its reason.

    Examples
    --------
    >>> import ttr_np
    >>> ttr_np.available_backends()["numpy"]
    'ok'
    """
    return {name: reason(name) for name in BACKENDS}


@cache
def has_operator(backend: str, operator: str) -> bool:
    """Whether a backend has a module for an operator."""
    return has_package(backend) and find_spec(f"{BACKENDS[backend]}.{operator}") is not None


@cache
def module_of(backend: str, operator: str) -> Any:
    """A backend's module of an operator."""
    return import_module(f"{BACKENDS[backend]}.{operator}")


def operators_of(backend: str) -> list[str]:
    """The operators a backend has, found by looking."""
    return [operator for operator in OPERATORS if has_operator(backend, operator)]


class Home(NamedTuple):
    """Where an array comes from: the library that owns it, and the device that holds it."""

    library: str
    device: str


@cache
def home_on_gpu(kind: type, number: int) -> Home:
    """Where arrays of a library that speaks NumPy's protocols come from."""
    return Home(kind.__module__.split(".")[0], f"gpu {number}")


HERE = Home("numpy", "cpu")


def home(x: Any) -> Home | None:
    """Where an array comes from; numbers, lists and other sequences come from nowhere."""
    if isinstance(x, np.ndarray):
        return HERE
    if on_device(x):
        return home_on_gpu(type(x), x.device.id)
    if hasattr(x, "__dlpack_device__"):
        kind, number = x.__dlpack_device__()
        return Home(type(x).__module__.split(".")[0], "cpu" if int(kind) in HOST else f"gpu {int(number)}")
    if hasattr(x, "__cuda_array_interface__"):
        return Home(type(x).__module__.split(".")[0], "gpu")
    return None


def home_of(arrays: Mapping[str, Any]) -> Home:
    """The one place all arrays come from.

    Raises
    ------
    TypeError
        If they come from several.
    """
    found = {name: place for name, x in arrays.items() if x is not None and (place := home(x)) is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} is {place.library} on {place.device}" for name, place in found.items())
        raise TypeError(f"arrays of different libraries or devices: {listed}")
    return next(iter(found.values()), HERE)


def refused(backend: str, operator: str, options: Mapping[str, Any] | None) -> str | None:
    """Why a backend's module cannot serve a call with these options: what its ``refusal`` says, if it has one."""
    if options is None:
        return None
    for name, x in options.items() if backend == "numba" else ():
        if getattr(x, "dtype", None) in (np.longdouble, np.clongdouble):
            return f"backend 'numba' computes in float32 and float64; {name} is {x.dtype}"
    module = module_of(backend, operator)
    return module.refusal(**options) if hasattr(module, "refusal") else None


def function_refusal(backend: str, kernel: Any, names: Sequence[str]) -> str | None:
    """Why a backend of compiled kernels cannot take a Python function for one of those it has by name, or None."""
    if callable(kernel):
        return f"backend {backend!r} cannot compile the function given as kernel: it has {', '.join(names)}"
    return None


def refusal(backend: str, operator: str, device: str, options: Mapping[str, Any] | None) -> Exception | None:
    """The error a named backend deserves, or None if it can run the operator."""
    if reason(backend) != "ok":
        return BackendUnavailable(f"backend {backend!r} is not available: {reason(backend)}")
    if not has_operator(backend, operator):
        return NotImplementedError(
            f"backend {backend!r} has no {operator!r}; it has {', '.join(operators_of(backend))}"
        )
    if device != "cpu" and backend not in ON_GPU:
        return BackendUnavailable(f"backend {backend!r} computes on the CPU, the arrays are on {device}: copy them")
    problem = refused(backend, operator, options)
    return NotImplementedError(problem) if problem else None


def resolve(operator: str, choice: Choice, device: str, options: Mapping[str, Any] | None = None) -> str:
    """The backend that runs an operator on arrays of one device.

    Raises
    ------
    BackendUnavailable
        If the named backend cannot run here.
    NotImplementedError
        If the named backend has no such operator, or not with these options.
    """
    if isinstance(choice, tuple):
        return first_able(operator, choice, device, options)
    if choice != "auto":
        problem = refusal(choice, operator, device, options)
        if problem is not None:
            raise problem
        return choice
    candidates = ("numba", "numpy") if device == "cpu" else ON_GPU
    for name in candidates:  # looked up first: importing Numba only to learn that it has no kernel takes a second
        if has_operator(name, operator) and reason(name) == "ok" and not refused(name, operator, options):
            return name
    problems = "; ".join(str(refusal(name, operator, device, options)) for name in candidates)
    raise BackendUnavailable(f"no backend runs {operator!r} on {device}: {problems}")


def first_able(operator: str, names: Sequence[str], device: str, options: Mapping[str, Any] | None) -> str:
    """The first of several backends that can run; a warning tells when it is not the first named."""
    problems = []
    for name in names:
        try:
            able = resolve(operator, name, device, options)
        except (BackendUnavailable, NotImplementedError) as problem:
            problems.append(str(problem))
            continue
        if problems:
            words = f"{operator} runs on {able!r}: {'; '.join(problems)}"
            warnings.warn(words, RuntimeWarning, stacklevel=frames_of_package())
        return able
    raise BackendUnavailable("; ".join(problems))


def frames_of_package() -> int:
    """The ``stacklevel`` at which the caller of this function warns the first caller outside all backends."""
    own = {package.split(".")[0] for package in BACKENDS.values()}
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in own:
        frame, level = frame.f_back, level + 1
    return level


def resolve_backend(operator: str, *arrays: Any, backend: Choice | None = None) -> str:
    """Which backend would run an operator.

    Parameters
    ----------
    operator : str
        Name of the operator.
    *arrays
        Its arrays: where they live decides what ``auto`` means. None at all means NumPy arrays.
    backend : str or tuple of str, optional
        As the keyword of the call.

    Returns
    -------
    str
        Name of the backend.

    Raises
    ------
    ValueError
        If the operator, or the name of a backend, is unknown.
    TypeError
        If the arrays are of different libraries or devices.
    BackendUnavailable, NotImplementedError
        If the backend that is named cannot run here, or has no such operator.

    Examples
    --------
    >>> import ttr_np
    >>> ttr_np.resolve_backend("linear_attention", backend="numpy")
    'numpy'
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; the operators are {', '.join(OPERATORS)}")
    place = home_of({f"array {i}": x for i, x in enumerate(arrays)})
    return resolve(operator, chosen(backend), place.device)


def call(operator: str, backend: Choice | None, arrays: Mapping[str, Any], **options: Any) -> Any:
    """Run an operator on the backend in force."""
    name = resolve(operator, chosen(backend), home_of(arrays).device, {**arrays, **options})
    if name not in ON_GPU:
        arrays, options = ({key: through_dlpack(x) for key, x in given.items()} for given in (arrays, options))
        return getattr(module_of(name, operator), operator)(**arrays, **options)
    with lasting():
        return getattr(module_of(name, operator), operator)(**arrays, **options)


def devices() -> list[str]:
    """The GPUs the driver reports, one line each, with the driver's version."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return ["no GPU driver found"]
    command = ["nvidia-smi", "--query-gpu=index,name,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if listed.returncode:
        return [((listed.stderr.strip() or listed.stdout.strip()).splitlines() or ["no GPU found"])[0]]
    found = [line.split(", ") for line in listed.stdout.splitlines()]
    return [f"GPU {number}: {name}, driver {driver}" for number, name, driver in found] or ["no GPU found"]


def show_config() -> None:
    """Print versions, backends, threads and devices, as a bug report needs them.

    Examples
    --------
    >>> import ttr_np
    >>> ttr_np.show_config()  # doctest: +ELLIPSIS
    ttr_np ...
    """
    from importlib.metadata import PackageNotFoundError, version
    from platform import machine, python_version, system

    from . import __version__

    print(f"ttr_np {__version__}, Python {python_version()}, {system()} {machine()}, {os.cpu_count()} cores")
    for package in ("numpy", "scipy", "numba", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "ml_dtypes"):
        try:
            print(f"  {package} {version(package)}")
        except PackageNotFoundError:
            print(f"  {package} is not installed")
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        print(f"  threads: {name} is {os.environ.get(name, 'not set')}")
    for device in devices():
        print(f"  device: {device}")
    print(f"backend in force: {chosen(None)}")
    for name, state in available_backends().items():
        print(f"  {name}: {state}")
