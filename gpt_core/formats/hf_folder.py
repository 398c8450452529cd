"""What makes a folder serve besides weights and config: tokenizer files, `generation_config.json` and a model card."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import read_json
from gpt_core.files.writing import atomic_file
from gpt_core.formats.hf_fields import HUGGING_FACE_TYPES, model_type_of
from gpt_core.parameters import parameter_count
from gpt_core.sections import is_whole
from gpt_core.storage.checkpoint_config import CONFIG_FILE, config_home
from gpt_core.text.finding import text_tokenizer
from gpt_core.text.gpt2 import Gpt2Tokenizer
from gpt_core.text.tokenizer import Tokenizer
from gpt_core.text.tokenizer_file import FileTokenizer
from gpt_core.text.tokenizer_rules import END_OF_TEXT, TOKENIZER_CONFIG, TOKENIZER_FILE, tokenizer_files

GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
CARD_FILE = "README.md"
PARITY_ROW = "parity"


def carry(source: Path, folder: Path) -> None:
    """Take along what serves beside weights and config, byte for byte: tokenizer files and `generation_config.json`.

    Args:
        source: A checkpoint of any format. Token ids that stand in a config.json of Hugging Face alone become a
            `generation_config.json`, since our own config has no place for them.
        folder: Where another one is being written; what lies there under these names is replaced.
    """
    home = config_home(source)
    generation = home / GENERATION_CONFIG
    if _is_hugging_face(home) and not (folder / GENERATION_CONFIG).exists():
        write_generation_config(folder, token_ids(home, None))
    for file in (*tokenizer_files(home), *([generation] if generation.is_file() else [])):
        target = folder / file.relative_to(home)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def token_ids(source: Path | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Begin, end and padding for config.json: those that came with the model, or its tokenizer's.

    Args:
        source: The checkpoint that it came from.
        tokenizer: GPT-2's; None where another one lies beside the checkpoint, or none.

    Raises:
        InputError: a file that names them is damaged.
    """
    if source is not None:
        home = config_home(source)
        file = home / (CONFIG_FILE if _is_hugging_face(home) else GENERATION_CONFIG)
        if file.is_file():
            content = read_object(file)
            return {name: content.get(name) for name in TOKEN_IDS}
        if tokenizer is None:
            return _ids_of_tokenizer(home)
    end = None if tokenizer is None else tokenizer.end_of_text
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}


def _ids_of_tokenizer(home: Path) -> dict[str, Any]:
    """What the tokenizer beside a checkpoint names; one that cannot be read here, and goes along, names nothing."""
    with suppress(InputError):
        found = text_tokenizer(home, "")
        if isinstance(found, FileTokenizer):
            return {name: found.id_of(name.removesuffix("_id")) for name in TOKEN_IDS}
    return dict.fromkeys(TOKEN_IDS)


def end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end what a checkpoint writes: all that came with it, or the tokenizer's end of text.

    Raises:
        InputError: a file that names them is damaged, or none does.
    """
    home = config_home(folder)
    for file in (home / GENERATION_CONFIG, home / CONFIG_FILE):
        found = read_object(file).get("eos_token_id") if file.is_file() else None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(is_whole(number, 0) for number in ids):
            raise InputError(f"{file}: eos_token_id = {shown(found)} must be a token id, or a list of some")
        if ids:
            return tuple(ids)
    return (tokenizer.end_of_text,)


def read_object(file: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        InputError: it is missing or damaged, or holds something else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no fields; expected an object in braces")
    return content


def _is_hugging_face(folder: Path) -> bool:
    return model_type_of(folder) in HUGGING_FACE_TYPES


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Write a tokenizer's files; of GPT-2's also the two that AutoTokenizer reads without a network."""
    tokenizer.save(folder)
    if not isinstance(tokenizer, Gpt2Tokenizer):
        return
    _write_json(folder / TOKENIZER_FILE, tokenizer.content, indent=None)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    # Not "GPT2Tokenizer": transformers 5 rebuilds that one from vocab.json and merges.txt instead of reading
    # tokenizer.json, and ends with a vocabulary of one.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, **special}
    _write_json(folder / TOKENIZER_CONFIG, config | {"clean_up_tokenization_spaces": False})


def write_generation_config(folder: Path, ids: dict[str, Any]) -> None:
    """Write `generation_config.json`: greedy unless the caller asks for more."""
    _write_json(folder / GENERATION_CONFIG, {"do_sample": False, "use_cache": True, **ids})


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
    who = "each token sees" if config.attention_pattern is None else "each token of a local layer (L) sees"
    window = "" if config.sliding_window is None else f", {who} {config.sliding_window} keys"
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
        f"tags: [{content['model_type']}, twingpt]",
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
    cases = content.get("cases") if isinstance(content, dict) and "passed" in content else None
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise InputError(f"{report}: no report of `parity check`")
    passed = sum(bool(case.get("passed")) for case in cases)
    verdict = "passed" if content["passed"] else "FAILED"
    return f"{verdict}: {passed} of {len(cases)} checks"


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
