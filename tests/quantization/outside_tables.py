"""Write the tables of numbers that other projects compute; `test_outside_tables.py` reads them.

    python -m tests.quantization.outside_tables [JUDGE ...]

gfloat, ml_dtypes and torchao come with the development extras. pychop (PyPI) and microxcaling (the package `mx` of
github.com/microsoft/microxcaling) must be importable for their own tables. A table holds numbers and the name and version
of what computed them; where its judge means something else than we do, the reader says so and leaves the cells out.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

TABLES = Path(__file__).with_suffix(".json")
MX = {
    "MXFP8": "fp8_e4m3",
    "MXFP8_E5M2": "fp8_e5m2",
    "MXFP6": "fp6_e2m3",
    "MXFP6_E3M2": "fp6_e3m2",
    "MXFP4": "fp4_e2m1",
    "MXINT8": "int8",
}


def pychop() -> dict:
    """Four formats, four modes, on the inputs that pychop's tests compare with MATLAB's chop: seed 0, and a thousandth."""
    from pychop import Chop, backend

    backend("numpy")
    draws = np.random.RandomState(0).randn(40)
    rows = []
    for name, exponent_bits, fraction_bits in (("q43", 4, 3), ("q52", 5, 2), ("half", 5, 10), ("bfloat16", 8, 7)):
        for subnormal, inputs in ((False, draws), (True, draws / 1000)):
            for mode in (1, 2, 3, 4):
                chop = Chop(exponent_bits, fraction_bits, rmode=mode, subnormal=subnormal)
                rows.append({"format": name, "mode": mode, "subnormal": subnormal, "out": chop(inputs).tolist()})
    source = f"pychop {version('pychop')}, Chop on NumPy; its tests hold it to MATLAB's chop (Higham and Pranesh 2019)"
    return {"source": source, "inputs": draws.tolist(), "rows": rows}


def microxcaling() -> dict:
    """Six MX formats in blocks of 32: ties to even on seven blocks, ties away and toward zero on two."""
    from mx.mx_ops import _quantize_mx  # pyright: ignore

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 32, generator=generator) * torch.exp2(torch.tensor([0.0, -20, 9, 60, -60, 0, 0]))[:, None]
    x[5] = torch.arange(32) / 16 - 1
    x[6] = torch.exp2(torch.arange(32.0) - 16)
    rows = []
    for name, element in MX.items():
        for mode, count in (("even", 7), ("nearest", 2), ("floor", 2)):
            out = _quantize_mx(x[:count].clone(), 8, element, axes=[-1], round=mode)
            rows.append({"format": name, "mode": mode, "out": out.tolist()})
    source = "microsoft/microxcaling (MIT), mx/mx_ops.py at 3b429a8, PyTorch path, scale of 8 bits"
    return {"source": source, "inputs": x.tolist(), "rows": rows}


def torchao() -> dict:
    """Scale bytes of blocks of 32 by their amax, for five elements and three rules."""
    from torchao.prototype.mx_formats import mx_tensor

    elements = {
        "MXFP8": torch.float8_e4m3fn,
        "MXFP8_E5M2": torch.float8_e5m2,
        "MXFP6": "fp6_e2m3",
        "MXFP6_E3M2": "fp6_e3m2",
        "MXFP4": torch.float4_e2m1fn_x2,
    }
    corners = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.875, 1.9375])
    corners = torch.cat([corners, torch.nextafter(corners, torch.tensor(4.0)), torch.nextafter(corners, corners * 0)])
    amax = (corners[:, None] * torch.exp2(torch.tensor([-90.0, 0.0, 120.0]))).flatten()
    blocks = torch.zeros(len(amax), 32)
    blocks[:, 5] = -amax
    rows = []
    for name, element in elements.items():
        for mode in ("FLOOR", "RCEIL", "EVEN"):
            scales, _ = mx_tensor.to_mx(blocks, element, 32, scaling_mode=mx_tensor.ScaleCalculationMode[mode])
            rows.append({"format": name, "mode": mode, "out": scales.view(torch.uint8).flatten().tolist()})
    return {"source": f"torchao {version('torchao')}, to_mx", "inputs": amax.tolist(), "rows": rows}


def ml_dtypes() -> dict:
    """Codes of eleven types over their range: values, ties and neighbours of both signs, NumPy's cast."""
    import ml_dtypes

    names = [
        "float8_e3m4",
        "float8_e4m3",
        "float8_e4m3b11fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float4_e2m1fn",
        "float6_e2m3fn",
        "float6_e3m2fn",
        "bfloat16",
    ]
    rows = []
    for name in names:
        kind = getattr(ml_dtypes, name)
        largest = float(ml_dtypes.finfo(kind).max)
        smallest = float(ml_dtypes.finfo(kind).smallest_subnormal)
        span = np.geomspace(max(smallest / 4, 1e-38), min(largest, 3e38), 24).astype(np.float32)
        steps = np.float32(smallest) * np.array([0.5, 1, 1.5, 2.5, 3], np.float32)
        x = np.concatenate([span, -span[::3], steps, -steps[:2], np.array([0.0, largest, -largest], np.float32)])
        codes = x.astype(kind).view(np.uint16 if name == "bfloat16" else np.uint8)
        rows.append({"format": name, "inputs": x.astype(float).tolist(), "out": codes.tolist()})
    return {"source": f"ml_dtypes {version('ml_dtypes')}, NumPy astype", "rows": rows}


def gfloat() -> dict:
    """gfloat's own rounding tables (its test_round.py): binary8p4 at both ends in every mode, saturating and not."""
    import gfloat
    import gfloat.formats as formats

    low, high = 2.0**-10, 224.0
    ends = [high, high + 8, high + 16, np.inf]
    middle = [low, low / 4, low / 2, 64.0, 63.0, 62.0, 61.0, 58.0, 0.0068359375, 0.0029296875, 0.017578125]
    p4 = [sign * v for v in (*ends, *middle) for sign in (1.0, -1.0)]
    e5m2 = [1.5258789e-05, 57344.0, 57344.1, 61439.9, 61440.0, 259.0, 277.0, 288.0, 311.0, np.inf, -np.inf]
    e4m3 = [448.0, 448.1, 464.0, 0.0009765625, 0.00146484375, 17.0, 19.0, -17.0, -19.0]
    rows = []
    for name, info, inputs in (
        ("binary8p4", formats.format_info_p3109(8, 4), p4),
        ("E5M2", formats.format_info_ocp_e5m2, e5m2),
        ("E4M3", formats.format_info_ocp_e4m3, e4m3),
    ):
        for mode in ("TiesToEven", "TiesToAway", "TowardZero", "TowardPositive", "TowardNegative"):
            for saturates in (True, False):
                out = [gfloat.round_float(info, v, gfloat.RoundMode[mode], saturates) for v in inputs]
                rows.append(
                    {
                        "format": name,
                        "mode": mode,
                        "saturates": saturates,
                        "inputs": inputs,
                        "out": list(map(float, out)),
                    }
                )
    return {"source": f"gfloat {version('gfloat')}, round_float", "rows": rows}


JUDGES = {judge.__name__: judge for judge in (pychop, microxcaling, torchao, ml_dtypes, gfloat)}


def table_text(table: dict) -> str:
    """A judge's table as JSON, a row a line."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table.pop("rows"))
    head = json.dumps(table, separators=(",", ":"))[:-1]
    return f'{head},"rows":[\n{rows}\n]}}'


def main(names: list[str]) -> None:
    """Write the tables of the judges named, or of all; those of the others stay."""
    tables = json.loads(TABLES.read_text()) | {name: JUDGES[name]() for name in names or JUDGES}
    TABLES.write_text("{" + ",\n".join(f'"{name}":{table_text(table)}' for name, table in tables.items()) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
