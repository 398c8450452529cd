"""The words and flags that `jax-gpt generate` and `torch-gpt generate` share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from gpt_core.checkpoints.adapted import config_of
from gpt_core.checkpoints.hub import local_folder
from gpt_core.cli import SUCCESS, parser, print_json
from gpt_core.commands.conversation import (
    Writer,
    begun,
    continuation,
    converse,
    printed_as_it_comes,
    without_end,
)
from gpt_core.errors import InputError
from gpt_core.formats.hf_folder import end_tokens
from gpt_core.precision import PARAM_DTYPES, Precision
from gpt_core.text.chat import Chat
from gpt_core.text.finding import text_tokenizer
from gpt_core.text.generation import SamplingConfig, Written, pack_draft_prompts, pack_prompts
from gpt_core.text.tokenizer import Tokenizer

NEW_TOKENS, CHAT_TOKENS = 100, 512
CHECKPOINT = "RUN, RUN@STEP, RUN@best, RUN@last, the folder of a model in any format, or a name on the hub"


class Request(NamedTuple):
    """The models that a command line of `generate` asks for."""

    checkpoint: Path
    precision: Precision
    draft: Path | None
    draft_tokens: int
    adapter: Path | None = None


def generate_parser(program: str) -> ArgumentParser:
    """Of the subcommand `generate`: a checkpoint, prompts, and how tokens are chosen."""
    command = parser(
        "Continue prompts; text appears as it is written.",
        f"  {program} generate runs/tiny-cpu 'def main('\n"
        f"  {program} generate runs/tiny-cpu@best 'import ' 'class ' --temperature 0.8 --top-p 0.95 --seed 1\n"
        f"  {program} generate runs/large 'def main(' --draft runs/tiny-cpu --draft-tokens 4  # the same text, sooner\n"
        f"  {program} generate HuggingFaceTB/SmolLM2-135M-Instruct 'What is the capital of France?' --chat",
    )
    command.add_argument("checkpoint", help=CHECKPOINT)
    command.add_argument("prompts", nargs="*", help="texts to continue, all at once")
    command.add_argument(
        "--chat", action="store_true", help="answer by the checkpoint's chat template; without a prompt, converse"
    )
    command.add_argument("--system", help="with --chat: what the model is told before")
    command.add_argument(
        "--max-new-tokens", type=int, help=f"tokens to write at most; default: {NEW_TOKENS}, with --chat {CHAT_TOKENS}"
    )
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    command.add_argument("--top-k", type=int, help="keep so many of the most likely tokens")
    command.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens of this probability")
    command.add_argument("--stop", help="end with this text's first token; default: the tokens that end a text")
    command.add_argument("--seed", type=int, default=0, help="of the random numbers: the same text in either framework")
    command.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter of PEFT, merged into the checkpoint")
    command.add_argument("--draft", help="a smaller model of the same tokenizer, which proposes tokens (speculative)")
    command.add_argument("--draft-tokens", type=int, default=3, help="that the draft proposes at once")
    command.add_argument("--dtype", choices=list(PARAM_DTYPES), default="float32", help="of weights and computation")
    command.add_argument("--json", action="store_true", help="print prompts, texts and token ids as JSON")
    return command


def generate_command(options: Namespace, load: Callable[[Request], Writer]) -> int:
    """Run `generate` with a framework's function.

    Args:
        options: Of the command line.
        load: Loads the models.

    Raises:
        InputError: a bad checkpoint, prompt or option.
    """
    checkpoint = local_folder(options.checkpoint)
    config = config_of(checkpoint)
    tokenizer = text_tokenizer(checkpoint, "`generate` in code takes token ids")
    chat = Chat(tokenizer) if options.chat else None
    if options.system is not None and chat is None:
        raise InputError("--system goes with --chat: plain text has no roles")
    if not options.prompts and not (chat and sys.stdin.isatty()):
        raise InputError("there is no prompt; give one, or none with --chat on a terminal to converse")
    sampling = _sampling(options, tokenizer, checkpoint)
    if chat is None:
        prompts = [tokenizer.encode_prompt(prompt) for prompt in options.prompts]
    else:
        prompts = [begun(chat, options.system, prompt) for prompt in options.prompts]
    draft = None if options.draft is None else local_folder(options.draft)
    if prompts:  # a mistake is named before weights are read
        pack_prompts(prompts, config, sampling.max_new_tokens)
    if prompts and draft is not None:
        draft_config = config_of(draft)
        pack_draft_prompts(prompts, draft_config, config, sampling.max_new_tokens, options.draft_tokens)
    precision = Precision(options.dtype, options.dtype)
    write = load(Request(checkpoint, precision, draft, options.draft_tokens, options.adapter))
    if chat is not None and not prompts:
        return converse(chat, tokenizer, options.system, sampling, write)
    chunks = write(prompts, sampling)
    # Not printed are what is put in front of a text, and all of a conversation but its answer.
    heads = [tokenizer.encode_marked(prompt) if chat is None else [] for prompt in options.prompts]
    if chat is not None:
        chunks = without_end(chunks, sampling)
    if not options.json and len(prompts) == 1:
        chunks = printed_as_it_comes(heads[0], chunks, tokenizer)
    whole = Written.together(chunks, len(prompts))
    texts = [continuation(tokenizer, *both) for both in zip(heads, whole.rows, strict=True)]
    if options.json:
        rows = zip(options.prompts, texts, *whole, strict=True)
        keys = ("prompt", "text", "tokens", "accepted", "proposed")[: 3 if draft is None else 5]
        print_json([dict(zip(keys, row, strict=False)) for row in rows])
    elif len(prompts) > 1:
        shown = zip(options.prompts, texts, strict=True)
        print("\n\n".join(text if chat else prompt + text for prompt, text in shown))
    if draft is not None:
        accepted, proposed = sum(whole.accepted), sum(whole.proposed)
        rate = f" ({accepted / proposed:.0%})" if proposed else ""
        print(f"{accepted} of {proposed} proposed tokens accepted{rate}", file=sys.stderr)
    return SUCCESS


def _sampling(options: Namespace, tokenizer: Tokenizer, checkpoint: Path) -> SamplingConfig:
    if options.stop == "":
        raise InputError("--stop is an empty text; give one with at least one token")
    ends = end_tokens(checkpoint, tokenizer) if options.stop is None else tokenizer.encode_marked(options.stop)[:1]
    most = CHAT_TOKENS if options.chat else NEW_TOKENS
    return SamplingConfig(
        max_new_tokens=most if options.max_new_tokens is None else options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=tuple(ends),
        seed=options.seed,
        known_tokens=tokenizer.vocab_size,
    )
