"""The efficiency table: plain GPT-2, with RoPE, grouped queries, a sliding window, experts, each on top of the last.

    python benchmarks/table.py [--part speed perplexity] [--table FILE] [--work DIR]

- `speed`: shape of GPT-2 124M, one row of T 4096: tokens a second and peak memory of training, bytes of the cache of
  keys and values of one sequence. Each of the other rows runs in turns with plain GPT-2, a mixture of 8 experts, 2 of
  them active, with the row before it: a dense model of as many active parameters.
- `perplexity`: a small model trained by `jax-gpt train` and `torch-gpt train` on the interpreter's library, rows of
  512 tokens, equal steps; perplexity of the whole validation text, cut into rows of 1, 2 and 4 times that length.

12 heads, 4 kv heads and a window of 256 (in the small model 6, 2 and 128). JAX in fp32, PyTorch in bf16 where the
CPU has it. Prints JSON rows (see `turns.row`); FILE gets the table itself.
"""

import argparse
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from training_sides import VOCAB, jax_step, torch_step
from turns import Row, Side, dtype_of, in_turns, print_rows, row

STANDARD, WINDOW, MIXTURE = "Standard GPT-2", "+ Sliding window", "+ Mixture (8 experts, 2 active)"
MODELS: dict[str, dict[str, Any]] = {
    STANDARD: {},
    "+ RoPE": {"position": "rope"},
    "+ GQA": {"position": "rope", "grouped": True},
    WINDOW: {"position": "rope", "grouped": True, "window": True},
    MIXTURE: {"position": "rope", "grouped": True, "window": True, "experts": True},
}
PEERS = {name: WINDOW if name == MIXTURE else STANDARD for name in MODELS}
FRAMEWORKS = ("JAX", "PyTorch")
TIME, TRAINED = 4096, 512
Table = dict[str, dict[str, dict[str, Any]]]


def model(name: str, heads: int, kv_heads: int, window: int, embed: int = 768) -> dict[str, Any]:
    """The model section of a row of the table."""
    fields = dict(MODELS[name])
    grouped = fields.pop("grouped", False)
    if fields.pop("window", False):
        fields["sliding_window"] = window
    if fields.pop("experts", False):  # two of three kernels each have the parameters of one MLP of two kernels
        fields |= {"n_experts": 8, "expert_dim": 4 * embed // 3, "gated_mlp": True, "activation": "silu"}
    return fields | {"n_heads": heads, "n_kv_heads": kv_heads if grouped else heads}


def speed(framework: str, table: Table) -> list[Row]:
    """Throughput, memory and cache of one framework."""
    dtype = dtype_of(framework)
    step = {"JAX": jax_step, "PyTorch": partial(torch_step, compile=True)}[framework]
    sides: dict[str, Side] = {name: partial(step, 1, TIME, dtype, model(name, 12, 4, 256)) for name in MODELS}
    results = []
    for name in list(MODELS)[1:]:
        peer = PEERS[name]
        found = in_turns({side: sides[side] for side in (peer, name)}, rounds=3)
        plain, ours = found[peer], found[name]
        for entry, timing in found.items():
            numbers = table[framework].setdefault(entry, {})
            numbers["tokens_per_second"] = max(TIME / timing.best, numbers.get("tokens_per_second", 0))
            numbers["peak_memory_bytes"] = timing.peak_memory
        target = 0.97 if name == "+ RoPE" else None
        what = f"training, T {TIME}, {framework} {dtype}: {name}"
        results.append(row(what, TIME / ours.best, TIME / plain.best, peer, "tokens/s", target=target))
        bound = 1.0 if name == "+ GQA" else None
        memory = (ours.peak_memory, plain.peak_memory)
        results.append(row(f"{what}: peak memory", *memory, peer, "bytes", at_most=bound, less_is_better=True))
    for name in MODELS:
        table[framework][name]["cache_bytes"] = cache_bytes(framework, name)
    ours_bytes, plain_bytes = (table[framework][name]["cache_bytes"] for name in ("+ GQA", STANDARD))
    cache = f"cache of one sequence, T {TIME}, {framework} {dtype}: "
    results.append(row(cache + "+ GQA", ours_bytes, plain_bytes, STANDARD, "bytes", at_most=1 / 3))
    window_bytes = table[framework][WINDOW]["cache_bytes"]
    results.append(row(cache + WINDOW, window_bytes, plain_bytes, STANDARD, "bytes", less_is_better=True))
    return results


def cache_bytes(framework: str, name: str) -> int:
    """Bytes of keys and values for one sequence of T tokens, as decoding allocates them; in a process of its own."""
    command = [sys.executable, __file__, "--cache", framework, name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def allocated_cache(framework: str, name: str) -> int:
    """As `cache_bytes`, in this process."""
    from gpt_core.config import ModelConfig
    from gpt_core.precision import Precision
    from gpt_core.text.generation import cache_slots

    config = ModelConfig(vocab_size=512, context_length=TIME, **model(name, 12, 4, 256))
    dtype: Any = dtype_of(framework)
    cache = {"JAX": jax_cache, "PyTorch": torch_cache}[framework]
    return cache(config, Precision(dtype, dtype), cache_slots(config, TIME, 1))


def jax_cache(config: Any, precision: Any, slots: tuple[int, ...]) -> int:
    import jax.numpy as jnp

    from jax_gpt.decode import prefill
    from jax_gpt.model import GPT, initialiser

    gpt = GPT(config, initialiser(0, precision), precision=precision)
    cache = prefill(gpt, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), slots)[1]
    return sum(x.nbytes for x in (*cache.key, *cache.value))


def torch_cache(config: Any, precision: Any, slots: tuple[int, ...]) -> int:
    import torch

    from torch_gpt.decode import prefill
    from torch_gpt.model import GPT, initialiser

    gpt = GPT(config, initialiser(0, precision), precision=precision)
    cache = prefill(gpt, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long), slots)[1]
    return sum(x.nbytes for x in (*cache.key, *cache.value))


def perplexity(framework: str, table: Table, work: Path, steps: int) -> list[Row]:
    """Of the small model, at the trained length and beyond it."""
    data = work / "stdlib"
    if not data.exists():
        _command("gpt-data", "prepare", "stdlib", str(data), "--validation-fraction=0.01")
    program = {"JAX": "jax-gpt", "PyTorch": "torch-gpt"}[framework]
    section = {"JAX": {"jax": {"loss_chunk": 256}}, "PyTorch": {"torch": {"compile": True, "loss_chunk": 256}}}
    for name in MODELS:
        place = work / f"{program}-{'-'.join(re.findall('[a-z0-9]+', name.lower()))}"
        config = {
            "model": model(name, 6, 2, 128, embed=96)
            | {"vocab_size": VOCAB, "context_length": 4 * TRAINED, "n_layers": 4, "embed_dim": 96},
            "data": {"prepared": str(data)},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20, "final_learning_rate": 3e-4},
            "train": {
                "steps": steps,
                "batch_size": 2,
                "context_length": TRAINED,
                "dtype": dtype_of(framework),
                "evaluate_every": steps,
                "evaluation_batches": 16,
                "checkpoint_every": steps,
            },
            **section[framework],
        }
        file = place.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config))
        _command(program, "train", "--config", str(file), "--out", str(place))
        table[framework].setdefault(name, {})["perplexity"] = {
            # A limit above all batches: each length sees every token. A lower one picks other places of the text.
            times: _command(
                program,
                "eval",
                str(place),
                f"--train.context_length={times * TRAINED}",
                "--train.batch_size=1",
                "--train.evaluation_batches=1000000",
            )["validation_perplexity"]
            for times in (1, 2, 4)
        }
    found = {name: numbers["perplexity"] for name, numbers in table[framework].items()}
    what = f"validation perplexity after {steps} steps, {framework} {dtype_of(framework)}"
    results = [
        row(
            f"{what}: {name}",
            found[name][1],
            found[PEERS[name]][1],
            PEERS[name],
            "perplexity",
            at_most=1.0 if name == "+ RoPE" else None,
            less_is_better=True,
        )
        for name in list(MODELS)[1:]
    ]
    for name, at in found.items():
        for times in (2, 4):
            bound = 1.05 if name == WINDOW and times == 4 else None
            results.append(
                row(
                    f"{what}, rows {times} times as long as trained: {name}",
                    at[times],
                    at[1],
                    "the trained length",
                    "perplexity",
                    at_most=bound,
                    less_is_better=True,
                )
            )
    return results


def _command(program: str, *arguments: str) -> Any:
    """Run a console command beside this interpreter; what it prints as JSON."""
    command = [str(Path(sys.executable).with_name(program)), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=["speed", "perplexity"], default=["speed", "perplexity"])
    parser.add_argument("--framework", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    parser.add_argument("--table", type=Path, help="file for the table, as JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/table"), help="folder of the small model's runs")
    parser.add_argument("--steps", type=int, default=200, help="of the small model")
    parser.add_argument("--cache", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cache:
        print(allocated_cache(*options.cache))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    table: Table = {framework: {} for framework in options.framework}
    results = []
    for framework in options.framework:
        if "speed" in options.part:
            results += speed(framework, table)
        if "perplexity" in options.part:
            results += perplexity(framework, table, options.work, options.steps)
        if options.table:
            options.table.write_text(json.dumps(table, indent=2))
    print_rows(results)


if __name__ == "__main__":
    main()
