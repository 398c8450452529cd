"""An adapter beside a PyTorch model: what is frozen, and what is stored how."""

import numpy as np
import torch

from gpt_core.adapter import AdapterConfig
from gpt_core.config import ModelConfig
from gpt_core.runs.config import RunConfig
from torch_gpt import lora
from torch_gpt.distributed import connect
from torch_gpt.model import GPT, initialiser
from torch_gpt.parallel import place_batch
from torch_gpt.step import create_program

MODEL = {"vocab_size": 31, "context_length": 8, "n_layers": 2, "n_heads": 2, "embed_dim": 8}
CONFIG = ModelConfig(**MODEL)


def test_a_fresh_adapter_leaves_the_model_as_it_is() -> None:
    tokens = torch.arange(8)[None]
    plain = GPT(CONFIG, initialiser(0))(tokens)
    adapted = lora.attach(GPT(CONFIG, initialiser(0)), AdapterConfig(rank=3, alpha=9), initialiser(0))
    assert torch.equal(adapted(tokens), plain)
    trained, frozen = lora.split(adapted)
    assert all(key.endswith(("lora_a", "lora_b")) for key in trained)
    assert not any("lora" in key for key in frozen)
    assert frozen.keys() == GPT(CONFIG, initialiser(0)).state_dict().keys()


def test_without_a_rank_everything_is_trained() -> None:
    model = lora.attach(GPT(CONFIG, initialiser(0)), AdapterConfig(), initialiser(0))
    assert not lora.split(model)[1]
    assert not any(isinstance(module, lora.LoraLinear) for module in model.modules())


def test_a_base_in_bfloat16_is_trained_beside_in_float32() -> None:
    sections = {"adapter": {"rank": 2, "base_dtype": "bfloat16"}}
    config = RunConfig.from_dict({"model": MODEL, "train": {"batch_size": 2}, "data": {"streams": 1}} | sections)
    program = create_program(config, connect())
    state = program.state
    assert {parameter.dtype for parameter in state.frozen.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in state.parameters.values()} == {torch.float32}
    before = {key: parameter.detach().clone() for key, parameter in state.whole.items()}
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    batch = {"tokens": tokens, "targets": tokens, "mask": np.ones((2, 8), bool)}
    for _ in range(2):
        state, metrics = program.step(state, place_batch(batch, program.device), 1e-2)  # type: ignore[arg-type]
    assert np.isfinite(float(metrics["loss"]))
    assert all(torch.equal(parameter, before[key]) for key, parameter in state.frozen.items())
    assert not any(torch.equal(parameter, before[key]) for key, parameter in state.parameters.items())
