import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from flax import nnx
from numpy_gpt import CONFIGS, random_tokens, random_weights

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter
from gpt_core.precision import Precision
from gpt_core.storage.checkpoint_config import write_checkpoint_config
from gpt_core.text.finding import tokenizer_of
from gpt_core.text.gpt2 import gpt2_tokenizer
from jax_gpt.checkpoint import load, save
from jax_gpt.model import GPT

CONFIG = CONFIGS["rope-gqa-window"]


def build(config: ModelConfig = CONFIG, precision: Precision = Precision(), scan_layers: bool = True) -> GPT:
    weights = random_weights(config)

    def create(parameter: Parameter) -> jax.Array:
        array = weights[parameter.name] if parameter.layer is None else weights[parameter.name][parameter.layer]
        return jnp.array(array.astype(precision.param_dtype))

    return GPT(config, create, precision=precision, scan_layers=scan_layers)


def state_of(model: GPT) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def assert_same_bits(model: GPT, expected: GPT) -> None:
    found, wanted = state_of(model), state_of(expected)
    assert set(found) == set(wanted)
    for key, array in found.items():
        assert (array.dtype, array.shape) == (wanted[key].dtype, wanted[key].shape), key
        assert array.tobytes() == wanted[key].tobytes(), key


@pytest.mark.parametrize(("saved", "loaded"), [*product([True, False], repeat=2)])
@pytest.mark.parametrize(
    "precision",
    [Precision(), Precision.of("float64"), Precision(param_dtype="bfloat16")],
    ids=["float32", "float64", "bfloat16"],
)
@pytest.mark.parametrize("name", ["rope-gqa-window", "untied", "no-bias"])
def test_a_model_survives_a_checkpoint_bit_for_bit_stacked_or_unrolled(
    name: str, precision: Precision, saved: bool, loaded: bool, tmp_path: Path, x64: None
) -> None:
    save(build(CONFIGS[name], precision, scan_layers=saved), tmp_path / "model")
    found = load(tmp_path / "model", precision=precision, scan_layers=loaded)
    assert found.config == CONFIGS[name]
    assert_same_bits(found, build(CONFIGS[name], precision, scan_layers=loaded))


def test_a_loaded_model_gives_the_same_logits(tmp_path: Path) -> None:
    model = build()
    tokens = jnp.array(random_tokens(CONFIG), "int32")
    save(model, tmp_path / "model")
    call = nnx.jit(lambda model, tokens: model(tokens))
    assert np.array_equal(call(load(tmp_path / "model"), tokens), call(model, tokens))


def test_weights_are_cast_to_the_dtype_that_is_asked_for(tmp_path: Path, x64: None) -> None:
    model = build()
    save(model, tmp_path / "model")
    loaded = state_of(load(tmp_path / "model", precision=Precision.of("float64")))
    for key, array in state_of(model).items():
        assert loaded[key].dtype == np.float64
        assert np.array_equal(loaded[key], array.astype(np.float64))


def test_the_tokenizer_lies_beside_the_weights(tmp_path: Path) -> None:
    save(build(), tmp_path / "with", gpt2_tokenizer())
    save(build(), tmp_path / "without")
    assert tokenizer_of(tmp_path / "with") is not None
    assert tokenizer_of(tmp_path / "without") is None


def test_a_checkpoint_is_not_overwritten_without_force(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(build(), path)
    other = build(replace(CONFIG, n_layers=1))
    with pytest.raises(InputError, match=f"{path}: exists already"):
        save(other, path)
    assert_same_bits(load(path), build())
    save(other, path, force=True)
    assert_same_bits(load(path), other)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_layers": 1}, r"blocks\."),
        ({"n_layers": 3}, r"blocks\."),
        ({"mlp_dim": 50}, r"mlp\.up"),
        ({"tied_embeddings": False}, r"head\.kernel"),
        ({"qkv_bias": False}, r"(key|query|value)\.bias"),
        ({"position": "learned"}, "position_embedding"),
        ({"n_kv_heads": 3}, r"key\.kernel"),
        ({"vocab_size": 40}, "token_embedding"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(
    change: dict[str, object], told: str, scan_layers: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    save(build(scan_layers=scan_layers), path)
    write_checkpoint_config(path, replace(CONFIG, **change))
    for loaded in (True, False):
        with pytest.raises(InputError, match=f"{path}: .*{told}"):
            load(path, scan_layers=loaded)


@pytest.mark.parametrize("file", ["params/_METADATA", "params/final_norm.bias/.zarray", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_refused_with_its_path(file: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(build(), path)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if damage == "truncated":
        (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=str(path)):
        load(path)


@pytest.mark.parametrize("key", ["blocks.mlp.up.kernel", "token_embedding"])
def test_a_missing_chunk_is_refused_with_its_array(key: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(build(), path)
    max(file for file in (path / "params" / key).iterdir() if file.name[0] != ".").unlink()
    with pytest.raises(InputError, match=f"{path}.*{key} is damaged or missing"):
        load(path)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path / "absent")):
        load(tmp_path / "absent")


def test_a_whole_state_that_orbax_saved_is_a_checkpoint(tmp_path: Path) -> None:
    """With `value` below every leaf, as an `nnx.State` is written."""
    import orbax.checkpoint as ocp

    model = build()
    (tmp_path / "model").mkdir()
    write_checkpoint_config(tmp_path / "model", model.config)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model" / "params", nnx.state(model, nnx.Param))
    assert_same_bits(load(tmp_path / "model"), model)


def test_config_json_is_plain(tmp_path: Path) -> None:
    save(build(), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["model_type"] == "twingpt"
    assert content["model"]["sliding_window"] == numpy_gpt.WINDOW


def test_a_loaded_model_does_not_need_its_files_any_more(tmp_path: Path) -> None:
    """The arrays are memory-mapped while they are read: what the model holds must be copies."""
    save(build(), tmp_path / "model")
    loaded = load(tmp_path / "model")
    for file in (tmp_path / "model" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\xff" * file.stat().st_size)
    shutil.rmtree(tmp_path / "model")
    assert_same_bits(loaded, build())
