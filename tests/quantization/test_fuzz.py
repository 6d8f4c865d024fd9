"""A sample of the fuzzer: a few hundred drawn calls, in a process of their own, each right or refused."""

from collections import Counter

from benchmarks.fuzz_quantization import FAULTS, kept, run


def test_a_sample_of_drawn_calls_is_right_or_refused_and_kept(tmp_path):
    lines = run(count=250, seed=1, workers=1, folder=tmp_path)
    assert not [line.fault for line in lines if line.fault]
    verdicts = Counter(line.verdict for line in lines)
    assert verdicts["bits"] > 100
    assert verdicts["refused"] > 30
    assert not any(verdicts[name] for name in FAULTS)
    assert [line.index for line in lines] == list(range(250))
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    path.write_text(
        text[: text.rindex("248 ")] + '248 {"index": 248, "verdict": "crash", "words": "exit status -11"}\n249 '
    )
    assert [line.index for line in kept(path)] == list(range(249))  # the torn line is none
    again = run(count=250, seed=1, workers=1, folder=tmp_path, again=True)
    assert again == lines
