"""Kalman filter: recursive least squares that says how the world drifts.

Each column of the memory S is a Gaussian with covariance P. In a step it moves, M = A S + noise, and is measured,
v_t = M^T k_t + noise:

    predict   S' = A_t S_{t-1},  P' = A_t^2 P_{t-1} + process_noise_t I,                  A = exp(log_transition)
    gain      c_t = P' k_t / (r_t + k_t^T P' k_t),                                        r = measurement_noise
    update    S_t = S' + c_t (v_t - S'^T k_t)^T,  P_t = (I - c k^T) P' (I - c k^T)^T + r c c^T,      o_t = S_t^T q_t

with P_0 = I / ridge. The last formula is Joseph's: a sum of positive semidefinite terms, where the shorter
P' - c k^T P' is a difference. With process noise (1/g - 1) P_{t-1} in place of process_noise I this is recursive least
squares with forgetting factor g, without any it is recursive least squares with beta = 1 / r, and with P held at p I it
is the normalised delta rule. A step depends on the one before through P, so there is no chunked form.

[1] Kalman (1960), A new approach to linear filtering and prediction problems
[2] Bucy, Joseph (1968), Filtering for stochastic processes with applications to guidance
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..calling import as_array, run
from ..notation import KalmanFilterState
from ._chunks import output_like
from .recursive_least_squares import check_ridge, check_symmetric, refuse, start

__all__ = ["kalman_filter", "recurrent"]


def kalman_filter(
    q: Any,
    k: Any,
    v: Any,
    *,
    process_noise: Any = 0.0,
    measurement_noise: Any = 1.0,
    log_transition: Any = None,
    ridge: float = 1.0,
    **common: Any,
) -> Any:
    """Kalman filter; see ``ttr_np.kalman_filter``."""
    check_ridge(ridge)
    noise = check_noise(process_noise, measurement_noise, common.get("mask"))
    arrays = {"q": q, "k": k, "v": v, "log_transition": log_transition, **noise}
    return run(recurrent, "kalman_filter", arrays, start=partial(start, ridge), **common)


def check_noise(process_noise: Any, measurement_noise: Any, mask: Any) -> dict[str, Any]:
    """Both as arrays by name: variances, and a measurement is never exact; a NaN passes.

    Raises
    ------
    ValueError
        Otherwise, naming the first number that is none.
    """
    if process_noise is not None:
        process_noise = as_array("process_noise", process_noise)
        refuse("process_noise", ~(process_noise < 0), process_noise, mask, "must be >= 0 (a variance)")
    if measurement_noise is not None:
        measurement_noise = as_array("measurement_noise", measurement_noise)
        refuse("measurement_noise", ~(measurement_noise <= 0), measurement_noise, mask, "must be > 0 (a variance)")
    return {"process_noise": process_noise, "measurement_noise": measurement_noise}


def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    process_noise: np.ndarray | None = None,
    measurement_noise: np.ndarray | None = None,
    log_transition: np.ndarray | None = None,
    *,
    state: KalmanFilterState,
) -> tuple[np.ndarray, KalmanFilterState]:
    """The filter, token by token, in float64: what is not learnt yet may exceed the noise by more than float32 holds.

    Cost: O(t (k^2 + k v)).
    """
    check_covariance(state.P)
    S, P = (x.astype(np.float64, copy=False) for x in state)
    o, eye = output_like(q, v, state.S), np.eye(P.shape[-1])
    for t in range(q.shape[-2]):
        k_t, v_t = k[..., t, :], v[..., t, :]
        if log_transition is not None:
            A = np.exp(log_transition[..., t, None, None])
            S, P = A * S, A * A * P
        if process_noise is not None:
            P = P + process_noise[..., t, None, None] * eye
        r = P.dtype.type(1) if measurement_noise is None else measurement_noise[..., t, None]
        Pk = np.einsum("...ij,...j->...i", P, k_t)
        energy = np.sum(k_t * Pk, axis=-1, keepdims=True)
        s = r + np.where(energy < np.inf, energy, np.nan)  # a pair with no gain would be passed over in silence
        gain = np.divide(Pk, s, out=np.zeros_like(Pk), where=s != 0)  # 0 only if a masked token measures nothing
        error = v_t - np.einsum("...kv,...k->...v", S, k_t)
        S = S + gain[..., :, None] * error[..., None, :]
        P = joseph(P, k_t, Pk, gain, r)
        o[..., t, :] = np.einsum("...kv,...k->...v", S, q[..., t, :])
    return o, KalmanFilterState(*[x.astype(o.dtype, copy=False) for x in (S, P)])


def joseph(P: np.ndarray, k: np.ndarray, Pk: np.ndarray, gain: np.ndarray, r: Any) -> np.ndarray:
    """(I - c k^T) P (I - c k^T)^T + r c c^T, exactly symmetric."""
    left = P - gain[..., :, None] * Pk[..., None, :]
    turned = np.einsum("...ij,...j->...i", left, k)
    P = left - turned[..., :, None] * gain[..., None, :] + (r * gain)[..., :, None] * gain[..., None, :]
    return (P + np.swapaxes(P, -1, -2)) / 2


def check_covariance(P: np.ndarray) -> None:
    """A covariance is symmetric and has no negative eigenvalue, up to rounding.

    Raises
    ------
    ValueError
        Otherwise; a NaN passes, so that it stays in its own sequence.
    """
    safe = np.where(np.isfinite(P).all(axis=(-1, -2), keepdims=True), P, np.eye(P.shape[-1], dtype=P.dtype))
    check_symmetric(safe)
    values = np.linalg.eigvalsh(safe)
    least, largest = values.min(axis=-1, initial=np.inf), values.max(axis=-1, initial=0)
    if np.any(least < -1e3 * np.finfo(P.dtype).eps * largest):
        raise ValueError(f"initial_state field P must have no negative eigenvalue; it has {least.min()}")
