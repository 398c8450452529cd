"""Training GPT-2 124M in PyTorch: this trainer's step against Hugging Face's GPT-2, compiled and eager.

    python benchmarks/train_torch.py --dtype bfloat16 --rounds 5

All train on the same batches with AdamW and fp32 parameters; theirs compute in bf16 through autocast, ours through the
casts of the model. Each side runs in a process of its own, in turns, so that memory is measured and nobody is favoured
by the clock. Prints JSON: tokens a second (median of all steps but the first of a turn) and peak memory.
"""

import argparse
import json
from functools import partial

from training_sides import hugging_face_gpt2_step, torch_step
from turns import Side, in_turns, row

BATCH, TIME = 2, 512
TARGET = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss-chunk", type=int, default=512)
    parser.add_argument("--sides", nargs="+", default=["ours eager", "huggingface compiled", "huggingface eager"])
    options = parser.parse_args()
    shape = (BATCH, TIME, options.dtype)
    known: dict[str, Side] = {
        "ours": partial(torch_step, *shape, compile=True, loss_chunk=options.loss_chunk),
        "ours eager": partial(torch_step, *shape, compile=False, loss_chunk=options.loss_chunk),
        "huggingface compiled": partial(hugging_face_gpt2_step, *shape, compiled=True),
        "huggingface eager": partial(hugging_face_gpt2_step, *shape, compiled=False),
    }
    sides = dict.fromkeys(["ours", *options.sides])
    if unknown := sides.keys() - known.keys():
        parser.error(f"unknown side {sorted(unknown)[0]!r}; choose from: {', '.join(known)}")
    found = in_turns({side: known[side] for side in sides}, rounds=options.rounds, steps=3, warm=2)
    rate = {side: BATCH * TIME / timing.median for side, timing in found.items()}
    name = f"training GPT-2 124M, B{BATCH} T{TIME}, {options.dtype}"
    results = [
        row(name, rate["ours"], rate[side], side, "tokens/s", target=TARGET if side == "huggingface compiled" else None)
        for side in list(found)[1:]
    ]
    memory = {side: timing.peak_memory for side, timing in found.items()}
    losses = {side: timing.result for side, timing in found.items()}
    print(json.dumps({"results": results, "peak_memory_bytes": memory, "last_loss": losses}, indent=2))


if __name__ == "__main__":
    main()
