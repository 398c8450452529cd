"""Which tokenizer lies in a folder, and one by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt_core.errors import InputError
from gpt_core.files.hub import fetch, is_hub_name
from gpt_core.files.reading import exists, is_folder
from gpt_core.storage.checkpoint_config import config_home
from gpt_core.text.gpt2 import GPT2, gpt2_tokenizer, is_gpt2
from gpt_core.text.tokenizer import Tokenizer
from gpt_core.text.tokenizer_file import FileTokenizer, unreadable
from gpt_core.text.tokenizer_rules import (
    ADDITIONAL_TEMPLATES,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    difference,
    has_template,
    tokenizer_files,
)


def tokenizer_for(vocab_size: int) -> Tokenizer | None:
    """GPT-2's tokenizer, which is saved beside a new model that has a row for each of its tokens; None otherwise."""
    return gpt2_tokenizer() if vocab_size >= gpt2_tokenizer().vocab_size else None


def rows_without_tokens(vocab_size: int, tokenizer: Tokenizer | None = None, *, given: bool = False) -> list[str]:
    """What a person should know of a model with more rows than the tokenizer saved with it has tokens.

    Args:
        vocab_size: Rows of the model.
        tokenizer: GPT-2's unless given.
        given: Whether the rows are those of weights to start from, which cannot be chosen.
    """
    known = gpt2_tokenizer() if tokenizer is None else tokenizer
    if vocab_size <= known.vocab_size:
        return []
    whose = "the GPT-2 tokenizer" if is_gpt2(known) else f"the tokenizer {known.name}"
    instead = f"; model.vocab_size {known.vocab_size} with model.pad_vocab_size_multiple 64 pads without them"
    return [
        f"model.vocab_size = {vocab_size}: rows {known.vocab_size} to {vocab_size - 1} have no token of {whose}, they "
        f"are never generated{'' if given else instead}"
    ]


@dataclass(frozen=True)
class FoundTokenizer:
    """The tokenizer that lies in a folder.

    Args:
        files: All its files; none where there is no tokenizer.
        difference: What in them is not GPT-2's; "" where nothing is.
    """

    files: tuple[Path, ...]
    difference: str

    @property
    def kind(self) -> Literal["gpt2", "other"] | None:
        """GPT-2's, another one, or None where there is none."""
        if not self.files:
            return None
        return "other" if self.difference else "gpt2"

    @property
    def readable(self) -> bool:
        """Whether text can be read with it here."""
        return self.kind == "gpt2" or any(file.name == TOKENIZER_FILE for file in self.files)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know who takes it along."""
        if self.kind is None or self.readable:
            return ()
        return (
            f"its tokenizer is not GPT-2's ({self.difference}): it goes along as it is, and no text can be read with "
            f"it here: {unreadable(self.files)}",
        )


def find_tokenizer(folder: Path) -> FoundTokenizer:
    """The tokenizer beside a checkpoint's weights, or in its run; GPT-2's is recognised by content, not by bytes."""
    files = tokenizer_files(config_home(folder))
    if not files:
        return FoundTokenizer((), "")
    gpt2 = gpt2_tokenizer()
    return FoundTokenizer(files, difference(files, gpt2.vocabulary, gpt2.merges))


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """GPT-2's tokenizer where it lies beside a checkpoint's weights; None where there is none, or another one."""
    return gpt2_tokenizer() if find_tokenizer(folder).kind == "gpt2" else None


def text_tokenizer(folder: Path, otherwise: str) -> Tokenizer:
    """The tokenizer beside a checkpoint's weights, for text.

    Args:
        folder: The checkpoint.
        otherwise: What to do without one.

    Raises:
        InputError: there is none, or none that can be read.
    """
    found = find_tokenizer(folder)
    if found.kind is None:
        raise InputError(
            f"{folder}: has no tokenizer beside its weights, so text cannot be read or written; {otherwise}"
        )
    return _opened(found, config_home(folder), otherwise)


def open_tokenizer(path_or_name: str) -> Tokenizer:
    """A tokenizer by name.

    Args:
        path_or_name: "gpt2", the folder of a checkpoint, of a run or of a tokenizer alone, its `tokenizer.json`, or a
            name on the Hugging Face hub.

    Raises:
        InputError: there is none, or none that can be read.
    """
    path = Path(path_or_name)
    if path_or_name == GPT2 and not exists(path):
        return gpt2_tokenizer()
    if not exists(path) and is_hub_name(path_or_name):
        path = fetch(path_or_name, [*TOKENIZER_FILES, f"{ADDITIONAL_TEMPLATES}/*"])
    elif path.name == TOKENIZER_FILE and not is_folder(path):
        path = path.parent
    if not is_folder(path):
        raise InputError(
            f"{path_or_name}: no such folder; give {GPT2!r}, a folder with {TOKENIZER_FILE}, or a hub name"
        )
    found = find_tokenizer(path)
    if found.kind is None:
        raise InputError(f"{path_or_name}: holds no tokenizer; give a folder with {TOKENIZER_FILE}")
    return _opened(found, config_home(path), f"give a folder with {TOKENIZER_FILE}", path_or_name)


def _opened(found: FoundTokenizer, folder: Path, otherwise: str, name: str = "") -> Tokenizer:
    if found.kind == "gpt2" and not has_template(found.files):
        return gpt2_tokenizer()
    gpt2 = gpt2_tokenizer() if found.kind == "gpt2" else None
    if not found.readable:
        raise InputError(
            f"{folder}: its tokenizer is not GPT-2's ({found.difference}), and {unreadable(found.files)}; {otherwise}"
        )
    try:
        return FileTokenizer(folder, found.files, name or str(folder), gpt2)
    except InputError as error:
        raise InputError(f"{error}; {otherwise}") from None
