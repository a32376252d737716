"""Print the table of layers: the weights, the regressor and the optimizer of each, and the operator that runs it.

The README's table is the output of ``ttr layers --markdown``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from typing import Any

import ttr_np

from ..backends import BACKENDS, has_operator
from ..merging import why_not
from .table import aligned

__all__ = ["entries", "markdown"]

COLUMNS = ("layer", "weights", "regressor", "optimizer", "operator", "gates", "paper")


def declare(parser: argparse.ArgumentParser) -> None:
    """Three forms of one table."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per layer, in a list")
    form.add_argument("--markdown", action="store_true", help="as in the README")


def entries() -> list[dict[str, Any]]:
    """Every layer of the table in plain types: its choices, and what can be done with it.

    ``backends`` have a kernel for its operator, whether or not they can run here; ``why_not_merged`` is empty where two
    memories merge into one.
    """
    return [
        {
            "name": name,
            **{key: chosen(getattr(layer, key)) for key in ("weights", "regressor", "optimizer")},
            "operator": layer.operator,
            "gates": {name: gate.text for name, gate in layer.gates.items()},
            "data": list(layer.data),
            "paper": layer.paper,
            "reason": layer.reason,
            "backends": [backend for backend in BACKENDS if layer.operator and has_operator(backend, layer.operator)],
            "why_not_merged": why_not(layer),
        }
        for name, layer in ttr_np.layers.items()
    ]


def chosen(choice: Any) -> str:
    """One of the three choices in words; a layer that cannot be expressed has made none."""
    return "-" if choice is None else str(choice)


def cells(entry: dict[str, Any]) -> list[str]:
    """One line of the table."""
    gates = "; ".join(text if text.startswith(name) else f"{name}: {text}" for name, text in entry["gates"].items())
    choices = [entry[key] for key in ("name", "weights", "regressor", "optimizer")]
    return [*choices, entry["operator"] or unserved(entry), gates, entry["paper"]]


def unserved(entry: dict[str, Any]) -> str:
    """What stands in the place of the operator: the definition, or nothing yet."""
    return "not yet" if entry["optimizer"] == "-" else "definition"


def plain(width: int | None) -> str:
    """The table, and below it why some layers have no operator."""
    table = entries()
    lines = [aligned([COLUMNS, *map(cells, table)], width=width)]
    for kind, title in (
        ("definition", "without an operator, by the definition only:"),
        ("not yet", "not expressed yet:"),
    ):
        found = [entry for entry in table if entry["operator"] is None and unserved(entry) == kind]
        lines += ["", title, *(f"  {entry['name']}: {entry['reason']}" for entry in found)] if found else []
    return "\n".join(lines)


def markdown() -> str:
    """The table of the README."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(marked_down, entries())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def marked_down(entry: dict[str, Any]) -> list[str]:
    """One line of the README's table: names as code, papers as links."""
    entry = entry | {"reason": entry["reason"].replace("|", "\\|")}
    name, weights, regressor, optimizer, operator, gates, paper = (cell.replace("|", "\\|") for cell in cells(entry))
    paper = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    operator = f"`{operator}`" if entry["operator"] else f"{operator}: {entry['reason']}"
    return [f"`{name}`", weights, regressor, optimizer, operator, gates, paper]


def run(arguments: argparse.Namespace) -> None:
    """Print it; on a terminal no wider than the terminal."""
    if arguments.json:
        print(json.dumps(entries(), indent=1, ensure_ascii=False))
    elif arguments.markdown:
        print(markdown())
    else:
        print(plain(max(shutil.get_terminal_size().columns, 80) if sys.stdout.isatty() else None))
