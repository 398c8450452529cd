"""Training with a sliding window of 256 in the shape of GPT-2 124M: what the window saves in a whole step.

    python benchmarks/window_training.py [--part square long memory]

- `square`: T 4096, blocks inside the window against the masked square and the best full attention; in PyTorch against
  Hugging Face's Starcoder2 of the same shape, window and dtype as well.
- `long`: as T grows from 1024 to 16384, the same number of tokens a step, seconds of a token stay the same; at T 16384
  against our best full attention.
- `memory`: of one row, as T grows from 16384 to 65536.

JAX in fp32, PyTorch in bf16 where the CPU has it. Squares of scores of every layer do not fit into 24 GiB, nor do 12
layers of 16384 tokens, so both sides make activations again in the backward pass (`remat: full`) where it says so.
Prints JSON rows (see `turns.row`): tokens a second by the fastest step, or bytes.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from training_sides import hugging_face_starcoder2_step, jax_step, torch_step
from turns import Row, Side, dtype_of, one_after_another, print_rows, row

WINDOW, TOKENS = 256, 16384
ROWS = (16384, 32768, 65536)  # lengths of one row whose memory is measured
FULL = {"JAX": "banded", "PyTorch": "sdpa"}  # our best without a window
STEPS: dict[str, Callable[..., Any]] = {"JAX": jax_step, "PyTorch": torch_step}
EXTRA: dict[str, dict[str, Any]] = {"JAX": {}, "PyTorch": {"compile": True}}


def side(
    framework: str, rows: int, length: int, window: int | None, more: dict[str, Any] | None = None, **options: Any
) -> Side:
    """A step of ours: RoPE, 12 heads, 4 kv heads."""
    model = {"position": "rope", "n_heads": 12, "n_kv_heads": 4, "sliding_window": window} | (more or {})
    return partial(STEPS[framework], rows, length, dtype_of(framework), model, **EXTRA[framework], **options)


def square(framework: str) -> list[Row]:
    """T 4096 against the masked square, the best full attention and the peer."""
    length = 4096
    remat = "full" if framework == "JAX" else "none"
    sides = {
        "banded": side(framework, 1, length, WINDOW, attention="banded", remat=remat),
        "masked square": side(framework, 1, length, WINDOW, attention=_square(framework), remat=remat),
        "best full attention": side(framework, 1, length, None, attention=FULL[framework], remat=remat),
    }
    if framework == "PyTorch":
        shape = (1, length, dtype_of(framework))
        peer = partial(hugging_face_starcoder2_step, *shape, heads=12, kv_heads=4, window=WINDOW)
        sides["Hugging Face Starcoder2, compiled"] = partial(peer, compiled=True)
    found = one_after_another(sides, rounds=2)
    note = f", remat {remat}" if remat != "none" else ""
    name = f"training step, window {WINDOW}, T {length}, {framework} {dtype_of(framework)}{note}"
    ours = found["banded"]
    results = []
    for peer_name, peer in found.items():
        if peer_name != "banded":
            target = None if peer_name == "best full attention" else 1.5
            results.append(row(name, length / ours.best, length / peer.best, peer_name, "tokens/s", target=target))
            memory = (ours.peak_memory, peer.peak_memory)
            results.append(row(f"{name}: peak memory", *memory, peer_name, "bytes", less_is_better=True))
    return results


def _square(framework: str) -> str:
    return {"JAX": "xla", "PyTorch": "sdpa"}[framework]


def long(framework: str) -> list[Row]:
    """As T grows: the time of a token, against the best full attention at last, and the memory."""
    lengths = (1024, 4096, TOKENS)
    sides = {
        str(length): side(framework, TOKENS // length, length, WINDOW, attention="banded", remat="full")
        for length in lengths
    }
    sides["full"] = side(framework, 1, TOKENS, None, attention=FULL[framework], remat="full")
    found = one_after_another(sides, rounds=1)
    dtype = dtype_of(framework)
    rates = [TOKENS / found[entry].best for entry in (str(TOKENS), "full")]
    name = f"training step, window {WINDOW}, T {TOKENS}, {framework} {dtype}, remat full"
    results = [row(name, *rates, f"best full attention ({FULL[framework]})", "tokens/s", target=1.5)]

    seconds = {length: found[str(length)].best / TOKENS for length in lengths}
    name = f"seconds a token, window {WINDOW}, {TOKENS} tokens a step, {framework} {dtype}, remat full"
    results += [
        row(f"{name}: T {length} against T 1024", seconds[length], seconds[1024], "T 1024", "s/token", at_most=1.1)
        for length in lengths[1:]
    ]
    return results


def memory(framework: str) -> list[Row]:
    """Of one row as it grows, in a model small enough that its parameters are little beside it."""
    small = {"n_layers": 2, "vocab_size": 512}
    sides = {
        str(length): side(framework, 1, length, WINDOW, small, attention="banded", remat="full") for length in ROWS
    }
    peaks = [timing.peak_memory for timing in one_after_another(sides, rounds=1).values()]
    slopes = [(peaks[at + 1] - peaks[at]) / (ROWS[at + 1] - ROWS[at]) for at in range(2)]
    name = f"memory of a further position of one row, window {WINDOW}, 2 layers, {framework} {dtype_of(framework)}"
    spans = [f"T {ROWS[at]} to {ROWS[at + 1]}" for at in range(2)]
    return [row(f"{name}: {spans[1]}", slopes[1], slopes[0], spans[0], "bytes", at_most=1.1)]


PARTS = {"square": square, "long": long, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--framework", nargs="+", choices=list(STEPS), default=list(STEPS))
    options = parser.parse_args()
    print_rows([entry for part in options.part for name in options.framework for entry in PARTS[part](name)])


if __name__ == "__main__":
    main()
