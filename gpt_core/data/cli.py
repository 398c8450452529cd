"""The `gpt-data` command."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from gpt_core.cli import SUCCESS, parser, print_json, progress, run, say
from gpt_core.data.config import DataConfig
from gpt_core.data.records import Reader
from gpt_core.data.sources import find_files
from gpt_core.errors import one_line
from gpt_core.files.writing import atomic_directory, refuse_existing
from gpt_core.text.finding import open_tokenizer
from gpt_core.text.gpt2 import GPT2
from gpt_core.text.tokenizer_rules import TOKENIZER_FILES


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 the input was wrong, 130 interrupted."""
    top = parser(
        "Turn text into the tokens that either framework trains on.",
        "  gpt-data prepare stdlib data/stdlib\n  gpt-data inspect data/stdlib --verify",
        prog="gpt-data",
    )
    commands = top.add_subcommands(required=True, dest="subcommand")
    commands.add_subcommand("prepare", _prepare_parser(), help="tokenize text into memory-mapped shards")
    commands.add_subcommand("inspect", _inspect_parser(), help="show what a prepared folder holds")
    commands.add_subcommand("tokenizer", _tokenizer_parser(), help="learn a tokenizer of one's own text")
    return run(top, {"prepare": _prepare, "inspect": _inspect, "tokenizer": _tokenizer}, arguments)


def _prepare_parser() -> ArgumentParser:
    defaults = DataConfig()
    command = parser(
        "Tokenize text into memory-mapped shards. An interrupted run is continued by the same command.",
        "  gpt-data prepare stdlib data/stdlib\n"
        "  gpt-data prepare 'texts/*.jsonl.zst' data/texts --text-field body --on-error skip\n"
        "  gpt-data prepare s3://bucket/corpus/ data/corpus --validation-fraction 0.001\n"
        "  gpt-data prepare hf:Salesforce/wikitext:wikitext-103-raw-v1 data/wikitext\n"
        "  gpt-data prepare 'texts/*.jsonl' data/texts --tokenizer HuggingFaceTB/SmolLM2-135M",
    )
    _add_source(command)
    command.add_argument(
        "--tokenizer", default=GPT2, help="folder with tokenizer.json, a name on the Hugging Face hub, or gpt2"
    )
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that tokenize")
    command.add_argument("--seed", type=int, default=defaults.seed, help="of the split")
    command.add_argument(
        "--validation-fraction",
        type=float,
        default=defaults.validation_fraction,
        help="share of the documents kept for validation, chosen by their content",
    )
    _add_reading(command)
    command.add_argument("--force", action="store_true", help="replace a folder that exists")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    return command


def _tokenizer_parser() -> ArgumentParser:
    command = parser(
        "Learn a byte-level BPE tokenizer of one's own text, in the files that transformers reads too.",
        "  gpt-data tokenizer stdlib data/tokenizer --vocab-size 8192\n"
        "  gpt-data prepare stdlib data/stdlib --tokenizer data/tokenizer",
    )
    _add_source(command)
    command.add_argument("--vocab-size", type=int, required=True, help="tokens, the end of text included")
    _add_reading(command)
    command.add_argument("--force", action="store_true", help="replace a tokenizer that exists")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    return command


def _add_source(command: ArgumentParser) -> None:
    command.add_argument("source", type=str, help="file, folder, glob or URL; hf:NAME[:CONFIG]; or stdlib")
    command.add_argument("destination", type=Path, help="folder to write")


def _add_reading(command: ArgumentParser) -> None:
    defaults = DataConfig()
    command.add_argument("--text-field", default=defaults.text_field, help="field or column that holds the text")
    command.add_argument(
        "--on-error", default=defaults.on_error, choices=["stop", "skip"], help="what a broken record does"
    )


def _inspect_parser() -> ArgumentParser:
    command = parser(
        "Show the documents, tokens and shards of a prepared folder, and the unigram entropy of its tokens.",
        "  gpt-data inspect data/stdlib --verify --json",
    )
    command.add_argument("folder", type=Path, help="written by gpt-data prepare")
    command.add_argument("--verify", action="store_true", help="compare every shard with its checksum")
    command.add_argument("--json", action="store_true", help="print as JSON")
    return command


def _prepare(options: Namespace) -> int:
    from gpt_core.data.prepare import partial_folder, prepare

    config = DataConfig(
        source=options.source,
        text_field=options.text_field,
        on_error=options.on_error,
        validation_fraction=options.validation_fraction,
        seed=options.seed,
    )
    tokenizer = open_tokenizer(options.tokenizer)
    started = time.perf_counter()
    console = Console(stderr=True, highlight=False)
    try:
        with progress() as bar:
            task = bar.add_task("reading text, MB", total=None)
            done = prepare(
                config,
                options.destination,
                tokenizer=tokenizer,
                workers=options.workers,
                force=options.force,
                advance=lambda read, total: bar.update(task, advance=read, total=total),
            )
    except KeyboardInterrupt as interrupt:
        if partial_folder(options.destination).exists():
            interrupt.add_note("finished shards are kept: the same command goes on from there")
        raise
    seconds = time.perf_counter() - started
    splits = {
        split: {
            "documents": sum(shard.documents for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "shards": len(shards),
        }
        for split, shards in done.index.splits.items()
    }
    if done.index.skipped:
        console.print(
            one_line(f"{done.index.skipped} broken records skipped; the first: {done.first_skipped}"),
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    for split, found in splits.items():
        if not found["documents"]:
            console.print(f"no document fell into the {split} split", style="yellow")
    if options.json:
        print_json(
            {
                "destination": str(options.destination),
                "splits": splits,
                "skipped": done.index.skipped,
                "reused_shards": done.reused,
                "text_bytes": done.text_bytes,
                "seconds": round(seconds, 3),
            }
        )
    else:
        counts = "; ".join(
            f"{split} {found['tokens']:,} tokens of {found['documents']:,} documents" for split, found in splits.items()
        )
        speed = f"{done.text_bytes / 1e6:,.1f} MB of text in {seconds:.1f} s"
        reused = f", {done.reused} shards were done already" if done.reused else ""
        say(f"{options.destination}: {counts}; {speed}{reused}")
    return SUCCESS


def _tokenizer(options: Namespace) -> int:
    from gpt_core.text.training import require_vocabulary, train_tokenizer, write_trained

    require_vocabulary(options.vocab_size)
    replace = _kept_tokenizer if options.force else None
    refuse_existing(options.destination, replace=replace)
    reader = Reader(options.text_field, options.on_error)
    files = find_files(options.source)
    with progress() as bar, atomic_directory(options.destination, replace=replace) as folder:
        task = bar.add_task("reading text, MB", total=None)

        def texts() -> Iterator[str]:
            for _, document in (document for file in files for document in reader.documents(file)):
                bar.update(task, advance=len(document) / 1e6)
                yield document.decode("utf-8")

        made = train_tokenizer(texts(), options.vocab_size)
        write_trained(made, folder)
    count = made.get_vocab_size()
    if options.json:
        print_json({"destination": str(options.destination), "vocab_size": count, "skipped": reader.skipped})
    else:
        say(f"{options.destination}: {count:,} tokens")
        if reader.skipped:
            say(one_line(f"note: {reader.skipped} broken records skipped; the first: {reader.first_skipped}"))
        if count < options.vocab_size:
            say(f"note: no pair is left that occurs twice: {count:,} tokens are fewer than --vocab-size asks for")
    return SUCCESS


def _kept_tokenizer(folder: Path) -> str:
    """Why a folder must not be replaced by a tokenizer; "" where it holds one alone, or nothing."""
    strange = sorted(path.name for path in folder.iterdir() if path.name not in TOKENIZER_FILES)
    return f"holds {strange[0]}, which is no part of a tokenizer" if strange else ""


def _inspect(options: Namespace) -> int:
    from gpt_core.data.prepared import Index, PreparedTokens, unigram_entropy, verify_shards

    index = Index.read(options.folder)
    shards = [shard for found in index.splits.values() for shard in found]
    if options.verify:
        with progress() as bar:
            task = bar.add_task("checking shards", total=len(shards))
            verify_shards(options.folder, shards, lambda n: bar.advance(task, n))
    splits = {}
    for split, found in index.splits.items():
        counts = np.zeros(index.vocab_size, np.int64)
        if found:
            for chunk in PreparedTokens(options.folder, split, verify=False).chunks():
                counts += np.bincount(chunk, minlength=index.vocab_size)
        splits[split] = {
            "documents": sum(shard.documents for shard in found),
            "tokens": int(counts.sum()),
            "shards": len(found),
            "unigram_entropy": unigram_entropy(counts) if found else None,
        }
    if options.json:
        content = {"folder": str(options.folder), "splits": splits, "skipped": index.skipped}
        print_json(content | {"settings": index.settings, "verified": options.verify, "identity": index.identity})
        return SUCCESS
    console = Console(width=None if os.isatty(1) else 120, highlight=False)
    table = Table("split", title=str(options.folder), title_justify="left")
    for name in ("documents", "tokens", "shards", "unigram entropy, nats"):
        table.add_column(name, justify="right")
    for split, row in splits.items():
        entropy = "" if row["unigram_entropy"] is None else f"{row['unigram_entropy']:.3f}"
        table.add_row(split, f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['shards']:,}", entropy)
    console.print(table)
    for setting, value in index.settings.items():
        console.print(one_line(f"{setting}: {value}"), markup=False, soft_wrap=True)
    console.print(f"skipped records: {index.skipped}")
    console.print("checksums: all equal" if options.verify else "checksums: not checked (--verify)")
    return SUCCESS
