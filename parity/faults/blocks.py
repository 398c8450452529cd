"""Mistakes around attention and MLP: how they join the residual stream, embedding and head."""

from typing import TYPE_CHECKING, Any

from gpt_core.config import ModelConfig
from parity.faults.fault import Fault, Model, everywhere, having, in_model, with_blocks, with_config

if TYPE_CHECKING:
    import torch


def norms_of_sums(model: Model) -> None:
    """The norm behind a branch moved behind the sum, as in the first Transformer."""
    from torch_gpt.layers import scaled
    from torch_gpt.taps import tap

    for block in model.blocks:
        norms = [block.attention_post_norm.forward, block.mlp_post_norm.forward]
        block.attention_post_norm.forward = block.mlp_post_norm.forward = lambda x: x

        def forward(
            x: Any, kind: str, taps: Any = None, positions: Any = None, block: Any = block, norms: Any = norms
        ) -> "torch.Tensor":
            tap(taps, "input", x)
            y = tap(taps, "attention_post_norm", block.attention(x, kind, taps, positions))
            x = norms[0](x + scaled(y, block.config.residual_scale))
            y = tap(taps, "mlp_post_norm", block.feed_forward(x, taps))
            after: torch.Tensor = norms[1](x + scaled(y, block.config.residual_scale))
            return after

        block.forward = forward


def norms_by_their_names(model: Model) -> None:
    """The norm behind attention and the one before the MLP in each other's place."""
    for block in model.blocks:
        block.attention_post_norm, block.mlp_norm = block.mlp_norm, block.attention_post_norm


def without_final_norm(model: Model) -> None:
    """The head on the raw residual stream."""
    model.final_norm.forward = lambda x: x


def another_head(model: Model) -> None:
    """A head of its own, fresh, where the token embedding is the head."""
    import torch

    unembed, table = model.unembed, model.token_embedding
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)).to(table)
    fresh = noise * table.detach().std()
    model.unembed = lambda x, *head: unembed(x, *(head or (fresh,)))


def scaled_embedding(model: Model) -> None:
    """Token embeddings times sqrt(embed_dim)."""
    embed = model.embed
    table = model.token_embedding
    factor = model.config.embed_dim**0.5 - 1
    model.embed = lambda tokens, *positions: (x := embed(tokens, *positions)) + factor * table[tokens].to(x.dtype)


def shifted_head(model: Model) -> None:
    """Every logit moved up by one token id."""
    unembed = model.unembed
    model.unembed = lambda *given: unembed(*given).roll(1, dims=-1)


def rounded_to_bfloat16(number: float) -> float:
    """A number with eight bits of mantissa."""
    import torch

    return torch.tensor(number).to(torch.bfloat16).item()


def _scaled_by_a_long_number(config: ModelConfig) -> bool:
    """Models whose embedding scale has more than eight bits."""
    mantissa = config.embedding_scale.as_integer_ratio()[0]
    return mantissa.bit_length() > 8


def _residual_read(config: ModelConfig) -> str:
    """The first site that reads the stream behind a branch."""
    if config.parallel_residual:
        return "blocks.1.input"
    first = "moe.scores" if config.n_experts else "mlp.hidden"
    return f"blocks.0.{first if config.norm_placement == 'post' else 'mlp_norm'}"


FAULTS = (
    # residual stream
    Fault(
        "serial-for-parallel",
        "GPT-NeoX's use_parallel_residual not read: the MLP reads what attention has left",
        "logits",
        having(parallel_residual=True),
        with_config(with_blocks, parallel_residual=lambda config: False),
        "blocks.0.mlp_norm",
    ),
    Fault(
        "post-norm-of-sum",
        "OLMo 2's norm of a branch taken for the first Transformer's norm of the sum",
        "logits",
        having(norm_placement="post"),
        in_model(norms_of_sums),
        "blocks.0.attention_post_norm",
    ),
    Fault(
        "post-attention-norm-for-mlp",
        "Gemma's post_attention_layernorm taken for the norm before the MLP, which has that name in Llama",
        "logits",
        having(norm_placement="sandwich"),
        in_model(norms_by_their_names),
        "blocks.0.attention_post_norm",
    ),
    Fault(
        "residual-scale-missing",
        "Granite loaded as Llama: branches are added as they are",
        "logits",
        lambda config: config.residual_scale != 1,
        with_config(with_blocks, residual_scale=lambda config: 1.0),
        _residual_read,
    ),
    Fault(
        "missing-final-norm",
        "a headless export: the last norm belongs to the head",
        "logits",
        everywhere,
        in_model(without_final_norm),
        "final_norm",
    ),
    # embedding
    Fault(
        "scaled-embedding",
        "embeddings multiplied by sqrt(embed_dim), as in the first Transformer and Gemma",
        "logits",
        having(embedding_scale=1),
        in_model(scaled_embedding),
        "embedding",
    ),
    Fault(
        "embedding-scale-missing",
        "Gemma's or Granite's factor on embeddings left out",
        "logits",
        lambda config: config.embedding_scale != 1,
        with_config(with_blocks, embedding_scale=lambda config: 1.0),
        "embedding",
    ),
    Fault(
        "embedding-scale-rounded",
        "Gemma's sqrt(embed_dim) rounded to bf16 in a model that computes in fp32",
        "logits",
        _scaled_by_a_long_number,
        with_config(with_blocks, embedding_scale=lambda config: rounded_to_bfloat16(config.embedding_scale)),
        "embedding",
        "transformers#29402",
    ),
    # head
    Fault(
        "random-head",
        "a tied head that no file holds, left as it was initialised",
        "logits",
        having(tied_embeddings=True),
        in_model(another_head),
        "logits",
        "vllm#53019",
    ),
    Fault(
        "shifted-head",
        "a vocabulary with an extra token in front",
        "logits",
        everywhere,
        in_model(shifted_head),
        "logits",
    ),
    Fault(
        "logit-scale-missing",
        "Granite's logits_scaling left out",
        "logits",
        lambda config: config.logit_scale != 1,
        with_config(with_blocks, logit_scale=lambda config: 1.0),
        "logits",
    ),
    Fault(
        "logit-softcap-missing",
        "Gemma 2's final_logit_softcapping left out",
        "logits",
        lambda config: config.logit_softcap is not None,
        with_config(with_blocks, logit_softcap=lambda config: None),
        "logits",
        "vllm#52173",
    ),
    Fault(
        "softcap-on-logits",
        "the cap of attention scores put on the logits",
        "logits",
        lambda config: config.attention_softcap not in (None, config.logit_softcap),
        with_config(with_blocks, logit_softcap=lambda config: config.attention_softcap),
        "logits",
    ),
)
