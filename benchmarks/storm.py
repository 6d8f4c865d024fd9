"""Storms on runs and sweeps: `python -m benchmarks.storm kills|sweeps|damage|disk|signals --count 1000 --seed 0`.

Each case is drawn from (seed, number) and starts the real command line: runs in processes forked from one that has loaded
torch, sweeps in processes of their own. `kills`: SIGKILL at any instant of a run; `sweeps`: of a sweep's worker, of the sweep
itself, of all its processes; `damage`: a file of a run folder, checkpoints included, has bits flipped, is cut, emptied or
deleted; `disk`: a limit on file sizes, a full disk, a disk that turns read-only; `signals`: those that end, stop or surprise.

Afterwards the same command brings the run to its end. Faults, of which there must be none:

- lost: the records or the result are not those of an unbroken run, line for line (times aside), though nothing but the storm
  happened to them; or, of damage, a loss is another one;
- silent: they are not, and neither `altgrad verify` nor the command says so;
- traceback, hang (60 s without an end), exit (a code that is not the documented one).

Cases done are kept in OUT/storm-KIND-sSEED-COMMIT.jsonl, so that a storm goes on where it was stopped; `--record FILE` keeps
the counts as they come. Exit code 1 where there are faults.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from altgrad.analysis import write_report
from altgrad.records.documents import CONFIG, read_json
from altgrad.records.metrics_log import METRICS
from altgrad.records.run import find_runs
from altgrad.records.verify import verify_run
from altgrad.training.format_runner import run_format_experiment
from benchmarks._timing import keep_record
from benchmarks.attempts import Attempt, differences, wrong_losses
from benchmarks.reliability import STORM_FAULTS, where

PATIENCE_S = 60.0
TEXT = "".join(f"{n} squared is {n * n}, and {n} cubed is {n**3}. " for n in range(1, 900))
BASE: dict[str, Any] = {
    "name": "storm", "seed": 7, "max_steps": 24, "threads": 1, "checkpoint_interval": 4, "keep_checkpoints": 4,
    "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16},
    "optimizer": {"warmup_steps": 2, "lr": 1e-2},
    "evaluation": {"interval": 6, "batches": 1},
}  # fmt: skip
MONITOR = {"enabled": True, "interval": 2, "schedule": {"rank": 6}}
VARIANTS: dict[str, dict[str, Any]] = {
    "master": {"fp8_format": "E4M3"},
    "grid": {"fp8_format": "E3M4", "weight_storage": "grid", "rounding": "stochastic", "monitor": MONITOR},
    "delayed": {"fp8_format": "E4M3", "scaling": {"policy": "delayed", "history": 4}, "enable_partition_clipping": True},
    "collapse": {
        "fp8_format": "E4M3", "scaling": "none", "optimizer": {"lr": 1e30, "warmup_steps": 2}, "monitor": MONITOR,
    },
}  # fmt: skip
"""Settings over BASE; the last one ends in a collapse and its failure report."""


@dataclass
class Case:
    """What one case did, and its faults."""

    case: int
    what: str
    hits: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, kind: str, said: str) -> None:
        self.faults.append(f"{kind}: {said[-1500:]}")


class Storm:
    """Configs, unbroken runs and scratch space that the cases share."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.configs: dict[str, Path] = {}
        self.references: dict[str, Path] = {}
        self.spans: dict[str, float] = {}
        (work / "corpus.txt").write_text(TEXT)
        for name, settings in VARIANTS.items():
            config = {**BASE, **settings, "data": {"source": "text", "path": str(work / "corpus.txt"), "batch_size": 4}}
            self.configs[name] = work / f"{name}.yaml"
            self.configs[name].write_text(yaml.safe_dump(config))

    def prepare(self) -> None:
        """Make each run here, so that forked processes have all modules and loops, then the unbroken ones."""
        for name, config in self.configs.items():
            with contextlib.redirect_stdout(io.StringIO()):
                run_format_experiment(config, overrides=[f"runs_dir={self.work / 'first'}", f"name={name}"])
                write_report([self.run_of(self.work / "first", name)], self.work / "first.html")
        gc.freeze()
        for name in self.configs:
            attempt = self.start(name, self.work / "unbroken")
            if attempt.wait(10 * PATIENCE_S) != 0:
                sys.exit(f"the unbroken run {name} ended with {attempt.code}:\n{attempt.said}")
            self.spans[name] = time.monotonic() - attempt.begun
            self.references[name] = self.run_of(self.work / "unbroken", name)

    def start(self, name: str, runs: Path, prepare: Callable[[], None] = lambda: None) -> Attempt:
        return Attempt(["run", self.configs[name], f"runs_dir={runs}", f"name={name}"], prepare)

    def run_of(self, runs: Path, name: str) -> Path:
        return next(iter(runs.glob(f"{name}-s*")), runs / f"{name}-none")

    def code_of(self, case: Case, attempt: Attempt) -> int | None:
        """How the command ended; one that does not is killed and counted as a hang."""
        code = attempt.wait(PATIENCE_S)
        if code is None:
            attempt.send(signal.SIGKILL)
            attempt.wait(10)
            case.fault("hang", attempt.said)
        return code

    def check_broken(self, case: Case, attempt: Attempt, runs: Path, name: str) -> None:
        """What must hold of a run that the storm just hit."""
        if "Traceback" in attempt.said:
            case.fault("traceback", attempt.said)
        run = self.run_of(runs, name)
        if (run / CONFIG).exists() and not (finding := verify_run(run)).whole:
            case.fault("lost", finding.said())

    def finish(self, case: Case, name: str, runs: Path) -> None:
        """Bring the run to its end; it must be as if nothing had happened."""
        attempt = self.start(name, runs)
        code = self.code_of(case, attempt)
        if code is None:
            return
        if "Traceback" in attempt.said:
            case.fault("traceback", attempt.said)
        if code != 0:
            case.fault("lost", f"the command ended with {code}: {attempt.said}")
            return
        run = self.run_of(runs, name)
        for said in differences(run, self.references[name]):
            case.fault("lost", said)
        if not (finding := verify_run(run)).whole:
            case.fault("lost", finding.said())


# -- the storms --------------------------------------------------------------------------------------------------------


def kills(storm: Storm, case: Case, rng: random.Random, scratch: Path) -> None:
    """A run killed one to four times, at instants spread evenly over its length."""
    name = rng.choice(list(VARIANTS))
    case.what = f"{name}:"
    for _ in range(rng.randint(1, 4)):
        delay = rng.uniform(0, 1.1 * storm.spans[name])
        attempt = storm.start(name, scratch)
        attempt.wait(delay)
        if attempt.send(signal.SIGKILL):
            case.hits += 1
            case.what += f" killed after {delay:.3f} s"
        attempt.wait(10)
        storm.check_broken(case, attempt, scratch, name)
    storm.finish(case, name, scratch)


SIGNALS: dict[str, tuple[tuple[int, ...], set[int]]] = {
    "SIGINT": ((signal.SIGINT,), {130}),
    "SIGTERM": ((signal.SIGTERM,), {143, -signal.SIGTERM}),
    "SIGINT twice": ((signal.SIGINT, signal.SIGINT), {130}),
    "SIGTERM, SIGINT": ((signal.SIGTERM, signal.SIGINT), {130, 143, -signal.SIGTERM}),
    "SIGTERM twice": ((signal.SIGTERM, signal.SIGTERM), {143, -signal.SIGTERM}),
    "SIGHUP": ((signal.SIGHUP,), {-signal.SIGHUP}),
    "SIGUSR1": ((signal.SIGUSR1,), {-signal.SIGUSR1}),
    "SIGQUIT": ((signal.SIGQUIT,), {-signal.SIGQUIT}),
    "SIGSTOP, SIGCONT": ((signal.SIGSTOP, signal.SIGCONT), {0}),
    "closed output": ((), {0, 128 + signal.SIGPIPE}),
}
"""Name -> (what is sent, exit codes that are right beside 0, when it was too late)."""


def signals(storm: Storm, case: Case, rng: random.Random, scratch: Path) -> None:
    """A run that gets one to three signals, or whose output is closed, and then is taken up again."""
    name = rng.choice(list(VARIANTS))
    case.what = f"{name}:"
    for _ in range(rng.randint(1, 3)):
        said = rng.choice(list(SIGNALS))
        numbers, right = SIGNALS[said]
        delay = rng.uniform(0.02, 1.1 * storm.spans[name])
        attempt = storm.start(name, scratch)
        attempt.wait(delay)
        if not numbers:
            attempt.hang_up()
        sent = [attempt.send(number) for number in numbers if (attempt.wait(rng.uniform(0, 0.1)), True)]
        case.hits += any(sent) or not numbers
        case.what += f" {said} after {delay:.3f} s"
        code = storm.code_of(case, attempt)
        if code not in {None, 0, *right}:
            case.fault("exit", f"{said}: code {code}: {attempt.said}")
        storm.check_broken(case, attempt, scratch, name)
    storm.finish(case, name, scratch)


def disk(storm: Storm, case: Case, rng: random.Random, scratch: Path) -> None:
    """A run that cannot write: its command says so and ends with 2; once there is room again, it goes on to its end."""
    name = rng.choice(list(VARIANTS))
    how = rng.choice(["file size", "full disk", "read-only"] if os.geteuid() == 0 else ["file size"])
    if how == "file size":
        limit = int(10 ** rng.uniform(1.5, 6))
        case.what = f"{name}: files of at most {limit} bytes"
        _refused(storm, case, name, scratch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        storm.finish(case, name, scratch)
        return
    size = 32 << 20 if how == "read-only" else int(10 ** rng.uniform(4.2, 6.3))
    case.what = f"{name}: {how}" + (f" of {size} bytes" if how == "full disk" else "")
    disk_of_its_own = scratch / "disk"
    disk_of_its_own.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk_of_its_own)
    try:
        if how == "read-only":
            begun = storm.start(name, disk_of_its_own)
            begun.wait(rng.uniform(0.1, storm.spans[name]))
            begun.send(signal.SIGTERM)
            begun.wait(PATIENCE_S)
            _mount("-o", "remount,ro", disk_of_its_own)
        _refused(storm, case, name, disk_of_its_own)
        _mount("-o", "remount,rw,size=64m", disk_of_its_own)
        storm.finish(case, name, disk_of_its_own)
    finally:
        subprocess.run(["umount", str(disk_of_its_own)], check=True)


def _refused(storm: Storm, case: Case, name: str, runs: Path, prepare: Callable[[], None] = lambda: None) -> None:
    attempt = storm.start(name, runs, prepare)
    code = storm.code_of(case, attempt)
    case.hits += code == 2
    if code not in (None, 0, 2):
        case.fault("exit", f"code {code}: {attempt.said}")
    storm.check_broken(case, attempt, runs, name)


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def damage(storm: Storm, case: Case, rng: random.Random, scratch: Path) -> None:
    """One file of an interrupted or finished run is damaged; the same command is given again."""
    name = rng.choice(list(VARIANTS))
    template = storm.work / "templates" / name
    if not template.exists():
        _make_templates(storm, name, template)
    finished = rng.random() < 0.3
    shutil.copytree(template / ("finished" if finished else "interrupted"), scratch, dirs_exist_ok=True)
    run = storm.run_of(scratch, name)
    victim = rng.choice(sorted(p for p in run.rglob("*") if p.is_file() and p.stat().st_size))
    how = _harm(victim, rng)
    case.what, case.hits = f"{name}, {'finished' if finished else 'interrupted'}: {how} {victim.relative_to(run)}", 1
    known = not verify_run(run).whole
    attempt = storm.start(name, scratch)
    code = storm.code_of(case, attempt)
    if code is None:
        return
    said = attempt.said
    if "Traceback" in said:
        case.fault("traceback", said)
    elif code not in (0, 2):
        case.fault("exit", f"code {code}: {said}")
    told = known or code == 2 or tells_of_damage(said) or not verify_run(run).whole
    changed = differences(run, storm.references[name]) if code == 0 else []
    changed += _documents_differ(run, storm.references[name]) if code == 0 else []
    if changed and not told:
        case.fault("silent", "; ".join(changed))
    if wrong := wrong_losses(run, storm.references[name]):
        case.fault("lost", f"losses of steps {wrong[:5]} are others")


def tells_of_damage(said: str) -> bool:
    """Whether a command's output names damage; what it prints of a sound run does not."""
    return any(word in said for word in TOLD)


TOLD = ("made again", "damaged", "unreadable", "does not match", "could not be read", "taken again")


def _documents_differ(run: Path, reference: Path) -> list[str]:
    """config.yaml and env.json, which a resumed run does not write again where they are sound."""
    said = []
    for name in (CONFIG, "env.json"):
        read = (
            (lambda path: yaml.safe_load(path.read_text()))
            if name == CONFIG
            else (lambda path: read_json(path).content)
        )
        try:
            one, other = read(run / name), read(reference / name)
            if not isinstance(one, dict):
                said.append(f"{name}: no mapping")
                continue
            keys = {k for k in {*one, *other} if k not in ("runs_dir", "created", "time", "started", "command", "host")}
            said += [f"{name}: {k}" for k in sorted(keys) if one.get(k) != other.get(k)]
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            said.append(f"{name}: {type(error).__name__}")
    return said


def _make_templates(storm: Storm, name: str, folder: Path) -> None:
    runs = folder / "interrupted"
    attempt = storm.start(name, runs)
    lines = 12 if name == "collapse" else 30
    while attempt.poll() is None:
        found = list(runs.glob(f"*/{METRICS}"))
        if found and found[0].read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    attempt.send(signal.SIGTERM)
    attempt.wait(PATIENCE_S)
    shutil.copytree(storm.references[name], folder / "finished" / storm.references[name].name)


def _harm(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    how = rng.choice(("flip", "flip", "flip 20 bits of", "cut", "cut", "empty", "delete"))
    if how.startswith("flip"):
        changed = bytearray(content)
        for _ in range(20 if "20" in how else 1):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    return how


def sweeps(storm: Storm, case: Case, rng: random.Random, scratch: Path) -> None:
    """A sweep of two runs, of which a worker, the sweep itself, or all processes are killed, up to three times."""
    matrix = storm.work / "sweep.yaml"
    if not (reference := storm.work / "sweep").exists():
        base = yaml.safe_load(storm.configs["grid"].read_text()) | {"max_steps": 60}
        content = {"base": base, "name": "s", "seeds": [1, 2], "matrix": {"fp8_format": ["E4M3"]}}
        matrix.write_text(yaml.safe_dump(content))
        begun = time.monotonic()
        if _sweep(matrix, reference).wait(600) != 0:
            sys.exit("the unbroken sweep failed")
        storm.spans["sweep"] = time.monotonic() - begun
    storm.spans.setdefault("sweep", 20.0)
    for _ in range(rng.randint(1, 3)):
        process = _sweep(matrix, scratch)
        whom = rng.choice(("worker", "sweep", "all"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, 1.0) * storm.spans["sweep"])
        below = _descendants(process.pid)
        victims = {"worker": below[-1:], "sweep": [process.pid], "all": [process.pid, *below]}[whom]
        if process.poll() is None and victims:
            case.hits += 1
            case.what += f" {whom} killed"
            _kill(victims)
        if whom == "worker":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10 * PATIENCE_S)
        elif process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for run in find_runs(scratch) if scratch.exists() else ():
            _check_log(case, run)
    process = _sweep(matrix, scratch)
    try:
        if process.wait(10 * PATIENCE_S) != 0:
            case.fault("lost", f"the sweep ended with {process.returncode}")
    except subprocess.TimeoutExpired:
        _kill([process.pid, *_descendants(process.pid)])
        case.fault("hang", "the sweep did not end")
        return
    for wanted in find_runs(reference):
        run = scratch / wanted.relative_to(reference)
        for said in differences(run, wanted):
            case.fault("lost", said)
        if not (finding := verify_run(run)).whole:
            case.fault("lost", finding.said())
        _check_log(case, run)


def _check_log(case: Case, run: Path) -> None:
    log = run / "log.txt"
    if log.exists() and "Traceback" in (text := log.read_text("utf-8", "replace")):
        case.fault("traceback", text)


def _sweep(matrix: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "altgrad", "sweep", str(matrix), "--out", str(out), "--jobs", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """Processes below one, parents first."""
    try:
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return []
    return [found for child in children for found in (child, *_descendants(child))]


STORMS = {storm.__name__: storm for storm in (kills, sweeps, damage, disk, signals)}


def run_storm(
    kind: str,
    count: int,
    seed: int,
    ledger: Path | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[list[Case]], None] = lambda cases: None,
) -> list[Case]:
    """Cases until `count` hits; those in the ledger are not made again. `keep` is given all of them now and then."""
    known = ledger.read_text().splitlines() if ledger is not None and ledger.exists() else []
    cases = [Case(**json.loads(line)) for line in known]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="storm-") as work:
        storm = Storm(Path(work))
        storm.prepare()
        while sum(case.hits for case in cases) < count:
            number = len(cases)
            case, scratch = Case(number, ""), Path(work) / "scratch"
            scratch.mkdir()
            STORMS[kind](storm, case, random.Random(f"{kind} {seed} {number}"), scratch)
            shutil.rmtree(scratch)
            cases.append(case)
            if ledger is not None:
                with ledger.open("a") as stream:
                    stream.write(json.dumps(asdict(case)) + "\n")
            if case.faults or number % 50 == 0:
                say(f"case {number}: {case.what}: {case.faults or 'well'}")
            if number % 10 == 9:
                keep(cases)
    gc.unfreeze()
    return cases


def main() -> int:
    """Run a storm and print its counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=list(STORMS))
    parser.add_argument("--count", type=int, default=1000, help="kills, damaged folders, refusals or signals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the cases that are done are kept")
    parser.add_argument("--record", type=Path, help="also keep the counts in this file")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = where()
    ledger = arguments.out / f"storm-{arguments.kind}-s{arguments.seed}-{about['commit']}.jsonl"

    def keep(cases: list[Case]) -> None:
        if arguments.record is not None:
            keep_record(arguments.record, arguments.kind, {"seed": arguments.seed, **counted(cases), **about})

    say = lambda line: print(line, flush=True)  # noqa: E731
    cases = run_storm(arguments.kind, arguments.count, arguments.seed, ledger, say, keep)
    keep(cases)
    print(f"{arguments.kind}, seed {arguments.seed}: {counted(cases)}")
    return int(any(case.faults for case in cases))


def counted(cases: list[Case]) -> dict[str, int]:
    """Hits, cases, and the faults of each kind."""
    faults = Counter(fault.split(":")[0] for case in cases for fault in case.faults)
    return {
        "hits": sum(case.hits for case in cases), "cases": len(cases), **{kind: faults[kind] for kind in STORM_FAULTS}
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
