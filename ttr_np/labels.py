"""Tables with labels, in and out: objects of pandas, xarray and polars become arrays, answers get their labels back.

No such library is imported here: who passes its objects has imported it.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from .calling import through_dlpack

__all__ = ["Labels", "as_table", "labelled", "labels_of"]


class Labels(NamedTuple):
    """What names the columns of a table, or a single column: names, ``None`` where there are none."""

    columns: Any = None
    name: Any = None
    dim: Any = None


def library(x: Any) -> str:
    """``pandas``, ``xarray``, ``polars`` or nothing."""
    root = type(x).__module__.split(".")[0]
    return root if root in ("pandas", "xarray", "polars") and hasattr(x, "shape") else ""


def labels_of(x: Any) -> Labels:
    """The column labels of a table."""
    kind = library(x)
    if kind == "pandas":
        return Labels(columns=x.columns if x.ndim == 2 else None, name=None if x.ndim == 2 else x.name)
    if kind == "polars":
        return Labels(columns=getattr(x, "columns", None), name=getattr(x, "name", None))
    if kind == "xarray":
        columns = None if x.ndim < 2 else x.coords[x.dims[1]] if x.dims[1] in x.coords else None
        return Labels(columns=columns, name=x.name, dim=x.dims[1] if x.ndim == 2 else None)
    return Labels()


def column_names(x: Any) -> np.ndarray | None:
    """Names of the columns if all are strings.

    Raises
    ------
    TypeError
        If only some are.
    """
    columns = labels_of(x).columns
    if columns is None:
        return None
    names = np.asarray(columns, dtype=object)
    strings = [isinstance(name, str) for name in names]
    if any(strings) and not all(strings):
        raise TypeError(
            "Feature names are only supported if all input features have string names, "
            f"but the columns have the types {sorted({type(name).__name__ for name in names})}"
        )
    return names if len(names) and all(strings) else None


def labelled(values: np.ndarray, like: Any, labels: Labels) -> Any:
    """Answers with the row labels of the table ``like`` and the column labels of the targets; else as they are.

    Parameters
    ----------
    values : (n,) or (n, m)
    like
        The table that was asked; if it is one of pandas or xarray the answer is one too. Tables of polars do not label
        rows, and get arrays.
    labels : Labels
        Of the targets of the fit.
    """
    kind = library(like)
    if kind == "pandas":
        pandas = sys.modules["pandas"]
        if values.ndim == 1:
            return pandas.Series(values, index=like.index, name=labels.name)
        return pandas.DataFrame(values, index=like.index, columns=labels.columns)
    if kind == "xarray":
        xarray = sys.modules["xarray"]
        rows = like.dims[0]
        coords = {name: x for name, x in like.coords.items() if set(x.dims) <= {rows}}
        dims = (rows,) if values.ndim == 1 else (rows, labels.dim or "output")
        if values.ndim == 2 and labels.columns is not None:
            coords[dims[1]] = np.asarray(labels.columns)
        return xarray.DataArray(values, dims=dims, coords=coords, name=labels.name)
    return values


def as_table(name: str, x: Any, ndim: tuple[int, ...]) -> np.ndarray:
    """Numbers of a table as floats: float32 stays, all else becomes float64.

    Raises
    ------
    TypeError
        If it is sparse, masked, on a GPU, or holds what is no number, dates among them.
    ValueError
        If it is complex or has another number of axes.
    """
    if hasattr(x, "toarray") and hasattr(x, "nnz"):
        raise TypeError(f"{name} is a sparse matrix: this estimator needs a dense one, {name}.toarray()")
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: pass {name}.filled(np.nan), and missing='skip' where that is meant")
    if getattr(x, "__cuda_array_interface__", None) is not None:
        raise TypeError(f"{name} is on a GPU: estimators compute on the CPU; copy it first, or use ttr_np.Memory")
    if hasattr(x, "data_vars"):
        raise TypeError(f"{name} is a Dataset of xarray: pass one of its variables, or {name}.to_dataarray(...).T")
    table = x
    check_columns(name, table)
    x = np.asarray(x.values if library(x) in ("pandas", "xarray") else through_dlpack(x))
    if x.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} has dtype {x.dtype}")
    if x.dtype.kind in "mM":
        raise TypeError(f"{name} needs numbers: its dtype is {x.dtype}")
    if x.ndim not in ndim:
        hint = "Reshape your data either using array.reshape(-1, 1) or array.reshape(1, -1)"
        raise ValueError(f"Expected {ndim[-1]}D array, got {x.ndim}D array instead: {name} has shape {x.shape}. {hint}")
    try:
        if x.dtype == object and library(table) == "pandas":  # its missing value is no number
            return table.to_numpy(dtype=np.float64, na_value=np.nan)
        return x.astype(np.float32 if x.dtype.name in ("float16", "bfloat16", "float32") else np.float64, copy=False)
    except (TypeError, ValueError) as problem:
        kind = TypeError if isinstance(problem, TypeError) else ValueError
        raise kind(f"{name} needs numbers: {problem}") from None


def check_columns(name: str, table: Any) -> None:
    """A TypeError that names a column of dates or durations: beside numbers they would become nanoseconds."""
    kind, kinds = library(table) if len(getattr(table, "shape", ())) == 2 else "", []
    if kind == "pandas":
        kinds = [(column, dtype, dtype.kind in "mM") for column, dtype in table.dtypes.items()]
    elif kind == "polars":
        kinds = [(column, dtype, dtype.is_temporal()) for column, dtype in table.schema.items()]
    for column, dtype, is_time in kinds:
        if is_time:
            raise TypeError(f"{name} needs numbers: the dtype of column {column!r} is {dtype}")
