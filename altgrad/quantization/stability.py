"""Two interventions against a collapse: a gradient clip sized by the format's range, and a shift to another format.

Both are decisions on measured numbers; neither touches a file or a clock. The trainer calls them inside the step's
transaction: the clip acts on finite gradients before the optimizer, the shift changes the recipe from the next step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from altgrad.errors import OptionError
from altgrad.formats.block import BlockFormat
from altgrad.formats.catalog import block_format, get_format
from altgrad.formats.scalar import FloatFormat
from altgrad.formats.scalar_rows import E5M2

BASELINE_MAX = E5M2.max  # 57344: the range at which `base_clip` is the clip threshold itself

FALLBACK_CHAIN: Mapping[str, str | None] = MappingProxyType(
    {"E7M0": "E5M2", "E1M6": "E3M4", "E0M7": "E3M4", "E3M4": "E5M2", "E5M2": None}
)

WIDER_ELEMENTS = ("E2M3", "E4M3", "FP16")
"""Elements that a block format's element is widened to: MXFP4 > MXFP6 > MXFP8 > FP16 in the same blocks."""


def wider_block(format: BlockFormat) -> str | None:
    """Name of the same blocks and scales with the next wider element that has every value of the present one.

    The block's scale already follows the range, so what a block format lacks is room within a block: significant bits,
    and binades below the block's amax. None where no element is wider.

    >>> wider_block(get_format("MXFP4"))
    'MXFP6'
    >>> wider_block(get_format("MXFP8_E5M2"))
    'FP16/32:E8M0:floor'
    """
    own = format.element
    for element in map(get_format, WIDER_ELEMENTS):
        holds = element.mantissa_bits >= own.mantissa_bits and element.max >= own.max
        if element.bits > own.bits and holds and element.min_subnormal <= own.min_subnormal:
            rule = format.rule if format.power_of_two else None
            tensor_scale = format.tensor_scale
            return block_format(element, format.block, format.scale_format, rule, tensor_scale=tensor_scale).name
    return None


@dataclass(frozen=True)
class ClipRecord:
    """One clip that acted: what was measured and what was done."""

    overflow_rate: float
    clip_threshold: float
    grad_norm: float  # global L2 norm before the clip


class PartitionRelativeClipper:
    """Clip the global gradient norm when operands overflow, at a threshold in proportion to the format's range.

    clip_threshold = base_clip * format.max / 57344, so E5M2 clips at `base_clip` and a narrow format far below it.

    Args:
        format: the format that overflowed, or its name.
        base_clip: threshold for E5M2's range; 1.0, the norm at which GPT training customarily clips.
        overflow_threshold: smallest overflow rate that clips; 0.01, one element in a hundred of some operand. 0: any
            overflow at all.

    Raises:
        OptionError: `base_clip` is not positive, or `overflow_threshold` is outside [0, 1].
    """

    def __init__(self, format: FloatFormat | str, base_clip: float = 1.0, overflow_threshold: float = 0.01) -> None:
        if not base_clip > 0:
            raise OptionError(
                f"base_clip {base_clip} is not positive; it is the largest gradient norm let through for E5M2"
            )
        if not 0 <= overflow_threshold <= 1:
            raise OptionError(
                f"overflow_threshold {overflow_threshold} is outside [0, 1]; it is a fraction of the elements"
            )
        self.format = get_format(format)
        self.base_clip = base_clip
        self.overflow_threshold = overflow_threshold
        self.last_clip: ClipRecord | None = None

    @property
    def clip_threshold(self) -> float:
        """Largest global gradient norm that a clip lets through."""
        return self.base_clip * (self.format.max / BASELINE_MAX)

    def clip_if_needed(self, model: nn.Module, overflow_rate: float | Tensor) -> bool:
        """Clip the model's gradients in place if the measured overflow rate reaches the threshold.

        Args:
            model: its parameters' gradients, finite, are rescaled together by `torch.nn.utils.clip_grad_norm_`.
            overflow_rate: overflowed / all elements, the maximum over layers and roles. A tensor is read (one sync).
                NaN, nothing measured, does not clip.

        Returns:
            Whether the clip acted (gradients below the threshold keep their values even then); see `last_clip`.
        """
        rate = float(overflow_rate)
        if not rate >= self.overflow_threshold or rate == 0:
            return False
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip_threshold)
        self.last_clip = ClipRecord(rate, self.clip_threshold, float(norm))
        return True


@dataclass(frozen=True)
class ShiftRecord:
    """One shift that was decided: between which formats (names, or recipes' texts) and on what evidence."""

    from_format: str
    to_format: str
    reason: str  # "nan" or "stall"
    consecutive_nans: int
    stall_rate: float | None


class EmergencyMantissaShift:
    """Say when a run should go on in another format: after repeated non-finite steps, or when most updates stall.

    At most one shift per patience window: for `nan_patience` calls after a shift, no stall is acted on and fewer than
    `nan_patience` non-finite steps cannot add up, so each format of the chain is tried before the next.

    Args:
        nan_patience: consecutive non-finite steps that shift; 3, since one or two bad batches pass by themselves.
        stall_threshold: a stall rate above it shifts; 0.5, more updates lost than made.
        stall_patience: consecutive steps that the stall rate must exceed it; 1 acts at once, more spares a warmup.
        chain: format name to the next one's (None: the end); these entries extend and override `FALLBACK_CHAIN`. Block
            formats that it does not name go to the same blocks with a wider element (`wider_block`).

    Raises:
        OptionError: a patience below 1, a threshold outside [0, 1], or a chain that returns to where it was.
    """

    def __init__(
        self,
        nan_patience: int = 3,
        stall_threshold: float = 0.5,
        *,
        stall_patience: int = 1,
        chain: Mapping[str, str | None] | None = None,
    ) -> None:
        for name, patience in (("nan_patience", nan_patience), ("stall_patience", stall_patience)):
            if patience < 1:
                raise OptionError(f"{name} {patience} is below 1; it counts consecutive steps")
        if not 0 <= stall_threshold <= 1:
            raise OptionError(
                f"stall_threshold {stall_threshold} is outside [0, 1]; it is a fraction of attempted updates"
            )
        self.nan_patience = nan_patience
        self.stall_threshold = stall_threshold
        self.stall_patience = stall_patience
        links = {**FALLBACK_CHAIN, **(chain or {})}
        self.chain = {get_format(a).name: None if b is None else get_format(b).name for a, b in links.items()}
        self._refuse_circles()
        self.last_shift: ShiftRecord | None = None
        self.reset()

    def _refuse_circles(self) -> None:
        """Every walk along the chain must end."""
        for start in self.chain:
            seen, at = [start], self.chain[start]
            while at is not None:
                if at in seen:
                    raise OptionError(
                        f"fallback chain {' > '.join([*seen, at])} returns to where it was; end it with null"
                    )
                seen.append(at)
                at = self.next_format(at)

    def reset(self) -> None:
        """Forget what was counted; the chain and the thresholds stay."""
        self.consecutive_nans = 0
        self.consecutive_stalls = 0
        self.quiet_steps = 0

    def next_format(self, format: FloatFormat | BlockFormat | str) -> str | None:
        """Where the chain leads from `format`: its own link; for a block format without one, `wider_block`; else None."""
        fmt = get_format(format)
        if fmt.name in self.chain or isinstance(fmt, FloatFormat):
            return self.chain.get(fmt.name)
        return wider_block(fmt)

    def reason_to_shift(self, has_nan: bool, stall_rate: float | Tensor | None) -> str | None:
        """Count one step; "nan" or "stall" where it is one too many. Call it once per step, then `shifted` if it acts.

        Args:
            has_nan: loss or gradients of this step were not finite.
            stall_rate: stalled / attempted updates of this step; None or NaN when nothing was attempted or measured.
        """
        rate = None if stall_rate is None else float(stall_rate)
        self.consecutive_nans = self.consecutive_nans + 1 if has_nan else 0
        quiet = self.quiet_steps > 0
        self.quiet_steps = max(0, self.quiet_steps - 1)
        stalled = not quiet and rate is not None and rate > self.stall_threshold
        self.consecutive_stalls = self.consecutive_stalls + 1 if stalled else 0
        if self.consecutive_nans >= self.nan_patience:
            return "nan"
        return "stall" if self.consecutive_stalls >= self.stall_patience else None

    def shifted(self, was: str, now: str, reason: str, stall_rate: float | Tensor | None) -> ShiftRecord:
        """Note that the shift from `was` to `now` was made: counting begins anew, after a quiet window."""
        rate = None if stall_rate is None else float(stall_rate)
        record = self.last_shift = ShiftRecord(was, now, reason, self.consecutive_nans, rate)
        self.reset()
        self.quiet_steps = self.nan_patience
        return record

    def check_and_shift(
        self, current_format: FloatFormat | BlockFormat | str, has_nan: bool, stall_rate: float | Tensor | None
    ) -> str | None:
        """`reason_to_shift` and `shifted` for a run in one format.

        Returns:
            Name of the format to go on in from the next step, or None to stay (also at the end of the chain).
        """
        reason = self.reason_to_shift(has_nan, stall_rate)
        target = self.next_format(current_format) if reason else None
        if reason is None or target is None:
            return None
        self.shifted(get_format(current_format).name, target, reason, stall_rate)
        return target

    def state_dict(self) -> dict[str, int]:
        """The counters, for a checkpoint; thresholds and chain are configuration."""
        return {name: getattr(self, name) for name in ("consecutive_nans", "consecutive_stalls", "quiet_steps")}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Set the counters that `state_dict` returned."""
        for name in self.state_dict():
            setattr(self, name, int(state[name]))
