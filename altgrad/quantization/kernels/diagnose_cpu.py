"""The fused CPU kernel of `measure_update`: one pass over before, gradient, attempted and after.

Each tile of at most 2048 elements stays in the first-level cache while short loops run over it: strict ones, which keep
every IEEE rounding, write per-element results to scratch, and reassociating ones sum them in float64. The grid index of
y is read off one float32 addition: next to C = 2^(e + 23 - M) floats are 2^(e - M) apart, so the bits of |y| + C exceed
those of C by k = round(|y| / 2^(e - M)), ties to even, and the ordered index is (e - emin) * 2^M + k.

Work is cut into chunks by the tensor's shape alone, so results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from altgrad.quantization.formats import FloatFormat
from altgrad.quantization.kernels import cpu_threads
from altgrad.quantization.kernels.cpu_llvm import add, band, bits_of, bxor, float_of, low_word, shl, shr, sub

TILE = 2048
CHUNK = 32768  # elements per chunk, about
BINS = 1024
FIELDS = 45  # len(UPDATE_FIELDS)
_WEIGHTS, _UPDATES, _STEPS, _ULPS = range(4)  # histograms

_strict = njit(nogil=True, cache=True, error_model="numpy")
_inline = njit(forceinline=True, error_model="numpy")
_sums = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "nnan", "ninf"})

_U0, _U1 = np.uint32(0), np.uint32(1)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INF = np.uint32(0x7F800000)
_U21, _U23, _U31, _U127, _U254 = (np.uint32(n) for n in (21, 23, 31, 127, 254))
_W52, _W1173 = np.uint64(52), np.uint64(1173)


@intrinsic
def pick(typing_context, condition, a, b):
    """a if condition else b, as one select instruction: a branch here can keep a loop from being vectorized."""
    if condition != types.boolean or a != b:
        raise TypeError(f"pick takes a boolean and two values of one type, not {condition}, {a}, {b}")

    def generate(context, builder, signature, args):
        return builder.select(*args)

    return a(condition, a, b), generate


@intrinsic
def larger(typing_context, a, b):
    """The larger of two uint32."""

    def generate(context, builder, signature, args):
        return builder.select(builder.icmp_unsigned(">", *args), *args)

    return types.uint32(types.uint32, types.uint32), generate


@intrinsic
def smaller(typing_context, a, b):
    """The smaller of two uint32."""

    def generate(context, builder, signature, args):
        return builder.select(builder.icmp_unsigned("<", *args), *args)

    return types.uint32(types.uint32, types.uint32), generate


@_inline
def _grid_index(magnitude, bits_m, emin_field, uniform, largest, own):
    """(index, rounded value) of the magnitude bits of a finite y."""
    y = float_of(magnitude)
    y = pick(y < largest, y, largest)
    field = larger(shr(bits_of(y), _U23), emin_field)
    field = pick(uniform, emin_field, field)
    pivot_bits = shl(add(field, sub(_U23, bits_m)), _U23)
    pivot = float_of(pivot_bits)
    raised = y + pivot
    index = add(shl(sub(field, emin_field), bits_m), sub(bits_of(raised), pivot_bits))
    return pick(own, magnitude, index), pick(own, y, raised - pivot)


@_strict
def _weights_and_gradients(w, g, bits_m, uniform, near_zero, kept_w, kept_g, stiff, pair_s, pair_g, inverse):
    """Fill the scratch rows; return counts and extremes (as bits) of weights and gradients."""
    w_zero = w_bad = w_top = g_zero = g_near = g_bad = g_top = n_stiff = n_pair = n_below = _U0
    s_low = g_low = _INF
    s_top = pg_top = _U0
    uniform_field = sub(_U127, bits_m)
    for i in range(len(w)):
        wm, gm = band(bits_of(w[i]), _MAGNITUDE), band(bits_of(g[i]), _MAGNITUDE)
        w_fine, g_fine = wm < _INF, gm < _INF
        w_zero = add(w_zero, pick(wm == _U0, _U1, _U0))
        w_bad = add(w_bad, pick(w_fine, _U0, _U1))
        wk = pick(w_fine, wm, _U0)
        w_top = larger(wk, w_top)
        kept_w[i] = float_of(wk)
        g_zero = add(g_zero, pick(gm == _U0, _U1, _U0))
        g_bad = add(g_bad, pick(g_fine, _U0, _U1))
        gk = pick(g_fine, gm, _U0)
        g_top = larger(gk, g_top)
        magnitude = float_of(gk)
        kept_g[i] = magnitude
        g_near = add(g_near, pick((magnitude < near_zero) & (gk > _U0), _U1, _U0))

        field = shr(wm, _U23)
        lowered = pick(uniform, uniform_field, sub(field, bits_m))  # wraps to a huge number below bits_m
        has = w_fine & (field > _U0) & (lowered > _U0) & (lowered < _U254)
        n_stiff = add(n_stiff, pick(has, _U1, _U0))
        s_bits = shl(lowered, _U23)
        stiff[i] = float_of(pick(has, s_bits, _U0))
        pair = has & g_fine
        n_pair = add(n_pair, pick(pair, _U1, _U0))
        pair_s[i] = float_of(pick(pair, s_bits, _U0))
        pair_g[i] = float_of(pick(pair, gk, _U0))
        inverse[i] = float_of(pick(pair, shl(sub(_U254, lowered), _U23), _U0))
        n_below = add(n_below, pick(pair & (gk < s_bits), _U1, _U0))
        s_low = smaller(pick(pair, s_bits, _INF), s_low)
        s_top = larger(pick(pair, s_bits, _U0), s_top)
        g_low = smaller(pick(pair, gk, _INF), g_low)
        pg_top = larger(pick(pair, gk, _U0), pg_top)
    return w_zero, w_bad, w_top, g_zero, g_near, g_bad, g_top, n_stiff, n_pair, n_below, s_low, s_top, g_low, pg_top


@_strict
def _grid_movement(w, z, scale, bits_m, emin_field, uniform, largest, own, scaled_w, error, steps):
    """Fill the scratch rows: bits of |w / s| (a mask for inf and NaN), alignment error, steps moved."""
    n_on = error_top = n_both = n_flips = steps_top = _U0
    for i in range(len(w)):
        s = scale[i]
        w_bits, z_bits = bits_of(w[i]), bits_of(z[i])
        wm, zm = band(w_bits, _MAGNITUDE), band(z_bits, _MAGNITUDE)
        w_fine, z_fine = wm < _INF, zm < _INF
        both = w_fine & z_fine
        wk, zk = pick(w_fine, wm, _U0), pick(z_fine, zm, _U0)
        yb, yz = bits_of(float_of(wk) / s), bits_of(float_of(zk) / s)
        scaled_w[i] = pick(w_fine, yb, _MAGNITUDE)
        before, value = _grid_index(yb, bits_m, emin_field, uniform, largest, own)
        after, _ = _grid_index(yz, bits_m, emin_field, uniform, largest, own)
        gap = band(bits_of(float_of(wk) - value * s), _MAGNITUDE)
        gap = pick(own, _U0, gap)
        error[i] = float_of(gap)
        error_top = larger(gap, error_top)
        n_on = add(n_on, pick(w_fine & (gap == _U0), _U1, _U0))
        ahead, behind = sub(after, before), sub(before, after)
        step = pick(after > before, ahead, behind)
        step = pick(shr(bxor(w_bits, z_bits), _U31) > _U0, add(after, before), step)
        step = pick(both, step, _U0)
        steps[i] = step
        steps_top = larger(step, steps_top)
        n_both = add(n_both, pick(both, _U1, _U0))
        n_flips = add(n_flips, pick(step > _U0, _U1, _U0))
    return n_on, error_top, n_both, n_flips, steps_top


@_strict
def _updates(w, a, z, scale, steps, update, scaled_u):
    """Fill the scratch rows: |update| and the bits of |update / s| (a mask where nothing was attempted)."""
    n_tried = u_bad = u_top = n_stalled = _U0
    for i in range(len(w)):
        u = band(bits_of(a[i] - w[i]), _MAGNITUDE)
        u_fine = u < _INF
        u_bad = add(u_bad, pick(u_fine, _U0, _U1))
        u = pick(u_fine, u, _U0)
        u_top = larger(u, u_top)
        update[i] = float_of(u)
        tried = u > _U0
        n_tried = add(n_tried, pick(tried, _U1, _U0))
        scaled_u[i] = pick(tried, bits_of(float_of(u) / scale[i]), _MAGNITUDE)
        both = (band(bits_of(w[i]), _MAGNITUDE) < _INF) & (band(bits_of(z[i]), _MAGNITUDE) < _INF)
        n_stalled = add(n_stalled, pick(tried & both & (steps[i] == _U0), _U1, _U0))
    return n_tried, u_bad, u_top, n_stalled


@_strict
def _carrier_movement(w, z, ulps):
    """Fill the scratch row: ULPs of the carrier moved (0 where not finite); return how many moved."""
    n_moved = _U0
    for i in range(len(w)):
        wm, zm = band(bits_of(w[i]), _MAGNITUDE), band(bits_of(z[i]), _MAGNITUDE)
        both = (wm < _INF) & (zm < _INF)
        n_moved = add(n_moved, pick(both & (w[i] != z[i]), _U1, _U0))
        kept_w, kept_z = pick(both, w[i], np.float32(0.0)), pick(both, z[i], np.float32(0.0))
        field = larger(shr(pick(both, wm, _U0), _U23), _U1)
        per_ulp = float_of(shl(sub(_W1173, low_word(_W52, field)), _W52))  # 2^(150 - field)
        ulps[i] = abs(np.float64(kept_z) - np.float64(kept_w)) * per_ulp
    return n_moved


@_sums
def _sum_pairs(n, kept_w, kept_g, stiff, pair_s, pair_g, inverse):
    ww = gg = s = ps = pss = pg = pgg = pgs = ratio = 0.0
    for i in range(n):
        x, y = np.float64(kept_w[i]), np.float64(kept_g[i])
        ww += x * x
        gg += y * y
        s += np.float64(stiff[i])
    for i in range(n):
        a, b = np.float64(pair_s[i]), np.float64(pair_g[i])
        ps += a
        pss += a * a
        pg += b
        pgg += b * b
        pgs += a * b
        ratio += b * np.float64(inverse[i])
    return ww, gg, s, ps, pss, pg, pgg, pgs, ratio


@_sums
def _sum_movement(n, error, update, steps, ulps):
    e = ee = uu = k = ulp = ulp_top = 0.0
    for i in range(n):
        x, y = np.float64(error[i]), np.float64(update[i])
        e += x
        ee += x * x
        uu += y * y
    for i in range(n):
        ulp += ulps[i]
        ulp_top = ulps[i] if ulps[i] > ulp_top else ulp_top
        k += np.float64(steps[i])
    return e, ee, uu, k, ulp, ulp_top


@_strict
def _count_bins(n, scaled_w, scaled_u, steps, ulps, finite_both, histograms):
    """Count the tile into the four histograms; masked entries hold the mask value or are not moved."""
    weights, updates, moved, ulp_bins = histograms[0], histograms[1], histograms[2], histograms[3]
    for i in range(n):
        if scaled_w[i] != _MAGNITUDE:
            weights[shr(scaled_w[i], _U21)] += 1
        if scaled_u[i] != _MAGNITUDE:
            updates[shr(scaled_u[i], _U21)] += 1
    still, same = np.int64(finite_both), np.int64(finite_both)
    for i in range(n):
        if steps[i] != _U0:
            moved[shr(bits_of(np.float32(steps[i])), _U21)] += 1
            still -= 1
        if ulps[i] != 0.0:
            ulp_bins[shr(bits_of(np.float32(ulps[i])), _U21)] += 1
            same -= 1
    moved[0] += still
    ulp_bins[0] += same


@_strict
def _mark_used(g, used):
    """Mark the columns with a gradient; return whether there was any."""
    any_used = np.uint8(0)
    for i in range(len(g)):
        nonzero = np.uint8(1) if g[i] != 0 else np.uint8(0)
        used[i] |= nonzero
        any_used |= nonzero
    return any_used


@_strict
def _chunk(w, g, a, z, scales, near_zero, has_g, grid, partial, histograms, used, first, last, start, stop):
    """Rows first..last, columns start..stop, into one row of partial results."""
    bits_m, emin_field, uniform, largest, own = grid
    kept_w, kept_g = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    stiff, pair_s = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    pair_g, inverse = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    error, update = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    scaled_w, scaled_u, steps = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    ulps, scale = np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    p = partial
    p[18] = p[22] = np.inf
    p[19] = p[23] = -np.inf
    for r in range(first, last):
        row_used = np.uint8(0)
        for lo in range(start, stop, TILE):
            hi = min(lo + TILE, stop)
            n = hi - lo
            tw, tg, ta, tz = w[r, lo:hi], g[r, lo:hi], a[r, lo:hi], z[r, lo:hi]
            if scales.shape[1] > 1:
                scale[:n] = scales[r, lo:hi]
            else:
                scale[:n] = scales[min(r, scales.shape[0] - 1), 0]
            c = _weights_and_gradients(
                tw, tg, bits_m, uniform, near_zero, kept_w, kept_g, stiff, pair_s, pair_g, inverse
            )
            p[0] += n
            p[1] += c[0]
            p[2] += c[1]
            p[3] = max(p[3], float_of(c[2]))
            t = _sum_pairs(n, kept_w, kept_g, stiff, pair_s, pair_g, inverse)
            p[4] += t[0]
            p[13] += c[7]
            p[14] += t[2]
            if has_g:
                p[5] += n
                p[6] += c[3]
                p[7] += c[4]
                p[8] += c[5]
                p[9] = max(p[9], float_of(c[6]))
                p[10] += t[1]
                p[15] += c[8]
                p[16] += t[3]
                p[17] += t[4]
                p[20] += t[5]
                p[21] += t[6]
                p[24] += t[7]
                p[25] += t[8]
                p[26] += c[9]
                if c[8] > _U0:
                    p[18], p[19] = min(p[18], float_of(c[10])), max(p[19], float_of(c[11]))
                    p[22], p[23] = min(p[22], float_of(c[12])), max(p[23], float_of(c[13]))
                if len(used):
                    row_used |= _mark_used(tg, used[lo:hi])
            m = _grid_movement(tw, tz, scale, bits_m, emin_field, uniform, largest, own, scaled_w, error, steps)
            u = _updates(tw, ta, tz, scale, steps, update, scaled_u)
            n_moved = _carrier_movement(tw, tz, ulps)
            t2 = _sum_movement(n, error, update, steps, ulps)
            p[27] += t2[0]
            p[28] += t2[1]
            p[29] = max(p[29], float_of(m[1]))
            p[30] += m[0]
            p[31] += u[0]
            p[32] += u[1]
            p[33] = max(p[33], float_of(u[2]))
            p[34] += t2[2]
            p[35] += u[3]
            p[36] += m[2]
            p[37] += m[3]
            p[38] += t2[3]
            p[39] = max(p[39], np.float64(m[4]))
            p[41] += n_moved
            p[42] += t2[4]
            p[43] = max(p[43], t2[5])
            _count_bins(n, scaled_w, scaled_u, steps, ulps, m[2], histograms)
        if len(used) and row_used == 0:
            p[11] += 1


@_inline
def _one_chunk(c, w, g, a, z, scales, near_zero, has_g, grid, partial, histograms, used, per_chunk):
    rows, columns = w.shape
    if rows > 1:
        first, last, start, stop = c * per_chunk, min((c + 1) * per_chunk, rows), 0, columns
    else:
        first, last, start, stop = 0, 1, c * CHUNK, min((c + 1) * CHUNK, columns)
    _chunk(w, g, a, z, scales, near_zero, has_g, grid, partial[c], histograms[c], used[c], first, last, start, stop)


@njit(nogil=True, cache=True, error_model="numpy")
def _serial(w, g, a, z, scales, near_zero, has_g, grid, partial, histograms, used, per_chunk):
    for c in range(len(partial)):
        _one_chunk(c, w, g, a, z, scales, near_zero, has_g, grid, partial, histograms, used, per_chunk)


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _parallel(w, g, a, z, scales, near_zero, has_g, grid, partial, histograms, used, per_chunk):
    for c in prange(len(partial)):
        _one_chunk(c, w, g, a, z, scales, near_zero, has_g, grid, partial, histograms, used, per_chunk)


@_inline
def _median(histogram):
    """Lower edge of the bin that holds the lower median; NaN for an empty histogram."""
    total = 0
    for b in range(BINS):
        total += histogram[b]
    if total == 0:
        return np.nan
    below = 0
    for b in range(BINS):
        below += histogram[b]
        if below >= (total + 1) // 2:
            return np.float64(float_of(shl(np.uint32(b), _U21)))
    return np.nan


@_strict
def _merge(partial, histograms, used, with_units, vector, kept):
    """Combine the chunks, in order."""
    chunks = len(partial)
    vector[:] = partial[0, :FIELDS]
    for c in range(1, chunks):
        for f in range(FIELDS):
            if f == 3 or f == 9 or f == 19 or f == 23 or f == 29 or f == 33 or f == 39 or f == 43:
                vector[f] = max(vector[f], partial[c, f])
            elif f == 18 or f == 22:
                vector[f] = min(vector[f], partial[c, f])
            else:
                vector[f] += partial[c, f]
    summed = np.zeros((4, BINS), np.int64)
    for c in range(chunks):
        for h in range(4):
            for b in range(BINS):
                summed[h, b] += histograms[c, h, b]
    kept[:] = summed[:2]
    vector[40], vector[44] = _median(summed[2]), _median(summed[3])
    if with_units:
        dead = 0
        for column in range(used.shape[1]):
            any_used = np.uint8(0)
            for c in range(chunks):
                any_used |= used[c, column]
            dead += 1 - any_used
        vector[12] = dead
    else:
        vector[11] = vector[12] = np.nan


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Numba's pool set to `count` threads, and left as found."""
    found = numba.get_num_threads()
    lock = nullcontext() if cpu_threads._layer_is_thread_safe() else cpu_threads._not_thread_safe
    with lock:
        numba.set_num_threads(count)
        try:
            yield
        finally:
            numba.set_num_threads(found)


def _scales(scale, like: Tensor, rows: int) -> np.ndarray:
    """The scale as [1, 1], [rows, 1] or [rows, columns] float32."""
    if not isinstance(scale, Tensor):
        return np.full((1, 1), scale, dtype=np.float32)
    if scale.numel() == 1:
        return scale.detach().numpy().reshape(1, 1)
    if like.ndim == 2 and scale.shape == (rows, 1):
        return scale.detach().contiguous().numpy()
    return scale.detach().expand(like.shape).contiguous().numpy().reshape(rows, -1)


def supports(fmt: FloatFormat, scale, before, gradient, attempted, after) -> bool:
    """Whether the kernel takes these tensors: contiguous float32 on the CPU, a scale per tensor, row or element, and a
    grid with gradual underflow of at most 22 mantissa bits whose values are at most 2^104 (or float32's own)."""
    for t in (before, gradient, attempted, after):
        if t is not None and not (t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()):
            return False
    if isinstance(scale, Tensor) and scale.dtype != torch.float32:
        return False
    own = fmt.name == "FP32"
    gradual = fmt.has_subnormals or fmt.mantissa_bits == 0
    return own or (gradual and fmt.has_zero and fmt.mantissa_bits <= 22 and fmt.emax + 23 - fmt.mantissa_bits <= 126)


def measure(fmt: FloatFormat, scale, near_zero: float, before, gradient, attempted, after) -> tuple[Tensor, Tensor]:
    """(vector of UPDATE_FIELDS, int64 [2, BINS] histograms of |w / scale| and |update / scale|)."""
    matrix = before.ndim == 2
    rows, columns = before.shape if matrix else (1, before.numel())
    w, a, z = (t.numpy().reshape(rows, columns) for t in (before, attempted, after))
    g = w if gradient is None else gradient.numpy().reshape(rows, columns)
    scales = _scales(scale, before, rows)
    per_chunk = max(1, CHUNK // columns) if rows > 1 else 1
    chunks = -(-rows // per_chunk) if rows > 1 else -(-columns // CHUNK)
    partial = np.zeros((chunks, FIELDS))
    histograms = np.zeros((chunks, 4, BINS), dtype=np.int32)
    used = np.zeros((chunks, columns if matrix and gradient is not None else 0), dtype=np.uint8)
    own = fmt.name == "FP32"
    grid = (
        np.uint32(fmt.mantissa_bits),
        np.uint32(0 if own else fmt.emin + 127),
        fmt.bias is None,
        np.float32(fmt.max),
        own,
    )
    arguments = (w, g, a, z, scales, np.float32(near_zero), gradient is not None, grid, partial, histograms, used)
    threads = min(chunks, cpu_threads.threads_for(before.numel()))
    if threads == 1:
        _serial(*arguments, per_chunk)
    else:
        with _threads(threads):
            _parallel(*arguments, per_chunk)
    vector, kept = np.empty(FIELDS), np.empty((2, BINS), dtype=np.int64)
    _merge(partial, histograms, used, matrix and gradient is not None, vector, kept)
    return torch.from_numpy(vector), torch.from_numpy(kept)
