"""Compares two files of bench.record and prints the ratios that changed.

    python -m bench.compare OLD.json NEW.json [--threshold 0.05]

A ratio changed where it moved by more than the threshold and the quartiles of the two runs do not
overlap. The exit status is 1 where one became worse, so that a script can tell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .report import Result, load, markdown


@dataclass(frozen=True)
class Change:
    """A ratio of a case that is not what it was; above 1 is faster than the contender."""

    case: str
    contender: str
    old: float
    new: float

    @property
    def worse(self) -> bool:
        """Whether limpq_ext lost ground."""
        return self.new < self.old


def changes(old: Sequence[Result], new: Sequence[Result], threshold: float = 0.05) -> list[Change]:
    """The ratios that changed by more than noise, in the order of the new file."""
    before = {result.name: result for result in old}
    found = []
    for result in new:
        earlier = before.get(result.name)
        if earlier is None:
            continue
        for contender, ratio in result.ratios.items():
            was = earlier.ratios.get(contender)
            if was is None or abs(ratio / was - 1) <= threshold:
                continue
            low, high = result.quartiles[contender]
            earlier_low, earlier_high = earlier.quartiles[contender]
            if low > earlier_high or high < earlier_low:
                found.append(Change(result.name, contender, was, ratio))
    return found


def one_sided(old: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """Cases that only one of the files has, each with a sign: - gone, + new."""
    before, after = [r.name for r in old], [r.name for r in new]
    gone = [f"- {name}" for name in before if name not in after]
    return gone + [f"+ {name}" for name in after if name not in before]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="smallest relative change")
    options = parser.parse_args(arguments)
    try:
        (old_run, old), (new_run, new) = load(options.old), load(options.new)
    except (OSError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    for field in ("kind", "threads", "keeps_freed_memory"):
        if old_run.get(field) != new_run.get(field):
            print(f"careful: {field} was {old_run.get(field)} and is {new_run.get(field)}")
    for line in one_sided(old, new):
        print(line)
    found = changes(old, new, options.threshold)
    if not found:
        print("no ratio changed")
        return 0
    rows = [("case", "contender", "old", "new", "")]
    for change in found:
        verdict = "worse" if change.worse else "better"
        rows.append(
            (change.case, change.contender, f"{change.old:.2f}", f"{change.new:.2f}", verdict)
        )
    print(markdown(rows))
    return int(any(change.worse for change in found))


if __name__ == "__main__":
    sys.exit(main())
