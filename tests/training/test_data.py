"""Corpora from every source, batches as functions of (seed, step), and the model that reads them."""

import numpy as np
import pytest
import torch

from altgrad.errors import DataError
from altgrad.training.config.experiment import DataSection
from altgrad.training.data import Corpus, corpus_from_bytes, load_corpus
from altgrad.training.model import GPT, GPTConfig, Rotary


@pytest.fixture
def corpus() -> Corpus:
    return corpus_from_bytes(bytes(range(256)) * 40, 0.1, "test text")


def write_tokens(folder, train, val):
    np.asarray(train, dtype="<u2").tofile(folder / "train.bin")
    np.asarray(val, dtype="<u2").tofile(folder / "val.bin")


def test_a_batch_is_a_function_of_seed_and_step(corpus):
    first = corpus.batch(7, 3, 4, 16)
    torch.manual_seed(0)
    np.random.seed(0)
    again = corpus.batch(7, 3, 4, 16)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    for other in [(7, 4), (8, 3)]:
        assert not torch.equal(first[0], corpus.batch(*other, 4, 16)[0])


def test_batches_leave_global_generators_alone(corpus):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    corpus.batch(1, 2, 4, 16)
    list(corpus.validation_batches(2, 2, 16))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_sequences_reach_both_ends_of_the_text():
    text = corpus_from_bytes(bytes(range(100)), 0.1, "short")  # 90 tokens: 90 - 80 = 10 sequences
    starts = {int(row[0]) for step in range(40) for row in text.batch(0, step, 4, 80)[0]}
    assert starts == set(range(10))


def test_validation_sequences_are_spread_and_constant(corpus):
    batches = list(corpus.validation_batches(3, 4, 16))
    assert len(batches) == 3
    assert torch.equal(batches[0][0][0], torch.from_numpy(corpus.val[:16].astype(np.int64)))
    assert torch.equal(batches[-1][1][-1], torch.from_numpy(corpus.val[-16:].astype(np.int64)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, corpus.validation_batches(3, 4, 16), strict=True))


def test_train_and_validation_do_not_overlap(corpus):
    assert len(corpus.train) + len(corpus.val) == 256 * 40
    assert len(corpus.val) == 1024


def test_stdlib_is_real_text_and_deterministic():
    config = DataSection(max_bytes=200_000)
    first, again = load_corpus(config), load_corpus(config)
    assert first.fingerprint == again.fingerprint
    assert len(first.train) + len(first.val) == 200_000
    assert b"import " in first.train.tobytes()
    assert load_corpus(DataSection(max_bytes=100_000)).fingerprint != first.fingerprint


def test_text_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("hello " * 100)
    (tmp_path / "b.txt").write_text("world " * 100)
    one = load_corpus(DataSection(source="text", path=str(tmp_path / "a.txt")))
    both = load_corpus(DataSection(source="text", path=str(tmp_path)))
    listed = load_corpus(DataSection(source="text", path=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]))
    assert one.train[:6].tobytes() == b"hello "
    assert len(both.train) + len(both.val) == 1200
    assert both.fingerprint == listed.fingerprint != one.fingerprint


def test_the_fingerprint_covers_content_and_split():
    prints = {corpus_from_bytes(t, v, "t").fingerprint for t in (b"ab" * 50, b"ac" * 50) for v in (0.1, 0.2)}
    assert len(prints) == 4


def test_token_files(tmp_path):
    write_tokens(tmp_path, [1, 2, 300] * 50, [5] * 40)
    corpus = load_corpus(DataSection(source="tokens", path=str(tmp_path)))
    assert corpus.vocab_size == 301
    x, _ = corpus.batch(0, 0, 2, 8)
    assert x.dtype == torch.int64
    assert set(x.flatten().tolist()) == {1, 2, 300}
    assert load_corpus(DataSection(source="tokens", path=str(tmp_path)), 50257).vocab_size == 50257


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: {"source": "text", "path": str(d / "no.txt")}, "does not exist"),
        (lambda d: {"source": "text", "path": str(d)}, r"no \*\.txt"),
        (lambda d: ((d / "e.txt").touch(), {"source": "text", "path": str(d / "e.txt")})[1], "is empty"),
        (lambda d: {"source": "tokens", "path": str(d)}, r"train\.bin does not exist"),
        (lambda d: (write_tokens(d, [], [1]), {"source": "tokens", "path": str(d)})[1], "0 bytes"),
        (lambda d: {"source": "huggingface", "name": str(d)}, "cannot be loaded"),
    ],
)
def test_errors_of_bad_sources(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        load_corpus(DataSection(**make(tmp_path)))


def test_wrong_vocabulary_is_refused(tmp_path):
    write_tokens(tmp_path, [1, 2, 300] * 50, [5] * 40)
    with pytest.raises(DataError, match=r"token 300.*vocab_size=301"):
        load_corpus(DataSection(source="tokens", path=str(tmp_path)), 256)
    with pytest.raises(DataError, match="vocab_size=256"):
        corpus_from_bytes(b"x" * 500, 0.1, "bytes").check(8, 128)
    holds_more = Corpus(np.array([1, 9] * 20), np.array([1] * 20), 5, "f", "bad tokens")
    with pytest.raises(DataError, match="token 9"):
        holds_more.batch(0, 0, 2, 8)


def test_too_short_a_text_is_refused(corpus):
    with pytest.raises(DataError, match="9216 tokens, a sequence needs 10001"):
        corpus.batch(0, 0, 2, 10_000)
    with pytest.raises(DataError, match="validation"):
        corpus.check(2000, 256)


def test_hugging_face_dataset_saved_on_disk(tmp_path):
    import datasets

    rows = [f"line {i} of a small data set" for i in range(100)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "local"))
    corpus = load_corpus(DataSection(source="huggingface", name=str(tmp_path / "local")))
    assert corpus.train.tobytes().startswith(b"line 0 of a small data set\nline 1")
    with pytest.raises(DataError, match=r"no column 'body'.*text"):
        load_corpus(DataSection(source="huggingface", name=str(tmp_path / "local"), text_column="body"))
    capped = load_corpus(DataSection(source="huggingface", name=str(tmp_path / "local"), max_bytes=500))
    assert len(capped.train) + len(capped.val) == 500


VARIANTS = [
    {},
    {"style": "gpt2"},
    {"activation": "swiglu"},
    {"norm": "layernorm", "position": "learned"},
    {"tie_weights": True},
    {"n_embd": 36, "n_head": 4},  # an odd head width leaves one channel unrotated
]


def tiny(**choices) -> GPT:
    return GPT(GPTConfig(**{"vocab_size": 19, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8} | choices))


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_logits_depend_on_the_past_alone(choices):
    model = tiny(**choices)
    tokens = torch.arange(16).view(2, 8) % 19
    changed = tokens.clone()
    changed[:, 5] += 1
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 8, 19)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("choices", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient_and_the_loss_falls(choices):
    model = tiny(**choices)
    tokens = torch.arange(16).view(2, 8) % 19
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        _, loss = model(tokens, tokens.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert losses[0] == pytest.approx(torch.tensor(19.0).log().item(), rel=0.05)
    assert losses[-1] < 0.6 * losses[0]


def test_weights_are_a_function_of_the_seed():
    state = torch.get_rng_state()
    a, b, c = (GPT(GPTConfig(vocab_size=19, n_embd=16), seed=s) for s in (1, 1, 2))
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not torch.equal(a.head.weight, c.head.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_gpt2_style_is_gpt2s():
    config = GPTConfig(vocab_size=50257, style="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.head.weight is model.embedding.weight


def test_rotary_scores_depend_on_distance_alone():
    rotary = Rotary(8, 16)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    turned_q, turned_k = rotary(q.expand(16, 8)), rotary(k.expand(16, 8))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[3, 1], scores[12, 10], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[5, 5], q @ k, atol=1e-5, rtol=0)
    assert (scores[3, 1] - scores[3, 2]).abs() > 1e-3


def test_a_corpus_is_read_once_while_its_files_stay_as_they_are(tmp_path):
    standard = DataSection(source="stdlib", max_bytes=20_000)
    assert load_corpus(standard) is load_corpus(DataSection(source="stdlib", max_bytes=20_000, batch_size=3))
    assert load_corpus(standard) is not load_corpus(DataSection(source="stdlib", max_bytes=20_001))
    (tmp_path / "a.txt").write_bytes(b"one " * 500)
    text = DataSection(source="text", path=str(tmp_path))
    first = load_corpus(text)
    assert load_corpus(text) is first
    (tmp_path / "b.txt").write_bytes(b"two " * 500)
    assert load_corpus(text).fingerprint != first.fingerprint
    write_tokens(tmp_path, range(50), range(9))
    tokens = DataSection(source="tokens", path=str(tmp_path))
    assert load_corpus(tokens) is load_corpus(tokens)
    assert load_corpus(tokens, 300).vocab_size == 300
