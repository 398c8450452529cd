"""How long converting GPT-2 124M takes and how much memory it needs, against `cp` of the same bytes.

    python benchmarks/convert.py [--out DIR]

Each conversion runs in a process of its own. Its time begins after the imports; its memory is what the process held at
its peak beyond the imports. `results.json` holds one row a measurement: `target` is a bound on `ours`, in `unit`.
Linux only (peak memory comes from /proc).
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
from gpt_core.text.gpt2 import gpt2_tokenizer
from parity.checkpoints.convert import convert

SECONDS, PEAK = 2.0, 1.5  # targets: seconds of conversion, peak memory in checkpoints
ROUNDS = 3


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """A PyTorch checkpoint of random fp32 weights, tokenizer included."""
    random = np.random.default_rng(0)

    def draw(parameter: Parameter) -> np.ndarray[Any, Any]:
        return random.standard_normal(parameter.shape, np.float32)

    folder.mkdir()
    dtypes = dict.fromkeys(parameter_table(config), np.dtype(np.float32))
    format_of("torch").write(folder, config, draw, dtypes, gpt2_tokenizer())


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is held now, VmHWM was held at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(source: Path, destination: Path, to: str) -> dict[str, float]:
    """Convert once, in this process; the destination is removed again."""
    for name in FORMATS:
        format_of(name)
    before = memory("VmRSS")
    done = convert(source, destination, to)
    peak = memory("VmHWM") - before
    shutil.rmtree(destination)
    return {"write": done.write_seconds, "verify": done.verify_seconds, "peak": peak}


def copy_seconds(source: Path, destination: Path) -> float:
    """Seconds of `cp -r`; the copy is removed again."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(destination)
    return seconds


def in_new_process(*arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def rows(name: str, runs: list[dict[str, float]], copies: list[float], nbytes: int) -> list[dict[str, Any]]:
    """Best time and worst memory of one direction."""
    seconds, verify = (min(run[part] for run in runs) for part in ("write", "verify"))
    peak = max(run["peak"] for run in runs) / nbytes

    def row(what: str, ours: float, peer: float, peer_name: str, target: float | None, unit: str) -> dict[str, Any]:
        met = None if target is None else ours <= target
        return {
            "name": f"{name}: {what}",
            "ours": round(ours, 3),
            "peer": round(peer, 3),
            "peer_name": peer_name,
            "ratio": round(ours / peer, 2),
            "target": target,
            "met": met,
            "unit": unit,
        }

    return [
        row("conversion", seconds, min(copies), "cp -r", SECONDS, "s"),
        row("verification", verify, min(copies), "cp -r", None, "s"),
        row("peak memory", peak, 1.0, "the checkpoint's bytes", PEAK, "x"),
    ]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/benchmarks/convert"), help="folder for results.json")
    out = options.parse_args().out
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch, jax, hugging_face = folder / "torch", folder / "jax", folder / "hf"
        write_checkpoint(torch, ModelConfig.from_yaml("gpt2"))
        nbytes = (torch / "model.safetensors").stat().st_size
        convert(torch, jax, "jax")
        convert(torch, hugging_face, "hf")
        for source, to in ((jax, "torch"), (torch, "jax"), (jax, "hf"), (torch, "hf"), (hugging_face, "jax")):
            name = f"{source.name} -> {to}"
            runs, copies = [], []
            for _ in range(ROUNDS):  # in turns, so that both see the same machine
                copies.append(copy_seconds(source, folder / "copy"))
                runs.append(in_new_process(source, folder / "converted", to))
            results += rows(name, runs, copies, nbytes)
            each = "  ".join(f"{run['write']:.2f} + {run['verify']:.2f}" for run in runs)
            print(f"{name}: conversion + verification, s: {each}; cp -r: {min(copies):.2f}")
    for row in results:
        verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
        target = "" if row["target"] is None else f"target <= {row['target']} {row['unit']} {verdict}"
        print(f"{row['name']:28} {row['ours']:7.3f} {row['unit']}  {row['ratio']:5.2f}x {row['peer_name']}  {target}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row["met"] is False for row in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
