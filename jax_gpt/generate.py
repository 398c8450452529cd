"""Writing text: prompts at once, then token by token through a cache. `torch_gpt/generate.py` is its twin.

Random numbers come from `gpt_core.text.generation`, so that both twins draw the same tokens for the same seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gpt_core.config import ModelConfig
from gpt_core.precision import Precision
from gpt_core.text.generation import DRAW_TOKEN, SamplingConfig, cache_slots, pack_prompts, uniforms
from jax_gpt.decode import Cache, Weights, prefill, prepare, step
from jax_gpt.model import GPT

PROMPT_MULTIPLE = 32  # prompts are filled up to it, so that not every length is compiled anew
CHUNK = 16  # tokens between two looks at what has been written


class Progress(NamedTuple):
    """Where decoding stands.

    Args:
        token: The last token of each row, which no cache holds yet, `[batch]`.
        position: Its position, `[batch]`.
        done: Whether the row has met a stop token, `[batch]`.
        cache: Keys and values of all before.
    """

    token: jax.Array
    position: jax.Array
    done: jax.Array
    cache: Cache


def generate(
    model: GPT, prompts: Sequence[Sequence[int]], options: SamplingConfig, *, weights: Weights | None = None
) -> list[list[int]]:
    """The new tokens of every row, up to and with a stop token.

    Args:
        model: The model.
        prompts: Token ids of each row, of any lengths.
        options: How tokens are chosen.
        weights: Of `prepare` with a limit that is high enough, so that many calls share them.

    Raises:
        InputError: a prompt is empty, too long, or has ids outside the vocabulary.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in stream(model, prompts, options, weights=weights):
        for row, new in zip(rows, chunk, strict=True):
            row += new
    return rows


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingConfig,
    *,
    weights: Weights | None = None,
    chunk: int = CHUNK,
) -> Iterator[list[list[int]]]:
    """As `generate`, but every `chunk` tokens; a row that has ended gives nothing more."""
    config = model.config
    packed = pack_prompts(prompts, config, options.max_new_tokens, PROMPT_MULTIPLE)
    limit = int(packed.lengths.max()) + options.max_new_tokens
    noise = uniforms(options.seed, len(prompts), 0, options.max_new_tokens)[..., DRAW_TOKEN]
    rule = replace(options, max_new_tokens=1, seed=0)  # what the compiled program depends on
    lengths = jnp.asarray(packed.lengths)
    logits, cache = prefill(model, jnp.asarray(packed.tokens), lengths, cache_slots(config, limit, 1))
    token = choose(logits, jnp.asarray(noise[0]), rule)
    progress = Progress(token, lengths, is_stop(token, rule), cache)
    yield [[int(new)] for new in token]
    weights = weights or prepare(model, limit)
    for first in range(1, options.max_new_tokens, chunk):
        done = np.asarray(progress.done)
        if done.all():
            return
        part = noise[first : first + chunk]
        count = len(part)
        part = np.pad(part, ((0, chunk - count), (0, 0)))
        new, progress = _decode(weights, config, model.precision, rule, part, count, progress)
        written = [
            [] if ended else up_to_stop(row, rule) for row, ended in zip(np.asarray(new)[:, :count], done, strict=True)
        ]
        yield written


def choose(
    logits: Float[jax.Array, "*rows vocab"], noise: Float[jax.Array, "*rows"], options: SamplingConfig
) -> Int[jax.Array, "*rows"]:
    """A token for each row, by a random number in [0, 1)."""
    if options.greedy:
        return logits[..., : options.known_tokens].argmax(-1).astype(jnp.int32)
    return draw(distribution(logits, options), noise)


def distribution(logits: Float[jax.Array, "*rows vocab"], options: SamplingConfig) -> Float[jax.Array, "*rows known"]:
    """Probabilities of the known tokens after temperature, top-k and then top-p; greedy has all of it on one token."""
    logits = logits[..., : options.known_tokens]
    if options.greedy:
        return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)
    scaled = (logits - logits.max(-1, keepdims=True)) / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        least = jax.lax.top_k(scaled, options.top_k)[0][..., -1:]
        scaled = jnp.where(scaled >= least, scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled, axis=-1)
    if options.top_p < 1:
        ordered = jnp.sort(probabilities, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered  # of all that are more likely
        least = jnp.where(before < options.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        kept = jnp.where(probabilities >= least, probabilities, 0)
        probabilities = kept / kept.sum(-1, keepdims=True)
    return probabilities


def draw(probabilities: Float[jax.Array, "*rows vocab"], noise: Float[jax.Array, "*rows"]) -> Int[jax.Array, "*rows"]:
    """The token in whose share of the summed probabilities a random number in [0, 1) falls; never an impossible one."""
    reached = jnp.cumsum(probabilities, axis=-1)  # summed in parts: rounding can make it fall, also at the end
    beyond = reached > noise[..., None].astype(reached.dtype) * reached[..., -1:]
    possible = probabilities > 0
    places = jnp.arange(possible.shape[-1])
    last = jnp.where(possible, places, 0).max(-1, keepdims=True)
    return (possible & (beyond | (places == last))).argmax(-1).astype(jnp.int32)


def is_stop(token: Int[jax.Array, "*rows"], options: SamplingConfig) -> jax.Array:
    """Which rows end with this token."""
    return jnp.isin(token, jnp.asarray(options.stop_tokens, jnp.int32))


def up_to_stop(tokens: np.ndarray, options: SamplingConfig) -> list[int]:
    """The tokens up to and with the first stop token."""
    row = tokens.tolist()
    ends = [index for index, token in enumerate(row) if token in options.stop_tokens]
    return row[: ends[0] + 1] if ends else row


@partial(jax.jit, static_argnums=(1, 2, 3), donate_argnums=6)
def _decode(
    weights: Weights,
    config: ModelConfig,
    precision: Precision,
    options: SamplingConfig,
    noise: jax.Array,
    count: int | jax.Array,
    progress: Progress,
) -> tuple[jax.Array, Progress]:
    """Up to `count` tokens, fewer where all rows have ended: `[batch, chunk]`, and how decoding stands then."""

    def unfinished(carry: tuple[jax.Array, jax.Array, Progress]) -> jax.Array:
        index, _, progress = carry
        return (index < count) & ~progress.done.all()

    def body(carry: tuple[jax.Array, jax.Array, Progress]) -> tuple[jax.Array, jax.Array, Progress]:
        index, written, (token, position, done, cache) = carry
        logits, cache = step(weights, config, precision, token[:, None], position, cache)
        token = choose(logits[:, 0], noise[index], options)
        written = written.at[:, index].set(token)
        return index + 1, written, Progress(token, position + 1, done | is_stop(token, options), cache)

    written = jnp.zeros((progress.token.shape[0], noise.shape[0]), jnp.int32)
    _, written, progress = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), written, progress))
    return written, progress
