import os
import random
import re
import shutil
from pathlib import Path

import pytest

from gpt_core.data.stdlib import prose
from gpt_core.errors import InputError
from gpt_core.text import gpt2 as module
from gpt_core.text.finding import find_tokenizer, rows_without_tokens, text_tokenizer, tokenizer_for, tokenizer_of
from gpt_core.text.gpt2 import Gpt2Tokenizer, gpt2_tokenizer

# Unicode's White_Space, and characters that are none of it although Python or a reader may think so.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
OTHERS = [
    "a",
    "Z",
    "é",
    "字",
    "🚀",
    "7",
    "٣",
    "½",
    "!",
    "'",
    "_",
    "'s",
    "'ll",
    "\x00",
    "\x1c",
    "\x1f",
    "\u180e",
    "\u200b",
    "\ufeff",
]


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


def test_pieces_of_a_text_with_runs_of_blanks_have_the_ids_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run of two is cut here, of any blanks beside anything; against the library of Hugging Face."""
    tokenizers = pytest.importorskip("tokenizers")
    gpt2_tokenizer().save(tmp_path)
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    library = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    monkeypatch.setattr(module, "_LONG_BLANK", re.compile(module._LONG_BLANK.pattern.replace("1000", "2")))
    chosen = random.Random(0)
    cut = 0
    for _ in range(3000):
        text = "".join(
            "".join(chosen.choices(BLANKS, k=chosen.randint(1, 4)))
            if chosen.random() < 0.5
            else chosen.choice(OTHERS) * chosen.randint(1, 3)
            for _ in range(chosen.randint(1, 8))
        )
        parts = list(module._parts(text))
        cut += len(parts) > 1
        assert "".join(parts) == text
        assert [token for part in parts for token in gpt2_tokenizer().encode(part)] == library.encode(text).ids
    assert cut > 1000


@pytest.mark.parametrize(
    ("blanks", "inner"),
    [(" " * 1_100_000, [220] * 1_099_999), ("\n" * 1_100_001, [198] + [628] * 550_000), ("\t " * 550_000, None)],
)
def test_a_million_blanks_are_tokens_like_any_others(blanks: str, inner: list[int] | None) -> None:
    """More than the stack of tiktoken's pattern holds. The last blank belongs to what follows."""
    tokenizer = gpt2_tokenizer()
    text = f"head{blanks}tail"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert ids[0] == 2256
    assert ids[-1:] == ([7894] if blanks[-1] == " " else [13199])
    if inner is not None:
        assert sorted(ids[1:-1]) == sorted(inner)


@pytest.mark.parametrize("text", ["a" * 300_000, "!?" * 150_000, "7" * 300_000, "字" * 100_000, " " * 300_000])
def test_long_runs_of_anything_come_back(text: str) -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "named"), [("a\ud800b", r"U\+D800 at character 2"), ("\udcff", r"U\+DCFF at character 1")]
)
def test_half_a_character_is_refused_by_its_place(text: str, named: str) -> None:
    for encode in (gpt2_tokenizer().encode, gpt2_tokenizer().encode_array):
        with pytest.raises(InputError, match=named):
            encode(text)


def test_ids_without_a_token_are_read_as_replacement_characters() -> None:
    assert gpt2_tokenizer().decode([15496, 50257, -1, 995, 10**12]) == "Hello\ufffd\ufffd world\ufffd"


@pytest.mark.parametrize(("rows", "saved"), [(50256, False), (50257, True), (50304, True)])
def test_a_tokenizer_belongs_to_a_model_that_has_a_row_for_each_of_its_tokens(rows: int, saved: bool) -> None:
    assert (tokenizer_for(rows) is not None) == saved
    notices = rows_without_tokens(rows)
    assert len(notices) == (rows > 50257)
    assert all("rows 50257 to 50303" in notice and "pad_vocab_size_multiple 64" in notice for notice in notices)
    told = rows_without_tokens(rows, given=True)  # nobody can choose those of given weights
    assert len(told) == len(notices)
    assert all(notice.endswith("they are never generated") for notice in told)


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
    assert find_tokenizer(tmp_path).kind is None
    with pytest.raises(InputError, match=f"{tmp_path}: has no tokenizer beside its weights, .*; give ids"):
        text_tokenizer(tmp_path, "give ids")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("damage", ["one byte changed", "truncated", "missing"])
def test_files_that_are_not_gpt2s_are_refused_for_text(name: str, damage: str, tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert tokenizer_of(tmp_path) is None
    assert find_tokenizer(tmp_path).kind == "other"
    with pytest.raises(InputError, match=f"{tmp_path}: its tokenizer is not GPT-2's .*{name}.*; give ids"):
        text_tokenizer(tmp_path, "give ids")


def test_merges_and_vocabulary_cannot_change_places(tmp_path: Path) -> None:
    gpt2_tokenizer().save(tmp_path)
    shutil.move(tmp_path / "vocab.json", tmp_path / "x")
    with pytest.raises(InputError, match="not the files of the GPT-2 tokenizer"):
        Gpt2Tokenizer(merges=tmp_path / "x", vocabulary=tmp_path / "merges.txt")


def test_nothing_is_read_out_of_tiktokens_cache_nor_left_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows files by their path: a good copy would hide that the file was exchanged."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    gpt2_tokenizer().save(tmp_path)
    made = Gpt2Tokenizer(merges=tmp_path / "merges.txt", vocabulary=tmp_path / "vocab.json")
    assert made.encode("Hello world") == [15496, 995]
    assert not (tmp_path / "cache").exists()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "cache")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match=r"not the files of the GPT-2 tokenizer: merges\.txt is another"):
        Gpt2Tokenizer(merges=tmp_path / "merges.txt", vocabulary=tmp_path / "vocab.json")
