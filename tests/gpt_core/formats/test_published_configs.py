"""Config files as published are read, field by field, or refused for a reason that is true."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import format_of
from gpt_core.formats.bookkeeping import BOOKKEEPING, FIXED, GROUPS
from gpt_core.formats.hugging_face import read_config

PUBLISHED = {
    name: entry["config"]
    for name, entry in json.loads(Path(__file__).with_name("published_configs.json").read_text("utf-8")).items()
}


def gpt2(width: int, heads: int, layers: int, vocab: int = 50257, context: int = 1024, **more: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        context_length=context,
        n_layers=layers,
        n_heads=heads,
        embed_dim=width,
        mlp_dim=4 * width,
        **{"dropout": 0.1, **more},
    )


def starcoder2(width: int, heads: int, kv_heads: int, layers: int, theta: float, **more: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=49152,
        context_length=16384,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        embed_dim=width,
        head_dim=128,
        mlp_dim=4 * width,
        position="rope",
        rope_theta=theta,
        sliding_window=4096,
        **{"init_std": 0.018042, "dropout": 0.1, **more},
    )


READ = {
    "openai-community/gpt2": gpt2(768, 12, 12),
    "openai-community/gpt2-medium, as transformers 4.12.5 shows it": gpt2(1024, 16, 24),
    "openai-community/gpt2-large": gpt2(1280, 20, 36),
    "openai-community/gpt2-xl": gpt2(1600, 25, 48),
    "distilbert/distilgpt2, saved by transformers 4.50.3": gpt2(768, 12, 6),
    "openai-community/gpt2-xl, saved by transformers 4.31": gpt2(1600, 25, 48),
    "openai-community/gpt2-large, saved by transformers 4.57": gpt2(1280, 20, 36),
    "openai-community/gpt2-large, saved by transformers 5.0": gpt2(1280, 20, 36),
    "codeparrot, saved by transformers 5.14": gpt2(1600, 25, 48, 32768),
    "skt/kogpt2": gpt2(768, 12, 12, 50000),
    "gpt2 of 32,000 tokens, without dropout": gpt2(1024, 16, 24, 32000, dropout=0.0),
    "gpt2 with three tokens added": gpt2(768, 12, 12, 50260),
    "ai-forever/rugpt3large_based_on_gpt2, saved by transformers 4.55": gpt2(1024, 16, 24, context=2048),
    "ResembleAI/chatterbox-turbo, its GPT-2": gpt2(1024, 16, 24, 50276, 8196),
    "bigcode/gpt_bigcode-santacoder": gpt2(2048, 16, 24, 49280, 2048, n_kv_heads=1),
    "bigcode/starcoder2-3b": starcoder2(3072, 24, 2, 30, 999999.4420358813),
    "bigcode/starcoder2-7b": starcoder2(4608, 36, 4, 32, 1e6),
    "bigcode/starcoder2-15b": starcoder2(6144, 48, 4, 40, 1e5, init_std=0.01275, dropout=0.0, tied_embeddings=False),
}
ALTERNATES = "mixes global and local layers, which our models do not have, and window_size 256 does not cover the 2048"
REFUSED = {
    "stanford-crfm/BioMedLM": "scale_attn_by_inverse_layer_idx is true, which scales the scores by layer",
    "EleutherAI/gpt-neo-125M": ALTERNATES,
    "roneneldan/TinyStories-8M": ALTERNATES,
    "GPT-J in the clothes of GPT-Neo": r'attention_types must be like \[\[\["local"\], 28\]\]',
}


def read(content: dict[str, Any], folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(content))
    architecture = format_of(f"hf-{content['model_type']}")._FORMAT.architecture  # type: ignore[attr-defined]
    return read_config(folder / "config.json", architecture)[0]


def test_every_file_has_its_verdict() -> None:
    assert PUBLISHED.keys() == READ.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_the_model_that_it_names(name: str, tmp_path: Path) -> None:
    assert read(PUBLISHED[name], tmp_path) == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_another_function_is_refused_for_that(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        read(PUBLISHED[name], tmp_path)


@pytest.mark.parametrize(("layers", "width", "heads"), [(24, 2048, 16), (32, 2560, 20)], ids=["1.3B", "2.7B"])
def test_the_larger_sizes_of_gpt_neo_alternate_too(layers: int, width: int, heads: int, tmp_path: Path) -> None:
    sizes = {"num_layers": layers, "hidden_size": width, "num_heads": heads}
    kinds = {
        "attention_types": [[["global", "local"], layers // 2]],
        "attention_layers": ["global", "local"] * (layers // 2),
    }
    with pytest.raises(InputError, match=ALTERNATES):
        read(PUBLISHED["EleutherAI/gpt-neo-125M"] | sizes | kinds, tmp_path)


def test_a_window_that_covers_the_context_makes_local_layers_global(tmp_path: Path) -> None:
    """TinyStories was trained at 512 positions; cut to the 256 of the window, its layers are all alike."""
    content = PUBLISHED["roneneldan/TinyStories-8M"]
    assert read(content | {"max_position_embeddings": 256}, tmp_path) == ModelConfig(
        vocab_size=50257,
        context_length=256,
        n_layers=8,
        n_heads=16,
        embed_dim=256,
        mlp_dim=1024,
        attention_scale=1.0,
        qkv_bias=False,
    )
    with pytest.raises(InputError, match="window_size 256 does not cover the 257 positions"):
        read(content | {"max_position_embeddings": 257}, tmp_path)


def test_starcoder_computes_another_gelu(tmp_path: Path) -> None:
    """The fields of its runner are bookkeeping; `gelu` is the one by the error function."""
    runner = {
        "inference_runner": 0,
        "max_batch_size": None,
        "max_sequence_length": None,
        "pad_key_length": True,
        "pre_allocate_kv_cache": False,
        "validate_runner_input": True,
    }
    content = PUBLISHED["bigcode/gpt_bigcode-santacoder"] | runner
    assert read(content, tmp_path) == READ["bigcode/gpt_bigcode-santacoder"]
    with pytest.raises(InputError, match="activation_function is 'gelu', another function than our tanh GELU"):
        read(content | {"activation_function": "gelu"}, tmp_path)


def test_no_field_has_two_entries() -> None:
    names = [name for group in GROUPS for name in group.fields]
    assert len(names) == len(set(names))
    assert not BOOKKEEPING & FIXED.keys()


OTHER_VALUES = {
    "n_special": 3,
    "is_encoder_decoder": True,
    "tie_encoder_decoder": True,
    "add_cross_attention": True,
    "cross_attention_hidden_size": 768,
    "is_decoder": "no",
    "pruned_heads": {"0": [1]},
    "chunk_size_feed_forward": 64,
}


@pytest.mark.parametrize("field", FIXED)
def test_a_field_that_is_fixed_is_refused_at_another_value(field: str, tmp_path: Path) -> None:
    content = PUBLISHED["openai-community/gpt2"]
    for value in FIXED[field].values:
        read(content | {field: value}, tmp_path)
    with pytest.raises(InputError, match=f"config.json: {field} is .*; only .* can be read"):
        read(content | {field: OTHER_VALUES[field]}, tmp_path)


def test_what_transformers_writes_of_its_base_class_is_known(tmp_path: Path) -> None:
    """All fields of `PretrainedConfig.to_dict()` in 4.57, with its defaults."""
    fields = {
        "return_dict": True,
        "output_hidden_states": False,
        "torchscript": False,
        "dtype": None,
        "pruned_heads": {},
        "tie_word_embeddings": True,
        "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False,
        "is_decoder": False,
        "cross_attention_hidden_size": None,
        "add_cross_attention": False,
        "tie_encoder_decoder": False,
        "architectures": None,
        "finetuning_task": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "task_specific_params": None,
        "problem_type": None,
        "tokenizer_class": None,
        "prefix": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": None,
        "sep_token_id": None,
        "decoder_start_token_id": None,
        "max_length": 20,
        "min_length": 0,
        "do_sample": False,
        "early_stopping": False,
        "num_beams": 1,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "bad_words_ids": None,
        "num_return_sequences": 1,
        "output_scores": False,
        "return_dict_in_generate": False,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "remove_invalid_values": False,
        "exponential_decay_length_penalty": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "_name_or_path": "",
        "transformers_version": "4.57.1",
        "tf_legacy_loss": False,
        "use_bfloat16": False,
        "output_attentions": False,
    }
    content = PUBLISHED["openai-community/gpt2"]
    assert read(fields | content, tmp_path) == READ["openai-community/gpt2"]


NO_COUNT = ["x", "", 1.5, True, [1], {"a": 1}]


@pytest.mark.parametrize(
    ("name", "field", "values", "kind"),
    [
        *(
            ("openai-community/gpt2", field, NO_COUNT, "a whole number")
            for field in ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size", "n_inner")
        ),
        ("openai-community/gpt2", "layer_norm_epsilon", ["x", True, [1e-5], 10**400], "a number"),
        ("openai-community/gpt2", "embd_pdrop", ["x", {}, float("nan")], "a number"),
        ("openai-community/gpt2", "tie_word_embeddings", ["yes", 1, []], "true or false"),
        ("openai-community/gpt2", "activation_function", [1, ["gelu_new"]], "a text"),
        ("bigcode/gpt_bigcode-santacoder", "multi_query", ["true", 1], "true or false"),
        ("EleutherAI/gpt-neo-125M", "window_size", ["256", 2.5], "a whole number"),
        ("EleutherAI/gpt-neo-125M", "attention_types", ["global", {"global": 12}], "a list"),
        ("bigcode/starcoder2-3b", "rope_scaling", ["linear", [1]], "a mapping"),
        ("bigcode/starcoder2-3b", "rope_theta", ["x", [1], float("inf"), 10**400], "a number"),
        ("bigcode/starcoder2-3b", "sliding_window", ["4096", [4096]], "a whole number"),
    ],
)
def test_a_value_of_another_kind_is_named(name: str, field: str, values: list[Any], kind: str, tmp_path: Path) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"config.json: {field} is .* and must be {kind}") as caught:
            read(PUBLISHED[name] | {field: value}, tmp_path)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("field", ["n_embd", "n_layer", "n_head", "n_positions", "vocab_size"])
def test_a_size_that_is_null_is_missing(field: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"config.json: {field} is missing"):
        read(PUBLISHED["openai-community/gpt2"] | {field: None}, tmp_path)


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
)
def test_a_size_by_the_other_name_must_agree(field: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{field} is 7 and n_.* they must agree"):
        read(PUBLISHED["openai-community/gpt2"] | {field: 7}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_types": [[["global"], 10**12]]}, "names 1000000000000 layers and num_layers is 12"),
        ({"attention_types": [[["global"], 10**12]], "num_layers": 10**12}, "must agree|n_layers"),
        ({"attention_types": [[["global"], -12]]}, "attention_types must be like"),
        ({"attention_types": [[["sideways"], 12]], "attention_layers": None}, "neither 'global' nor 'local'"),
        ({"attention_types": [[["global", "local"], True]]}, "attention_types must be like"),
    ],
)
def test_layers_of_gpt_neo_are_counted_before_they_are_listed(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read(PUBLISHED["EleutherAI/gpt-neo-125M"] | changes, tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_file_that_holds_no_mapping_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: must hold a mapping of fields"):
        read_config(tmp_path / "config.json", format_of("hf-gpt2")._FORMAT.architecture)  # type: ignore[attr-defined]
