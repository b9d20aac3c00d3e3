"""All speed races beside peers, one after the other, each in a process of its own: `make bench`.

    python benchmarks/bench.py                         # everything, into benchmarks/results
    python benchmarks/bench.py --only inference step   # some races; written with --out only
    python benchmarks/bench.py --quick                 # small work, one round: shows that all races run
    python benchmarks/bench.py --check                 # few rounds, compared with the newest recorded run

Real photos are taken from `--data` or PIXELWISE_DATA (a folder that holds `camvid`), else scenes are drawn. The machine
should have nothing else to do. A race that fails does not stop the others; it is named at the end, and the exit code is 1.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tables
from measure import Setup, machine, newest, regressions, versions

from pixelwise.files import read_json, write_json, write_text

RACES = ("limits", "inference", "onnx_runtime", "step", "stream", "predict", "evaluation", "large", "share")
RESULTS = Path(__file__).parent / "results"
LONGEST_S = 900  # of one race


def run_race(name: str, setup: Setup, out: Path) -> None:
    """One race in this process; its rows go into a file."""
    rows = importlib.import_module(f"races.{name}").run(setup)
    write_json(out, [row.to_dict() for row in rows])


def start_race(name: str, args: argparse.Namespace, scratch: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of a race that runs in a process of its own, and what went wrong, or nothing."""
    result = scratch / "rows.json"
    command = [sys.executable, __file__, "--race", name, "--result", str(result)]
    command += [f"--{key}" for key in ("quick", "check") if getattr(args, key)]
    command += ["--data", str(args.data)] if args.data else []
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        return [], f"took more than {LONGEST_S} s"
    if done.returncode:
        sys.stderr.write(done.stderr)
        return [], (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    return read_json(result), ""


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """The result of all races that were asked for."""
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python benchmarks/bench.py", *_options(args)]),
        "machine": machine(),
        "versions": versions(),
        "rows": [],
        "failed": {},
        "seconds": {},
    }
    for name in args.only:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            rows, failure = start_race(name, args, Path(scratch))
        result["rows"] += rows
        result["seconds"][name] = round(time.monotonic() - started)
        if failure:
            result["failed"][name] = failure
        print(f"\n{name}: {result['seconds'][name]} s. {failure}\n{tables.markdown(rows)}", flush=True)
    return result


def _options(args: argparse.Namespace) -> list[str]:
    return [f"--{key}" for key in ("quick", "check") if getattr(args, key)] + (
        ["--only", *args.only] if tuple(args.only) != RACES else []
    )


def check(result: dict[str, Any], recorded: Path | None) -> int:
    """Print what became slower since the recorded run; the exit code."""
    if recorded is None:
        print("There is no recorded run to compare with. `make bench` makes one.")
        return 1
    before = read_json(recorded)
    if before["machine"]["cpu"] != result["machine"]["cpu"]:
        print(f"Note: {recorded.name} is of another processor, whose ratios may differ ({before['machine']['cpu']}).")
    found = regressions(result["rows"], before["rows"])
    print("\n".join(["Slower than recorded, by more than the spread:", *found] if found else ["No regression."]))
    return 1 if found else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RACES, default=RACES, metavar="RACE", help=", ".join(RACES))
    parser.add_argument("--quick", action="store_true", help="small work, one round; nothing is written without --out")
    parser.add_argument("--check", action="store_true", help="few rounds, compared with the newest recorded run")
    parser.add_argument("--data", type=Path, default=os.environ.get("PIXELWISE_DATA"), help="folder that holds camvid")
    parser.add_argument("--out", type=Path, help="folder of the result; by default benchmarks/results for a full run")
    for internal in ("--race", "--result"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.race:
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(args.data).resolve() if args.data else None
            run_race(args.race, Setup(scratch=Path(scratch), data=data, few=args.check, small=args.quick), args.result)
        return 0
    result = run_all(args)
    is_full = not args.quick and not args.check and tuple(args.only) == RACES
    out = args.out or (RESULTS if is_full else None)
    if out:
        path = out / f"{result['date']}-bench.json"
        write_json(path, result)
        write_text(path.with_suffix(".md"), tables.page(result))
        print(f"Written: {path.name} and {path.with_suffix('.md').name}. For the README: python benchmarks/tables.py")
    print(f"{sum(result['seconds'].values()) / 60:.1f} minutes. {tables.summary(result)}")
    failed = 1 if result["failed"] else 0
    return max(failed, check(result, newest(RESULTS, "bench"))) if args.check else failed


if __name__ == "__main__":
    sys.exit(main())
