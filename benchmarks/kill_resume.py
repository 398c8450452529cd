"""Kill commands again and again: what is there stays whole, and the same command ends as if nobody had disturbed it.

    python benchmarks/kill_resume.py --kills 30                   everything, 30 times each
    python benchmarks/kill_resume.py --only convert prepare --seed 1
    python benchmarks/kill_resume.py --framework jax --kills 10   one trainer
    python benchmarks/kill_resume.py --only jax-mixture torch-mixture --kills 7

Each kill is a SIGKILL. A training run is killed at random moments, every second time during a save; in the end losses,
weights and moments must be those of an undisturbed run, bit for bit. Conversions and preparations, with and without
--force onto something that is there, are killed at a random part of the time that they take; then the destination must
be absent, or the old one, or the new one, whole, and the same command must end with what an undisturbed one writes and
nothing beside it. A sweep is killed alone or with its trial. Prints JSON; exits with 1 on a difference.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from forked import Running, import_everything, run, workplace

from gpt_core.routing import LOAD
from gpt_core.runs.tracking import METRICS_FILE, read_metrics

Result = dict[str, Any]
WORDS = sorted({word for word in re.findall(r"[a-z]+", Path(__file__).read_text(encoding="utf-8")) if len(word) > 1})
STEPS = 150  # of a training run; the last of them has a checkpoint and an evaluation
RANDOM_NAME = re.compile(r"(?<=/d/)[0-9a-f]{32}$")  # Orbax's files of data
MIXTURE = {"n_experts": 8, "expert_dim": 24, "gated_mlp": True, "bias": False}
TIMES = "_CHECKPOINT_METADATA"  # Orbax's file with the time of writing


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is killed")
    arguments.add_argument("--framework", choices=["jax", "torch"], help="short for --only with that trainer")
    arguments.add_argument("--kills", type=int, default=30, help="of each")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments")
    options = arguments.parse_args()
    results = []
    with workplace() as place:
        import_everything(place / "scratch")
        for name in [options.framework] if options.framework else options.only:
            folder = place / name
            folder.mkdir()
            started = time.monotonic()
            result = PARTS[name](folder, options.kills, random.Random(f"{options.seed}/{name}"))
            result["seconds"] = round(time.monotonic() - started)
            results.append({"killed": name} | result)
            print(json.dumps(results[-1], indent=2), flush=True)
    return int(any(result["problems"] for result in results))


# ------------------------------------------------------------------------------------------------------------ trainers


def kill_jax(place: Path, kills: int, chance: random.Random) -> Result:
    return kill_trainer("jax", place, kills, chance)


def kill_torch(place: Path, kills: int, chance: random.Random) -> Result:
    return kill_trainer("torch", place, kills, chance)


def kill_jax_mixture(place: Path, kills: int, chance: random.Random) -> Result:
    return kill_trainer("jax", place, kills, chance, MIXTURE)


def kill_torch_mixture(place: Path, kills: int, chance: random.Random) -> Result:
    return kill_trainer("torch", place, kills, chance, MIXTURE)


def kill_trainer(
    framework: str, place: Path, kills: int, chance: random.Random, model: dict[str, Any] | None = None
) -> Result:
    """A run killed again and again; a new one when it has ended."""
    text(place / "texts", documents=40)
    section = {"steps": STEPS, "log_every": 1, "evaluate_every": STEPS, "checkpoint_every": 7}
    train(place / "run.yaml", section, model)
    words = f"{framework}-gpt train --config run.yaml --out"
    run(f"{words} undisturbed", place, place / "log")
    expected, problems = (losses(place / "undisturbed"), state(framework, place, "undisturbed")), []
    killed = during_a_save = runs = 0
    while killed < kills or lines(place / f"killed-{runs}"):  # the last one is not left half way
        name = f"killed-{runs}"
        running = Running(f"{words} {name}", place, place / "log")
        hit = killed < kills and wait_for_a_moment(running, place / name, chance, at_save=killed % 2 == 1)
        if killed < kills and not running.ended():
            killed += 1
            during_a_save += hit
            running.kill()
            continue
        ended = running.wait()
        if ended.code != 0:
            problems.append(f"{name}: ends with {ended.code}: {ended.stderr[-300:]}")
            break
        if (losses(place / name), state(framework, place, name)) != expected:
            problems.append(f"{name}: losses, weights or moments are others")
        problems += [f"{name}: left: {more}" for more in sorted(names(place / name) - names(place / "undisturbed"))]
        runs += 1
    return {
        "framework": framework,
        "kills": killed,
        "kills_during_a_save": during_a_save,
        "runs": runs,
        "steps": STEPS,
        "bit_identical": not problems,
        "problems": problems,
    }


def wait_for_a_moment(running: Running, folder: Path, chance: random.Random, *, at_save: bool) -> bool:
    """Wait for a few steps, then for a save that is under way or for a random time; tells whether a save was met."""
    before = lines(folder)
    while not running.ended() and lines(folder) < before + 3:
        time.sleep(0.005)
    deadline = time.monotonic() + (5 if at_save else chance.uniform(0, 0.4))
    while not running.ended() and time.monotonic() < deadline:
        if at_save and saving(folder):
            return True
        time.sleep(0.0005)
    return False


def lines(folder: Path) -> int:
    path = folder / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(folder: Path) -> bool:
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(not path.name.isdecimal() for path in checkpoints.iterdir())


def losses(folder: Path) -> dict[int, list[Any]]:
    """Of each step, with what the routers of a mixture did."""
    records = [record for record in read_metrics(folder) if "train_loss" in record]
    return {record["step"]: [record["train_loss"], record.get(LOAD)] for record in records}


def state(framework: str, place: Path, name: str) -> list[str]:
    """Weights and moments of a run's newest checkpoint, in the one format whose bytes say nothing of when."""
    folder = place / name
    if framework == "jax":
        folder = place / f"{name}-in-torch"
        run(f"parity convert --state {name} {folder.name} --to torch", place, place / "log")
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return [digest(newest / file) for file in ("model.safetensors", "optimizer.safetensors")]


# ------------------------------------------------------------------------------------ commands that write a destination


class Job(NamedTuple):
    """A command that writes the folder `out`, and what lies there before."""

    words: str
    before: str | None = None


def kill_convert(place: Path, kills: int, chance: random.Random) -> Result:
    model = {"vocab_size": 50257, "context_length": 16, "n_layers": 2, "n_heads": 2, "embed_dim": 192}
    (place / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    for seed, name in enumerate(("torch", "other-torch")):
        run(f"torch-gpt init {name} --config model.yaml --seed {seed}", place, place / "log")
        for form in ("jax", "hf"):
            made = name.replace("torch", form)
            run(f"parity convert {name} {made} --to {form}", place, place / "log")
    jobs = []
    for source, form in (("torch", "jax"), ("jax", "torch"), ("torch", "hf"), ("hf", "jax")):
        words = f"parity convert ../{source} out --to {form}"
        jobs += [Job(words), Job(f"{words} --force", f"other-{form}")]
    return kill_jobs(place, jobs, kills, chance)


def kill_prepare(place: Path, kills: int, chance: random.Random) -> Result:
    text(place / "texts", documents=300)
    text(place / "other-texts", documents=2)
    run("gpt-data prepare other-texts other", place, place / "log")
    words = "gpt-data prepare ../texts out"
    return kill_jobs(place, [Job(words), Job(f"{words} --force", "other")], kills, chance)


def kill_jobs(place: Path, jobs: Sequence[Job], kills: int, chance: random.Random) -> Result:
    """Kill each of some commands in turn, every time from the beginning."""
    room = place / "room"
    undisturbed = {}
    for job in jobs:
        set_up(room, place, job)
        seconds = run(job.words, room, place / "log").seconds
        undisturbed[job] = (seconds, fingerprint(room / "out"), {path.name for path in room.iterdir()})
    counts = {"kills": 0, "destination_absent": 0, "old_one": 0, "new_one": 0, "kills_that_left_something": 0}
    problems = []
    while counts["kills"] < kills:
        job = jobs[counts["kills"] % len(jobs)]
        seconds, new, beside = undisturbed[job]
        set_up(room, place, job)
        old = fingerprint(room / "out")
        running = Running(job.words, room, place / "log")
        moment = chance.uniform(0.05, 1) * seconds
        time.sleep(moment)
        if running.ended():
            running.wait()
            continue
        running.kill()
        counts["kills"] += 1
        where = f"{job.words}, killed after {moment:.3f} s of {seconds:.3f}"
        found = fingerprint(room / "out")
        counts["kills_that_left_something"] += bool({path.name for path in room.iterdir()} - beside)
        if found == new:
            counts["new_one"] += 1
        elif found == old:
            counts["old_one" if job.before else "destination_absent"] += 1
        else:
            problems.append(f"{where}: the destination is neither the old one nor the new one")
        done = found == new and "--force" not in job.words
        again = Running(f"{job.words} {'--force' * done}", room, place / "log").wait()
        if again.code != 0:
            problems.append(f"{where}: the same command again ends with {again.code}: {again.stderr[-300:]}")
        elif fingerprint(room / "out") != new:
            problems.append(f"{where}: the same command again writes something else")
        if more := {path.name for path in room.iterdir()} - beside:
            problems.append(f"{where}: left after the same command again: {', '.join(sorted(more))}")
    return counts | {"problems": problems}


def set_up(room: Path, place: Path, job: Job) -> None:
    """An empty room, or one with what lies in the destination before."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    if job.before:
        shutil.copytree(place / job.before, room / "out")


# --------------------------------------------------------------------------------------------------------------- sweeps


def kill_sweep(place: Path, kills: int, chance: random.Random) -> Result:
    """A sweep killed again and again, by itself or with the trial that it runs; a new one when it has ended."""
    text(place / "texts", documents=40)
    train(place / "run.yaml", {"steps": 60, "evaluate_every": 60, "checkpoint_every": 10})
    sweep(place / "sweep.yaml", [0.001, 0.003, 0.01, 0.03])
    words = "torch-gpt sweep sweep.yaml --out"
    run(f"{words} undisturbed", place, place / "log")
    problems: list[str] = []
    killed = sweeps = 0
    while killed < kills or (place / f"killed-{sweeps}").exists():  # the last one is not left half way
        folder = place / f"killed-{sweeps}"
        running = Running(f"{words} {folder.name}", place, place / "log")
        deadline = time.monotonic() + chance.uniform(0.2, 9)
        while killed < kills and time.monotonic() < deadline and not running.ended():
            time.sleep(0.01)
        if killed < kills and not running.ended():
            running.kill(alone=killed % 2 == 0)
            killed += 1
            continue
        ended = running.wait()
        if ended.code != 0:
            problems.append(f"{folder.name}: ends with {ended.code}: {ended.stderr[-300:]}")
            break
        problems += sweep_problems(place / "undisturbed", folder)
        sweeps += 1
    return {"kills": killed, "sweeps": sweeps, "problems": problems}


def sweep_problems(undisturbed: Path, folder: Path) -> list[str]:
    """What differs between a sweep that was killed and has ended now, and one that nobody disturbed."""
    expected, found = (trials(path / "sweep.json") for path in (undisturbed, folder))
    problems = [] if expected == found else [f"{folder.name}: other trials: {found} instead of {expected}"]
    for trial in sorted(undisturbed.glob("trial-*/")):
        if state("torch", undisturbed, trial.name) != state("torch", folder, trial.name):
            problems.append(f"{folder.name}: weights or moments of {trial.name} are others")
    return problems + [f"{folder.name}: left: {name}" for name in sorted(names(folder) - names(undisturbed))]


def trials(path: Path) -> Any:
    content = json.loads(path.read_text())
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in content["trials"]]


# ------------------------------------------------------------------------------------------------------ what they share


def text(folder: Path, documents: int) -> None:
    """Files of 250 kB."""
    folder.mkdir()
    chance = random.Random(0)
    for number in range(documents):
        paragraphs = (" ".join(chance.choices(WORDS, k=400)) for _ in range(100))
        (folder / f"{number:03d}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")


def train(path: Path, section: dict[str, Any], model: dict[str, Any] | None = None) -> None:
    """The config of a small run on the folder `texts` beside it."""
    sizes = {"vocab_size": 50257, "context_length": 32, "n_layers": 2, "n_heads": 2, "embed_dim": 32}
    content = {
        "model": sizes | (model or {}),
        "data": {"source": str(path.with_name("texts")), "streams": 2, "validation_fraction": 0.2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "train": {"batch_size": 2, "evaluation_batches": 1} | section,
    }
    path.write_text(yaml.safe_dump(content))


def sweep(path: Path, rates: Sequence[float]) -> None:
    """A sweep of PyTorch's trainer over learning rates, with the file `run.yaml` beside it."""
    content = {
        "method": "grid",
        "metric": {"name": "validation_loss", "goal": "minimize"},
        "command": ["torch-gpt", "train", "--config", str(path.with_name("run.yaml")), "${args}"],
        "parameters": {"optimizer.learning_rate": {"values": list(rates)}},
    }
    path.write_text(yaml.safe_dump(content))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> str | None:
    """Of every file in a folder, with its name; None where there is no folder."""
    if not folder.exists():
        return None
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    content = [(name, "" if path.name == TIMES else digest(path)) for name, path in files.items()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def names(folder: Path) -> set[str]:
    """Of everything in a folder, but for those that are random."""
    return {RANDOM_NAME.sub("*", str(path.relative_to(folder))) for path in folder.rglob("*")}


PARTS: dict[str, Callable[[Path, int, random.Random], Result]] = {
    "jax": kill_jax,
    "torch": kill_torch,
    "jax-mixture": kill_jax_mixture,
    "torch-mixture": kill_torch_mixture,
    "convert": kill_convert,
    "prepare": kill_prepare,
    "sweep": kill_sweep,
}

if __name__ == "__main__":
    sys.exit(main())
