"""The kinds of verdicts and remarks in words."""

PAST_TENSE = {
    "freeze": "froze",
    "divergence": "diverged",
    "nonfinite": "went non-finite",
    "no_learning": "never learned",
    "stalled": "stalled",
    "far_above": "ended far above its FP32 twin",
}


def past_tense(kind: str | None) -> str:
    """What a run of that verdict did; "collapsed" for a kind of another version."""
    return PAST_TENSE.get(kind or "", "collapsed")
