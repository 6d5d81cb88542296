"""Define how far a loss curve on the device may be from the fp32 curve of one CPU process."""

from __future__ import annotations

#: Precision -> the largest difference in loss, in nats, at any step. fp32 computes without TF32. On a CPU, thirty steps
#: in amp_bf16, amp_fp16 and bf16 differ from fp32 by at most 4.3e-4, 1.1e-4 and 4.3e-3.
LOSS_BOUNDS = {"fp32": 1e-4, "amp_bf16": 2e-2, "amp_fp16": 5e-3, "bf16": 2e-2}


def loss_bound(precision: str) -> float:
    return LOSS_BOUNDS[precision]
