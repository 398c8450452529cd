"""GPT-2's tokenizer in whatever bytes is GPT-2's; its vocabulary with any other rule is another tokenizer."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_core.text.finding import find_tokenizer
from gpt_core.text.gpt2 import gpt2_tokenizer

END = "<|endoftext|>"
OLD_END = {"content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
ANOTHER = OLD_END | {"content": "[PAD]"}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
FIRST = {"SpecialToken": {"id": END, "type_id": 0}}

Content = dict[str, Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    gpt2_tokenizer().save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def published(originals: dict[str, bytes]) -> Content:
    """A tokenizer.json as the one of openai-community/gpt2: older than most fields, the post-processor with a space."""
    merges = originals["merges.txt"].decode().split("\n")[1:-1]
    assert len(merges) == 50000
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [OLD_END | {"id": 50256, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": json.loads(originals["vocab.json"]),
            "merges": merges,
        },
    }


def kind(folder: Path) -> str | None:
    return find_tokenizer(folder).kind


def sorted_and_indented(content: bytes) -> bytes:
    return json.dumps(json.loads(content), indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize(
    "written",
    [
        lambda files: files,
        lambda files: files | {"vocab.json": sorted_and_indented(files["vocab.json"])},
        lambda files: {name: content.replace(b"\n", b"\r\n") for name, content in files.items()},
        lambda files: files | {"merges.txt": files["merges.txt"].replace(b"#version: 0.2\n", b"").rstrip(b"\n")},
    ],
    ids=["original", "slow tokenizer of transformers 4", "CRLF", "no line on the version"],
)
def test_bytes_do_not_matter(
    written: Callable[[dict[str, bytes]], dict[str, bytes]], originals: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in written(originals).items():
        (tmp_path / name).write_bytes(content)
    assert kind(tmp_path) == "gpt2"


def as_of_transformers_5(content: Content) -> None:
    content["model"] |= {"type": "BPE", "byte_fallback": False, "ignore_merges": False}
    content["model"]["merges"] = [pair.split(" ") for pair in content["model"]["merges"]]
    content["pre_tokenizer"]["use_regex"] = True
    content["post_processor"] = {"type": "TemplateProcessing", "single": [TEXT], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        as_of_transformers_5,
        lambda content: content.update(post_processor=None, added_tokens=[]),
        lambda content: content["model"].update(unk_token=END),
    ],
)
def test_a_tokenizer_json_of_any_version_is_gpt2s(
    change: Callable[[Content], None], published: Content, tmp_path: Path
) -> None:
    content = copy.deepcopy(published)
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=1))
    assert kind(tmp_path) == "gpt2"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
        (lambda c: c["pre_tokenizer"].update(use_regex=False), "pre_tokenizer"),
        (lambda c: c["pre_tokenizer"].update(behaviour="new"), "pre_tokenizer"),
        (
            lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [c["pre_tokenizer"]]}),
            "pre_tokenizer",
        ),
        (lambda c: c.pop("pre_tokenizer"), "pre_tokenizer"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer"),
        (lambda c: c.update(post_processor={"type": "TemplateProcessing", "single": [FIRST, TEXT]}), "post_processor"),
        (lambda c: c.update(decoder=None), "decoder"),
        (lambda c: c.update(truncation={"max_length": 8}), "truncation"),
        (lambda c: c.update(section=1), "section"),
        (lambda c: c["added_tokens"].append(ANOTHER | {"id": 50257}), "added_tokens"),
        (lambda c: c["added_tokens"][0].update(id=50255), "added_tokens"),
        (lambda c: c["added_tokens"][0].update(lstrip=True), "added_tokens"),
        (lambda c: c["model"].update(dropout=0.1), "model"),
        (lambda c: c["model"].update(ignore_merges=True), "model"),
        (lambda c: c["model"].update(type="WordPiece"), "model"),
        (lambda c: c["model"]["merges"].reverse(), "merges"),
        (lambda c: c["model"]["vocab"].update({"[PAD]": 50257}), "vocab"),
        (lambda c: c.update(model=None), "vocab"),
        (lambda c: c.update(added_tokens=3), "tokenizer.json cannot be read"),
    ],
)
def test_gpt2s_vocabulary_with_another_rule_is_another_tokenizer(
    change: Callable[[Content], None], named: str, published: Content, tmp_path: Path
) -> None:
    content = copy.deepcopy(published)
    change(content)
    gpt2_tokenizer().save(tmp_path)  # one file that is GPT-2's does not make the others so
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = find_tokenizer(tmp_path)
    assert found.kind == "other"
    assert found.difference.startswith("tokenizer.json ")
    assert found.difference.endswith(named)
    assert not found.notices  # it is read from its tokenizer.json, here too


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"model_max_length": 1024}),
        (
            "tokenizer_config.json",
            {"errors": "replace", "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer", "name_or_path": "gpt2"}
            | {"unk_token": OLD_END | {"__type": "AddedToken"}, "special_tokens_map_file": None, "pad_token": None}
            | {"added_tokens_decoder": {"50256": OLD_END}, "additional_special_tokens": [], "extra_special_tokens": {}}
            | {"chat_template": "{{ messages }}", "clean_up_tokenization_spaces": True, "add_bos_token": False},
        ),
        ("special_tokens_map.json", {"bos_token": END, "eos_token": OLD_END, "pad_token": END}),
        ("added_tokens.json", {END: 50256}),
        ("chat_template.jinja", "{{ messages }}"),
    ],
)
def test_what_changes_no_id_is_gpt2s(name: str, content: Any, tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert kind(tmp_path) == "gpt2"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer_config.json", {"add_prefix_space": True}, "differs in add_prefix_space"),
        ("tokenizer_config.json", {"add_bos_token": True}, "differs in add_bos_token"),
        ("tokenizer_config.json", {"do_lower_case": True}, "differs in do_lower_case"),
        ("tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"}, "differs in tokenizer_class"),
        ("tokenizer_config.json", {"tokenizer_class": ["GPT2Tokenizer"]}, "differs in tokenizer_class"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.T", None]}}, "differs in auto_map"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "differs in pad_token"),
        ("tokenizer_config.json", {"eos_token": OLD_END | {"rstrip": True}}, "differs in eos_token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"50257": ANOTHER}}, "differs in added_tokens_decoder"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<user>"]}, "differs in additional_special_tokens"),
        ("tokenizer_config.json", {"of_tomorrow": 1}, "differs in of_tomorrow"),
        ("tokenizer_config.json", [], "holds no object"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<user>"]}, "differs in additional_special_tokens"),
        ("added_tokens.json", {"<user>": 50257}, "differs in <user>"),
        ("vocab.json", {}, "holds another vocabulary"),
        ("merges.txt", "a b", "holds other merges"),
        ("vocab.txt", "[PAD]", "belongs to another kind of tokenizer"),
    ],
)
def test_a_file_beside_gpt2s_that_changes_ids_makes_another_tokenizer(
    name: str, content: Any, named: str, tmp_path: Path
) -> None:
    gpt2_tokenizer().save(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert find_tokenizer(tmp_path).difference == f"{name} {named}"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b" " * 16_000_001])
def test_a_file_that_is_damaged_or_endless_is_not_gpt2s(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert kind(tmp_path) == "other"


def test_rules_without_a_vocabulary_are_another_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert find_tokenizer(tmp_path).difference.startswith("there is neither tokenizer.json nor vocab.json")
