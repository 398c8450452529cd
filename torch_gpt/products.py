"""Products of matrices in half precision, also on CPUs without instructions for them.

There PyTorch multiplies bfloat16 and float16 element by element: a hundredth of float32's speed where both factors of
a product lie in rows. The product of the same values in float32, rounded once, is what a CPU with these instructions
returns.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float


def _emulated() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, there in supported.items() if not there)


EMULATED = _emulated()  # dtypes whose products this CPU has no instructions for


def emulated(x: torch.Tensor) -> bool:
    """Whether products with x are better made in float32 and rounded."""
    return x.device.type == "cpu" and x.dtype in EMULATED


def linear(
    x: Float[torch.Tensor, "*batch inputs"],
    weight: Float[torch.Tensor, "outputs inputs"],
    bias: Float[torch.Tensor, " outputs"] | None = None,
) -> Float[torch.Tensor, "*batch outputs"]:
    """`torch.nn.functional.linear` of three tensors in one dtype, which the result is in."""
    if not emulated(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
