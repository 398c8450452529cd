"""The hub of all weight formats, where it was before both models could read and write it: see `gpt_core.weights`."""

from gpt_core.tensor_info import Array
from gpt_core.weights import (
    DType,
    Slot,
    Source,
    Spoke,
    Weights,
    cast,
    decode,
    parameter_dtypes,
    require_keys,
    slots,
    source_of,
    weights_source,
)

__all__ = [
    "Array",
    "DType",
    "Slot",
    "Source",
    "Spoke",
    "Weights",
    "cast",
    "decode",
    "parameter_dtypes",
    "require_keys",
    "slots",
    "source_of",
    "weights_source",
]
