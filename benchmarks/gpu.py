"""The promises about speed on one GPU, in bf16: attention alone, training steps, decoding.

    python benchmarks/gpu.py [--part attention training window decoding]

Needs `transformers` and builds of JAX and PyTorch for the GPU. Prints JSON rows (see `turns.row`). Sides of the last
three run in turns, each in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import decoding
from training_sides import hugging_face_gpt2_step, hugging_face_starcoder2_step, jax_step, torch_step
from turns import Row, Side, in_turns, print_rows, row

HEADS, HEAD_DIM, WINDOW = 12, 64, 256
LENGTH, ROWS = 4096, 4  # of a batch with a window
STEPS = {"JAX": jax_step, "PyTorch": partial(torch_step, compile=True)}


def jax_attention(name: str, window: int | None) -> Callable[[], Any]:
    """Forward and backward of `[4, 4096, 12, 64]`, without waiting for it."""
    import jax

    from jax_gpt.attention import attention

    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (ROWS, LENGTH, HEADS, HEAD_DIM), "bfloat16") for key in keys]
    mix = partial(attention, window=window, scale=HEAD_DIM**-0.5, implementation=name)
    gradients = jax.jit(lambda *arrays: jax.vjp(mix, *arrays[:3])[1](arrays[3]))
    return lambda: gradients(*arrays)


def torch_attention(name: str, window: int | None) -> Callable[[], Any]:
    """Its twin."""
    import torch

    from torch_gpt.attention import attention

    torch.manual_seed(0)
    *leaves, cotangent = torch.randn(4, ROWS, LENGTH, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in leaves]
    mix = partial(attention, window=window, scale=HEAD_DIM**-0.5, implementation=name)
    return lambda: torch.autograd.grad(mix(*leaves), leaves, cotangent)


def milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int = 10) -> float:
    """Of one call, in a row of them, the median of five rows."""
    wait(run())
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            last = run()
        wait(last)
        found.append((time.perf_counter() - start) / calls)
    return 1000 * statistics.median(found)


def attention(framework: str) -> list[Row]:
    """Window 256 at T 4096 by what `auto` picks, against the others."""
    if framework == "JAX":
        import jax

        side, wait = jax_attention, jax.block_until_ready
        others = {"xla, masked square": ("xla", WINDOW), "banded": ("banded", WINDOW), "auto, full": ("auto", None)}
    else:
        import torch

        side, wait = torch_attention, lambda _: torch.cuda.synchronize()
        others = {"sdpa, masked square": ("sdpa", WINDOW), "banded": ("banded", WINDOW), "auto, full": ("auto", None)}
    ours = milliseconds(side("auto", WINDOW), wait)
    name = f"GPU: attention alone, forward + backward, {framework} bf16, B{ROWS} T{LENGTH}, window {WINDOW}"
    return [
        row(name, ours, milliseconds(side(*other), wait), peer, "ms", less_is_better=True)
        for peer, other in others.items()
    ]


def training() -> list[Row]:
    """GPT-2 124M, B16 T1024."""
    shape = (16, 1024, "bfloat16")
    sides: dict[str, Side] = {name: partial(step, *shape) for name, step in STEPS.items()}
    peer = "Hugging Face GPT-2, compiled"
    sides[peer] = partial(hugging_face_gpt2_step, *shape, compiled=True)
    return step_rows("GPU: training GPT-2 124M, B16 T1024", sides, 16 * 1024, {peer: list(STEPS)})


def window() -> list[Row]:
    """The same shape with RoPE, 4 kv heads and a window, B4 T4096."""
    shape = (ROWS, LENGTH, "bfloat16")
    model = {"position": "rope", "n_heads": HEADS, "n_kv_heads": 4, "sliding_window": WINDOW}
    peer = "Hugging Face Starcoder2, compiled"
    sides: dict[str, Side] = {name: partial(step, *shape, model) for name, step in STEPS.items()}
    sides["PyTorch, masked square"] = partial(STEPS["PyTorch"], *shape, model, attention="sdpa")
    full = {f"{name}, full": partial(step, *shape, model | {"sliding_window": None}) for name, step in STEPS.items()}
    starcoder2 = {"heads": HEADS, "kv_heads": 4, "window": WINDOW, "compiled": True}
    sides |= full | {peer: partial(hugging_face_starcoder2_step, *shape, **starcoder2)}
    against = {peer: list(STEPS), "PyTorch, masked square": ["PyTorch"]} | {f"{name}, full": [name] for name in STEPS}
    return step_rows(f"GPU: training step, window {WINDOW}, B{ROWS} T{LENGTH}", sides, ROWS * LENGTH, against)


def step_rows(what: str, sides: dict[str, Side], tokens: int, against: dict[str, list[str]]) -> list[Row]:
    """Rates and memory of some sides against others."""
    found = in_turns(sides, rounds=3, steps=6, warm=3)
    results = []
    for peer, ours in against.items():
        for name in ours:
            rates = tokens / found[name].median, tokens / found[peer].median
            memory = found[name].peak_memory, found[peer].peak_memory
            results.append(row(f"{what}, {name} bf16", *rates, peer, "tokens/s"))
            results.append(row(f"{what}, {name} bf16: peak memory", *memory, peer, "bytes", less_is_better=True))
    return results


def decode() -> list[Row]:
    """GPT-2 124M, one row, greedy."""
    new = 128
    found = decoding.speeds("bfloat16", new, 3)
    peer = found.pop("Hugging Face generate")
    what = "GPU: greedy cached decoding, 124M, batch 1"
    return [
        row(f"{what}, {side} bf16", rate, peer, "Hugging Face generate", "tokens/s") for side, rate in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"training": training, "window": window, "decoding": decode}
    parser.add_argument("--part", nargs="+", choices=["attention", *parts], default=["attention", *parts])
    parser.add_argument("--framework", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the device
    if options.framework:
        print_rows(attention(options.framework))
        return
    found: list[Row] = []
    for part in options.part:
        if part == "attention":
            for framework in STEPS:  # each alone
                command = [sys.executable, __file__, "--framework", framework]
                found += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        else:
            found += parts[part]()
    print_rows(found)


if __name__ == "__main__":
    main()
