"""The record of reliability: counts of drawn cases as they come, and from it the tables of `docs/reliability.md`.

`python -m benchmarks.reliability RECORDS...` puts the counts of other records (of storms that ran elsewhere) into
`benchmarks/results/reliability.json`, prints the tables and puts them into the page; without records `--write` puts them there,
`--check` exits with 1 where the page has others. A count belongs to a seed and a commit: of another commit it starts anew.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from altgrad.records.machine import circumstances
from benchmarks._timing import keep_record

ROOT = Path(__file__).parent.parent
RECORD, PAGE = ROOT / "benchmarks" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"
STORMS = ("kills", "sweeps", "damage", "disk", "signals")
"""First words of their entries; a count of an earlier commit stays under a longer name."""
STORM_FAULTS = ("lost", "silent", "traceback", "hang", "exit")
FUZZ_FAULTS = ("traceback", "hang", "exit", "silent", "leak", "outside")
FUZZ = {
    "fuzz config": "benchmarks.fuzz_configs --kinds config",
    "fuzz matrix": "benchmarks.fuzz_configs --kinds matrix",
    "fuzz records": "benchmarks.fuzz_records",
}
"""Entry of the record -> the command that makes it."""


def where() -> dict[str, Any]:
    """The commit that a count is of."""
    commit = circumstances(torch.device("cpu"), 1)["commit"]
    return {"commit": commit and commit[:12] + commit[40:]}


def count_cases(
    record: Path | None, name: str, seed: int, count: int, judge: Callable[[int], str], every: int = 50
) -> Counter[str]:
    """The verdicts of cases 0 to `count` - 1, which `judge` gives; kept in the record every `every` cases, and gone on
    from there."""
    about, kept = {"seed": seed, **where()}, _entries(record).get(name, {})
    same = all(kept.get(key) == about[key] for key in ("seed", "commit")) and kept.get("cases", 0) <= count
    verdicts = Counter(kept["verdicts"]) if same and "verdicts" in kept else Counter[str]()
    begun = time.monotonic() - (kept["seconds"] if verdicts else 0)
    for number in range(verdicts.total(), count):
        verdicts[judge(number)] += 1
        if record is not None and (verdicts.total() % every == 0 or verdicts.total() == count):
            spent = round(time.monotonic() - begun)
            keep_record(
                record, name, {"cases": verdicts.total(), "verdicts": dict(verdicts), **about, "seconds": spent}
            )
    return verdicts


def _entries(record: Path | None) -> dict[str, Any]:
    return json.loads(record.read_text()) if record is not None and record.exists() else {}


# -- the page ----------------------------------------------------------------------------------------------------------


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Table of the page by the name in its markers."""
    storms = [(kind, entry) for kind in STORMS for name, entry in record.items() if name.split()[0] == kind]
    fuzz = [(command, record[name]) for name, command in FUZZ.items() if name in record]
    return {
        "storms": _table(
            ("command", "seed", "hits in cases", "lost", "silent", "tracebacks", "hangs", "wrong exit codes", "commit"),
            [
                (f"`benchmarks.storm {name}`", one["seed"], f"{one['hits']:,} in {one['cases']:,}",
                 *(one.get(fault, 0) for fault in STORM_FAULTS), one.get("commit") or "")
                for name, one in storms
            ],
        ),
        "fuzz": _table(
            ("command", "seed", "cases", "taken", "refused", "tracebacks", "hangs", "wrong exit codes", "silent", "leaks",
             "written outside", "commit"),
            [
                (f"`{command}`", one["seed"], f"{one['cases']:,}",
                 f"{sum(one['verdicts'].get(word, 0) for word in ('taken', 'reported')):,}",
                 f"{one['verdicts'].get('refused', 0):,}", *(one["verdicts"].get(fault, 0) for fault in FUZZ_FAULTS),
                 one.get("commit") or "")
                for command, one in fuzz
            ],
        ),
        "long": "\n".join(_long(name, one) for name, one in record.items() if name.startswith("long ")),
        "cpu": f"All of them ran on: {' and '.join(_machines(record))}.",
    }  # fmt: skip


def _machines(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(map("{cpu}; {units}; {cores} cores".format_map, record["machines"].values())))


def _long(name: str, one: Mapping[str, Any]) -> str:
    if name == "long steps":
        memory = one["memory_mb"]
        return (
            f"- {one['steps']:,} steps with everything on: {memory[len(memory) // 5][1]:.0f} MB and {memory[-1][2]} open files "
            f"after a fifth of them, {one['added_mb']} MB and {one['files_added']} files more at most since then "
            f"({one['seconds']} s)."
        )
    if name == "long lines":
        what = f"A metrics file of {one['lines']:,} lines ({one['file_mb']} MB)"
    else:
        what = f"A study of {one['runs']:,} runs"
    return f"- {what} is reported on in {one['seconds']} s and {one['peak_mb']:.0f} MB."


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def with_tables(page: str, made: Mapping[str, str]) -> str:
    """The page with each `<!-- name -->` ... `<!-- /name -->` holding that table."""
    for name, text in made.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda at, t=text: f"{at[1]}{t}\n{at[2]}", page, flags=re.S
        )
    return page


def main() -> int:
    """Fold, print, write, check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="*", type=Path, help="records whose counts replace those of the same name")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reliability.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page has other tables")
    arguments = parser.parse_args()
    for other in arguments.records:
        entries = _entries(other)
        machines = entries.pop("machines", {})
        entries.pop("machine", None)  # of earlier versions
        for name, entry in entries.items():
            keep_record(RECORD, name, entry, machines.get(name))
    made, page = tables(_entries(RECORD)), PAGE.read_text()
    print("\n\n".join(made.values()))
    if arguments.write or arguments.records:
        PAGE.write_text(with_tables(page, made))
    return int(arguments.check and with_tables(page, made) != page)


if __name__ == "__main__":
    sys.exit(main())
