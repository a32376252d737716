"""Rung 1, the definition: refit the memory at every step, from scratch, and ask it the query.

    m_t = argmin over m in M of  1/2 sum_i gamma_i(t) |v_i - m(k_i)|^2,    o_t = m_t(q_t)

[1] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["recall"]


def recall(layer: Any, *data: Any, **gates: Any) -> np.ndarray:
    """The outputs of a layer by its definition: one regression per step, over all pairs so far.

    It knows no layer by name: only the three choices ``layer.weights``, ``layer.regressor`` and ``layer.optimizer``.

    Parameters
    ----------
    layer : Layer
        A line of the table, or any ``Layer`` made of three choices.
    *data : (t, k) or (t, v)
        The layer's inputs, one sequence: q, k and v for most.
    **gates
        The layer's gates; those left out take their defaults.

    Returns
    -------
    o : (t, v)
        Answers, float64.

    Raises
    ------
    ValueError
        If the inputs are more than one sequence, or disagree on an axis.

    Notes
    -----
    Cost: O(t) fits of up to t pairs each. Use it to check, not to compute.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> q = k = np.eye(2)
    >>> ttr_np.recall(ttr_np.layers["linear_attention"], q, k, [[1.0], [2.0]])
    array([[1.],
           [2.]])
    """
    layer.problem(*data, **gates)  # refuses what is wrong before it is made float64
    problem = layer.problem(*(np.asarray(x, float) for x in data), **gates)
    for name, x in problem.items():
        if name in layer.data and np.ndim(x) != 2:
            raise ValueError(f"recall takes one sequence: {name} has shape {np.shape(x)}, needs (t, size)")
    answers = []
    for t in range(len(problem["q"])):
        memory = layer.optimizer.fit(layer.regressor, layer.weights, problem, t)
        answers.append(layer.regressor.read(memory, problem, t))
    o = np.array(answers).reshape(len(problem["q"]), -1) if answers else np.zeros(problem["v"].shape)
    return layer.answer(o, problem)
