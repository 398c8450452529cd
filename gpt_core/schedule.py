"""The learning rate of every step, in float64, the same number for both frameworks."""

import math


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """Linear warmup to `peak`, then half a cosine down to `final` (Loshchilov and Hutter, 2017).

    The frameworks' own schedules round to float32 even in double precision; this one is a Python float that each of
    them receives as it is.

    Args:
        step: Number of updates made before this one; the first update has step 0 and a rate above zero.
        peak: Highest rate, reached in update `warmup_steps`.
        warmup_steps: Updates of the warmup; 0 starts at the peak.
        total_steps: Update from which on the rate is `final`.
        final: Rate at the end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))
