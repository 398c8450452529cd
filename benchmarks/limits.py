"""What a training step on one GPU must at least take: operations and bytes of each of its kernels, on paper.

    python benchmarks/limits.py [--device "H100"]

GPT-2 124M, B16 T1024, bf16, as docs/performance.md has it. A kernel reads each of its inputs once and writes each of
its outputs once, and takes the longer of two times: its operations at the peak of dense bf16 products, its bytes at
that of the memory. What lies between two matrix products counts as one kernel, as compilers fuse it. Prints Markdown.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpt_core.config import ModelConfig
from gpt_core.flops import mean_visible_keys, peak_flops
from gpt_core.parameters import parameter_table

# Bytes a second of the memory: NVIDIA's data sheets of the H100 and H200 SXM modules and of the A100 80GB.
MEMORY = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.039e12}
HALF, WHOLE = 2, 4  # bytes of bf16, and of fp32

Twin = Literal["both", "JAX", "PyTorch"]


@dataclass(frozen=True)
class Kernel:
    """Kernels of a kind in one step.

    Args:
        name: What they compute.
        times: How many there are.
        flops: Operations of all of them in matrix products.
        bytes: That all of them read and write.
        twin: Which twin has them.
    """

    name: str
    times: int
    flops: float
    bytes: float
    twin: Twin = "both"

    def seconds(self, peak: float, memory: float) -> float:
        """The longer of its two times, for all of them."""
        return max(self.flops / peak, self.bytes / memory)


def step_kernels(config: ModelConfig, rows: int, length: int) -> list[Kernel]:
    """Of a step in bf16 with parameters in fp32, all activations kept, the logits in two chunks or more.

    Args:
        config: The model.
        rows: Of the batch.
        length: Tokens of a row.
    """
    table = parameter_table(config)
    layers, tokens, embed, mlp = config.n_layers, rows * length, config.embed_dim, config.mlp_dim
    heads, key_values = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    vocab = config.padded_vocab_size
    parameters = sum(row.size for row in table.values())
    used = sum(row.size for row in table.values() if row.decay)  # matrices and embeddings: cast to bf16
    pairs = tokens * mean_visible_keys(length, config.sliding_window)

    def product(name: str, inputs: int, outputs: int, times: int) -> list[Kernel]:
        flops, weight = 2.0 * tokens * inputs * outputs, HALF * inputs * outputs
        read = HALF * tokens * (inputs + outputs)
        # Backward: one product for each factor's gradient; that of the weight is written in bf16 and cast below.
        return [
            Kernel(name, times, times * flops, times * (read + weight)),
            Kernel(f"{name}, backward", 2 * times, 2 * times * flops, 2 * times * (read + weight)),
        ]

    mixed = tokens * (2 * heads + 2 * key_values)
    residual = tokens * embed
    attention = 4.0 * config.head_dim * config.n_heads * pairs
    return [
        Kernel("embeddings", 1, 0, HALF * 2 * residual),
        Kernel("norms and residual additions", 2 * layers + 1, 0, (2 * layers + 1) * HALF * 4 * residual),
        Kernel("the same, backward", 2 * layers + 1, 0, (2 * layers + 1) * HALF * 4 * residual),
        *product("query, key and value", embed, heads + 2 * key_values, layers),
        Kernel("attention", layers, layers * attention, layers * HALF * mixed),
        # Scores again, and two products for each of the two products' gradients.
        Kernel("attention, backward", layers, layers * 2.5 * attention, layers * HALF * 2 * mixed),
        *product("attention's output", heads, embed, layers),
        *product("MLP up", embed, mlp, layers),
        Kernel("GELU", layers, 0, layers * HALF * 2 * tokens * mlp),
        Kernel("GELU, backward", layers, 0, layers * HALF * 3 * tokens * mlp),
        *product("MLP down", mlp, embed, layers),
        *product("head", embed, vocab, 1),
        Kernel("cross entropy, and its gradient", 2, 0, HALF * 3 * tokens * vocab),
        Kernel("gradient of the embeddings", 1, 0, HALF * residual + WHOLE * residual),
        Kernel("parameters to bf16", 1, 0, (WHOLE + HALF) * used),
        Kernel("gradients to fp32", 1, 0, (WHOLE + HALF) * used),
        Kernel("norm of the gradients", 1, 0, WHOLE * parameters),
        Kernel("clip", 1, 0, WHOLE * 2 * parameters, "PyTorch"),  # JAX fuses it into AdamW
        Kernel("AdamW", 1, 0, WHOLE * 7 * parameters),
    ]


def decode_bytes(config: ModelConfig, rows: int, length: float) -> float:
    """Bytes that a step of decoding must read in bf16: every matrix once, and the cache of every row.

    Args:
        config: The model.
        rows: That are decoded together.
        length: Positions in the cache of each.
    """
    read = {name: row for name, row in parameter_table(config).items() if row.decay and name != "position_embedding"}
    held = sum(min(length, config.view(kind).window or length) for kind in config.layer_kinds)
    cache = 2 * config.n_kv_heads * config.head_dim * held
    return HALF * (sum(row.size for row in read.values()) + rows * cache)


def table(config: ModelConfig, rows: int, length: int, device: str) -> str:
    """The kernels and their sums as Markdown.

    Raises:
        KeyError: a device whose memory is not known.
    """
    peak, memory = peak_flops(device, "bfloat16"), MEMORY[device]
    assert peak is not None
    kernels = step_kernels(config, rows, length)
    lines = [
        f"| kernels of a step | times | TFLOP | GB | ms on one {device} | bound by |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for kernel in kernels:
        bound = "products" if kernel.flops / peak > kernel.bytes / memory else "memory"
        name = kernel.name if kernel.twin == "both" else f"{kernel.name} ({kernel.twin} alone)"
        numbers = f"{kernel.flops / 1e12:.2f} | {kernel.bytes / 1e9:.2f} | {1000 * kernel.seconds(peak, memory):.2f}"
        lines.append(f"| {name} | {kernel.times} | {numbers} | {bound} |")
    for twin in ("JAX", "PyTorch"):
        theirs = [kernel for kernel in kernels if kernel.twin in ("both", twin)]
        seconds = sum(kernel.seconds(peak, memory) for kernel in theirs)
        flops, moved = sum(kernel.flops for kernel in theirs), sum(kernel.bytes for kernel in theirs)
        rate = rows * length / seconds / 1000
        numbers = f"{flops / 1e12:.2f} | {moved / 1e9:.2f} | {1000 * seconds:.2f}"
        lines.append(f"| **{twin}** | | {numbers} | {rate:.0f} k tokens/s |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=MEMORY, default="H100")
    options = parser.parse_args(arguments)
    print(table(ModelConfig(pad_vocab_size_multiple=128), 16, 1024, options.device))


if __name__ == "__main__":
    main()
