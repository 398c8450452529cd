"""What `gpu_box.py` asks of a GPU, in the order of what answers are worth; rows are yielded as they are found."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import decoding
from gpu_sizes import TOY, Sizes
from turns import Row, Side, in_turns, row

ROOT = Path(__file__).resolve().parent.parent
HUGGING_FACE = "Hugging Face, compiled"
PEER = "Hugging Face generate"
PROMISED = {"jax": 2500, "torch": 1200}  # tokens/s of one row
RECORD = 468_000  # tokens/s of GPT-2 124M on an H100: llm.c's 140 ms for 524,288 tokens on eight
# XLA's flags of the fastest public JAX run of GPT-2 124M on one GPU, which has its blocks unrolled.
RECORD_FLAGS = (
    "--xla_disable_hlo_passes=rematerialization --xla_gpu_enable_while_loop_double_buffering=true "
    "--xla_gpu_enable_command_buffer="
)
Answer = Callable[[Sizes, Path], Iterator[Row]]


@dataclass(frozen=True)
class Question:
    """One thing to be found out, in a process of its own.

    Args:
        asks: What, in a line.
        minutes: It may take at most.
        answer: Yields rows; writes further files into the folder that it gets.
    """

    asks: str
    minutes: float
    answer: Answer


def require_all(sides: Iterable[str], found: Container[str]) -> None:
    """After what was found has been said: a question that lost a side has failed, and is asked again."""
    dead = [side for side in sides if side not in found]
    if dead:
        raise RuntimeError(f"{', '.join(dead)}: died")


def ceilings(sizes: Sizes, _: Path) -> Iterator[Row]:
    """What this card does: a copy in its memory, and a product of matrices."""
    import torch
    from limits import MEMORY

    from gpt_core.flops import peak_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "H100"

    def seconds(run: Callable[[], Any]) -> float:
        def once() -> float:
            start = time.perf_counter()
            for _ in range(5):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / 5

        once()
        return sorted(once() for _ in range(5))[2]

    source = torch.randint(0, 100, (sizes.copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, sizes.multiplied, sizes.multiplied, device=device, dtype=torch.bfloat16)
    memory = next((rate for part, rate in MEMORY.items() if part in name), 0.0)
    copied = 2 * sizes.copied / seconds(lambda: target.copy_(source))
    yield row("copy in memory, read and written", copied, memory or copied, "data sheet", "bytes/s")
    peak = peak_flops(name, "bfloat16") or 0.0
    multiplied = 2 * sizes.multiplied**3 / seconds(lambda: a @ b)
    yield row("product of bf16 matrices", multiplied, peak or multiplied, "data sheet", "FLOP/s")


def training(sizes: Sizes, _: Path) -> Iterator[Row]:
    """GPT-2 124M, both twins and Hugging Face's, in turns."""
    from training_sides import hugging_face_gpt2_step

    shape, model = (sizes.rows, sizes.length, sizes.dtype), dict(sizes.model)
    sides: dict[str, Side] = {
        "JAX": partial(_jax, "", shape, model),
        "PyTorch": partial(_torch, shape, model, sizes.compiled),
        HUGGING_FACE: partial(hugging_face_gpt2_step, *shape, compiled=sizes.compiled, **sizes.hugging_face),
        "JAX, unrolled, the public record's flags": partial(_jax, RECORD_FLAGS, shape, model, scan_layers=False),
    }
    found = in_turns(sides, rounds=sizes.rounds, steps=sizes.steps, warm=3)
    rates = {name: sizes.rows * sizes.length / timing.median for name, timing in found.items()}
    what = f"training GPT-2 124M, B{sizes.rows} T{sizes.length}"
    against = (("JAX", HUGGING_FACE, 1.15), ("PyTorch", HUGGING_FACE, 1.2), ("JAX", "PyTorch", 0.95))
    for ours, peer, target in (*against, (list(sides)[-1], "JAX", None)):
        if {ours, peer} <= rates.keys():
            yield row(f"{what}, {ours}", rates[ours], rates[peer], peer, "tokens/s", target=target)
            memory = (found[ours].peak_memory, found[peer].peak_memory)
            yield row(f"{what}, {ours}: peak memory", *memory, peer, "bytes", less_is_better=True)
    for ours in sorted(rates.keys() - {HUGGING_FACE}, key=rates.__getitem__)[-1:]:  # the best that lives
        yield row(f"{what}, {ours}", rates[ours], RECORD, "llm.c on an H100, published", "tokens/s", target=1.0)
    require_all(sides, found)


def window(sizes: Sizes, _: Path) -> Iterator[Row]:
    """The same shape with RoPE, a third of the kv heads and a window, against Starcoder2."""
    from training_sides import hugging_face_starcoder2_step

    shape, model = (sizes.window_rows, sizes.window_length, sizes.dtype), sizes.windowed
    names = {"n_layers": "num_hidden_layers", "embed_dim": "hidden_size", "vocab_size": "vocab_size"}
    peer_sizes = {names[field]: value for field, value in sizes.model.items() if field in names}
    heads = {"heads": sizes.heads, "kv_heads": sizes.heads // 3, "window": sizes.window}
    peer = partial(hugging_face_starcoder2_step, *shape, compiled=sizes.compiled)
    sides: dict[str, Side] = {
        "JAX": partial(_jax, "", shape, model),
        "PyTorch": partial(_torch, shape, model, sizes.compiled),
        HUGGING_FACE: partial(peer, **heads, **peer_sizes),
    }
    found = in_turns(sides, rounds=sizes.rounds, steps=sizes.steps, warm=3)
    what = f"training with a window of {sizes.window}, B{shape[0]} T{shape[1]}"
    for ours in found.keys() - {HUGGING_FACE} if HUGGING_FACE in found else ():
        rates = [shape[0] * shape[1] / found[name].median for name in (ours, HUGGING_FACE)]
        yield row(f"{what}, {ours}", *rates, f"{HUGGING_FACE} Starcoder2", "tokens/s", target=1.3)
    require_all(sides, found)


def _jax(flags: str, shape: tuple[Any, ...], model: dict[str, Any], **options: Any) -> Any:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # before JAX is imported, in its process
    from training_sides import jax_step

    return jax_step(*shape, model, **options)


def _torch(shape: tuple[Any, ...], model: dict[str, Any], compiled: bool) -> Any:
    from training_sides import torch_step

    return torch_step(*shape, model, compile=compiled)


def decode(sizes: Sizes, _: Path) -> Iterator[Row]:
    """Greedy decoding of one row and of more together: tokens a second, and the bytes that they must read."""
    from limits import MEMORY, decode_bytes

    from gpt_core.config import ModelConfig

    if not sizes.compiled:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # of the sides' processes
    sides = ("jax", "torch", *decoding.GRAPHS, PEER)
    found = decoding.timings(sizes.dtype, sizes.new, sizes.rounds, sizes.batches, sides, **sizes.model)
    ours = [side for side in sides[:-1] if side in found]
    for rows in sizes.batches:
        rates = {side: rows * sizes.new / timing.result[rows] for side, timing in found.items()}
        read = decode_bytes(ModelConfig(**sizes.model), rows, decoding.PROMPT + sizes.new / 2)
        for side in ours:
            what = f"greedy decoding, batch {rows}, {side}"
            if PEER in found:
                yield row(what, rates[side], rates[PEER], PEER, "tokens/s")
            if rows == 1 and side in PROMISED:
                yield row(what, rates[side], PROMISED[side], "what is promised", "tokens/s", target=1.0)
            yield row(f"{what}: reads", read * rates[side] / rows, MEMORY["H100"], "an H100's memory", "bytes/s")
    for side in ours if PEER in found else ():
        memory = (found[side].peak_memory, found[PEER].peak_memory)
        yield row(f"greedy decoding, {side}: peak memory", *memory, PEER, "bytes", less_is_better=True)
    require_all(sides, found)


def jax_trials(sizes: Sizes, _: Path) -> Iterator[Row]:
    """What may make the JAX step faster."""
    import jax_trials as trials

    yield from trials.answer("JAX", trials.GROUPS, sizes.model, sizes.rows, sizes.length, sizes)


def jax_window_trials(sizes: Sizes, _: Path) -> Iterator[Row]:
    """The same with a window."""
    import jax_trials as trials

    shape = (sizes.window_rows, sizes.window_length)
    yield from trials.answer("JAX, window", trials.WINDOWED, sizes.windowed, *shape, sizes)


def torch_trials(sizes: Sizes, _: Path) -> Iterator[Row]:
    """What may make the PyTorch step faster."""
    import torch_trials as trials

    yield from trials.answer("PyTorch", sizes)


def jax_kernels(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Where the time of a JAX step goes."""
    import kernels

    yield from kernels.answer_jax("JAX", sizes, folder)


def torch_kernels(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Where the time of a PyTorch step goes."""
    import kernels

    yield from kernels.answer_torch("PyTorch", sizes, folder)


def attention(sizes: Sizes, _: Path) -> Iterator[Row]:
    """Attention alone, with a window."""
    import gpu_attention

    for framework in gpu_attention.OTHERS:
        yield from gpu_attention.answer(framework, sizes)


def tests(sizes: Sizes, folder: Path) -> Iterator[Row]:
    """Every kernel against the definition. Without a GPU they are collected, and skip."""
    environment = os.environ | ({} if sizes is TOY else {"JAX_PLATFORMS": "cuda"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    (folder / "tests.txt").write_text(done.stdout)
    print(done.stdout[-300:], file=sys.stderr)
    yield row("tests/gpu: exit code", done.returncode, 1, "a failure", "", target=None)
    yield row("tests/gpu", time.perf_counter() - start, 60, "a minute", "s", less_is_better=True)


QUESTIONS: dict[str, Question] = {
    "ceilings": Question("the memory's speed, and that of products, of this card", 0.3, ceilings),
    "training": Question("GPT-2 124M: JAX, PyTorch, Hugging Face compiled", 2.0, training),
    "jax-trials": Question("JAX training: blocks, flags, attention, loss, casts, AdamW, donation", 2.5, jax_trials),
    "jax-kernels": Question("JAX training: the twenty dearest kernels, and a trace", 0.6, jax_kernels),
    "decode": Question("decoding 1, 8 and 64 rows: JAX, PyTorch, a CUDA graph, Hugging Face", 1.6, decode),
    "torch-trials": Question("PyTorch training: loss, casts, autotuning", 1.4, torch_trials),
    "window": Question("training with a window against Starcoder2 compiled", 1.0, window),
    "torch-kernels": Question("PyTorch training: the twenty dearest kernels, and a trace", 0.5, torch_kernels),
    "tests": Question("every kernel against the definition", 0.6, tests),
    "jax-window-trials": Question("JAX training with a window: blocks, casts, attention", 0.9, jax_window_trials),
    "attention": Question("attention alone, with a window: what is picked, against the others", 0.6, attention),
}
