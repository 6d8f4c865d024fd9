"""Tokens for training: a corpus from any source, and batches that are functions of (seed, step).

A corpus is two arrays of tokens (train, validation) with a vocabulary size and a fingerprint of its content. Nothing
here keeps a position or a generator: the batch of step 7 is the same whoever asks, in whatever order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from altgrad.errors import DataError
from altgrad.records.files import open_regular
from altgrad.training.config.experiment import DataSection

BYTES = 256
CORPORA_KEPT = 3  # of those that this process has loaded
_HASHED_WHOLE = 1 << 30  # larger token files are fingerprinted by size, head and 64 spread blocks
_BLOCK = 1 << 20


_loaded: dict[tuple, Corpus] = {}


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on.

    Args:
        train: 1-d array of tokens, any integer dtype; may be a memory map.
        val: the held-out tokens, likewise.
        vocab_size: tokens are 0 .. vocab_size - 1.
        fingerprint: hash of the content (hex).
        description: one line for people.
    """

    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    fingerprint: str
    description: str

    def batch(self, seed: int, step: int, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 of shape (batch_size, block_size); sequences start uniformly at random.

        Raises:
            DataError: the corpus is shorter than one sequence, or holds a token outside the vocabulary.
        """
        starts = self._room("training", self.train, block_size)
        draws = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(batch_size)
        return self._windows("training", self.train, (draws % np.uint64(starts)).astype(np.int64), block_size)

    def validation_batches(self, batches: int, batch_size: int, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same sequences every time, spread evenly over the validation text; needs no randomness.

        Raises:
            DataError: as `batch`.
        """
        starts = self._room("validation", self.val, block_size)
        spread = np.linspace(0, starts - 1, batches * batch_size).astype(np.int64)
        for chunk in spread.reshape(batches, batch_size):
            yield self._windows("validation", self.val, chunk, block_size)

    def check(self, block_size: int, vocab_size: int) -> None:
        """Raises DataError if this corpus cannot train a model of that context length and vocabulary."""
        self._room("training", self.train, block_size)
        self._room("validation", self.val, block_size)
        if self.vocab_size > vocab_size:
            raise DataError(
                f"{self.description} has {self.vocab_size} tokens but the model's vocabulary has {vocab_size}; "
                f"set model.vocab_size={self.vocab_size} or leave it unset"
            )

    def _room(self, part: str, tokens: np.ndarray, block_size: int) -> int:
        starts = len(tokens) - block_size
        if starts < 1:
            raise DataError(
                f"the {part} text of {self.description} has {len(tokens)} tokens, a sequence needs {block_size + 1}; "
                "use more text, a smaller model.block_size, or another data.val_fraction"
            )
        return starts

    def _windows(self, part: str, tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        sequences = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
        if (top := int(sequences.max())) >= self.vocab_size:
            raise DataError(
                f"the {part} text of {self.description} holds token {top}, its vocabulary ends at "
                f"{self.vocab_size - 1}; set model.vocab_size above {top}"
            )
        both = torch.from_numpy(sequences)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def load_corpus(config: DataSection, vocab_size: int | None = None) -> Corpus:
    """The corpus that `config` names; read once in a process as long as its files stay as they are.

    Args:
        vocab_size: of the model, for token files (which do not state theirs); None takes the largest token's.

    Raises:
        DataError: the source is missing, empty, or not what it should be.
    """
    source = config.model_dump(exclude={"batch_size", "grad_accumulation"})
    key = (repr(source), str(Path.cwd()), vocab_size, _state_of(config))
    found = _loaded.pop(key, None) or _load(config, vocab_size)
    _loaded[key] = found
    while len(_loaded) > CORPORA_KEPT:
        del _loaded[next(iter(_loaded))]  # the one that was asked for longest ago
    return found


def _state_of(config: DataSection) -> tuple:
    """Size and time of each file that the corpus is read from."""
    given = [config.name] if config.source == "huggingface" else config.path
    paths = [Path(path) for path in ([given] if isinstance(given, str) else given or []) if path is not None]
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if f.is_file()]
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()])


def _load(config: DataSection, vocab_size: int | None) -> Corpus:
    if config.source == "stdlib":
        return corpus_from_bytes(_stdlib(config.max_bytes), config.val_fraction, "the Python standard library's source")
    if config.source == "text":
        return _text(config)
    if config.source == "tokens":
        assert config.path is not None
        return _token_files(
            Path(config.path if isinstance(config.path, str) else config.path[0]), vocab_size, config.token_dtype
        )
    return _hugging_face(config)


def resolve_corpus(data: Corpus | str | Path | None, config: DataSection, vocab_size: int | None = None) -> Corpus:
    """The corpus handed in, or that of a path (a folder with train.bin, or text), or the config's own.

    Raises:
        DataError: as `load_corpus`.
    """
    if isinstance(data, Corpus):
        return data
    if data is None:
        return load_corpus(config, vocab_size)
    source = "tokens" if (Path(data) / "train.bin").is_file() else "text"
    return load_corpus(DataSection(**{**config.model_dump(), "source": source, "path": str(data)}), vocab_size)


def corpus_from_bytes(text: bytes, val_fraction: float, description: str) -> Corpus:
    """Bytes as tokens; the tail is held out.

    Raises:
        DataError: there are none.
    """
    if not text:
        raise DataError(f"{description} is empty; give at least a few kilobytes of text")
    tokens = np.frombuffer(text, dtype=np.uint8)
    held_out = max(1, int(len(tokens) * val_fraction))
    facts = hashlib.sha256(text + f"|val={held_out}".encode()).hexdigest()
    return Corpus(tokens[:-held_out], tokens[-held_out:], BYTES, facts, f"{description} ({len(text):,} bytes)")


def _stdlib(max_bytes: int) -> bytes:
    """The library's modules in an order that depends on their names alone, but mixes the packages."""
    root = Path(os.__file__).parent
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
    names = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in skipped]
        names += [Path(folder, file).relative_to(root) for file in files if file.endswith(".py")]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    if not names:
        raise DataError(f"this Python has no library sources under {root}; use data.source=text data.path=FILE")
    return _read_until(max_bytes, [root / name for name in names])


def _text(config: DataSection) -> Corpus:
    given = [Path(p) for p in ([config.path] if isinstance(config.path, str) else config.path or [])]
    files: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError(f"text {path} does not exist; data.path is relative to {Path.cwd()}")
        found = sorted(p for p in path.rglob("*.txt") if p.is_file()) if path.is_dir() else [path]
        if not found:
            raise DataError(f"folder {path} holds no *.txt files; name the files in data.path")
        files += found
    shown = str(given[0]) if len(given) == 1 else f"{len(files)} text files"
    return corpus_from_bytes(_read_until(config.max_bytes, files), config.val_fraction, shown)


def _read_until(max_bytes: int, files: Sequence[Path]) -> bytes:
    parts: list[bytes] = []
    room = max_bytes
    for file in files:
        with open_regular(file) as stream:
            parts.append(stream.read(min(room, os.fstat(stream.fileno()).st_size)))
        room -= len(parts[-1])
        if room <= 0:
            break
    return b"".join(parts)


def _token_files(folder: Path, vocab_size: int | None, dtype: str) -> Corpus:
    arrays = []
    for name in ("train.bin", "val.bin"):
        path = folder / name
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; data.source=tokens needs train.bin and val.bin ({dtype}) in data.path"
            )
        kind = np.dtype(dtype).newbyteorder("<")
        if (size := path.stat().st_size) == 0 or size % kind.itemsize:
            raise DataError(f"{path} has {size} bytes, which is no whole number of {dtype} tokens; write it anew")
        tokens = np.memmap(path, dtype=kind, mode="r")
        if kind.kind == "i" and int(tokens[: _BLOCK // kind.itemsize].min()) < 0:
            raise DataError(f"{path} holds negative numbers as {dtype}, which are no tokens; set data.token_dtype")
        _refuse_another_dtype(path, dtype)
        arrays.append(tokens)
    train, val = arrays
    top = max(_largest(train), _largest(val))
    if vocab_size is not None and top >= vocab_size:
        raise DataError(
            f"{folder} holds token {top}, the model's vocabulary ends at {vocab_size - 1}; "
            f"set model.vocab_size={top + 1} or more"
        )
    facts = hashlib.sha256((_fingerprint(train) + _fingerprint(val)).encode()).hexdigest()
    return Corpus(train, val, vocab_size or top + 1, facts, f"{folder} ({len(train):,} tokens)")


def _refuse_another_dtype(path: Path, dtype: str) -> None:
    """Tokens read as narrower numbers than they were written as are every second one zero, or bits of floats.

    Raises:
        DataError: the head of the file looks like another dtype than the one declared.
    """
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    words = np.frombuffer(head[: len(head) // 8 * 8], dtype="<u2")
    if len(words) < 64:
        return
    zero = [bool((words[part::4] == 0).all()) for part in range(4)]
    found = "int64" if zero == [False, True, True, True] else "int32" if zero == [False, True, False, True] else dtype
    floats = np.frombuffer(head[: len(head) // 4 * 4], dtype="<f4")
    with np.errstate(invalid="ignore"):
        whole = bool((np.isfinite(floats) & (floats >= 0) & (floats < 1 << 24) & (floats == np.floor(floats))).all())
        usual = (np.abs(floats) > 2.0**-20) & (np.abs(floats) < 2.0**20)  # two tokens next to each other seldom look so
    if (whole and floats.max() >= 1) or usual.mean() > 0.99:
        raise DataError(f"{path} holds float32 numbers, not tokens; write the tokens as {dtype}")
    if np.dtype(found).itemsize > np.dtype(dtype).itemsize:
        raise DataError(
            f"{path} looks like {found} (as {dtype}, all but every {np.dtype(found).itemsize // 2}th number is 0); set "
            f"data.token_dtype={found}"
        )


def _spread(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """All of a file in blocks, or of a large one its head and 64 evenly spread blocks."""
    blocks = -(-tokens.nbytes // _BLOCK)
    chosen = range(blocks) if tokens.nbytes <= _HASHED_WHOLE else np.linspace(0, blocks - 1, 65).astype(int)
    per_block = _BLOCK // tokens.itemsize
    for i in chosen:
        yield tokens[i * per_block : (i + 1) * per_block]


def _fingerprint(tokens: np.ndarray) -> str:
    digest = hashlib.sha256(str(tokens.nbytes).encode())
    for block in _spread(tokens):
        digest.update(block.tobytes())
    return digest.hexdigest()


def _largest(tokens: np.ndarray) -> int:
    return max(int(block.max()) for block in _spread(tokens))  # batches check every token they hold once more


def _hugging_face(config: DataSection) -> Corpus:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data.source=huggingface needs the package 'datasets'; install it with: pip install 'altgrad[data]'"
        ) from None
    assert config.name is not None
    try:
        if (Path(config.name) / "state.json").is_file() or (Path(config.name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(config.name)
        else:
            loaded = datasets.load_dataset(config.name, config.config_name, split=config.split)
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[config.split]
    except Exception as error:  # the library raises many kinds for a wrong name, split, or an unreachable host
        raise DataError(
            f"dataset {config.name!r} (split {config.split!r}) cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if config.text_column not in loaded.column_names:
        raise DataError(
            f"dataset {config.name!r} has no column {config.text_column!r}; "
            f"set data.text_column to one of {', '.join(loaded.column_names)}"
        )
    parts: list[bytes] = []
    room = config.max_bytes
    for row in loaded:
        parts.append((str(row[config.text_column]) + "\n").encode()[:room])
        room -= len(parts[-1])
        if room <= 0:
            break
    return corpus_from_bytes(b"".join(parts), config.val_fraction, f"dataset {config.name}")
