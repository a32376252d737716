"""The operators a user calls: one function each, whatever backend runs it.

Every operator takes the same keywords besides its own:

initial_state : state, optional
    Where the memory starts, as returned by an earlier call (or its one array, where a state has one field); default:
    empty. Never modified.
output_final_state : bool, default False
    Return ``(o, state)`` instead of ``o``.
cu_seqlens : (n + 1,) integers, optional
    Boundaries of n sequences packed along t, masked tokens counted. The memory starts anew at each; states then count
    the sequences on an axis before their own axes.
mask : (..., t) bool, optional
    True where the token is memorised. Elsewhere nothing is stored and nothing decays; the query is still answered.
backend : str or tuple of str, optional
    See ``ttr_np.backends``.

Leading axes are free and broadcast: batch, heads, groups of queries that share keys. The answers have the dtype of the
data (integers become float64); sums, gates and states are never kept below float32. Bad input raises before any work:
ValueError for sizes and ranges, TypeError for what is not a number, each naming the argument and the value. A backend
that is named and cannot run raises ``BackendUnavailable``, or NotImplementedError if it has no kernel for the call.
"""

from __future__ import annotations

from typing import Any

from .backends import call
from .calling import check_arguments
from .notation import OPERATORS

__all__ = [
    "affine_projection",
    "delta_attention",
    "delta_rule",
    "diagonal_scan",
    "dplr",
    "kalman_filter",
    "kernel_ridge",
    "linear_attention",
    "local_polynomial",
    "log_linear_attention",
    "mesa",
    "path_attention",
    "recursive_least_squares",
    "selective_scan",
    "short_convolution",
    "softmax_attention",
    "sparse_attention",
    "stick_breaking_attention",
    "test_time_training",
    "wall_attention",
]


def dispatch(operator: str, given: dict[str, Any]) -> Any:
    """Run an operator with the arguments of its call: those in the notation are arrays, the others options."""
    check_arguments(globals()[operator], given)
    signature = OPERATORS[operator]
    arrays = {name: given.pop(name) for name in signature.arrays + signature.optional}
    return call(operator, given.pop("backend"), arrays, **given)


def linear_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    bonus: Any = None,
    normalize: bool = False,
    scale: float = 1.0,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from all (decayed) pairs after one gradient step from zero: S = decay S + k v^T, o = scale S^T q.

    Weights: uniform or decaying. Regressor: linear. Optimizer: one full-batch step, the Gram matrix of the keys taken
    as the identity. With ``normalize`` the regressor is a constant and the weights are the kernel q . k.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys, perhaps through a feature map of ``ttr_np.features``.
    v : (..., t, v)
        Values.
    log_decay : (..., t) or (..., t, k), optional
        Log of the share of the past that is kept, <= 0 (-inf forgets all); per step, or per step and key channel.
    bonus : (..., k), optional
        The answer reads the memory before this step plus the current pair with this weight in each key channel.
    normalize : bool, default False
        Divide by q . z with z = decay z + k; needs q . k >= 0 to be a mean. ``scale`` then has no effect.
    scale : float, default 1.0
        Factor on the answers.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``S (..., k, v)``, ``z (..., k)`` with ``normalize``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a log_decay is positive.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t (k v + c (k + v))) with chunks of c tokens; memory O(t (k + v)).

    References
    ----------
    Katharopoulos et al. (2020), arXiv:2006.16236; Yang et al. (2023), arXiv:2312.06635; Wang, Shi, Fox (2025),
    arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = np.eye(3)
    >>> ttr_np.linear_attention(k[:1], k[:1], [[2.0, 5.0]])
    array([[2., 5.]])
    """
    return dispatch("linear_attention", locals())


def delta_rule(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    *,
    log_decay: Any = None,
    erase_key: Any = None,
    scale: float = 1.0,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall after one gradient step per pair: S = S' + beta k (v - S'^T p)^T with S' = decay S, o = scale S^T q.

    Weights: uniform, or decaying by the gates. Regressor: linear. Optimizer: online gradient descent with step sizes
    beta, the decay being its weight decay. DeltaNet; with one gate per step Gated DeltaNet, per channel Kimi delta
    attention.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys. Keys of unit length keep the recurrence stable.
    v : (..., t, v)
        Values.
    beta : (..., t)
        Step sizes; stable for 0 <= beta * |k|^2 <= 2. With 1 and unit keys a new value replaces the old one.
    log_decay : (..., t) or (..., t, k), optional
        Log of the share of the past that is kept, <= 0 (-inf forgets all); per step, or per step and key channel.
    erase_key : (..., t, k), optional
        The key p whose recalled value is erased; default: the key itself.
    scale : float, default 1.0
        Factor on the answers.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``S (..., k, v)``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a log_decay is positive.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t (k v + c (k + v) + c^2)) with chunks of c tokens; memory O(t (k + v)).

    References
    ----------
    Schlag et al. (2021), arXiv:2102.11174; Yang et al. (2024), arXiv:2406.06484 and arXiv:2412.06464; Kimi team (2025),
    arXiv:2510.26692; Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = [[1.0, 0.0], [1.0, 0.0]]
    >>> ttr_np.delta_rule(k, k, [[1.0], [7.0]], [1.0, 1.0])
    array([[1.],
           [7.]])
    """
    return dispatch("delta_rule", locals())


def dplr(
    q: Any,
    k: Any,
    v: Any,
    a: Any,
    b: Any,
    *,
    log_decay: Any = None,
    scale: float = 1.0,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall with a diagonal plus low rank transition: S = diag(decay) S + b (a^T S) + k v^T, o = scale S^T q.

    The S on the right is the undecayed one in both places. With a = -beta k, b = k and values beta v it is the delta
    rule; RWKV-7, Comba and generalised delta rules are other choices of a and b. Regressor: linear. Optimizer: online,
    one step.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    a : (..., t, k)
        Direction read from the old state.
    b : (..., t, k)
        Direction along which that reading is written back.
    log_decay : (..., t) or (..., t, k), optional
        Log of the share of the past that is kept, <= 0 (-inf forgets all); per step, or per step and key channel.
    scale : float, default 1.0
        Factor on the answers.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``S (..., k, v)``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a log_decay is positive.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t (k v + c (k + v) + c^2)) with chunks of c tokens; memory O(t (k + v)).

    References
    ----------
    Peng et al. (2025), RWKV-7, arXiv:2503.14456; Hu et al. (2025), Comba, arXiv:2506.02475; Wang, Shi, Fox (2025),
    arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> ttr_np.dplr(k, k, [[1.0], [7.0]], -k, k)
    array([[1.],
           [7.]])
    """
    return dispatch("dplr", locals())


def diagonal_scan(
    x: Any,
    log_decay: Any,
    *,
    phase: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Scan every channel by itself: h = exp(log_decay + i phase) h + x.

    The memory has a constant key, so nothing is addressed by content: decaying sums of the inputs, which turn by the
    phase. The scan under S4D, S5, LRU, RG-LRU, HGRN and GateLoop. Regressor: constant. Optimizer: one step.

    Parameters
    ----------
    x : (..., t, d)
        Inputs; complex only with ``phase``.
    log_decay : (..., t, d)
        Log of the share of the past that is kept, <= 0.
    phase : (..., t, d), optional
        Angle by which the state turns at each step, radians. The answers are then complex.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``h (..., d)``.

    Returns
    -------
    h : (..., t, d)
        The state after each step, complex if there is a phase; or ``(h, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a log_decay is positive.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t d); memory O(t d).

    References
    ----------
    Gu et al. (2022), arXiv:2206.11893; Orvieto et al. (2023), arXiv:2303.06349; De et al. (2024), arXiv:2402.19427.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> ttr_np.diagonal_scan(np.ones((3, 1)), np.log(0.5))
    array([[1.  ],
           [1.5 ],
           [1.75]])
    """
    return dispatch("diagonal_scan", locals())


def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    *,
    D: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Mamba-1's scan: h = exp(delta A) h + delta u B^T, o = h C + D u.

    Linear attention with keys B, queries C and values delta u, whose decay differs for every entry of the state.
    Weights: decaying. Regressor: linear. Optimizer: one step.

    Parameters
    ----------
    u : (..., t, v)
        Inputs.
    delta : (..., t, v)
        Step lengths, >= 0.
    A : (v, n)
        Rates, <= 0.
    B, C : (..., t, n)
        Input map (the key) and output map (the query).
    D : (v,), optional
        Direct path from input to output.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``h (..., v, n)``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, a rate is positive or a step length negative.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t v n); memory O(t (v + n)).

    References
    ----------
    Gu, Dao (2023), Mamba, arXiv:2312.00752.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> ones = np.ones((2, 1))
    >>> ttr_np.selective_scan([[1.0], [0.0]], ones, [[-np.log(2.0)]], ones, ones)
    array([[1. ],
           [0.5]])
    """
    return dispatch("selective_scan", locals())


def recursive_least_squares(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    beta: Any = None,
    ridge: float = 1.0,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from the exact weighted least-squares fit, its ridge decaying with the data.

    S minimises sum_i beta_i gamma_i |v_i - S^T k_i|^2 + gamma_0 ridge |S|^2, where gamma is the product of the decays
    since; the Gram matrix starts at ridge I. Weights: decaying. Regressor: linear. Optimizer: exact. Recursive least
    squares with forgetting (the Mesa layer of 2023): positive definite by construction.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys (regressors).
    v : (..., t, v)
        Values.
    log_decay : (..., t), optional
        Log of the share of the past that is kept, <= 0 and finite (a least-squares fit of nothing has no solution). At
        irregular times, -(time since the pair before) / tau forgets by time and not by pairs.
    beta : (..., t), optional
        Weight of each pair, >= 0; default 1.
    ridge : float, default 1.0
        Gram matrix of the empty memory, a multiple of the identity; > 0. One below 1e-28 is that number: keys so small
        want to be scaled.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``S (..., k, v)`` the fit, ``P (..., k, k)`` its
        inverse Gram matrix.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, a log_decay is positive or a weight negative.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t k (k + v)); memory O(t (k + v)). A direction that no key excites is forgotten without being learned: there
    P is capped, and no answer of the past moves (``ttr_np.solvers.recursive_least_squares`` says how).

    References
    ----------
    Plackett (1950); von Oswald et al. (2023), arXiv:2309.05858; Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = [[1.0], [1.0]]
    >>> ttr_np.recursive_least_squares(k, k, [[2.0], [4.0]])
    array([[1.],
           [2.]])
    """
    return dispatch("recursive_least_squares", locals())


def mesa(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    beta: Any = None,
    ridge: Any = 1.0,
    solver: str = "exact",
    iterations: int | None = None,
    tolerance: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from the least-squares fit with a constant ridge: o = G^T (H + diag(ridge))^-1 q.

    G = decay G + beta k v^T and H = decay H + beta k k^T. Weights: decaying. Regressor: linear. Optimizer: exact, or as
    far as the iterations go. MesaNet; with ``solver="chebyshev"`` the iteration of Gated KalmaNet.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    log_decay : (..., t), optional
        Log of the share of the past that is kept, <= 0 (-inf forgets all).
    beta : (..., t), optional
        Weight of each pair, >= 0; default 1.
    ridge : float or (..., k), default 1.0
        Ridge of each key channel, constant in time, >= 0; with 0 anywhere the answers are those of minimum norm, and
        ``chebyshev`` needs it > 0.
    solver : {"exact", "cg", "chebyshev"}, default "exact"
        How the linear system of each query is solved: as exactly as the dtype allows, or by an iteration.
    iterations : int, optional
        Most steps of an iteration; default: 2 k for ``cg``, what the bounds on the eigenvalues ask for (at most 1000)
        for ``chebyshev``. A token that is not done by then keeps what it has, with a RuntimeWarning.
    tolerance : float, optional
        Residual |q - (H + diag(ridge)) x| / |q| at which a token is done; default: eps^(3/4) of the dtype of the sums,
        but 0 for ``chebyshev`` with a number of iterations. With 0 there is no warning.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``G (..., k, v)``, ``H (..., k, k)``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, a log_decay is positive, a weight or ridge negative, the solver unknown, or
        the ``H`` that is given surely no sum of k k^T.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t (k^3 + k v)) exact with decay, O(t (k v + c (k + v) + (c + k)^3 / c)) without, O(t n (k^2 + c k) + t k v)
    with n iterations, in chunks of c tokens; memory O(t (k + v)). Compiled backends solve exactly by iterations that go
    on to rounding, which takes far less than k^3 per token where the condition is mild.

    References
    ----------
    von Oswald et al. (2025), MesaNet, arXiv:2506.05233; Peng et al. (2025), Gated KalmaNet, arXiv:2511.21016.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = [[1.0], [1.0]]
    >>> ttr_np.mesa(k, k, [[2.0], [4.0]])
    array([[1.],
           [2.]])
    """
    return dispatch("mesa", locals())


def affine_projection(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    *,
    order: int = 2,
    ridge: float = 0.0,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from the memory that changes least while it fits the last ``order`` pairs.

    S = S + beta K^T (K K^T + ridge I)^-1 (V - K S) with the last pairs as the rows of K and V. Weights: a window of
    ``order`` pairs. Regressor: linear. Optimizer: the exact fit nearest to the last one; order 1 is the normalised
    delta rule.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    beta : (..., t)
        Share of the step to the fit that is taken; 1 fits, stable for 0 <= beta <= 2.
    order : int, default 2
        Number of pairs fitted at each step, the current one included.
    ridge : float, default 0.0
        Added to K K^T; with 0, dependent keys get the fit of minimum norm.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: ``S (..., k, v)`` and the last ``order - 1`` pairs
        ``k (..., p, k)``, ``v (..., p, v)``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, order is below 1 or the ridge negative.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t p (k v + p k + p^2)) with order p, token by token; memory O(t (k + v)).

    References
    ----------
    Ozeki, Umeda (1984), An adaptive filtering algorithm using an orthogonal projection to an affine subspace.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = [[1.0, 0.0], [1.0, 1.0]]
    >>> ttr_np.affine_projection(k, k, [[2.0], [5.0]], [1.0, 1.0])
    array([[2.],
           [5.]])
    """
    return dispatch("affine_projection", locals())


def kalman_filter(
    q: Any,
    k: Any,
    v: Any,
    *,
    process_noise: Any = 0.0,
    measurement_noise: Any = 1.0,
    log_transition: Any = None,
    ridge: float = 1.0,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from the mean of a Gaussian memory that drifts between the pairs and is measured by them.

    S = A S + noise of variance process_noise, v = S^T k + noise of variance measurement_noise, A = exp(log_transition).
    Weights: what the drift leaves of each pair. Regressor: linear. Optimizer: exact. Without process noise and
    transition it is ``recursive_least_squares`` with beta = 1 / measurement_noise.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    process_noise : (..., t) or float, default 0.0
        Variance by which every number of the memory drifts in a step, >= 0.
    measurement_noise : (..., t) or float, default 1.0
        Variance of the noise on the values, > 0.
    log_transition : (..., t), optional
        Log of the factor by which the memory is expected to shrink (or grow) in a step.
    ridge : float, default 1.0
        Inverse of the variance of the empty memory, > 0.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: mean ``S (..., k, v)``, covariance ``P (..., k, k)``
        of each of its columns.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a variance is out of range.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t k (k + v)), token by token; memory O(t (k + v)). In float64 whatever the dtype: what is not learnt yet may
    exceed the noise of a measurement by more than float32 can tell apart.

    References
    ----------
    Kalman (1960), A new approach to linear filtering and prediction problems.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = [[1.0], [1.0]]
    >>> ttr_np.kalman_filter(k, k, [[2.0], [4.0]])
    array([[1.],
           [2.]])
    """
    return dispatch("kalman_filter", locals())


def softmax_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    log_decay: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall the mean of the values, weighted by exp(scale q . k).

    The local constant (Nadaraya-Watson) fit around each query. Weights: the exponential kernel, times the decays.
    Regressor: constant. Optimizer: exact.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    scale : float, optional
        Sharpness of the kernel; default 1 / sqrt(k).
    causal : bool, default True
        Whether a query sees only its own and earlier pairs; else it sees all.
    window : int, optional
        Number of newest pairs a query sees, the current one included; default: all.
    sinks : int, default 0
        Number of first pairs that are seen besides the window.
    log_decay : (..., t), optional
        Gates whose sums over (i, t] are added to the logits: forgetting attention; a constant gives ALiBi.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: the pairs still needed: ``k``, ``v``, ``log_weight``,
        ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, a log_decay is positive or a window below 1.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t n (k + v)) with n pairs seen; memory O(t (k + v)), no t x t matrix is stored.

    References
    ----------
    Vaswani et al. (2017), arXiv:1706.03762; Press et al. (2021), arXiv:2108.12409; Xiao et al. (2023),
    arXiv:2309.17453; Lin et al. (2025), arXiv:2503.02130; Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> ttr_np.softmax_attention(np.zeros((2, 3)), np.ones((2, 3)), [[1.0], [3.0]])
    array([[1.],
           [2.]])
    """
    return dispatch("softmax_attention", locals())


def local_polynomial(
    q: Any,
    k: Any,
    v: Any,
    *,
    degree: int = 1,
    kernel: Any = "exponential",
    scale: float | None = None,
    bandwidth: float | None = None,
    ridge: float = 1e-6,
    causal: bool = True,
    window: int | None = None,
    log_decay: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from a weighted polynomial fit around each query.

    Weights: a kernel of query and key, times the decays. Regressor: polynomial of the key around the query. Optimizer:
    exact. Degree 0 is softmax attention or another Nadaraya-Watson smoother, degree 1 local linear attention, LOESS.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    degree : int, default 1
        Of the polynomial.
    kernel : str or callable, default "exponential"
        ``exponential`` is exp(scale q . k), ``gaussian`` exp(-|q - k|^2 / (2 bandwidth^2)); ``epanechnikov``,
        ``biweight``, ``triweight``, ``boxcar`` or a function of |q - k| / bandwidth.
    scale : float, optional
        Sharpness of the exponential kernel; default 1 / sqrt(k).
    bandwidth : float, optional
        Width of the other kernels, > 0: they need one, the exponential kernel takes none.
    ridge : float, default 1e-6
        On every coefficient but the constant, relative to the total weight. From degree 2 on it acts on the
        coefficients of scaled monomials of k - q, f(x) . f(z) = sum_d (x . z)^d / d!^2 with d from 1 to the degree: the
        ridge of a mixed derivative depends on its multiplicity, and all directions of space are alike.
    causal : bool, default True
        Whether a query sees only its own and earlier pairs.
    window : int, optional
        Number of newest pairs a query sees, the current one included.
    log_decay : (..., t), optional
        Log of the share of the past that is kept, <= 0 (-inf forgets all).
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: the pairs still needed: ``k``, ``v``, ``log_weight``,
        ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, a log_decay is positive or an option out of range.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t n (p^2 + v p) + t p^3) with n pairs seen and p coefficients; no t x t matrix is stored.

    References
    ----------
    Cleveland (1979); Fan, Gijbels (1996); Zuo et al. (2025), local linear attention, arXiv:2510.01450; Wang, Shi, Fox
    (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = np.array([[0.0], [1.0], [2.0]])
    >>> o = ttr_np.local_polynomial(np.full((3, 1), 3.0), k, 2 * k, kernel="gaussian", bandwidth=2.0)
    >>> o[-1].round(3)
    array([6.])
    """
    return dispatch("local_polynomial", locals())


def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    alpha: float = 2.0,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall the mean of the values under alpha-entmax weights: far keys weigh exactly nothing.

    Weights max((alpha - 1) scale q . k - tau, 0)^(1 / (alpha - 1)) with the tau at which they sum to one: a kernel of
    compact support whose bandwidth adapts to the data. Regressor: constant. Optimizer: exact. Alpha 2 is sparsemax,
    alpha -> 1 softmax.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    alpha : float, default 2.0
        How sharply the weights are cut off, > 1. For unit keys 1 + 1/n is the kernel (1 - u^2)^n.
    scale : float, optional
        Sharpness of the scores; default 1 / sqrt(k).
    causal : bool, default True
        Whether a query sees only its own and earlier pairs; else it sees all.
    window : int, optional
        Number of newest pairs a query sees, the current one included; default: all.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: the pairs still needed: ``k``, ``v``, ``log_weight``,
        ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, alpha is not above 1 or a window below 1.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t n (k + v)) with n pairs seen; memory O(t (k + v)), no t x t matrix is stored.

    References
    ----------
    Martins, Astudillo (2016), arXiv:1602.02068; Peters, Niculae, Martins (2019), arXiv:1905.05702.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = 3 * np.eye(2)
    >>> ttr_np.sparse_attention(k, k, [[1.0], [3.0]], scale=1.0)
    array([[1.],
           [3.]])
    """
    return dispatch("sparse_attention", locals())


def path_attention(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    w: Any,
    *,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall the softmax mean of the values, their keys reflected or shrunk by every later step.

    The logits are scale q_t . (H_t ... H_{i+1}) k_i with H_s = I - beta_s w_s w_s^T: a position encoding made of data.
    Weights: the exponential kernel. Regressor: constant. Optimizer: exact.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    beta : (..., t)
        How far each step changes the keys before it: 1 removes their part along w, 2 reflects it.
    w : (..., t, k)
        Direction of that change, of unit length.
    scale : float, optional
        Sharpness of the kernel; default 1 / sqrt(k).
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: all pairs: ``k``, ``v``, ``log_weight``, ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t n (k + v)) with n pairs; memory O(t (k + v)), no t x t matrix is stored.

    References
    ----------
    Yang et al. (2025), arXiv:2505.16381.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = np.array([[100.0, 0.0], [0.0, 0.0]])
    >>> w = [[1.0, 0.0], [1.0, 0.0]]
    >>> ttr_np.path_attention(k[[0, 0]], k, [[1.0], [3.0]], [0.0, 1.0], w)
    array([[1.],
           [2.]])
    """
    return dispatch("path_attention", locals())


def stick_breaking_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall a sum of earlier values, each with its share of what the later ones left: o = sum_{i < t} w_i v_i.

    From the newest pair to the oldest each takes a share b = sigmoid(scale q . k) of what remains, so w_i = b_i prod
    (1 - b_j) over the pairs j after i. The query's own pair is not seen. Regressor: constant. Optimizer: one step.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    scale : float, optional
        Factor of the logits; default 1 / sqrt(k).
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: all pairs: ``k``, ``v``, ``log_weight``, ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t n (k + v)) with n pairs; memory O(t (k + v)), no t x t matrix is stored.

    References
    ----------
    Tan et al. (2024), arXiv:2410.17980.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> q = k = np.zeros((3, 1))
    >>> ttr_np.stick_breaking_attention(q, k, [[1.0], [1.0], [1.0]])
    array([[0.  ],
           [0.5 ],
           [0.75]])
    """
    return dispatch("stick_breaking_attention", locals())


def wall_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any = None,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall the softmax mean of the values, their keys fading channel by channel with every later step.

    The logits are scale sum_c q_c k_c exp(sums of log_decay_c since the pair was stored). Weights: the exponential
    kernel. Regressor: constant. Optimizer: exact.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    log_decay : (..., t, k) or (..., t), optional
        Log of what a step leaves of all keys before it, <= 0; per channel, or the same for all.
    scale : float, optional
        Sharpness of the kernel; default 1 / sqrt(k).
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: all pairs, the
        keys as they have faded: ``k``, ``v``, ``log_weight``, ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a log_decay is positive.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t n (k + v)) with n pairs; memory O(t (k + v)), no t x t matrix is stored.

    References
    ----------
    flash-linear-attention, wall_attn.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = np.array([[100.0, 0.0], [0.0, 0.0]])
    >>> ttr_np.wall_attention(k[[0, 0]], k, [[1.0], [3.0]], log_decay=[[0.0, 0.0], [-np.inf, 0.0]])
    array([[1.],
           [2.]])
    """
    return dispatch("wall_attention", locals())


def delta_attention(
    q: Any,
    k: Any,
    v: Any,
    beta: Any,
    *,
    erase_key: Any = None,
    scale: float | None = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall the softmax mean of values from which what was known before has been taken off: the delta rule of pairs.

    Stored is u_t = v_t - beta_t m(erase_key_t), m the softmax mean of the u before; answered is the softmax mean of all
    u up to t. Weights: the exponential kernel. Regressor: constant. Optimizer: exact, on corrected values.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    beta : (..., t)
        Share of the recalled value that is taken off.
    erase_key : (..., t, k), optional
        Key under which it is recalled; default: the key itself.
    scale : float, optional
        Sharpness of the kernel; default 1 / sqrt(k).
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: all pairs, the
        values as they were corrected: ``k``, ``v``, ``log_weight``, ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t n (k + v)) with n pairs; memory O(t (k + v)), no t x t matrix is stored.

    References
    ----------
    Zhong et al. (2025), arXiv:2505.19488.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = np.zeros((2, 1))
    >>> ttr_np.delta_attention(k, k, [[1.0], [3.0]], [1.0, 1.0])
    array([[1. ],
           [1.5]])
    """
    return dispatch("delta_attention", locals())


def log_linear_attention(
    q: Any,
    k: Any,
    v: Any,
    levels: Any,
    *,
    log_decay: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from linear memories of dyadic age, each with a weight of its own: o = sum_l levels_l S_l^T q.

    The past is kept in the buckets of a Fenwick tree: log2(t) + 2 of them, the older the larger. Weights: piecewise
    constant in dyadic age, times the decays. Regressor: linear. Optimizer: one step. Equal levels give linear
    attention.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    levels : (..., t, l)
        Weight of each bucket, the newest first; the last one holds all that is older.
    log_decay : (..., t), optional
        Log of the share of the past that is kept, <= 0 (-inf forgets all).
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: one sum per bucket ``S (..., l, k, v)``, and ``count
        (...)``, the pairs memorised.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a log_decay is positive.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t log(t) k v); memory O(t (k + v + l)) and l states.

    References
    ----------
    Guo et al. (2025), arXiv:2506.04761.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> ones = np.ones((3, 1))
    >>> ttr_np.log_linear_attention(ones, ones, ones, [[1.0, 0.5, 0.25]] * 3)
    array([[1. ],
           [1.5],
           [1.5]])
    """
    return dispatch("log_linear_attention", locals())


def kernel_ridge(
    q: Any,
    k: Any,
    v: Any,
    *,
    kernel: Any = "gaussian",
    bandwidth: float = 1.0,
    ridge: float = 1.0,
    causal: bool = True,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from kernel ridge regression, the mean of a Gaussian process: o = kappa(q)^T (K + ridge I)^-1 V.

    Weights: uniform. Regressor: functions of a reproducing kernel Hilbert space. Optimizer: exact.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    kernel : str or callable, default "gaussian"
        ``gaussian``, ``exponential``, ``linear``, ``polynomial`` or a positive definite function of two arrays of
        vectors.
    bandwidth : float, default 1.0
        Width of the kernels ``gaussian``, exp(-|x - y|^2 / (2 bandwidth^2)), and ``exponential``,
        exp(x . y / bandwidth^2).
    ridge : float, default 1.0
        Noise variance, >= 0; with 0 the answers interpolate, and keys that repeat raise LinAlgError.
    causal : bool, default True
        Whether a query sees only its own and earlier pairs.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: all pairs: ``k``, ``v``, ``log_weight``, ``position``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or an option is out of range.
    TypeError
        If an array holds no real numbers.
    numpy.linalg.LinAlgError
        If the Gram matrix is singular: ``ridge`` 0 and keys that repeat.

    Notes
    -----
    Cost: O(t^3) in all, O(t^2) memory for the Cholesky factor: exact, so it grows with the data.

    References
    ----------
    Rasmussen, Williams (2006), chapter 2; Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> ttr_np.kernel_ridge([[0.0]], [[0.0]], [[2.0]])
    array([[1.]])
    """
    return dispatch("kernel_ridge", locals())


def test_time_training(
    q: Any,
    k: Any,
    v: Any,
    step_size: Any,
    *,
    memory: Any,
    batch_size: int = 16,
    momentum: Any = None,
    weight_decay: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Recall from a memory with parameters, trained on the pairs by gradient descent as they pass.

    Gradients are taken at the start of each mini-batch. Weights: uniform, or decaying by weight decay. Regressor: the
    memory. Optimizer: mini-batch gradient descent, with momentum Titans. TTT-Linear, TTT-MLP, Titans.

    Parameters
    ----------
    q, k : (..., t, k)
        Queries and keys.
    v : (..., t, v)
        Values.
    step_size : (..., t)
        Of each token's gradient, >= 0.
    memory : Linear or MLP
        The model that is trained: ``ttr_np.Linear()`` or ``ttr_np.MLP(hidden, depth)``, with its start parameters.
    batch_size : int, default 16
        Tokens whose gradients are taken at the same parameters; with 1, online gradient descent.
    momentum : (..., t), optional
        Share of the last step that is repeated, in [0, 1].
    weight_decay : (..., t), optional
        Share of the parameters that is forgotten at a step, in [0, 1].
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: the packed ``parameters``, ``momentum``, the
        mini-batch's ``anchor`` and ``count``.

    Returns
    -------
    o : (..., t, v)
        Answers, in the dtype of the data; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or a step size is negative.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t p) with p parameters; memory O(t (k + v) + p).

    References
    ----------
    Sun et al. (2024), arXiv:2407.04620; Behrouz et al. (2025), Titans, arXiv:2501.00663; Wang, Shi, Fox (2025),
    arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> k = [[1.0, 0.0], [1.0, 0.0]]
    >>> ttr_np.test_time_training(k, k, [[1.0], [7.0]], [1.0, 1.0], memory=ttr_np.Linear(), batch_size=1)
    array([[1.],
           [7.]])
    """
    if memory is not None and not hasattr(memory, "parameters"):
        raise TypeError(f"memory is {memory!r}; it needs a memory, ttr_np.Linear() or ttr_np.MLP()")
    return dispatch("test_time_training", locals())


def short_convolution(
    x: Any,
    weight: Any,
    *,
    bias: Any = None,
    activation: Any = None,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    backend: Any = None,
) -> Any:
    """Convolve every channel by itself with its last few inputs.

    The shift with which most layers build their keys and values: what came just before becomes part of the key.

    Parameters
    ----------
    x : (..., t, d)
        Inputs.
    weight : (w, d)
        Taps, the last one for the current token.
    bias : (d,), optional
        Offset added to every output.
    activation : str, optional
        ``"silu"`` or None.
    initial_state, output_final_state, cu_seqlens, mask, backend
        Common to all operators: see ``ttr_np.operators``. State: the last w - 1 inputs, ``x (..., w - 1, d)``.

    Returns
    -------
    o : (..., t, d)
        Convolved inputs, in their dtype; or ``(o, state)``.

    Raises
    ------
    ValueError
        If two arrays disagree on an axis, or the activation is unknown.
    TypeError
        If an array holds no real numbers.

    Notes
    -----
    Cost: O(t w d); memory O(t d).

    References
    ----------
    Fu et al. (2022), H3, arXiv:2212.14052; Gu, Dao (2023), arXiv:2312.00752.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> ttr_np.short_convolution([[1.0], [2.0], [3.0]], [[1.0], [10.0]])
    array([[10.],
           [21.],
           [32.]])
    """
    return dispatch("short_convolution", locals())


test_time_training.__test__ = False  # type: ignore[attr-defined]  # pytest collects what starts with test
