import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from gpt_core import cli
from gpt_core.commands.train import train_config, train_parser
from gpt_core.config import find_config, preset_names, read_yaml
from gpt_core.errors import InputError, RunFailedError
from gpt_core.files.writing import held_folder
from gpt_core.runs.sweep import Trial, best_first, propose, run_sweep, sweep_command, sweep_parser
from gpt_core.runs.sweep_config import Parameter, Sweep, find_sweep, sweep_names

# Stands for a trainer: notes its arguments in calls.txt beside it, and writes the summary that its settings lead to.
# Its file `trouble.json` says which trials (by learning rate) end otherwise.
TRAINER = """
import json, os, signal, sys
from pathlib import Path

here, words = Path(__file__).parent, sys.argv[1:]
with (here / "calls.txt").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
settings = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
rate = float(settings.get("optimizer.learning_rate", 0))
trouble = json.loads((here / "trouble.json").read_text()).get(settings.get("optimizer.learning_rate"))
out = Path(words[words.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
if trouble == "fails":
    print("starting\\nerror: the loss was not finite\\n")
    sys.exit(1)
if trouble == "stops early":
    sys.exit(0)
if trouble in ("SIGINT", "SIGTERM"):
    def save(*_):
        (out / "saved").touch()
        os._exit(0)
    signal.signal(signal.SIGTERM, save)
    os.kill(os.getppid(), getattr(signal, trouble))
    signal.pause()
loss = None if trouble == "no number" else (1000 * rate - 2) ** 2
(out / "summary.json").write_text(json.dumps({"validation_loss": loss, "steps": 3}))
"""

RATES = [0.001, 0.002, 0.003, 0.004]
GRID: dict[str, Any] = {
    "command": ["jax-gpt", "train", "--config", "tiny-cpu", "${args}"],
    "method": "grid",
    "metric": {"name": "validation_loss", "goal": "minimize"},
    "parameters": {"optimizer.learning_rate": {"values": RATES}},
}
RANGE = {"optimizer.learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}}


class Trainer:
    """The fake trainer, and what it was called with."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "sweep"
        self._folder = folder
        (folder / "trainer.py").write_text(TRAINER)
        self.trouble({})
        self.launch = [sys.executable, "-I", "-S", str(folder / "trainer.py")]

    def trouble(self, by_rate: dict[float, str]) -> None:
        (self._folder / "trouble.json").write_text(json.dumps({str(rate): what for rate, what in by_rate.items()}))

    def file(self, **changes: Any) -> Path:
        path = self._folder / "my-sweep.yaml"
        path.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
        return path

    def run(
        self, *, trials: int | None = None, extra: tuple[str, ...] = (), seed: int = 0, **changes: Any
    ) -> list[Trial]:
        file = self.file(**changes)
        return run_sweep(file, out=self.out, launch=self.launch, trials=trials, extra=extra, seed=seed)

    def calls(self) -> list[list[str]]:
        file = self._folder / "calls.txt"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def state(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "sweep.json").read_text())
        return content


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def rates(trials: list[Trial]) -> list[Any]:
    return [trial.parameters["optimizer.learning_rate"] for trial in trials]


# ---------------------------------------------------------------------------------------------------- shipped sweeps


@pytest.mark.parametrize("name", sweep_names())
def test_a_shipped_sweep_means_the_same_to_wandb(name: str) -> None:
    Sweep.from_yaml(name)
    content = yaml.safe_load(find_sweep(name).read_text())  # PyYAML's rules for numbers, which W&B's are
    assert content == read_yaml(find_sweep(name))


@pytest.mark.parametrize("name", sweep_names())
def test_wandb_agent_runs_a_shipped_sweep_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, content = Sweep.from_yaml(name), read_yaml(find_sweep(name))
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    folders = set()
    for number, parameters in enumerate([propose(sweep, seed, []) for seed in range(4)]):
        monkeypatch.setenv("WANDB_RUN_ID", f"r{number}")
        arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in parameters.items()}})
        macros = {"${program}": [content["program"]], "${args}": arguments["args"]}
        words = [word for chunk in create_sweep_command(content["command"]) for word in macros.get(chunk, [chunk])]
        assert words[:2] == ["jax-gpt", "train"]
        parser = train_parser("jax-gpt")
        config, folder = train_config(parser.parse_args(words[2:]), parser.parse_args(words[2:], defaults=False))
        assert config.tracking.wandb == "online"
        for dotted, value in parameters.items():
            section, field = dotted.split(".")
            assert getattr(getattr(config, section), field) == (None if value == "null" else value)
        folders.add(folder)
    assert folders == {Path("runs/sweeps/s1") / f"r{number}" for number in range(4)}  # no trial meets another's run


def test_the_attention_grid_is_every_combination_once() -> None:
    sweep = Sweep.from_yaml("attention")
    assert sweep.grid_size == sweep.trials(None) == 6
    trials: list[Trial] = []
    for number in range(6):
        trials.append(Trial(number, propose(sweep, 0, trials), "done", float(number)))
    assert {tuple(trial.parameters.values()) for trial in trials} == set(itertools.product([1, 2, 4], ["null", 32]))


def test_sweeps_are_no_presets_and_presets_no_sweeps() -> None:
    assert set(sweep_names()) == {"attention", "learning-rate"}
    assert not set(sweep_names()) & set(preset_names())
    with pytest.raises(InputError, match="unknown preset 'attention'"):
        find_config("attention")
    with pytest.raises(InputError, match="unknown sweep 'gpt2'; known are: attention, learning-rate"):
        find_sweep("gpt2")
    with pytest.raises(InputError, match=r"nothing\.yaml: no such file"):
        find_sweep("nothing.yaml")


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate is not supported"),
        ({"methods": "grid", "cap": 3}, "unknown key 'methods', 'cap'; known are: program, command"),
        ({"method": "hyperband"}, "method = 'hyperband' must be one of: grid, random, bayes"),
        ({"method": None}, "has no 'method'"),
        ({"metric": None}, "has no 'metric'"),
        ({"metric": {"goal": "minimize"}}, "metric: needs a name"),
        ({"metric": {"name": "x", "goal": "min"}}, "goal = 'min' must be one of: minimize, maximize"),
        ({"metric": {"name": "x", "target": 1}}, "metric: unknown key 'target'"),
        ({"run_cap": 0}, "run_cap = 0"),
        ({"run_cap": True}, "run_cap = True"),
        ({"run_cap": 10**9}, "run_cap = 1000000000"),
        ({"command": None, "program": "train.py"}, "needs a command"),
        ({"command": ["jax-gpt", "train"]}, "needs ${args} once"),
        ({"command": ["${args}"]}, "needs ${args} once"),
        ({"command": ["jax-gpt", "${args_json}", "${args}"]}, "${args_json} is not supported"),
        ({"parameters": {}}, "has no 'parameters'"),
        ({"parameters": ["optimizer.learning_rate"]}, "expected settings"),
    ],
)
def test_a_bad_file_is_refused_with_file_key_and_value(changes: dict[str, Any], told: str, trainer: Trainer) -> None:
    with pytest.raises(InputError) as caught:
        Sweep.from_yaml(trainer.file(**changes))
    assert "my-sweep.yaml: " in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (3, "expected value, values, or min and max; found 3"),
        ({}, "found: nothing"),
        ({"min": 1}, "needs value, values, or min and max; found: min"),
        ({"min": 1, "max": 2, "mean": 3}, "unknown key 'mean'"),
        ({"value": 1, "values": [1]}, "unknown key 'values'"),
        ({"distribution": "normal", "mu": 0, "sigma": 1}, "'normal' is not supported; known are: constant"),
        ({"distribution": "uniform", "min": 0}, "no max"),
        ({"distribution": "uniform", "min": 0, "max": "1"}, "max = '1' must be a number"),
        ({"distribution": "uniform", "min": 2, "max": 1}, "min = 2 is larger than max = 1"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min = 0 must be positive"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 3}, "min = 0.5 must be a whole number"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 0}, "q = 0 must be positive"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 3}, "no multiple of q = 3"),
        ({"min": 1, "max": 10**30}, "more than 9,007,199,254,740,992 values lie between"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 1e-300}, "values lie between"),
        ({"distribution": "uniform", "min": 0, "max": 10**400}, "max = 1000"),
        ({"values": []}, "empty"),
        ({"values": 3}, "values = 3 must be a list"),
        ({"values": [1, [2]]}, "the value [2] must be a number"),
        ({"values": [1, 2, 1]}, "has a value twice"),
        ({"values": [1.0, math.nan]}, "the value nan must be a finite number"),
        ({"value": math.inf}, "the value inf must be a finite number"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(spec: Any, told: str) -> None:
    with pytest.raises(InputError) as caught:
        Sweep.from_dict(GRID | {"method": "random", "parameters": {"model.dropout": spec}}, "f.yaml")
    assert str(caught.value).startswith("f.yaml: parameters: model.dropout: ")
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["optimizer.lr", "optimiser.learning_rate", "jax.mesh.pipeline", "model.n_heads.more"])
def test_a_setting_that_no_run_has_is_refused_before_any_trial(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown setting '{name}'"):
        Sweep.from_dict(GRID | {"parameters": {name: {"value": 1}}})


def test_groups_are_settings_with_dotted_names() -> None:
    groups = {
        "optimizer": {"parameters": {"learning_rate": {"value": 1e-3}}},
        "jax": {"parameters": {"mesh": {"parameters": {"fsdp": {"values": [1, 2]}}}}},
        "seed": {"value": 1},
    }
    assert list(Sweep.from_dict(GRID | {"parameters": groups}).parameters) == [
        "optimizer.learning_rate",
        "jax.mesh.fsdp",
        "seed",
    ]
    with pytest.raises(InputError, match="optimizer: a group has nothing beside 'parameters'"):
        Sweep.from_dict(GRID | {"parameters": {"optimizer": {"parameters": {}, "value": 1}}})


def test_a_grid_refuses_what_has_no_end() -> None:
    with pytest.raises(InputError, match="a grid has no place for distribution log_uniform_values"):
        Sweep.from_dict(GRID | {"parameters": RANGE})
    with pytest.raises(InputError, match="more than 100,000"):
        Sweep.from_dict(GRID | {"parameters": {"train.steps": {"min": 1, "max": 10**12}}})


def test_how_many_trials_there_are() -> None:
    assert Sweep.from_dict(GRID).trials(None) == 4
    assert Sweep.from_dict(GRID).trials(9) == 4
    assert Sweep.from_dict(GRID | {"run_cap": 3}).trials(None) == 3
    assert Sweep.from_dict(GRID | {"run_cap": 3}).trials(2) == 2
    drawn = GRID | {"method": "random", "parameters": RANGE}
    assert Sweep.from_dict(drawn | {"run_cap": 7}).trials(None) == 7
    with pytest.raises(InputError, match="give --trials, or run_cap"):
        Sweep.from_dict(drawn).trials(None)
    for limit in (0, 10**9):
        with pytest.raises(InputError, match=f"--trials {limit} must be at least 1 and at most 100,000"):
            Sweep.from_dict(drawn).trials(limit)


# ---------------------------------------------------------------------------------------------------- what is proposed


@pytest.mark.parametrize("method", ["random", "bayes"])
@pytest.mark.parametrize(
    ("spec", "kind", "allowed"),
    [
        ({"value": None}, type(None), lambda x: x is None),
        ({"values": ["none", "full"]}, str, lambda x: x in {"none", "full"}),
        ({"values": [True, False]}, bool, lambda x: True),
        ({"min": 2, "max": 5}, int, lambda x: 2 <= x <= 5),
        ({"min": 2, "max": 5.0}, float, lambda x: 2 <= x <= 5),
        ({"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}, float, lambda x: 1e-5 <= x <= 1e-1),
        ({"distribution": "q_uniform", "min": 10, "max": 70, "q": 16}, int, lambda x: x in {16, 32, 48, 64}),
        ({"distribution": "q_uniform", "min": 0.1, "max": 0.4, "q": 0.1}, float, lambda x: x in {0.1, 0.2, 0.3, 0.4}),
        ({"distribution": "q_uniform", "min": 0.5, "max": 3.5}, int, lambda x: x in {1, 2, 3}),
    ],
)
def test_proposals_are_of_the_right_kind_and_within_bounds(method: str, spec: Any, kind: type, allowed: Any) -> None:
    sweep = Sweep.from_dict(GRID | {"method": method, "parameters": {"setting": spec}})
    trials: list[Trial] = []
    for number in range(16):
        value: Any = propose(sweep, 5, trials)["setting"]
        assert type(value) is kind
        assert allowed(value)
        trials.append(Trial(number, {"setting": value}, "done", float(number % 3)))
    assert len({trial.parameters["setting"] for trial in trials}) > 1 or "value" in spec


def test_log_uniform_spreads_over_magnitudes() -> None:
    sweep = Sweep.from_dict(GRID | {"method": "random", "parameters": RANGE})
    drawn: list[Any] = [propose(sweep, seed, [])["optimizer.learning_rate"] for seed in range(60)]
    assert 15 <= sum(rate < 1e-3 for rate in drawn) <= 45  # half of them; of a uniform draw one in eleven


def test_bayes_learns_where_the_loss_is_low_and_random_does_not() -> None:
    def far_trials(method: str, seed: int) -> int:
        parameters = {"model.dropout": {"distribution": "uniform", "min": 0.0, "max": 0.9}}
        sweep = Sweep.from_dict(GRID | {"method": method, "parameters": parameters})
        trials: list[Trial] = []
        for number in range(40):
            proposed: Any = propose(sweep, seed, trials)
            trials.append(Trial(number, proposed, "done", abs(proposed["model.dropout"] - 0.3)))
        return sum(trial.value is not None and trial.value > 0.2 for trial in trials[20:])

    # Of a uniform draw 5 in 9 are far.
    assert sum(far_trials("random", seed) for seed in range(3)) > 25
    assert sum(far_trials("bayes", seed) for seed in range(3)) < 18


def test_q_uniform_is_enumerated_in_a_grid() -> None:
    parameter = Parameter("q_uniform", min=0.1, max=0.3, q=0.1)
    assert [parameter.value(level) for level in parameter.levels or ()] == [0.1, 0.2, 0.3]
    assert all(parameter.level(parameter.value(level)) == level for level in parameter.levels or ())


# ----------------------------------------------------------------------------------------------------------- running


def test_a_trial_gets_the_files_command_its_settings_and_a_folder(trainer: Trainer) -> None:
    parameters = {
        "optimizer.learning_rate": {"value": 1e-05},
        "model.sliding_window": {"values": [None]},
        "model.bias": {"value": False},
        "jax.remat": {"value": "full"},
    }
    command = ["${env}", "${interpreter}", "${program}", "train", "${args}", "--train.steps", 5]
    trainer.run(command=command, parameters=parameters, extra=("--train.seed=3",))
    assert trainer.calls() == [
        [
            "train",
            "--optimizer.learning_rate=1e-05",
            "--model.sliding_window=null",
            "--model.bias=false",
            "--jax.remat=full",
            "--train.steps",
            "5",
            "--train.seed=3",
            "--out",
            str(trainer.out / "trial-000"),
            "--tracking.wandb",
            "disabled",
        ]
    ]


def test_results_are_read_from_summaries_and_kept(trainer: Trainer) -> None:
    trials = trainer.run()
    assert sorted(rates(trials)) == RATES
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert {rate: trial.value for rate, trial in zip(rates(trials), trials, strict=True)} == pytest.approx(
        {0.001: 1.0, 0.002: 0.0, 0.003: 1.0, 0.004: 4.0}
    )
    assert rates(best_first(trials, "minimize"))[0] == 0.002
    assert rates(best_first(trials, "maximize"))[0] == 0.004
    state = trainer.state()
    assert state["best"] == rates(trials).index(0.002)
    assert [entry["state"] for entry in state["trials"]] == ["done"] * 4
    assert (trainer.out / "trial-003.log").is_file()


def test_trials_that_are_done_are_not_run_again(trainer: Trainer) -> None:
    first = trainer.run(trials=2)
    assert trainer.run(trials=4)[:2] == first
    assert len(trainer.calls()) == 4
    again = trainer.run()
    assert len(trainer.calls()) == 4
    assert sorted(rates(again)) == RATES


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_sweep_that_goes_on_tries_what_it_would_have_tried(method: str, tmp_path: Path) -> None:
    found = []
    for name, pieces in (("whole", [14]), ("in-pieces", [3, 12, 14])):
        folder = tmp_path / name
        folder.mkdir()
        trainer = Trainer(folder)
        for trials in pieces:
            result = trainer.run(method=method, parameters=RANGE, trials=trials)
        found.append(rates(result))
    assert found[0] == found[1]
    assert len(set(found[0])) == 14


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        ("fails", "the loss was not finite"),
        ("stops early", "summary.json is missing or broken"),
        ("no number", "validation_loss is None, no number"),
    ],
)
def test_a_failed_trial_is_marked_and_run_again_with_its_settings(trouble: str, error: str, trainer: Trainer) -> None:
    trainer.trouble({0.003: trouble})
    trials = trainer.run()
    failed = trials[rates(trials).index(0.003)]
    assert (failed.state, failed.value) == ("failed", None)
    assert failed.error is not None
    assert error in failed.error
    assert sum(trial.state == "done" for trial in trials) == 3
    assert best_first(trials, "minimize")[-1] == best_first(trials, "maximize")[-1] == failed

    trainer.trouble({})
    repaired = trainer.run()[failed.number]
    assert (repaired.state, repaired.error, repaired.parameters) == ("done", None, failed.parameters)
    assert len(trainer.calls()) == 5


def test_a_sweep_whose_trials_all_fail_has_failed(trainer: Trainer) -> None:
    trainer.trouble(dict.fromkeys(RATES, "fails"))
    with pytest.raises(RunFailedError, match="all 4 trials failed, the first with: the loss was not finite"):
        trainer.run()
    assert trainer.state()["best"] is None


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_the_running_trial_and_keeps_the_others(name: str, trainer: Trainer) -> None:
    done = rates(trainer.run(trials=2))
    rest = [rate for rate in RATES if rate not in done]
    trainer.trouble(dict.fromkeys(rest, name))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (trainer.out / "trial-002" / "saved").exists()
    assert [entry["state"] for entry in trainer.state()["trials"]] == ["done", "done", "started"]
    trainer.trouble({})
    assert sorted(rates(trainer.run())) == RATES
    assert len(trainer.calls()) == 5


def test_a_trial_that_outlived_its_sweep_is_waited_for(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr("gpt_core.runs.sweep.wait_until_free", waited.append)
    trainer.run(trials=2)
    assert waited == [trainer.out / "trial-000", trainer.out / "trial-001"]


def test_a_second_sweep_is_refused_and_starts_nothing(trainer: Trainer) -> None:
    with held_folder(trainer.out), pytest.raises(InputError, match="sweep: is being written by process"):
        trainer.run()
    assert trainer.calls() == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"extra": ("--train.steps=3",)}, "extra"),
        ({"metric": {"name": "steps"}}, "metric"),
        ({"parameters": {"optimizer.learning_rate": {"values": [0.1]}}}, "parameters"),
        ({"command": ["jax-gpt", "train", "${args}"]}, "command"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(changes: dict[str, Any], named: str, trainer: Trainer) -> None:
    trainer.run(trials=1)
    with pytest.raises(InputError, match=f"holds another sweep, it differs in {named};"):
        trainer.run(**changes)
    assert len(trainer.calls()) == 1


def test_one_sweep_is_of_one_trainer(trainer: Trainer) -> None:
    trainer.run(trials=1)
    with pytest.raises(InputError, match="differs in program"):
        run_sweep(trainer.file(), out=trainer.out, launch=[sys.executable, "-m", "torch_gpt"])


def test_a_folder_with_something_else_is_left_alone(trainer: Trainer) -> None:
    trainer.out.mkdir()
    (trainer.out / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no sweep"):
        trainer.run()
    assert os.listdir(trainer.out) == ["thesis.tex"]


def test_a_setting_of_the_file_that_no_run_has_is_refused_before_any_trial(trainer: Trainer) -> None:
    with pytest.raises(InputError, match="unknown setting 'nope'"):
        trainer.run(parameters={"nope": {"values": [1, 2]}})
    assert not trainer.out.exists()


@pytest.mark.parametrize("content", ['{"sweep": ', "[]", '{"sweep": 1, "trials": []}', '{"sweep": {}, "trials": {}}'])
def test_a_damaged_state_is_refused_by_name(content: str, trainer: Trainer) -> None:
    trainer.out.mkdir()
    (trainer.out / "sweep.json").write_text(content)
    with pytest.raises(InputError, match=r"sweep\.json: cannot be read"):
        trainer.run()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (3, "expected a mapping of trial fields, found int"),
        ({}, "has no number, a whole number of at least 0"),
        ({"number": "0"}, "number = '0' must be a whole number"),
        ({"number": -1}, "number = -1 must be a whole number"),
        ({"number": 0, "parameters": []}, r"parameters = \[\] must be a mapping"),
        ({"number": 0, "parameters": {"train.steps": [1]}}, "parameters = .* must be a mapping"),
        ({"number": 0, "parameters": {}, "state": "over"}, "state = 'over' must be one of: started, done, failed"),
        ({"number": 0, "parameters": {}, "value": "low"}, "value = 'low' must be a number or null"),
    ],
)
def test_a_damaged_trial_is_refused_by_field(entry: object, told: str, trainer: Trainer) -> None:
    trainer.run(trials=1)
    (trainer.out / "sweep.json").write_text(json.dumps(trainer.state() | {"trials": [entry]}))
    with pytest.raises(InputError, match=rf"sweep\.json: {told}"):
        trainer.run()


def test_a_program_that_is_not_there_is_named(trainer: Trainer) -> None:
    with pytest.raises(InputError, match="no-such-program: cannot be run"):
        run_sweep(trainer.file(), out=trainer.out, launch=["no-such-program"])


# ----------------------------------------------------------------------------------------------------------- command


def command(trainer: Trainer, *words: str) -> int:
    top = cli.parser("Top.", "  prog", prog="prog")
    top.add_subcommands(required=True, dest="subcommand").add_subcommand("sweep", sweep_parser("prog"))
    return cli.run(top, {"sweep": lambda options: sweep_command(options, trainer.launch)}, ["sweep", *words])


def test_the_command_prints_a_table_best_first(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.trouble({0.003: "fails"})
    assert command(trainer, str(trainer.file()), "--out", str(trainer.out)) == 0
    output, errors = capsys.readouterr()
    rows = [line.split() for line in output.splitlines() if line.strip().startswith("trial-")]
    assert [row[2] for row in rows] == ["0.002", "0.001", "0.004", "0.003"]
    assert [row[1] for row in rows[2:]] == ["4", "failed"]
    assert "learning_rate" in output
    assert "failed: the loss was not finite" in errors


def test_a_name_that_would_colour_a_terminal_is_shown_as_it_is(
    trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(trainer, str(trainer.file()), "--out", str(trainer.out.with_name("\x1b[31mred"))) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_the_commands_json_is_alone_on_standard_output(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(trainer, str(trainer.file()), "--out", str(trainer.out), "--set", "train.steps=3", "--json") == 0
    assert json.loads(capsys.readouterr().out) == trainer.state()
    assert all("--train.steps=3" in call for call in trainer.calls())


def test_the_command_fails_with_1_when_all_trials_do(trainer: Trainer) -> None:
    trainer.trouble(dict.fromkeys(RATES, "fails"))
    assert command(trainer, str(trainer.file()), "--out", str(trainer.out)) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "train.steps"], "--set train.steps: expected NAME=VALUE"),
        (["--set", "train.step=3"], "--set: unknown setting 'train.step'"),
        (["--set", "train.step=3", "--set", "train.steps=3"], "--set: unknown setting 'train.step'"),
        (["--set", "optimizer.learning_rate=3"], "the sweep tries values of optimizer.learning_rate itself"),
        (["--set", "nope=1"], "--set: unknown setting 'nope'; at 'nope' known are: model, data"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**64)], "--seed 18446744073709551616"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], told: str, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(trainer, str(trainer.file()), "--out", str(trainer.out), *words) == 2
    assert told in capsys.readouterr().err
    assert not trainer.out.exists()


def test_help_has_an_example_and_the_shipped_sweeps(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(trainer, "--help")
    output = capsys.readouterr().out
    assert "prog sweep attention" in output
    assert "attention, learning-rate" in output
