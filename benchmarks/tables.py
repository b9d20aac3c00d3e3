"""Tables of the results, for people: the page beside each JSON, and the README's tables.

python benchmarks/tables.py         # writes the newest results into README.md, between the two comments
"""

import sys
from pathlib import Path
from typing import Any

from measure import newest

from pixelwise.files import read_json, write_text

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- made by benchmarks/tables.py: begin -->", "<!-- made by benchmarks/tables.py: end -->"
HEAD = "| race | what | peer | pixelwise | peer's | ratio (lowest to highest round) | goal |\n|---|---|---|--:|--:|--:|---|"
LIMITS, SHARES = "limits", "share of the limit"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as tables: races, then the limits of the machine, then the shares of it."""
    races = [row for row in rows if row["race"] not in (LIMITS, SHARES)]
    limits = [f"| {row['case']} | {_number(row['ours'])} {row['unit']} |" for row in rows if row["race"] == LIMITS]
    shares = [row for row in rows if row["race"] == SHARES]
    parts = [HEAD + "\n" + "\n".join(map(_line, races))] if races else []
    parts += ["| the machine's limit | measured |\n|---|--:|\n" + "\n".join(limits)] if limits else []
    head = "| network at 360 x 480 px | GFLOP/s | share of the bfloat16 rate | goal | where the time goes |\n"
    head += "|---|--:|--:|---|---|\n"
    parts += [head + "\n".join(map(_share, shares))] if shares else []
    return "\n\n".join(parts)


def _line(row: dict[str, Any]) -> str:
    rates = [f"{_number(row[key])} {row['unit']}" for key in ("ours", "theirs")]
    ratio = f"**{_number(row['ratio'])}** ({_number(row['lowest'])} to {_number(row['highest'])})"
    return f"| {row['race']} | {row['case']} | {row['peer']} | {rates[0]} | {rates[1]} | {ratio} | {_goal(row)} |"


def _share(row: dict[str, Any]) -> str:
    reason = row["note"].partition(": ")[2] or row["note"]
    return f"| {row['case']} | {_number(row['ours'])} | {row['ratio']:.2f} | {_goal(row)} | {reason} |"


def _goal(row: dict[str, Any]) -> str:
    return "" if row["goal"] is None else f"{row['goal']:.2f}: {'met' if row['met'] else 'not met'}"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def summary(result: dict[str, Any]) -> str:
    """How many goals are met."""
    goals = [row["met"] for row in result["rows"] if row["goal"] is not None]
    failed = "".join(f" {name} failed: {reason}." for name, reason in result["failed"].items())
    return f"{sum(goals)} of {len(goals)} goals are met.{failed}"


def conditions(result: dict[str, Any]) -> str:
    """The date, the machine and the versions, in a sentence each."""
    machine = result["machine"]
    flags = ", ".join(machine["flags"])
    known = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores ({flags}), {machine['memory_gib']} GiB, "
        f"{machine['system']}; OMP_NUM_THREADS {machine['omp_num_threads']}, "
        f"load before the start {machine['load_before']}. {known}."
    )


def page(result: dict[str, Any]) -> str:
    """The Markdown page beside a result: conditions, tables, what was compared."""
    checks = dict.fromkeys(
        f"* {row['race']}, {row['case']}, {row['peer']}: {', '.join(filter(None, (row['checked'], row['note'])))}"
        for row in result["rows"]
        if row["race"] != SHARES and (row["checked"] or row["note"])
    )
    seconds = ", ".join(f"{name} {value} s" for name, value in result["seconds"].items())
    return "\n\n".join(
        [
            f"# Speed beside peers, {result['date']}",
            f"`{result['command']}`. {conditions(result)}",
            summary(result),
            markdown(result["rows"]),
            "Compared for equality, and how each was run:",
            "\n".join(checks),
            f"Took: {seconds}.\n",
        ]
    )


def accuracy(result: dict[str, Any]) -> str:
    """The table of accuracy for equal minutes."""
    lines = ["| data | minutes | pixelwise | smp U-Net, plain loop | ahead by | seeds |", "|---|--:|--:|--:|--:|--:|"]
    for row in result["sets"]:
        pairs = [(row[who]["mean"], row[who]["interval"]) for who in ("pixelwise", "smp")]
        ours, theirs = (f"{100 * mean:.2f}{_interval(half)}" for mean, half in pairs)
        ahead = f"{100 * row['ahead']:+.2f}{_interval(row['ahead_interval'])}"
        lines.append(
            f"| {row['set']}, {row['measure']} | {row['minutes']:g} | {ours} | {theirs} | {ahead} | {row['seeds']} |"
        )
    return "\n".join(lines)


def _interval(half: float | None) -> str:
    return "" if half is None else f" ± {100 * half:.2f}"


def readme(results: Path) -> str:
    """What stands between the two comments of the README."""
    parts = []
    if path := newest(results, "bench"):
        result = read_json(path)
        rows = [row for row in result["rows"] if row["race"] != SHARES or row["goal"] is not None]
        link = f"[all figures](benchmarks/results/{path.with_suffix('.md').name})"
        parts += [markdown([row for row in rows if row["race"] != LIMITS])]
        parts += [f"{summary(result)} {conditions(result)} {link}"]
    else:
        parts += ["Speed beside peers (`make bench`): not run yet on a quiet machine."]
    if path := newest(results, "accuracy"):
        parts += [
            accuracy(read_json(path)),
            f"{conditions(read_json(path))} Mean over the seeds and its 95 % interval.",
        ]
    return "\n\n".join(parts)


def with_tables(text: str, results: Path) -> str:
    """The README's text with the tables of the newest results.

    Raises:
        ValueError: one of the two comments is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the two comments {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{readme(results)}\n\n{END}{after}"


def main() -> int:
    path = ROOT / "README.md"
    write_text(path, with_tables(path.read_text(), ROOT / "benchmarks" / "results"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
