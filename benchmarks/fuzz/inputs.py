"""Draws what a fuzzed call is given: tensors in every guise, scales, keys and options, sound, odd and bad."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from altgrad.formats.block import BlockFormat
from altgrad.formats.scalar import FloatFormat
from altgrad.quantization import BLOCK_FORMATS, FORMAT_REGISTRY, Overflow, Rounding, get_format

SOUND, ODD, BAD = 0, 1, 2
"""A sound input must give the oracle's bits; an odd one may be refused instead; a bad one must be refused."""

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (3,), (17,), (64,), (5, 4), (0, 3), (4, 32), (2, 3, 5), (3, 1, 32), (2, 2, 3, 4), (130, 33))
LARGE = ((70_001,), (9, 8192))
SPECIALS = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -3e-39, 1.2e-38, 3.4e38, 448.0, 464.0, 6e4)
BLOCKS = (*BLOCK_FORMATS, "E3M4/8", "E4M3/4x2:FP32", "E2M1/3:E4M3", "MXFP8:ceil", "E5M2/5:FP32", "E4M3/128x128:FP32")
OWN = FloatFormat("own", 3, 2, 5)
USUAL_FORMATS = ("E4M3", "E4M3", "E5M2", "E0M7", "E2M1", "BF16")
USUAL_MODES = (Rounding.NEAREST_EVEN, Rounding.NEAREST_EVEN, Rounding.STOCHASTIC)
USUAL_BLOCKS = ("MXFP8", "NVFP4", "MXFP4")
"""Nine draws of ten are of these: each other combination compiles a loop of its own, and rounding has its own proofs."""


class Marked(Tensor):
    """A subclass that changes nothing."""


@dataclass
class Given:
    """An argument: what the call gets, the plain tensor of the same values (None: no values), and what it is."""

    value: Any
    plain: Any
    says: str
    status: int = SOUND


class Draw(random.Random):
    """The random choices of one case."""

    def weighted(self, **weights: float) -> str:
        """One of the names, in proportion to their weights."""
        return self.choices(list(weights), list(weights.values()))[0]

    def numpy(self) -> np.random.Generator:
        """A generator of arrays."""
        return np.random.default_rng(self.getrandbits(63))


def content(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A plain tensor: normal draws of some magnitude, wide exponents, bit patterns, specials or ties."""
    rng, count = draw.numpy(), int(np.prod(shape))
    kind = draw.weighted(normal=5, wide=2, patterns=1, specials=1, ties=1, tiny=1)
    with np.errstate(all="ignore"):
        if kind == "normal":
            x = rng.standard_normal(count) * 2.0 ** draw.randint(-12, 12)
        elif kind == "wide":
            x = rng.standard_normal(count) * np.exp2(rng.uniform(-160, 140, count))
        elif kind == "patterns":
            x = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32).astype(np.float64)
        elif kind == "specials":
            x = rng.choice(np.array(SPECIALS), count)
        elif kind == "ties":
            x = (rng.integers(-40, 40, count) + 0.5) * 2.0 ** draw.randint(-9, 4)
        else:
            x = rng.standard_normal(count) * 1e-39
    return torch.from_numpy(x).to(dtype).reshape(shape)


def _transposed(p: Tensor) -> Tensor:
    order = list(range(p.ndim))[::-1]
    return p.permute(order).contiguous().permute(order)


def _strided(p: Tensor) -> Tensor:
    wide = p.new_full((*p.shape, 2), 7.0)
    wide[..., 0] = p
    return wide[..., 0]


def _offset(p: Tensor) -> Tensor:
    return torch.cat([p.new_full((3,), 7.0), p.flatten()])[3:].view(p.shape)


def _expanded(p: Tensor) -> Tensor:
    return p[:1].clone().expand(p.shape) if p.ndim and p.numel() else p


def _windows(p: Tensor) -> Tensor:
    return p.flatten().as_strided((p.numel() // 2, 2), (1, 1)) if p.numel() > 2 else p


def _negative(p: Tensor) -> Tensor:
    wide = p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.complex(torch.zeros_like(p, dtype=wide), -p.to(wide)).conj().imag


def _inference(p: Tensor) -> Tensor:
    with torch.inference_mode():
        return p.clone()


def _leaked(p: Tensor) -> Any:
    kept = []
    torch.vmap(lambda t: kept.append(t) or t)(p.new_zeros(2, *p.shape))
    return kept[0]


def _freed(p: Tensor) -> Tensor:
    freed = p.clone()
    freed.untyped_storage().resize_(0)
    return freed


def _shrunk(p: Tensor) -> Tensor:
    """Of p's shape, in a storage that lacks the last byte."""
    shrunk = p.clone(memory_format=torch.contiguous_format)
    shrunk.untyped_storage().resize_(max(shrunk.nbytes - 1, 0))
    return shrunk


def _cut(p: Tensor) -> Tensor:
    """Every second element of a storage that ends before the last one."""
    cut = _strided(p)
    cut.untyped_storage().resize_(cut.element_size() * max(2 * p.numel() - 2, 0))
    return cut


WITHOUT_MEMORY = {"freed": _freed, "shrunk": _shrunk, "cut": _cut}
LAYOUTS = {
    "plain": torch.clone,
    "transposed": _transposed,
    "strided": _strided,
    "offset": _offset,
    "expanded": _expanded,
    "windows": _windows,
    "negative": _negative,
    "inference": _inference,
    "parameter": lambda p: torch.nn.Parameter(p.clone()),
    "leaf": lambda p: p.clone().requires_grad_(),
    "inner": lambda p: p.clone().requires_grad_() * 1,
    "subclass": lambda p: p.clone().as_subclass(Marked),
}
WITHOUT_VALUES = {
    "two": lambda p: TwoTensor(p.clone(), p.clone()),
    "meta": lambda p: p.to("meta"),
    "fake": lambda p: FakeTensorMode().from_tensor(p.clone()),
    "functional": lambda p: torch._to_functional_tensor(p.clone()),
}
BAD_TENSORS = {
    "leaked": _leaked,
    "sparse": lambda p: p.float().reshape(-1).to_sparse(),
    "csr": lambda p: torch.ones(2, 2).to_sparse_csr(),
    "mkldnn": lambda p: torch.ones(2, 3).to_mkldnn(),
    "nested": lambda p: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda p: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "quantized": lambda p: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "integers": lambda p: torch.arange(4),
    "booleans": lambda p: torch.ones(3, dtype=torch.bool),
    "complex": lambda p: torch.ones(3, dtype=torch.complex64),
    "float8": lambda p: torch.ones(3).to(torch.float8_e4m3fn),
    "list": lambda p: [1.0, 2.0],
    "array": lambda p: np.ones(3),
    "none": lambda p: None,
    "word": lambda p: "x",
    "number": lambda p: 1.5,
}


def dressed(draw: Draw, p: Tensor, odds: float = 1.0) -> Given:
    """The plain tensor p in one guise; `odds` scales the chance of the strange ones."""
    group = draw.weighted(layout=12, hollow=0.8 * odds, zero=0.2 * odds, freed=0.4 * odds, bad=0.9 * odds)
    if group == "layout":
        name = draw.weighted(plain=8, **{layout: 1.0 for layout in LAYOUTS if layout != "plain"})
        value = LAYOUTS[name](p)
        plain = value.detach().resolve_neg().clone(memory_format=torch.contiguous_format).as_subclass(Tensor)
        return Given(value, plain, f"{name} {_words(plain)}")
    if group == "hollow":
        name = draw.choice(list(WITHOUT_VALUES))
        return Given(WITHOUT_VALUES[name](p), None, f"{name} {_words(p)}", ODD)
    if group == "zero":
        value = torch._efficientzerotensor(p.shape, dtype=p.dtype)
        return Given(value, torch.zeros_like(p), f"efficient zero tensor {_words(p)}", ODD)
    if group == "freed":
        return without_memory(draw, p)
    name = draw.choice(list(BAD_TENSORS))
    return Given(BAD_TENSORS[name](p), None, name, BAD)


def without_memory(draw: Draw, p: Tensor, name: str = "") -> Given:
    """A tensor of p's shape whose storage does not hold all its elements."""
    how = draw.choice(list(WITHOUT_MEMORY))
    return Given(WITHOUT_MEMORY[how](p), p, f"{how} {name}{_words(p)}", BAD if p.numel() else ODD)


def _words(p: Tensor) -> str:
    return f"{str(p.dtype)[6:]} {list(p.shape)}"


def shape_of(draw: Draw) -> tuple[int, ...]:
    """A shape; one of 40 large enough for two threads."""
    return draw.choice(LARGE) if draw.random() < 0.025 else draw.choice(SHAPES)


def floats(draw: Draw, shape: tuple[int, ...] | None = None, odds: float = 1.0) -> Given:
    """A floating tensor of any guise."""
    dtype = draw.choice((*FLOATS, *[torch.float32] * 6))
    p = content(draw, shape_of(draw) if shape is None else shape, dtype)
    return dressed(draw, p, odds)


def usual(draw: Draw, usually: Any, all_of_them: Any) -> Any:
    """The usual choices, or one time in ten all of them."""
    return usually if draw.random() < 0.9 else all_of_them


def scalar_format(draw: Draw) -> Given:
    """A scalar format by name, alias or value; sometimes none that can be put on a tensor."""
    kind = draw.weighted(name=8, row=6, short=1, own=1, bad=0.7)
    if kind in ("name", "row"):
        name = draw.choice(usual(draw, USUAL_FORMATS, list(FORMAT_REGISTRY)))
        status = SOUND if FORMAT_REGISTRY[name].has_zero else BAD
        spelled = draw.choice((name, name.lower(), f" {name} ")) if kind == "name" else FORMAT_REGISTRY[name]
        return Given(spelled, FORMAT_REGISTRY[name], f"{spelled!r:.20}", status)
    if kind == "short":
        name = draw.choice(("e3m3", "E5M3", "fp8_e4m3", "bf16", "float8_e5m2"))
        return Given(name, get_format(name), name)
    if kind == "own":
        return Given(OWN, OWN, "own E3M2 bias 5")
    value = draw.choice(("E99M1", "", "fp7", None, 3, 1.5, torch.float32, {}, ["E4M3"], "E9M9", "\0", b"E4M3"))
    return Given(value, None, repr(value), BAD)


def block_format(draw: Draw) -> Given:
    """A block format by name or value."""
    name = draw.choice(usual(draw, USUAL_BLOCKS, BLOCKS))
    value = BLOCK_FORMATS[name] if name in BLOCK_FORMATS and draw.random() < 0.5 else name
    return Given(value, value, name)


def is_block(fmt: Given) -> bool:
    """Whether the format drawn is a block format."""
    return isinstance(fmt.plain, BlockFormat) or fmt.plain in BLOCKS


def scale(draw: Draw, x: Given, block: bool = False) -> Given:
    """A scale: a number, or a tensor that broadcasts to x; sometimes of a wrong kind, device, shape or value."""
    shape = tuple(x.plain.shape) if isinstance(x.plain, Tensor) else ()
    kind = draw.weighted(one=8, number=6, whole=3, channel=0 if block else 3, full=0 if block else 1, bad=1.2, away=0.5)
    if kind == "one":
        return Given(1.0, 1.0, "1.0")
    number = draw.choice((0.5, 2.0, 0.037, 3, 1e-3, 2.0**-130, 1e30, np.float32(0.3), True))
    if kind == "number":
        return Given(number, float(number), repr(number))
    if kind == "bad":
        bad = (0.0, -1.0, float("nan"), float("inf"), -0.0, "0.5", None, 1j, [1.0], {}, 1e-300, 1e300)
        tensors = (torch.tensor(0.0), torch.tensor([-1.0]), torch.tensor(float("nan")), torch.tensor(3))
        value = draw.choice(tensors) if draw.random() < 0.4 else draw.choice(bad)
        if value is None and block:
            return Given(None, 1.0, "None", ODD)  # as much as none given
        odd = isinstance(value, float) and 0 < value < float("inf")  # in range for float64 tensors only
        plain = value if odd else None
        return Given(value, plain, repr(value), ODD if odd else BAD)
    if kind == "away":
        device = draw.choice(("meta", "fake", "zero", "leaked"))
        whole = torch.tensor(0.5)
        make = {"zero": lambda p: torch._efficientzerotensor(()), "leaked": _leaked, **WITHOUT_VALUES}
        return Given(make[device](whole), None, f"{device} scale", BAD)
    wanted = {"whole": draw.choice(((), (1,))) if shape else (), "full": shape}.get(kind)
    if wanted is None:
        axis = draw.randrange(len(shape)) if shape else 0
        wanted = tuple(n if d == axis else 1 for d, n in enumerate(shape))
    plain = torch.from_numpy(draw.numpy().uniform(0.01, 3, wanted)).to(draw.choice((*FLOATS, torch.float32)))
    if draw.random() < 0.05:
        return without_memory(draw, plain, "scale ")
    found = dressed(draw, plain, odds=0.0)
    return Given(found.value, found.plain, f"scale {found.says}", found.status)


def key(draw: Draw, stochastic: bool) -> Given:
    """A key for stochastic rounding; whatever is not looked at is sound."""
    if not stochastic and draw.random() < 0.8:
        return Given(None, None, "no key")
    words = (draw.getrandbits(64), draw.getrandbits(63))
    signed = torch.tensor([words[0] - 2**63, words[1]])
    kind = draw.weighted(words=6, tensor=3, bad=1)
    if kind == "words":
        return Given(words, words, f"key {words}")
    if kind == "tensor":
        return Given(signed, signed, "key tensor")
    bad: tuple[Any, ...] = (
        None,
        5,
        (1,),
        (1, 2, 3),
        (1.5, 2),
        ("1", "2"),
        (True, False),
        "ab",
        (2**64, 0),
        torch.ones(2),
        torch.ones(3),
    )
    value: Any = draw.choice(
        (*bad, signed.to("meta"), signed.int(), {"seed": 1}, (None, 1), _freed(signed), _shrunk(signed))
    )
    words = f"tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.30}"
    return Given(value, (1, 2), f"key {words}", BAD if stochastic else ODD)


def options(draw: Draw) -> dict[str, Given]:
    """Rounding, overflow, key, random bits, subnormals, clamp and kernel."""
    mode, policy = draw.choice(usual(draw, USUAL_MODES, list(Rounding))), draw.choice(list(Overflow))
    found: dict[str, Given] = {}
    if draw.random() < 0.6:
        found["rounding"] = Given(draw.choice((mode, mode.value)), mode, mode.value)
    if draw.random() < 0.5:
        found["overflow"] = Given(draw.choice((policy, policy.value)), policy, policy.value)
    for name in ("rounding", "overflow"):
        if draw.random() < 0.02:
            value = draw.choice(("nearest", "", None, 3, {}, [], 1.5, torch.ones(1), object))
            found[name] = Given(value, None, f"{name} {value!r:.20}", BAD)
    stochastic = "rounding" in found and found["rounding"].plain is Rounding.STOCHASTIC
    found["key"] = key(draw, stochastic)
    if draw.random() < 0.2:
        value = draw.choice((1, 8, 23, 24, 25, 32) if draw.random() < 0.7 else (0, 33, 2.5, "8", None, -1, 2**70, True))
        good = type(value) is int and 1 <= value <= 32
        status = SOUND if good else BAD if stochastic and value is not True else ODD
        found["random_bits"] = Given(value, value if good else 24, f"random_bits {value!r}", status)
    for name in ("subnormals", "clamp"):
        if draw.random() < 0.25:
            value = draw.choice((True, False, True, False, None, 1, "yes"))
            found[name] = Given(value, bool(value), f"{name} {value!r}", SOUND if type(value) is bool else ODD)
    if draw.random() < 0.25:
        value = draw.choice(("eager", "cpu", "reference", "eager", "cpu", "cuda", "fpga", 3, {}))
        good = value in ("eager", "cpu", "reference") if isinstance(value, str) else False
        found["kernel"] = Given(value, None, f"kernel {value!r}", SOUND if good else BAD)
    return found


def out(draw: Draw, x: Given) -> Given | None:
    """A tensor to write to: a fitting one of any layout, x itself, one that overlaps x, or one that does not fit."""
    if draw.random() < 0.7 or not isinstance(x.plain, Tensor) or not isinstance(x.value, Tensor):
        return None
    p, kind = x.plain, draw.weighted(fits=5, strided=2, itself=2, shifted=2, windows=1, wrong=3, hollow=1, leaf=1)
    empty = torch.full(p.shape, 7.0, dtype=x.value.dtype)
    if kind == "fits":
        return Given(draw.choice((torch.clone, _transposed, _offset))(empty), None, "out")
    if kind == "strided":
        return Given(_strided(empty), None, "strided out")
    if kind == "itself":
        overlaps = x.says.split()[0] in ("expanded", "windows", "negative", "leaf", "parameter", "inference", "inner")
        return Given(x.value, None, "out is x", ODD if overlaps else SOUND)
    if kind == "shifted":
        flat = x.value.detach()
        if (
            x.status != SOUND
            or type(flat) is not Tensor
            or not flat.is_contiguous()
            or flat.ndim != 1
            or flat.numel() < 3
        ):
            return None
        base = torch.cat([flat, flat[:1]])
        x.value, x.plain = base[:-1], base[:-1].clone()
        return Given(base[1:], None, "out overlaps x", ODD)
    if kind == "windows":
        return Given(
            _expanded(empty), None, "out with elements that share memory", ODD if p.numel() < 2 or len(p) < 2 else BAD
        )
    if kind == "leaf":
        return Given(empty.requires_grad_(), None, "leaf out", ODD)  # allowed where no gradient is recorded
    if kind == "hollow":
        if draw.random() < 0.4:
            return without_memory(draw, empty, "out ")
        name = draw.choice(list(WITHOUT_VALUES))
        return Given(WITHOUT_VALUES[name](empty), None, f"{name} out", BAD)
    other = torch.float64 if empty.dtype != torch.float64 else torch.float16
    wrong = (
        empty.to(other),
        torch.full((*p.shape, 2), 7.0),
        [1.0],
        "out",
        empty.to_sparse(),
        torch.ones(2, 2, 2, 2, 2),
    )
    return Given(draw.choice(wrong), None, "wrong out", BAD)
