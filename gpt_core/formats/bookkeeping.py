"""Fields of published `config.json` files that no logit of a decoder depends on, with who wrote them.

A field stands here only if that holds whatever its value is. The names are those of the config classes of
pytorch-transformers 1.2 and transformers 2.1, 2.11, 3.5, 4.9, 4.28, 4.38, 4.57 and 5.23, and of published files. Where
another value would be another function, the field stands in `FIXED` with the values that are not. What is in neither
table, and what an architecture does not take, is refused.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Fields that are alike.

    Args:
        written_by: Whose programs write them.
        because: Why no value of them touches a logit.
        fields: Their names.
    """

    written_by: str
    because: str
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Fixed:
    """A field whose other values are another function.

    Args:
        written_by: Whose programs write it.
        values: What can be read.
        because: What another value would do.
    """

    written_by: str
    values: tuple[Any, ...]
    because: str


GROUPS = (
    Group(
        "every version of transformers",
        "names of files, classes and versions",
        (
            *(
                "_name_or_path",
                "name_or_path",
                "_model_name_or_path",
                "_commit_hash",
                "architectures",
                "model_type",
                "tokenizer_class",
            ),
            *("transformers_version", "finetuning_task", "task_specific_params", "problem_type", "auto_map"),
        ),
    ),
    Group(
        "every version of transformers",
        "what a call returns, and on which way it computes the same numbers",
        (
            *("output_attentions", "output_hidden_states", "output_past", "return_dict", "use_cache"),
            *("torchscript", "xla_device", "gradient_checkpointing", "pretraining_tp", "cache_implementation"),
            *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
        ),
    ),
    Group(
        "every version of transformers",
        "the dtype in which weights were saved, which the weights say themselves; bfloat16 in XLNet for TensorFlow",
        ("dtype", "torch_dtype", "use_bfloat16"),
    ),
    Group(
        "every version of transformers",
        "ids that a tokenizer or a generation puts in, and how a pad is masked",
        (
            *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
            *("forced_bos_token_id", "forced_eos_token_id", "prefix"),
        ),
    ),
    Group(
        "every version of transformers",
        "heads of classification and of multiple choice, beside the one that gives logits",
        (
            *("num_labels", "_num_labels", "id2label", "label2id", "classifier_dropout", "tf_legacy_loss"),
            *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
            "summary_use_proj",
        ),
    ),
    Group(
        "transformers 2.2 to 4.57, and people by hand",
        "defaults of `generate`, which works on logits that are there",
        (
            *("do_sample", "early_stopping", "max_length", "min_length", "max_new_tokens", "min_new_tokens"),
            *("num_beams", "num_beam_groups", "diversity_penalty", "num_return_sequences", "length_penalty"),
            *("temperature", "top_k", "top_p", "typical_p", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
            *("encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
            *("exponential_decay_length_penalty", "remove_invalid_values", "output_scores"),
            "return_dict_in_generate",
        ),
    ),
    Group(
        "pytorch-pretrained-bert, for OpenAI GPT; gpt2-medium, DialoGPT and ruGPT-3 still have it",
        "whether the columns of `n_special` added tokens are cut from the logits, and there are none",
        ("predict_special_tokens",),
    ),
    Group(
        "nanotron, for SmolLM and SmolLM2",
        "where the names of the fields come from",
        ("is_llama_config",),
    ),
    Group(
        "BigCode's fork of transformers: santacoder, starcoder and what was trained from them",
        "buffers and checks of a faster way of decoding",
        (
            *("inference_runner", "max_batch_size", "max_sequence_length", "runner_max_sequence_length"),
            *("pad_key_length", "pre_allocate_kv_cache", "validate_runner_input"),
        ),
    ),
)

BOOKKEEPING = frozenset(name for group in GROUPS for name in group.fields)

FIXED = {
    "n_special": Fixed("pytorch-pretrained-bert", (0, None), "which adds rows to the token embedding"),
    "is_encoder_decoder": Fixed("transformers", (False, None), "another architecture"),
    "tie_encoder_decoder": Fixed("transformers", (False, None), "another architecture"),
    "add_cross_attention": Fixed("transformers", (False, None), "another architecture"),
    "cross_attention_hidden_size": Fixed("transformers", (None,), "another architecture"),
    "is_decoder": Fixed("transformers", (False, True, None), "another architecture"),
    "pruned_heads": Fixed("transformers", ({}, None, []), "which says that heads were removed"),
    "rope_interleaved": Fixed("nanotron", (False, None), "which turns neighbours instead of halves"),
    "use_mrope": Fixed("Qwen 2.5", (False, None), "which gives a token several positions"),
    "quantization_config": Fixed(
        "transformers", (None,), "whose weights are quantized: dequantize it in transformers and save it"
    ),
    "chunk_size_feed_forward": Fixed("transformers", (0, None), "another order of computation"),
}
"""Fields that may be absent or have one of some values, in every architecture."""

BEYOND = {
    "text_config": "a model of more than text: save its language model alone, whose config stands in text_config",
    "kv_lora_rank": "whose keys and values are compressed (MLA)",
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "another mixture of experts"),
}
"""Fields that tell what an architecture has which our models have not."""
