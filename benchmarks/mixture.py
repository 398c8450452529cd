"""What a mixture of experts costs: its products, a training step, a token of decoding.

    python benchmarks/mixture.py [--part products training decoding] [--rounds 6]

- `products`: one layer of 8 experts, 2 a token, 2,048 tokens, 512 -> 1,024 -> 512 in fp32, forward and backward:
  `grouped` against the dense einsum, in both frameworks.
- `training`: a Mixtral of 4 such layers in PyTorch, two rows of 512 tokens, in bf16 where the CPU has it and in fp32:
  ours against transformers' of the same shape, by each of its implementations of experts, neither compiled.
- `decoding`: seconds of a token with 32 experts against 8, both with 2 active.

Prints JSON rows {name, ours, peer, peer_name, ratio, target, met, unit}. Sides run in turns, each in a process of its
own. `training` needs `transformers`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from training_sides import mixtral_step, torch_step
from turns import Row, Step, dtype_of, in_turns, print_rows, row

TOKENS, EMBED, EXPERT, EXPERTS, CHOSEN = 2048, 512, 1024, 8, 2
TARGETS = {"JAX": 2.2, "PyTorch": 1.2}
FLAT = 1.15  # of a token's time; twice the same step differs by a tenth
MODEL: dict[str, Any] = {
    "embed_dim": EMBED,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "position": "rope",
    "norm": "rms",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "vocab_size": 4096,
    "n_experts": EXPERTS,
    "experts_per_token": CHOSEN,
    "expert_dim": EXPERT,
}
ROWS, LENGTH = 2, 512
THEIRS = ("eager", "grouped_mm")  # `batched_mm` copies the kernels of every token: more than 20 GB here


def drawn() -> tuple[Any, ...]:
    """Tokens, their experts and weights, and the kernels `[experts, inputs, outputs]`."""
    random = np.random.default_rng(0)
    x = random.standard_normal((TOKENS, EMBED), np.float32)
    chosen = np.argsort(random.random((TOKENS, EXPERTS)), axis=1)[:, :CHOSEN]
    weights = np.full((TOKENS, CHOSEN), 0.5, np.float32)
    shapes = [(EXPERTS, EMBED, EXPERT), (EXPERTS, EMBED, EXPERT), (EXPERTS, EXPERT, EMBED)]
    return x, chosen, weights, [random.standard_normal(shape, np.float32) / 23 for shape in shapes]


def jax_products(implementation: Any) -> Step:
    import jax
    import jax.numpy as jnp

    from jax_gpt.moe import Kernels, experts_of

    x, drawn_experts, weights, kernels = drawn()
    chosen, mix = jnp.asarray(drawn_experts), experts_of(implementation)

    def loss(x: jax.Array, weights: jax.Array, kernels: Kernels) -> jax.Array:
        return (mix(x, chosen, weights, kernels, lambda up, gate: jax.nn.silu(gate) * up) ** 2).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    arrays = (jnp.asarray(x), jnp.asarray(weights), Kernels(*map(jnp.asarray, kernels)))
    return lambda _: float(jax.block_until_ready(step(*arrays))[0][0, 0])


def torch_products(implementation: Any) -> Step:
    import torch
    from torch.nn.functional import silu

    from torch_gpt.memory import keep_freed_memory
    from torch_gpt.moe import Kernels, experts_of

    keep_freed_memory()
    x, chosen, weights, kernels = drawn()
    mix = experts_of(implementation)
    leaves = [torch.tensor(array, requires_grad=True) for array in (x, weights, *(k.swapaxes(1, 2) for k in kernels))]
    index = torch.tensor(chosen)

    def step(_: int) -> float:
        for leaf in leaves:
            leaf.grad = None
        x, weights, *kernels = leaves
        (mix(x, index, weights, Kernels(*kernels), lambda up, gate: silu(gate) * up) ** 2).sum().backward()
        assert x.grad is not None
        return float(x.grad[0, 0])

    return step


def products(rounds: int) -> list[Row]:
    """Both frameworks."""
    found = []
    for framework, side in {"JAX": jax_products, "PyTorch": torch_products}.items():
        timings = in_turns({name: partial(side, name) for name in ("grouped", "reference")}, rounds=rounds, steps=3)
        ours, dense = (1 / timings[name].best for name in ("grouped", "reference"))
        name = f"products of {EXPERTS} experts, {CHOSEN} active, {TOKENS} tokens, forward and backward, {framework}"
        found.append(row(name, ours, dense, "dense einsum", "1/s", target=TARGETS[framework]))
    return found


def training(rounds: int) -> list[Row]:
    """Ours against each of theirs, in PyTorch: in bf16, where the CPU has it, and fp32."""
    return [entry for dtype in dict.fromkeys([dtype_of("PyTorch"), "float32"]) for entry in _training(dtype, rounds)]


def _training(dtype: str, rounds: int) -> list[Row]:
    shape = (ROWS, LENGTH, dtype)
    sides: dict[str, Any] = {"ours": partial(torch_step, *shape, MODEL)}
    sides |= {name: partial(mixtral_step, *shape, experts=name, model=MODEL) for name in THEIRS}
    timings = in_turns(sides, rounds=rounds, steps=3)
    rates = {name: ROWS * LENGTH / timing.best for name, timing in timings.items()}
    fastest = max((name for name in rates if name != "ours"), key=lambda name: rates[name])
    return [
        row(
            f"training a Mixtral of {MODEL['n_layers']} layers, B{ROWS} T{LENGTH}, PyTorch {dtype}",
            rates["ours"],
            rates[name],
            f"transformers, {name}",
            "tokens/s",
            target=1.3 if name == fastest else None,
        )
        for name in rates
        if name != "ours"
    ]


def jax_decoding(experts: int) -> Step:
    import jax
    import jax.numpy as jnp

    from gpt_core.config import ModelConfig
    from jax_gpt import decode
    from jax_gpt.model import GPT, initialiser

    config = ModelConfig(context_length=512, **MODEL | {"n_experts": experts})
    model = GPT(config, initialiser(0), experts="auto")
    weights = decode.prepare(model, 512)
    slots = (512,) * config.n_layers
    cache = decode.prefill(model, jnp.zeros((1, 8), jnp.int32), jnp.full(1, 8), slots)[1]
    step = jax.jit(
        lambda weights, token, first, cache: decode.step(weights, config, model.precision, token, first, cache)
    )

    def tokens(number: int) -> float:
        nonlocal cache
        random = np.random.default_rng(number)
        for position in range(8, 8 + 32):
            token = jnp.asarray(random.integers(0, config.vocab_size, (1, 1)), jnp.int32)
            logits, cache = step(weights, token, jnp.full(1, position), cache)
        return float(logits[0, 0, 0])

    return tokens


def torch_decoding(experts: int, *, compiled: bool) -> Step:
    import torch

    from gpt_core.config import ModelConfig
    from torch_gpt import decode
    from torch_gpt.model import GPT, initialiser

    config = ModelConfig(context_length=512, **MODEL | {"n_experts": experts})
    model = GPT(config, initialiser(0), experts="auto").eval()
    weights = decode.prepare(model, 512)
    prompt = torch.zeros(1, 8, dtype=torch.long)
    cache = decode.prefill(model, prompt, torch.full((1,), 8), (512,) * config.n_layers)[1]

    def tokens(number: int) -> float:
        nonlocal cache
        random = np.random.default_rng(number)
        for position in range(8, 8 + 32):
            token = torch.tensor(random.integers(0, config.vocab_size, (1, 1)))
            first = torch.full((1,), position)
            logits, cache = decode.step(weights, config, model.precision, token, first, cache, compiled)
        return float(logits[0, 0, 0])

    return tokens


def decoding(rounds: int) -> list[Row]:
    """A token's time with four times the experts."""
    few, many = EXPERTS, 4 * EXPERTS
    sides: dict[str, Callable[[int], Step]] = {
        "JAX": jax_decoding,
        "PyTorch": partial(torch_decoding, compiled=False),
        "PyTorch compiled": partial(torch_decoding, compiled=True),
    }
    found = []
    for name, side in sides.items():
        timings = in_turns({str(n): partial(side, n) for n in (few, many)}, rounds=rounds, steps=3)
        ours, peer = (timings[str(n)].best / 32 for n in (many, few))
        what = f"a token of decoding, {many} experts of which {CHOSEN} are active, {name} float32"
        found.append(row(what, ours, peer, f"{few} experts", "s", at_most=FLAT))
    return found


PARTS = {"products": products, "training": training, "decoding": decoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    print_rows([entry for part in options.part for entry in PARTS[part](options.rounds)])


if __name__ == "__main__":
    main()
