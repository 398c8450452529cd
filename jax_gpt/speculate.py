"""Speculative decoding: a small draft proposes tokens, the target judges them all in one step.

Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2. `torch_gpt/speculate.py` is its twin.

A round: the draft writes k tokens one by one, the target gives its probabilities after each of them in one step of
k + 1 tokens, which costs little more than one of a single token as long as reading the weights is all the work. The
tokens before the first that it rejects are kept, and one of its own comes behind them. Rows advance apart.

A random number belongs to the seed, the row and the token's place in the text (`uniforms` in `generation.py`). A place
that is proposed a second time, since one before it was rejected, sees the same numbers again; nothing that was kept
depends on them, so the text is distributed as the target's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gpt_core.text.generation import (
    DRAW_ACCEPT,
    DRAW_DRAFT,
    DRAW_TOKEN,
    Party,
    SamplingConfig,
    Written,
    plan_speculation,
)
from jax_gpt.decode import Cache, Weights, prefill, prepare, step
from jax_gpt.generate import PROMPT_MULTIPLE, choose, distribution, draw, is_stop
from jax_gpt.model import GPT

ROUNDS = 4  # between two looks at what has been written


class Progress(NamedTuple):
    """Where speculation stands.

    Args:
        last: The last two tokens of each row, of which no cache holds the second, `[batch, 2]`.
        position: Of the last one, `[batch]`.
        written: The new tokens and room for those of a round beyond them, `[batch, new + draft_tokens + 1]`.
        length: How many of them stand, `[batch]`.
        done: Whether the row has ended, `[batch]`.
        accepted: Tokens of the draft that the target accepted, `[batch]`.
        proposed: Tokens that the draft proposed, `[batch]`.
        target_cache: The target's keys and values of all before the last token.
        draft_cache: The draft's; of the last token but one it may have none.
    """

    last: jax.Array
    position: jax.Array
    written: jax.Array
    length: jax.Array
    done: jax.Array
    accepted: jax.Array
    proposed: jax.Array
    target_cache: Cache
    draft_cache: Cache


def speculate(
    target: GPT,
    draft: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingConfig,
    *,
    draft_tokens: int = 3,
    target_weights: Weights | None = None,
    draft_weights: Weights | None = None,
) -> Written:
    """The new tokens of every row, up to and with a stop token.

    Args:
        target: The model whose text it is.
        draft: A smaller one of the same vocabulary.
        prompts: Token ids of each row, of any lengths.
        options: How tokens are chosen; the draft chooses in the same way.
        draft_tokens: Proposed in a round.
        target_weights: Of `prepare` with a limit that is high enough, so that many calls share them.
        draft_weights: The same of the draft.

    Raises:
        InputError: a prompt is empty, too long, or has ids outside the vocabulary; or the draft does not fit.
    """
    parts = stream(
        target,
        draft,
        prompts,
        options,
        draft_tokens=draft_tokens,
        target_weights=target_weights,
        draft_weights=draft_weights,
    )
    return Written.together(parts, len(prompts))


def stream(
    target: GPT,
    draft: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingConfig,
    *,
    draft_tokens: int = 3,
    target_weights: Weights | None = None,
    draft_weights: Weights | None = None,
    rounds: int = ROUNDS,
) -> Iterator[Written]:
    """As `speculate`, but every few rounds; a row that has ended gives nothing more."""
    plan = plan_speculation(prompts, target.config, draft.config, options, draft_tokens, PROMPT_MULTIPLE)
    noise, lengths, tokens = (jnp.asarray(x) for x in (plan.noise, plan.prompts.lengths, plan.prompts.tokens))
    logits, target_cache = prefill(target, tokens, lengths, plan.slots[0])
    _, draft_cache = prefill(draft, jnp.asarray(plan.draft_prompts.tokens), lengths, plan.slots[1])
    token = choose(logits, noise[:, 0, DRAW_TOKEN], options)
    before = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    zeros = jnp.zeros_like(lengths)
    progress = Progress(
        last=jnp.stack([before, token], axis=1),
        position=lengths,
        written=jnp.zeros((len(prompts), plan.places), token.dtype).at[:, 0].set(token),
        length=zeros + 1,
        done=is_stop(token, options) | (options.max_new_tokens == 1),
        accepted=zeros,
        proposed=zeros + 0,  # an array of its own: each is given away
        target_cache=target_cache,
        draft_cache=draft_cache,
    )
    yield Written.plain([[row] for row in token.tolist()])
    weights = target_weights or prepare(target, plan.limit), draft_weights or prepare(draft, plan.limit)
    parties = Party(target.config, target.precision), Party(draft.config, draft.precision)
    rule = replace(options, seed=0)  # what the compiled program depends on
    while not np.asarray(progress.done).all():
        length, accepted, proposed = (np.array(x) for x in (progress.length, progress.accepted, progress.proposed))
        progress = _rounds(weights, parties, rule, draft_tokens, rounds, noise, progress)
        ends = np.asarray(progress.length)
        rows = [
            row[start:end].tolist() for row, start, end in zip(np.asarray(progress.written), length, ends, strict=True)
        ]
        yield Written(rows, (progress.accepted - accepted).tolist(), (progress.proposed - proposed).tolist())


def advance(
    weights: tuple[Weights, Weights],
    parties: tuple[Party, Party],
    options: SamplingConfig,
    draft_tokens: int,
    noise: Float[jax.Array, "batch places draws"],
    progress: Progress,
) -> Progress:
    """One round.

    Args:
        weights: Of target and draft.
        parties: Target and draft.
        options: How tokens are chosen.
        draft_tokens: Proposed by the draft.
        noise: Random numbers for every new token.
        progress: Before it.
    """
    places = progress.length[:, None] + jnp.arange(draft_tokens + 1)  # [batch, draft_tokens + 1]
    noise = jnp.take_along_axis(noise, places[:, :, None], axis=1)  # of this round
    proposals, draft, draft_cache = propose(
        weights[1], parties[1], options, noise[:, :-1], progress.last, progress.position, progress.draft_cache
    )
    line = jnp.concatenate([progress.last[:, 1:], proposals], axis=1)
    logits, target_cache = step(weights[0], *parties[0], line, progress.position, progress.target_cache)
    tokens, accepted = judge(proposals, draft, logits, noise, options)
    index = jnp.arange(draft_tokens + 1)
    stop = is_stop(tokens, options) & (index <= accepted[:, None])
    stopped = stop.any(-1)
    room = jnp.where(progress.done, 0, options.max_new_tokens - progress.length)
    kept = jnp.minimum(jnp.where(stopped, stop.argmax(-1), accepted).astype(room.dtype) + 1, room)
    rows = jnp.arange(len(tokens))[:, None]
    return Progress(
        last=jnp.take_along_axis(
            jnp.concatenate([progress.last, tokens], axis=1), kept[:, None] + jnp.arange(2), axis=1
        ),
        position=progress.position + kept,
        written=progress.written.at[rows, places].set(tokens),
        length=progress.length + kept,
        done=progress.done | stopped | (kept == room),
        accepted=progress.accepted + jnp.minimum(accepted, room),
        proposed=progress.proposed + jnp.minimum(draft_tokens, room),
        target_cache=target_cache,
        draft_cache=draft_cache,
    )


def propose(
    weights: Weights,
    party: Party,
    options: SamplingConfig,
    noise: Float[jax.Array, "batch draft_tokens draws"],
    last: Int[jax.Array, "batch 2"],
    position: Int[jax.Array, " batch"],
    cache: Cache,
) -> tuple[Int[jax.Array, "batch draft_tokens"], Float[jax.Array, "batch draft_tokens known"] | None, Cache]:
    """Write a few tokens.

    Args:
        weights: Of the draft.
        party: The draft.
        options: How tokens are chosen.
        noise: Random numbers of every token to write.
        last: The last two tokens: of a round whose proposals were all accepted the cache lacks the last of them.
        position: Of the last token.
        cache: The draft's.

    Returns:
        The tokens; the probabilities that each was drawn from, None where the likeliest was taken; the cache.
    """
    tokens: list[jax.Array] = []
    probabilities: list[jax.Array] = []
    logits, cache = step(weights, *party, last, position - 1, cache)
    for index in range(noise.shape[1]):
        if index:
            logits, cache = step(weights, *party, tokens[-1][:, None], position + index, cache)
        if options.greedy:
            tokens.append(choose(logits[:, -1], noise[:, index, DRAW_DRAFT], options))
            continue
        probabilities.append(distribution(logits[:, -1], options))
        tokens.append(draw(probabilities[-1], noise[:, index, DRAW_DRAFT]))
    return jnp.stack(tokens, axis=1), jnp.stack(probabilities, axis=1) if probabilities else None, cache


def judge(
    proposals: Int[jax.Array, "batch draft_tokens"],
    draft: Float[jax.Array, "batch draft_tokens known"] | None,
    logits: Float[jax.Array, "batch places vocab"],
    noise: Float[jax.Array, "batch places draws"],
    options: SamplingConfig,
) -> tuple[Int[jax.Array, "batch places"], Int[jax.Array, " batch"]]:
    """Which proposals stand, and what comes behind them.

    A proposal x stands if u < p(x) / q(x), where u is a random number, p is the target's probability and q the draft's.
    Behind the last that stands comes a token drawn from the positive part of p - q or, if all stand, from p.

    Args:
        proposals: Of the draft.
        draft: The probabilities that each was drawn from; None if the likeliest was taken.
        logits: Of the target before each proposal and behind the last, `places` = draft_tokens + 1.
        noise: Random numbers of every place.
        options: How tokens are chosen.

    Returns:
        Tokens, of which those up to and with the first that is no proposal count; how many proposals stand.
    """
    if draft is None:
        chosen = choose(logits, noise[:, :, DRAW_TOKEN], options)
        stand = proposals == chosen[:, :-1]
        return chosen, jnp.cumprod(stand, axis=1).sum(-1).astype(jnp.int32)
    target = distribution(logits, options)
    p = jnp.take_along_axis(target[:, :-1], proposals[:, :, None], axis=2)[:, :, 0]
    q = jnp.take_along_axis(draft, proposals[:, :, None], axis=2)[:, :, 0]
    stand = noise[:, :-1, DRAW_ACCEPT].astype(q.dtype) * q < p
    accepted = jnp.cumprod(stand, axis=1).sum(-1).astype(jnp.int32)
    rest = jnp.maximum(target - jnp.pad(draft, ((0, 0), (0, 1), (0, 0))), 0)
    # Rounding may leave nothing where p and q are the same.
    rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, target)
    here = accepted[:, None]
    rest = jnp.take_along_axis(rest, here[:, :, None], axis=1)[:, 0]  # [batch, known]
    own = draw(rest, jnp.take_along_axis(noise[:, :, DRAW_TOKEN], here, axis=1)[:, 0])
    padded = jnp.pad(proposals, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(padded.shape[1]) == here, own[:, None], padded), accepted


@partial(jax.jit, static_argnums=(1, 2, 3), donate_argnums=6)
def _rounds(
    weights: tuple[Weights, Weights],
    parties: tuple[Party, Party],
    options: SamplingConfig,
    draft_tokens: int,
    rounds: int | jax.Array,
    noise: jax.Array,
    progress: Progress,
) -> Progress:
    """Some rounds, fewer where all rows end."""

    def unfinished(carry: tuple[jax.Array, Progress]) -> jax.Array:
        return (carry[0] < rounds) & ~carry[1].done.all()

    def body(carry: tuple[jax.Array, Progress]) -> tuple[jax.Array, Progress]:
        return carry[0] + 1, advance(weights, parties, options, draft_tokens, noise, carry[1])

    _, progress = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), progress))
    return progress
