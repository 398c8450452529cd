"""The grid: twelve attention variants and a covering of all other choices, small but sharp, on real text.

Sizes are chosen so that a mistake moves the logits by O(1): two batches, a sequence of more than two windows that
is no multiple of one, a number of kv heads that is neither 1 nor the number of heads, and a padded vocabulary. The
vocabulary is the first 5,000 pieces of GPT-2's in the twelve, and the few hundred that the text consists of in the
others, so that most of the time goes to attention and not to the head; checkpoints with all 50,257 are compared by
`parity check A B` and `parity verify`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import sqrt

import numpy as np
import numpy.typing as npt

from gpt_core.config import ModelConfig, Position
from gpt_core.data.stdlib import prose
from gpt_core.errors import InputError
from gpt_core.parameters import parameter_table
from gpt_core.storage.weights import Weights, weights_source
from gpt_core.text.gpt2 import gpt2_tokenizer
from parity.comparison.routing import least_margin
from parity.grid.covering import covering
from parity.sides import side_of
from parity.sides.runs import Batch, Batches, PackedText, RaggedText

BATCH, TIME, WINDOW = 2, 37, 13
PROMPTS = (1, 6, 20)  # tokens of each prompt that is decoded from: the least, below the window, beyond it
NEW_TOKENS = TIME - min(PROMPTS)  # that are written behind each: over four windows in all

DOCUMENTS = ((5, 20, 12), (14, 1, 22))
"""Lengths of documents in each row: shorter than the window, longer than it, and a single token."""

_FURTHER = ("learned-mha-full", "rope-gqa-window", "rope-gqa-window-moe")
"""Cases in which what goes beyond one model on one text is checked by default: the two kinds of positions and masks,
and a mixture."""

LEAST_MARGIN = 1e-3
"""Least gap between the scores of a mixture that decide, in fp64 on the grid's text: beyond what fp32 rounds, 2e-6."""

_SEEDS = 64  # of which one in three gives such margins

_ORDINARY = 5000
"""Pieces of GPT-2's vocabulary, the first ones, that make up ordinary text."""

_BASE = ModelConfig(
    vocab_size=_ORDINARY,
    pad_vocab_size_multiple=64,
    context_length=64,
    n_layers=3,
    n_heads=6,
    embed_dim=48,
)
_POSITIONS: tuple[Position, ...] = ("learned", "rope")
_KV_HEADS = {"mha": 6, "gqa": 2, "mqa": 1}
_MASKS = {"full": None, "window": WINDOW}
_MIXTURE = replace(
    _BASE,
    vocab_size=400,
    n_layers=2,
    position="rope",
    rope_theta=100.0,
    norm="rms",
    norm_eps=2e-3,
    activation="silu",
    gated_mlp=True,
    bias=False,
    qkv_bias=False,
    mlp_bias=False,
    mlp_dim=40,
)


@dataclass(frozen=True)
class Case:
    """One line of the grid.

    Args:
        variant: Its name.
        config: The model.
        scan_layers: Whether the JAX twin scans over stacked blocks.
        description: What it has, where the name does not say it; "" for the twelve.
        brief: Whether decoding, steps of training and bf16 are left to the cases before it; not with --full.
        grouped: The framework whose experts run `grouped`; those of the other one are the definition.
    """

    variant: str
    config: ModelConfig
    scan_layers: bool = True
    description: str = ""
    brief: bool = False
    grouped: str = ""

    @property
    def further(self) -> bool:
        """Whether documents in a row, adapters and conversations are checked in it where cases are not named."""
        return self.variant in _FURTHER

    @property
    def covering(self) -> bool:
        """Whether it is one of the cases beyond the twelve, of which some checks are left to the twelve."""
        return bool(self.description)


def attention_variants() -> list[Case]:
    """The twelve: position x heads x mask."""
    return [
        Case(
            f"{position}-{heads}-{mask}",
            replace(_BASE, position=position, n_kv_heads=_KV_HEADS[heads], sliding_window=_MASKS[mask]),
        )
        for position, heads, mask in product(_POSITIONS, _KV_HEADS, _MASKS)
    ]


def covering_cases() -> list[Case]:
    """Every pair of choices of the family; a case that brings no choice of its own is brief."""
    return [
        Case(chosen.name, chosen.config, chosen.scan_layers, chosen.description, brief=not chosen.new)
        for chosen in covering(_BASE, WINDOW)
    ]


def mixture_cases() -> list[Case]:
    """Mixtures of experts, in each of which one framework runs the definition and the other grouped products."""
    mixtral = replace(_MIXTURE, n_kv_heads=2, sliding_window=WINDOW, n_experts=5)
    olmoe = replace(_MIXTURE, qk_norm="whole", n_experts=11, experts_per_token=3, expert_dim=24, router_normalise=False)
    return [
        Case("rope-gqa-window-moe", mixtral, description="5 experts, 2 active, as in Mixtral", grouped="torch"),
        Case("rope-mha-full-moe", olmoe, description="11 experts, 3 active, as in OLMoE", grouped="jax"),
    ]


def grid() -> list[Case]:
    """Every case of the default run."""
    return [*attention_variants(), *covering_cases(), *mixture_cases()]


def select(names: list[str]) -> list[Case]:
    """The cases of these names; all of them when there are none.

    Raises:
        InputError: a name is unknown; the message lists the known.
    """
    known = {case.variant: case for case in grid()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"unknown variant {', '.join(map(repr, unknown))}; known are: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())


def sharp_weights(config: ModelConfig) -> Weights:
    """fp64 weights under which every part of the model matters.

    Matrices and embeddings are N(0, `sharpness`), so that attention is sharp; biases and norm scales are away from the
    0 and 1 at which they could be forgotten. Each parameter is drawn from a stream of its own. Those of a mixture send
    each token of the grid's text to its experts by `LEAST_MARGIN` at least.
    """
    return _drawn(config, _seed_of(config) if config.n_experts else 0)


@lru_cache(maxsize=16)
def _seed_of(config: ModelConfig) -> int:
    """The first seed whose weights leave margins.

    Raises:
        InputError: PyTorch, which computes them, is not installed.
    """
    side, tokens = side_of("torch"), text_tokens(config.vocab_size)
    for seed in range(_SEEDS):
        model = side.build(config, weights_source(_drawn(config, seed)), "float64")
        if least_margin(side.run(model, tokens).sites) >= LEAST_MARGIN:
            return seed
    raise AssertionError(f"none of {_SEEDS} seeds leaves margins of {LEAST_MARGIN} in {config}")


def _drawn(config: ModelConfig, seed: int) -> Weights:
    weights: Weights = {}
    for name, parameter in parameter_table(config).items():
        random = np.random.default_rng([seed, parameter.stream])
        if parameter.decay:
            weights[name] = random.normal(0.0, sharpness(config, name), parameter.shape)
        else:
            sign = random.choice([-1.0, 1.0], parameter.shape)
            weights[name] = parameter.mean + sign * random.uniform(0.1, 0.5, parameter.shape)
    return weights


def sharpness(config: ModelConfig, name: str) -> float:
    """Standard deviation of a matrix or an embedding.

    Half as much where an MLP reads the stream and no norm of it: its activation would saturate, and the gradients of
    what is flat be nothing but rounding.
    """
    flat = config.norm_placement == "post" and name.endswith((".up.kernel", ".gate.kernel"))
    return (0.8 if flat else 1.6) / sqrt(config.embed_dim)


def text_tokens(vocab_size: int, batch: int = BATCH, time: int = TIME) -> npt.NDArray[np.int64]:
    """Real text through the GPT-2 BPE: `[batch, time]`, rows from different places.

    Args:
        vocab_size: Passages are chosen all of whose ids are below it. (GPT-2's ids are ordered by how early a piece
            was merged, so passages of ordinary words stay below a few thousand.) For a smaller one, the pieces of such
            passages are numbered anew.
        batch: Rows.
        time: Tokens a row.
    """
    passages = _passages(vocab_size, time) if vocab_size >= _ORDINARY else _renumbered(vocab_size, time)
    return passages[np.linspace(0, len(passages) - 1, batch, dtype=np.int64)]


@lru_cache(maxsize=4)
def _renumbered(vocab_size: int, time: int) -> npt.NDArray[np.int64]:
    passages = _passages(_ORDINARY, time)
    pieces, numbers = np.unique(passages, return_inverse=True)
    assert len(pieces) <= vocab_size, f"{len(pieces)} pieces for a vocabulary of {vocab_size}"
    spread = np.random.default_rng(0).permutation(vocab_size)[: len(pieces)]  # rare pieces beside frequent ones
    return spread[numbers].reshape(passages.shape)


@lru_cache(maxsize=4)
def _passages(vocab_size: int, time: int) -> npt.NDArray[np.int64]:
    ids = np.asarray(gpt2_tokenizer().encode(prose()), np.int64)
    passages = np.lib.stride_tricks.sliding_window_view(ids, time)[::5]
    ordinary = passages[(passages < vocab_size).all(axis=1)]
    return np.asarray([row for row in ordinary if len(set(row.tolist())) > time // 2])  # no tables or rules


def text_batches(vocab_size: int, steps: int) -> Batches:
    """Real text for some steps of training, another passage in every row."""
    rows = text_tokens(vocab_size, batch=BATCH * steps).reshape(steps, BATCH, TIME)
    return [(tokens, next_token_batch(tokens)) for tokens in rows]


def next_token_batch(tokens: npt.NDArray[np.int64]) -> Batch:
    """Targets one to the left, with an uneven mask: the last position has no target, and some are left out."""
    mask = np.ones(tokens.shape, np.bool_)
    mask[:, -1] = False
    mask[0, 3:8] = False
    return Batch(targets=np.roll(tokens, -1, axis=1), mask=mask)


def ragged_text(tokens: npt.NDArray[np.int64]) -> RaggedText:
    """Prompts of different length from these rows, and the rest of each row behind them."""
    return RaggedText(tokens, rows=tuple(row % len(tokens) for row in range(len(PROMPTS))), lengths=PROMPTS)


def packed_text(tokens: npt.NDArray[np.int64]) -> PackedText:
    """These rows, each cut into documents."""
    return PackedText(tokens, DOCUMENTS)
