"""Config files as published are read, field by field, or refused for a reason that is true."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import format_of, open_checkpoint
from gpt_core.formats.architectures import MODEL_TYPES
from gpt_core.formats.hf_architecture import format_name
from gpt_core.formats.hugging_face import read_config
from gpt_core.rotary import RopeScaling

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


def gpt_neo(width: int, heads: int, layers: int, **more: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=50257,
        context_length=2048,
        n_layers=layers,
        n_heads=heads,
        embed_dim=width,
        attention_scale=1.0,
        qkv_bias=False,
        sliding_window=256,
        attention_pattern="GL",
        **more,
    )


def decoder(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    shared = {"vocab_size": 32000, "context_length": 4096, "bias": False, "tied_embeddings": False}
    return ModelConfig(
        embed_dim=width,
        mlp_dim=mlp,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        position="rope",
        norm="rms",
        gated_mlp=True,
        **shared | {"activation": "silu"} | more,
    )


def gemma(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    shared = {"vocab_size": 256000, "context_length": 8192, "tied_embeddings": True, "norm_eps": 1e-6, "head_dim": 256}
    shared |= {"activation": "gelu_tanh", "norm_unit_offset": True, "embedding_scale": width**0.5}
    return decoder(width, mlp, layers, heads, kv_heads, **shared | more)


def gemma2(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> ModelConfig:
    own = {"attention_softcap": 50.0, "logit_softcap": 30.0, "sliding_window": 4096, "attention_pattern": "LG"}
    return gemma(width, mlp, layers, heads, kv_heads, norm_placement="sandwich", attention_scale=1 / 16, **own)


def gemma3(width: int, mlp: int, layers: int) -> ModelConfig:
    own = {"vocab_size": 262144, "context_length": 32768, "norm_placement": "sandwich", "qk_norm": "head"}
    own |= {"rope_theta": 1e6, "rope_local_theta": 1e4, "sliding_window": 512, "attention_pattern": "LLLLLG"}
    return gemma(width, mlp, layers, 4, 1, attention_scale=1 / 16, **own)


def olmo(width: int, mlp: int, layers: int, heads: int, **more: Any) -> ModelConfig:
    own = {"norm_placement": "post", "qk_norm": "whole", "norm_eps": 1e-6, "rope_theta": 5e5}
    return decoder(width, mlp, layers, heads, heads, **own, **more)


def mixture(width: int, expert: int, layers: int, heads: int, kv_heads: int, **more: Any) -> ModelConfig:
    return decoder(width, more.pop("mlp_dim", expert), layers, heads, kv_heads, expert_dim=expert, **more)


QWEN = {"vocab_size": 151936, "norm_eps": 1e-6, "rope_theta": 1e6, "tied_embeddings": True}

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
    "EleutherAI/gpt-neo-125M": gpt_neo(768, 12, 12),
    "roneneldan/TinyStories-8M": gpt_neo(256, 16, 8),
    "meta-llama/Llama-2-7b-hf": decoder(4096, 11008, 32, 32, 32),
    "meta-llama/Llama-3.2-1B": decoder(
        *(2048, 8192, 16, 32, 8),
        vocab_size=128256,
        context_length=131072,
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", 32.0, 8192),
        tied_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-135M": decoder(
        *(576, 1536, 30, 9, 3),
        vocab_size=49152,
        context_length=8192,
        rope_theta=1e5,
        init_std=1 / 24,
        tied_embeddings=True,
    ),
    "mistralai/Mistral-7B-v0.1": decoder(4096, 14336, 32, 32, 8, context_length=32768, sliding_window=4096),
    "mistralai/Mistral-7B-v0.3": decoder(
        4096, 14336, 32, 32, 8, vocab_size=32768, context_length=32768, rope_theta=1e6
    ),
    "Qwen/Qwen2-7B-Instruct": decoder(
        *(3584, 18944, 28, 28, 4),
        qkv_bias=True,
        context_length=32768,
        **QWEN | {"vocab_size": 152064, "tied_embeddings": False},
    ),
    "Qwen/Qwen2.5-0.5B": decoder(896, 4864, 24, 14, 2, qkv_bias=True, context_length=32768, **QWEN),
    "Qwen/Qwen3-0.6B": decoder(1024, 3072, 28, 16, 8, head_dim=128, qk_norm="head", context_length=40960, **QWEN),
    "google/gemma-2b": gemma(2048, 16384, 18, 8, 1),
    "google/gemma-2-2b": gemma2(2304, 9216, 26, 8, 4),
    "google/gemma-2-9b, as transformers 4.45.2 shows it": gemma2(3584, 14336, 42, 16, 8),
    "google/gemma-3-1b-pt": gemma3(1152, 6912, 26),
    "google/gemma-3-270m": gemma3(640, 2048, 18),
    "allenai/OLMo-2-0425-1B": olmo(2048, 8192, 16, 16, vocab_size=100352),
    "allenai/Olmo-3-1025-7B": olmo(
        *(4096, 11008, 32, 32),
        vocab_size=100278,
        context_length=65536,
        sliding_window=4096,
        attention_pattern="LLLG",
        rope_scaling=RopeScaling("yarn", 8.0, 8192),
    ),
    "HuggingFaceTB/SmolLM3-3B": decoder(
        *(2048, 11008, 36, 16, 4),
        vocab_size=128256,
        context_length=65536,
        norm_eps=1e-6,
        rope_theta=5e6,
        attention_pattern="GGGN",
        tied_embeddings=True,
    ),
    "microsoft/Phi-3-mini-4k-instruct": decoder(3072, 8192, 32, 32, 32, vocab_size=32064, sliding_window=2047),
    "ibm-granite/granite-3.0-2b-base": decoder(
        *(2048, 8192, 40, 32, 8),
        vocab_size=49152,
        embedding_scale=12.0,
        attention_scale=1 / 64,
        residual_scale=0.22,
        logit_scale=1 / 8,
        tied_embeddings=True,
    ),
    "mistralai/Mixtral-8x7B-v0.1": mixture(4096, 14336, 32, 32, 8, n_experts=8, context_length=32768, rope_theta=1e6),
    "Qwen/Qwen3-30B-A3B": mixture(
        *(2048, 768, 48, 32, 4),
        n_experts=128,
        experts_per_token=8,
        mlp_dim=6144,
        head_dim=128,
        qk_norm="head",
        context_length=40960,
        **QWEN | {"tied_embeddings": False},
    ),
    "allenai/OLMoE-1B-7B-0924": mixture(
        *(2048, 1024, 16, 16, 16),
        n_experts=64,
        experts_per_token=8,
        router_normalise=False,
        vocab_size=50304,
        qk_norm="whole",
    ),
    "EleutherAI/pythia-160m": ModelConfig(
        vocab_size=50304,
        context_length=2048,
        position="rope",
        rope_fraction=0.25,
        parallel_residual=True,
        activation="gelu",
        tied_embeddings=False,
    ),
}
REFUSED = {
    "stanford-crfm/BioMedLM": "scale_attn_by_inverse_layer_idx is true, which scales the scores by layer",
    "microsoft/Phi-4-mini-instruct, its rotation cut to three factors": "rope_scaling.rope_type is 'longrope', a",
    "GPT-J in the clothes of GPT-Neo": r'attention_types must be like \[\[\["local"\], 28\]\]',
}


BEYOND = {
    "google/gemma-3-4b-it": r"model_type is 'gemma3', a model of more than text: .* text_config \(text_config\); only ",
    "deepseek-ai/DeepSeek-V3, the fields that tell": r"'deepseek_v3', whose keys and values are compressed \(MLA\)",
    "openai/gpt-oss-20b, the fields that tell": r"'gpt_oss', another mixture of experts \(num_local_experts\); only",
}


def read(content: dict[str, Any], folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(content))
    architecture = format_of(f"hf-{content['model_type']}").architecture  # type: ignore[attr-defined]
    return read_config(folder / "config.json", architecture)[0]


def test_every_file_has_its_verdict() -> None:
    assert PUBLISHED.keys() == READ.keys() | REFUSED.keys() | BEYOND.keys()


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_the_model_that_it_names(name: str, tmp_path: Path) -> None:
    assert read(PUBLISHED[name], tmp_path) == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_another_function_is_refused_for_that(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        read(PUBLISHED[name], tmp_path)


@pytest.mark.parametrize("name", BEYOND)
def test_an_architecture_that_is_none_of_ours_is_named_with_what_it_has(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    with pytest.raises(InputError, match=BEYOND[name]) as caught:
        open_checkpoint(tmp_path)
    assert all(model_type in str(caught.value) for model_type in ("llama", "gpt2", "twingpt"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_file_is_named_as_its_model_type(model_type: str) -> None:
    assert format_of(format_name(model_type)).architecture.model_type == model_type  # type: ignore[attr-defined]


@pytest.mark.parametrize(("layers", "width", "heads"), [(24, 2048, 16), (32, 2560, 20)], ids=["1.3B", "2.7B"])
def test_the_larger_sizes_of_gpt_neo_alternate_too(layers: int, width: int, heads: int, tmp_path: Path) -> None:
    sizes = {"num_layers": layers, "hidden_size": width, "num_heads": heads}
    kinds = {
        "attention_types": [[["global", "local"], layers // 2]],
        "attention_layers": ["global", "local"] * (layers // 2),
    }
    found = read(PUBLISHED["EleutherAI/gpt-neo-125M"] | sizes | kinds, tmp_path)
    assert found == gpt_neo(width, heads, layers)


def test_a_window_that_covers_the_context_stays_as_the_file_says(tmp_path: Path) -> None:
    """TinyStories was trained at 512 positions; cut to the 256 of the window, its layers see all alike."""
    content = PUBLISHED["roneneldan/TinyStories-8M"]
    found = read(content | {"max_position_embeddings": 256}, tmp_path)
    assert found == replace(READ["roneneldan/TinyStories-8M"], context_length=256)
    assert (found.attention_pattern, found.sliding_window) == ("GL", 256)


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
    santacoder = READ["bigcode/gpt_bigcode-santacoder"]
    assert read(content, tmp_path) == santacoder
    assert read(content | {"activation_function": "gelu"}, tmp_path) == replace(santacoder, activation="gelu")


def test_gelu_of_gemma_means_the_tanh_form(tmp_path: Path) -> None:
    """Older files say "gelu"; transformers reads that as the function that the models were trained with."""
    for name in ("gelu", "gelu_pytorch_tanh"):
        assert read(PUBLISHED["google/gemma-2b"] | {"hidden_act": name}, tmp_path).activation == "gelu_tanh"


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
        read_config(tmp_path / "config.json", format_of("hf-gpt2").architecture)  # type: ignore[attr-defined]
