import json
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt_core.errors import InputError, RunFailedError
from gpt_core.files.hashes import write_hashes
from gpt_core.runs.config import RunConfig
from gpt_core.runs.folder import differing_run_fields, held_run, open_run, read_run, resume_notices
from gpt_core.runs.saved import (
    RECORD_FILE,
    RUN_FILE,
    StepRecord,
    checkpoint_folder,
    find_checkpoint,
    kept_steps,
    newest_readable,
    read_record,
    saved_steps,
    set_aside,
)
from gpt_core.storage.checkpoint_config import read_checkpoint_config
from gpt_core.text.gpt2 import gpt2_tokenizer

CONFIG = RunConfig.from_dict(
    {
        "model": {"n_layers": 2, "n_heads": 4, "embed_dim": 64, "context_length": 32},
        "train": {"steps": 100, "batch_size": 8},
    }
)


def changed(section: str, **values: Any) -> RunConfig:
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **values)})


def add_checkpoint(run: Path, step: int, validation_loss: float | None) -> Path:
    folder = checkpoint_folder(run, step)
    (folder / RECORD_FILE).parent.mkdir(parents=True)
    record = StepRecord(step, 256 * step, {"step": step}, 0, 0, validation_loss, "jax", {"python": "3.11"})
    (folder / RECORD_FILE).write_text(json.dumps(record.to_dict()))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of four steps."""
    run = tmp_path / "run"
    open_run(run, CONFIG, "jax", None)
    for step, loss in ((9, 4.0), (10, 3.0), (20, 3.0), (100, None)):
        add_checkpoint(run, step, loss)
    return run


# -------------------------------------------------------------------------------------------------- which are kept


@pytest.mark.parametrize(
    ("last", "best", "every", "kept"),
    [
        (1, 0, None, {50}),
        (2, 0, None, {40, 50}),
        (9, 0, None, {10, 20, 30, 40, 50}),
        (1, 1, None, {50, 40}),  # 20 and 40 are equally good: the newer
        (1, 2, None, {50, 40, 20}),
        (1, 9, None, {50, 10, 20, 40}),  # 30 was not evaluated
        (1, 0, 20, {50, 20, 40}),
        (1, 1, 10, {10, 20, 30, 40, 50}),
    ],
)
def test_the_newest_the_best_and_regular_ones_are_kept(last: int, best: int, every: int | None, kept: set[int]) -> None:
    losses = {10: 5.0, 20: 3.0, 30: None, 40: 3.0, 50: 6.0}
    shuffled = {step: losses[step] for step in (30, 50, 10, 40, 20)}
    assert kept_steps(losses, last=last, best=best, every=every) == kept
    assert kept_steps(shuffled, last=last, best=best, every=every) == kept


def test_of_nothing_nothing_is_kept() -> None:
    assert kept_steps({}, last=2, best=1, every=10) == set()


# ----------------------------------------------------------------------------------------------------------- damaged


def test_what_was_moved_aside_before_stays(run: Path) -> None:
    for time in range(3):
        for step in (9, 20):
            shutil.rmtree(checkpoint_folder(run, step), ignore_errors=True)
            add_checkpoint(run, step, float(time))
        set_aside(run, {20: "damaged", 9: "damaged"})
    assert saved_steps(run) == [10, 100]
    found = {path.name: read_record(path).validation_loss for path in (run / "damaged").iterdir()}
    assert found == {"9": 0.0, "9.1": 1.0, "9.2": 2.0, "20": 0.0, "20.1": 1.0, "20.2": 2.0}


@pytest.mark.parametrize("phase", ["hashes", "reading"])
def test_what_another_process_cannot_read_is_damaged_for_all(phase: str, run: Path) -> None:
    write_hashes(checkpoint_folder(run, 20))
    answers = iter([True, False, True, True] if phase == "reading" else [False, True, True])
    found, reasons = newest_readable(run, lambda step: step, lambda yes: yes and next(answers))
    assert (found, reasons) == (20, {100: "another process could not read it"})


def test_no_process_begins_to_read_what_another_one_found_damaged(run: Path) -> None:
    answers, begun = iter([False, True, True]), []
    newest_readable(run, begun.append, lambda yes: next(answers))
    assert begun == [20]


# ------------------------------------------------------------------------------------------------------------- names


def test_saved_steps_are_numbers_in_order_and_nothing_else(run: Path) -> None:
    (run / "checkpoints" / "30.orbax-checkpoint-tmp-1").mkdir()
    (run / "checkpoints" / "40").touch()
    assert saved_steps(run) == [9, 10, 20, 100]
    assert saved_steps(run / "nothing") == []


@pytest.mark.parametrize(("suffix", "step"), [("", 100), ("@last", 100), ("@best", 20), ("@9", 9), ("@100", 100)])
def test_a_checkpoint_is_found_by_name(suffix: str, step: int, run: Path) -> None:
    found = find_checkpoint(f"{run}{suffix}")
    assert found == run / "checkpoints" / str(step)
    assert read_record(found).step == step


def test_a_folder_that_is_no_run_is_given_back(run: Path, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint(run / "checkpoints" / "9") == run / "checkpoints" / "9"
    odd = tmp_path / "mail@home"
    odd.mkdir()
    assert find_checkpoint(odd) == odd


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("run@30", "has no checkpoint @30; there are: 9, 10, 20, 100, best, last"),
        ("run@newest", "has no checkpoint @newest"),
        ("run@", "has no checkpoint @"),
        ("nowhere@best", "holds no training run"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(name: str, told: str, run: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_checkpoint(run.parent / name)
    assert told in str(caught.value)


def test_a_run_without_checkpoints_or_losses_says_so(run: Path) -> None:
    for step in (9, 10, 20):
        shutil.rmtree(checkpoint_folder(run, step))
    with pytest.raises(InputError, match="no checkpoint has a validation loss, so none is the best; use @last"):
        find_checkpoint(f"{run}@best")
    shutil.rmtree(checkpoint_folder(run, 100))
    with pytest.raises(InputError, match="has no complete checkpoint yet"):
        find_checkpoint(run)


GOOD_RECORD = {
    "step": 3,
    "tokens": 768,
    "data": {},
    "seed": 0,
    "skipped": 0,
    "validation_loss": None,
    "framework": "jax",
    "environment": {},
}


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("step", "3", "step = '3' must be a whole number of at least 0"),
        ("step", True, "step = True must be"),
        ("tokens", -768, "tokens = -768 must be"),
        ("tokens", 1.5, "tokens = 1.5 must be"),
        ("data", [], r"data = \[\] must be a mapping"),
        ("seed", 2**63, "seed = 9223372036854775808 must be"),
        ("validation_loss", "low", "validation_loss = 'low' must be a number or null"),
        ("validation_loss", float("nan"), "validation_loss = nan must be"),
        ("framework", None, "framework = None must be a text"),
        ("environment", "here", "environment = 'here' must be a mapping"),
    ],
)
def test_a_record_with_a_field_of_another_type_is_refused_by_name(field: str, value: Any, told: str, run: Path) -> None:
    folder = checkpoint_folder(run, 9)
    (folder / RECORD_FILE).write_text(json.dumps(GOOD_RECORD))
    assert read_record(folder) == StepRecord(**GOOD_RECORD)
    (folder / RECORD_FILE).write_text(json.dumps(GOOD_RECORD | {field: value}))
    with pytest.raises(InputError, match=f"record.json: {told}"):
        read_record(folder)


def test_names_that_no_file_can_have_are_refused(run: Path) -> None:
    for name in ("n" * 300, f"{'n' * 300}@best", f"{run}/{'n' * 300}"):
        with pytest.raises(InputError, match="the name is too long"):
            find_checkpoint(name)
    with pytest.raises(InputError, match="has no checkpoint @1111"):
        find_checkpoint(f"{run}@{'1' * 5000}")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 3}', '{"setp": 3}', '{"step": 3, "step": 4}'])
def test_a_damaged_record_is_refused_by_name(content: str, run: Path) -> None:
    folder = checkpoint_folder(run, 9)
    (folder / RECORD_FILE).write_text(content)
    with pytest.raises(InputError, match=r"record\.json"):
        read_record(folder)


# ----------------------------------------------------------------------------------------------------------- opening


def test_a_new_run_has_its_config_its_model_and_the_tokenizer(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    tokenizer = gpt2_tokenizer()
    open_run(run, CONFIG, "torch", tokenizer)
    assert read_run(run) == (CONFIG, "torch")
    assert read_checkpoint_config(run) == CONFIG.model
    assert {path.name for path in run.iterdir()} == {RUN_FILE, "config.json", "vocab.json", "merges.txt"}


@pytest.mark.parametrize("left", [[], [RUN_FILE], [RUN_FILE, "config.json"], [f".{RUN_FILE}.123.tmp"]])
def test_what_a_killed_start_leaves_behind_can_be_opened(left: list[str], tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    open_run(whole, CONFIG, "jax", None)
    run.mkdir()
    for name in left:
        if (whole / name).exists():
            shutil.copy(whole / name, run)
        else:
            (run / name).touch()
    open_run(run, CONFIG, "jax", None)
    assert read_run(run) == (CONFIG, "jax")
    assert read_checkpoint_config(run) == CONFIG.model


def test_a_start_that_is_killed_while_it_writes_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gpt_core.runs.folder.write_checkpoint_config", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(tmp_path / "run", CONFIG, "jax", None)
    open_run(tmp_path / "run", CONFIG, "jax", None)
    assert read_checkpoint_config(tmp_path / "run") == CONFIG.model


def test_only_the_primary_process_writes(tmp_path: Path) -> None:
    open_run(tmp_path / "run", CONFIG, "jax", None, primary=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("model", {"n_heads": 8, "head_dim": None}, "model.n_heads 4 against 8"),
        ("model", {"sliding_window": 16}, "model.sliding_window None against 16"),
        ("optimizer", {"learning_rate": 0.1}, "optimizer.learning_rate 0.0006 against 0.1"),
        ("train", {"batch_size": 16}, "train.batch_size 8 against 16"),
        ("train", {"seed": 1}, "train.seed 0 against 1"),
        ("train", {"dtype": "bfloat16"}, "train.dtype float32 against bfloat16"),
        ("data", {"seed": 1}, "data.seed 0 against 1"),
        ("jax", {"scan_layers": False}, "jax.scan_layers True against False"),
    ],
)
@pytest.mark.parametrize("primary", [True, False])
def test_another_run_in_the_folder_is_refused_with_the_fields_that_differ(
    section: str, values: dict[str, Any], told: str, primary: bool, run: Path
) -> None:
    before = (run / RUN_FILE).read_text()
    with pytest.raises(InputError) as caught:
        open_run(run, changed(section, **values), "jax", None, primary=primary)
    assert told in str(caught.value)
    assert "--out" in str(caught.value)
    assert (run / RUN_FILE).read_text() == before


def test_all_fields_that_differ_are_named(run: Path) -> None:
    other = replace(changed("train", seed=3), optimizer=replace(CONFIG.optimizer, beta1=0.5))
    with pytest.raises(InputError, match=r"optimizer\.beta1 0\.9 against 0\.5, train\.seed 0 against 3;"):
        open_run(run, other, "jax", None)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"steps": 200, "log_every": 1, "evaluate_every": 7, "checkpoint_every": 9, "accumulation": 4}),
        ("train", {"keep_last": 5, "keep_best": 0, "keep_every": 3, "max_skipped": 1, "evaluation_batches": None}),
        ("tracking", {"wandb": "offline", "tensorboard": True}),
        ("jax", {"remat": "full", "attention": "xla"}),
        ("torch", {"strategy": "fsdp2", "compile": True}),
        ("data", {"source": "elsewhere.txt", "prefetch": 9, "verify": False}),
    ],
)
def test_free_fields_may_change_when_a_run_goes_on(section: str, values: dict[str, Any], run: Path) -> None:
    open_run(run, changed(section, **values), "jax", None)
    saved, _ = read_run(run)
    assert {name: asdict(getattr(saved, section))[name] for name in values} == values


def schedule(steps: int, decay_steps: int | None = None) -> RunConfig:
    """A run of `steps` whose rate falls from 1 at step 0 to 0.2 at its end."""
    optimizer = replace(CONFIG.optimizer, learning_rate=1.0, final_learning_rate=0.2, decay_steps=decay_steps)
    return replace(CONFIG, optimizer=optimizer, train=replace(CONFIG.train, steps=steps))


# Half of a cosine from 1 to 0.2: 0.6 in its middle.
@pytest.mark.parametrize(
    ("saved", "ours", "step", "told"),
    [
        (schedule(100), schedule(200), 100, "step 101 has the learning rate 0.6, not 0.2: .* 200 now, .* at 100; "),
        (schedule(100), schedule(200), 50, r"step 51 has the learning rate 0\.8828, not 0\.6: "),
        (schedule(200), schedule(100), 50, r"step 51 has the learning rate 0\.6, not 0\.8828: .*decay_steps 200 keeps"),
        (schedule(100, 50), schedule(200, 200), 100, "step 101 .* 0.6, not 0.2: .* 200 now, .*decay_steps 50 keeps"),
        (schedule(100), schedule(100), 50, None),
        (schedule(100), schedule(200, 100), 100, None),
        (schedule(100, 50), schedule(200, 50), 60, None),
        (schedule(100), schedule(200), 0, None),  # nothing was trained yet
        (schedule(200), schedule(100), 100, None),  # nothing is left to train
        (None, schedule(200), 100, None),
    ],
)
def test_going_on_says_both_rates_where_the_schedule_changes(
    saved: RunConfig | None, ours: RunConfig, step: int, told: str | None
) -> None:
    notices = resume_notices(saved, ours, step)
    assert len(notices) == (told is not None)
    assert told is None or re.match(told, notices[0])


def test_going_on_says_when_validation_losses_are_of_other_text() -> None:
    saved, ours = (changed("train", evaluation_batches=count) for count in (50, None))
    assert resume_notices(saved, saved, 10) == []
    (notice,) = resume_notices(saved, ours, 10)
    assert "of the whole validation text from here on, of 50 batches of the validation text until now" in notice
    assert "train.evaluation_batches" in notice


def test_the_old_schedule_is_kept_as_the_notice_says_also_after_the_new_one_was_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert open_run(run, schedule(100), "jax", None) is None
    add_checkpoint(run, 100, None)
    assert open_run(run, schedule(200), "jax", None) == schedule(100)
    assert open_run(run, schedule(200, 100), "jax", None) == schedule(200)
    assert read_run(run)[0] == schedule(200, 100)
    assert open_run(run, schedule(300, 100), "jax", None) == schedule(200, 100)


@pytest.mark.parametrize(
    ("saved", "ours", "same"),
    [
        (schedule(100), schedule(100, 100), True),
        (schedule(100, 100), schedule(100), True),
        (schedule(200, 100), schedule(200), False),
        (schedule(200, 100), schedule(200, 150), False),
        (schedule(200, 100), schedule(400, 100), True),
    ],
)
def test_an_end_of_the_schedule_that_was_given_stays(saved: RunConfig, ours: RunConfig, same: bool) -> None:
    assert (differing_run_fields(saved, ours) == "") is same
    assert same or "optimizer.decay_steps 100 against" in differing_run_fields(saved, ours)


@pytest.mark.parametrize("primary", [True, False])
def test_fewer_steps_than_a_run_has_made_are_refused(primary: bool, run: Path) -> None:
    before = (run / RUN_FILE).read_text()
    with pytest.raises(InputError, match=r"train\.steps = 99, and this run has made 100 steps already"):
        open_run(run, changed("train", steps=99), "jax", None, primary=primary)
    assert (run / RUN_FILE).read_text() == before
    open_run(run, changed("train", steps=100), "jax", None, primary=primary)


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
def test_a_step_whose_name_is_taken_is_refused_before_the_first_step(kind: str, run: Path) -> None:
    place = run / "checkpoints/200"
    place.write_text("") if kind == "a file" else place.symlink_to("nowhere")
    before = (run / RUN_FILE).read_text()
    with pytest.raises(InputError, match=r"checkpoints/200: is no folder, and has the name of a step's checkpoint"):
        open_run(run, changed("train", steps=300), "jax", None)
    assert (run / RUN_FILE).read_text() == before


def test_a_run_of_the_other_framework_is_refused_with_what_to_do(run: Path) -> None:
    with pytest.raises(InputError, match=r"is trained in jax; .*parity convert --state"):
        open_run(run, CONFIG, "torch", None)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        open_run(tmp_path, CONFIG, "jax", None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "- 1", "framework: jax", "framework: jax\nrun: {trian: {}}", "run: [\n"])
def test_a_damaged_run_file_is_refused_by_name(content: str, run: Path) -> None:
    (run / RUN_FILE).write_text(content)
    with pytest.raises(InputError, match=r"config\.yaml"):
        open_run(run, CONFIG, "jax", None)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no training run"):
        read_run(tmp_path)


def test_a_run_file_is_plain_yaml(run: Path) -> None:
    content = yaml.safe_load((run / RUN_FILE).read_text())
    assert content["framework"] == "jax"
    assert content["run"]["train"]["steps"] == 100


def test_a_run_is_refused_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="run"):
        open_run(tmp_path / "run", CONFIG, "jax", None)


# ------------------------------------------------------------------------------------------------------ one trainer


def train(run: Path, config: RunConfig, *, until: int | None, ends: BaseException | None) -> None:
    """As a trainer does: a checkpoint of a step, if given, and how it ends."""
    with held_run(run) as require_hold:
        open_run(run, config, "jax", None)
        (run / "metrics.jsonl").write_text("{}\n")
        require_hold()
        if until is not None:
            add_checkpoint(run, until, None)
        if ends is not None:
            raise ends


REFUSED = [InputError("no text"), KeyboardInterrupt()]


@pytest.mark.parametrize("ends", REFUSED, ids=["refused", "Ctrl-C"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "empty folder"])
def test_a_run_that_saved_nothing_is_taken_away_and_other_settings_may_follow(
    ends: BaseException, existing: bool, tmp_path: Path
) -> None:
    run = tmp_path / "new" / "run"
    if existing:
        run.mkdir(parents=True)
    with pytest.raises(type(ends)):
        train(run, CONFIG, until=None, ends=ends)
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "run"] if existing else [])
    train(run, changed("optimizer", learning_rate=0.1), until=4, ends=None)
    assert saved_steps(run) == [4]
    assert not (run / ".lease").exists()


@pytest.mark.parametrize("ends", [InputError("no text"), KeyboardInterrupt(), RunFailedError("NaN")])
def test_a_run_that_saved_something_stays(ends: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(ends)):
        train(tmp_path / "run", CONFIG, until=4, ends=ends)
    assert read_run(tmp_path / "run") == (CONFIG, "jax")
    assert saved_steps(tmp_path / "run") == [4]


def test_what_is_left_of_a_run_that_failed_can_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError):
        train(tmp_path / "run", CONFIG, until=None, ends=RunFailedError("NaN"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("ends", REFUSED, ids=["refused", "Ctrl-C"])
def test_a_run_that_is_refused_when_it_goes_on_keeps_its_settings(ends: BaseException, run: Path) -> None:
    before = (run / RUN_FILE).read_bytes()
    with pytest.raises(type(ends)):
        train(run, changed("train", steps=107), until=None, ends=ends)
    assert (run / RUN_FILE).read_bytes() == before
    assert saved_steps(run) == [9, 10, 20, 100]


def test_a_second_trainer_is_refused_and_changes_nothing(run: Path) -> None:
    before = (run / RUN_FILE).read_bytes()
    with held_run(run), pytest.raises(InputError, match=f"run: is being written by process {os.getpid()} on "):
        train(run, changed("train", steps=107), until=200, ends=None)
    assert (run / RUN_FILE).read_bytes() == before
    assert saved_steps(run) == [9, 10, 20, 100]


def test_all_processes_of_a_run_learn_that_it_is_held(run: Path) -> None:
    """What one process says reaches all; those that do not write never look themselves."""
    said: list[bool] = []

    def primary_could_not(mine: bool) -> bool:
        said.append(mine)
        return False

    with pytest.raises(InputError, match="process 0 says why"), held_run(run, primary=False, agree=primary_could_not):
        pass
    with held_run(run), pytest.raises(InputError, match="is being written by"), held_run(run, agree=primary_could_not):
        pass
    assert said == [True, False]


@pytest.mark.parametrize("ends", REFUSED, ids=["refused", "Ctrl-C"])
def test_what_a_person_put_into_a_run_that_saved_nothing_stays(ends: BaseException, tmp_path: Path) -> None:
    def with_notes() -> None:
        with held_run(tmp_path / "run"):
            open_run(tmp_path / "run", CONFIG, "jax", None)
            (tmp_path / "run" / "notes.txt").write_text("mine")
            raise ends

    with pytest.raises(type(ends)):
        with_notes()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_trainer_that_was_taken_over_takes_nothing_away(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def taken_over() -> None:
        with held_run(run) as require_hold:
            open_run(run, CONFIG, "jax", None)
            lease = run / ".lease"
            lease.write_text(lease.read_text().replace('"name": "', '"name": "another '))
            require_hold()

    with pytest.raises(InputError, match="run: is being written by process"):
        taken_over()
    assert read_run(run) == (CONFIG, "jax")


def test_no_process_of_a_run_writes_before_all_have_looked(tmp_path: Path) -> None:
    """Or a slower one would find the files of the first, and take them for another's."""
    seen: list[list[Path]] = []

    def agree(yes: bool) -> bool:
        seen.append(list(tmp_path.rglob(RUN_FILE)))
        return yes

    open_run(tmp_path / "run", CONFIG, "jax", None, agree=agree)
    assert [len(files) for files in seen] == [0, 1]
    with pytest.raises(InputError, match="was refused in another process"):
        open_run(tmp_path / "other", CONFIG, "jax", None, agree=lambda yes: False)
    assert not (tmp_path / "other").exists()
