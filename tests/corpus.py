"""A small fixed text for runs in tests: the same bytes on every machine and in every Python."""

from __future__ import annotations

from pathlib import Path

TEXT = "".join(f"{n} squared is {n * n}, and {n} cubed is {n**3}. " for n in range(1, 900)).encode()


def corpus_overrides(folder: Path) -> list[str]:
    """Config overrides that train on `TEXT`, written into the folder."""
    path = folder / "corpus.txt"
    path.write_bytes(TEXT)
    return ["data.source=text", f"data.path={path}"]
