"""Start the same command twice into the same destination: one does it, the other is refused and harms nothing.

    python benchmarks/races.py --races 20
    python benchmarks/races.py --only train-jax convert --seed 1

Every second race starts both at once, give or take 50 ms; in the others the second starts when the first is well under
way. One must end with 0 and leave what an undisturbed command leaves, and nothing beside it; the other must end with 2
and one line that names the process that holds the destination (or says that the destination is there, where that
process had ended by then; where the same command may come again, it may then end with 0 as well). Prints JSON; exits
with 1 where a race went otherwise.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from forked import Outcome, Running, import_everything, run, workplace
from kill_resume import fingerprint, losses, names, state, sweep, text, train, trials

# What must be the same in every race's destination, by the folder that it lies in and its name.
Look = Callable[[Path, str], Any]

RUN = "train --config ../run.yaml --out out"


def look_at_files(place: Path, name: str) -> Any:
    return fingerprint(place / name)


def look_at_run(framework: str) -> Look:
    def look(place: Path, name: str) -> Any:
        found = losses(place / name), state(framework, place, name)
        shutil.rmtree(place / f"{name}-in-torch", ignore_errors=True)
        return found

    return look


def look_at_sweep(place: Path, name: str) -> Any:
    return trials(place / name / "sweep.json"), [state("torch", place / name, f"trial-00{n}") for n in range(2)]


COMMANDS: dict[str, tuple[str, Look]] = {
    "train-jax": (f"jax-gpt {RUN}", look_at_run("jax")),
    "train-torch": (f"torch-gpt {RUN}", look_at_run("torch")),
    "sweep": ("torch-gpt sweep ../sweep.yaml --out out", look_at_sweep),
    "prepare": ("gpt-data prepare ../texts out", look_at_files),
    "convert-to-jax": ("parity convert ../source out --to jax", look_at_files),
    "convert-to-hf": ("parity convert ../source out --to hf", look_at_files),
    "convert-force": ("parity convert ../source out --to jax --force", look_at_files),
    "init-jax": ("jax-gpt init out --config ../model.yaml", look_at_files),
    "init-torch": ("torch-gpt init out --config ../model.yaml", look_at_files),
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), help="what is raced")
    arguments.add_argument("--races", type=int, default=20, help="of each")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments")
    options = arguments.parse_args()
    failed = False
    with workplace() as place:
        import_everything(place / "scratch")
        set_up(place)
        for name in options.only:
            words, look = COMMANDS[name]
            result = race_often(place, words, look, options.races, random.Random(f"{options.seed}/{name}"))
            print(json.dumps({"raced": name} | result, indent=2), flush=True)
            failed |= bool(result["problems"])
    return int(failed)


def set_up(place: Path) -> None:
    """What the commands read."""
    text(place / "texts", documents=12)
    train(place / "run.yaml", {"steps": 30, "log_every": 1, "evaluate_every": 30, "checkpoint_every": 10})
    sweep(place / "sweep.yaml", [0.003, 0.01])
    model = {"vocab_size": 50257, "context_length": 16, "n_layers": 2, "n_heads": 2, "embed_dim": 192}
    (place / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    for seed, name in enumerate(("source", "other")):
        run(f"torch-gpt init {name} --config model.yaml --seed {seed}", place, place / "log")
    run("parity convert other before --to jax", place, place / "log")


def race_often(place: Path, words: str, look: Look, races: int, chance: random.Random) -> dict[str, Any]:
    """Race a command against itself; the counts, and what went wrong."""
    room, before = place / "room", place / "before" if "--force" in words else None
    clear(room, before)
    seconds = run(words, room, place / "log").seconds
    expected, beside, inside = look(room, "out"), {path.name for path in room.iterdir()}, names(room / "out")
    counts = {"races": 0, "refused_by_the_holder": 0, "refused_as_done": 0, "one_after_the_other": 0}
    problems = []
    while counts["races"] < races:
        clear(room, before)
        pause = chance.uniform(0, 0.05) if counts["races"] % 2 == 0 else chance.uniform(0.2, 0.8) * seconds
        runners = [Running(words, room, place / "first")]
        time.sleep(pause)
        if runners[0].ended():  # faster than usual: no race
            runners[0].wait()
            continue
        counts["races"] += 1
        runners.append(Running(words, room, place / "second"))
        ends = [runner.wait() for runner in runners]
        said = judge(
            ends,
            [runner.pid for runner in runners],
            repeatable="--force" in words or " train " in words or " sweep " in words,
        )
        if said in counts:
            counts[said] += 1
            more = sorted((names(room / "out") - inside) | ({path.name for path in room.iterdir()} - beside))
            if look(room, "out") != expected:
                said = "the destination is not what an undisturbed command leaves"
            elif more:
                said = f"left: {', '.join(more)}"
        if said not in counts:
            problems.append(f"race {counts['races']}, the second after {pause:.2f} s of {seconds:.2f}: {said}")
    return counts | {"problems": problems}


def clear(room: Path, before: Path | None) -> None:
    """An empty room, or one with what lies in the destination before."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    if before:
        shutil.copytree(before, room / "out")


def judge(ends: Sequence[Outcome], pids: Sequence[int], *, repeatable: bool) -> str:
    """How a race ended: a name of the counts, or what was wrong.

    Where the same command may come again (with --force it replaces, a run or a sweep that is complete stays), the
    second may begin to write when the first has just ended.
    """
    codes = [end.code for end in ends]
    if repeatable and codes == [0, 0]:
        return "one_after_the_other"
    if sorted(codes) != [0, 2]:
        return f"exit codes {codes}: " + " | ".join(end.stderr[-300:] for end in ends)
    loser = ends[codes.index(2)]
    last = loser.stderr.removesuffix("\n").rpartition("\n")[2]
    if not last.startswith("error: "):
        return f"the last line is no error: {last}"
    if str(pids[codes.index(0)]) in last:
        return "refused_by_the_holder"
    return "refused_as_done" if "exists already" in last else f"the holder is not named: {last}"


if __name__ == "__main__":
    sys.exit(main())
