"""Any tokenizer out of its `tokenizer.json`, through the library `tokenizers`.

What `tokenizer.json` says is done: normalizer, pre-tokenizer, model and post-processor. The files beside it name the
special tokens and hold the chat template.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gpt_core.errors import InputError, shown
from gpt_core.files.reading import read_json, read_text
from gpt_core.text.gpt2 import Gpt2Tokenizer
from gpt_core.text.tokenizer import Tokenizer
from gpt_core.text.tokenizer_rules import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    template_of,
)

_LARGEST = 256 << 20  # bytes; Gemma's is 35 MB
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NO_PART = ("version", "truncation", "padding")  # of a tokenizer.json: no id of a text depends on them here
_AGAIN = "save it again with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_UNKNOWN = "\ufffd"
_HALF = re.compile("[\ud800-\udfff]")


class FileTokenizer(Tokenizer):
    """A tokenizer out of a folder.

    Args:
        folder: Where its files lie.
        files: All of them; `tokenizer.json` is one, unless it is GPT-2's.
        name: What messages call it.
        gpt2: GPT-2's, where its ids are those: then `vocab.json` and `merges.txt` will do, and its special tokens need
            no file.

    Raises:
        InputError: a file is damaged, or it needs code of its own.
    """

    def __init__(self, folder: Path, files: Sequence[Path], name: str, gpt2: Gpt2Tokenizer | None = None) -> None:
        path = folder / TOKENIZER_FILE
        self._folder, self._files, self.name = folder, tuple(files), name
        if gpt2 is None or path in self._files:
            self._text = read_text(path, _LARGEST)
        else:
            self._text = json.dumps(gpt2.content)
        try:
            self.backend = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # the library's own, of no type
            raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}; {_AGAIN}") from None
        self._config = _object(folder / TOKENIZER_CONFIG)
        self._require_whole(path)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._sha256 = None if gpt2 is None else gpt2.sha256
        self._named = {} if gpt2 is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)

    def _require_whole(self, path: Path) -> None:
        """Refuse what makes ids that the file does not say."""
        mapped, added = (self._config.get(name) or {} for name in ("auto_map", "added_tokens_decoder"))
        if not isinstance(mapped, dict) or "AutoTokenizer" in mapped:  # once it was a list, of tokenizers alone
            raise InputError(
                f"{path.parent / TOKENIZER_CONFIG}: auto_map: this tokenizer needs code of its own, which is never run"
            )
        if getattr(self.backend.model, "dropout", None):
            raise InputError(f"{path}: model.dropout makes its ids random; set it to null")
        if not isinstance(added, dict):
            raise InputError(
                f"{path.parent / TOKENIZER_CONFIG}: added_tokens_decoder = {shown(added)} must be tokens by id; "
                f"{_AGAIN}"
            )
        for number, token in added.items():
            content = _content(token)
            if content is not None and str(self.backend.token_to_id(content)) != number:
                raise InputError(
                    f"{path}: has no token {shown(content)} of the id {number}, which {TOKENIZER_CONFIG} adds; {_AGAIN}"
                )

    @property
    def sha256(self) -> str:
        """Of all that its ids depend on, however the file is written."""
        if self._sha256 is None:
            self._sha256 = self._hash()
        return self._sha256

    def _hash(self) -> str:
        content: dict[str, Any] = json.loads(self._text)
        model = dict(content["model"])
        pairs = model.get("merges") or []
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        kept = {name: value for name, value in content.items() if name not in _NO_PART} | {"model": model}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @cached_property
    def special_tokens(self) -> dict[str, Any]:
        """Special tokens by name, as a chat template is given them: "eos_token" and its like."""
        found = {**self._named, **_object(self._folder / SPECIAL_TOKENS), **self._config}
        named = {name: _content(found[name]) for name in _NAMED if name in found}
        extra = found.get("extra_special_tokens")
        named |= {name: _content(token) for name, token in extra.items()} if isinstance(extra, dict) else {}
        return {name: content for name, content in named.items() if content is not None}

    @property
    def end_of_text(self) -> int:
        """The id that ends a document.

        Raises:
            InputError: its files name no `eos_token`, or one that it has not.
        """
        number = self.id_of("eos_token")
        if number is None:
            raise InputError(
                f"{self.name}: names no token that ends a text; set eos_token in {TOKENIZER_CONFIG} to one of its own"
            )
        return number

    def id_of(self, special: str) -> int | None:
        """The id of a special token by its name, such as "bos_token"; None where its files name none, or no own one."""
        token = self.special_tokens.get(special)
        number = None if token is None else self.backend.token_to_id(token)
        return None if number is None else int(number)

    @property
    def chat_template(self) -> str | None:
        """Jinja, of a tokenizer for conversations.

        Raises:
            InputError: the file that holds it is damaged.
        """
        return template_of(self._folder, self._config)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: a special token in it is text like any other, and nothing is added.

        A Unigram model whose special tokens are among its pieces finds them all the same.
        """
        ids: list[int] = self._plain.encode(text_of(text), add_special_tokens=False).ids
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The same as an array."""
        return np.array(self.encode(text), np.uint32)

    def encode_marked(self, text: str) -> list[int]:
        """Token ids of text in which special tokens are what they say; nothing is added."""
        ids: list[int] = self.backend.encode(text_of(text), add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The same with what the tokenizer puts in front of a text, and not with what it puts behind."""
        found = self.backend.encode(text_of(text))
        ids, added = list(found.ids), list(found.special_tokens_mask)
        end = len(ids)
        while end > self._front and added[end - 1]:
            end -= 1
        return ids[:end]

    @cached_property
    def _front(self) -> int:
        """Tokens that are put in front of a text."""
        added: list[int] = self.backend.encode("x").special_tokens_mask
        return added.index(0) if 0 in added else len(added)

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Plain texts as documents to train on, on all cores: what it puts in front, the text, and the end of text."""
        end = self.end_of_text
        found = self._plain.encode_batch_fast(list(map(text_of, texts)))
        rows = (np.array(encoding.ids, np.uint32) for encoding in found)
        return [row if len(row) and row[-1] == end else np.append(row, np.uint32(end)) for row in rows]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; unknown ids become replacement characters."""
        parts, known = [], list[int]()
        for token in tokens:
            if 0 <= token < self.vocab_size:
                known.append(token)
            else:
                parts += [self._decode(known), _UNKNOWN]
                known = []
        return "".join([*parts, self._decode(known)])

    def _decode(self, tokens: list[int]) -> str:
        return str(self.backend.decode(tokens, skip_special_tokens=False)) if tokens else ""

    def save(self, folder: Path) -> None:
        """Write its files into a folder, byte for byte."""
        for file in self._files:
            target = folder / file.relative_to(self._folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, to which a special token in a text is text."""
        plain = tokenizers.Tokenizer.from_str(self._text)
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        return plain


def unreadable(files: Sequence[Path]) -> str:
    """Why files make no tokenizer that can be read here, and what to do."""
    names = ", ".join(file.name for file in files)
    return f"there is no {TOKENIZER_FILE} beside {names}; {_AGAIN}"


def text_of(text: str) -> str:
    """A text that can be written in UTF-8.

    Raises:
        InputError: it holds half a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds U+{ord(text[error.start]):04X} at character {error.start + 1}, half of a surrogate pair "
            f"or a byte that was no UTF-8; give text in UTF-8"
        ) from None
    return text


def _object(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none where there is no such file."""
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no fields; expected an object in braces")
    return content


def _content(token: Any) -> str | None:
    """The text of a token, which may be written with its rules; half a character is none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and not _HALF.search(content) else None
