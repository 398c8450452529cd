import json
import math
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps

from gpt_core.errors import InputError
from gpt_core.runs.summary import CURVE_FILE, SUMMARY_FILE, environment, loss_curve, write_summary
from gpt_core.runs.tracking import METRICS_FILE, read_metrics

SUMMARY: dict[str, Any] = {
    "steps": 600,
    "tokens": 1_228_800,
    "train_loss": 4.1,
    "validation_loss": 4.25,
    "validation_perplexity": 70.1,
    "unigram_entropy": 7.0,
    "tokens_per_second": 12_000.0,
    "peak_memory_bytes": 2**30,
    "config": {"model": {"sliding_window": None}},
    "environment": {"python": "3.11.0"},
}


def write_metrics(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def realistic_records() -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).normal(0, 0.12, 601)
    records: list[dict[str, Any]] = []
    for step in range(10, 601, 10):
        records.append({"step": step, "train_loss": 3.9 + 6.8 * math.exp(-step / 90) + noise[step]})
        if step % 100 == 0:
            records.append({"step": step, "validation_loss": 4.1 + 6.8 * math.exp(-step / 90)})
    return records


def test_a_summary_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    more = SUMMARY | {"mfu": 0.4, "skipped_steps": 0, "framework": "jax"}
    for summary in (SUMMARY, more):
        write_summary(tmp_path, summary)
        assert json.loads((tmp_path / SUMMARY_FILE).read_text()) == summary


@pytest.mark.parametrize("key", sorted(SUMMARY))
def test_a_summary_without_one_of_its_keys_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"missing.*{key}"):
        write_summary(tmp_path, {name: value for name, value in SUMMARY.items() if name != key})
    assert not any(tmp_path.iterdir())


def test_a_summary_with_a_key_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown.*losss"):
        write_summary(tmp_path, SUMMARY | {"losss": 1.0})


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    write_summary(tmp_path, SUMMARY | {"train_loss": math.nan, "validation_perplexity": math.inf})
    read = json.loads((tmp_path / SUMMARY_FILE).read_text())
    assert read["train_loss"] is None
    assert read["validation_perplexity"] is None


def test_a_summary_that_cannot_be_replaced_is_left_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_summary(tmp_path, SUMMARY)

    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        write_summary(tmp_path, SUMMARY | {"steps": 7})
    assert json.loads((tmp_path / SUMMARY_FILE).read_text()) == SUMMARY
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY_FILE]


def test_the_environment_names_versions_and_what_is_not_installed() -> None:
    found = environment()
    assert found["versions"]["numpy"] == np.__version__
    assert set(found) == {"python", "platform", "cpu_count", "versions"}
    json.dumps(found)


def test_the_curve_shows_both_losses_and_the_entropy(tmp_path: Path) -> None:
    write_summary(tmp_path, SUMMARY)
    write_metrics(tmp_path, realistic_records())
    picture = matplotlib.image.imread(loss_curve(tmp_path))[..., :3]
    assert picture.shape[:2] == (648, 1152)
    for colour in ("3f8cf4", "ee6a3b", "8b949e"):  # training, validation, entropy
        wanted = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        assert np.sum(np.all(np.abs(picture - wanted) < 0.02, axis=-1)) > 50, colour
    assert sorted(path.name for path in tmp_path.iterdir()) == [CURVE_FILE, "metrics.jsonl", SUMMARY_FILE]


def test_below_the_curve_of_a_mixture_every_layer_has_the_load_of_its_experts(tmp_path: Path) -> None:
    """Layer 0 sends everything to one of three experts; layer 1 to all alike."""
    load = [[0.0, 1.0, 0.0], [1 / 3] * 3]
    write_metrics(tmp_path, [*realistic_records(), {"step": 600, "train_loss": 4.0, "router/load": load}])
    picture = matplotlib.image.imread(loss_curve(tmp_path))[..., :3]
    below = picture[600:]
    blue, grey, red = (np.array(colormaps["coolwarm"](value)[:3]) for value in (0.0, 0.5, 1.0))
    cells = [int(np.sum(np.all(np.abs(below - colour) < 0.02, axis=-1))) for colour in (blue, grey, red)]
    assert np.array(cells) / min(cells) == pytest.approx([2, 3, 1], rel=0.1)
    assert min(cells) > 10_000


@pytest.mark.parametrize("content", ["[]", "{", '{"unigram_entropy": "high"}', "[" * 10_000])
def test_a_curve_beside_a_damaged_summary_is_drawn(content: str, tmp_path: Path) -> None:
    (tmp_path / SUMMARY_FILE).write_text(content)
    assert loss_curve(tmp_path).stat().st_size > 5000


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("12", "no step with numbers"),
        ('{"train_loss": 1.0}', "no step with numbers"),
        ('{"step": "3"}', "no step with numbers"),
        ('{"step": true}', "no step with numbers"),
        ('{"step": 3, "train_loss": "low"}', "no step with numbers"),
        ('{"step": 3, "train_loss": 1e400}', "no step with numbers"),
        ('{"step": 3, "router/load": [[1, 2], [3]]}', "no step with numbers"),
        ('{"step": 3, "router/load": [[1, [2]]]}', "no step with numbers"),
        ('{"step": 3, "step": 4}', "no JSON"),
        ('{"step": 3', "no JSON"),
        ("[" * 10_000, "no JSON"),
        ("\xff", "no JSON"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_refused_by_number(line: str, told: str, tmp_path: Path) -> None:
    good = '{"step": 1, "train_loss": null}\n'
    (tmp_path / METRICS_FILE).write_text(f"{good}{line}\n{good}", encoding="latin-1")
    with pytest.raises(InputError, match=rf"metrics\.jsonl, line 2: {told}; take the line out"):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).write_text(f'{good}{{"step": 2, "tr')  # killed while it wrote
    assert read_metrics(tmp_path) == [{"step": 1, "train_loss": None}]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "train_loss": 10.8}],
        [{"step": 1, "train_loss": None}, {"step": 2, "train_loss": None}],
        [{"step": 1, "train_loss": 9.0}, {"step": 2, "train_loss": None}, {"step": 3, "train_loss": 8.0}],
        [{"step": 5, "validation_loss": 4.0}],
        [{"step": 5, "router/load": 0.5}, {"step": 6, "router/load": [[None, 1.0]]}],
    ],
)
def test_a_curve_of_few_or_broken_numbers_is_drawn(records: list[dict[str, Any]], tmp_path: Path) -> None:
    write_metrics(tmp_path, records)
    assert loss_curve(tmp_path).stat().st_size > 5000
