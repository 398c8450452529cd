"""A checkpoint of 8 GB to Hugging Face: peak memory, and the rate against `cp` and `sync` of the same bytes.

    python benchmarks/convert_large.py [--layers 39] [--rounds 3] [--out DIR]

The source is a JAX checkpoint of synthetic fp32 weights, whose blocks are stacked: it is read a block at a time.
Copying and converting take turns, each conversion in a process of its own. Writing and syncing are timed against
`cp -r` and `sync`; the verification (both sides read again, compared bit by bit and hashed) apart. On a virtual machine
memory that was not used for seconds costs several times as much on first use, so the same bytes are copied and removed
right before each of the two. Needs 25 GB of disk. Linux only.
"""

import argparse
import json
import multiprocessing
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.formats import FORMATS, format_of
from gpt_core.parameters import Parameter, parameter_table
from parity.checkpoints.convert import convert

PEAK, RATE = 1.0, 0.5  # targets: GB above the imports, share of the rate of cp and sync


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """A JAX checkpoint of fp32 weights: the same random numbers over and over, shifted from tensor to tensor."""
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def draw(parameter: Parameter) -> np.ndarray[Any, Any]:
        return np.resize(np.roll(numbers, 1 + (parameter.layer or 0)), parameter.shape)

    folder.mkdir()
    format_of("jax").write(folder, config, draw, dict.fromkeys(parameter_table(config), np.dtype(np.float32)), None)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is held now, VmHWM was held at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(source: Path, destination: Path) -> dict[str, float]:
    """Convert once, in this process; the destination is removed again."""
    for name in FORMATS:
        format_of(name)
    copy_seconds(source, destination)
    before = memory("VmRSS")
    done = convert(source, destination, "hf")
    peak = memory("VmHWM") - before
    nbytes = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    shutil.rmtree(destination)
    return {"write": done.write_seconds, "verify": done.verify_seconds, "peak": peak, "bytes": nbytes}


def copy_seconds(source: Path, destination: Path) -> float:
    """Seconds of `cp -r` and `sync`; the copy is removed again."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(destination)
    return seconds


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=39, help="39 are 8.3 GB")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/benchmarks/convert_large"), help="for results.json")
    given = options.parse_args()
    config = ModelConfig(n_layers=given.layers, n_heads=16, embed_dim=2048, position="rope")
    copies, runs = [], []
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "jax"
        write_checkpoint(source, config)
        nbytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        subprocess.run(["sync"], check=True)
        for _ in range(given.rounds):
            copies.append([copy_seconds(source, Path(temporary) / "copy") for _ in range(2)][1])
            with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
                runs.append(pool.submit(measure, source, Path(temporary) / "hf").result())
            write, verify, peak = (runs[-1][part] for part in ("write", "verify", "peak"))
            print(f"cp and sync {copies[-1]:.1f} s; conversion {write:.1f} s, verification {verify:.1f} s", end="")
            print(f", peak {peak / 1e9:.2f} GB", flush=True)
    ours = max(run["bytes"] / run["write"] for run in runs) / 1e9
    peer = max(nbytes / seconds for seconds in copies) / 1e9
    peak = max(run["peak"] for run in runs) / 1e9
    results = [
        {
            "name": f"{nbytes / 1e9:.1f} GB, jax -> hf: rate, of the best round",
            "ours": round(ours, 3),
            "peer": round(peer, 3),
            "peer_name": "cp -r and sync",
            "unit": "GB/s",
            "ratio": round(ours / peer, 2),
            "target": RATE,
            "met": ours >= RATE * peer,
        },
        {
            "name": f"{nbytes / 1e9:.1f} GB, jax -> hf: peak memory above the imports, of the worst round",
            "ours": round(peak, 3),
            "peer": PEAK,
            "peer_name": "bound",
            "unit": "GB",
            "ratio": round(peak / PEAK, 2),
            "target": PEAK,
            "met": peak <= PEAK,
        },
    ]
    for row in results:
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['name']}: {row['ours']} {row['unit']}, {row['ratio']}x {row['peer_name']}: {verdict}")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["met"] for row in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
