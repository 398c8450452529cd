"""Greedy cached decoding of GPT-2 124M, one row, against Hugging Face `generate` of the same dtype.

    python benchmarks/decoding.py [--rounds 3] [--new 128]

Needs `transformers`. Prints JSON rows {name, ours, peer, peer_name, ratio, target, met, unit} in tokens a second, the
best of the rounds, prompts included. Every side is a process of its own, and they run in turns. A last row has the cost
of a token of a window model far in the text over that near its start, the median of the rounds.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PROMPT = 32
TARGETS = {("jax", "float32"): 2.5, ("torch", "float32"): 2.0, ("torch", "bfloat16"): 2.0}


def jax_side(dtype: Any, new: int, **model: Any) -> Callable[[], Any]:
    from gpt_core.config import ModelConfig
    from gpt_core.generation import SamplingConfig
    from gpt_core.precision import Precision
    from jax_gpt.decode import prepare
    from jax_gpt.generate import generate
    from jax_gpt.model import GPT, initialiser

    precision = Precision(dtype, dtype)
    gpt = GPT(ModelConfig(**model), initialiser(0, precision), precision=precision, implementation="auto")
    weights = prepare(gpt, PROMPT + new)
    return lambda: generate(gpt, [list(range(PROMPT))], SamplingConfig(max_new_tokens=new), weights=weights)


def torch_side(dtype: Any, new: int, **model: Any) -> Callable[[], Any]:
    from gpt_core.config import ModelConfig
    from gpt_core.generation import SamplingConfig
    from gpt_core.precision import Precision
    from torch_gpt.decode import prepare
    from torch_gpt.generate import generate
    from torch_gpt.model import GPT, initialiser

    precision = Precision(dtype, dtype)
    gpt = GPT(ModelConfig(**model), initialiser(0, precision), precision=precision, implementation="auto").eval()
    weights = prepare(gpt, PROMPT + new)
    options = SamplingConfig(max_new_tokens=new)
    return lambda: generate(gpt, [list(range(PROMPT))], options, weights=weights, compiled=True)


def hugging_face_side(dtype: str, new: int) -> Callable[[], Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config()).to(getattr(torch, dtype)).eval()
    prompt = torch.arange(PROMPT)[None]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda: gpt.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


SIDES: dict[str, Callable[..., Callable[[], Any]]] = {
    "jax": jax_side,
    "torch": torch_side,
    "Hugging Face generate": hugging_face_side,
}


def serve(connection: Connection, side: str, dtype: str, new: int) -> None:
    """Generate once for each request, and answer with the seconds that it took."""
    run = SIDES[side](dtype, new)
    run()  # compiles
    connection.send(None)
    while connection.recv():
        start = time.perf_counter()
        run()
        connection.send(time.perf_counter() - start)


def speeds(dtype: str, new: int, rounds: int) -> dict[str, float]:
    """Tokens a second of every side, in turns."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, side, dtype, new)))
        processes[-1].start()
        pipes[side].recv()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, pipe in pipes.items():
            pipe.send(True)
            seconds[side].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {side: new / min(spent) for side, spent in seconds.items()}


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
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        found = speeds(dtype, options.new, options.rounds)
        peer = found["Hugging Face generate"]
        for side in ("jax", "torch"):
            target = TARGETS.get((side, dtype))
            ratio = found[side] / peer
            rows.append(
                {
                    "name": f"greedy cached decoding, 124M, batch 1, {side} {dtype}",
                    "ours": found[side],
                    "peer": peer,
                    "peer_name": "Hugging Face generate",
                    "ratio": ratio,
                    "target": target,
                    "met": None if target is None else ratio >= target,
                    "unit": "tokens/s",
                }
            )
    flat = flatness(jax_side, options.rounds)
    rows.append(
        {
            "name": "cost of a token of a window model, 512th to 1024th against the first 512, jax float32",
            "ours": flat,
            "peer": 1.0,
            "peer_name": "flat",
            "ratio": flat,
            "target": 1.1,
            "met": flat <= 1.1,
            "unit": "x",
        }
    )
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
