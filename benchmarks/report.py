"""The tables of a benchmark on the screen."""

from __future__ import annotations

import textwrap
from typing import Any

from ttr_np.cli.compare import timing_cells
from ttr_np.cli.table import aligned, digits
from ttr_np.measure import busy

__all__ = ["crossover_table", "entry_table", "heading", "scaling_heading", "scaling_line", "summary_table"]

COLUMNS = ("contender", "ms", "p20-p80", "error", "ns/token-head", "MB", "% GEMM", "x ours", "first s", "how")


def heading(result: dict[str, Any]) -> str:
    """What it runs on."""
    machine = result["machine"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s on {n}" for n, rate in result["gemm_flop_per_second"].items())
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n".join(
        [
            f"{machine['processor']}, {machine['cores']} cores, {result['threads']} in use",
            f"ttr_np {machine['ttr_np']} at {result['commit']}, Python {machine['python']}, {packages}",
            f"float32 matrix products: {rates} thread(s)",
            *filter(None, [busy(machine)]),
            "",
            "error: largest difference from the NumPy solver in float64, over its largest answer",
            "MB: memory one call needs; x ours: time over that of our fastest; first s: first call, and its compiling",
            "% GEMM: of matrix products in the same rounds, at the FLOP of chunks of 64; who needs fewer may pass 100",
        ]
    )


def name_of(entry: dict[str, Any]) -> str:
    """Operator, variant and sizes."""
    sizes = " ".join(f"{name} {size}" for name, size in entry["shape"].items())
    return f"{entry['operator']}{', ' * bool(entry['variant'])}{entry['variant']}: {sizes} {entry['dtype']}"


def entry_table(entry: dict[str, Any], told: set[str]) -> str:
    """One question: who answered it how fast, and who did not, unless that was told before."""
    tokens = entry["shape"]["B"] * entry["shape"]["H"] * entry["shape"]["T"]
    rows = [
        [
            found["contender"],
            *timing_cells(found, tokens),
            "-" if found["gemm_share"] is None else f"{100 * found['gemm_share']:.0f}",
            "-" if found["over_ours"] is None else digits(found["over_ours"], 2),
            f"{found['first_call_seconds']:.2f}",
            found["detail"],
        ]
        for found in entry["results"]
    ]
    table = aligned([COLUMNS, *rows], right=range(1, len(COLUMNS) - 1), whole=[0]) if rows else "nobody"
    notes = [f"{name}: {digits(1e3 * times['median'])} ms" for name, times in entry["yardsticks"].items()]
    notes += [line for line in reasons(entry) if line not in told]
    told.update(notes)
    wrapped = (f"  {part}" for line in notes for part in textwrap.wrap(line, 140, subsequent_indent="  "))
    rate = f"float32 matrix products in the same rounds: {entry['gemm_flop_per_second'] / 1e9:.0f} GFLOP/s"
    return "\n".join([f"\n{name_of(entry)}; {rate}", table, *wrapped])


def reasons(entry: dict[str, Any]) -> list[str]:
    """Who did not answer, one line per reason."""
    found: dict[str, list[str]] = {}
    for skipped in entry["skipped"]:
        found.setdefault(skipped["reason"], []).append(skipped["contender"])
    return [f"skipped: {', '.join(names)}: {reason}" for reason, names in found.items()]


def crossover_table(found: dict[str, Any]) -> str:
    """Times over lengths."""
    names = list(dict.fromkeys(name for row in found["rows"] for name in row["seconds"]))
    rows = [[str(row["T"]), *(milliseconds(row["seconds"].get(name)) for name in names)] for row in found["rows"]]
    table = aligned([["T", *names], *rows], right=range(len(names) + 1))
    ends = [crossing(name, t) for name, t in found["from"].items()]
    return "\n".join([f"\nms over lengths, D {found['D']}", table, *ends])


def crossing(name: str, t: int | None) -> str:
    """From where linear attention wins."""
    if t is None:
        return f"linear_attention is not faster than {name} at the longest length"
    return f"linear_attention is faster than {name} from T = {t} on"


def milliseconds(times: dict[str, float] | None) -> str:
    """A median; a contender that was wrong at this length has none."""
    return "-" if times is None else digits(1e3 * times["median"])


def scaling_heading(lengths: list[int]) -> str:
    """Above the lines of ``scaling_line``."""
    cells = "".join(f"{f'T {t}':>9}" for t in lengths)
    head = f"{'operator':31} {'backend':7}{cells}  growth from 4k"
    return "\n".join(["\nns per token of one head", head, "-" * len(head)])


def scaling_line(entry: dict[str, Any], lengths: list[int]) -> str:
    """Cost per token of one operator over lengths."""
    costs = {row["T"]: digits(row["ns_per_token_head"]) for row in entry["rows"]}
    grown = "-" if entry["growth"] is None else f"{100 * entry['growth']:.0f} %"
    name = " ".join(part for part in (entry["operator"], entry["variant"]) if part)
    cells = "".join(f"{costs.get(t, '-'):>9}" for t in lengths)
    return f"{name:31} {entry['backend']:7}{cells}  {grown:>6} {entry.get('reason', '')}".rstrip()


def summary_table(result: dict[str, Any]) -> str:
    """What was reached, one line per question, beside the goal where there is one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for claim in result["summary"]:
        groups.setdefault(claim["about"], []).append(claim)
    head = ["", "ours", "ms", "share of GEMM; times as fast as each peer's best, ~ within the spread"]
    cells = [
        [about, claims[0]["ours"], spoken(claims[0]["seconds"]), ", ".join(map(stated, claims))]
        for about, claims in groups.items()
    ]
    return "\n".join(["\nSummary", aligned([head, *cells], right=(2,), whole=(0, 1, 3))]) if cells else ""


def spoken(seconds: float | None) -> str:
    """Milliseconds, if there are any."""
    return "" if seconds is None else digits(1e3 * seconds)


def stated(claim: dict[str, Any]) -> str:
    """A number, what it is of, and its goal."""
    if claim["reached"] is None:
        return f"never {claim['what']}"
    goal = "" if claim["goal"] is None else f" (goal {claim['goal']:g}{claim['unit']})"
    return f"{'~' * (claim['sure'] is False)}{digits(claim['reached'], 2)}{claim['unit']} {claim['what']}{goal}"
