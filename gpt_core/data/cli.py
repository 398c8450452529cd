"""The `gpt-data` command."""

import os
import time
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from gpt_core.cli import SUCCESS, parser, print_json, progress, run, say
from gpt_core.data.config import DataConfig
from gpt_core.errors import one_line


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
    return run(top, {"prepare": _prepare, "inspect": _inspect}, arguments)


def _prepare_parser() -> ArgumentParser:
    defaults = DataConfig()
    command = parser(
        "Tokenize text into memory-mapped shards. An interrupted run is continued by the same command.",
        "  gpt-data prepare stdlib data/stdlib\n"
        "  gpt-data prepare 'texts/*.jsonl.zst' data/texts --text-field body --on-error skip\n"
        "  gpt-data prepare s3://bucket/corpus/ data/corpus --validation-fraction 0.001\n"
        "  gpt-data prepare hf:Salesforce/wikitext:wikitext-103-raw-v1 data/wikitext",
    )
    command.add_argument("source", type=str, help="file, folder, glob or URL; hf:NAME[:CONFIG]; or stdlib")
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that tokenize")
    command.add_argument("--seed", type=int, default=defaults.seed, help="of the split")
    command.add_argument(
        "--validation-fraction",
        type=float,
        default=defaults.validation_fraction,
        help="share of the documents kept for validation, chosen by their content",
    )
    command.add_argument("--text-field", default=defaults.text_field, help="field or column that holds the text")
    command.add_argument(
        "--on-error", default=defaults.on_error, choices=["stop", "skip"], help="what a broken record does"
    )
    command.add_argument("--force", action="store_true", help="replace a folder that exists")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    return command


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
    started = time.perf_counter()
    console = Console(stderr=True, highlight=False)
    try:
        with progress() as bar:
            task = bar.add_task("reading text, MB", total=None)
            done = prepare(
                config,
                options.destination,
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
