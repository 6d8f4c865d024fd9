"""Digests of what the numerics compute, so that a redesign can show that no number moved.

`python -m benchmarks.digest` prints one digest per kernel and call, and one per short training run. `--write` keeps them
in `benchmarks/results/digest.json`; `--check` compares with that file. Bits of the kernels are the same on every machine
and are compared by the tests; losses depend on the CPU's matrix products, so they are only compared on the CPU, torch
and thread count that the record names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altgrad.errors import AltGradError
from altgrad.quantization import (
    BLOCK_FORMATS,
    FORMAT_REGISTRY,
    Rounding,
    decode,
    encode,
    quantize,
    quantize_with_stats,
)
from altgrad.records.machine import processor_name

RECORD = Path(__file__).parent / "results" / "digest.json"
KERNELS = ("reference", "eager", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORAGE = ("master", "grid", "stochastic")
RUNS = ("E4M3", "E5M2", "E1M6")
EXACT_STATS = 5  # amax, count, overflow, underflow, nonfinite; the two sums are held to a bound elsewhere


def corpus(dtype: torch.dtype) -> Tensor:
    """700 values, ties, subnormals and specials among them, made by integers alone: the same in every version."""
    words = [(i * 0x9E3779B97F4A7C15 + 0x1234567) & (2**64 - 1) for i in range(640)]
    values = [((w >> 40) / 2**24 - 0.5) * 2.0 ** ((w >> 8) % 40 - 26) for w in words]
    ties = [sign * (k + 0.5) * 2.0**e for sign in (1, -1) for k in range(5) for e in (-9, -4, 0)]
    specials = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-44, -1e-44, 448.0, 464.0, 465.0]
    padded = [*values, *ties, *specials]
    return torch.tensor((padded + values)[:704], dtype=torch.float64).to(dtype).reshape(22, 32)


def digest(*tensors: Tensor) -> str:
    """SHA-256 over dtypes, shapes and bytes; every NaN counts as the same."""
    state = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten()
        if flat.is_floating_point():
            flat = torch.where(flat.isnan(), torch.full_like(flat, float("nan")), flat)
        state.update(f"{flat.dtype}{list(tensor.shape)}".encode())
        state.update(bytes(flat.view(torch.uint8).tolist()))
    return state.hexdigest()[:16]


def _covers(kernel: str, dtype: torch.dtype, fmt) -> bool:
    try:
        quantize(torch.zeros(32, dtype=dtype), fmt, kernel=kernel)
    except AltGradError:
        return False
    return True


def _calls(name: str, fmt, kernel: str) -> Iterator[tuple[str, str]]:
    """(what was computed, its digest) for one format on one kernel."""
    for dtype in DTYPES:
        if not _covers(kernel, dtype, fmt):
            continue
        x, parts = corpus(dtype), []
        for rounding in Rounding:
            for overflow in ("native", "saturate", "inf", "nan"):
                options: dict[str, Any] = {"rounding": rounding, "overflow": overflow, "key": (7, 11), "kernel": kernel}
                parts.append(quantize(x, fmt, **options))
        yield f"{kernel} {name} {str(dtype)[6:]} quantize", digest(*parts)
    x = corpus(torch.float32)
    options: dict[str, Any] = {"overflow": "saturate", "kernel": kernel}
    scalar = name in FORMAT_REGISTRY
    scaled = [
        quantize(x, fmt, s, **options, clamp=True) for s in ((0.37, torch.linspace(0.5, 2, 32)) if scalar else ())
    ]
    subnormals = (fmt if scalar else fmt.element).exponent_bits == 0  # uniform grids have nothing else
    few = [quantize(x, fmt, rounding="stochastic", key=(1, 2), random_bits=3, subnormals=subnormals, **options)]
    yield f"{kernel} {name} scaled", digest(*scaled, *few)
    values, stats = quantize_with_stats(x, fmt, **options)
    yield f"{kernel} {name} stats", digest(values, stats.vector[:EXACT_STATS])
    if scalar and fmt.bits > 19:
        return  # too many codes for a table
    finite = torch.where(x.isfinite(), x, 1.0)
    codes = encode(finite, fmt, **options)
    packed = [codes] if isinstance(codes, Tensor) else [codes.codes, codes.scales]
    yield f"{kernel} {name} codes", digest(*packed, decode(codes, fmt))


def kernel_digests(kernels: tuple[str, ...] = KERNELS) -> dict[str, str]:
    """One digest per kernel, format and call over the whole catalog."""
    found: dict[str, str] = {}
    for kernel in kernels:
        for name, fmt in FORMAT_REGISTRY.items():
            if fmt.has_zero and (kernel != "reference" or fmt.bits <= 8):  # the oracle lists every value
                found |= dict(_calls(name, fmt, kernel))
        if kernel != "reference":
            for name, fmt in BLOCK_FORMATS.items():
                found |= dict(_calls(name, fmt, kernel))
    return found


def run_digests(steps: int = 30) -> dict[str, str]:
    """Digest of the losses of a short run for each storage mode and each of three formats, on one thread."""
    from altgrad.training.data import corpus_from_bytes
    from altgrad.training.trainer import Trainer

    text = b"".join(b"%d squared is %d, and " % (i, i * i) for i in range(2000))
    found = {}
    for mode in STORAGE:
        for fmt in RUNS:
            trainer = Trainer(_config(fmt, mode, steps), data_dir=corpus_from_bytes(text, 0.1, "squares"))
            losses = [trainer.train_step(*trainer.batch(trainer.step + 1)).loss for _ in range(steps)]
            state = hashlib.sha256(struct.pack(f"<{steps}d", *losses)).hexdigest()[:16]
            found[f"run {mode} {fmt}"] = state
    return found


def _config(fmt: str, mode: str, steps: int):
    from altgrad.training import load_config

    storage = {"weight_storage": "master" if mode == "master" else "grid"}
    if mode == "stochastic":
        storage["storage_rounding"] = "stochastic"
    return load_config(
        {
            "name": "digest",
            "fp8_format": fmt,
            **storage,
            "max_steps": steps,
            "threads": 1,
            "verdict": {"stop": False},
            "model": {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32},
            "data": {"batch_size": 4},
            "optimizer": {"warmup_steps": 5},
        }
    )


def machine() -> dict[str, str]:
    """What losses may depend on."""
    return {"cpu": processor_name(), "torch": torch.__version__, "python": platform.python_version(), "threads": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the digests as the record")
    parser.add_argument("--check", action="store_true", help="compare with the record; exit 1 where a digest moved")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kernels, runs = kernel_digests(), run_digests()
    if arguments.write:
        RECORD.write_text(json.dumps({"machine": machine(), "kernels": kernels, "runs": runs}, indent=1) + "\n")
        print(f"{len(kernels)} kernel digests and {len(runs)} runs written to {RECORD.name}")
        return
    if not arguments.check:
        for what, value in {**kernels, **runs}.items():
            print(f"{value}  {what}")
        return
    record = json.loads(RECORD.read_text())
    moved = [k for k, v in record["kernels"].items() if kernels.get(k) != v]
    print(f"kernels: {len(record['kernels']) - len(moved)} of {len(record['kernels'])} digests equal")
    if record["machine"] == machine():
        moved_runs = [k for k, v in record["runs"].items() if runs.get(k) != v]
        print(f"runs: {len(record['runs']) - len(moved_runs)} of {len(record['runs'])} equal on {machine()['cpu']}")
        moved += moved_runs
    else:
        print(f"runs: not compared; the record is of {record['machine']}, this is {machine()}")
    for name in moved:
        print(f"moved: {name}")
    raise SystemExit(bool(moved))


if __name__ == "__main__":
    main()
