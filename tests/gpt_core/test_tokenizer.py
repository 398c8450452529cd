import shutil
from pathlib import Path

import pytest

from gpt_core.data.stdlib import prose
from gpt_core.errors import InputError
from gpt_core.tokenizer import Tokenizer, gpt2_tokenizer, tokenizer_of


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("Hello, world!", [15496, 11, 995, 0]),
        ("The quick brown fox", [464, 2068, 7586, 21831]),
        ("", []),
        # A special token inside a text is text, not a command: never 50256.
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    ],
)
def test_ids_are_those_of_gpt2(text: str, ids: list[int]) -> None:
    assert gpt2_tokenizer().encode(text) == ids


def test_the_vocabulary_is_gpt2s() -> None:
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("text", [prose()[:20_000], "naïve café, 東京 🚀\r\n\t  \x00 ''s", " lead and trail "])
def test_text_survives_a_round_trip(text: str) -> None:
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.end_of_text


def test_prose_is_long_english() -> None:
    text = prose()
    assert len(text) > 300_000
    assert text.count(" the ") > 3_000


def test_a_saved_tokenizer_is_found_beside_a_checkpoint(tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    found = tokenizer_of(tmp_path)
    assert found is not None
    assert found.encode("Hello world") == [15496, 995]


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path) is None


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("damage", ["one byte changed", "truncated", "missing"])
def test_files_that_are_not_the_originals_are_refused(name: str, damage: str, tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}.*GPT-2"):
        tokenizer_of(tmp_path)


def test_merges_and_vocabulary_cannot_change_places(tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    shutil.move(tmp_path / "vocab.json", tmp_path / "x")
    with pytest.raises(InputError, match="not the files of the GPT-2 tokenizer"):
        Tokenizer(merges=tmp_path / "x", vocabulary=tmp_path / "merges.txt")
