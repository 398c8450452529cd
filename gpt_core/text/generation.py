"""What both frameworks must agree on to write the same text: options, random numbers, limits and places in a cache."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError, shown
from gpt_core.precision import Precision
from gpt_core.sections import is_whole, require_count, require_number

# What a random number is for; each has its own, so that speculation changes no other.
DRAW_TOKEN, DRAW_ACCEPT, DRAW_DRAFT = 0, 1, 2
DRAWS = 3

_MOST_NEW_TOKENS = 2**24  # a cache has a place for each
_MOST_DRAFT_TOKENS = 1024


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen.

    Args:
        max_new_tokens: Tokens to write at most.
        temperature: Logits are divided by it; 0 takes the most likely token (greedy).
        top_k: Keep this many of the most likely tokens, and all that are as likely as the last of them. Null: all.
        top_p: Keep the most likely tokens that together have this probability, and all as likely as the last of them.
        stop_tokens: A row ends with the first of these ids, which it keeps.
        seed: Of the random numbers.
        known_tokens: Only ids below it are written: as many as the tokenizer knows. Null: all of the model.

    Raises:
        InputError: a value is outside its range; the message names field and range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    known_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        require_count(self, "max_new_tokens", most=_MOST_NEW_TOKENS)
        require_number(self, "temperature", "a number of at least 0; 0 is greedy", lambda x: x >= 0)
        if self.top_k is not None:
            require_count(self, "top_k")
        require_number(self, "top_p", "a number in (0, 1]; 1 keeps every token", lambda x: 0 < x <= 1)
        if not all(is_whole(token, 0) for token in self.stop_tokens):
            raise InputError(f"stop_tokens = {shown(list(self.stop_tokens))} must be token ids")
        require_count(self, "seed", least=0, most=2**64 - 1)
        if self.known_tokens is not None:
            require_count(self, "known_tokens")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def uniforms(seed: int, rows: int, first: int, count: int) -> npt.NDArray[np.float32]:
    """Random numbers in [0, 1) for the tokens `first` to `first + count` of every row, a pure function of all three.

    Philox (Salmon et al., 2011) counts: seed and row are its key, the token's index is its counter.

    Returns:
        `[count, rows, DRAWS]`, multiples of 2^-24, so that rounding never makes a 1 of them.
    """
    if count == 0:
        return np.zeros((0, rows, DRAWS), np.float32)
    streams = [
        np.random.Philox(key=np.array([seed % 2**64, row], np.uint64), counter=first).random_raw(4 * count)
        for row in range(rows)
    ]
    bits = np.stack(streams, axis=1).reshape(count, 4, rows).swapaxes(1, 2)[..., :DRAWS]
    return ((bits >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


@dataclass(frozen=True)
class Prompts:
    """Prompts of different lengths as one array.

    Args:
        tokens: `[batch, time]`, rows filled up behind their end.
        lengths: Tokens of each row, `[batch]`.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]


def pack_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig, new_tokens: int, multiple: int = 1) -> Prompts:
    """Check prompts against a model and lay them side by side.

    Args:
        prompts: Token ids of each row.
        config: The model.
        new_tokens: That are to be written behind them.
        multiple: The array's length is rounded up to it, where the model's context allows.

    Raises:
        InputError: no prompts, an empty one, ids outside the vocabulary, or more tokens than the model has positions.
    """
    if not prompts:
        raise InputError("there is no prompt")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {row} is empty; give it at least one token, such as the end-of-text token")
        if len(prompt) > config.context_length:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens, more than context_length = {config.context_length}; shorten it"
            )
        # The last new token needs no position of its own: nothing is written behind it.
        if config.position == "learned" and len(prompt) + new_tokens - 1 > config.context_length:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens, and {new_tokens} more would exceed context_length = "
                f"{config.context_length}, the table of learned positions, although the last token needs none; "
                f"shorten it or lower max_new_tokens"
            )
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise InputError(
                f"prompt {row}: token id {outside[0]} is outside the vocabulary 0..{config.vocab_size - 1}"
            )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    time = max(longest, min(-(-longest // multiple) * multiple, config.context_length))
    tokens = np.zeros((len(prompts), time), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return Prompts(tokens, lengths)


def cache_slots(config: ModelConfig, limit: int, ahead: int) -> tuple[int, ...]:
    """Places of every layer's cache for each row and kv head.

    With a window, a ring: W places, and one more for every further token that a step brings, since the first of them
    still needs what the last one overwrites.

    Args:
        config: The model.
        limit: Tokens of the longest row, prompt and new ones.
        ahead: Tokens of one step.
    """
    windows = (config.view(kind).window for kind in config.layer_kinds)
    return tuple((limit if window is None else min(window, limit)) + ahead - 1 for window in windows)


class Written(NamedTuple):
    """What some steps of decoding wrote.

    Args:
        rows: New tokens of each row.
        accepted: Tokens of a draft that the target accepted in each row.
        proposed: Tokens that a draft proposed in each row, those beyond max_new_tokens left out.
    """

    rows: list[list[int]]
    accepted: list[int]
    proposed: list[int]

    @classmethod
    def plain(cls, rows: list[list[int]]) -> Self:
        """Written without a draft."""
        return cls(rows, [0] * len(rows), [0] * len(rows))

    @classmethod
    def together(cls, parts: Iterable[Self], rows: int) -> Self:
        """All parts of a text in one."""
        whole = cls.plain([[] for _ in range(rows)])
        for part in parts:
            for row in range(rows):
                whole.rows[row].extend(part.rows[row])
                whole.accepted[row] += part.accepted[row]
                whole.proposed[row] += part.proposed[row]
        return whole


def pack_draft_prompts(
    prompts: Sequence[Sequence[int]],
    draft: ModelConfig,
    target: ModelConfig,
    new_tokens: int,
    draft_tokens: int,
    multiple: int = 1,
) -> Prompts:
    """As `pack_prompts`, for the draft of a target.

    Args:
        prompts: Token ids of each row, which the target can take.
        draft: The smaller model.
        target: The model whose text it is.
        new_tokens: That are to be written behind the prompts.
        draft_tokens: Proposed in a round.
        multiple: The array's length is rounded up to it, where the draft's context allows.

    Raises:
        InputError: no tokens a round, another vocabulary, or a context too short for the text.
    """
    if not is_whole(draft_tokens, 1, _MOST_DRAFT_TOKENS):
        raise InputError(
            f"draft_tokens = {shown(draft_tokens)} must be a whole number of at least 1 and at most "
            f"{_MOST_DRAFT_TOKENS:,}"
        )
    if draft.vocab_size != target.vocab_size:
        raise InputError(
            f"the draft has a vocabulary of {draft.vocab_size} tokens and the target one of {target.vocab_size}; "
            f"choose a draft that was trained with the target's tokenizer"
        )
    try:
        return pack_prompts(prompts, draft, new_tokens, multiple)
    except InputError as error:
        raise InputError(f"the draft cannot follow: {error}, or choose a draft with a longer context") from None


class Party(NamedTuple):
    """A model that takes part in speculation, without its weights."""

    config: ModelConfig
    precision: Precision


class Speculation(NamedTuple):
    """A text that a target and its draft are to write, before either runs.

    Args:
        prompts: For the target.
        draft_prompts: The same for the draft.
        limit: Tokens of the longest row, prompt and new ones.
        places: New tokens, and room for those of a round beyond them.
        noise: Random numbers of every place, `[batch, places, DRAWS]`.
        slots: Places in the caches of every layer of target and draft.
    """

    prompts: Prompts
    draft_prompts: Prompts
    limit: int
    places: int
    noise: npt.NDArray[np.float32]
    slots: tuple[tuple[int, ...], tuple[int, ...]]


def plan_speculation(
    prompts: Sequence[Sequence[int]],
    target: ModelConfig,
    draft: ModelConfig,
    options: SamplingConfig,
    draft_tokens: int,
    multiple: int = 1,
) -> Speculation:
    """Check prompts against both models and lay everything out.

    Args:
        prompts: Token ids of each row.
        target: The model whose text it is.
        draft: The smaller model.
        options: How tokens are chosen.
        draft_tokens: Proposed in a round.
        multiple: Lengths of prompts are rounded up to it, where a model's context allows.

    Raises:
        InputError: as `pack_prompts` and `pack_draft_prompts`.
    """
    new = options.max_new_tokens
    packed = pack_prompts(prompts, target, new, multiple)
    followed = pack_draft_prompts(prompts, draft, target, new, draft_tokens, multiple)
    limit, places = int(packed.lengths.max()) + new, new + draft_tokens + 1
    noise = uniforms(options.seed, len(prompts), 0, places).swapaxes(0, 1)
    slots = cache_slots(target, limit, draft_tokens + 1), cache_slots(draft, limit, draft_tokens + 1)
    return Speculation(packed, followed, limit, places, noise, slots)
