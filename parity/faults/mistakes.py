"""How each fault is planted in a PyTorch twin: small functions that break a model or replace a function.

`parity.faults.catalogue` says what they imitate, where they bite and which check must catch them.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch

# A PyTorch GPT. Its submodules are reached by name, which type checkers see as "Tensor or Module".
Model = Any
Plant = Callable[[Model], AbstractContextManager[None]]


def in_model(change: Callable[[Model], None]) -> Plant:
    """A fault that changes the model object itself, which is thrown away afterwards."""

    @contextmanager
    def plant(model: Model) -> Iterator[None]:
        change(model)
        yield

    return plant


def replacing(target: str, wrap: Callable[..., Any]) -> Plant:
    """A fault that wraps a function of the PyTorch twin: `wrap(original, *arguments, **options)`."""

    @contextmanager
    def plant(model: Model) -> Iterator[None]:
        module, name = target.rsplit(".", 1)
        original = getattr(importlib.import_module(module), name)
        with mock.patch(target, functools.partial(wrap, original)):
            yield

    return plant


def on_each_attention(change: Callable[[Any], None]) -> Plant:
    """A fault that changes every attention module of a model."""

    def change_all(model: Model) -> None:
        for block in model.blocks:
            change(block.attention)

    return in_model(change_all)


def with_config(**fields: Callable[[Any], Any]) -> Plant:
    """Attention that reads other values out of the config."""

    def change(attention: Any) -> None:
        config = attention.config
        attention.config = replace(config, **{name: value(config) for name, value in fields.items()})

    return on_each_attention(change)


# ---------------------------------------------------------------------------------------------------- position


def interleaved(rotate: Any, x: "torch.Tensor", *arguments: Any) -> "torch.Tensor":
    """Rotate pairs (2d, 2d + 1) instead of (d, d + head_dim / 2)."""
    import torch

    half_split = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)  # pairs (2d, 2d + 1) instead of (d, d + half)
    first, second = rotate(half_split, *arguments).chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def backwards(rotate: Any, x: "torch.Tensor", *arguments: Any) -> "torch.Tensor":
    """Rotate by the negative angle."""
    import torch

    first, second = x.chunk(2, dim=-1)  # swapping the halves before and after turns the rotation round
    first, second = rotate(torch.cat([second, first], dim=-1), *arguments).chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


def shifted_positions(model: Model) -> None:
    """Position t gets the row of position t - 1."""
    model.position_embedding.data = model.position_embedding.data.roll(1, dims=0)


# ------------------------------------------------------------------------------------------------ heads and mask


def tiled_heads(
    attention: Any, query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", **options: Any
) -> "torch.Tensor":
    """Query head h reads kv head h % kv_heads."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat(1, 1, group, 1) for x in (key, value))  # kv head h % kv_heads, not h // group
    mixed: torch.Tensor = attention(query, key, value, **options)
    return mixed


def swapped_key_and_value(model: Model) -> None:
    """Keys from the value projection and the reverse."""
    for block in model.blocks:
        block.attention.key, block.attention.value = block.attention.value, block.attention.key


def head_dim_outside(model: Model) -> None:
    """Query rows cut as (head_dim, heads)."""
    heads = model.config.n_heads
    for block in model.blocks:
        for parameter in (block.attention.query.weight, block.attention.query.bias):
            if parameter is not None:  # what a reshape to (head_dim, heads) does to rows that are (heads, head_dim)
                rows = parameter.data.unflatten(0, (-1, heads)).transpose(0, 1)
                parameter.data = rows.flatten(0, 1).contiguous()


def sees_the_future(mask: Any, time: int, window: int | None, device: Any) -> "torch.Tensor":
    """A mask with which query i sees key i + 1."""
    import torch

    visible: torch.Tensor = mask(time, None if window is None else window + 1, device)
    return torch.cat([visible[1:], torch.ones_like(visible[:1])])  # query i gets the row of query i + 1


# ---------------------------------------------------------------------------------------------- norms, MLP, head


def small_eps(model: Model) -> None:
    """Every norm with eps 1e-6."""
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6


def without_mean(layer_norm: Any, x: "torch.Tensor", shape: Any, scale: Any, bias: Any, eps: float) -> "torch.Tensor":
    """RMSNorm with a bias."""
    normed: torch.Tensor = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed * scale + bias


def one_plus_scale(model: Model) -> None:
    """Norm scales that mean their distance from one."""
    for block in model.blocks:
        block.attention_norm.weight.data = block.attention_norm.weight.data + 1


def without_final_norm(model: Model) -> None:
    """The head on the raw residual stream."""
    model.final_norm.forward = lambda x: x


def erf_gelu(gelu: Any, x: "torch.Tensor", approximate: str) -> "torch.Tensor":
    """The exact GELU."""
    exact: torch.Tensor = gelu(x)
    return exact


def sigmoid_gelu(gelu: Any, x: "torch.Tensor", approximate: str) -> "torch.Tensor":
    """x * sigmoid(1.702 x)."""
    return x * (1.702 * x).sigmoid()


def scaled_embedding(model: Model) -> None:
    """Token embeddings times sqrt(embed_dim)."""
    embed = model.embed
    table = model.token_embedding
    factor = model.config.embed_dim**0.5 - 1
    model.embed = lambda tokens: embed(tokens) + factor * table[tokens].to(embed(tokens).dtype)


def shifted_head(model: Model) -> None:
    """Every logit moved up by one token id."""
    unembed = model.unembed
    model.unembed = lambda *given: unembed(*given).roll(1, dims=-1)


# ------------------------------------------------------------------------------------------------------ conversion


def swapped_blocks(model: Model) -> None:
    """The first two blocks in each other's place."""
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def transposed_kernel(model: Model) -> None:
    """One query kernel the wrong way round."""
    weight = model.blocks[1].attention.query.weight  # square: heads * head_dim = embed, so no shape complains
    weight.data = weight.data.T.contiguous()


def dropped_bias(model: Model) -> None:
    """One query bias gone."""
    bias = model.blocks[1].attention.query.bias
    bias.data = bias.data * 0


def truncated_checkpoint(model: Model) -> None:
    """The last row of the last matrix zero."""
    last = model.blocks[-1].mlp.down.weight
    last.data = last.data.clone()
    last.data[-1] = 0


# ---------------------------------------------------------------------------------------------- loss and gradients


def without_mask(loss: Any, logits: Any, targets: Any, mask: "torch.Tensor") -> Any:
    """The loss over all positions."""
    return loss(logits, targets, mask | True)


def unshifted_targets(loss: Any, logits: Any, targets: "torch.Tensor", mask: Any) -> Any:
    """Targets moved by one position."""
    return loss(logits, targets.roll(1, dims=-1), mask)


def mean_of_rows(loss: Any, logits: Any, targets: Any, mask: Any) -> Any:
    """The mean over rows of their means."""
    rows = [loss(logits[row : row + 1], targets[row : row + 1], mask[row : row + 1]) for row in range(len(logits))]
    return sum(rows) / len(rows)


def detached_norm(model: Model) -> None:
    """A norm that is right forward and takes no gradient through its statistics."""
    norm = model.blocks[1].attention_norm
    weight, bias, eps = norm.weight, norm.bias, norm.eps

    def forward(x: "torch.Tensor") -> "torch.Tensor":
        mean, variance = x.mean(-1, keepdim=True).detach(), x.var(-1, keepdim=True, correction=0).detach()
        normed: torch.Tensor = (x - mean) * (variance + eps).rsqrt()
        return normed * weight + bias

    norm.forward = forward


# ------------------------------------------------------------------------------------------------------- optimizer


def adamw(
    *, bias_correction: bool = True, coupled: bool = False, eps_in_root: bool = False, decay_all: bool = False
) -> Plant:
    """A textbook AdamW with one mistake, in the place of the real one."""

    def create(real: Any, config: Any, model: Model) -> Any:
        import torch

        class Mistaken(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure here
                for group in self.param_groups:
                    for p in group["params"]:
                        state = self.state[p]
                        if not state:
                            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                        state["step"] += 1
                        decay = config.weight_decay if decay_all else group["weight_decay"]
                        gradient = p.grad + decay * p if coupled else p.grad
                        mu = state["exp_avg"].lerp_(gradient, 1 - config.beta1)
                        nu = state["exp_avg_sq"].lerp_(gradient.square(), 1 - config.beta2)
                        if bias_correction:
                            mu = mu / (1 - config.beta1 ** state["step"])
                            nu = nu / (1 - config.beta2 ** state["step"])
                        root = (nu + config.eps).sqrt() if eps_in_root else nu.sqrt() + config.eps
                        p -= group["lr"] * (mu / root + (0 if coupled else decay) * p)

        groups = real(config, model).param_groups
        return Mistaken([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], {"lr": 0.0})

    return replacing("torch_gpt.optimizer.create_optimizer", create)


def clip_each_tensor(clip: Any, model: Model, limit: float) -> "torch.Tensor":
    """Each gradient clipped to the limit by its own norm."""
    import torch

    gradients = [parameter.grad for parameter in model.parameters()]
    norm = torch.nn.utils.get_total_norm(gradients)
    for gradient in gradients:
        gradient.mul_((limit / gradient.norm()).clamp(max=1.0))
    return norm


# -------------------------------------------------------------------------------------------------------- decoding


def into_a_shorter_ring(write: Any, cache: "torch.Tensor", new: "torch.Tensor", positions: "torch.Tensor") -> None:
    """Position p goes into slot p mod (slots - 1), and is looked for in slot p mod slots."""
    write(cache[:, :, :-1], new, positions)


def always_position_0(prepare: Any, model: Model, limit: int) -> Any:
    """Every step rotates by the angles of position 0, or adds the first row of the table."""
    weights = prepare(model, limit)
    if weights.rotary is not None:
        return weights._replace(rotary=tuple(table[:1].expand_as(table) for table in weights.rotary))
    table = weights.position_embedding
    return weights._replace(position_embedding=table[:1].expand_as(table))


def one_slot_more(visible_slots: Any, positions: "torch.Tensor", slots: int, window: int | None) -> "torch.Tensor":
    """The slot of the next position is seen too."""
    visible: "torch.Tensor" = visible_slots(positions, slots, window)
    return visible | visible.roll(1, dims=-1)


def every_slot(visible_slots: Any, positions: "torch.Tensor", slots: int, window: int | None) -> "torch.Tensor":
    """All slots are seen."""
    visible: "torch.Tensor" = visible_slots(positions, slots, window)
    return visible | True


@contextmanager
def as_long_as_the_longest(model: Model) -> Iterator[None]:
    """The cache of every row has as many tokens as that of the longest prompt, and its steps go on from there."""
    from torch_gpt import decode

    prefill, step = decode.prefill, decode.step
    missing: list[Any] = []

    def wrong_prefill(model: Model, tokens: Any, lengths: Any, slots: int) -> Any:
        missing[:] = [lengths.max() - lengths]
        logits, _ = prefill(model, tokens, lengths, slots)
        return logits, prefill(model, tokens, lengths + missing[0], slots)[1]

    def wrong_step(weights: Any, config: Any, precision: Any, tokens: Any, first: Any, cache: Any) -> Any:
        return step(weights, config, precision, tokens, first + missing[0], cache)

    with mock.patch.multiple("torch_gpt.decode", prefill=wrong_prefill, step=wrong_step):
        yield


# ----------------------------------------------------------------------------------------------------------- dtype


def bf16_residual(model: Model) -> None:
    """The residual stream rounded to bf16 after every block."""
    import torch

    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, taps=None, forward=forward: forward(x, taps).to(torch.bfloat16).to(x.dtype)


def short_mantissa(linear: Any, x: "torch.Tensor", weight: "torch.Tensor", bias: Any = None) -> "torch.Tensor":
    """fp32 products with weights of 19 bits."""
    import torch

    short = (weight.view(torch.int32) & ~0xF).view(torch.float32)  # four of 23 bits gone
    product: torch.Tensor = linear(x, short, bias)
    return product
