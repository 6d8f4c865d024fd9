"""Draws one call of `altgrad.quantization`, and runs it in its surroundings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from altgrad import quantization
from altgrad.quantization import QuantizedTensor, QuantStats, get_format, ops
from benchmarks.fuzz import inputs
from benchmarks.fuzz.inputs import BAD, FLOATS, ODD, SOUND, Draw, Given, Marked

CASTS = ("quantize", "encode", "quantize_with_stats", "encode_with_stats", "fake_quantize")
PAIRS = ("quantize_and_encode", "quantize_and_encode_with_stats")
DIAGNOSTICS = (
    "block_scales",
    "code_index",
    "compute_stiffness_field",
    "compute_ulp_distance",
    "from_code_index",
    "get_format",
    "grid_alignment_error",
    "grid_alignment_statistics",
    "grid_index",
    "grid_spacing",
)
ELEMENTWISE = ("quantize", "fake_quantize", "decode")
WRAPPED = ("vmap", "vmap_scale", "nested_vmap", "grad", "jvp", "functionalize", "make_fx", "make_fx_fake", "compile")


@dataclass
class Case:
    """One call: the function, its arguments, what surrounds it, and how the right answer is found."""

    name: str
    function: Callable
    arguments: dict[str, Given]
    oracle: Callable[[], Any] | None  # None: there are no values to compare
    surroundings: list[str] = field(default_factory=list)
    transform: str = "none"

    @property
    def says(self) -> str:
        """The call in words, as a report shows it."""
        given = ", ".join(f"{name}: {argument.says}" for name, argument in self.arguments.items() if argument.says)
        return f"{self.name}({given}) {self.transform} {' '.join(self.surroundings)}"

    @property
    def status(self) -> int:
        """The worst status of an argument."""
        return max((argument.status for argument in self.arguments.values()), default=SOUND)

    def call(self) -> Any:
        """The function's result in its surroundings."""
        values = {name: argument.value for name, argument in self.arguments.items()}
        with contextlib.ExitStack() as stack:
            for name in self.surroundings:
                stack.enter_context(SURROUNDINGS[name]())
            return TRANSFORMS[self.transform](self.function, values)


@contextlib.contextmanager
def _set(change: Callable, value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


SURROUNDINGS: dict[str, Callable] = {
    "flushed denormals": lambda: _set(torch.set_flush_denormal, True, False),
    "default bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": lambda: torch.device("meta"),
    "two threads": lambda: _set(torch.set_num_threads, 2, 1),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "threads and flush": lambda: _set(lambda n: (torch.set_num_threads(n), torch.set_flush_denormal(n == 2)), 2, 1),
}


def _thread(function: Callable, values: dict) -> Any:
    kept: list = []

    def work() -> None:
        try:
            kept.append((function(**values), None))
        except BaseException as error:
            kept.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = kept[0]
    if error is not None:
        raise error
    return result


def _on_first(transform: Callable) -> Callable:
    """A transform of the function of its first argument, the others fixed."""

    def run(function: Callable, values: dict) -> Any:
        (first, x), *rest = values.items()
        return transform(lambda t: leaves(function(**{first: t}, **dict(rest))), x)

    return run


def _vmap(run: Callable, x: Tensor) -> Any:
    return torch.vmap(run)(x)


def _vmap_scale(function: Callable, values: dict) -> Any:
    rest = {name: value for name, value in values.items() if name not in ("x", "scale")}
    batch = torch.full((len(values["x"]),), 0.25, dtype=torch.float32, device="cpu")
    return torch.vmap(lambda t, s: leaves(function(t, scale=s, **rest)))(values["x"], batch)


def _other(x: Tensor) -> Tensor:
    """A tensor like x of other values, so that a tracer that keeps results as constants shows."""
    with torch.no_grad():
        return torch.zeros_like(x).requires_grad_(x.requires_grad)


def _compile(run: Callable, x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(run, backend="eager", fullgraph=True)(x)


TRANSFORMS: dict[str, Callable] = {
    "none": lambda function, values: function(**values),
    "thread": _thread,
    "vmap": _on_first(_vmap),
    "vmap_scale": _vmap_scale,
    "nested_vmap": _on_first(lambda run, x: torch.vmap(torch.vmap(run))(x)),
    "grad": _on_first(lambda run, x: (torch.func.grad(lambda t: run(t)[0].sum())(x),)),
    "jvp": _on_first(lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),))[0]),
    "functionalize": _on_first(lambda run, x: torch.func.functionalize(run)(x)),
    "make_fx": _on_first(lambda run, x: make_fx(run)(_other(x))(x)),
    "make_fx_fake": _on_first(lambda run, x: make_fx(run, tracing_mode="fake")(_other(x))(x)),
    "compile": _on_first(_compile),
}


def leaves(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, in order."""
    if isinstance(result, QuantStats):
        return (result.vector,)
    if isinstance(result, QuantizedTensor):
        return tuple(t for t in (result.codes, result.scales, result.tensor_scale) if t is not None)
    if isinstance(result, dict):
        return tuple(result.values())
    if isinstance(result, tuple | list):
        return tuple(leaf for part in result for leaf in leaves(part))
    return (result,)


def draw_case(seed: int, index: int) -> Case:
    """The case of that number: a pure function of (seed, index)."""
    draw = Draw(f"{seed}/{index}")
    torch.manual_seed(0)
    kind = draw.weighted(cast=10, pair=2, block=4, decode=4, block_decode=1, amax=3, diagnostics=3)
    case: Case = {
        "cast": _scalar_cast,
        "pair": _scalar_cast,
        "block": _block_cast,
        "decode": _decode,
        "block_decode": _block_decode,
        "amax": _amax,
        "diagnostics": _diagnostics,
    }[kind](draw, PAIRS if kind == "pair" else CASTS)
    for name in SURROUNDINGS:
        if draw.random() < 0.04 and not (name.startswith("threads") and case.surroundings):
            case.surroundings.append(name)
    if case.transform == "compile" and "default device meta" in case.surroundings:
        for (
            given
        ) in case.arguments.values():  # torch's compiler makes a tensor of a NumPy number, without its value there
            given.value = float(given.value) if isinstance(given.value, np.floating) else given.value
    if case.transform == "none" and draw.random() < 0.03:
        case.transform = "thread"
    return case


def _excuse_meta(arguments: dict[str, Given]) -> None:
    """Beside a tensor without values a kernel for another device is as good as any, and a key without values as well."""
    if arguments["x"].says.startswith("meta "):
        for given in (arguments["key"], arguments.get("kernel", arguments["key"])):
            if (isinstance(given.value, Tensor) and given.value.is_meta) or given.says == "kernel 'cuda'":
                given.status = ODD


def _scalar_cast(draw: Draw, names: tuple[str, ...]) -> Case:
    name = draw.choice(names)
    fmt, x = inputs.scalar_format(draw), inputs.floats(draw)
    arguments = {"x": x, "fmt": fmt, "scale": inputs.scale(draw, x), **inputs.options(draw)}
    _excuse_meta(arguments)
    target = inputs.out(draw, x) if name in ("quantize", *PAIRS, "quantize_with_stats") else None
    if target is not None:
        arguments["out"] = target
    function = getattr(ops, name)
    if draw.random() < 0.02:
        arguments["axis"] = Given(draw.choice((0, -1, "x", None)), -1, "axis", ODD)
    case = Case(name, function, arguments, _plain_oracle(name, arguments))
    _transform(draw, case)
    return case


def _plain_oracle(name: str, arguments: dict[str, Given]) -> Callable[[], Any] | None:
    """The same call by the search kernel on plain tensors (plain torch for formats of more than 19 bits)."""
    if not isinstance(arguments["x"].plain, Tensor) or arguments["fmt"].plain is None:
        return None
    plain = {key: value.plain for key, value in arguments.items() if key not in ("out", "kernel", "axis")}
    if any(arguments[key].status != SOUND and plain[key] is None for key in plain):
        return None
    block = inputs.is_block(arguments["fmt"])
    slow = "eager" if block or get_format(plain["fmt"]).bits > 19 else "reference"
    if "axis" in arguments and block:
        plain["axis"] = arguments["axis"].plain
    name = "quantize" if name == "fake_quantize" else name
    return lambda: getattr(ops, name)(**plain, kernel=slow)


def _transform(draw: Draw, case: Case) -> None:
    """Sometimes puts the call under a functional transform, where its arguments allow one."""
    x = next(iter(case.arguments.values()))
    plain = x.plain
    if draw.random() > 0.12 or "out" in case.arguments or not isinstance(plain, Tensor) or x.status != SOUND:
        return
    if x.says.split()[0] in ("inference",):
        return
    names = [] if case.name == "fake_quantize" else ["functionalize"]  # torch has no rule for autograd functions there
    held = [case.arguments[key].value for key in ("scale", "key") if key in case.arguments]
    if not any(isinstance(value, Tensor) for value in held):  # which torch's tracer refuses to hold fast
        names += ["make_fx", "make_fx_fake"]
    if plain.ndim and plain.shape[0] and case.name in ELEMENTWISE:
        whole = case.arguments["scale"].plain
        scale_is_whole = not isinstance(whole, Tensor) or whole.ndim == 0
        keyed = case.arguments.get("rounding", Given(None, None, "")).plain == "stochastic"
        if scale_is_whole and not keyed:
            names += ["vmap", "vmap"]
            names += ["nested_vmap"] if plain.ndim > 1 and plain.shape[1] else []
            if whole == 1.0 and case.name != "decode" and case.oracle is not None:
                names.append("vmap_scale")
    if case.name == "fake_quantize":
        names += ["grad"] if x.says.split()[0] in ("expanded", "windows") else ["grad", "jvp"]  # torch has no jvp there
    if draw.random() < 0.02 and "leaked" not in case.says:  # whose wrapper torch's compiler itself refuses
        names = ["compile"]
    if not names:
        return
    case.transform = draw.choice(names)
    if case.transform == "vmap_scale":
        case.arguments["scale"] = Given(0.25, 0.25, "0.25 each")
        case.oracle = _plain_oracle(case.name, case.arguments)
    if case.transform == "grad" and case.oracle is not None:
        forward, like = case.oracle, plain
        case.oracle = lambda: (forward(), torch.ones_like(like))[1]


def _block_cast(draw: Draw, names: tuple[str, ...]) -> Case:
    name = draw.choice((*names, *PAIRS))
    fmt, x = inputs.block_format(draw), inputs.floats(draw)
    scale = inputs.scale(draw, x, block=True) if draw.random() < 0.2 else Given(1.0, 1.0, "")
    arguments = {"x": x, "fmt": fmt, "scale": scale, **inputs.options(draw)}
    _excuse_meta(arguments)
    if draw.random() < 0.7:
        arguments["pad"] = Given(True, True, "pad")
    if draw.random() < 0.4:
        axis = draw.choice((0, -1, 1, -2, 0, -1, 7, "0", None, 1.0))
        good = type(axis) is int and axis < 7
        arguments["axis"] = Given(axis, axis, f"axis {axis!r}", SOUND if good else ODD if axis == 1 else BAD)
    target = inputs.out(draw, x) if name == "quantize" else None
    if target is not None:
        arguments["out"] = target
    kernel = arguments.get("kernel")
    if kernel is not None and kernel.value in ("reference", "cpu"):
        arguments["kernel"] = Given("cpu", None, "kernel 'cpu'", ODD)  # does not cover every dtype and format
    oracle = _plain_oracle(name, arguments)
    if oracle is not None and "pad" in arguments:
        plain = {key: value.plain for key, value in arguments.items() if key not in ("out", "kernel")}
        oracle_name = "quantize" if name == "fake_quantize" else name
        oracle = lambda: getattr(ops, oracle_name)(**plain, kernel="eager")  # noqa: E731
    return Case(name, getattr(ops, name), arguments, oracle)


def _decode(draw: Draw, names: tuple[str, ...]) -> Case:
    fmt = inputs.scalar_format(draw)
    if fmt.plain is not None:
        fmt.status = SOUND  # a format of scales has codes, too
    bits = fmt.plain.bits if fmt.plain is not None else 8
    shape, status = inputs.shape_of(draw), SOUND
    kind = draw.choice((torch.uint8, torch.uint8, torch.int16, torch.int32, torch.int64))
    top = min(2**bits, torch.iinfo(kind).max + 1)
    codes = torch.from_numpy(draw.numpy().integers(0, top, shape)).to(kind)
    if codes.numel() and draw.random() < 0.15 and not (kind is torch.uint8 and bits >= 8):
        low = -5 if kind is not torch.uint8 else 2**bits
        codes.view(-1)[0] = draw.choice((low, min(2**bits, torch.iinfo(kind).max), torch.iinfo(kind).max))
        status = BAD if not 0 <= int(codes.view(-1)[0]) < 2**bits else SOUND
    group = draw.weighted(plain=6, layout=3, hollow=1, bad=0.7)
    given = Given(codes, codes, f"codes {list(shape)}", status)
    if group == "layout":
        make = draw.choice((inputs._transposed, inputs._strided, inputs._offset, inputs._expanded, inputs._windows))
        value = make(codes)
        plain = value.clone(memory_format=torch.contiguous_format)
        out_of_range = bool(plain.numel()) and not -1 < int(plain.min()) <= int(plain.max()) < 2**bits
        given = Given(value, plain, f"codes {make.__name__[1:]} {list(shape)}", BAD if out_of_range else SOUND)
    elif group == "hollow":
        which = draw.choice(("meta", "subclass", "no memory"))
        if which == "no memory":
            given = inputs.without_memory(draw, codes, "codes ")
        else:
            value = codes.to("meta") if which == "meta" else codes.as_subclass(Marked)
            given = Given(
                value, None if which == "meta" else codes, f"{which} codes", status if which != "meta" else ODD
            )
    elif group == "bad":
        which = draw.choice(list(inputs.BAD_TENSORS))
        value = inputs.BAD_TENSORS[which](torch.ones(3))
        given = Given(value, None, f"{which} codes", ODD if which == "integers" else BAD)
    dtype = draw.choice((*FLOATS, torch.float32, torch.float32))
    arguments = {
        "codes": given,
        "fmt": fmt,
        "scale": inputs.scale(draw, given),
        "dtype": Given(dtype, dtype, str(dtype)),
    }
    if draw.random() < 0.03:
        arguments["dtype"] = Given(
            draw.choice((torch.int32, None, "float32", 3, torch.float8_e5m2)), None, "dtype", BAD
        )
    if draw.random() < 0.2 and isinstance(given.plain, Tensor):
        like = Given(torch.empty(given.plain.shape, dtype=dtype), torch.empty(given.plain.shape), "plain like")
        target = inputs.out(draw, like)
        if (
            target is not None
            and "self" not in target.says
            and "overlaps" not in target.says
            and target.value is not like.value
        ):
            arguments["out"] = target
    kernel = draw.choice(("eager", "reference", "cpu")) if draw.random() < 0.2 else None
    if kernel is not None:
        arguments["kernel"] = Given(kernel, None, f"kernel {kernel!r}")

    def oracle() -> Tensor:
        return ops.decode(given.plain, fmt.plain, arguments["scale"].plain, dtype=dtype, kernel="reference")

    known = isinstance(given.plain, Tensor) and fmt.plain is not None and arguments["dtype"].status == SOUND
    case = Case("decode", ops.decode, arguments, oracle if known and arguments["scale"].plain is not None else None)
    _transform(draw, case)
    if case.transform not in ("none", "thread") and case.status == BAD:
        for argument in arguments.values():
            argument.status = min(argument.status, ODD)
        case.oracle = None  # codes out of range in traced code: any value, no memory
    return case


def _block_decode(draw: Draw, names: tuple[str, ...]) -> Case:
    fmt = inputs.block_format(draw)
    shape = draw.choice(((4, 32), (16,), (2, 3, 8), (64, 5)))
    x = inputs.content(draw, shape if len(shape) > 1 or not get_format(fmt.plain).is_tile else (16, 1), torch.float32)
    sound = ops.encode(torch.where(x.isfinite(), x, 0.0), fmt.plain, pad=True)
    assert isinstance(sound, QuantizedTensor)
    parts = {name: getattr(sound, name) for name in ("codes", "scales", "format", "axis", "shape", "tensor_scale")}
    status, spoiled = SOUND, "sound"
    if draw.random() < 0.5:
        spoiled = draw.choice(("codes", "scales", "shape", "axis", "meta scales", "range", "no memory"))
        status = BAD
        if spoiled == "codes":
            codes: Any = draw.choice((sound.codes.float(), sound.codes.to("meta"), sound.codes[:1], None))
            fits = isinstance(codes, Tensor) and codes.shape == sound.codes.shape and not codes.is_floating_point()
            parts["codes"], status = codes, ODD if fits or (codes is not None and len(sound.codes) == 1) else BAD
        elif spoiled == "scales":
            parts["scales"] = draw.choice(
                (sound.scales[..., :0], sound.scales.double(), None, sound.scales.to(torch.int64))
            )
        elif spoiled == "shape":
            parts["shape"], status = torch.Size([3]), ODD
        elif spoiled == "axis":
            parts["axis"] = draw.choice((9, "x", None))
        elif spoiled == "no memory":
            which = draw.choice(("codes", "scales", "tensor_scale"))
            if parts[which] is None:
                which = "scales"
            parts[which] = inputs.WITHOUT_MEMORY[draw.choice(("freed", "shrunk"))](parts[which])
        elif spoiled == "meta scales":
            parts["scales"] = sound.scales.to("meta")
        elif get_format(fmt.plain).element.bits < 8:
            parts["codes"] = torch.full_like(sound.codes, 255)
        else:
            status = SOUND
    given = Given(QuantizedTensor(**parts), sound, f"{fmt.says}, {spoiled}", status)
    dtype = draw.choice((torch.float32, torch.float64, torch.bfloat16))
    arguments = {"codes": given, "dtype": Given(dtype, dtype, str(dtype))}

    def oracle() -> Tensor:
        return ops.decode(sound, dtype=dtype, kernel="eager")

    return Case("decode", ops.decode, arguments, oracle if status == SOUND else None)


def _amax(draw: Draw, names: tuple[str, ...]) -> Case:
    x = inputs.floats(draw)
    arguments: dict[str, Given] = {"x": x}
    plain = x.plain
    axis: Any = None
    if draw.random() < 0.6:
        ndim = x.value.ndim if isinstance(x.value, Tensor) else 1
        axis = draw.choice((None, 0, -1, (0,), (0, -1), 5, -9, "x", 1.5, (0, 9), None, 0))
        axes = axis if isinstance(axis, tuple) else (axis,)
        inside = axis is None or all(type(a) is int and -ndim <= a < ndim for a in axes)
        inside = inside and (axis is None or len({a % ndim for a in axes}) == len(axes))
        arguments["axis"] = Given(axis, axis, f"axis {axis!r}", SOUND if inside else BAD)

    def largest() -> Tensor:
        wide = torch.where(plain.isfinite(), plain.abs(), 0).to(
            torch.float64 if plain.dtype == torch.float64 else torch.float32
        )
        kept = {a % wide.ndim for a in (axis if isinstance(axis, tuple) else (axis,))} if axis is not None else set()
        found = wide.numpy()
        if axis is None:
            return torch.from_numpy(np.asarray(found.max(initial=0)))
        gone = tuple(d for d in range(found.ndim) if d not in kept)
        return torch.from_numpy(np.asarray(found.max(axis=gone, keepdims=True, initial=0)))

    known = isinstance(plain, Tensor) and "axis" not in {k for k, v in arguments.items() if v.status != SOUND}
    if draw.random() < 0.5:
        return Case("amax", quantization.amax, arguments, largest if known else None)
    fmt = inputs.scalar_format(draw)
    if fmt.status == BAD and fmt.plain is not None:
        fmt.status = ODD  # E8M0 has a largest value, too
    power = draw.random() < 0.5
    arguments["fmt"], arguments["power_of_two"] = fmt, Given(power, power, f"power of two {power}")

    def scale() -> Tensor:
        found = largest().numpy()
        found = np.where(found > 0, found, np.ones((), found.dtype)) / found.dtype.type(fmt.plain.max)
        found = np.maximum(found, found.dtype.type(2.0**-126))
        if power:
            mantissa, exponent = np.frexp(found)
            found = np.ldexp(np.ones((), found.dtype), np.minimum(exponent - (mantissa == 0.5), 127))
        return torch.from_numpy(np.asarray(found))

    arguments = {"x": x, "fmt": fmt, **{k: v for k, v in arguments.items() if k not in ("x", "fmt")}}
    return Case("amax_scale", quantization.amax_scale, arguments, scale if known and fmt.plain is not None else None)


def _diagnostics(draw: Draw, names: tuple[str, ...]) -> Case:
    name = draw.choice(DIAGNOSTICS)
    function = getattr(quantization, name)
    fmt = inputs.block_format(draw) if name == "block_scales" else inputs.scalar_format(draw)
    if name == "get_format":
        status = SOUND if fmt.plain is not None else BAD
        return Case(name, function, {"name": Given(fmt.value, fmt.plain, fmt.says, status)}, lambda: None)
    instead = {"compute_stiffness_field": int, "compute_ulp_distance": type(None)}  # mantissa bits; no format
    if fmt.plain is not None or type(fmt.value) is instead.get(name):
        fmt.status = min(fmt.status, ODD)  # a format of scales has codes and a grid, too
    if name in ("code_index", "from_code_index"):
        kind = draw.choice((torch.uint8, torch.int32, torch.int64))
        given = torch.from_numpy(draw.numpy().integers(0, 127, inputs.shape_of(draw))).to(kind)
        first = "codes" if name == "code_index" else "index"
        if draw.random() < 0.2:
            which = draw.choice(list(inputs.BAD_TENSORS))
            value = inputs.BAD_TENSORS[which](torch.ones(3))
            return Case(name, function, {first: Given(value, None, which, ODD), "fmt": fmt}, None)
        return Case(name, function, {first: Given(given, given, str(kind), ODD), "fmt": fmt}, None)
    x = inputs.floats(draw)
    by_position = {"compute_stiffness_field": "weights", "grid_spacing": "weights", "grid_alignment_error": "weights"}
    first = by_position.get(name, "weights" if name == "grid_alignment_statistics" else "x")
    if name == "compute_ulp_distance":
        arguments = {"before": x, "after": Given(x.value, x.plain, "itself", x.status), "format": fmt}
    elif name == "block_scales":
        arguments = {"x": x, "fmt": fmt, "pad": Given(True, True, "pad")}
    elif name == "compute_stiffness_field":
        arguments = {first: x, "mantissa_bits_or_format": fmt}
    else:
        arguments = {first: x, "format": fmt, "scale": inputs.scale(draw, x)}
    for argument in arguments.values():
        argument.status = max(argument.status, ODD)  # these refuse more than a cast does; their values have own tests

    def oracle() -> Any:
        return function(**{key: argument.plain for key, argument in arguments.items()})

    known = all(argument.plain is not None for argument in arguments.values())
    return Case(name, function, arguments, oracle if known else None)
