import json
import math
import re
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gpt_core.config import ModelConfig, config_directory, differing_fields, preset_names
from gpt_core.errors import InputError
from gpt_core.parameters import parameter_count
from gpt_core.rotary import RopeScaling, Rotation
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
        for name in (
            "rope_theta",
            "attention_scale",
            "norm_eps",
            "init_std",
            "rope_local_theta",
            "attention_softcap",
            "logit_softcap",
            "embedding_scale",
            "residual_scale",
            "logit_scale",
        )
        for value in (0, -1.0, math.inf, -math.inf, math.nan, "1", True, [1.0])
    ],
    *[("dropout", value, "[0, 1)") for value in (1, -0.1, 1.5, math.nan, "0", False)],
    *[("position", value, "learned, rope") for value in ("alibi", "RoPE", None, 1)],
    *[("rope_fraction", value, "(0, 1]") for value in (0, -0.5, 1.01, math.nan, math.inf, "1", True, None)],
    *[(name, None, POSITIVE) for name in ("rope_theta", "embedding_scale", "residual_scale", "logit_scale")],
    *[("norm", value, "layer, rms") for value in ("LayerNorm", None, True)],
    *[("norm_placement", value, "pre, post, sandwich") for value in ("both", None, 1)],
    *[("activation", value, "gelu_tanh, gelu, silu") for value in ("relu", "gelu_new", None, ["silu"])],
    *[("qk_norm", value, "head, whole") for value in (True, False, "heads", "", ["head"])],
    *[
        ("attention_pattern", value, "cycle of the letters L (local), G (global) and N (global without rotation)")
        for value in ("", "LX", "lg", "L G", 3, True, ["L", "G"], b"LG")
    ],
    *[
        (name, value, "true or false")
        for name in (
            "bias",
            "tied_embeddings",
            "qkv_bias",
            "mlp_bias",
            "norm_unit_offset",
            "parallel_residual",
            "gated_mlp",
        )
        for value in (1, "yes")
    ],
    ("vocab_size", None, COUNT),
    ("bias", None, "true or false"),
]


LINEAR = {"kind": "linear", "factor": 2.0}
ROPE_HEADS = {"n_heads": 4, "head_dim": 10, "position": "rope"}


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_FIELDS)
def test_a_bad_value_is_refused_with_field_value_and_range(field: str, value: object, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} = {value!r} ")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n_heads": 12, "n_kv_heads": 5}, ["n_heads = 12", "n_kv_heads = 5", "divisor"]),
        ({"n_heads": 4, "n_kv_heads": 8, "embed_dim": 64}, ["n_heads = 4", "n_kv_heads = 8"]),
        ({"n_heads": 5, "embed_dim": 64}, ["embed_dim = 64", "n_heads = 5", "head_dim"]),
        ({"n_heads": 2, "embed_dim": 6, "position": "rope"}, ["head_dim = 3", "even", "rope"]),
        *[
            (ROPE_HEADS | {"rope_fraction": fraction}, [f"rope_fraction = {fraction}", "head_dim = 10", "even"])
            for fraction in (0.3, 0.55, 0.05)  # of ten dimensions: 3, 5 and none
        ],
        ({"attention_pattern": "LG" * 5001}, ["must be a cycle of the letters"]),
        ({"attention_pattern": "LG"}, ["'LG' has local layers (L)", "give sliding_window"]),
        ({"attention_pattern": "G", "sliding_window": 4}, ["'G' has no local layer (L)", "sliding_window = 4"]),
        (ROPE_HEADS | {"attention_pattern": "GN", "sliding_window": 4}, ["'GN' has no local layer", "sliding_window"]),
        ({"attention_pattern": "GN"}, ["'GN': without rotation (N)", "position = 'rope'"]),
        ({"rope_fraction": 0.5}, ["rope_fraction = 0.5 needs position = 'rope'"]),
        ({"rope_scaling": LINEAR}, ["rope_scaling = ", "needs position = 'rope'"]),
        ({"rope_local_theta": 10.0}, ["rope_local_theta = 10.0 needs position = 'rope'"]),
        *[
            (ROPE_HEADS | {"rope_local_theta": 10.0} | pattern, ["rope_local_theta needs", "(L and G)"])
            for pattern in (
                {},
                {"sliding_window": 4},
                {"attention_pattern": "GN"},
                {"attention_pattern": "LN", "sliding_window": 4},
            )
        ],
        *[
            (ROPE_HEADS | {"rope_scaling": LINEAR, "sliding_window": 4} | pattern, ["rope_scaling scales no layer"])
            for pattern in ({}, {"attention_pattern": "LN"})
        ],
        (ROPE_HEADS | {"rope_scaling": LINEAR | {"local_layers": True}, "attention_pattern": "N"}, ["scales no layer"]),
        *[
            ({"parallel_residual": True, "norm_placement": placement}, ["parallel_residual", repr(placement), "'pre'"])
            for placement in ("post", "sandwich")
        ],
    ],
)
def test_values_that_do_not_fit_each_other_are_refused_with_both(fields: dict[str, object], named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(**fields)
    assert all(part in str(caught.value) for part in named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("linear", "rope_scaling: expected a mapping of rope_scaling fields, found str"),
        (True, "rope_scaling: expected a mapping of rope_scaling fields, found bool"),
        ({"factor": 2.0}, "rope_scaling needs kind and factor"),
        (LINEAR | {"type": "linear"}, "rope_scaling: unknown rope_scaling field 'type'; known are: kind, factor, "),
        (LINEAR | {"factor": "2"}, "rope_scaling: factor = '2' must be a number of at least 1"),
        (LINEAR | {"beta_fast": 8.0}, "rope_scaling: beta_fast = 8.0 is not read by kind = 'linear'"),
        (LINEAR | {"kind": "llama3"}, "rope_scaling: original_context = None must be a whole number of at least 1"),
    ],
)
def test_a_bad_section_within_is_refused_with_its_name(value: object, told: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(position="rope", rope_scaling=value)
    assert str(caught.value).startswith(told)
    with pytest.raises(InputError) as caught:
        ModelConfig.from_dict({"position": "rope", "rope_scaling": value}, source="here")
    assert str(caught.value).startswith(f"here: {told}")
    assert "\n" not in str(caught.value)


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


def test_every_field_beyond_gpt2_is_off_unless_given() -> None:
    off = {
        "norm": "layer",
        "norm_unit_offset": False,
        "norm_placement": "pre",
        "parallel_residual": False,
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "qk_norm": None,
        "rope_fraction": 1.0,
        "rope_scaling": None,
        "rope_local_theta": None,
        "attention_pattern": None,
        "attention_softcap": None,
        "logit_softcap": None,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "logit_scale": 1.0,
    }
    for position, kv_heads, window in product(("learned", "rope"), (12, 4, 1), (None, 256)):
        config = ModelConfig(position=position, n_kv_heads=kv_heads, sliding_window=window)
        found = config.to_dict()
        assert {name: found[name] for name in off} == off
        assert found["mlp_bias"] is True
        assert config.layer_kinds == ("G" if window is None else "L") * 12
        (view,) = {config.view(kind) for kind in config.layer_kinds}
        assert view == (window, Rotation(64, 10_000.0) if position == "rope" else None)


def test_the_bias_of_the_mlp_follows_that_of_all() -> None:
    assert ModelConfig(bias=False).mlp_bias is False
    assert ModelConfig(bias=False, mlp_bias=True).mlp_bias is True
    assert ModelConfig(mlp_bias=False).bias is True


@pytest.mark.parametrize(
    ("given", "n_layers", "kept"),
    [
        ("LLGLLG", 6, "LLG"),
        ("LGLGL", 5, "LG"),
        ("LLG", 5, "LLG"),
        ("GGLLL", 5, "GGLLL"),
        ("LGN", 3, "LGN"),
        ("L", 4, None),
        ("LLLL", 4, None),
        # A cycle that ends within another one is not that one where there are more layers.
        ("LGL", 3, "LG"),
        ("LGL", 6, "LGL"),
        ("LLGL", 8, "LLGL"),
        ("LLGL", 4, "LLG"),
    ],
)
def test_equal_patterns_become_the_shortest_of_them(given: str, n_layers: int, kept: str | None) -> None:
    config = ModelConfig(n_layers=n_layers, position="rope", sliding_window=8, attention_pattern=given)
    assert config.attention_pattern == kept
    assert config.layer_kinds == "".join(given[layer % len(given)] for layer in range(n_layers))
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.variant == f"rope-mha-{kept or 'window'}"


def test_a_pattern_of_global_layers_alone_is_none() -> None:
    assert ModelConfig(attention_pattern="GG") == ModelConfig()
    assert ModelConfig(position="rope", attention_pattern="NN").attention_pattern == "N"


def test_the_longest_pattern_is_read_at_once() -> None:
    pattern = "G" * 9_999 + "N"
    assert ModelConfig(n_layers=10_000, position="rope", attention_pattern=pattern).attention_pattern == pattern


def test_kinds_of_layers_differ_in_window_and_rotation() -> None:
    config = ModelConfig(
        n_layers=3,
        position="rope",
        head_dim=10,
        rope_fraction=0.4,
        rope_theta=1e6,
        rope_local_theta=1e4,
        rope_scaling=LINEAR,
        sliding_window=8,
        attention_pattern="LGN",
    )
    scaling = RopeScaling("linear", 2.0)
    assert config.view("L") == (8, Rotation(4, 1e4, None))
    assert config.view("G") == (None, Rotation(4, 1e6, scaling))
    assert config.view("N") == (None, None)
    everywhere = replace(config, rope_local_theta=1e6, rope_scaling=LINEAR | {"local_layers": True})
    assert everywhere.rope_local_theta is None, "the same as that of the global layers"
    assert everywhere.view("L") == (8, Rotation(4, 1e6, replace(scaling, local_layers=True)))


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "linear", "factor": 4, "local_layers": True},
        {"kind": "llama3", "factor": 8, "original_context": 8192, "low_freq_factor": 1, "high_freq_factor": 5},
        {"kind": "yarn", "factor": 4, "original_context": 4096, "truncate": False},
        {"kind": "yarn", "factor": 4, "original_context": 4096, "attention_factor": 1, "beta_fast": 64},
    ],
)
def test_a_config_with_every_field_survives_a_dictionary_and_a_checkpoint(
    scaling: dict[str, Any], tmp_path: Path
) -> None:
    config = ModelConfig(
        norm="rms",
        norm_unit_offset=True,
        norm_placement="sandwich",
        activation="silu",
        gated_mlp=True,
        mlp_bias=False,
        qk_norm="whole",
        position="rope",
        rope_fraction=0.5,
        rope_local_theta=100,
        rope_scaling=scaling,
        sliding_window=8,
        attention_pattern="LLG",
        attention_softcap=50,
        logit_softcap=30,
        embedding_scale=27.7,
        residual_scale=1,
        logit_scale=0.125,
    )
    assert isinstance(config.rope_scaling, RopeScaling)
    assert config.rope_scaling == RopeScaling(**scaling)
    written = json.loads(json.dumps(config.to_dict()))
    assert written["rope_scaling"] == written["rope_scaling"] | scaling
    assert ModelConfig.from_dict(written) == config == replace(config)
    assert hash(ModelConfig.from_dict(written)) == hash(config)
    write_checkpoint_config(tmp_path, config)
    assert read_checkpoint_config(tmp_path) == config
    assert "rope_scaling" in differing_fields(config, replace(config, rope_scaling=None))


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
# As published, a tied head counted once.
FAMILY_COUNTS = {
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "gemma-3-270m": 268_098_176,
    "olmo2-1b": 1_484_916_736,
    "smollm2-135m": 134_515_008,
    "pythia-160m": 162_322_944,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}
COUNTS = GPT2_COUNTS | ROWS | FAMILY_COUNTS


@pytest.mark.parametrize(("preset", "count"), COUNTS.items())
def test_a_preset_has_its_published_number_of_parameters(preset: str, count: int) -> None:
    assert parameter_count(ModelConfig.from_yaml(preset)) == count


def test_models_are_the_published_ones_and_the_four_rows() -> None:
    models = {path.stem for path in (config_directory() / "model").glob("*.yaml")}
    assert models == set(COUNTS) - {"gpt2-xl"}  # that one is a training run's as well
    assert models | {"gpt2-xl"} < set(preset_names())
    assert len(preset_names()) == len(set(preset_names())), "a name must mean one preset"
    variants = {name: ModelConfig.from_yaml(name).variant for name in ROWS | FAMILY_COUNTS}
    assert variants == {
        "standard": "learned-mha-full",
        "rope": "rope-mha-full",
        "rope-gqa": "rope-gqa-full",
        "rope-gqa-window": "rope-gqa-window",
        "llama-3.2-1b": "rope-gqa-full",
        "mistral-7b": "rope-gqa-window",
        "qwen3-0.6b": "rope-gqa-full",
        "gemma-3-270m": "rope-mqa-LLLLLG",
        "olmo2-1b": "rope-mha-full",
        "smollm2-135m": "rope-gqa-full",
        "pythia-160m": "rope-mha-full",
        "mixtral-8x7b": "rope-gqa-full",
        "qwen3-30b-a3b": "rope-gqa-full",
    }
    assert ModelConfig(n_kv_heads=1, sliding_window=3).variant == "learned-mqa-window"


def test_a_token_meets_as_many_parameters_in_the_tiny_mixture_as_in_the_tiny_dense_model() -> None:
    """Not one more, so that what the mixture learns better it does not owe to them."""
    dense, mixture = (ModelConfig.from_yaml(name) for name in ("tiny-cpu", "tiny-moe-cpu"))
    experts = (
        dense.n_layers * 3 * dense.embed_dim * mixture.expert_dim * (mixture.n_experts - mixture.experts_per_token)
    )
    active = parameter_count(mixture) - experts
    assert 0.998 * parameter_count(dense) < active <= parameter_count(dense)


VARIANTS_PAGE = Path(__file__).parents[2] / "docs" / "variants.md"


def test_the_page_of_variants_has_every_preset_of_a_model_with_its_count() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\w-]+)[^|]* \| ([\d,]+) \|$", VARIANTS_PAGE.read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} == set(COUNTS) | {"gpt-7b"}
    for name, variant, count in rows:
        config = ModelConfig.from_yaml(name)
        assert (variant, int(count.replace(",", ""))) == (config.variant, parameter_count(config)), name


@pytest.mark.parametrize("section", [ModelConfig, RopeScaling])
def test_the_page_of_variants_says_what_every_field_is(section: type) -> None:
    text = VARIANTS_PAGE.read_text()
    assert [field.name for field in fields(section) if not re.search(rf"`{field.name}\b", text)] == []


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1.0}, "rope_theta = 1 turns all pairs alike"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8, "beta_fast": 1e308}}, "beta_fast"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0, "original_context": 8, "beta_slow": 1e-320}}, "beta_slow"),
        ({"attention_pattern": "N"}, r"scales no layer of the kinds N; leave it out"),
    ],
)
def test_rotation_without_finite_angles_is_refused(fields: dict[str, Any], message: str) -> None:
    scaling = {"kind": "yarn", "factor": 2.0, "original_context": 8}
    with pytest.raises(InputError, match=message):
        ModelConfig(**{"position": "rope", "rope_scaling": scaling, **fields})


@pytest.mark.parametrize(
    ("pattern", "n_layers", "window", "expected", "seen"),
    [("LLG", 2, 4, None, 4), ("GGL", 2, 4, None, None), ("LLG", 4, 4, "LLG", 4), ("LGN", 2, 4, "LG", 4)],
)
def test_a_pattern_longer_than_the_model_is_cut(
    pattern: str, n_layers: int, window: int, expected: str | None, seen: int | None
) -> None:
    config = ModelConfig(n_layers=n_layers, position="rope", sliding_window=window, attention_pattern=pattern)
    assert config.layer_kinds == (pattern * n_layers)[:n_layers]
    assert (config.attention_pattern, config.sliding_window) == (expected, seen)
    assert ModelConfig.from_dict(config.to_dict()) == config
