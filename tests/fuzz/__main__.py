"""``python -m tests.fuzz --kind config --count 20000 --seed 1``: damaged inputs, of which trtlab may refuse any in its own words."""

from __future__ import annotations

import argparse
import sys

from .campaign import HEAD, Line, _lines, case_command, run_kind
from .registry import all_kinds


def main() -> int:
    """Run the cases that the command line asks for; the number of distinct failures is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", default="all", help=f"one of {', '.join(all_kinds())}, several with commas, or all")
    parser.add_argument("--count", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this case alone and print all that is known of it")
    parser.add_argument("--edits", help="of that case only these edits, such as 0,2")
    options = parser.parse_args()
    kinds = list(all_kinds()) if options.kind == "all" else options.kind.split(",")
    if options.case is not None:
        return _one(kinds[0], options.seed, options.case, options.edits)
    failures, cases, seconds = 0, 0, 0.0
    print(HEAD, flush=True)
    for kind in kinds:
        tally = run_kind(kind, options.seed, options.first, options.count, lambda line: _report(line, options.seed))
        print(tally, flush=True)
        failures, cases, seconds = failures + len(tally.failures), cases + tally.cases, seconds + tally.seconds
    print(f"{cases:,} cases, seed {options.seed}, {cases / seconds:.0f}/s, {failures} distinct failures")
    return min(failures, 100)


def _report(line: Line, seed: int) -> None:
    print(
        f"\nFAILED {line['failure']}\n  at {line['where']}\n  by {'; '.join(line['edits']):.600}\n  {case_command(line, seed)}\n",
        flush=True,
    )


def _one(kind: str, seed: int, number: int, edits: str | None) -> int:
    only = None if edits is None else [int(place) for place in edits.split(",")]
    for line in _lines(kind, seed, number, number + 1, only):
        for key, value in line.items():
            print(f"{key}: {value}")
        return 1 if line["failure"] else 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
