"""Port a small convnet from Flax NNX to PyTorch, find where the port goes wrong, and prove that it is mended.

python examples/compare_convnets.py
"""

import jax
import numpy as np
import torch
from flax import nnx
from torch import nn

from parity.api import Comparison, Names, compare, record_nnx, record_torch


class FlaxNet(nnx.Module):
    """Images [batch, row, column, channel] -> scores [batch, class]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, padding=1, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)
        self.dense = nnx.Linear(8 * 8 * 8, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.dense(x.reshape(len(x), -1))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [batch, channel, row, column]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def torch_net() -> nn.Sequential:
    """The same in PyTorch, where channels come first: [batch, channel, row, column] -> [batch, class]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), ChannelNorm(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
    )


def port(flax_net: FlaxNet, dense: np.ndarray) -> nn.Sequential:
    """The Flax weights in the PyTorch net, given the weight of its last layer [class, input]."""
    ported = torch_net()
    weights = {
        "0.weight": np.transpose(flax_net.conv.kernel[...], (3, 2, 0, 1)),  # [out, in, row, column]
        "0.bias": flax_net.conv.bias[...],
        "1.weight": flax_net.norm.scale[...],
        "1.bias": flax_net.norm.bias[...],
        "4.weight": dense,
        "4.bias": flax_net.dense.bias[...],
    }
    ported.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()})
    return ported.eval()


# Site of the PyTorch net -> site of the Flax net, and how its axes must be ordered to be compared.
CHANNELS_FIRST = "batch row column channel -> batch channel row column"
NAMES: Names = {"0": ("conv", CHANNELS_FIRST), "1": ("norm", CHANNELS_FIRST), "4": "dense"}


def main() -> tuple[Comparison, Comparison]:
    """Compare a port that forgets something with one that does not."""
    jax.config.update("jax_default_matmul_precision", "highest")
    flax_net = FlaxNet(nnx.Rngs(0))
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    reference = record_nnx(flax_net, images)

    # A kernel [input, class] is a transposed weight [class, input] ...
    transposed = np.array(flax_net.dense.kernel[...]).T
    wrong = record_torch(port(flax_net, transposed), images.transpose(0, 3, 1, 2))
    before = compare(wrong, reference, NAMES)
    print(f"{before}\n")

    # ... but these inputs are a flattened image, and PyTorch flattens the channels first.
    reordered = transposed.reshape(10, 8, 8, 8).transpose(0, 3, 1, 2).reshape(10, -1)
    right = record_torch(port(flax_net, reordered), images.transpose(0, 3, 1, 2))
    after = compare(right, reference, NAMES)
    print(after)
    return before, after


if __name__ == "__main__":
    main()
