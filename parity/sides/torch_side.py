"""Running a model in PyTorch, on NumPy arrays in and out."""

import numpy as np
import torch

from gpt_core.config import ModelConfig
from gpt_core.precision import DType, Precision
from parity.formats.safetensors_torch import SPOKE
from parity.weights import Array, Source, Weights, decode, slots
from torch_gpt.arrays import from_numpy, to_numpy
from torch_gpt.attention import Implementation
from torch_gpt.dtypes import torch_dtype
from torch_gpt.model import GPT, Taps, initialiser


def build(config: ModelConfig, source: Source, dtype: DType, *, implementation: Implementation = "reference") -> GPT:
    """A model with its weights from `source` through the format's map, computing in `dtype`."""
    precision = Precision.of(dtype)
    model = GPT(
        config,
        lambda parameter: torch.empty(parameter.shape, dtype=torch_dtype(precision.param_dtype), device="meta"),
        precision=precision,
        implementation=implementation,
    )
    state = {}
    for key, slot in slots(config, SPOKE).items():
        tensor = from_numpy(slot.encode(np.asarray(source(slot.parameter))))
        state[key] = tensor.to(device(dtype), torch_dtype(precision.param_dtype), copy=True)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def fresh(config: ModelConfig, seed: int, dtype: DType) -> GPT:
    """A model with this framework's own initialisation."""
    precision = Precision.of(dtype)
    return GPT(config, initialiser(seed, precision), precision=precision).to(device(dtype)).eval()


def weights_of(model: GPT) -> Weights:
    """Canonical weights of a model, as copies."""
    state = {key: to_numpy(tensor).copy() for key, tensor in model.state_dict().items()}
    return decode(state, model.config, SPOKE, "the PyTorch model")


@torch.no_grad()
def forward(model: GPT, tokens: Array) -> tuple[Array, dict[str, Array]]:
    """Logits `[batch, time, vocab]` and every named site, as NumPy arrays."""
    taps: Taps = {}
    logits = model(torch.tensor(tokens, device=model.token_embedding.device), taps=taps)
    return to_numpy(logits), {site: to_numpy(value) for site, value in taps.items()}


def prepare(dtype: DType) -> None:
    """Set what is global in PyTorch for a process that runs in this dtype."""
    torch.set_float32_matmul_precision("highest")


def device(dtype: DType) -> torch.device:
    """fp64 is proven on the CPU; other dtypes use a GPU where there is one."""
    return torch.device("cuda" if dtype != "float64" and torch.cuda.is_available() else "cpu")


def describe() -> dict[str, str]:
    """Versions, device and precision settings, for reports."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "torch": torch.__version__,
        "torch_device": f"cuda: {gpu}" if gpu else "cpu",
        "torch_matmul_precision": torch.get_float32_matmul_precision(),
    }
