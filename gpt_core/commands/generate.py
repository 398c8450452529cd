"""The words and flags that `jax-gpt generate` and `torch-gpt generate` share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from gpt_core.cli import SUCCESS, parser, print_json
from gpt_core.errors import InputError
from gpt_core.precision import PARAM_DTYPES, Precision
from gpt_core.runs.folder import find_checkpoint
from gpt_core.storage.checkpoint_config import read_checkpoint_config
from gpt_core.text.finding import text_tokenizer
from gpt_core.text.generation import SamplingConfig, Written, pack_draft_prompts, pack_prompts
from gpt_core.text.tokenizer import Tokenizer

Chunks = Iterator[Written]


class Request(NamedTuple):
    """What a command line of `generate` asks for."""

    checkpoint: Path
    precision: Precision
    prompts: list[list[int]]
    options: SamplingConfig
    draft: Path | None
    draft_tokens: int


def generate_parser(program: str) -> ArgumentParser:
    """Of the subcommand `generate`: a checkpoint, prompts, and how tokens are chosen."""
    command = parser(
        "Continue prompts; text appears as it is written.",
        f"  {program} generate runs/tiny-cpu 'def main('\n"
        f"  {program} generate runs/tiny-cpu@best 'import ' 'class ' --temperature 0.8 --top-p 0.95 --seed 1\n"
        f"  {program} generate runs/large 'def main(' --draft runs/tiny-cpu --draft-tokens 4   # the same text, sooner",
    )
    command.add_argument("checkpoint", help="RUN, RUN@STEP, RUN@best, RUN@last, or the folder of a model")
    command.add_argument("prompts", nargs="+", help="texts to continue, all at once")
    command.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write at most")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    command.add_argument("--top-k", type=int, help="keep so many of the most likely tokens")
    command.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens of this probability")
    command.add_argument("--stop", help="end with this text's first token; default: the end-of-text token")
    command.add_argument("--seed", type=int, default=0, help="of the random numbers: the same text in either framework")
    command.add_argument("--draft", help="a smaller model of the same tokenizer, which proposes tokens (speculative)")
    command.add_argument("--draft-tokens", type=int, default=3, help="that the draft proposes at once")
    command.add_argument("--dtype", choices=list(PARAM_DTYPES), default="float32", help="of weights and computation")
    command.add_argument("--json", action="store_true", help="print prompts, texts and token ids as JSON")
    return command


def generate_command(options: Namespace, start: Callable[[Request], Chunks]) -> int:
    """Run `generate` with a framework's function.

    Args:
        options: Of the command line.
        start: Loads the model and gives the new tokens of every row, chunk by chunk.

    Raises:
        InputError: a bad checkpoint, prompt or option.
    """
    checkpoint = find_checkpoint(options.checkpoint)
    config = read_checkpoint_config(checkpoint)
    tokenizer = text_tokenizer(checkpoint, "`generate` in code takes token ids")
    if options.stop == "":
        raise InputError("--stop is an empty text; give one with at least one token")
    stop = tokenizer.end_of_text if options.stop is None else tokenizer.encode(options.stop)[0]
    sampling = SamplingConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=(stop,),
        seed=options.seed,
        known_tokens=tokenizer.vocab_size,
    )
    prompts = [tokenizer.encode(prompt) for prompt in options.prompts]
    pack_prompts(prompts, config, sampling.max_new_tokens)  # a mistake is named before weights are read
    draft = None if options.draft is None else find_checkpoint(options.draft)
    if draft is not None:
        draft_config = read_checkpoint_config(draft)
        pack_draft_prompts(prompts, draft_config, config, sampling.max_new_tokens, options.draft_tokens)
    precision = Precision(options.dtype, options.dtype)
    chunks = start(Request(checkpoint, precision, prompts, sampling, draft, options.draft_tokens))
    if not options.json and len(prompts) == 1:
        chunks = _printed_as_it_comes(prompts[0], chunks, tokenizer)
    whole = Written.together(chunks, len(prompts))
    texts = [tokenizer.decode(row) for row in whole.rows]
    if options.json:
        rows = zip(options.prompts, texts, *whole, strict=True)
        keys = ("prompt", "text", "tokens", "accepted", "proposed")[: 3 if draft is None else 5]
        print_json([dict(zip(keys, row, strict=False)) for row in rows])
    elif len(prompts) > 1:
        print("\n\n".join(prompt + text for prompt, text in zip(options.prompts, texts, strict=True)))
    if draft is not None:
        accepted, proposed = sum(whole.accepted), sum(whole.proposed)
        rate = f" ({accepted / proposed:.0%})" if proposed else ""
        print(f"{accepted} of {proposed} proposed tokens accepted{rate}", file=sys.stderr)
    return SUCCESS


def _printed_as_it_comes(prompt: list[int], chunks: Chunks, tokenizer: Tokenizer) -> Chunks:
    tokens, shown = list(prompt), ""
    for chunk in chunks:
        yield chunk
        tokens += chunk.rows[0]
        text = tokenizer.decode(tokens).rstrip("\ufffd")  # half a character is shown when its other half comes
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print(tokenizer.decode(tokens)[len(shown) :])
