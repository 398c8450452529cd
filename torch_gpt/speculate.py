"""Speculative decoding: a small draft proposes tokens, the target judges them all in one step.

Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2. `jax_gpt/speculate.py` is its twin.

A round: the draft writes k tokens one by one, the target gives its probabilities after each of them in one step of
k + 1 tokens, which costs little more than one of a single token as long as reading the weights is all the work. The
tokens before the first that it rejects are kept, and one of its own comes behind them. Rows advance apart.

A random number belongs to the seed, the row and the token's place in the text (`uniforms` in `generation.py`). A place
that is proposed a second time, since one before it was rejected, sees the same numbers again; nothing that was kept
depends on them, so the text is distributed as the target's own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from torch_gpt.decode import Cache, Weights, prefill, prepare, step
from torch_gpt.generate import choose, distribution, draw, is_stop
from torch_gpt.model import GPT

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

    last: torch.Tensor
    position: torch.Tensor
    written: torch.Tensor
    length: torch.Tensor
    done: torch.Tensor
    accepted: torch.Tensor
    proposed: torch.Tensor
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
    compiled: bool = False,
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
        compiled: Whether a step goes through `torch.compile`: some seconds once, then two to three times as fast.

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
        compiled=compiled,
    )
    return Written.together(parts, len(prompts))


@torch.no_grad()
def stream(
    target: GPT,
    draft: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingConfig,
    *,
    draft_tokens: int = 3,
    target_weights: Weights | None = None,
    draft_weights: Weights | None = None,
    compiled: bool = False,
    rounds: int = ROUNDS,
) -> Iterator[Written]:
    """As `speculate`, but every few rounds; a row that has ended gives nothing more."""
    plan = plan_speculation(prompts, target.config, draft.config, options, draft_tokens)
    device, packed = target.token_embedding.device, plan.prompts
    noise = torch.tensor(plan.noise, device=device)
    lengths, tokens = (torch.tensor(x, device=device, dtype=torch.int64) for x in (packed.lengths, packed.tokens))
    logits, target_cache = prefill(target, tokens, lengths, plan.slots[0])
    _, draft_cache = prefill(draft, tokens, lengths, plan.slots[1])
    token = choose(logits, noise[:, 0, DRAW_TOKEN], options)
    before = tokens.take_along_dim(lengths[:, None] - 1, dim=1)[:, 0]
    zeros = torch.zeros_like(lengths)
    written = torch.zeros((len(prompts), plan.places), dtype=torch.int64, device=device)
    written[:, 0] = token
    progress = Progress(
        last=torch.stack([before, token], dim=1),
        position=lengths,
        written=written,
        length=zeros + 1,
        done=is_stop(token, options) | (options.max_new_tokens == 1),
        accepted=zeros,
        proposed=zeros,
        target_cache=target_cache,
        draft_cache=draft_cache,
    )
    yield Written.plain([[row] for row in token.tolist()])
    weights = target_weights or prepare(target, plan.limit), draft_weights or prepare(draft, plan.limit)
    parties = Party(target.config, target.precision), Party(draft.config, draft.precision)
    while not progress.done.all():
        length, accepted, proposed = progress.length, progress.accepted, progress.proposed
        for _ in range(rounds):
            if not progress.done.all():
                progress = advance(weights, parties, options, draft_tokens, noise, progress, compiled)
        ends = zip(progress.written.tolist(), length.tolist(), progress.length.tolist(), strict=True)
        rows = [row[start:end] for row, start, end in ends]
        yield Written(rows, (progress.accepted - accepted).tolist(), (progress.proposed - proposed).tolist())


def advance(
    weights: tuple[Weights, Weights],
    parties: tuple[Party, Party],
    options: SamplingConfig,
    draft_tokens: int,
    noise: Float[torch.Tensor, "batch places draws"],
    progress: Progress,
    compiled: bool = False,
) -> Progress:
    """One round.

    Args:
        weights: Of target and draft.
        parties: Target and draft.
        options: How tokens are chosen.
        draft_tokens: Proposed by the draft.
        noise: Random numbers for every new token.
        progress: Before it; its caches and `written` are changed.
        compiled: Whether steps go through `torch.compile`.
    """
    index = torch.arange(draft_tokens + 1, device=noise.device)
    places = progress.length[:, None] + index  # [batch, draft_tokens + 1]
    noise = noise.take_along_dim(places[:, :, None], dim=1)  # of this round
    proposals, draft, draft_cache = propose(
        weights[1], parties[1], options, noise[:, :-1], progress.last, progress.position, progress.draft_cache, compiled
    )
    line = torch.cat([progress.last[:, 1:], proposals], dim=1)
    logits, target_cache = step(weights[0], *parties[0], line, progress.position, progress.target_cache, compiled)
    tokens, accepted = judge(proposals, draft, logits, noise, options)
    stop = is_stop(tokens, options) & (index <= accepted[:, None])
    stopped = stop.any(-1)
    room = torch.where(progress.done, 0, options.max_new_tokens - progress.length)
    kept = torch.minimum(torch.where(stopped, stop.int().argmax(-1), accepted) + 1, room)
    last = torch.cat([progress.last, tokens], dim=1).take_along_dim(kept[:, None] + index[:2], dim=1)
    return Progress(
        last=last,
        position=progress.position + kept,
        written=progress.written.scatter_(1, places, tokens),
        length=progress.length + kept,
        done=progress.done | stopped | (kept == room),
        accepted=progress.accepted + torch.minimum(accepted, room),
        proposed=progress.proposed + room.clamp(max=draft_tokens),
        target_cache=target_cache,
        draft_cache=draft_cache,
    )


def propose(
    weights: Weights,
    party: Party,
    options: SamplingConfig,
    noise: Float[torch.Tensor, "batch draft_tokens draws"],
    last: Int[torch.Tensor, "batch 2"],
    position: Int[torch.Tensor, " batch"],
    cache: Cache,
    compiled: bool = False,
) -> tuple[Int[torch.Tensor, "batch draft_tokens"], Float[torch.Tensor, "batch draft_tokens known"] | None, Cache]:
    """Write a few tokens.

    Args:
        weights: Of the draft.
        party: The draft.
        options: How tokens are chosen.
        noise: Random numbers of every token to write.
        last: The last two tokens: of a round whose proposals were all accepted the cache lacks the last of them.
        position: Of the last token.
        cache: The draft's.
        compiled: Whether steps go through `torch.compile`.

    Returns:
        The tokens; the probabilities that each was drawn from, None where the likeliest was taken; the cache.
    """
    tokens: list[torch.Tensor] = []
    probabilities: list[torch.Tensor] = []
    logits, cache = step(weights, *party, last, position - 1, cache, compiled)
    for index in range(noise.shape[1]):
        if index:
            logits, cache = step(weights, *party, tokens[-1][:, None], position + index, cache, compiled)
        if options.greedy:
            tokens.append(choose(logits[:, -1], noise[:, index, DRAW_DRAFT], options))
            continue
        probabilities.append(distribution(logits[:, -1], options))
        tokens.append(draw(probabilities[-1], noise[:, index, DRAW_DRAFT]))
    return torch.stack(tokens, dim=1), torch.stack(probabilities, dim=1) if probabilities else None, cache


def judge(
    proposals: Int[torch.Tensor, "batch draft_tokens"],
    draft: Float[torch.Tensor, "batch draft_tokens known"] | None,
    logits: Float[torch.Tensor, "batch places vocab"],
    noise: Float[torch.Tensor, "batch places draws"],
    options: SamplingConfig,
) -> tuple[Int[torch.Tensor, "batch places"], Int[torch.Tensor, " batch"]]:
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
        return chosen, stand.cumprod(dim=1).sum(-1)
    target = distribution(logits, options)
    p = target[:, :-1].take_along_dim(proposals[:, :, None], dim=2)[:, :, 0]
    q = draft.take_along_dim(proposals[:, :, None], dim=2)[:, :, 0]
    stand = noise[:, :-1, DRAW_ACCEPT].to(q.dtype) * q < p
    accepted = stand.cumprod(dim=1).sum(-1)
    rest = (target - F.pad(draft, (0, 0, 0, 1))).clamp(min=0)
    # Rounding may leave nothing where p and q are the same.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)
    here = accepted[:, None]
    rest = rest.take_along_dim(here[:, :, None], dim=1)[:, 0]  # [batch, known]
    own = draw(rest, noise[:, :, DRAW_TOKEN].take_along_dim(here, dim=1)[:, 0])
    padded = F.pad(proposals, (0, 1))
    return torch.where(torch.arange(padded.shape[1], device=here.device) == here, own[:, None], padded), accepted
