"""Kill a run again and again and see whether its losses are those of a run that nobody disturbed, bit for bit.

    python benchmarks/kill_resume.py --framework jax --kills 10

Each kill is a SIGKILL at a random moment; every second one is aimed at a save. Prints JSON; exits with 1 on a
difference.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from gpt_core.config import config_directory
from gpt_core.tracking import METRICS_FILE, read_metrics

CONFIG = {
    "model": {"vocab_size": 50257, "context_length": 32, "n_layers": 2, "n_heads": 2, "embed_dim": 32},
    "data": {"source": str(config_directory()) + "/**/*.yaml", "streams": 2, "validation_fraction": 0.2},
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
    "train": {"steps": 400, "batch_size": 2, "log_every": 1, "evaluate_every": 1000, "evaluation_batches": 1}
    | {"checkpoint_every": 7},
}


def start(framework: str, config: Path, run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"{framework}_gpt", "train", "--config", str(config), "--out", str(run)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def lines(run: Path) -> int:
    path = run / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_once(framework: str, config: Path, run: Path, at_save: bool, chance: random.Random) -> bool:
    """Start, wait for a few steps, kill. True when the run was alive then."""
    process = start(framework, config, run)
    before = lines(run)
    while process.poll() is None and lines(run) < before + 3:
        time.sleep(0.005)
    if at_save:  # the folder of a save that is not complete yet
        deadline = time.monotonic() + 5
        while process.poll() is None and time.monotonic() < deadline and not saving(run):
            time.sleep(0.0005)
    else:
        time.sleep(chance.uniform(0, 0.4))
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def saving(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(not path.name.isdecimal() for path in folder.iterdir())


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train_loss"] for record in read_metrics(run) if "train_loss" in record}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--framework", choices=["jax", "torch"], default="jax")
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        config, undisturbed, killed = Path(folder) / "c.yaml", Path(folder) / "undisturbed", Path(folder) / "killed"
        config.write_text(yaml.safe_dump(CONFIG))
        assert start(options.framework, config, undisturbed).wait() == 0
        kills = saves = 0
        for number in range(options.kills):
            at_save = number % 2 == 1
            if kill_once(options.framework, config, killed, at_save, chance):
                kills += 1
                saves += saving(killed)
        assert start(options.framework, config, killed).wait() == 0
        expected, found = losses(undisturbed), losses(killed)
    result = {
        "framework": options.framework,
        "kills": kills,
        "kills_during_a_save": saves,
        "steps": len(expected),
        "bit_identical": found == expected and len(expected) == CONFIG["train"]["steps"],  # type: ignore[index]
    }
    print(json.dumps(result, indent=2))
    return 0 if result["bit_identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
