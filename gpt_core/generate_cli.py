"""The words and flags that `jax-gpt generate` and `torch-gpt generate` share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from gpt_core.checkpoint_config import read_checkpoint_config
from gpt_core.cli import SUCCESS, parser, print_json
from gpt_core.errors import InputError
from gpt_core.generation import SamplingConfig, pack_prompts
from gpt_core.precision import PARAM_DTYPES, Precision
from gpt_core.runs import find_checkpoint
from gpt_core.tokenizer import Tokenizer, tokenizer_of

Chunks = Iterator[list[list[int]]]


class Request(NamedTuple):
    """What a command line of `generate` asks for."""

    checkpoint: Path
    precision: Precision
    prompts: list[list[int]]
    options: SamplingConfig


def generate_parser(program: str) -> ArgumentParser:
    """Of the subcommand `generate`: a checkpoint, prompts, and how tokens are chosen."""
    command = parser(
        "Continue prompts; text appears as it is written.",
        f"  {program} generate runs/tiny-cpu 'def main('\n"
        f"  {program} generate runs/tiny-cpu@best 'import ' 'class ' --temperature 0.8 --top-p 0.95 --seed 1",
    )
    command.add_argument("checkpoint", help="RUN, RUN@STEP, RUN@best, RUN@last, or the folder of a model")
    command.add_argument("prompts", nargs="+", help="texts to continue, all at once")
    command.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write at most")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    command.add_argument("--top-k", type=int, help="keep so many of the most likely tokens")
    command.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens of this probability")
    command.add_argument("--stop", help="end with this text's first token; default: the end-of-text token")
    command.add_argument("--seed", type=int, default=0, help="of the random numbers: the same text in either framework")
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
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise InputError(f"{checkpoint}: has no tokenizer beside its weights, so text cannot be read or written")
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
    )
    prompts = [tokenizer.encode(prompt) for prompt in options.prompts]
    pack_prompts(prompts, config, sampling.max_new_tokens)  # a mistake is named before weights are read
    request = Request(checkpoint, Precision(options.dtype, options.dtype), prompts, sampling)
    chunks = start(request)
    if not options.json and len(prompts) == 1:
        _print_as_it_comes(prompts[0], chunks, tokenizer)
        return SUCCESS
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in chunks:
        for row, new in zip(rows, chunk, strict=True):
            row += new
    texts = [tokenizer.decode(row) for row in rows]
    if options.json:
        keys = ("prompt", "text", "tokens")
        print_json([dict(zip(keys, values, strict=True)) for values in zip(options.prompts, texts, rows, strict=True)])
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(options.prompts, texts, strict=True)))
    return SUCCESS


def _print_as_it_comes(prompt: list[int], chunks: Chunks, tokenizer: Tokenizer) -> None:
    tokens, shown = list(prompt), ""
    for chunk in chunks:
        tokens += chunk[0]
        text = tokenizer.decode(tokens).rstrip("\ufffd")  # half a character is shown when its other half comes
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print(tokenizer.decode(tokens)[len(shown) :])
