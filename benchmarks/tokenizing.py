"""How fast `gpt-data prepare` turns text into tokens on the disk, against the libraries' own batches in memory.

    python benchmarks/tokenizing.py [--out DIR] [--workers N] [--tokenizer FOLDER]

All tokenize the interpreter's library with the same number of threads, in turns, in one run. Ours is everything that
`prepare` does: reading, hashing, splitting, tokenizing, writing, checksums. Theirs is `encode_ordinary_batch` of
tiktoken, and `encode_batch` of the library `tokenizers` for one of 8,192 tokens that is learned here (or that of
--tokenizer), over the same documents, which lie in memory already. `results.json`: `target` is a bound on `ratio` for
the rates, and on `ours` for the cores in use. (The file is not named `tokenize.py`: that would hide a module of
Python's library.)
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpt_core.data.config import DataConfig
from gpt_core.data.prepare import prepare
from gpt_core.data.records import Reader
from gpt_core.data.sources import find_files
from gpt_core.text.finding import open_tokenizer
from gpt_core.text.gpt2 import gpt2_tokenizer
from gpt_core.text.tokenizer_file import FileTokenizer
from gpt_core.text.training import train_tokenizer, write_trained

RATIO = 0.8
FILE_RATIO = 0.9
CORES = 0.8  # of the workers
ROUNDS = 3
VOCABULARY = 8192


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of all cores together."""
    clock, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cores


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/benchmarks/tokenize"), help="folder for results.json")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads of either")
    options.add_argument("--tokenizer", type=Path, help="folder of a tokenizer.json; default: one that is learned here")
    arguments = options.parse_args()
    workers, out = arguments.workers, arguments.out
    reader = Reader()
    documents = [text.decode() for file in find_files("stdlib") for _, text in reader.documents(file)]
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    tiktoken = gpt2_tokenizer()._encoding
    tiktoken.encode_ordinary_batch(documents[:100], num_threads=workers)
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "tiktoken": [], "ours, file": [], "tokenizers": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.tokenizer is None:
            write_trained(train_tokenizer(documents, VOCABULARY), folder)
        tokenizer = open_tokenizer(str(arguments.tokenizer or folder))
        assert isinstance(tokenizer, FileTokenizer)
        config, out_of, settings = DataConfig(), folder / "tokens", {"workers": workers, "force": True}
        work: dict[str, Callable[[], object]] = {
            "tiktoken": lambda: tiktoken.encode_ordinary_batch(documents, num_threads=workers),
            "ours": lambda: prepare(config, out_of, **settings),
            "tokenizers": lambda: tokenizer.backend.encode_batch(documents, add_special_tokens=False),
            "ours, file": lambda: prepare(config, out_of, tokenizer=tokenizer, **settings),
        }
        for _ in range(ROUNDS):  # in turns, so that all see the same machine
            for what, action in work.items():
                runs[what].append(timed(action))
            print("seconds: " + ", ".join(f"{what} {runs[what][-1][0]:.2f}" for what in work))
    (seconds, busy), (peer_seconds, peer_busy) = min(runs["ours"]), min(runs["tiktoken"])
    (file_seconds, _), (library_seconds, _) = min(runs["ours, file"]), min(runs["tokenizers"])
    name = f"encode_ordinary_batch, {workers} threads"
    rows = [
        ("tokenizing", megabytes / seconds, megabytes / peer_seconds, RATIO, "MB/s", name),
        ("cores in use", busy / seconds, peer_busy / peer_seconds, round(CORES * workers, 2), "cores", name),
        (
            "tokenizer.json",
            megabytes / file_seconds,
            megabytes / library_seconds,
            FILE_RATIO,
            "MB/s",
            "encode_batch of tokenizers",
        ),
    ]
    results = [
        {
            "name": what,
            "ours": round(mine, 2),
            "peer": round(theirs, 2),
            "peer_name": peer,
            "ratio": round(mine / theirs, 3),
            "target": target,
            "met": (mine if unit == "cores" else mine / theirs) >= target,
            "unit": unit,
        }
        for what, mine, theirs, target, unit, peer in rows
    ]
    for row in results:
        verdict = f"target {row['target']} {'met' if row['met'] else 'MISSED'}"
        print(f"{row['name']:14} {row['ours']:6.2f} {row['unit']:5} {row['ratio']:5.2f}x {row['peer_name']}  {verdict}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["met"] for row in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
