"""Training GPT-2 124M in PyTorch: this trainer's step against Hugging Face's GPT-2, compiled and eager.

    python benchmarks/train_torch.py --dtype bfloat16 --rounds 5

All train on the same batches with AdamW and fp32 parameters; theirs compute in bf16 through autocast, ours through the
casts of the model. Each side runs in a process of its own, in turns, so that memory is measured and nobody is favoured
by the clock. Prints JSON: tokens a second (median of all steps but the first of a turn) and peak memory.
"""

import argparse
import json
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

BATCH, TIME, VOCAB = 2, 512, 50257
TARGET = 1.2
PEERS = {"huggingface compiled": True, "huggingface eager": False}


def batch(step: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(step).integers(0, VOCAB, (BATCH, TIME + 1)).astype(np.int64)


def ours(dtype: str, compiled: bool) -> Callable[[int], float]:
    from gpt_core.data.batches import next_token_batch
    from gpt_core.run_config import RunConfig
    from torch_gpt.distributed import connect
    from torch_gpt.memory import keep_freed_memory
    from torch_gpt.parallel import place_batch
    from torch_gpt.step import create_program

    keep_freed_memory()  # as `torch-gpt train` does
    config = RunConfig.from_dict(
        {
            "model": {"vocab_size": VOCAB, "pad_vocab_size_multiple": 128, "context_length": 1024},  # as gpt2-124m
            "train": {"batch_size": BATCH, "context_length": TIME, "dtype": dtype, "steps": 1000},
            "data": {"streams": 1},
            "torch": {"compile": compiled, "loss_chunk": CHUNK},
        }
    )
    program = create_program(config, connect())
    state = program.state

    def step(number: int) -> float:
        nonlocal state
        state, metrics = program.step(state, place_batch(next_token_batch(batch(number)), program.device), 1e-4)
        return float(metrics["loss"])

    return step


def theirs(dtype: str, compiled: bool) -> Callable[[int], float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, attn_implementation="sdpa", **options)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    forward = torch.compile(model) if compiled else model

    def step(number: int) -> float:
        ids = torch.from_numpy(batch(number))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            # `shift_labels` is the next token of every position, so that all 512 count, as in ours.
            loss = forward(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


CHUNK = 512


def serve(side: str, dtype: str, chunk: int, pipe: Connection) -> None:
    """Run steps when asked to; answers with seconds, loss and peak memory."""
    global CHUNK
    CHUNK = chunk
    from gpt_core.training import host_peak_memory

    step = ours(dtype, side == "ours") if side.startswith("ours") else theirs(dtype, PEERS[side])
    while (numbers := pipe.recv()) is not None:
        answers = []
        for number in numbers:
            start = time.perf_counter()
            loss = step(number)
            answers.append((time.perf_counter() - start, loss))
        pipe.send((answers, host_peak_memory()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss-chunk", type=int, default=512)
    parser.add_argument("--sides", nargs="+", default=["ours", "ours eager", *PEERS])
    options = parser.parse_args()
    context = mp.get_context("spawn")
    pipes, processes = {}, []
    for side in options.sides:
        pipes[side], other = context.Pipe()
        process = context.Process(target=serve, args=(side, options.dtype, options.loss_chunk, other), daemon=True)
        process.start()
        processes.append(process)
        pipes[side].send([0, 1])  # compiles
        pipes[side].recv()
    seconds: dict[str, list[float]] = {side: [] for side in options.sides}
    memory, losses = {}, {}
    for round_number in range(options.rounds):
        for side, pipe in pipes.items():
            pipe.send([2 + 3 * round_number + i for i in range(3)])
            answers, memory[side] = pipe.recv()
            seconds[side] += [taken for taken, _ in answers[1:]]
            losses[side] = answers[-1][1]
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    rate = {side: BATCH * TIME / statistics.median(taken) for side, taken in seconds.items()}
    results = []
    for side in options.sides[1:]:
        ratio = rate["ours"] / rate[side]
        target = TARGET if side == "huggingface compiled" else None
        results.append(
            {
                "name": f"training GPT-2 124M, B{BATCH} T{TIME}, {options.dtype}",
                "ours": rate["ours"],
                "peer": rate[side],
                "peer_name": side,
                "ratio": ratio,
                "target": target,
                "met": None if target is None else ratio >= target,
                "unit": "tokens/s",
            }
        )
    print(json.dumps({"results": results, "peak_memory_bytes": memory, "last_loss": losses}, indent=2))


if __name__ == "__main__":
    main()
