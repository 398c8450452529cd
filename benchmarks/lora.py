"""Training an adapter of rank 8 beside all linear layers of SmolLM2-135M's shape, B2 T512.

    python benchmarks/lora.py [--rounds 3]

Peak memory against our own training of all weights (at most 0.6 times), tokens a second against `peft` with
`transformers` in PyTorch, neither compiled, since PEFT's layers take minutes; JAX's figures beside. Weights are random.
Prints JSON rows {name, ours, peer, peer_name, ratio, target, met, unit}, of the median step; each side has a process of
its own. Needs `peft`.
"""

import argparse
from functools import partial

from training_sides import jax_step, peft_llama_step, torch_step
from turns import Row, Timing, dtype_of, in_turns, one_after_another, print_rows, row

BATCH, TIME, RANK = 2, 512, 8
MODEL = {
    "vocab_size": 49152,
    "pad_vocab_size_multiple": 1,
    "n_layers": 30,
    "n_heads": 9,
    "n_kv_heads": 3,
    "embed_dim": 576,
    "mlp_dim": 1536,
    "position": "rope",
    "norm": "rms",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
}
PEER = {
    "vocab_size": 49152,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
}


def torch_rows(rounds: int) -> list[Row]:
    """An adapter of ours and one of PEFT in turns; then all weights of ours, by itself."""
    dtype = dtype_of("PyTorch")
    shape, peer, whole = (BATCH, TIME, dtype), "peft and transformers", "all weights trained"
    # The base as SmolLM2 is published, and as both load it.
    sides = {
        "ours": partial(torch_step, *shape, MODEL, {"rank": RANK, "base_dtype": dtype}),
        peer: partial(peft_llama_step, *shape, rank=RANK, compiled=False, **PEER),
    }
    found = in_turns(sides, rounds=rounds, steps=3, warm=1)
    found |= one_after_another({whole: partial(torch_step, *shape, MODEL)}, rounds=rounds, warm=1)
    return _rows(f"PyTorch {dtype}", found, [peer], whole)


def jax_rows(rounds: int) -> list[Row]:
    """An adapter, and all weights."""
    shape, whole = (BATCH, TIME, dtype_of("JAX")), "all weights trained"
    sides = {"ours": partial(jax_step, *shape, MODEL, {"rank": RANK}), whole: partial(jax_step, *shape, MODEL)}
    return _rows(f"JAX {shape[2]}", one_after_another(sides, rounds=rounds, warm=1), [], whole)


def _rows(where: str, found: dict[str, Timing], peers: list[str], whole: str) -> list[Row]:
    name = f"an adapter of SmolLM2-135M, B{BATCH} T{TIME}, {where}"
    rates = {side: BATCH * TIME / timing.median for side, timing in found.items()}
    memory = {side: timing.peak_memory for side, timing in found.items()}
    bound = 0.6 if peers else None
    return [
        *(row(name, rates["ours"], rates[peer], peer, "tokens/s", target=1.0) for peer in peers),
        *(
            row(f"{name}: peak memory", memory["ours"], memory[peer], peer, "bytes", less_is_better=True)
            for peer in peers
        ),
        row(name, rates["ours"], rates[whole], whole, "tokens/s"),
        row(f"{name}: memory", memory["ours"], memory[whole], whole, "bytes", less_is_better=True, at_most=bound),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print_rows([*torch_rows(options.rounds), *jax_rows(options.rounds)])


if __name__ == "__main__":
    main()
