"""One training step of ours and of Hugging Face's models, on the same batches: what the training benchmarks run.

All have fp32 parameters and AdamW, and compute in `dtype`: ours by the casts of the model, theirs through autocast.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from turns import Step

VOCAB = 50257


def batch(number: int, rows: int, length: int, vocab: int = VOCAB) -> npt.NDArray[np.int64]:
    """Random tokens `[rows, length + 1]`."""
    return np.random.default_rng(number).integers(0, vocab, (rows, length + 1)).astype(np.int64)


def run_config(
    framework: str,
    rows: int,
    length: int,
    dtype: str,
    model: dict[str, Any],
    options: dict[str, Any],
    adapter: dict[str, Any] | None = None,
) -> Any:
    """Of a run; `options` are those of the framework's section."""
    from gpt_core.runs.config import RunConfig

    return RunConfig.from_dict(
        {
            # Padded as in the preset gpt2-124m.
            "model": {"vocab_size": VOCAB, "pad_vocab_size_multiple": 128, "context_length": max(length, 1024)} | model,
            "train": {"batch_size": rows, "context_length": length, "dtype": dtype, "steps": 1000},
            "data": {"streams": 1},
            framework: options,
            "adapter": adapter or {},
        }
    )


def jax_step(
    rows: int,
    length: int,
    dtype: str,
    model: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    **options: Any,
) -> Step:
    """The step of `jax-gpt train`; `options` are those of the section `jax`."""
    from gpt_core.data.batches import next_token_batch
    from jax_gpt.sharding import create_mesh, place_batch
    from jax_gpt.start import placed
    from jax_gpt.step import create_program

    config = run_config("jax", rows, length, dtype, model or {}, options, adapter)
    mesh = create_mesh(config.jax.mesh)
    program = create_program(config, mesh)
    state = program.create()
    if adapter is not None:
        state = state._replace(frozen=placed(program.state.frozen, config, _noise))
    rate = np.float32(1e-4)

    def step(number: int) -> float:
        nonlocal state
        tokens = next_token_batch(batch(number, rows, length, config.model.vocab_size))
        state, metrics = program.step(state, place_batch(tokens, mesh, rows), rate)
        return float(metrics["loss"])

    return step


def _noise(parameter: Any) -> npt.NDArray[np.float32]:
    """Weights of a base, whose values take no time of their own."""
    random = np.random.default_rng(0)
    return parameter.mean + parameter.std * random.standard_normal(parameter.shape, np.float32)


def torch_step(
    rows: int,
    length: int,
    dtype: str,
    model: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    **options: Any,
) -> Step:
    """The step of `torch-gpt train`; `options` are those of the section `torch`."""
    from gpt_core.data.batches import next_token_batch
    from torch_gpt.distributed import connect
    from torch_gpt.memory import keep_freed_memory
    from torch_gpt.parallel import place_batch
    from torch_gpt.step import create_program

    keep_freed_memory()  # as `torch-gpt train` does
    config = run_config("torch", rows, length, dtype, model or {}, options, adapter)
    program = create_program(config, connect())
    state = program.state

    def step(number: int) -> float:
        nonlocal state
        tokens = next_token_batch(batch(number, rows, length, config.model.vocab_size))
        state, metrics = program.step(state, place_batch(tokens, program.device), 1e-4)
        return float(metrics["loss"])

    return step


def hugging_face_gpt2_step(rows: int, length: int, dtype: str, *, compiled: bool, **model: Any) -> Step:
    """`GPT2LMHeadModel` of 124M or other sizes, attention through `scaled_dot_product_attention`, dropout off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCAB, "n_positions": max(length, 1024)} | model
    config = GPT2Config(attn_implementation="sdpa", **dropout, **sizes)
    return _hugging_face_step(GPT2LMHeadModel(config), rows, length, dtype, compiled=compiled)


def hugging_face_llama_step(rows: int, length: int, dtype: str, *, compiled: bool, **sizes: Any) -> Step:
    """`LlamaForCausalLM` of 124M, tied, attention through `scaled_dot_product_attention`."""
    return _hugging_face_step(llama(length, **sizes), rows, length, dtype, compiled=compiled)


def llama(length: int, **sizes: Any) -> Any:
    """The same without a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": VOCAB, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 12, "max_position_embeddings": max(length, 1024)}
    config = LlamaConfig(
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
        **shape | heads | sizes,
    )
    return LlamaForCausalLM(config)


def mixtral_step(rows: int, length: int, dtype: str, *, experts: str, model: dict[str, Any]) -> Step:
    """`MixtralForCausalLM` in the shape of a mixture of ours, by one of its implementations of experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["embed_dim"],
        intermediate_size=model["expert_dim"],
        num_hidden_layers=model["n_layers"],
        num_attention_heads=model["n_heads"],
        num_key_value_heads=model["n_kv_heads"],
        num_local_experts=model["n_experts"],
        num_experts_per_tok=model["experts_per_token"],
        max_position_embeddings=max(length, 1024),
        tie_word_embeddings=True,
        output_router_logits=True,  # with the balance loss, as ours has it
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    return _hugging_face_step(MixtralForCausalLM(config), rows, length, dtype, compiled=False)


def peft_llama_step(rows: int, length: int, dtype: str, *, rank: int, compiled: bool, **sizes: Any) -> Step:
    """PEFT's adapters of a rank beside all linear layers of `LlamaForCausalLM`, whose weights are stored in `dtype`."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = llama(length, **sizes).to(getattr(torch, dtype))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return _hugging_face_step(get_peft_model(model, config), rows, length, dtype, compiled=compiled)


def hugging_face_starcoder2_step(
    rows: int, length: int, dtype: str, *, heads: int, kv_heads: int, window: int, compiled: bool, **sizes: Any
) -> Step:
    """As our step, with the peer's model."""
    model = starcoder2(length, heads=heads, kv_heads=kv_heads, window=window, **sizes)
    model.config.use_cache = False
    return _hugging_face_step(model, rows, length, dtype, compiled=compiled)


def starcoder2(length: int, *, heads: int, kv_heads: int, window: int, **sizes: Any) -> Any:
    """`Starcoder2ForCausalLM` in the shape of GPT-2 124M, or of other `sizes`, with a sliding window: the same function
    as ours.
    """
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    shape = {"vocab_size": VOCAB, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    config = Starcoder2Config(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        sliding_window=window,
        tie_word_embeddings=True,
        embedding_dropout=0.0,
        residual_dropout=0.0,
        attention_dropout=0.0,
        attn_implementation="sdpa",
        **shape | sizes,
    )
    return Starcoder2ForCausalLM(config)


def _hugging_face_step(model: Any, rows: int, length: int, dtype: str, *, compiled: bool) -> Step:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.train().to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    forward = torch.compile(model) if compiled else model

    def step(number: int) -> float:
        ids = torch.from_numpy(batch(number, rows, length, model.config.vocab_size)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            # `shift_labels` is the next token of every position, so that all of them count, as in ours.
            loss = forward(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step
