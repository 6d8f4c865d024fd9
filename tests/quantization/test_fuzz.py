"""A sample of the fuzzer: a few hundred drawn calls, in a process of their own, each right or refused."""

from benchmarks.fuzz_quantization import FAULTS, run


def test_a_sample_of_drawn_calls_is_right_or_refused():
    verdicts, faults = run(count=250, seed=1, workers=1)
    assert not faults, faults
    assert verdicts["bits"] > 100
    assert verdicts["refused"] > 30
    assert not any(verdicts[name] for name in FAULTS)
    assert sum(verdicts.values()) == 250
