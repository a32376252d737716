"""Multi-query associative recall without training: n pairs stored once, each key asked once.

Unit embeddings in R^d stand for a vocabulary, half of it keys, half values. The answer to a key is decoded to the
nearest value embedding; as all have length one, that of the largest inner product. The second panel gives all keys a
common component, k = (c m + z / sqrt d) brought to length one: what a memory without second moments confuses.

[1] Arora et al. (2023), Zoology, arXiv:2312.04927
[2] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..features import normalize_l2
from ..text_recall import decode
from .protocol import BadInput, ask_all, at_least, experiment, panel, row, trials, value_at

__all__ = ["mqar"]

PAIRS = (16, 32, 64, 128, 256, 512)
SHARED = (0.0, 0.5, 1.0, 2.0)
SHARED_PAIRS = 32
NEARLY_ALL = 0.99
CLAIM = "What a memory recalls depends on regressor and optimizer; correlated keys hurt those that ignore second order."

# "root" and "inverse root" stand for sqrt d and 1 / sqrt d.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear attention": ("linear_attention", {}),
    "delta rule, beta 0.5": ("delta_rule", {"beta": 0.5}),
    "delta rule, beta 1": ("delta_rule", {"beta": 1.0}),
    "ridge 0.01": ("intention", {"ridge": 0.01}),
    "ridge 0.25": ("intention", {"ridge": 0.25}),
    "ridge 1": ("intention", {"ridge": 1.0}),
    "softmax, gain sqrt d": ("softmax", {"scale": "root"}),
    "softmax, scale 1/sqrt d": ("softmax", {"scale": "inverse root"}),
    "squared dot product": ("symmetric_power", {}),
}


def accuracy(o: np.ndarray, answers: np.ndarray, E: np.ndarray) -> np.ndarray:
    """Share of answers whose nearest value embedding is the right one, one number per sequence."""
    return np.mean([decode(o_i, E) == answer for o_i, answer in zip(o, answers, strict=True)], axis=-1)


def recalled(k: np.ndarray, answers: np.ndarray, E: np.ndarray, backend: Any) -> dict[str, np.ndarray]:
    """Accuracy of every method on the same pairs, one number per sequence."""
    root = k.shape[-1] ** 0.5
    found = {}
    for name, (layer, gates) in METHODS.items():
        numbers = {gate: {"root": root, "inverse root": 1 / root}.get(x, x) for gate, x in gates.items()}
        found[name] = accuracy(ask_all(layer, k, k, E[answers], backend, **numbers), answers, E)
    return found


def distinct(rng: np.random.Generator, sequences: int, size: int, count: int) -> np.ndarray:
    """For every sequence, ``count`` different numbers below ``size``."""
    return np.stack([rng.choice(size, count, replace=False) for _ in range(sequences)])


def mqar(
    *,
    d: int = 64,
    vocabulary: int = 8192,
    pairs: Sequence[int] = PAIRS,
    shared: Sequence[float] = SHARED,
    repeats: int = 40,
    seed: int = 0,
    backend: Any = None,
) -> dict[str, Any]:
    """Share of stored pairs recalled, against their number, and against a component that all keys share.

    Parameters
    ----------
    d : int, default 64
        Size of the embeddings.
    vocabulary : int, default 8192
        Embeddings; the first half are keys, the second half values.
    pairs : sequence of int
        Pairs stored per sequence, at most half the vocabulary.
    shared : sequence of float
        Weight c of the common component of keys, with 32 pairs.
    repeats : int, default 40
        Independent sequences.
    seed : int, default 0
        Of embeddings and sequences.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.

    Returns
    -------
    dict
        As ``ttr_np.experiments`` says. Two panels: accuracy against pairs, and against c.

    Raises
    ------
    BadInput
        A ``ValueError``: a setting out of range.

    Notes
    -----
    In float32. Cost: that of nine layers on 2 n tokens, and of decoding n answers to vocabulary / 2 values; about
    twenty seconds.

    References
    ----------
    Arora et al. (2023), arXiv:2312.04927; Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> from ttr_np.experiments import mqar
    >>> result = mqar(d=16, vocabulary=128, pairs=[4], shared=[0.0], repeats=2, backend="numpy")
    >>> [entry["axis"] for entry in result["panels"]]
    ['pairs stored', 'common component c']
    """
    rng = trials(seed, repeats)
    most = max([*pairs, SHARED_PAIRS])
    if most > at_least("vocabulary", vocabulary, 2) // 2:
        raise BadInput(f"vocabulary must be at least {2 * most} for {most} different keys, got {vocabulary}")

    def work() -> tuple[list[dict[str, Any]], str]:
        half = vocabulary // 2
        E = normalize_l2(rng.standard_normal((vocabulary, d))).astype(np.float32)
        keys, values = E[:half], E[half:]
        by_pairs, by_share = [], []
        for n in pairs:
            k, answers = keys[distinct(rng, repeats, half, n)], distinct(rng, repeats, half, n)
            by_pairs.append(recalled(k, answers, values, backend))
        for c in shared:
            m, z = normalize_l2(rng.standard_normal((repeats, 1, d))), rng.standard_normal((repeats, SHARED_PAIRS, d))
            k = normalize_l2(c * m + z / np.sqrt(d)).astype(np.float32)
            by_share.append(recalled(k, distinct(rng, repeats, half, SHARED_PAIRS), values, backend))
        panels = [
            accuracies("pairs stored", pairs, by_pairs, log="x"),
            accuracies("common component c", shared, by_share),
        ]
        return panels, finding(*panels)

    settings = {"d": d, "vocabulary": vocabulary, "pairs": list(pairs), "shared": list(shared)}
    return experiment("mqar", CLAIM, settings | {"repeats": repeats, "seed": seed}, work)


def accuracies(axis: str, places: Sequence[float], found: list[dict[str, np.ndarray]], log: str = "") -> dict[str, Any]:
    """One panel: every method's share of right answers."""
    rows = [row(name, described(name), [x[name] for x in found]) for name in METHODS]
    return panel(axis, places, "share of keys recalled", rows, log)


def described(name: str) -> str:
    """The layer and gates of a method in words."""
    layer, gates = METHODS[name]
    words = {"root": "sqrt d", "inverse root": "1/sqrt d"}
    return ", ".join([layer, *(f"{gate} {words.get(x, x)}" for gate, x in gates.items())])


def finding(by_pairs: dict[str, Any], by_share: dict[str, Any]) -> str:
    """What the numbers say: the most pairs recalled nearly all, and what the largest common component leaves."""
    c = max(by_share["places"])
    texts = []
    for name in ("linear attention", "delta rule, beta 1", "ridge 0.25", "squared dot product", "softmax, gain sqrt d"):
        (shares,) = (entry["mean"] for entry in by_pairs["rows"] if entry["name"] == name)
        full = [n for n, share in zip(by_pairs["places"], shares, strict=True) if share >= NEARLY_ALL]
        held = f"{max(full)} pairs" if full else f"none of {min(by_pairs['places'])} pairs or more"
        texts.append(f"{name} {held} ({100 * value_at(by_share, name, c):.0f} %)")
    return (
        f"At least {100 * NEARLY_ALL:.0f} % come back of (and of {SHARED_PAIRS} pairs whose keys share a component "
        f"{c:g}): {', '.join(texts)}."
    )
