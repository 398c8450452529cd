"""Training a Llama-shaped model of 124M, B2 T512, in PyTorch: ours against Hugging Face's Llama, both compiled.

    python benchmarks/llama_training.py [--dtype float32] [--rounds 5]

In bf16, where the CPU has it, and fp32. Prints JSON rows {name, ours, peer, peer_name, ratio, target, met, unit}:
tokens a second by the median step, and peak memory. Sides run in turns, each in a process of its own. Needs
`transformers`.
"""

import argparse
from functools import partial

from training_sides import hugging_face_llama_step, torch_step
from turns import Row, dtype_of, in_turns, print_rows, row

BATCH, TIME = 2, 512
MODEL = {
    "embed_dim": 768,
    "mlp_dim": 2048,
    "position": "rope",
    "norm": "rms",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
}


def rows(dtype: str, rounds: int) -> list[Row]:
    """Both in one dtype."""
    shape = (BATCH, TIME, dtype)
    peer = "Hugging Face Llama, compiled"
    sides = {
        "ours": partial(torch_step, *shape, MODEL, compile=True),
        peer: partial(hugging_face_llama_step, *shape, compiled=True),
    }
    found = in_turns(sides, rounds=rounds, steps=3, warm=2)
    rates = [BATCH * TIME / found[name].median for name in sides]
    memory = [found[name].peak_memory for name in sides]
    name = f"training a Llama of 124M, B{BATCH} T{TIME}, PyTorch {dtype}"
    return [
        row(name, *rates, peer, "tokens/s", target=1.0),
        row(f"{name}: peak memory", *memory, peer, "bytes", less_is_better=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="only this")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dtypes = [options.dtype] if options.dtype else list(dict.fromkeys([dtype_of("PyTorch"), "float32"]))
    print_rows([entry for dtype in dtypes for entry in rows(dtype, options.rounds)])


if __name__ == "__main__":
    main()
