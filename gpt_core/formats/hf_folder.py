"""What makes a folder serve besides weights and config: tokenizer files, `generation_config.json` and a model card."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_core.checkpoint_config import CONFIG_FILE, PARAMS_FOLDER
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.files import atomic_file
from gpt_core.parameters import parameter_count
from gpt_core.source_files import read_json
from gpt_core.tokenizer import MERGES_FILE, VOCABULARY_FILE, Tokenizer, gpt2_tokenizer

TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    *(TOKENIZER_FILE, _TOKENIZER_CONFIG, VOCABULARY_FILE, MERGES_FILE),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja"),
)
CHECKPOINT_FILES = "|".join(
    (
        *map(re.escape, (CONFIG_FILE, PARAMS_FOLDER, *_TOKENIZER_FILES, "generation_config.json", "README.md")),
        r"model(-\d+-of-\d+)?\.safetensors",
        r"model\.safetensors\.index\.json",
        r"(configuration|modeling)_twingpt\.py",
    )
)
"""What lies in a checkpoint or an export, as a pattern of names."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_END_OF_TEXT = "<|endoftext|>"
CARD_FILE = "README.md"
PARITY_ROW = "parity"


@dataclass(frozen=True)
class FoundTokenizer:
    """The tokenizer of a folder.

    Args:
        gpt2: GPT-2's, when it is that one.
        foreign: Whether there is one that is not GPT-2's.
    """

    gpt2: Tokenizer | None = None
    foreign: bool = False


def find_tokenizer(folder: Path) -> FoundTokenizer:
    """Recognise GPT-2's tokenizer by its content, in the files of any version of transformers."""
    vocabulary, merges = folder / VOCABULARY_FILE, folder / MERGES_FILE
    if vocabulary.exists() and merges.exists():
        try:
            return FoundTokenizer(Tokenizer(merges=merges, vocabulary=vocabulary))
        except InputError:
            return FoundTokenizer(foreign=True)
    if (folder / TOKENIZER_FILE).exists() and _is_gpt2(folder / TOKENIZER_FILE):
        return FoundTokenizer(gpt2_tokenizer())
    return FoundTokenizer(foreign=any((folder / name).exists() for name in _TOKENIZER_FILES))


def _is_gpt2(path: Path) -> bool:
    try:
        content = read_json(path)
        ours = _tokenizer_json(gpt2_tokenizer())
        model, wanted = content["model"], ours["model"]
        merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
        added = [token["content"] for token in content["added_tokens"]]
        return (
            model["vocab"] == wanted["vocab"]
            and merges == [pair.split(" ") for pair in wanted["merges"]]
            and set(added) <= {_END_OF_TEXT}
        )
    except (InputError, KeyError, TypeError):
        return False


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer files of another folder as they are."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def token_ids(source: Path | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Begin, end and padding for config.json: GPT-2's, or those of the folder that the model came from."""
    if source is not None:
        content = read_json(source / CONFIG_FILE)
        return {name: content.get(name) for name in _TOKEN_IDS}
    end = None if tokenizer is None else tokenizer.end_of_text
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Write GPT-2's tokenizer: the two original files, and the two that AutoTokenizer reads without a network."""
    tokenizer.save(folder)
    _write_json(folder / TOKENIZER_FILE, _tokenizer_json(tokenizer), indent=None)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
    # Not "GPT2Tokenizer": transformers 5 rebuilds that one from vocab.json and merges.txt instead of reading
    # tokenizer.json, and ends with a vocabulary of one.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, **special}
    _write_json(folder / _TOKENIZER_CONFIG, config | {"clean_up_tokenization_spaces": False})


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """GPT-2's byte-level BPE in the file format of the library `tokenizers`."""
    vocabulary = json.loads(tokenizer.files[VOCABULARY_FILE].read_text(encoding="utf-8"))
    lines = tokenizer.files[MERGES_FILE].read_text(encoding="utf-8").split("\n")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": tokenizer.end_of_text, "content": _END_OF_TEXT, "single_word": False, "lstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"rstrip": False, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [line for line in lines[1:] if line],  # the first line is a version
        },
    }


def write_generation_config(folder: Path, ids: dict[str, Any]) -> None:
    """Write `generation_config.json`: greedy unless the caller asks for more."""
    _write_json(folder / "generation_config.json", {"do_sample": False, "use_cache": True, **ids})


def write_card(
    folder: Path,
    config: ModelConfig,
    *,
    name: str,
    variant: str,
    training: str,
    parity: str,
    notices: Sequence[str],
    sha256: str,
) -> None:
    """Write the model card `README.md`.

    Args:
        folder: The exported folder, whose config.json is there.
        config: The model under which it is stored.
        name: Of the model.
        variant: The attention variant that was trained, which may be stored as another one of the same function.
        training: One line on the training run, or "".
        parity: One line of a parity report, or "".
        notices: How what is stored differs from what was trained.
        sha256: Of the weights by value, as in the records of `parity record`.
    """
    content = read_json(folder / CONFIG_FILE)
    window = "" if config.sliding_window is None else f", each token sees {config.sliding_window} keys"
    rows = [
        ("class", f"`{content['architectures'][0]}`"),
        ("attention variant", f"{variant}{window}"),
        ("parameters", f"{parameter_count(config):,}"),
        ("context", f"{config.context_length:,} tokens"),
        ("training run", training or "not known"),
        (PARITY_ROW, parity or "not checked yet"),
        ("weights, SHA-256 by value", f"`{sha256}`"),
    ]
    more = ", trust_remote_code=True" if "auto_map" in content else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2, twingpt]",
        "---",
        f"# {name}",
        "",
        "Written by TwinGPT and read back: every weight is equal, bit by bit, to what was converted.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {value} |" for title, value in rows),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{more})',
        "```",
    ]
    if notices:
        lines += ["", "## What the conversion changed", *(f"- {notice}" for notice in notices)]
    (folder / CARD_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_parity_into_card(folder: Path, parity: str) -> None:
    """Put the result of a check into the model card of an exported folder.

    Raises:
        InputError: the folder has no card of ours.
    """
    card = folder / CARD_FILE
    lines = card.read_text(encoding="utf-8").split("\n") if card.is_file() else []
    places = [number for number, line in enumerate(lines) if line.startswith(f"| {PARITY_ROW} | ")]
    if len(places) != 1:
        raise InputError(f"{card}: is no model card of TwinGPT, so it has no place for the result")
    lines[places[0]] = f"| {PARITY_ROW} | {parity} |"
    with atomic_file(card) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def parity_result(report: Path) -> str:
    """One line of a `report.json` for the card.

    Raises:
        InputError: it is no report of `parity check`.
    """
    content = read_json(report)
    if not isinstance(content, dict) or not isinstance(content.get("cases"), list) or "passed" not in content:
        raise InputError(f"{report}: no report of `parity check`")
    passed = sum(bool(case.get("passed")) for case in content["cases"])
    verdict = "passed" if content["passed"] else "FAILED"
    return f"{verdict}: {passed} of {len(content['cases'])} checks"


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
