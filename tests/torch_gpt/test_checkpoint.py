import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy_gpt
import pytest
import torch
from numpy_gpt import CONFIGS, random_tokens
from safetensors.torch import load_file, save_file

from gpt_core.errors import InputError
from gpt_core.precision import Precision
from gpt_core.storage.checkpoint_config import write_checkpoint_config
from gpt_core.text.finding import tokenizer_of
from gpt_core.text.gpt2 import gpt2_tokenizer
from torch_gpt.checkpoint import load, save
from torch_gpt.model import GPT, initialiser

CONFIG = CONFIGS["rope-gqa-window"]


def fresh(config: numpy_gpt.ModelConfig = CONFIG, precision: Precision = Precision()) -> GPT:
    return GPT(config, initialiser(3, precision), precision=precision).eval()


@pytest.mark.parametrize(
    "precision",
    [Precision(), Precision.of("float64"), Precision(param_dtype="bfloat16")],
    ids=["float32", "float64", "bfloat16"],
)
@pytest.mark.parametrize("name", ["rope-gqa-window", "learned-mha-full", "untied", "no-bias"])
def test_a_model_survives_a_checkpoint_bit_for_bit(name: str, precision: Precision, tmp_path: Path) -> None:
    model = fresh(CONFIGS[name], precision)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", precision=precision)
    assert loaded.config == model.config
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key
    tokens = torch.tensor(random_tokens(model.config))
    # Not bit for bit: the order of PyTorch's sums depends on where in memory a weight begins.
    assert torch.allclose(loaded(tokens), model(tokens), rtol=0, atol=1e-6)


def test_a_loaded_model_can_be_trained_and_stands_in_evaluation(tmp_path: Path) -> None:
    save(fresh(), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert not loaded.training
    loaded(torch.tensor(random_tokens(CONFIG))).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_weights_are_cast_to_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = fresh()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", precision=Precision.of("float64")).state_dict()
    assert all(torch.equal(loaded[key], tensor.double()) for key, tensor in model.state_dict().items())


def test_the_tokenizer_lies_beside_the_weights(tmp_path: Path) -> None:
    save(fresh(), tmp_path / "with", gpt2_tokenizer())
    save(fresh(), tmp_path / "without")
    assert tokenizer_of(tmp_path / "with") is not None
    assert tokenizer_of(tmp_path / "without") is None


def test_a_checkpoint_is_not_overwritten_without_force(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(fresh(), path)
    before = (path / "model.safetensors").read_bytes()
    other = fresh(replace(CONFIG, n_layers=1))
    with pytest.raises(InputError, match=f"{path}: exists already"):
        save(other, path)
    assert (path / "model.safetensors").read_bytes() == before
    save(other, path, force=True)
    assert load(path).config.n_layers == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_layers": 1}, r"blocks\.1\."),
        ({"n_layers": 3}, r"blocks\.2\."),
        ({"mlp_dim": 50}, r"mlp\.up"),
        ({"tied_embeddings": False}, r"head\.weight"),
        ({"qkv_bias": False}, r"query\.bias"),
        ({"position": "learned"}, "position_embedding"),
        ({"n_kv_heads": 3}, r"key\.weight"),
        ({"vocab_size": 40}, "token_embedding"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(
    change: dict[str, object], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    save(fresh(), path)
    write_checkpoint_config(path, replace(CONFIG, **change))
    with pytest.raises(InputError, match=rf"{path}: weights and config do not fit.*{told}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_surplus_weight_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(fresh(), path)
    state = load_file(path / "model.safetensors")
    save_file(state | {"surplus": torch.ones(2)}, path / "model.safetensors")
    with pytest.raises(InputError, match=rf"{path}: .*surplus"):
        load(path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_refused_with_the_file(file: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(fresh(), path)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if damage == "truncated":
        (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=str(path / file)):
        load(path)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path / "absent")):
        load(tmp_path / "absent")


def test_config_json_is_plain(tmp_path: Path) -> None:
    save(fresh(), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["model_type"] == "twingpt"
    assert content["model"]["sliding_window"] == numpy_gpt.WINDOW


def test_a_loaded_model_does_not_need_its_file_any_more(tmp_path: Path) -> None:
    model = fresh()
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
