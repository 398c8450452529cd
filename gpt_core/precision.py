"""Which number format is used where: the small policy object that both models read."""

from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

from gpt_core.errors import InputError

DType = Literal["float64", "float32", "bfloat16", "float16"]

# float16 is for computing alone: what is smaller than 6e-8 is zero in it, and updates are.
PARAM_DTYPES: tuple[DType, ...] = ("float64", "float32", "bfloat16")


@dataclass(frozen=True)
class Precision:
    """Number formats by name; each framework looks up its own dtype object.

    Args:
        param_dtype: How parameters are stored.
        compute_dtype: Parameters are cast to it where they are used; the residual stream, norm outputs, query,
            key, value, probabilities and logits are computed in it.
    """

    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"

    def __post_init__(self) -> None:
        for name, known in (("param_dtype", PARAM_DTYPES), ("compute_dtype", get_args(DType))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} = {getattr(self, name)!r} must be one of: {', '.join(known)}")
        if (self.param_dtype == "float64") != (self.compute_dtype == "float64"):
            raise InputError(
                f"param_dtype = {self.param_dtype} with compute_dtype = {self.compute_dtype}: float64 is for proofs "
                f"and goes with itself only"
            )

    @property
    def wide_dtype(self) -> DType:
        """For norm statistics, rotary angles, scores, softmax and loss: fp32, or fp64 in fp64 runs."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    @classmethod
    def of(cls, dtype: str) -> Self:
        """The usual policy of a run "in" a dtype: bfloat16 and float16 compute in it on fp32 parameters."""
        if dtype not in get_args(DType):
            raise InputError(f"dtype {dtype!r} must be one of: {', '.join(get_args(DType))}")
        name = cast(DType, dtype)
        return cls(param_dtype="float32" if name in {"bfloat16", "float16"} else name, compute_dtype=name)
