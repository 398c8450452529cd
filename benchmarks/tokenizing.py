"""How fast `gpt-data prepare` turns text into tokens on the disk, against tiktoken's own batches in memory.

    python benchmarks/tokenizing.py [--out DIR] [--workers N]

Both tokenize the interpreter's library with the same number of threads, in turns, in one run. Ours is everything that
`prepare` does: reading, hashing, splitting, tokenizing, writing, checksums. tiktoken's is `encode_ordinary_batch` over
the same documents, which lie in memory already. `results.json`: `target` is a bound on `ratio` for the rate, and on
`ours` for the cores in use. (The file is not named `tokenize.py`: that would hide a module of Python's library.)
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
from gpt_core.text.gpt2 import gpt2_tokenizer

RATIO = 0.8
CORES = 0.8  # of the workers
ROUNDS = 3


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and seconds of all cores together."""
    clock, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cores


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/benchmarks/tokenize"), help="folder for results.json")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads of either")
    arguments = options.parse_args()
    workers, out = arguments.workers, arguments.out
    reader = Reader()
    documents = [text.decode() for file in find_files("stdlib") for _, text in reader.documents(file)]
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    tiktoken = gpt2_tokenizer()._encoding
    tiktoken.encode_ordinary_batch(documents[:100], num_threads=workers)
    ours, peer = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):  # in turns, so that both see the same machine
            peer.append(timed(lambda: tiktoken.encode_ordinary_batch(documents, num_threads=workers)))
            ours.append(timed(lambda: prepare(DataConfig(), Path(folder) / "tokens", workers=workers, force=True)))
            print(
                "seconds: "
                + ", ".join(f"{name} {runs[-1][0]:.2f}" for name, runs in (("ours", ours), ("tiktoken", peer)))
            )
    (seconds, busy), (peer_seconds, peer_busy) = min(ours), min(peer)
    name = f"encode_ordinary_batch, {workers} threads"
    rows = [
        ("tokenizing", megabytes / seconds, megabytes / peer_seconds, RATIO, "MB/s"),
        ("cores in use", busy / seconds, peer_busy / peer_seconds, round(CORES * workers, 2), "cores"),
    ]
    results = [
        {
            "name": what,
            "ours": round(mine, 2),
            "peer": round(theirs, 2),
            "peer_name": name,
            "ratio": round(mine / theirs, 3),
            "target": target,
            "met": (mine if unit == "cores" else mine / theirs) >= target,
            "unit": unit,
        }
        for what, mine, theirs, target, unit in rows
    ]
    for row in results:
        verdict = f"target {row['target']} {'met' if row['met'] else 'MISSED'}"
        print(f"{row['name']:14} {row['ours']:6.2f} {row['unit']:5} {row['ratio']:5.2f}x {name}  {verdict}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["met"] for row in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
