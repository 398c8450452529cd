"""Speculative against plain decoding of a trained pair, one row, fp32: greedy, where both write the same, and sampled.

    python benchmarks/speculative.py [--out DIR] [--prepared DIR] [--draft-tokens 3] [--new 96] [--rounds 3]

Trains a target (12 layers of 512, 64M parameters) and a draft (1 layer of 64) on the interpreter's own library with
`jax-gpt train`, unless --out holds them already, and converts both for PyTorch. Each prompt is 32 tokens of a module's
source; both ways of decoding run in turns, and greedy must write the same tokens. Prints JSON rows {name, ours, peer,
peer_name, ratio, target, met, unit} in tokens a second, prompts included, the best of the rounds for every prompt, and
the rate of acceptance, and the share of distinct tokens in the texts: a greedy text of a model trained for minutes
repeats itself and is easy to guess, a sampled one is not. Each row is a process of its own.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

MODULES = ("argparse", "ast", "csv", "shutil", "tarfile", "textwrap")
PROMPT = 32
TARGET = 1.3
MODELS = {
    "target": {"n_layers": 12, "n_heads": 8, "embed_dim": 512},
    "draft": {"n_layers": 1, "n_heads": 1, "embed_dim": 64},
}
STEPS = {"target": 240, "draft": 800}


def train(out: Path, name: str, prepared: Path) -> None:
    """One model of the pair, in JAX."""
    model = MODELS[name] | {"vocab_size": 50257, "context_length": 128, "position": "rope"}
    content = {
        "model": model,
        "data": {"prepared": str(prepared)},
        "optimizer": {"learning_rate": 1e-3 if name == "target" else 5e-3, "warmup_steps": 20},
        "train": {
            "steps": STEPS[name],
            "batch_size": 4,
            "evaluate_every": STEPS[name],
            "checkpoint_every": STEPS[name],
        },
        "jax": {"loss_chunk": 256},
    }
    config = out / f"{name}.yaml"
    config.write_text(json.dumps(content))  # JSON is YAML
    console("jax-gpt", "train", "--config", str(config), "--out", str(out / name))
    console("parity", "convert", f"{out / name}@last", str(out / f"{name}-torch"), "--to", "torch")


def console(program: str, *arguments: str) -> None:
    """Run a console command beside this interpreter."""
    subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True, stdout=sys.stderr)


def prompts() -> list[list[int]]:
    import importlib
    import inspect

    from gpt_core.text.gpt2 import gpt2_tokenizer

    sources = [inspect.getsource(importlib.import_module(module)) for module in MODULES]
    return [gpt2_tokenizer().encode(source[len(source) // 2 :][:1000])[:PROMPT] for source in sources]


def jax_side(
    out: Path, new: int, draft_tokens: int, temperature: float
) -> tuple[Callable[[list[int]], Any], Callable[[list[int]], Any]]:
    from gpt_core.runs.saved import find_checkpoint
    from gpt_core.text.generation import SamplingConfig
    from jax_gpt.checkpoint import load
    from jax_gpt.decode import prepare
    from jax_gpt.generate import generate
    from jax_gpt.speculate import speculate

    target, draft = (load(find_checkpoint(f"{out / name}@last"), implementation="auto") for name in MODELS)
    weights = prepare(target, PROMPT + new), prepare(draft, PROMPT + new)
    both = {"target_weights": weights[0], "draft_weights": weights[1], "draft_tokens": draft_tokens}
    options = SamplingConfig(max_new_tokens=new, temperature=temperature)
    return (
        lambda prompt: generate(target, [prompt], options, weights=weights[0]),
        lambda prompt: speculate(target, draft, [prompt], options, **both),
    )


def torch_side(
    out: Path, new: int, draft_tokens: int, temperature: float
) -> tuple[Callable[[list[int]], Any], Callable[[list[int]], Any]]:
    from gpt_core.text.generation import SamplingConfig
    from torch_gpt.checkpoint import load
    from torch_gpt.decode import prepare
    from torch_gpt.generate import generate
    from torch_gpt.speculate import speculate

    target, draft = (load(out / f"{name}-torch", implementation="auto").eval() for name in MODELS)
    weights = prepare(target, PROMPT + new), prepare(draft, PROMPT + new)
    both = {"target_weights": weights[0], "draft_weights": weights[1], "draft_tokens": draft_tokens}
    options = SamplingConfig(max_new_tokens=new, temperature=temperature)
    return (
        lambda prompt: generate(target, [prompt], options, weights=weights[0], compiled=True),
        lambda prompt: speculate(target, draft, [prompt], options, **both, compiled=True),
    )


def measure(side: str, out: Path, new: int, draft_tokens: int, rounds: int, temperature: float) -> dict[str, Any]:
    """A row of the results."""
    plain, speculative = (jax_side if side == "jax" else torch_side)(out, new, draft_tokens, temperature)
    seconds = {"plain": 0.0, "speculative": 0.0}
    accepted = proposed = distinct = 0
    texts = prompts()
    plain(texts[0]), speculative(texts[0])  # compiles
    for prompt in texts:
        best = dict.fromkeys(seconds, float("inf"))
        for _ in range(rounds):
            start = time.perf_counter()
            expected = plain(prompt)
            middle = time.perf_counter()
            found = speculative(prompt)
            end = time.perf_counter()
            if temperature == 0 and found.rows != expected:
                raise SystemExit(f"{side}: speculative decoding wrote another text")
            best = {
                "plain": min(best["plain"], middle - start),
                "speculative": min(best["speculative"], end - middle),
            }
        seconds = {way: seconds[way] + best[way] for way in seconds}
        accepted, proposed = accepted + sum(found.accepted), proposed + sum(found.proposed)
        distinct += len(set(found.rows[0]))
    ours, peer = (new * len(texts) / seconds[way] for way in ("speculative", "plain"))
    way, target = ("greedy", TARGET) if temperature == 0 else (f"temperature {temperature}", None)
    return {
        "name": f"speculative decoding, {draft_tokens} draft tokens, {way}, batch 1, {side} float32",
        "ours": ours,
        "peer": peer,
        "peer_name": "plain decoding",
        "ratio": ours / peer,
        "target": target,
        "met": None if target is None else ours / peer >= target,
        "unit": "tokens/s",
        "acceptance": accepted / proposed,
        "distinct_tokens": distinct / (new * len(texts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/speculative"))
    parser.add_argument("--prepared", type=Path, help="tokens that `gpt-data prepare stdlib` wrote; default: in --out")
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prepared = options.prepared or options.out / "stdlib"
    if not prepared.exists():
        console("gpt-data", "prepare", "stdlib", str(prepared))
    for name in MODELS:
        if not (options.out / f"{name}-torch").exists():
            train(options.out, name, prepared)
    context = multiprocessing.get_context("spawn")
    rows = []
    for side, temperature in product(("jax", "torch"), (0.0, 1.0)):
        with context.Pool(1) as pool:
            given = side, options.out, options.new, options.draft_tokens, options.rounds, temperature
            rows.append(pool.apply(measure, given))
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
