"""Fields of a config.json that no logit depends on are known by name; those that must be one thing are held to it."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.architectures.gpt2 import ARCHITECTURE
from gpt_core.formats.bookkeeping import BOOKKEEPING, FIXED, GROUPS
from gpt_core.formats.hugging_face import read_config

PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text("utf-8"))
GPT2 = PUBLISHED["openai-community/gpt2"]["config"]


def read(changes: dict[str, Any], folder: Path) -> ModelConfig:
    """GPT-2's own file with other fields."""
    (folder / "config.json").write_text(json.dumps(GPT2 | changes))
    return read_config(folder / "config.json", ARCHITECTURE)[0]


def test_no_field_has_two_entries() -> None:
    names = [name for group in GROUPS for name in group.fields]
    assert len(names) == len(set(names))
    assert not BOOKKEEPING & FIXED.keys()


OTHER_VALUES = {
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "n_special": 3,
    "is_encoder_decoder": True,
    "tie_encoder_decoder": True,
    "add_cross_attention": True,
    "cross_attention_hidden_size": 768,
    "is_decoder": "no",
    "rope_interleaved": True,
    "use_mrope": True,
    "pruned_heads": {"0": [1]},
    "chunk_size_feed_forward": 64,
}


@pytest.mark.parametrize("field", FIXED)
def test_a_field_that_is_fixed_is_refused_at_another_value(field: str, tmp_path: Path) -> None:
    for value in FIXED[field].values:
        read({field: value}, tmp_path)
    with pytest.raises(InputError, match=f"config.json: {field} is .*; only .* can be read"):
        read({field: OTHER_VALUES[field]}, tmp_path)


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
    fields = {name: value for name, value in fields.items() if name not in GPT2}
    assert read(fields, tmp_path) == read({}, tmp_path)
