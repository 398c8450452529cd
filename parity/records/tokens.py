"""The tokens on which checkpoints are compared: from a file, or real text through the checkpoint's own tokenizer."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt_core.config import ModelConfig
from gpt_core.data.records import LONGEST
from gpt_core.data.stdlib import prose
from gpt_core.errors import InputError
from gpt_core.files.reading import open_file, read_text, require_npy
from gpt_core.text.finding import text_tokenizer

Tokens = npt.NDArray[np.int64]

_BATCH, _TIME = 2, 101


def tokens_for(folder: Path, config: ModelConfig, tokens: Path | None = None, text: Path | None = None) -> Tokens:
    """Token ids `[batch, time]` that fit a checkpoint.

    Args:
        folder: The checkpoint, whose tokenizer lies beside its weights.
        config: Its config.
        tokens: A .npy file of ids, `[batch, time]` or `[time]`.
        text: A UTF-8 text file. Without either, English prose from the interpreter's library is used.

    Raises:
        InputError: both are given; a file is missing or broken; ids do not fit vocabulary or context; or the
            checkpoint has no tokenizer for text.
    """
    if tokens is not None and text is not None:
        raise InputError("--tokens and --text exclude each other; give one")
    ids = _from_file(tokens) if tokens is not None else _from_text(folder, config, text)
    require_fitting(ids, config, str(tokens or text or "the built-in text"))
    return ids


def require_fitting(ids: Tokens, config: ModelConfig, source: str) -> None:
    """Hold ids against a model's vocabulary and context.

    Raises:
        InputError: an id is outside the vocabulary, or rows are longer than the context.
    """
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(
            f"{source}: token id {worst} is outside the vocabulary 0..{config.vocab_size - 1}; give ids of this "
            f"model's tokenizer with --tokens FILE.npy"
        )
    if ids.shape[1] > config.context_length:
        raise InputError(
            f"{source}: rows of {ids.shape[1]} tokens are longer than context_length = {config.context_length}; "
            f"give shorter ones"
        )


def _from_file(path: Path) -> Tokens:
    expected = "expected one array of whole numbers [batch, time] or [time]"
    with open_file(path) as file:
        try:
            require_npy(file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            ids = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a .npy file of token ids ({error}); {expected}") from None
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2):
        raise InputError(f"{path}: {expected}")
    if not ids.size:
        raise InputError(f"{path}: holds no tokens")
    return np.atleast_2d(ids).astype(np.int64)


def _from_text(folder: Path, config: ModelConfig, text: Path | None) -> Tokens:
    tokenizer = text_tokenizer(folder, "give --tokens FILE.npy")
    content = prose() if text is None else read_text(text, LONGEST)
    ids = np.asarray(tokenizer.encode(content), np.int64)
    if ids.size < 2:
        raise InputError(f"{text}: holds fewer than two tokens")
    time = min(config.context_length, len(ids) // _BATCH, _time_beyond_two_windows(config))
    return ids[: _BATCH * time].reshape(_BATCH, time)


def _time_beyond_two_windows(config: ModelConfig) -> int:
    """Long enough that a window hides most keys, and no multiple of it."""
    window = config.sliding_window
    return _TIME if window is None else max(_TIME, 2 * window + window // 2 + 1)
