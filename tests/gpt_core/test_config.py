import json
import math
from pathlib import Path
from typing import Any

import pytest

from gpt_core.config import ModelConfig, config_directory, differing_fields, preset_names
from gpt_core.errors import InputError
from gpt_core.parameters import parameter_count
from gpt_core.storage.checkpoint_config import read_checkpoint_config, write_checkpoint_config

COUNT = "a whole number of at least 1"
POSITIVE = "a positive number"
BAD_FIELDS = [
    *[
        (name, value, COUNT)
        for name in (
            "vocab_size",
            "context_length",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "embed_dim",
            "head_dim",
            "mlp_dim",
            "sliding_window",
            "pad_vocab_size_multiple",
        )
        for value in (0, -3, 2.0, "8", True, 10**12)
    ],
    *[
        (name, value, POSITIVE)
        for name in ("rope_theta", "attention_scale", "norm_eps", "init_std")
        for value in (0, -1.0, math.inf, math.nan, "1", True)
    ],
    *[("dropout", value, "[0, 1)") for value in (1, -0.1, 1.5, math.nan, "0", False)],
    *[("position", value, "learned, rope") for value in ("alibi", "RoPE", None, 1)],
    *[(name, value, "true or false") for name in ("bias", "tied_embeddings", "qkv_bias") for value in (1, "yes")],
    ("vocab_size", None, COUNT),
    ("bias", None, "true or false"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_FIELDS)
def test_a_bad_value_is_refused_with_field_value_and_range(field: str, value: object, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} = {value!r} ")
    assert allowed in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n_heads": 12, "n_kv_heads": 5}, ["n_heads = 12", "n_kv_heads = 5", "divisor"]),
        ({"n_heads": 4, "n_kv_heads": 8, "embed_dim": 64}, ["n_heads = 4", "n_kv_heads = 8"]),
        ({"n_heads": 5, "embed_dim": 64}, ["embed_dim = 64", "n_heads = 5", "head_dim"]),
        ({"n_heads": 2, "embed_dim": 6, "position": "rope"}, ["head_dim = 3", "even", "rope"]),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused_with_both(fields: dict[str, object], named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(**fields)
    assert all(part in str(caught.value) for part in named)


def test_a_model_of_more_parameters_than_any_is_refused_without_walking_through_it() -> None:
    # 10^4 layers of 4 x 2^36 in attention and 6 x 2^36 in the MLP.
    with pytest.raises(InputError, match=r"the model would have 6\.9e\+15 parameters, more than 1e\+15"):
        ModelConfig(n_layers=10_000, embed_dim=2**18, n_heads=2**11, mlp_dim=2**19 + 2**18, vocab_size=1)
    for too_many in (10**9, 10**5000):
        with pytest.raises(InputError, match="n_layers"):
            ModelConfig(n_layers=too_many)
    with pytest.raises(InputError, match=r"rope_theta = 1000.*401 characters.* must be a positive number"):
        ModelConfig(rope_theta=10**400)


@pytest.mark.parametrize(
    "fields",
    [
        {"context_length": 10_000_000, "position": "rope"},
        {"vocab_size": 1_000_000, "pad_vocab_size_multiple": 8192},
        {"n_layers": 1000},
        {"n_layers": 200, "embed_dim": 65_536, "n_heads": 512, "mlp_dim": 4 * 65_536},  # 10^13 parameters
        {"sliding_window": 2**20},
    ],
)
def test_models_larger_than_any_that_was_trained_are_allowed(fields: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(ModelConfig(**fields).to_dict()) == ModelConfig(**fields)


def test_the_smallest_allowed_values_are_allowed() -> None:
    config = ModelConfig(
        vocab_size=1, context_length=1, n_layers=1, n_heads=1, embed_dim=1, sliding_window=1, dropout=0, norm_eps=1e-30
    )
    assert (config.head_dim, config.mlp_dim, config.padded_vocab_size) == (1, 4, 1)


def test_fields_that_follow_others_are_filled_in() -> None:
    config = ModelConfig(n_heads=8, embed_dim=128, bias=False)
    assert (config.n_kv_heads, config.head_dim, config.mlp_dim, config.qkv_bias) == (8, 16, 512, False)
    assert config.attention_scale == 0.25
    given = ModelConfig(n_heads=8, embed_dim=128, n_kv_heads=2, head_dim=6, mlp_dim=7, attention_scale=3, bias=False)
    assert (given.n_kv_heads, given.head_dim, given.mlp_dim, given.attention_scale) == (2, 6, 7, 3.0)
    assert ModelConfig(bias=False, qkv_bias=True).qkv_bias is True


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ModelConfig().n_layers = 3


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(50257, 1, 50257), (50257, 64, 50304), (128, 64, 128)])
def test_the_vocabulary_is_padded_up_to_the_multiple(vocab: int, multiple: int, rows: int) -> None:
    assert ModelConfig(vocab_size=vocab, pad_vocab_size_multiple=multiple).padded_vocab_size == rows


@pytest.mark.parametrize("preset", preset_names())
def test_a_config_survives_a_dictionary_and_a_checkpoint(preset: str, tmp_path: Path) -> None:
    config = ModelConfig.from_yaml(preset)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    write_checkpoint_config(tmp_path, config)
    assert read_checkpoint_config(tmp_path) == config


def test_differing_fields_are_named_with_both_values() -> None:
    ours, theirs = ModelConfig(n_heads=12, bias=True), ModelConfig(n_heads=12, bias=True, norm_eps=1e-6)
    assert differing_fields(ours, theirs) == "norm_eps 1e-05 against 1e-06"
    assert differing_fields(ours, ours) == ""


# ------------------------------------------------------------------------------------------------------------ presets

GPT2_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
# The efficiency rows from the published 124M: RoPE saves the table of 1024 x 768 positions; 4 of 12 kv heads save
# 512 of 768 columns, with their biases, of the key and value projections of 12 layers; a window saves no parameter.
STANDARD = 124_439_808
ROPE = STANDARD - 1024 * 768
ROPE_GQA = ROPE - 12 * 2 * 512 * (768 + 1)
ROWS = {"standard": STANDARD, "rope": ROPE, "rope-gqa": ROPE_GQA, "rope-gqa-window": ROPE_GQA}


@pytest.mark.parametrize(("preset", "count"), (GPT2_COUNTS | ROWS).items())
def test_a_preset_has_its_published_number_of_parameters(preset: str, count: int) -> None:
    assert parameter_count(ModelConfig.from_yaml(preset)) == count


def test_models_are_the_published_ones_and_the_four_rows() -> None:
    models = {path.stem for path in (config_directory() / "model").glob("*.yaml")}
    assert models == (set(GPT2_COUNTS) | set(ROWS)) - {"gpt2-xl"}  # that one is a training run's as well
    assert models | {"gpt2-xl"} < set(preset_names())
    assert len(preset_names()) == len(set(preset_names())), "a name must mean one preset"
    variants = {name: ModelConfig.from_yaml(name).variant for name in ROWS}
    assert variants == {
        "standard": "learned-mha-full",
        "rope": "rope-mha-full",
        "rope-gqa": "rope-gqa-full",
        "rope-gqa-window": "rope-gqa-window",
    }
    assert ModelConfig(n_kv_heads=1, sliding_window=3).variant == "learned-mqa-window"


# --------------------------------------------------------------------------------------------------------------- YAML


def test_yaml_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  n_layers: 3\n  sliding_window: null\n  norm_eps: 1.0e-6\ntrain: {steps: 5}\n")
    expected = ModelConfig(n_layers=3, norm_eps=1e-6)
    assert ModelConfig.from_yaml(path) == expected
    assert ModelConfig.from_yaml(str(path)) == expected


def test_an_empty_model_section_is_the_default_only_when_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("model: {}\n")
    assert ModelConfig.from_yaml(path) == ModelConfig()
    path.write_text("model:\n")
    with pytest.raises(InputError, match=r"mine\.yml: model: is empty"):
        ModelConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("train: {}\n", "'model'"),
        ("model: [1, 2]\n", "expected a mapping"),
        ("model: {n_layer: 3}\n", "unknown model field 'n_layer'"),
        ("model: {n_layers: 3, 7: 1}\n", "unknown model field '7'"),
        ("model: {n_layers: 0}\n", "n_layers = 0"),
        ("model: {n_layers: [\n", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("- model\n", "top level"),
        ("", "top level"),
    ],
)
def test_broken_yaml_is_refused_with_its_path(content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        ModelConfig.from_yaml(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_yaml_that_is_no_text_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"model: \xff\xfe\x00")
    with pytest.raises(InputError, match=r"mine\.yaml: cannot be read"):
        ModelConfig.from_yaml(path)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown preset 'gpt3'") as caught:
        ModelConfig.from_yaml("gpt3")
    assert all(name in str(caught.value) for name in GPT2_COUNTS)


def test_a_missing_yaml_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such file"):
        ModelConfig.from_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("value", [None, 3, "gpt2", [("n_layers", 3)]])
def test_a_dictionary_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"here: expected a mapping .* found "):
        ModelConfig.from_dict(value, source="here")


def test_all_unknown_fields_are_named_beside_the_known() -> None:
    with pytest.raises(InputError, match=r"here: unknown model field 'a', 'b'; known are: vocab_size, ") as caught:
        ModelConfig.from_dict({"a": 1, "n_layers": 2, "b": 3}, source="here")
    assert "sliding_window" in str(caught.value)


# -------------------------------------------------------------------------------------------------- config.json

GOOD = {"model_type": "twingpt", "format_version": 1, "model": {"n_layers": 2}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (GOOD | {"model_type": "gpt2"}, "'gpt2'"),
        ({"model": {}}, "model_type is None"),
        ([1], "model_type is None"),
        (GOOD | {"format_version": 2}, "format_version is 2"),
        (GOOD | {"format_version": True}, "format_version is True"),
        (GOOD | {"format_version": 1.0}, "format_version is 1.0"),
        (GOOD | {"model": {"n_layers": 10**12}}, "n_layers = 1000000000000"),
        (GOOD | {"model": {"norm_eps": math.nan}}, "norm_eps = nan"),
        (GOOD | {"extra": 1}, "unknown field 'extra'"),
        (GOOD | {"model": {"depth": 2}}, "unknown model field 'depth'"),
        (GOOD | {"model": {"n_layers": -1}}, "n_layers = -1"),
        ({"model_type": "twingpt", "format_version": 1}, "expected a mapping"),
    ],
)
def test_a_foreign_or_bad_checkpoint_config_is_refused_with_its_path(
    content: object, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_checkpoint_config(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xff", b'{"model": {}, "model": {}}', b"[" * 10_000])
def test_a_damaged_checkpoint_config_is_refused_with_its_path(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        read_checkpoint_config(tmp_path)


def test_a_missing_checkpoint_config_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: missing"):
        read_checkpoint_config(tmp_path)


def test_a_good_checkpoint_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert read_checkpoint_config(tmp_path) == ModelConfig(n_layers=2)
