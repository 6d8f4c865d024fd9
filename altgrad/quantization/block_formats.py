"""Block formats: an element format, a block shape and the format of the scale that each block shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class BlockFormat:
    """Placeholder for the block formats."""

    name: str


BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType({})


def find_block_format(name: str) -> BlockFormat | None:
    """The block format of that name, or None."""
    return BLOCK_FORMATS.get(name.upper())
