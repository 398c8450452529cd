"""--force replaces checkpoints and exports, and nothing else."""

from pathlib import Path

import pytest

from gpt_core.checkpoints.replaceable import kept_checkpoint


def made(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if name.endswith("/") else path.touch()
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "model.safetensors"],
        ["config.json", "params/", "vocab.json", "merges.txt"],
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"],
        ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
        ["model.safetensors", "chat_template.jinja", "modeling_twingpt.py", "configuration_twingpt.py"],
        ["config.json", "params/_METADATA", "params/head.kernel/.zarray", "params/d/0123", "params/ocdbt.process_0/"],
        ["params/"],  # damaged, but nothing else
        [],
    ],
)
def test_a_checkpoint_or_an_export_may_be_replaced(names: list[str], tmp_path: Path) -> None:
    assert kept_checkpoint(made(tmp_path / "here", *names)) == ""


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["config.json", "model.safetensors", "thesis.tex"], "holds thesis.tex, which is no part of a checkpoint"),
        (["config.json", ".git/"], "holds .git, which"),
        (["hf/config.json"], "holds hf, which"),
        (["config.yaml", "config.json"], "is a training run"),
        (["checkpoints/4/model.safetensors"], "is a training run"),
        (["README.md", "params/night/sweep.txt"], "holds params/night, which"),
        (["config.json", "params/thesis.tex"], "holds params/thesis.tex, which"),
        (["config.json", "model.safetensors", "README.md/chapter.tex"], "holds README.md, which"),
        (["README.md"], "holds no weights"),
        (["optimizer.safetensors", "model.safetensors"], "holds optimizer.safetensors, which"),
    ],
)
def test_anything_else_is_kept(names: list[str], why: str, tmp_path: Path) -> None:
    assert kept_checkpoint(made(tmp_path / "here", *names)).startswith(why)


def test_a_checkpoint_of_a_run_is_kept_under_any_name(tmp_path: Path) -> None:
    made(tmp_path / "run", "config.yaml", "checkpoints/4/model.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "checkpoints" / "4")
    for place in (tmp_path / "link", tmp_path / "run" / "checkpoints" / "4"):
        assert kept_checkpoint(place) == "is a checkpoint of the training run run"
