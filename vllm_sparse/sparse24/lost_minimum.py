"""Signs that int8 values of -128 were left out when a 2:4 weight was packed.

compressed-tensors up to 0.14 ranks int8 values by ``abs()``, which for -128 is -128 again and so the smallest
of its group: it keeps a zero instead. llm-compressor's symmetric scales are the row's largest magnitude over
127.5, so that -128 is what the largest weight of a row becomes if it is negative. Nothing in the file says
what was lost; a row that should reach the end of the range, does not, and has a zero among its kept values,
shows that something may have been. Rows that were scaled before they were pruned can look the same.
"""

import torch
from torch import Tensor

#: A row whose scale was chosen for it reaches 127 or -128; GPTQ moves values afterwards, by a step or so.
_NEAR_THE_END = 120
#: A single such row can be chance.
SUSPICIOUS_SHARE = 0.01


def count_short_rows(values: Tensor) -> int:
    """Rows that look as if they lost their largest value; 0 if any value is -128, which then was not lost.

    Args:
        values: int8 ``[rows, K/2]``, the kept values of whole rows with a scale each.
    """
    if not values.numel():
        return 0
    low, high = torch.aminmax(values, dim=-1)
    if int(low.min()) == -128:
        return 0
    largest = torch.maximum(high, -low)
    short = values[(largest > 0) & (largest < _NEAR_THE_END)]
    return int((short == 0).any(-1).sum())


def is_suspicious(short: int, rows: int) -> bool:
    """Whether ``short`` of ``rows`` rows are too many for chance."""
    return short > SUSPICIOUS_SHARE * rows


def message(short: int, rows: int) -> str:
    """What was found, in a clause."""
    return (
        f"{short} of {rows} rows of int8 weights look as if their largest value, -128, was left out when the "
        "checkpoint was packed, as compressed-tensors up to 0.14 does"
    )


ADVICE = (
    "If so, answers are worse than those of the model that was saved, and only saving that again helps, with "
    "disable_sparse_compression=True; then convert it: vllm-sparse convert SRC DST"
)
