"""Stands in for `altgrad run` in the executors' tests: reads a config, writes the files of a run, or dies as told.

Behaviours come from the config's `name`, one per run of a sweep:
    ...-ok          finishes
    ...-sigkill     kills itself with SIGKILL at the first attempt, finishes at the second
    ...-segfault    a real invalid memory access, at every attempt
    ...-memory      asks for more memory than it may have, at every attempt
    ...-usage       exits with 2
    ...-silent      exits with 0 and leaves no result
    ...-held        waits after step 3 until a file `go` lies in its folder, two minutes at most; goes on from its checkpoint
    ...-parent      kills the process that started it with SIGKILL at the first attempt, finishes at the second
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import yaml

config_path = Path(sys.argv[1])
config = yaml.safe_load(config_path.read_text())
folder = config_path.parent
name, steps = config["name"], config["max_steps"]
step_s = float(os.environ.get("FAKE_STEP_S", "0.01"))
stopping = False


def stop(*_: object) -> None:
    global stopping
    stopping = True


def record(step: int) -> None:
    line = {"kind": "step", "step": step, "loss": 5.0 / step, "tokens_per_s": 1000.0, "elapsed_s": step * step_s}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def finish(status: str) -> None:
    facts = {
        "status": status, "name": name, "seed": config["seed"], "steps": steps, "max_steps": steps, "wall_s": steps * step_s,
        "final_loss": 5.0 / steps, "verdict": None, "tokens_per_s": 1000.0,
        "environment": {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(facts))


signal.signal(signal.SIGINT, stop)
attempts = folder / "attempts"
attempt = len(attempts.read_text()) if attempts.exists() else 0
attempts.write_text("x" * (attempt + 1))
print(f"attempt {attempt} of {name}", flush=True)
behaviour = name.rpartition("-")[2]
checkpoint = folder / "checkpoint"
begin = int(checkpoint.read_text()) if checkpoint.exists() else 0

for step in range(begin + 1, steps + 1):
    record(step)
    time.sleep(step_s)
    held_until = time.monotonic() + 120
    while behaviour == "held" and step == 3 and not (stopping or (folder / "go").exists()):
        time.sleep(0.01)
        assert time.monotonic() < held_until
    if stopping:
        checkpoint.write_text(str(step))
        finish("interrupted")
        sys.exit(130)
    if step == 2:
        if behaviour == "sigkill" and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "parent" and attempt == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        if behaviour == "segfault":
            ctypes.string_at(0)
        if behaviour == "memory":
            resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
            bytearray(1 << 30)
        if behaviour == "usage":
            print("altgrad: n_head 3 does not divide n_embd 128", file=sys.stderr)
            sys.exit(2)
        if behaviour == "silent":
            sys.exit(0)
finish("completed")
