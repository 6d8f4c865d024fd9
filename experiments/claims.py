"""Keeps records of claims in the committed pack, and prints the table of all verdicts: `python -m experiments.claims`.

python -m experiments.claims --add runs/claims                     # records of one's own into the pack
python -m experiments.claims --page docs/findings/claims.md       # write the tables between the marks of the page
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from altgrad.records.files import write_text
from altgrad.records.folders import write_archive
from altgrad.report.numbers import MISSING, number
from altgrad.report.pages.claim import Data, bounds, interval, power, seeds_of
from altgrad.report.text import for_markdown
from altgrad.reproduce import CLAIMS, Record
from altgrad.reproduce.data import data_of
from altgrad.reproduce.run import RECORD, document_bytes, read_record

COMMITTED = Path(__file__).parent / "results" / "claims.tar.xz"
BEGIN, END = "<!-- printed by python -m experiments.claims -->", "<!-- end -->"


def committed(pack: Path) -> dict[str, Record]:
    """The pack's record of every claim, empty where it has none."""
    return {claim.name: read_record(claim, pack / claim.name) for claim in CLAIMS}


def add(source: Path, pack: Path) -> list[str]:
    """Put the records below `source` into the pack, in place of those of the same claims; the names that were added."""
    own = {claim.name: read_record(claim, source / claim.name) for claim in CLAIMS}
    added = [name for name, record in own.items() if record.trials]
    kept = {**committed(pack), **{name: own[name] for name in added}}
    write_archive(pack, {f"{n}/{RECORD}": document_bytes(_of_no_machine(r)) for n, r in kept.items() if r.trials})
    return added


def _of_no_machine(record: Record) -> Record:
    facts = dict(record.environment)
    if "platform" in facts:
        facts["platform"] = str(facts["platform"]).split("-")[0]  # the kernel's build says nothing about numbers
    return Record(record.claim, record.quick, record.trials, record.criteria, facts)


def verdict_table(rows: Sequence[Data]) -> str:
    """Markdown: every claim with its verdict, and what that rests on."""
    lines = ["| row | claim | paper | verdict | seeds | minutes |", "|---|---|---|---|---|---|"]
    for data in rows:
        paper = f"[{data['paper']}]({data['url']})" if data["url"] else data["paper"]
        verdict = f"**{data['verdict']}**" + (" (criteria moved)" if data["moved"] else "")
        second = " (figures secondary)" if data["secondary"] else ""
        name = f"[`{data['name']}`](#{data['name']})"
        minutes = (
            number(data["minutes"], 2) + ("" if data["measured"] else " (estimate)") if data["protocol"] else MISSING
        )
        cells = [data["number"], f"{name}: {for_markdown(data['statement'])}{second}", paper, verdict]
        lines.append(_row([*cells, seeds_of(data), minutes]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells) + " |"


def section(data: Data) -> str:
    """Markdown: one claim with every criterion."""
    parts = [f'<a id="{data["name"]}"></a>', f"### {data['number']}. `{data['name']}`: {data['verdict']}", ""]
    parts += [for_markdown(data["protocol"] or data["needs"]), ""]
    if data["watch"]:
        parts += [for_markdown(data["watch"]), ""]
    if data["rates"]:
        told = "; ".join(f"{arm}: {number(rate)}" for arm, rate in data["rates"].items())
        parts += [for_markdown(f"Learning rates, tuned on a seed that does not count: {told}."), ""]
    if data["findings"]:
        parts += ["| measured | mean [95%] | must be | |", "|---|---|---|---|"]
        for finding in data["findings"]:
            outcome = f"open: {power(finding)}" if finding["outcome"] == "open" else finding["outcome"]
            cells = [for_markdown(finding["says"]), interval(finding), bounds(finding), outcome]
            parts.append(_row(cells))
        parts.append("")
    return "\n".join(parts)


def tables(records: dict[str, Record]) -> str:
    """The whole printed part of the page."""
    rows = [data_of(record) for record in records.values()]
    return "\n\n".join([verdict_table(rows), "## Claim by claim", *map(section, rows)])


def main() -> None:
    """Add records, print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--add", type=Path, help="folder with records of claims")
    parser.add_argument("--page", type=Path, help="Markdown page whose marked part is replaced")
    parser.add_argument("--pack", type=Path, default=COMMITTED)
    arguments = parser.parse_args()
    if arguments.add:
        print("added", ", ".join(add(arguments.add, arguments.pack)) or "nothing")
    text = tables(committed(arguments.pack))
    if arguments.page is None:
        print(text)
        return
    before, _, rest = arguments.page.read_text("utf-8").partition(BEGIN)
    write_text(arguments.page, f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
