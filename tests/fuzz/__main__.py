"""Damaged inputs, which trtlab may open or refuse in its own words; nothing else: ``python -m tests.fuzz --seed 1``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from .campaign import HEADS, case_command, line, results, run
from .registry import KINDS
from .results import Job, Result


def main() -> int:
    """Run the cases that the command line asks for; the exit status says whether any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", default=",".join(KINDS), help=f"one or several of {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this case alone and print all that is known of it")
    parser.add_argument("--edits", help="of that case only these edits, such as 0,2")
    options = parser.parse_args()
    kinds = options.kind.split(",")
    if options.case is not None:
        only = None if options.edits is None else tuple(map(int, options.edits.split(",")))
        return _show(next(results([Job(kinds[0], options.case, options.case + 1, only)], options.seed)))
    failures, cases, seconds = 0, 0, 0.0
    print(line(HEADS), flush=True)
    for tally, result in run([Job(kind, options.first, options.first + options.count) for kind in kinds], options.seed):
        if result is not None:
            _report(result, options.seed)
            continue
        print(line(tally.row), flush=True)
        failures, cases, seconds = failures + len(tally.failures), cases + tally.cases, seconds + tally.seconds
    print(f"{cases:,} cases, seed {options.seed}, {cases / seconds:.0f}/s, {failures} distinct failures")
    return int(failures > 0)


def _report(result: Result, seed: int) -> None:
    lines = (f"FAILED {result.failure}", f"  at {result.where}", f"  by {'; '.join(result.edits):.600}")
    print("", *lines, f"  {case_command(result, seed)}", "", sep="\n", flush=True)


def _show(result: Result) -> int:
    for name, value in asdict(result).items():
        print(f"{name}: {value}")
    return int(bool(result.failure))


if __name__ == "__main__":
    sys.exit(main())
