"""Greedy cached decoding in the shape of GPT-2 124M, one row, against Hugging Face `generate` of the same dtype.

    python benchmarks/decoding.py [--rounds 3] [--new 128]

GPT-2 itself against GPT-2; with RoPE, 4 kv heads and a window of 256 against Starcoder2. Needs `transformers`. Prints
JSON rows (see `turns.row`) in tokens a second, the best of the rounds, prompts included. Every side is a process of its
own, and they run in turns. A last row has the cost of a token of a window model far in the text over that near its
start, the median of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from turns import Row, Step, in_turns, print_rows, row

PROMPT = 32
WINDOWED: dict[str, Any] = {"position": "rope", "n_heads": 12, "n_kv_heads": 4, "sliding_window": 256}
MODELS: dict[str, dict[str, Any]] = {"GPT-2": {}, "Starcoder2": WINDOWED}
TARGETS = {("jax", "float32"): 2.5, ("torch", "float32"): 2.0, ("torch", "bfloat16"): 2.0}


def jax_side(dtype: Any, new: int, **model: Any) -> Callable[[], Any]:
    from gpt_core.config import ModelConfig
    from gpt_core.precision import Precision
    from gpt_core.text.generation import SamplingConfig
    from jax_gpt.decode import prepare
    from jax_gpt.generate import generate
    from jax_gpt.model import GPT, initialiser

    precision = Precision(dtype, dtype)
    gpt = GPT(ModelConfig(**model), initialiser(0, precision), precision=precision, implementation="auto")
    weights = prepare(gpt, PROMPT + new)
    return lambda: generate(gpt, [list(range(PROMPT))], SamplingConfig(max_new_tokens=new), weights=weights)


def torch_side(dtype: Any, new: int, **model: Any) -> Callable[[], Any]:
    import torch

    from gpt_core.config import ModelConfig
    from gpt_core.precision import Precision
    from gpt_core.text.generation import SamplingConfig
    from torch_gpt.decode import prepare
    from torch_gpt.generate import generate
    from torch_gpt.model import GPT, initialiser

    precision = Precision(dtype, dtype)
    gpt = GPT(ModelConfig(**model), initialiser(0, precision), precision=precision, implementation="auto")
    gpt = gpt.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    weights = prepare(gpt, PROMPT + new)
    options = SamplingConfig(max_new_tokens=new)
    return lambda: generate(gpt, [list(range(PROMPT))], options, weights=weights, compiled=True)


def hugging_face_side(dtype: str, new: int, **model: Any) -> Callable[[], Any]:
    import torch
    from training_sides import starcoder2
    from transformers import GPT2Config, GPT2LMHeadModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model:
        gpt = starcoder2(1024, heads=model["n_heads"], kv_heads=model["n_kv_heads"], window=model["sliding_window"])
    else:
        gpt = GPT2LMHeadModel(GPT2Config())
    gpt = gpt.to(device, getattr(torch, dtype)).eval()
    prompt = torch.arange(PROMPT, device=device)[None]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda: gpt.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


SIDES: dict[str, Callable[..., Callable[[], Any]]] = {
    "jax": jax_side,
    "torch": torch_side,
    "Hugging Face generate": hugging_face_side,
}


def speeds(dtype: str, new: int, rounds: int, **model: Any) -> dict[str, float]:
    """Tokens a second of every side, in turns."""
    found = in_turns({side: partial(build, side, dtype, new, **model) for side in SIDES}, rounds=rounds)
    return {side: new / timing.best for side, timing in found.items()}


def build(side: str, dtype: str, new: int, **model: Any) -> Step:
    """A side as a step that takes any number."""
    run = SIDES[side](dtype, new, **model)

    def step(_: int) -> None:
        run()

    return step


def flatness(side: Callable[..., Callable[[], Any]], rounds: int) -> float:
    """Seconds a token between the 512th and the 1024th over those of the first 512, window 64."""
    model = {"n_layers": 4, "embed_dim": 256, "n_heads": 4, "position": "rope", "sliding_window": 64}
    model |= {"vocab_size": 512, "context_length": 2048}
    near, far = side("float32", 512, **model), side("float32", 1024, **model)
    near(), far()
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        near()
        middle = time.perf_counter()
        far()
        ratios.append((time.perf_counter() - middle) / (middle - start) - 1)
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=128)
    options = parser.parse_args()
    rows: list[Row] = []
    for (peer, model), dtype in product(MODELS.items(), ("float32", "bfloat16")):
        found = speeds(dtype, options.new, options.rounds, **model)
        theirs = found.pop("Hugging Face generate")
        what = "greedy cached decoding, 124M, batch 1" + (f", window {model['sliding_window']}" if model else "")
        rows += [
            row(
                f"{what}, {side} {dtype}",
                ours,
                theirs,
                f"Hugging Face {peer}, generate",
                "tokens/s",
                target=None if model else TARGETS.get((side, dtype)),
            )
            for side, ours in found.items()
        ]
    flat = flatness(jax_side, options.rounds)
    name = "cost of a token of a window model, 512th to 1024th against the first 512, jax float32"
    print_rows([*rows, row(name, flat, 1.0, "flat", "x", at_most=1.1)])


if __name__ == "__main__":
    main()
