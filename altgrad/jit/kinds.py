"""The kinds of storage that compiled loops tell apart, by number: those of torch's four floating dtypes."""

from __future__ import annotations

import torch

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = 0, 1, 2, 3
ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT64: 8}
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}
