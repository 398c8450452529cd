"""Training GPT-2 124M, B2 T512: ours against Hugging Face's GPT-2, compiled and eager.

    python benchmarks/training.py [--dtype float32] [--rounds 5]

PyTorch in bf16, where the CPU has it, and fp32, JAX in fp32 (its bf16 products are slow on a CPU). Prints JSON rows
{name, ours, peer, peer_name, ratio, target, met, unit}: tokens a second by the median step, and peak memory. Sides run
in turns, each in a process of its own. Needs `transformers`.
"""

import argparse
from functools import partial

from training_sides import hugging_face_gpt2_step, jax_step, torch_step
from turns import Row, Side, dtype_of, in_turns, print_rows, row

BATCH, TIME = 2, 512
TARGETS = {("JAX", "float32"): 1.6, ("PyTorch", "bfloat16"): 1.2}


def rows(dtype: str, rounds: int) -> list[Row]:
    """Ours against each peer in one dtype."""
    shape = (BATCH, TIME, dtype)
    ours: dict[str, Side] = {"PyTorch": partial(torch_step, *shape, compile=True)}
    if dtype == "float32":
        ours["JAX"] = partial(jax_step, *shape)
    peers: dict[str, Side] = {
        f"Hugging Face GPT-2, {form}": partial(hugging_face_gpt2_step, *shape, compiled=form == "compiled")
        for form in ("compiled", "eager")
    }
    found = in_turns(ours | peers, rounds=rounds, steps=3, warm=2)
    tokens = BATCH * TIME
    results = []
    for framework in ours:
        name = f"training GPT-2 124M, B{BATCH} T{TIME}, {framework} {dtype}"
        for peer in peers:
            target = TARGETS.get((framework, dtype)) if peer.endswith("compiled") else None
            rates = (tokens / found[framework].median, tokens / found[peer].median)
            results.append(row(name, rates[0], rates[1], peer, "tokens/s", target=target))
        compiled = next(iter(peers))
        memory = (found[framework].peak_memory, found[compiled].peak_memory)
        bound = 1.0 if (framework, dtype) == ("PyTorch", "bfloat16") else None
        results.append(row(f"{name}: peak memory", *memory, compiled, "bytes", at_most=bound, less_is_better=True))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="only this")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dtypes = [options.dtype] if options.dtype else list(dict.fromkeys([dtype_of("PyTorch"), "float32"]))
    print_rows([entry for dtype in dtypes for entry in rows(dtype, options.rounds)])


if __name__ == "__main__":
    main()
