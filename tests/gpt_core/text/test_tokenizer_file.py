"""Tokenizers out of a `tokenizer.json`, held against transformers and against rules written down by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gpt_core.data.stdlib import prose
from gpt_core.errors import InputError
from gpt_core.text.finding import find_tokenizer, open_tokenizer, text_tokenizer
from gpt_core.text.gpt2 import gpt2_tokenizer, is_gpt2
from gpt_core.text.tokenizer_file import FileTokenizer

TEXTS = ["Hello world", " leading and trailing ", "naïve 東京 🚀\n\ttabs", "<s>", "a</s> b", "", "x"]
Content = dict[str, Any]


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3 and SmolLM2 have it; without a token in front."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return trained(made, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def with_bos() -> tokenizers.Tokenizer:
    """The same with a token in front of every text."""
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def unigram() -> tokenizers.Tokenizer:
    """As Gemma and T5 have it: blanks are a letter, a token in front and one behind."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made = trained(made, trainers.UnigramTrainer, unk_token="<unk>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", made.token_to_id("<s>")), ("</s>", made.token_to_id("</s>"))]
    )
    return made


def trained(made: tokenizers.Tokenizer, trainer: Any, **options: Any) -> tokenizers.Tokenizer:
    specials = ["<s>", "</s>", "<unk>"]
    made.train_from_iterator(
        [prose()[:30_000]], trainer(vocab_size=400, special_tokens=specials, show_progress=False, **options)
    )
    return made


def saved(made: tokenizers.Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[byte_level, with_bos, unigram], ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return saved(with_bos(), tmp_path / "small")


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_have_the_ids_of_transformers_without_what_stands_behind(folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(text)["input_ids"]
    end = theirs.convert_tokens_to_ids("</s>")
    behind = ids[-1:] == [end] and theirs("x")["input_ids"][-1] == end  # what a post-processor adds
    ours = open_tokenizer(str(folder))
    assert ours.encode_prompt(text) == (ids[:-1] if behind else ids)
    assert ours.encode_marked(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", [byte_level, with_bos])
def test_a_special_token_in_a_document_is_text(make: Callable[[], tokenizers.Tokenizer], tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(saved(make(), tmp_path)))
    first, last = tokenizer.encode_marked("<s>")[-1], tokenizer.encode_marked("</s>")[-1]
    assert tokenizer.end_of_text == last
    for ids in (tokenizer.encode("a</s><s>b"), tokenizer.encode_array("a</s><s>b").tolist()):
        assert not {first, last} & set(ids)
    (document,) = tokenizer.encode_documents(["a</s><s>b"])
    front = tokenizer.encode_prompt("x")[: -len(tokenizer.encode("x"))]
    assert document.tolist() == [*front, *tokenizer.encode("a</s><s>b"), last]
    assert document.dtype == np.uint32


@pytest.mark.parametrize("text", ["Hello world", "naïve 東京 🚀\n\ttabs"])
def test_text_comes_back_and_unknown_ids_are_replaced(small: Path, text: str) -> None:
    tokenizer = open_tokenizer(str(small))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.vocab_size == 400
    assert tokenizer.decode([*ids, 400, -1, *ids, 10**12]) == f"{text}\ufffd\ufffd{text}\ufffd"


def test_its_hash_is_that_of_its_content(small: Path) -> None:
    before = open_tokenizer(str(small)).sha256
    file = small / "tokenizer.json"
    content = json.loads(file.read_text())
    content |= {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    file.write_text(json.dumps(content, indent=7))
    again = open_tokenizer(str(small))
    assert again.sha256 == before
    assert len(again.encode("one two three four five six seven")) > 4  # nothing is cut off
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    assert open_tokenizer(str(small)).sha256 != before


def test_its_files_are_saved_byte_for_byte(small: Path, tmp_path: Path) -> None:
    (small / "chat_template.jinja").write_text("{{ messages }}")
    (small / "additional_chat_templates").mkdir()
    (small / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (tmp_path / "copy").mkdir()
    open_tokenizer(str(small)).save(tmp_path / "copy")
    every = {path.relative_to(small): path.read_bytes() for path in small.rglob("*") if path.is_file()}
    assert len(every) == 4
    copies = (tmp_path / "copy").rglob("*")
    assert every == {path.relative_to(tmp_path / "copy"): path.read_bytes() for path in copies if path.is_file()}


def test_gpt2s_own_files_and_its_name_are_the_built_in_one(tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    assert open_tokenizer(str(tmp_path)) is gpt2_tokenizer()
    assert open_tokenizer("gpt2") is gpt2_tokenizer()


def test_gpt2s_tokenizer_with_a_chat_template_is_read_from_its_file_and_known_as_gpt2s(tmp_path: Path) -> None:
    from gpt_core.formats.hf_folder import write_tokenizer

    write_tokenizer(tmp_path, gpt2_tokenizer(), 1024)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = open_tokenizer(str(tmp_path))
    assert isinstance(found, FileTokenizer)
    assert is_gpt2(found)
    assert found.chat_template == "{{ messages }}"
    assert found.encode("Hello <|endoftext|>") == gpt2_tokenizer().encode("Hello <|endoftext|>")


def test_gpt2s_two_files_with_a_chat_template_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from gpt_core.text.chat import Chat

    gpt2_tokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    found = open_tokenizer(str(tmp_path))
    assert is_gpt2(found)
    assert found.encode("a  b") == gpt2_tokenizer().encode("a  b")
    assert found.end_of_text == gpt2_tokenizer().end_of_text
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " there"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages, tokenize=False) == "Hello<|endoftext|> there<|endoftext|>"
    assert Chat(found).encode(messages) == [15496, 50256, 612, 50256]
    (tmp_path / "copy").mkdir()
    found.save(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "merges.txt",
        "tokenizer_config.json",
        "vocab.json",
    ]


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def dropout(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["dropout"] = 0.1
    path.write_text(json.dumps(content))


def sentencepiece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "needs code of its own"),
        (edit("tokenizer_config.json", auto_map=["x.Y", None]), "needs code of its own"),
        (edit("tokenizer_config.json", auto_map=5), "needs code of its own"),
        (edit("tokenizer_config.json", added_tokens_decoder=["</s>"]), "must be tokens by id"),
        (
            edit("tokenizer_config.json", added_tokens_decoder={"7": {"content": "<new>"}}),
            "no token '<new>' of the id 7",
        ),
        (dropout, "model.dropout makes its ids random"),
        (sentencepiece_alone, r"there is no tokenizer.json beside .*tokenizer\.model; save it again with transformers"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: cannot be read: "),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "holds no fields"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change: Callable[[Path], Any], message: str, small: Path) -> None:
    change(small)
    for opened in (lambda: open_tokenizer(str(small)), lambda: text_tokenizer(small, "give ids")):
        with pytest.raises(InputError, match=message) as caught:
            opened()
        assert str(small) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "told"),
    [(None, "names no token that ends a text"), ("<none>", "names no token"), ("\ud800", "names no token")],
)
def test_documents_need_a_token_that_ends_them(token: str | None, told: str, small: Path) -> None:
    edit("tokenizer_config.json", eos_token=token)(small)
    tokenizer = open_tokenizer(str(small))
    with pytest.raises(InputError, match=told):
        tokenizer.encode_documents(["text"])


@pytest.mark.parametrize("name", ["nowhere/at/all", "no-such-tokenizer"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no such folder"):
        open_tokenizer(name)


def test_half_a_character_is_refused_by_its_place(small: Path) -> None:
    tokenizer = open_tokenizer(str(small))
    for encode in (tokenizer.encode, tokenizer.encode_prompt, tokenizer.encode_marked):
        with pytest.raises(InputError, match=r"U\+D800 at character 2"):
            encode("a\ud800b")


def test_a_tokenizer_that_is_read_has_nothing_to_be_said_of_it(small: Path) -> None:
    assert find_tokenizer(small).notices == ()
    sentencepiece_alone(small)
    (notice,) = find_tokenizer(small).notices
    assert "save it again with transformers" in notice
