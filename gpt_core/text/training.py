"""A byte-level BPE of one's own text (Sennrich et al., 2016; Radford et al., 2019), by the library `tokenizers`."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gpt_core.config import LARGEST_VOCABULARY
from gpt_core.errors import InputError
from gpt_core.sections import is_whole
from gpt_core.text.tokenizer_rules import END_OF_TEXT, TOKENIZER_CONFIG, TOKENIZER_FILE

SMALLEST = 257
"""Every byte, and the end of text."""


def require_vocabulary(size: int) -> None:
    """Refuse a size that no byte-level vocabulary has.

    Raises:
        InputError: it is outside the range.
    """
    if not is_whole(size, SMALLEST, LARGEST_VOCABULARY):
        raise InputError(
            f"--vocab-size {size} must be a whole number of at least {SMALLEST} (every byte, and the end of text) and "
            f"at most {LARGEST_VOCABULARY:,}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges until there are so many tokens, or no pair is left that occurs twice.

    The first id is the end of text, then come the bytes; any text comes back as it was.

    Args:
        texts: Read once.
        vocab_size: Tokens, the end of text included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_trained(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files by which it is opened, here and by `AutoTokenizer`."""
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    content = json.dumps(config | {"clean_up_tokenization_spaces": False}, indent=2)
    (folder / TOKENIZER_CONFIG).write_text(content + "\n", encoding="utf-8")
