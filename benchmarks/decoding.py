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
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

from turns import Row, Step, Timing, in_turns, print_rows, row

PROMPT = 32
WINDOWED: dict[str, Any] = {"position": "rope", "n_heads": 12, "n_kv_heads": 4, "sliding_window": 256}
MODELS: dict[str, dict[str, Any]] = {"GPT-2": {}, "Starcoder2": WINDOWED}
TARGETS = {("jax", "float32"): 2.5, ("torch", "float32"): 2.0, ("torch", "bfloat16"): 2.0}


def jax_side(dtype: Any, new: int, rows: int = 1, **model: Any) -> Callable[[], Any]:
    from gpt_core.config import ModelConfig
    from gpt_core.precision import Precision
    from gpt_core.text.generation import SamplingConfig
    from jax_gpt.decode import prepare
    from jax_gpt.generate import generate
    from jax_gpt.model import GPT, initialiser

    precision = Precision(dtype, dtype)
    gpt = GPT(ModelConfig(**model), initialiser(0, precision), precision=precision, implementation="auto")
    weights = prepare(gpt, PROMPT + new)
    prompts = [list(range(PROMPT))] * rows
    return lambda: generate(gpt, prompts, SamplingConfig(max_new_tokens=new), weights=weights)


def torch_side(dtype: Any, new: int, rows: int = 1, **model: Any) -> Callable[[], Any]:
    from gpt_core.text.generation import SamplingConfig
    from torch_gpt.decode import prepare
    from torch_gpt.generate import generate

    gpt = _torch_model(dtype, **model)
    weights = prepare(gpt, PROMPT + new)
    options = SamplingConfig(max_new_tokens=new)
    return lambda: generate(gpt, [list(range(PROMPT))] * rows, options, weights=weights, compiled=True)


def torch_graph_side(dtype: Any, new: int, rows: int = 1, **model: Any) -> Callable[[], Any]:
    """A step and the choice of its token as one CUDA graph, which is replayed; without a GPU the same calls, eager."""
    import torch

    from gpt_core.text.generation import cache_slots
    from torch_gpt.decode import prefill, prepare, step

    gpt = _torch_model(dtype, **model)
    device = gpt.token_embedding.device
    weights, slots = prepare(gpt, PROMPT + new), cache_slots(gpt.config, PROMPT + new, 1)
    prompts = torch.arange(PROMPT, device=device).expand(rows, -1)
    lengths = torch.full((rows,), PROMPT, device=device)
    token, position = torch.zeros_like(lengths), lengths.clone()
    cache = prefill(gpt, prompts, lengths, slots)[1]

    def one() -> None:
        logits, _ = step(weights, gpt.config, gpt.precision, token[:, None], position, cache, compiled=True)
        token.copy_(logits[:, 0].argmax(-1))
        position.add_(1)

    advance = one
    if device.type == "cuda":
        for _ in range(3):  # compiles, and lets the allocator settle
            one()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            one()
        advance = graph.replay

    def run() -> list[list[int]]:
        logits, fresh = prefill(gpt, prompts, lengths, slots)
        for mine, theirs in zip((*cache.key, *cache.value), (*fresh.key, *fresh.value), strict=True):
            mine.copy_(theirs)
        token.copy_(logits.argmax(-1))
        position.copy_(lengths)
        written = [token.clone()]
        for _ in range(new - 1):
            advance()
            written.append(token.clone())
        tokens: list[list[int]] = torch.stack(written, dim=1).tolist()
        return tokens

    return run


def _torch_model(dtype: Any, **model: Any) -> Any:
    import torch

    from gpt_core.config import ModelConfig
    from gpt_core.precision import Precision
    from torch_gpt.model import GPT, initialiser

    precision = Precision(dtype, dtype)
    gpt = GPT(ModelConfig(**model), initialiser(0, precision), precision=precision, implementation="auto")
    return gpt.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()


def hugging_face_side(dtype: str, new: int, rows: int = 1, **model: Any) -> Callable[[], Any]:
    import torch
    from training_sides import starcoder2
    from transformers import GPT2Config, GPT2LMHeadModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "n_kv_heads" in model:
        gpt = starcoder2(1024, heads=model["n_heads"], kv_heads=model["n_kv_heads"], window=model["sliding_window"])
    else:
        names = {"n_layers": "n_layer", "n_heads": "n_head", "embed_dim": "n_embd", "vocab_size": "vocab_size"}
        gpt = GPT2LMHeadModel(GPT2Config(**{names[field]: value for field, value in model.items() if field in names}))
    gpt = gpt.to(device, getattr(torch, dtype)).eval()
    prompt = torch.arange(PROMPT, device=device).expand(rows, -1)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda: gpt.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


SIDES: dict[str, Callable[..., Callable[[], Any]]] = {
    "jax": jax_side,
    "torch": torch_side,
    "Hugging Face generate": hugging_face_side,
}
GRAPHS: dict[str, Callable[..., Callable[[], Any]]] = {"torch, CUDA graph": torch_graph_side}  # of a GPU


def speeds(
    dtype: str, new: int, rounds: int, batches: Sequence[int] = (1,), sides: Sequence[str] = tuple(SIDES), **model: Any
) -> dict[int, dict[str, float]]:
    """Number of rows -> side -> tokens a second of all rows together, the best of the rounds, in turns."""
    found = timings(dtype, new, rounds, batches, sides, **model)
    return {rows: {side: rows * new / timing.result[rows] for side, timing in found.items()} for rows in batches}


def timings(
    dtype: str, new: int, rounds: int, batches: Sequence[int], sides: Sequence[str], **model: Any
) -> dict[str, Timing]:
    """Every side, in turns; its result is the least seconds that each number of rows has taken."""
    return in_turns({side: partial(build, side, dtype, new, batches, **model) for side in sides}, rounds=rounds)


def build(side: str, dtype: str, new: int, batches: Sequence[int], **model: Any) -> Step:
    """A side as a step that takes any number: all batches, and the least seconds that each has taken."""
    runs = {rows: (SIDES | GRAPHS)[side](dtype, new, rows, **model) for rows in batches}
    best = dict.fromkeys(batches, float("inf"))

    def step(_: int) -> dict[int, float]:
        for rows, run in runs.items():
            start = time.perf_counter()
            run()
            best[rows] = min(best[rows], time.perf_counter() - start)
        return best

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
        found = speeds(dtype, options.new, options.rounds, **model)[1]
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
