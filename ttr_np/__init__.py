"""Test-time regression: every sequence layer as weights, a regressor and an optimizer.

    m_t = argmin over m in M of  1/2 sum_i gamma_i(t) |v_i - m(k_i)|^2,    o_t = m_t(q_t)

``ttr_np.layers`` is the table of architectures, ``ttr_np.layers["delta_rule"](q, k, v)`` runs one; operators such as
``ttr_np.delta_rule`` are what runs below it, and ``ttr_np.recall`` is the definition of both. ``Memory`` keeps a state,
``Stream`` takes one token per call, the regressors take rows of X and y; ``available_backends`` says what can run here.
"""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from . import features
from .backends import (
    BackendUnavailable,
    available_backends,
    resolve_backend,
    set_backend,
    show_config,
    use_backend,
)
from .estimators import (
    KernelSmoother,
    LocalPolynomialRegressor,
    RecursiveLeastSquaresRegressor,
    TestTimeRegressor,
    equivalent_kernel,
)
from .framework import recall
from .layers import Gate, Layer, layers
from .memories import MLP, Linear
from .memory import Memory
from .operators import *  # noqa: F403
from .operators import __all__ as _operators
from .streaming import Stream

__all__ = [
    "MLP",
    "BackendUnavailable",
    "Gate",
    "KernelSmoother",
    "Layer",
    "Linear",
    "LocalPolynomialRegressor",
    "Memory",
    "RecursiveLeastSquaresRegressor",
    "Stream",
    "TestTimeRegressor",
    "available_backends",
    "equivalent_kernel",
    "features",
    "layers",
    "recall",
    "resolve_backend",
    "set_backend",
    "show_config",
    "use_backend",
    *_operators,
]


def __getattr__(name: str) -> _ModuleType:
    """Import the experiments when they are first asked for, because few sessions ask."""
    if name == "experiments":
        return _import_module(".experiments", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
