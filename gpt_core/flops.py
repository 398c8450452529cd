"""How much arithmetic a token costs, and how much a device can do: together, the utilisation of a run (MFU)."""

import re

from gpt_core.adapter import NO_ADAPTER, AdapterConfig, adapter_table
from gpt_core.config import ModelConfig
from gpt_core.parameters import active_size, parameter_table

# Dense peaks of one device in units of 1e12 floating-point operations a second, by a pattern of its name: bfloat16, and
# float32 as the hardware multiplies it (TensorFloat-32 on a GPU; None where the maker publishes no number). Sparsity is
# never counted: the makers' H100 and H200 figures "with sparsity" are twice these. The first pattern that fits counts.
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    # https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: peak compute per chip (bf16); none is published for fp32.
    (r"^TPU v4$", 275, None),
    (r"^TPU v5 ?(lite|e)$", 197, None),
    (r"^TPU v5p?$", 459, None),  # JAX calls a v5p "TPU v5"
    (r"^TPU v6 ?(lite|e)$", 918, None),
    # NVIDIA A100 Tensor Core GPU data sheet: the same for SXM4 and PCIe, 40 and 80 GB.
    (r"\bA100\b", 312, 156),
    # NVIDIA H100 Tensor Core GPU data sheet; the PCIe and NVL cards have fewer or slower cores than the SXM module.
    (r"\bH100 PCIe\b", 756, 378),
    (r"\bH100 NVL\b", 835, 417.5),
    (r"\bH100\b", 989.4, 494.7),
    # NVIDIA H200 Tensor Core GPU data sheet.
    (r"\bH200 NVL\b", 835.5, 417.5),
    (r"\bH200\b", 989.4, 494.7),
)


def training_flops_per_token(config: ModelConfig, context_length: int, adapter: AdapterConfig = NO_ADAPTER) -> float:
    """Floating-point operations of a training step for one token: three times those of the forward pass.

    The backward pass multiplies twice for each product of the forward pass: once for the gradient of each factor. What
    rematerialisation computes again is not counted, so that utilisation says what the model got (PaLM, appendix B).
    Frozen weights have no gradient; the adapter beside them is multiplied in both passes.

    Args:
        config: The model.
        context_length: Tokens of a row in training.
        adapter: What is trained in the place of the weights, if anything.
    """
    forward = forward_flops_per_token(config, context_length)
    if adapter.rank is None:
        return 3 * forward
    beside = 2.0 * sum(row.size for row in adapter_table(config, adapter).values())
    return 3 * (forward + beside) - 2.0 * _weights(config)


def forward_flops_per_token(config: ModelConfig, context_length: int) -> float:
    """Floating-point operations of the forward pass for one token, averaged over a row.

        2 weights + 4 n_heads head_dim (visible, summed over layers)

    `weights` counts the elements of every matrix that a token is multiplied by: those of the blocks and the head,
    a tied one too. Looking an embedding up multiplies nothing, and rows that pad the vocabulary are no part of the
    model. `visible` is the mean number of keys that a query sees: only the pairs inside the causal mask and the sliding
    window count, in each of the two products of attention (scores, and the mix of values). Norms, softmax, activations
    and biases are left out, below 1% in models of any size that is trained.

    Sources: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", table 1 (which counts the full square of
    pairs); Chowdhery et al. 2022, "PaLM", appendix B.

    Args:
        config: The model.
        context_length: Tokens of a row.
    """
    visible = sum(mean_visible_keys(context_length, config.view(kind).window) for kind in config.layer_kinds)
    return 2.0 * _weights(config) + 4.0 * config.n_heads * config.head_dim * visible


def _weights(config: ModelConfig) -> int:
    """Elements of every matrix that a token is multiplied by; of a mixture those of its own experts."""
    rows = (row for name, row in parameter_table(config).items() if name.startswith("blocks.") and row.decay)
    blocks = sum(active_size(row, config) for row in rows)
    return blocks + config.vocab_size * config.embed_dim


def mean_visible_keys(context_length: int, window: int | None) -> float:
    """Keys that a query sees inside the causal mask and the window, the mean over a row."""
    # The first `full` queries see 1, 2, ..., full keys, all later ones a whole window.
    full = min(window or context_length, context_length)
    return (full * (full + 1) / 2 + (context_length - full) * full) / context_length


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Floating-point operations a second that one device can do at most, in dense matrix products.

    Args:
        device_kind: The device's name as JAX or PyTorch give it, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
        dtype: Format of computation; "float32" is TensorFloat-32 on a GPU, float16 is as fast as bfloat16.

    Returns:
        None when the device or its speed in this format is unknown: a part of a GPU (MIG), or float32 on a TPU.
    """
    if dtype not in {"bfloat16", "float16", "float32"} or " MIG " in device_kind:
        return None
    for pattern, bfloat16, float32 in _PEAKS:
        if re.search(pattern, device_kind):
            peak = float32 if dtype == "float32" else bfloat16
            return None if peak is None else peak * 1e12
    return None
