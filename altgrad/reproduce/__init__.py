"""Published claims, one command each: the smallest honest protocol, criteria from before the run, a verdict with intervals.

    record = reproduce("few_random_bits", "runs/claims")
    record.verdict.kind            # "reproduced", "not reproduced" or "unresolved"

A claim is a row (`claim`): paper, statement, a protocol with its arms as data, and criteria on measured quantities.
`tensors` and `simulations` (seconds), `student_teacher` and `own` (minutes) hold rows beside what they measure, those of
`training` and `noise` are in `training_rows`, and `small_gpt` is the model. `verdict` turns the values of paired seeds
into a verdict, `run` makes and keeps the trials.
"""

from altgrad.reproduce.claim import Claim, Criterion, Protocol
from altgrad.reproduce.rows import CLAIMS, find_claim
from altgrad.reproduce.run import Record, committed_records, reproduce
from altgrad.reproduce.verdict import Finding, Verdict, judge

__all__ = [
    "CLAIMS",
    "Claim",
    "Criterion",
    "Finding",
    "Protocol",
    "Record",
    "Verdict",
    "committed_records",
    "find_claim",
    "judge",
    "reproduce",
]
