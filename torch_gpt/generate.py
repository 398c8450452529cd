"""Writing text: prompts at once, then token by token through a cache. `jax_gpt/generate.py` is its twin.

Random numbers come from `gpt_core.text.generation`, so that both twins draw the same tokens for the same seed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int

from gpt_core.text.generation import DRAW_TOKEN, SamplingConfig, cache_slots, pack_prompts, uniforms
from torch_gpt.decode import Cache, Weights, prefill, prepare, step
from torch_gpt.model import GPT

CHUNK = 16  # tokens between two looks at what has been written


class Progress(NamedTuple):
    """Where decoding stands.

    Args:
        token: The last token of each row, which no cache holds yet, `[batch]`.
        position: Its position, `[batch]`.
        done: Whether the row has met a stop token, `[batch]`.
        cache: Keys and values of all before.
    """

    token: torch.Tensor
    position: torch.Tensor
    done: torch.Tensor
    cache: Cache


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingConfig,
    *,
    weights: Weights | None = None,
    compiled: bool = False,
) -> list[list[int]]:
    """The new tokens of every row, up to and with a stop token.

    Args:
        model: The model.
        prompts: Token ids of each row, of any lengths.
        options: How tokens are chosen.
        weights: Of `prepare` with a limit that is high enough, so that many calls share them.
        compiled: Whether a step goes through `torch.compile`: some seconds once, then two to three times as fast.

    Raises:
        InputError: a prompt is empty, too long, or has ids outside the vocabulary.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in stream(model, prompts, options, weights=weights, compiled=compiled):
        for row, new in zip(rows, chunk, strict=True):
            row += new
    return rows


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: SamplingConfig,
    *,
    weights: Weights | None = None,
    compiled: bool = False,
    chunk: int = CHUNK,
) -> Iterator[list[list[int]]]:
    """As `generate`, but every `chunk` tokens; a row that has ended gives nothing more."""
    config = model.config
    packed = pack_prompts(prompts, config, options.max_new_tokens)
    limit = int(packed.lengths.max()) + options.max_new_tokens
    noise = torch.tensor(uniforms(options.seed, len(prompts), 0, options.max_new_tokens)[..., DRAW_TOKEN])
    noise = noise.to(model.token_embedding.device)
    lengths = torch.tensor(packed.lengths, device=noise.device, dtype=torch.int64)
    tokens = torch.tensor(packed.tokens, device=noise.device, dtype=torch.int64)
    logits, cache = prefill(model, tokens, lengths, cache_slots(config, limit, 1))
    token = choose(logits, noise[0], options)
    progress = Progress(token, lengths, is_stop(token, options), cache)
    yield [[new] for new in token.tolist()]
    weights = weights or prepare(model, limit)
    for first in range(1, options.max_new_tokens, chunk):
        done = progress.done.tolist()
        if all(done):
            return
        written = []
        for index in range(first, min(first + chunk, options.max_new_tokens)):
            token, position, ended, cache = progress
            logits, cache = step(weights, config, model.precision, token[:, None], position, cache, compiled)
            token = choose(logits[:, 0], noise[index], options)
            progress = Progress(token, position + 1, ended | is_stop(token, options), cache)
            written.append(token)
        new = torch.stack(written, dim=1)
        yield [[] if done[row] else up_to_stop(new[row], options) for row in range(len(new))]


def choose(
    logits: Float[torch.Tensor, "*rows vocab"], noise: Float[torch.Tensor, "*rows"], options: SamplingConfig
) -> Int[torch.Tensor, "*rows"]:
    """A token for each row, by a random number in [0, 1)."""
    if options.greedy:
        return logits[..., : options.known_tokens].argmax(-1)
    return draw(distribution(logits, options), noise)


def distribution(
    logits: Float[torch.Tensor, "*rows vocab"], options: SamplingConfig
) -> Float[torch.Tensor, "*rows known"]:
    """Probabilities of the known tokens after temperature, top-k and then top-p; greedy has all of it on one token."""
    logits = logits[..., : options.known_tokens]
    if options.greedy:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    scaled = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        least = scaled.topk(options.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = torch.softmax(scaled, dim=-1)
    if options.top_p < 1:
        ordered = probabilities.sort(dim=-1, descending=True).values
        before = ordered.cumsum(-1) - ordered  # of all that are more likely
        least = ordered.masked_fill(before >= options.top_p, torch.inf).amin(-1, keepdim=True)
        kept = probabilities.masked_fill(probabilities < least, 0)
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities


def draw(
    probabilities: Float[torch.Tensor, "*rows vocab"], noise: Float[torch.Tensor, "*rows"]
) -> Int[torch.Tensor, "*rows"]:
    """The token in whose share of the summed probabilities a random number in [0, 1) falls; never an impossible one."""
    reached = probabilities.cumsum(-1)  # on a GPU summed in parts: rounding can make it fall, also at the end
    beyond = reached > noise[..., None].to(reached.dtype) * reached[..., -1:]
    possible = probabilities > 0
    places = torch.arange(possible.shape[-1], device=possible.device)
    last = torch.where(possible, places, 0).amax(-1, keepdim=True)
    return (possible & (beyond | (places == last))).int().argmax(-1)


def is_stop(token: Int[torch.Tensor, "*rows"], options: SamplingConfig) -> Bool[torch.Tensor, "*rows"]:
    """Which rows end with this token."""
    return torch.isin(token, torch.tensor(options.stop_tokens, dtype=token.dtype, device=token.device))


def up_to_stop(tokens: Int[torch.Tensor, " new"], options: SamplingConfig) -> list[int]:
    """The tokens up to and with the first stop token."""
    row: list[int] = tokens.tolist()
    ends = [index for index, token in enumerate(row) if token in options.stop_tokens]
    return row[: ends[0] + 1] if ends else row
