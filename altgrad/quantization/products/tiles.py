"""The inner products in registers, in LLVM: a tile of 8 x 32 sums over words that hold 2 bf16 or 4 bytes each.

A panel holds 32 rows of an operand, word by word: first 32 words that sums start from, then for each word along the
reduction those of the 32 rows side by side. A tile takes 8 rows of a left panel and all 32 of a right one:

    sum[i, j] = start[j] + products of left word (g, i) with right word (g, j), added over g

On CPUs with the instruction a product of words is one (`vdpbf16ps`, `vpdpbusd`); where it is lacking, or emulated on
demand, the same sums are spelled out: for bf16 the odd and the even product are added one after the other, each exact and
rounded once, for bytes in integers. `vpdpbusd` takes its left bytes as unsigned: they carry + 128, and sums start from
-128 times the sum of the right ones. Words of two int16 (`vpmaddwd`) or of one float32 are for CPUs without either.

The sums of a tile stay in registers, of which AVX2 has a quarter: there it is 4 rows high, and its 32 columns are taken 16
at a time.
"""

from __future__ import annotations

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from altgrad.quantization.products.units import GROUP, Unit

PANEL_ROWS = 32
TILE_ROWS, NARROW_TILE_ROWS, LANES = 8, 4, 16
VECTORS = PANEL_ROWS // LANES  # of a tile's row

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
WORDS, FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_SHORTS = ir.VectorType(_I16, 2 * LANES)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_LLVM = llvm_version_info[0]
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES) if _LLVM >= 16 else WORDS  # as the two instructions declare their words
_FOURS = ir.VectorType(_I8, 4 * LANES) if _LLVM >= 22 else WORDS


def _words(number: int):
    return ir.Constant(WORDS, [number] * LANES)


def _at(builder, address, words):
    """Pointer to a vector, an address plus a number of words (a constant or a value)."""
    if isinstance(words, int):
        words = ir.Constant(_I64, words)
    place = builder.add(address, builder.shl(words, ir.Constant(_I64, 2)))
    return builder.inttoptr(place, WORDS.as_pointer())


def broadcast(builder, word):
    """A word in every lane."""
    single = builder.insert_element(ir.Constant(WORDS, ir.Undefined), word, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, ir.Constant(WORDS, ir.Undefined), ir.Constant(WORDS, None))


def _dot_bf16(builder, total, left, right):
    kind = ir.FunctionType(FLOATS, [FLOATS, _PAIRS, _PAIRS])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(instruction, [total, builder.bitcast(left, _PAIRS), builder.bitcast(right, _PAIRS)])


def products_of_words(builder, unit: Unit, left, right) -> list:
    """The products of two vectors of words, each exact, one after the other along the reduction: float32 or int32.

    Bytes are signed.
    """

    def signed(word, at: int, bits: int):
        return builder.ashr(builder.shl(word, _words(32 - bits - at)), _words(32 - bits))

    def odd(word):
        return builder.bitcast(builder.and_(word, _words(0xFFFF0000)), FLOATS)

    def even(word):
        return builder.bitcast(builder.shl(word, _words(16)), FLOATS)

    if not unit.sums_integers:
        return [builder.fmul(half(left), half(right)) for half in (even, odd)]
    bits = 32 // GROUP[unit]
    return [builder.mul(signed(left, at, bits), signed(right, at, bits)) for at in range(0, 32, bits)]


def _dot_bf16_emulated(builder, total, left, right):
    for product in reversed(products_of_words(builder, Unit.BF16, left, right)):
        total = builder.fadd(total, product)
    return total


def _dot_int8(builder, total, left, right):
    kind = ir.FunctionType(WORDS, [WORDS, _FOURS, _FOURS])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(instruction, [total, builder.bitcast(left, _FOURS), builder.bitcast(right, _FOURS)])


def _dot_int8_emulated(builder, total, left, right):
    for byte in range(4):
        unsigned = builder.and_(builder.lshr(left, _words(8 * byte)), _words(0xFF))
        signed = builder.ashr(builder.shl(right, _words(24 - 8 * byte)), _words(24))
        total = builder.add(total, builder.mul(unsigned, signed))
    return total


def _dot_int16(builder, total, left, right):
    kind = ir.FunctionType(WORDS, [_SHORTS, _SHORTS])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pmaddw.d.512")
    return builder.add(
        total, builder.call(instruction, [builder.bitcast(left, _SHORTS), builder.bitcast(right, _SHORTS)])
    )


def _dot_int16_narrow(builder, total, left, right):
    half, shorts = ir.VectorType(_I32, LANES // 2), ir.VectorType(_I16, LANES)
    kind = ir.FunctionType(half, [shorts, shorts])
    instruction = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
    halves = []
    for start in (0, LANES // 2):
        picked = ir.Constant(half, list(range(start, start + LANES // 2)))
        given = [builder.bitcast(builder.shuffle_vector(t, t, picked), shorts) for t in (left, right)]
        halves.append(builder.call(instruction, given))
    return builder.add(total, builder.shuffle_vector(*halves, ir.Constant(WORDS, list(range(LANES)))))


def _dot_int16_emulated(builder, total, left, right):
    for product in products_of_words(builder, Unit.INT16, left, right):
        total = builder.add(total, product)
    return total


def _dot_float32(builder, total, left, right):
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    fused = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
    return builder.call(fused, [builder.bitcast(left, FLOATS), builder.bitcast(right, FLOATS), total])


def _dot_float32_emulated(builder, total, left, right):
    # products of 8 significant bits each are exact: the same sums as those of one rounding
    return builder.fadd(total, builder.fmul(builder.bitcast(left, FLOATS), builder.bitcast(right, FLOATS)))


_DOTS = {
    (Unit.BF16, False): _dot_bf16,
    (Unit.BF16, True): _dot_bf16_emulated,
    (Unit.INT8, False): _dot_int8,
    (Unit.INT8, True): _dot_int8_emulated,
    (Unit.INT16, False): _dot_int16,
    (Unit.INT16, True): _dot_int16_emulated,
    (Unit.FLOAT32, False): _dot_float32,
    (Unit.FLOAT32, True): _dot_float32_emulated,
}


def scaled(builder, total, factor, unit: Unit):
    """Sums times a float64 factor, rounded once to float32."""
    halves = []
    for part in (range(8), range(8, 16)):
        picked = builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(_I32, 8), list(part)))
        wide = ir.VectorType(_F64, 8)
        value = builder.sitofp(picked, wide) if unit.sums_integers else builder.fpext(picked, wide)
        single = builder.insert_element(ir.Constant(wide, ir.Undefined), factor, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, 8), None)
        product = builder.fmul(value, builder.shuffle_vector(single, single, zeros))
        halves.append(builder.fptrunc(product, ir.VectorType(_F32, 8)))
    return builder.shuffle_vector(*halves, ir.Constant(WORDS, list(range(LANES))))


def tile(unit: Unit, emulated: bool, narrow: bool = False):
    """The intrinsic of one tile, see `_tile`; `narrow`: for AVX2's registers."""
    dot = _dot_int16_narrow if (unit, emulated, narrow) == (Unit.INT16, False, True) else _DOTS[unit, emulated]
    sums = WORDS if unit.sums_integers else FLOATS
    height = NARROW_TILE_ROWS if narrow else TILE_ROWS
    passes = [[v] for v in range(VECTORS)] if narrow else [list(range(VECTORS))]  # vectors of columns taken together

    def add(builder, a, b):
        return (builder.add if unit.sums_integers else builder.fadd)(a, b)

    def one_pass(builder, vectors, left, right, words, out, stride, adds, last, factor, bias):
        totals = [[cgutils.alloca_once(builder, sums) for _ in vectors] for _ in range(height)]
        starts = [builder.load(_at(builder, right, LANES * v), align=64) for v in vectors]
        for row in totals:
            for total, start in zip(row, starts, strict=True):
                builder.store(builder.bitcast(start, sums), total)
        first = builder.add(right, ir.Constant(_I64, 4 * PANEL_ROWS))
        with cgutils.for_range(builder, words) as loop:
            group = builder.mul(loop.index, ir.Constant(_I64, PANEL_ROWS))
            columns = [
                builder.load(_at(builder, first, builder.add(group, ir.Constant(_I64, LANES * v))), align=64)
                for v in vectors
            ]
            for i, row in enumerate(totals):
                word = _at(builder, left, builder.add(group, ir.Constant(_I64, i)))
                spread = broadcast(builder, builder.load(builder.bitcast(word, _I32.as_pointer()), align=4))
                for total, column in zip(row, columns, strict=True):
                    builder.store(dot(builder, builder.load(total), spread, column), total)
        places = []
        for i, row in enumerate(totals):
            line = builder.mul(stride, ir.Constant(_I64, i))
            for v, total in zip(vectors, row, strict=True):
                places.append((_at(builder, out, builder.add(line, ir.Constant(_I64, LANES * v))), v, total))
        with builder.if_then(builder.icmp_unsigned("!=", adds, ir.Constant(_I64, 0))):
            for place, _, total in places:
                earlier = builder.bitcast(builder.load(place, align=4), sums)
                builder.store(add(builder, builder.load(total), earlier), total)
        with builder.if_else(builder.icmp_unsigned("!=", last, ir.Constant(_I64, 0))) as (finish, keep):
            with finish:
                has_bias = builder.icmp_unsigned("!=", bias, ir.Constant(_I64, 0))
                with builder.if_else(has_bias) as (biased, plain):
                    with biased:
                        for place, v, total in places:
                            value = scaled(builder, builder.load(total), factor, unit)
                            shift = builder.load(_at(builder, bias, LANES * v), align=4)
                            value = builder.fadd(value, builder.bitcast(shift, FLOATS))
                            builder.store(builder.bitcast(value, WORDS), place, align=4)
                    with plain:
                        for place, _, total in places:
                            value = scaled(builder, builder.load(total), factor, unit)
                            builder.store(builder.bitcast(value, WORDS), place, align=4)
            with keep:
                for place, _, total in places:
                    builder.store(builder.bitcast(builder.load(total), WORDS), place, align=4)

    @intrinsic
    def _tile(typing_context, left, right, words, out, stride, adds, last, factor, bias):
        """One tile to memory.

        left: address of the left panel's word (0, first row). right: address of the right panel. words: along the
        reduction. out: where the rows of 32 sums go, `stride` sums apart. adds: add to what is there. last: the sums times
        `factor`, plus 32 floats at `bias` (0: none), as float32; else the raw sums.
        """

        def generate(context, builder, signature, args):
            for vectors in passes:
                one_pass(builder, vectors, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.float64, types.int64), generate

    return _tile


def starts(unit: Unit):
    """The intrinsic that fills the 32 words that a panel's sums start from, see `_starts`."""

    @intrinsic
    def _starts(typing_context, panel, words):
        """Zeros for bf16; for bytes -128 times the sums of a panel's rows over its `words` words."""

        def generate(context, builder, signature, args):
            panel, words = args
            first = builder.add(panel, ir.Constant(_I64, 4 * PANEL_ROWS))
            for v in range(VECTORS):
                total = cgutils.alloca_once_value(builder, ir.Constant(WORDS, None))
                if unit is Unit.INT8:
                    with cgutils.for_range(builder, words) as loop:
                        at = builder.mul(loop.index, ir.Constant(_I64, PANEL_ROWS))
                        row = builder.load(_at(builder, first, builder.add(at, ir.Constant(_I64, LANES * v))), align=64)
                        for byte in range(4):
                            signed = builder.ashr(builder.shl(row, _words(24 - 8 * byte)), _words(24))
                            builder.store(builder.sub(builder.load(total), signed), total)
                sums = builder.shl(builder.load(total), _words(7))
                builder.store(sums, _at(builder, panel, LANES * v), align=64)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return _starts


@intrinsic
def transposed_words(typing_context, source, source_words, target, target_words, flips):
    """16 rows of 16 words at `source` to 16 columns at `target`; rows lie so many words apart, `flips` is xored in."""

    def generate(context, builder, signature, args):
        source, source_words, target, target_words, flips = args

        def row_of(address, words, i):
            return _at(builder, address, builder.mul(words, ir.Constant(_I64, i)))

        rows = [builder.load(row_of(source, source_words, i), align=64) for i in range(LANES)]
        for step in (8, 4, 2, 1):  # exchange the off-diagonal blocks of that size
            low = [(j if j % (2 * step) < step else j - step + LANES) for j in range(LANES)]
            high = [(j + step if j % (2 * step) < step else j + LANES) for j in range(LANES)]
            for i in range(LANES):
                if i % (2 * step) < step:
                    a, b = rows[i], rows[i + step]
                    rows[i] = builder.shuffle_vector(a, b, ir.Constant(WORDS, low))
                    rows[i + step] = builder.shuffle_vector(a, b, ir.Constant(WORDS, high))
        flip = broadcast(builder, builder.trunc(flips, _I32))
        for i, row in enumerate(rows):
            builder.store(builder.xor(row, flip), row_of(target, target_words, i), align=64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def put_byte(typing_context, address, index, value):
    """Write a byte where codes of the input are read later: unlike `store_code` it promises no independence of them."""

    def generate(context, builder, signature, args):
        address, index, value = args
        place = builder.inttoptr(builder.add(address, index), _I8.as_pointer())
        builder.store(builder.trunc(value, _I8), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def put_word(typing_context, address, index, value):
    """Write a 32-bit word."""

    def generate(context, builder, signature, args):
        address, index, value = args
        builder.store(value, builder.bitcast(_at(builder, address, index), _I32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint32), generate


@intrinsic
def word_at(typing_context, address, index):
    """The 32-bit word at an index."""

    def generate(context, builder, signature, args):
        return builder.load(builder.bitcast(_at(builder, *args), _I32.as_pointer()), align=4)

    return types.uint32(types.int64, types.int64), generate
