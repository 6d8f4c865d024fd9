"""One case: what counts as right is written first, then the run is made, its autopsy taken, and the baselines asked."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import altgrad.autopsy
from altgrad.autopsy import Forks, investigate
from altgrad.autopsy.oracle import LoopOracle
from altgrad.records.files import write_json
from altgrad.records.machine import processor_name
from benchmarks.autopsy_calibration.faults import Case
from benchmarks.autopsy_calibration.generate import fault_case, null_case
from benchmarks.autopsy_calibration.loop import STEPS, build
from benchmarks.autopsy_calibration.symptoms import baselines
from benchmarks.reliability import where

BUDGET = 200


def _hash_of_rules() -> str:
    sources = sorted(Path(altgrad.autopsy.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


RULES, COMMIT = _hash_of_rules(), where()["commit"]
"""Hash of the sources of the autopsy, which the verdicts of a set follow, and the commit of the working tree
(+: changed since)."""


def drawn(seed: int, name: str, out: Path) -> Case:
    """The case of that name, from its file where it is written down."""
    path = out / f"{name}.case.json"
    if path.exists():
        return Case.from_dict(json.loads(path.read_text("utf-8")))
    kind, number = name.split("-")
    case = (fault_case if kind == "fault" else null_case)(seed, int(number))
    write_json(path, case.as_dict())
    return case


def run(seed: int, name: str, out: Path) -> dict[str, Any] | None:
    """The record of a case; None where it is there already, or another process is at it."""
    path = out / f"{name}.json"
    with (out / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        return None if path.exists() else _run(seed, name, out, path)


def _run(seed: int, name: str, out: Path, path: Path) -> dict[str, Any]:
    begun = time.process_time()
    case = drawn(seed, name, out)
    generated = time.process_time()
    loop = build(case, case.fault)
    oracle = LoopOracle(loop, STEPS, seed=case.seed)
    forks = Forks(oracle, budget=BUDGET, log=path.with_suffix(".forks.jsonl"))  # answers do not depend on the rules
    verdict = investigate(forks, prior=oracle.prior)
    ended = time.process_time()
    record = {
        "case": case.as_dict(),
        "verdict": verdict.as_dict(),
        "baselines": baselines(oracle, case),
        "losses": {path: [x if x == x else None for x in oracle.history(path)] for path in ("low", "twin")},
        "rules": RULES,
        "commit": COMMIT,
        "cpu": processor_name(),
        "cpu_s": {
            "case": round(generated - begun, 1),
            "autopsy": round(ended - generated, 1),
            "baselines": round(time.process_time() - ended, 1),
        },
    }
    write_json(path, record)
    return record
