"""Tries on this machine what an autopsy of a large run stands on, and says whether it held.

    python -m benchmarks.replay_at_scale --sharded      # captures of each rank's own shards, on two gloo processes
    python -m benchmarks.replay_at_scale --lost-node    # forks as Ray tasks on two nodes, one of which is lost
    python -m benchmarks.replay_at_scale --sharded --lost-node --json benchmarks/results/replay-at-scale.json

Sharded: a GPT under FSDP2 is captured rank by rank, stepped, restored and stepped again; the losses must be the same to the
bit, and each rank must hold its part of the bytes. Lost node: the forks of a damaged run are asked of a Ray cluster of two
nodes through the command; one is removed while they run, and every answer must be the one that one process gives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from altgrad.autopsy.forks import read_log
from altgrad.loop.states import state_bytes, tensors_of
from altgrad.records.documents import read_json
from altgrad.records.files import write_json
from altgrad.records.machine import processor_name
from altgrad.training.config.loading import load_config
from altgrad.training.format_runner import FormatExperimentRunner
from altgrad.training.model import GPT, GPTConfig

RANKS, STEPS = 2, 4
SMALL: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 32}


def local_copy(node: Any) -> Any:
    """A copy of a nested state with this rank's part of every tensor that is spread over ranks."""
    if isinstance(node, torch.Tensor):
        own = node.to_local() if hasattr(node, "to_local") else node  # type: ignore[operator]
        return own.detach().clone()
    if isinstance(node, dict):
        return {key: local_copy(value) for key, value in node.items()}
    return type(node)(map(local_copy, node)) if isinstance(node, list | tuple) else node


def put_back(live: Any, kept: Any) -> None:
    """Write `local_copy`'s result into the tensors that live on."""
    for own, value in zip(tensors_of(live), tensors_of(kept), strict=True):
        (own.to_local() if hasattr(own, "to_local") else own).copy_(value)  # type: ignore[operator]


def _rank(rank: int, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        model = GPT(GPTConfig(256, **SMALL), seed=0)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step(number: int) -> float:
            tokens = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(RANKS * number + rank))
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        for number in range(STEPS):
            step(number)
        live = {"model": dict(model.named_parameters()), "optimizer": optimizer.state_dict()["state"]}
        kept = local_copy(live)
        begun = time.perf_counter()
        first = [step(STEPS + i) for i in range(STEPS)]
        stepping = time.perf_counter() - begun
        with torch.no_grad():
            put_back({"model": dict(model.named_parameters()), "optimizer": optimizer.state_dict()["state"]}, kept)
        again = [step(STEPS + i) for i in range(STEPS)]
        whole = 12 * sum(p.numel() for p in model.parameters())
        results.put((rank, first == again, state_bytes(kept), whole, stepping / STEPS))
    finally:
        dist.destroy_process_group()


def sharded() -> dict[str, Any]:
    """Whether captures of shards bring a run back to its bits, each rank with its part of the bytes ("held")."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (port, results), nprocs=RANKS)
    held, ranks = True, []
    for _ in range(RANKS):
        rank, same, own, whole, step_s = results.get()
        share = own / whole
        held &= same and share < 1 / RANKS + 0.1
        ranks.append({"rank": rank, "bytes": own, "of": whole, "same_losses": same})
        print(
            f"rank {rank}: {own:,} bytes of {whole:,} ({share:.0%}), a step takes {1e3 * step_s:.0f} ms; restored and "
            f"stepped again: {'the same losses to the bit' if same else 'OTHER LOSSES'}"
        )
    return {"held": held, "ranks": sorted(ranks, key=lambda one: one["rank"])}


def damaged_run(folder: Path) -> Path:
    """A short run of a tiny model with a broken gradient operand."""
    config = {
        "name": "tiny",
        "max_steps": 40,
        "threads": 1,
        "runs_dir": str(folder),
        "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "block_size": 16},
        "data": {"batch_size": 4, "max_bytes": 100_000},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "formats": "E4M3; name='head': x:E4M3 w:E4M3 dy:E4M3(none)",
        "verdict": {"stop": False},
    }
    return FormatExperimentRunner(load_config(config)).run().run_dir


def lost_node() -> dict[str, Any]:
    """Whether `altgrad autopsy --executor ray` says what one process says, although a node is lost meanwhile ("held")."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    noticed = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    with tempfile.TemporaryDirectory() as scratch:
        folder = damaged_run(Path(scratch))
        log = folder / "autopsy" / "forks.jsonl"
        _autopsy(folder).wait()
        alone, answers = read_json(folder / "autopsy" / "verdict.json").content, read_log(log)
        shutil.rmtree(folder / "autopsy")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": noticed})
        second = cluster.add_node(num_cpus=1)
        try:
            command = _autopsy(folder, "--executor", "ray", "--address", cluster.address)
            while len(read_log(log)) < 3 and command.poll() is None:
                time.sleep(0.1)
            cluster.remove_node(second, allow_graceful=False)
            lost_after = len(read_log(log))
            print(f"a node of two was lost after {lost_after} forks", flush=True)
            code = command.wait()
        finally:
            cluster.shutdown()
        together, theirs = read_json(folder / "autopsy" / "verdict.json").content, read_log(log)
    same = sum(theirs[key].losses == answers[key].losses for key in theirs.keys() & answers.keys())
    print(f"{same} of {len(answers)} forks of one process were made on the cluster, with its losses to the bit")
    told = all(together[key] == alone[key] for key in ("sentence", "rescue", "alone", "roles", "interventions"))
    print(f"the verdict is {'that of one process' if told else 'ANOTHER'}: {together['sentence']}")
    return {
        "held": code == 0 and told and same == len(answers),
        "lost_after_forks": lost_after,
        "forks": len(answers),
        "same_losses": same,
        "same_verdict": told,
        "sentence": together["sentence"],
    }


def _autopsy(folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "altgrad", "autopsy", str(folder), *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--lost-node", action="store_true")
    parser.add_argument("--json", type=Path, help="also write what was found there")
    arguments = parser.parse_args()
    tried = [trial for trial, asked in ((sharded, arguments.sharded), (lost_node, arguments.lost_node)) if asked]
    if not tried:
        parser.error("name a trial: --sharded, --lost-node")
    found: dict[str, Any] = {trial.__name__: trial() for trial in tried}
    held = all(one["held"] for one in found.values())
    if arguments.json is not None:
        write_json(arguments.json, {**found, "cpu": processor_name(), "torch": torch.__version__})
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
