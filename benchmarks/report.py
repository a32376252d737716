"""The tables of a benchmark on the screen."""

from __future__ import annotations

import textwrap
from typing import Any

from ttr_np.cli.compare import timing_cells
from ttr_np.cli.table import aligned

__all__ = ["crossover_table", "entry_table", "heading", "scaling_table"]

COLUMNS = ("contender", "ms", "p20-p80", "error", "ns/token-head", "MB", "% GEMM", "of ours", "first s", "how")


def heading(result: dict[str, Any]) -> str:
    """What it runs on."""
    machine = result["machine"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s on {n}" for n, rate in result["gemm_flop_per_second"].items())
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n".join(
        [
            f"{machine['processor']}, {machine['cores']} cores, load {machine['load']}; {result['threads']} threads",
            f"ttr_np {machine['ttr_np']} at {result['commit']}, Python {machine['python']}, {packages}",
            f"float32 matrix products: {rates} thread(s)",
            "error against the float64 solver; MB: memory one call needs; of ours: time over that of our fastest",
        ]
    )


def name_of(entry: dict[str, Any]) -> str:
    """Operator, variant and sizes."""
    sizes = " ".join(f"{name} {size}" for name, size in entry["shape"].items())
    return f"{entry['operator']}{', ' * bool(entry['variant'])}{entry['variant']}: {sizes} {entry['dtype']}"


def entry_table(entry: dict[str, Any]) -> str:
    """One question: who answered it how fast, and who did not."""
    tokens = entry["shape"]["B"] * entry["shape"]["H"] * entry["shape"]["T"]
    rows = [
        [
            found["contender"],
            *timing_cells(found, tokens),
            "-" if found["gemm_share"] is None else f"{100 * found['gemm_share']:.0f}",
            "-" if found["over_ours"] is None else f"{found['over_ours']:.3g}",
            f"{found['first_call_seconds']:.2f}",
            found["detail"],
        ]
        for found in entry["results"]
    ]
    table = aligned([COLUMNS, *rows], right=range(1, len(COLUMNS) - 1), whole=[0]) if rows else "nobody"
    skipped = [f"  skipped: {found['contender']}: {found['reason']}" for found in entry["skipped"]]
    notes = [part for line in skipped for part in textwrap.wrap(line, 150, subsequent_indent="    ")]
    rate = f"float32 matrix products in the same rounds: {entry['gemm_flop_per_second'] / 1e9:.0f} GFLOP/s"
    return "\n".join([f"\n{name_of(entry)}; {rate}", table, *notes])


def crossover_table(found: dict[str, Any]) -> str:
    """Times over lengths."""
    names = list(dict.fromkeys(name for row in found["rows"] for name in row["seconds"]))
    rows = [[str(row["T"]), *(milliseconds(row["seconds"].get(name)) for name in names)] for row in found["rows"]]
    table = aligned([["T", *names], *rows], right=range(len(names) + 1))
    ends = [f"linear_attention is faster than {name} from T = {t}" for name, t in found["from"].items()]
    return "\n".join([f"\nms over lengths, D {found['D']}", table, *ends])


def milliseconds(times: dict[str, float] | None) -> str:
    """A median; a contender that was wrong at this length has none."""
    return "-" if times is None else f"{1e3 * times['median']:.3g}"


def scaling_table(entries: list[dict[str, Any]]) -> str:
    """Cost per token over lengths, one operator per row."""
    lengths = list(dict.fromkeys(row["T"] for entry in entries for row in entry["rows"]))
    head = ["operator", "backend", *(f"T {t}" for t in lengths), "growth from 4k"]
    rows = []
    for entry in entries:
        costs = {row["T"]: f"{row['ns_per_token_head']:.0f}" for row in entry["rows"]}
        grown = "-" if entry["growth"] is None else f"{100 * entry['growth']:.0f} %"
        name = " ".join(part for part in (entry["operator"], entry["variant"]) if part)
        rows.append([name, entry["backend"], *(costs.get(t, "-") for t in lengths), grown])
    return "\n".join(["\nns per token of one head", aligned([head, *rows], right=range(2, len(head)))])
