"""What `altgrad reproduce` prints and writes: the list of claims, progress, a verdict with its intervals, and a page."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.padding import Padding
from rich.text import Text

from altgrad.records.files import write_text
from altgrad.report.console import Bars, Terminal, ruled_table
from altgrad.report.numbers import MISSING, number
from altgrad.report.pages.claim import OUTCOMES, bounds, headline, interval, render_claim, sentence
from altgrad.reproduce import CLAIMS, Claim, Record, find_claim, reproduce
from altgrad.reproduce.data import data_of
from altgrad.reproduce.run import QUICK, last_record

PAGE = "report.html"
ALL = "all"


def print_claims(out: Path) -> None:
    """Every claim with its last verdict, one's own in `out` or else the one that comes with AltGrad, and below it what
    is claimed."""
    console = Terminal()
    records = [last_record(claim, out) for claim in CLAIMS]
    kinds = [record.verdict.kind + (", criteria moved" if record.moved else "") for record in records]
    name, row, kind = (max(map(len, texts)) for texts in ([c.name for c in CLAIMS], [c.number for c in CLAIMS], kinds))
    console.print(f"{'row':{row}}  {'claim':{name}}  {'verdict':{kind}}  minutes", style="bold", highlight=False)
    for claim, record, verdict in zip(CLAIMS, records, kinds, strict=True):
        minutes = MISSING if claim.protocol is None else ("" if record.measured else "~") + number(record.minutes, 2)
        line = Text(f"{claim.number:{row}}  ")
        line.append(f"{claim.name:{name}}  ", style="bold").append(f"{verdict:{kind}}  {minutes:>7}")
        console.print(line, highlight=False, soft_wrap=True)
        paper = claim.paper if claim.paper == "AltGrad" or not claim.url else f"arXiv:{claim.paper}"
        told = Text(f"{claim.statement} ", style="dim").append(f"[{paper}]", style="dim")
        console.print(Padding(told, (0, 0, 0, row + 2)), highlight=False)
    console.say(
        "\naltgrad reproduce NAME tries one, altgrad reproduce all every one that can be tried. Minutes are for two cores "
        "(--jobs 2); ~ marks estimates."
    )


def try_claims(name: str, out: Path, *, seeds: int | None, jobs: int, quick: bool) -> None:
    """Try one claim, or all that can be tried, cheapest first."""
    chosen = [find_claim(name)] if name != ALL else sorted((c for c in CLAIMS if c.protocol), key=lambda c: c.minutes)
    console = Terminal()
    for claim in chosen:
        console.say(f"{claim.name} ({claim.paper}): {claim.statement}", "bold")
        if claim.protocol is not None:
            console.say(claim.protocol.says)
        with Bars(console) as told:
            record = reproduce(claim, out, seeds=seeds, jobs=jobs, quick=quick, tell=told)
        _print(console, record)
        page = out / f"{claim.name}{QUICK if quick else ''}" / PAGE
        write_text(page, render_claim(data_of(record, _command(claim, out, seeds, quick))))
        console.print(f"page: {page}", highlight=False, soft_wrap=True)


def _command(claim: Claim, out: Path, seeds: int | None, quick: bool) -> str:
    options = [*(["--seeds", str(seeds)] if seeds else []), *(["--quick"] if quick else []), "--out", str(out)]
    return shlex.join(["altgrad", "reproduce", claim.name, *options])


def _print(console: Terminal, record: Record) -> None:
    data = data_of(record)
    console.say(headline(data), "bold")
    table = ruled_table()
    for head in ("", "measured", "must be", ""):
        table.add_column(head)
    for finding in data["findings"]:
        table.add_row(finding["says"], interval(finding), bounds(finding), OUTCOMES[finding["outcome"]])
    console.print(table)
    console.say(sentence(data))
