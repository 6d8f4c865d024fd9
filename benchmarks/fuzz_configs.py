"""Hands hostile configs, overrides and matrices to the command line: `python -m benchmarks.fuzz_configs --count 10000 --seed 0`.

Each case is drawn from (seed, number): a config or a matrix of this repository has values, keys or bytes replaced, gets hostile
settings on top, and goes to `altgrad run --print-config`, `altgrad run --dry-run` or `altgrad sweep --dry-run` in this process.
Counted are tracebacks, hangs (more than 10 s of processor time), exit codes other than 0 and 2, leaks (a variable of
the environment is printed) and files written outside the folder of the case. Exit code 1 where one of them is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from altgrad.cli import main as command_line
from altgrad.training.config.loading import key_paths
from benchmarks.fuzz_records import HANG_SECONDS, HOSTILE, Hang, limited
from benchmarks.reliability import FUZZ_FAULTS, count_cases

ROOT = Path(__file__).parent.parent
SECRET = "f7c1-secret-of-the-environment"
KINDS = ("config", "matrix")
VALUES = (
    *HOSTILE,
    "../../x", "/etc", "${oc.env:ALTGRAD_FUZZ_SECRET}", "\\${x}", "${seed}", "${a.b}", "${name}${name}", "${", "~", "yes",
    "!!python/object:os.system x", "!!binary AAAA", "2020-01-01", "&a [*a]", "*b", "<<", "[1,2", "{a: 1, a: 2}", "? x", "- - -",
    "0x10", "1_000", "1e-400", ".inf", ".nan", "-0", "0", "1", "2", "1000000000000", "[]", "[red]x[/nope]", "=1+1", "\x1b[31m",
    "E3M4", "mxfp8", "E9M9", "E4M3:E5M2", "uniform", "stochastic", "grid", "[E4M3, E5M2]", "{policy: delayed}", "{format: E4M3}",
    "{layers: {}}", "é" * 300, "a" * 300, "cuda:99", "tokens", "text", "huggingface",
)  # fmt: skip


def documents(kind: str) -> list[dict[str, Any]]:
    """Valid documents to start from."""
    folders = {"config": ("configs",), "matrix": ("matrix", "custom_formats")}[kind]
    paths = [path for folder in folders for path in sorted((ROOT / "experiments" / folder).glob("*.yaml"))]
    small = {"max_steps": 3, "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16}}
    found = []
    for path in paths:
        content = yaml.safe_load(path.read_text())
        if kind == "config":
            content |= small
        elif isinstance(content.get("base"), str):
            content["base"] = str((path.parent / content["base"]).resolve())
        found.append(content)
    return found


def hostile(rng: random.Random) -> Any:
    """A value as a document may hold it."""
    text = rng.choice(VALUES)
    if rng.random() < 0.5:
        return text
    with contextlib.suppress(Exception):
        return yaml.safe_load(text)
    return text


def mutated(document: Any, rng: random.Random) -> Any:
    """The document with a few values replaced, keys added, renamed or dropped."""
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        node = document
        while True:
            keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.5:
                how = rng.random()
                if how < 0.7:
                    node[key] = hostile(rng)
                elif how < 0.8:
                    del node[key]
                elif isinstance(node, dict):
                    node[rng.choice((*VALUES, *PATHS))] = node.pop(key) if how < 0.9 else hostile(rng)
                else:
                    node.append(hostile(rng))
                break
            node = node[key]
    return document


PATHS = sorted({*key_paths(), *(part for path in key_paths() for part in path.split("."))})
MATRIX_KEYS = (
    "base",
    "name",
    "overrides",
    "seeds",
    "matrix",
    "include",
    "exclude",
    "matrix.fp8_format",
    "matrix.optimizer.lr",
)


def text_of(document: Any, rng: random.Random) -> bytes:
    """The document as a file, whose bytes may be changed too."""
    try:
        content = yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeError):
        content = repr(document).encode("utf-8", "surrogatepass")
    how = rng.random()
    if how < 0.1:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if how < 0.14:
        return content[: rng.randrange(len(content))]
    if how < 0.17:
        levels = rng.choice((10, 60, 300, 5000))
        return content + b"deep: " + b"{a: " * levels + b"1" + b"}" * levels + b"\n"
    if how < 0.2:
        bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, rng.choice((3, 6, 12))))
        return content + ("a0: &a0 [x, x, x]\n" + bomb).encode()
    if how < 0.22:
        return content + rng.choice(
            (b"seeds: [" + b"1, " * 200_000 + b"1]\n", b"max_steps: " + b"9" * 6000, b"\xff\xfe", b"\0")
        )
    return content


def overrides(kind: str, rng: random.Random) -> list[str]:
    """Settings for the command line; no NUL, which no command line can hold."""
    settings = []
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        key = rng.choice(
            (rng.choice(PATHS), rng.choice(MATRIX_KEYS if kind == "matrix" else PATHS), rng.choice(VALUES))
        )
        text = f"{key}={rng.choice(VALUES)}" if rng.random() < 0.95 else str(key)
        text = text.encode("utf-8", "replace").decode().replace("\0", "")
        settings.append(text if rng.random() < 0.97 else text * 200)
    return [s for s in settings if s and not s.startswith("-")]


def judge(kind: str, documents: list[dict[str, Any]], folder: Path, rng: random.Random) -> tuple[str, str]:
    """(verdict, the command and what it said) of one case."""
    path = folder / "in" / f"{kind}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text_of(mutated(yaml.safe_load(yaml.safe_dump(rng.choice(documents))), rng), rng))
    settings = overrides(kind, rng)
    look = ["--print-config"] if rng.random() < 0.9 else ["--dry-run"]
    inside = [] if kind == "matrix" else ["runs_dir=" + str(path.parent / "runs")]
    arguments = ["run", str(path), *inside, *settings, *look]
    if kind == "matrix":
        arguments = ["sweep", str(path), *settings, "--out", str(path.parent / "out"), "--dry-run", "--no-estimate"]
    before = {p.name for p in (*folder.iterdir(), *folder.parent.iterdir())}
    output, code = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape"), 0
    sys.argv = ["altgrad", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), limited(HANG_SECONDS):
            try:
                command_line()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Hang:
        return "hang", str(arguments)
    except Exception:
        return "traceback", f"{arguments}\n{traceback.format_exc(limit=-4)}"
    output.flush()
    said = output.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    if "Traceback" in said:
        return "traceback", f"{arguments}\n{said[-1500:]}"
    if code not in (0, 2):
        return "exit", f"{code}: {arguments}\n{said[-800:]}"
    if SECRET in said:
        return "leak", f"{arguments}\n{said[-800:]}"
    if {p.name for p in (*folder.iterdir(), *folder.parent.iterdir())} != before:
        return "outside", str(arguments)
    return ("taken" if code == 0 else "refused"), ""


def run(kind: str, count: int, seed: int, only: int | None = None, record: Path | None = None) -> Counter[str]:
    """The verdicts of `count` cases; each fault is printed."""
    os.environ["ALTGRAD_FUZZ_SECRET"] = SECRET
    os.environ["COLUMNS"] = "200"
    torch.set_num_threads(1)
    bases, here, record = documents(kind), Path.cwd(), record and record.resolve()
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "case"
        folder.mkdir()
        os.chdir(folder)
        try:

            def judged(number: int) -> str:
                verdict, said = judge(kind, bases, folder, random.Random(f"{kind} {seed} {number}"))
                if verdict in FUZZ_FAULTS:
                    print(f"{kind} {number}: {verdict}: {said}", flush=True)
                return verdict

            if only is not None:
                return Counter([judged(only)])
            return count_cases(record, f"fuzz {kind}", seed, count, judged)
        finally:
            os.chdir(here)


def main() -> int:
    """Run the cases and print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case by its number")
    parser.add_argument("--record", type=Path, help="also keep the counts in this file, and go on from those in it")
    arguments = parser.parse_args()
    faults = 0
    for kind in arguments.kinds:
        verdicts = run(kind, arguments.count, arguments.seed, arguments.only, arguments.record)
        faults += sum(verdicts[fault] for fault in FUZZ_FAULTS)
        print(f"{sum(verdicts.values())} cases of {kind}, seed {arguments.seed}: {dict(verdicts)}", flush=True)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
