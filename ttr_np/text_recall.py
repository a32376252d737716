"""Associative recall over a real text, without training: what a memory is worth before anything is learned.

    k_i = e(x_{i-1}),    v_i = e(x_i),    q_t = e(x_t),    answer_t = argmax over words w of  o_t . e(w)

Every token x of a text has a fixed random embedding e(x) of length one. The memory stores the pair (previous token,
token) at each step, the paper's shift of width 2, and is asked at t what followed x_t. The answer is right if it is
x_{t+1}; it is scored where x_t occurred before t, so that the memory holds a continuation of it. Embeddings have length
one, so the largest inner product, the smallest angle and the smallest distance name the same word.

[1] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352, section on keys and values
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

import ttr_np

from .backends import (
    BACKENDS,
    BackendUnavailable,
    available_backends,
    from_environment,
    has_operator,
    resolve_backend,
)

__all__ = [
    "BadInput",
    "DISTANCES",
    "continuations",
    "decode",
    "default_text",
    "embeddings",
    "last_seen",
    "score",
    "stream",
    "text_recall",
    "tokenize",
]

# Written in Python in every Python 3, long, and seldom touched; together about 30 000 tokens.
MODULES = ("textwrap", "bisect", "heapq", "csv", "string", "fnmatch", "shlex", "configparser", "argparse", "zipfile")
DISTANCES = ((1, 3), (4, 15), (16, 63), (64, 255), (256, None))
FEW = 2  # operators that are compiled at their first call, because starting processes takes a second
WARM_UP = 2  # tokens of an untimed first call: compilation is not the layer's speed
STRIDE = 4  # from one probe of a layer's speed to the next longer one
STEEPEST = 3.0  # growth of the time with the length that is believed: no layer is worse than cubic
BLOCK = 1 << 22  # scores held at once while outputs are decoded

Progress = Callable[[int, int, str], None]


class BadInput(ValueError):
    """What the caller asked for cannot be done; the message is one line for the user."""


def tokenize(text: str) -> list[str]:
    """Words (letters, digits, underscores) and single punctuation marks; white space separates and is dropped.

    Examples
    --------
    >>> tokenize("self.x += 1  # one")
    ['self', '.', 'x', '+', '=', '1', '#', 'one']
    """
    return re.findall(r"\w+|[^\w\s]", text)


def default_text() -> str:
    """Source of a few modules of the standard library, always in the same order."""
    sources = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        source = getattr(spec and spec.loader, "get_source", lambda name: None)(name)
        if source:
            sources.append(source)
    return "\n".join(sources)


def embeddings(count: int, dimension: int, seed: int) -> np.ndarray:
    """Random directions, uniform on the sphere.

    Returns
    -------
    E : (count, dimension)
        Rows of length one, float32.
    """
    E = np.random.default_rng(seed).standard_normal((count, dimension))
    return (E / np.linalg.norm(E, axis=1, keepdims=True)).astype(np.float32)


def decode(o: np.ndarray, E: np.ndarray) -> np.ndarray:
    """The word nearest to each output; -1 where an output is zero or not finite and so names no word.

    Parameters
    ----------
    o : (t, v)
    E : (words, v)
        Rows of length one.

    Returns
    -------
    words : (t,)
    """
    words = np.empty(len(o), np.int64)
    size = max(1, BLOCK // len(E))
    for low in range(0, len(o), size):
        piece = o[low : low + size]
        named = np.isfinite(piece).all(axis=1) & piece.any(axis=1)
        scores = np.where(named[:, None], piece, 0) @ E.T
        words[low : low + size] = np.where(named, scores.argmax(axis=1), -1)
    return words


def last_seen(ids: Sequence[int]) -> np.ndarray:
    """Tokens since each token occurred last; 0 where it is new.

    Examples
    --------
    >>> last_seen([7, 7, 8, 7])
    array([0, 1, 0, 2])
    """
    place: dict[int, int] = {}
    since = np.zeros(len(ids), np.int64)
    for t, word in enumerate(ids):
        since[t] = t - place.get(word, t)
        place[word] = t
    return since


def continuations(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """What counting would answer at each token: the last and the most frequent continuation seen so far.

    Ties go to the continuation seen latest; -1 where the token is new.
    """
    last, frequent = np.full(len(ids), -1), np.full(len(ids), -1)
    counts: dict[int, dict[int, int]] = {}
    newest: dict[int, int] = {}
    leader: dict[int, int] = {}
    for t, word in enumerate(ids):
        if t:
            before, seen = ids[t - 1], counts.setdefault(ids[t - 1], {})
            seen[word] = seen.get(word, 0) + 1
            newest[before] = word
            if seen[word] >= seen.get(leader.get(before, word), 0):
                leader[before] = word
        last[t], frequent[t] = newest.get(word, -1), leader.get(word, -1)
    return {"last continuation seen": last, "most frequent continuation seen": frequent}


class Stream(NamedTuple):
    """A text as numbers: words ``ids (t,)``, their embeddings ``E (words, d)``, distances ``since (t,)``."""

    ids: np.ndarray
    E: np.ndarray
    since: np.ndarray


def stream(tokens: Sequence[str], dimension: int, seed: int) -> Stream:
    """Words numbered in the order of the text, each with its embedding."""
    number = {word: i for i, word in enumerate(dict.fromkeys(tokens))}
    ids = np.array([number[word] for word in tokens])
    return Stream(ids, embeddings(len(number), dimension, seed), last_seen(ids.tolist()))


def outputs(layer: Any, text: Stream, count: int | None = None, backend: str | None = None) -> np.ndarray:
    """One pass over the first tokens: ``(count - 1, d)``, for no pair is stored before the second token."""
    e = text.E[text.ids[:count]]
    with np.errstate(all="ignore"):
        return np.asarray(layer(e[1:], e[:-1], e[1:], backend=backend))


def score(words: np.ndarray, text: Stream) -> dict[str, Any]:
    """Share of right answers where the token was seen before: in all, and by the distance since."""
    seen, right = text.since[:-1], words[:-1] == text.ids[1:]

    def share(where: np.ndarray) -> float | None:
        return float(right[where].mean()) if where.any() else None

    return {
        "recall": share(seen > 0),
        "by_distance": [share(inside(seen, low, high)) for low, high in DISTANCES],
        "unanswered": int(np.sum(words[:-1][seen > 0] < 0)),
    }


def inside(since: np.ndarray, low: int, high: int | None) -> np.ndarray:
    """Whether a distance lies in a bin; both ends belong to it."""
    return (since >= low) & (since <= (np.inf if high is None else high))


def label(low: int, high: int | None) -> str:
    """A bin in words."""
    return f"{low}+" if high is None else f"{low}-{high}"


def suggestion(name: str, names: Iterable[str]) -> str:
    """Names that look like the one asked for."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else "; `ttr layers` lists them"


def chosen_layers(names: Sequence[str] | None) -> list[str]:
    """The layers asked for, each once; all of the table if none is named."""
    for name in names or ():
        if name not in ttr_np.layers:
            raise BadInput(f"unknown layer {name!r}{suggestion(name, ttr_np.layers)}")
    return list(dict.fromkeys(ttr_np.layers if names is None else names))


def chosen_backends(names: Sequence[str] | None) -> list[str]:
    """The backends asked for, each once; if none is, that of ``TTR_BACKEND``; if it is unset, all that can run here."""
    states = available_backends() | {"auto": "ok"}
    try:
        choice = from_environment() if names is None else None
    except ValueError as problem:
        raise BadInput(str(problem)) from None
    names = [choice] if isinstance(choice, str) else names
    if names is None:
        return [name for name in BACKENDS if states[name] == "ok"]
    for name in names:
        if name not in states:
            raise BadInput(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)} and auto")
        if states[name] != "ok":
            raise BadInput(f"backend {name!r} is not available: {states[name]}")
    return list(dict.fromkeys(names))


def able_backends(backends: Sequence[str], operator: str) -> list[str]:
    """Those of the backends that have an operator, each once; ``auto`` is the one it stands for."""
    found = [resolve_backend(operator, backend="auto") if name == "auto" else name for name in backends]
    return [name for name in dict.fromkeys(found) if has_operator(name, operator)]


def at_least(name: str, value: Any, least: int) -> int:
    """An integer option, checked."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise BadInput(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def why_not(layer: Any, backends: Sequence[str], named: bool) -> str:
    """Why a layer makes no pass over a text; empty if it does."""
    if layer.optimizer is None:
        return "not expressed yet; `ttr layers` says why"
    if tuple(layer.data) == ("x",):
        return "takes x: a scan has no keys to recall by"
    if tuple(layer.data) != ("q", "k", "v"):
        return f"takes {', '.join(layer.data)}: it stores keys, and no values under them"
    if layer.operator is None:
        return "" if named else "runs only through the definition, which is slow; name it with --layers"
    return "" if able_backends(backends, layer.operator) else f"no {layer.operator!r} in {', '.join(backends)}"


def too_slow(layer: Any, text: Stream, backend: str | None, budget: float) -> str:
    """Why a pass would break the budget, judged from ever longer beginnings of the text; empty if it would not."""
    if not breaks(budget, len(text.ids) - 1, lambda pairs: timed(layer, text, pairs + 1, backend)[1]):
        return ""
    return f"one pass needs more than the {budget:g} s allowed (--budget); name it with --layers"


def breaks(budget: float, whole: int, clock: Callable[[int], float]) -> bool:
    """Whether a pass of ``whole`` steps would break the budget; ``clock`` runs a beginning and returns its seconds.

    Two beginnings give the growth of the time with the length, and that the time of all: seconds (T / t)^growth. Less
    than a hundredth of the budget is not judged by: the time of so few tokens is mostly that of the call. No longer
    beginning is run where all would fit even if the time grew by one power faster from there on.
    """
    before = None
    for count in beginnings(whole):
        seconds = clock(count)
        growth = 1.0 if before is None else float(np.clip(np.log(seconds / before) / np.log(STRIDE), 1.0, STEEPEST))
        if seconds > budget / 100 and seconds * (whole / count) ** growth > budget:
            seconds = min(seconds, clock(count))  # a busy machine stalls now and then
        if seconds > budget / 100 and seconds * (whole / count) ** growth > budget:
            return True
        if before is not None and seconds * (whole / count) ** min(growth + 1, STEEPEST) < budget:
            return False
        before = seconds
    return False


def beginnings(whole: int) -> list[int]:
    """Lengths of the probes of a pass: each ``STRIDE`` times the last, the longest at least that share of the whole.

    Examples
    --------
    >>> beginnings(50)
    [1, 4, 16]
    """
    lengths = [1]
    while lengths[-1] * STRIDE < whole:
        lengths.append(lengths[-1] * STRIDE)
    return lengths


def timed(layer: Any, text: Stream, count: int | None, backend: str | None) -> tuple[np.ndarray, float]:
    """A pass and its seconds."""
    begin = perf_counter()
    o = outputs(layer, text, count, backend)
    return o, perf_counter() - begin


def one_pass(layer: Any, text: Stream, backend: str | None, budget: float | None) -> dict[str, Any] | str:
    """Score and speed of a layer on one backend, or the reason why there are none."""
    try:
        outputs(layer, text, WARM_UP, backend)
        reason = too_slow(layer, text, backend, budget) if budget is not None else ""
        if reason:
            return reason
        o, seconds = timed(layer, text, None, backend)
    except (NotImplementedError, BackendUnavailable) as problem:
        return str(problem)
    except MemoryError as problem:
        return f"not enough memory: {problem}"
    words = np.concatenate([[-1], decode(o, text.E)])
    speed = {"backend": backend or "definition", "seconds": seconds, "tokens_per_second": len(o) / seconds}
    return speed | score(words, text)


def compile_ahead(names: Sequence[str]) -> None:
    """Compile the kernels of many layers in processes side by side; should that fail, the first call compiles.

    They start where this package is: in a folder with another copy of it, a clone say, they would compile that one's.
    """
    layers = {name: ttr_np.layers[name] for name in names}
    served = {name: x for name, x in layers.items() if x.operator and not why_not(x, ["numba"], named=True)}
    if len({layer.operator for layer in served.values()}) > FEW:
        command = [sys.executable, "-m", "ttr_np.numba_cpu", "--dtypes", "float32", "--layers", ",".join(served)]
        subprocess.run(command, check=False, capture_output=True, cwd=Path(ttr_np.__file__).parent.parent)


def measured(name: str, text: Stream, backends: Sequence[str], named: bool, budget: float | None) -> dict[str, Any]:
    """One layer of the result: what it is, what the first backend recalled, how fast each was; or why not."""
    layer = ttr_np.layers[name]
    reason = why_not(layer, backends, named)
    if reason:
        return {"name": name, "reason": reason}
    able = able_backends(backends, layer.operator) if layer.operator else [None]
    tries = [one_pass(layer, text, backend, None if named else budget) for backend in able]
    runs = [run for run in tries if isinstance(run, dict)]
    if not runs:
        return {"name": name, "reason": "; ".join(dict.fromkeys(tries))}  # backends may fail alike
    about = {key: str(getattr(layer, key)) for key in ("weights", "regressor", "optimizer")}
    found = {key: runs[0][key] for key in ("recall", "by_distance", "unanswered")}
    times = [{key: run[key] for key in ("backend", "recall", "seconds", "tokens_per_second")} for run in runs]
    return {"name": name} | about | {"operator": layer.operator, "paper": layer.paper} | found | {"runs": times}


def by_recall(entry: dict[str, Any]) -> tuple[float, str]:
    """The order of the table: best first, equals by name."""
    return -(entry["recall"] or 0.0), entry["name"]


def text_recall(
    text: str | None = None,
    *,
    layers: Sequence[str] | None = None,
    dimension: int = 64,
    length: int = 2048,
    seed: int = 0,
    backends: Sequence[str] | None = None,
    budget: float | None = 15.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Recall of every layer over a text, with its speed.

    Parameters
    ----------
    text : str, optional
        Any text; default: source of the standard library.
    layers : sequence of str, optional
        Names in ``ttr_np.layers``; default: all that take queries, keys and values and have an operator. A layer named
        here runs whatever it costs, through the definition if no operator serves it.
    dimension : int
        Size of the embeddings.
    length : int
        Tokens read from the start of the text.
    seed : int
        Of the embeddings; the same seed gives the same recall.
    backends : sequence of str, optional
        Names, or ``auto``, which stands for one of them by operator. Default: the environment variable ``TTR_BACKEND``;
        if it is unset, all that can run here. The first that has a layer's operator gives its recall.
    budget : float, optional
        Seconds that an unnamed layer may take on one backend; None: any time.
    progress : callable, optional
        Called as ``progress(done, total, name)`` before each layer and once at the end.

    Returns
    -------
    dict
        Plain numbers, strings, lists and dicts, as ``ttr recall --json`` prints them: ``text``, ``distances``,
        ``baselines``, ``layers`` (best first) and ``not_run`` (with reasons).

    Raises
    ------
    BadInput
        A ``ValueError``: unknown layer or backend, a number out of range, a text of fewer than two tokens, embeddings
        that do not fit in memory.

    Notes
    -----
    A time is that of one pass in float32, after an untimed call on a few tokens. A layer that diverges is not warned
    of: its tokens without an answer are counted. Answers are decoded in blocks, so memory is that of the layer itself.

    Examples
    --------
    >>> result = text_recall("a b a b a b", layers=["linear_attention"], dimension=16)
    >>> result["baselines"][0]["recall"], result["layers"][0]["name"]
    (1.0, 'linear_attention')
    """
    begin = perf_counter()
    names, able = chosen_layers(layers), chosen_backends(backends)
    tokens = tokenize(default_text() if text is None else text)
    used = tokens[: at_least("length", length, 2)]
    if len(used) < 2:
        raise BadInput(f"the text has {len(used)} token{'s' * (len(used) != 1)}; at least 2 are needed")
    at_least("dimension", dimension, 1), at_least("seed", seed, 0)
    if budget is not None and not budget >= 0:
        raise BadInput(f"budget must be a number of seconds, got {budget:g}")
    try:
        data = stream(used, dimension, seed)
    except MemoryError as problem:
        raise BadInput(f"dimension {dimension} needs more memory than there is: {problem}") from None
    if "numba" in able:
        compile_ahead(names)
    entries = []
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names), name)
        entries.append(measured(name, data, able, layers is not None, budget))
    if progress:
        progress(len(names), len(names), "")
    return machine() | {
        "text": {"tokens": len(tokens)} | sizes(data),
        "dimension": dimension,
        "seed": seed,
        "dtype": str(data.E.dtype),
        "backends": able,
        "distances": bins(data),
        "baselines": [{"name": name} | score(guess, data) for name, guess in continuations(data.ids.tolist()).items()],
        "layers": sorted((entry for entry in entries if "runs" in entry), key=by_recall),
        "not_run": [entry for entry in entries if "reason" in entry],
        "seconds": perf_counter() - begin,
    }


def sizes(text: Stream) -> dict[str, int]:
    """Tokens, different words, and tokens whose answers count."""
    return {"used": len(text.ids), "words": len(text.E), "scored": int(np.sum(text.since[:-1] > 0))}


def bins(text: Stream) -> list[dict[str, Any]]:
    """Each distance bin with the number of answers it holds."""
    return [
        {"tokens": label(low, high), "scored": int(inside(text.since[:-1], low, high).sum())} for low, high in DISTANCES
    ]


def machine() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "ttr_np": ttr_np.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
        "cores": os.cpu_count(),
    }
