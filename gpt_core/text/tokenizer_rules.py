"""Whether the tokenizer files of a folder say what GPT-2's say: the same ids for every text.

Every version of transformers writes GPT-2's tokenizer in other bytes, and GPT-2's vocabulary goes with other rules as
well (a space in front, lower case, digits apart, a token at the start). So content decides, of every file that is
there, and what is not known to be harmless counts as another rule.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_core.errors import InputError
from gpt_core.files.reading import read_json, read_text

VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, _ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
CHAT_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
_CHAT_TEMPLATES = (CHAT_TEMPLATE, _OLD_TEMPLATE)
ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates, which go along."""
TOKENIZER_FILES = (
    *(VOCABULARY_FILE, MERGES_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG, SPECIAL_TOKENS, _ADDED_TOKENS),
    *_CHAT_TEMPLATES,
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt"),  # of other tokenizers
)
"""Names of the files that make a tokenizer in a folder of transformers."""

END_OF_TEXT = "<|endoftext|>"

_CLASSES = {None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}
_TOKENS = {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
_TOKEN_LISTS = {"additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"}
_LARGEST = 16_000_000  # bytes of a file of GPT-2's, however it is written
# Fields of tokenizer_config.json that no id of a text depends on.
_HARMLESS = {
    *("add_special_tokens", "backend", "chat_template", "clean_up_tokenization_spaces", "errors", "is_local", "legacy"),
    *("local_files_only", "max_len", "max_length", "model_input_names", "model_max_length", "name_or_path"),
    *("pad_to_multiple_of", "pad_token_type_id", "padding_side", "processor_class", "special_tokens_map_file"),
    *("split_special_tokens", "stride", "tokenizer_file", "trim_offsets", "truncation_side", "truncation_strategy"),
    *("use_fast",),
}
_BYTE_LEVEL_OPTIONS = {"add_prefix_space", "trim_offsets", "use_regex"}
_TEXT_ALONE = [{"Sequence": {"id": "A", "type_id": 0}}]


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer files that lie in a folder."""
    further = sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))
    return (*(folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), *further)


def has_template(files: Sequence[Path]) -> bool:
    """Whether there is a chat template among tokenizer files."""
    configs = [file for file in files if file.name == TOKENIZER_CONFIG]
    return any(file.name in _CHAT_TEMPLATES for file in files) or any(
        b'"chat_template"' in file.read_bytes() for file in configs
    )


def template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a tokenizer: a file of its own goes before what stands in `tokenizer_config.json`.

    Args:
        folder: Where its files lie.
        config: Its `tokenizer_config.json`.

    Raises:
        InputError: the file is damaged, or there are templates and none is the default.
    """
    found: Any = config.get("chat_template")
    if (folder / _OLD_TEMPLATE).is_file():
        content = read_json(folder / _OLD_TEMPLATE)
        found = content.get("chat_template") if isinstance(content, dict) else content
    if (folder / CHAT_TEMPLATE).is_file():
        found = read_text(folder / CHAT_TEMPLATE, _LARGEST)
    if isinstance(found, list):  # of names and templates
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
        if found is None:
            raise InputError(
                f"{folder / TOKENIZER_CONFIG}: chat_template: none of its templates is named 'default', there are: "
                f"{', '.join(sorted(named)) or 'none'}"
            )
    if found is not None and not isinstance(found, str):
        raise InputError(f"{folder}: its chat template is no text, but {type(found).__name__}")
    return found


def difference(files: Sequence[Path], vocabulary: Mapping[str, int], merges: Sequence[str]) -> str:
    """What in tokenizer files is not GPT-2's, in words; "" where nothing is.

    Args:
        files: All tokenizer files of a folder.
        vocabulary: GPT-2's tokens and their ids.
        merges: GPT-2's, in order.
    """
    names = {file.name for file in files}
    if TOKENIZER_FILE not in names and not {VOCABULARY_FILE, MERGES_FILE} <= names:
        return f"there is neither {TOKENIZER_FILE} nor {VOCABULARY_FILE} with {MERGES_FILE}"
    for file in files:
        try:
            found = _difference(file, vocabulary, merges)
        except (OSError, ValueError, TypeError, RecursionError):
            found = "cannot be read"
        if found:
            return f"{file.name} {found}"
    return ""


def merge_lines(text: str) -> list[str]:
    """The merges of a `merges.txt`, without its line on the version."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#version")]


def _difference(file: Path, vocabulary: Mapping[str, int], merges: Sequence[str]) -> str:
    if (
        file.name in _CHAT_TEMPLATES or file.parent.name == ADDITIONAL_TEMPLATES
    ):  # made into text before it is tokenized
        return ""
    if file.stat().st_size > _LARGEST:
        return "is larger than any of GPT-2's"
    text = file.read_bytes().decode("utf-8")
    if file.name == MERGES_FILE:
        return "" if merge_lines(text) == list(merges) else "holds other merges"
    if not file.name.endswith(".json"):
        return "belongs to another kind of tokenizer"
    content = json.loads(text)
    if not isinstance(content, dict):
        return "holds no object"
    if file.name == VOCABULARY_FILE:
        return "" if content == vocabulary else "holds another vocabulary"
    if file.name == _ADDED_TOKENS:
        same = {name: (name, number) == (END_OF_TEXT, vocabulary[END_OF_TEXT]) for name, number in content.items()}
    elif file.name == SPECIAL_TOKENS:
        same = {name: _is_end(value) for name, value in content.items()}
    elif file.name == TOKENIZER_CONFIG:
        same = {name: _is_harmless(name, value, vocabulary) for name, value in content.items()}
    else:
        same = {name: _is_gpt2(name, section, vocabulary, merges) for name, section in _sections(content)}
    return next((f"differs in {name}" for name, is_same in same.items() if not is_same), "")


def _sections(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Of a tokenizer.json, also those that are absent and must not be."""
    model = content.get("model")
    parts = dict(content) | {"pre_tokenizer": content.get("pre_tokenizer"), "decoder": content.get("decoder")}
    parts.pop("model", None)
    rest = dict(model) if isinstance(model, dict) else {}
    return [*parts.items(), ("vocab", rest.pop("vocab", None)), ("merges", rest.pop("merges", [])), ("model", rest)]


def _is_gpt2(name: str, section: Any, vocabulary: Mapping[str, int], merges: Sequence[str]) -> bool:
    """Whether a section of a tokenizer.json is GPT-2's; truncation, padding, a normalizer and unknown ones are not."""
    if name == "version":
        return True
    if name == "vocab":
        return bool(section == vocabulary)
    if name == "merges":
        return [pair if isinstance(pair, str) else " ".join(pair) for pair in section] == list(merges)
    if name == "model":
        off = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
        return _has(section, {"type": "BPE"} | dict.fromkeys(off), free={"fuse_unk", "unk_token"})
    if name == "added_tokens":
        return all(_is_end(token, vocabulary[END_OF_TEXT]) for token in section)
    if name == "pre_tokenizer":
        wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        return _has(section, wanted, free={"trim_offsets"})
    if name == "decoder":
        return _has(section, {"type": "ByteLevel"}, free=_BYTE_LEVEL_OPTIONS)
    if name == "post_processor" and section is not None:
        template = {"type": "TemplateProcessing", "single": _TEXT_ALONE}
        return _has(section, {"type": "ByteLevel"}, free=_BYTE_LEVEL_OPTIONS) or _has(
            section, template, free={"pair", "special_tokens"}
        )
    return section is None


def _is_harmless(name: str, value: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether a field of tokenizer_config.json leaves GPT-2's ids as they are."""
    if name == "tokenizer_class":
        return isinstance(value, str) and value in _CLASSES
    if name == "added_tokens_decoder" and isinstance(value, dict):
        return set(value) <= {str(vocabulary[END_OF_TEXT])} and all(map(_is_end, value.values()))
    if name in _TOKENS | _TOKEN_LISTS:
        return _is_end(value)
    return name in _HARMLESS or not value


def _is_end(token: Any, number: int | None = None) -> bool:
    """Whether a token, or all of some, is the end of text, written in any way, or none at all."""
    if isinstance(token, list):
        return all(map(_is_end, token))
    if token is None or token == END_OF_TEXT or token == {}:
        return True
    wanted = {"content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False}
    more = {} if number is None else {"id": number}
    return _has(token, wanted | more, free={"__type", "id", "normalized", "special"})


def _has(section: Any, wanted: Mapping[str, Any], free: set[str]) -> bool:
    """Whether a section has these values and nothing else but what is free; absent is as wanted, and null is off."""
    return (
        isinstance(section, dict)
        and set(section) <= set(wanted) | free
        and all((section.get(name, value) or None) == (value or None) for name, value in wanted.items())
    )
