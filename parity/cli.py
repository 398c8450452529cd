"""The `parity` command."""

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from gpt_core.checkpoints.replaceable import kept_adapter, kept_checkpoint
from gpt_core.cli import CHECK_FAILED, SUCCESS, parser, print_json, progress, run, say, status
from gpt_core.commands.train import add_run_arguments, run_config
from gpt_core.errors import InputError, one_line
from gpt_core.files.reading import real_path
from gpt_core.files.writing import atomic_directory, refuse_existing
from gpt_core.formats import FORMATS, is_hugging_face
from gpt_core.formats.targets import HUGGING_FACE, TARGETS
from gpt_core.precision import DType
from gpt_core.runs.config import JaxAttention, TorchAttention
from parity.checkpoints.adapter import PEFT, export_adapter
from parity.checkpoints.convert import DTYPES, conversion_parts, convert
from parity.checkpoints.sources import local_checkpoint
from parity.checks import CheckResult
from parity.faults.catalogue import fault_named
from parity.grid.variants import select

_DTYPES: list[DType] = ["float64", "float32", "bfloat16"]
_PEER_DTYPES: list[DType] = ["float64", "float32"]
_PEER_TITLE = "Ours against transformers: relative errors in float64, float32"
_CHECKPOINT = (
    "folder of a checkpoint, or a training run: RUN, RUN@STEP, RUN@best; here or at a remote address; or a name on the "
    "Hugging Face hub"
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 equal or done, 1 a check failed, 2 the input was wrong."""
    top = parser(
        "Convert weights between the JAX and the PyTorch twin, and prove that they are the same function.",
        "  parity check --variant rope-gqa-window --dtype float64",
        prog="parity",
    )
    commands = top.add_subcommands(required=True, dest="subcommand")
    commands.add_subcommand("check", _check_parser(), help="prove the grid of variants, or two checkpoints, equal")
    commands.add_subcommand("train", _train_parser(), help="train the same run in both and compare the losses")
    commands.add_subcommand("convert", _convert_parser(), help="convert a checkpoint to another format")
    commands.add_subcommand("verify", _verify_parser(), help="prove that transformers runs an exported folder alike")
    commands.add_subcommand("inspect", _inspect_parser(), help="show what lies in a checkpoint")
    commands.add_subcommand("record", _record_parser(), help="write a checkpoint's logits and intermediates to a file")
    commands.add_subcommand("compare", _compare_parser(), help="compare two records, with no checkpoint or framework")
    handlers = {"check": _check, "train": _train, "convert": _convert, "verify": _verify, "inspect": _inspect}
    handlers |= {"record": _record, "compare": _compare}
    return run(top, handlers, arguments)


def _check_parser() -> ArgumentParser:
    check = parser(
        "Run the grid of variants in both frameworks and compare them; with two checkpoints, compare those.\n"
        "Exit code 0: equal, 1: they differ, 2: wrong input.",
        "  parity check                                     the whole grid, as `make parity`\n"
        "  parity check --variant rope-gqa-window --dtype float64 --out runs/parity\n"
        "  parity check --faults                            plant every known mistake, see each one caught\n"
        "  parity check --fault window-off-by-one           plant one wherever it shows: exit code 1\n"
        "  parity check --full                              adds training curves and fp32 gradients\n"
        "  parity check --jax-attention banded --torch-attention sdpa   the fast implementations, in every check\n"
        "  parity check runs/jax runs/torch --text book.txt compare two checkpoints on a text",
    )
    check.add_argument("checkpoints", nargs="*", default=[], help="two checkpoint folders, in any known format")
    check.add_argument(
        "--variant", nargs="+", action="extend", default=[], metavar="NAME", help="cases of the grid to run"
    )
    check.add_argument("--dtype", nargs="+", default=_DTYPES, choices=_DTYPES, help="what to compute in")
    check.add_argument("--out", type=Path | None, default=None, metavar="DIR", help="folder for report.json")
    check.add_argument("--faults", action="store_true", help="only plant faults, each where it must be caught")
    check.add_argument("--fault", type=str | None, default=None, metavar="NAME", help="plant one wherever it shows")
    check.add_argument("--full", action="store_true", help="also what takes minutes: training, fp32 gradients")
    check.add_argument("--hugging-face", action="store_true", help="instead: every variant's export in transformers")
    for framework, known in (("jax", get_args(JaxAttention)), ("torch", get_args(TorchAttention))):
        check.add_argument(
            f"--{framework}-attention",
            default="reference",
            choices=known,
            help="what to run in every check; an fp32 softmax needs --dtype float32 bfloat16",
        )
    _add_inputs(check)
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    return check


def _train_parser() -> ArgumentParser:
    from parity.runs.train import PROOF, VARIANTS

    shape = " ".join(f"--{field} {value}" for field, value in PROOF.items())
    command = parser(
        "Train the same run in both frameworks, from the same weights, and hold the losses against each other.\n"
        "The proof needs no large batch; whatever the config says, it runs as if these flags stood after it:\n"
        f"  {shape}\n"
        "Give them with other values to train other batches. Exit code 0: equal, 1: they differ, 2: wrong input.",
        "  parity train --config tiny-cpu --steps 200\n"
        "  parity train --config tiny-cpu --steps 200 --train.batch_size 8 --train.context_length 128\n"
        "  parity train --config my-run.yaml --variant config --dtype float32",
    )
    add_run_arguments(command, PROOF)
    command.add_argument("--steps", type=int | None, default=None, help="short for --train.steps")
    command.add_argument(
        "--variant", nargs="+", default=list(VARIANTS), help="attention variants; 'config' is the model as it stands"
    )
    command.add_argument("--dtype", nargs="+", choices=_DTYPES[:2], default=_DTYPES[:2], help="what to compute in")
    command.add_argument("--out", type=Path, default=Path("runs/parity-train"), help="folder for runs and report")
    command.add_argument("--force", action="store_true", help="replace what this command wrote before")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    return command


def _train(options: Namespace) -> int:
    from parity.reports.report import report, write_report
    from parity.runs.train import RUNS, compare_training, kept_runs

    config = run_config(options)
    if options.steps is not None:
        config = replace(config, train=replace(config.train, steps=options.steps))
    started = time.perf_counter()
    with atomic_directory(options.out, replace=kept_runs if options.force else None) as folder, progress() as bar:
        total = len(options.variant) * len(options.dtype) * len(RUNS) * config.train.steps
        task = bar.add_task("training", total=total)
        results = compare_training(
            config, options.variant, options.dtype, folder, lambda steps: bar.advance(task, steps)
        )
        content = report(results, {}, seconds=time.perf_counter() - started, command="parity train")
        write_report(folder, content)
    if options.json:
        print_json(content)
    else:
        train = config.train
        print(
            f"{train.steps} steps of {train.batch_size} rows of {config.context_length} tokens in {train.accumulation} "
            f"micro-batches"
        )
        for result in results:
            print(
                f"{result.variant} {result.dtype}: losses of the first steps differ by {result.relative_error:.0e} "
                f"(bound {result.tolerance:.0e}), of all {result.measures['steps']} by "
                f"{result.measures['largest_distance']:.0e}; one ulp at the start makes "
                f"{result.measures['largest_distance_one_ulp']:.0e}; {result.measures['clipped_steps']} steps were "
                f"clipped; {result.reason or 'equal'}"
            )
        say(f"report: {options.out / 'report.json'}")
    return SUCCESS if content["passed"] else CHECK_FAILED


def _convert_parser() -> ArgumentParser:
    command = parser(
        "Convert a checkpoint to another format, verify it by reading it back, then give it its name.",
        "  parity convert runs/jax runs/torch --to torch\n"
        "  parity convert runs/torch runs/jax-bf16 --to jax --dtype bfloat16\n"
        "  parity convert runs/tiny-cpu@best best --to torch\n"
        "  parity convert --state runs/tiny-cpu runs/tiny-cpu-torch --to torch     for torch-gpt to go on with\n"
        "  parity convert runs/jax export --to hf            the architecture of transformers that fits\n"
        "  parity convert openai-community/gpt2 runs/gpt2 --to jax\n"
        "  parity convert runs/lora adapter --to peft        the adapter of a run, alone\n"
        "  parity convert BASE merged --adapter adapter --to hf    an adapter of PEFT merged into its base",
    )
    command.add_argument("source", help=_CHECKPOINT)
    command.add_argument("destination", type=Path, help="folder to write")
    command.add_argument(
        "--to", required=True, choices=[*TARGETS, PEFT], help="format to write; hf picks one that fits"
    )
    command.add_argument(
        "--adapter", type=Path | None, default=None, metavar="DIR", help="an adapter of PEFT to merge into the source"
    )
    command.add_argument("--dtype", default=None, choices=list(DTYPES), help="cast every weight")
    command.add_argument(
        "--state", action="store_true", help="a run with its optimizer, for the other trainer to go on"
    )
    command.add_argument("--unrolled", action="store_true", help="jax: keep blocks apart instead of stacked")
    command.add_argument(
        "--allow-remote-code", action="store_true", help="hf: bring modelling code along where no architecture fits"
    )
    command.add_argument("--max-shard-size", type=int | None, default=None, metavar="BYTES", help="hf: of one file")
    command.add_argument("--report", type=Path | None, default=None, metavar="FILE", help="hf: for the model card")
    command.add_argument("--force", action="store_true", help="replace a checkpoint or an export that exists")
    command.add_argument("--json", action="store_true", help="print what was done as JSON")
    return command


def _verify_parser() -> ArgumentParser:
    command = parser(
        "Run a folder of Hugging Face in transformers and in our models, and compare logits, loss, gradients, named\n"
        "intermediates and 64 greedy tokens. Exit code 0: equal, 1: they differ, 2: wrong input.",
        "  parity verify export\n  parity verify export --against runs/jax --card --out runs/verify",
    )
    command.add_argument("folder", help="exported folder, or a name on the Hugging Face hub")
    command.add_argument("--against", type=str | None, default=None, metavar="CHECKPOINT", help="its source, by bits")
    command.add_argument("--dtype", nargs="+", default=_PEER_DTYPES, choices=_PEER_DTYPES, help="what to compute in")
    _add_inputs(command)
    command.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens to generate; 0 for none")
    command.add_argument("--trust-remote-code", action="store_true", help="run modelling code that lies in the folder")
    command.add_argument("--card", action="store_true", help="put the result into the folder's model card")
    command.add_argument("--out", type=Path | None, default=None, metavar="DIR", help="folder for report.json")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    return command


def _inspect_parser() -> ArgumentParser:
    command = parser(
        "Show format, config and parameters of a checkpoint, and with --verify whether its files are as they were\n"
        "written. Exit code 0: shown, and intact, 1: damaged files, one a line, 2: wrong input.",
        "  parity inspect runs/torch\n  parity inspect runs/tiny-cpu@200 --verify",
    )
    command.add_argument("path", help=_CHECKPOINT)
    command.add_argument("--verify", action="store_true", help="hold a run's files against their hashes")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    return command


def _record_parser() -> ArgumentParser:
    command = parser(
        "Run a checkpoint in one framework and write what it computed, for `parity compare` on any machine.",
        "  parity record runs/jax jax.npz --framework jax --dtype float64 --trace --gradients",
    )
    command.add_argument("checkpoint", help=_CHECKPOINT)
    command.add_argument("out", type=Path, help=".npz file to write, or a folder for one .npy file an array")
    command.add_argument("--framework", required=True, choices=["jax", "torch"], help="what to run it in")
    _add_inputs(command)
    command.add_argument("--dtype", default="float32", choices=_DTYPES, help="what to compute in")
    command.add_argument("--trace", action="store_true", help="write the named intermediates too")
    command.add_argument("--gradients", action="store_true", help="write the loss of the next token and its gradients")
    command.add_argument("--force", action="store_true", help="replace a record that exists")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    return command


def _compare_parser() -> ArgumentParser:
    command = parser(
        "Compare two records, or two folders of records by file name. Needs no checkpoint and no framework.\n"
        "Exit code 0: equal, 1: they differ, 2: wrong input.",
        "  parity compare jax.npz torch.npz\n  parity compare records/pod records/laptop --out runs/compare",
    )
    command.add_argument("a", type=Path, help="the record in question")
    command.add_argument("b", type=Path, help="the reference")
    command.add_argument("--ignore-weights", action="store_true", help="compare runs of different weights too")
    command.add_argument("--out", type=Path | None, default=None, metavar="DIR", help="folder for report.json")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    return command


def _add_inputs(command: ArgumentParser) -> None:
    command.add_argument("--tokens", type=Path | None, default=None, metavar="FILE.npy", help="token ids to run on")
    command.add_argument("--text", type=Path | None, default=None, metavar="FILE", help="text to run on")


def _check(options: Namespace) -> int:
    if len(options.checkpoints) not in (0, 2):
        raise InputError(f"check takes no checkpoint (the grid) or two, not {len(options.checkpoints)}")
    _require_report_folder(options)
    started = time.perf_counter()
    if options.checkpoints:
        results, found = _check_two(options)
    else:
        results, found = (_check_hugging_face if options.hugging_face else _check_the_grid)(options)
    title = _PEER_TITLE if options.hugging_face else _attention_title(options)
    return _report(options, results, found, time.perf_counter() - started, title)


def _require_report_folder(options: Namespace) -> None:
    from parity.reports.report import require_report_folder

    if options.out is not None:
        require_report_folder(options.out)


def _report(
    options: Namespace, results: list[CheckResult], found: dict[str, Any], seconds: float, title: str = ""
) -> int:
    """Write and print what checks found; the exit code says whether all passed."""
    from parity.reports.report import print_table, print_verdict, report, write_report

    content = report(results, **found, seconds=seconds, command=" ".join(["parity", *sys.argv[1:]]))
    written = write_report(options.out, content) if options.out else None
    if options.json:
        print_json(content)
    else:
        console = Console(width=None if os.isatty(1) else 160)
        print_table(results, console, faults=content["faults"], title=title)
        for notice in content.get("notices", []):
            console.print(f"note: {notice}", markup=False, soft_wrap=True)
        print_verdict(results, seconds, console, faults=content["faults"])
        if written:
            console.print(one_line(f"report: {written}"), markup=False, soft_wrap=True)
    return SUCCESS if content["passed"] else CHECK_FAILED


def _check_two(options: Namespace) -> tuple[list[CheckResult], dict[str, Any]]:
    from parity.check import check_checkpoints

    if options.variant or options.fault or options.faults or options.full or options.hugging_face:
        raise InputError(
            "--variant, --fault, --faults, --full and --hugging-face belong to the grid, not to two checkpoints"
        )
    _require_reference(options, "two checkpoints")
    dtypes = _dtypes(options)
    with ExitStack() as stack, progress() as bar:
        first, second = (stack.enter_context(local_checkpoint(str(name))) for name in options.checkpoints)
        task = bar.add_task("running checkpoints", total=2 * len({"float64", *dtypes}))
        return check_checkpoints(
            first, second, dtypes, lambda n: bar.advance(task, n), tokens=options.tokens, text=options.text
        )


def _check_hugging_face(options: Namespace) -> tuple[list[CheckResult], dict[str, Any]]:
    from parity.verify import hugging_face_cases, verify_grid

    if options.fault or options.faults or options.full or options.tokens or options.text:
        raise InputError("--hugging-face goes with --variant and --dtype alone")
    _require_reference(options, "--hugging-face")
    dtypes = [dtype for dtype in _dtypes(options) if dtype in _PEER_DTYPES]
    with progress() as bar:
        total = len(options.variant or hugging_face_cases()) * len(dtypes)
        task = bar.add_task("checking exports in transformers", total=total)
        return verify_grid(options.variant, dtypes, lambda n: bar.advance(task, n))


def _attention_title(options: Namespace) -> str:
    """Heads the table where a side does not run the definition."""
    jax, torch = options.jax_attention, options.torch_attention
    if jax == torch == "reference":
        return ""
    return f"JAX ({jax} attention) against PyTorch ({torch}): relative errors in {', '.join(_dtypes(options))}"


def _require_reference(options: Namespace, where: str) -> None:
    for flag in ("jax_attention", "torch_attention"):
        if getattr(options, flag) != "reference":
            raise InputError(f"--{flag.replace('_', '-')} belongs to the grid, not to {where}")


def _check_the_grid(options: Namespace) -> tuple[list[CheckResult], dict[str, Any]]:
    from parity.check import check_grid
    from parity.grid.subject import Attention
    from parity.grid.worker import GridOptions

    if options.tokens or options.text:
        raise InputError("--tokens and --text belong to two checkpoints; the grid brings its own text")
    if options.fault and options.faults:
        raise InputError("--fault plants one fault in every check, --faults plants each in its own; give one of them")
    if options.fault:
        fault = fault_named(options.fault)
        if not any(fault.bites(case.config) for case in select(options.variant)):
            raise InputError(f"--fault {fault.name} changes nothing in {', '.join(options.variant)}; choose others")
        if fault.caught_by == "noise" and "float32" not in options.dtype:
            raise InputError(f"--fault {fault.name} changes float32 alone; add it to --dtype")
        if options.torch_attention != "reference":
            raise InputError("--fault plants a mistake in the reference attention; leave --torch-attention out")
    dtypes = [dtype for dtype in _dtypes(options) if not options.faults or dtype != "bfloat16"]
    if not dtypes:
        raise InputError("faults are planted in float64 and float32; add one of them to --dtype")
    grid = GridOptions(
        options.variant,
        dtypes,
        options.fault,
        checks=not options.faults,
        faults=not options.fault,
        full=options.full,
        attention=Attention(options.jax_attention, options.torch_attention),
    )
    with progress() as bar:
        task = bar.add_task("checking variants", total=len(select(options.variant)) * len(dtypes))
        return check_grid(grid, lambda n: bar.advance(task, n))


def _dtypes(options: Namespace) -> list[DType]:
    return [dtype for dtype in _DTYPES if dtype in options.dtype]


def _convert_state(options: Namespace) -> int:
    from parity.runs.state import CROSSING_PARTS, convert_state

    others = {"--dtype": options.dtype, "--unrolled": options.unrolled, "--report": options.report}
    given = [flag for flag, value in others.items() if value]
    if given:
        raise InputError(f"{given[0]} does not go with --state: a training state crosses over as it is")
    refuse_existing(options.destination, replace=kept_checkpoint if options.force else None)
    with local_checkpoint(options.source) as source, progress() as bar:
        task = bar.add_task("converting", total=CROSSING_PARTS)
        done = convert_state(
            source,
            options.destination,
            options.to,
            force=options.force,
            advance=lambda parts: bar.advance(task, parts),
        )
    if options.json:
        print_json(done.to_dict())
    else:
        say(
            f"{done.source} -> {done.destination}: step {done.step:,}, read back and equal. Go on with the same "
            f"config: {done.framework}-gpt train --config ... --out {done.destination}"
        )
    return SUCCESS


def _convert(options: Namespace) -> int:
    if options.state:
        return _convert_state(options)
    if options.to == PEFT:
        return _convert_adapter(options)
    from gpt_core.formats.hf_folder import parity_result

    hugging_face = is_hugging_face(options.to) or options.to == HUGGING_FACE
    extra: dict[str, Any] = {"unrolled": True} if options.unrolled else {}
    if extra and options.to != "jax":
        raise InputError("--unrolled belongs to --to jax; other formats keep blocks apart anyway")
    of_hugging_face = {"--report": options.report, "--max-shard-size": options.max_shard_size}
    given = [flag for flag, value in of_hugging_face.items() if value is not None]
    given += ["--allow-remote-code"] if options.allow_remote_code else []
    if given and not hugging_face:
        raise InputError(f"{given[0]} belongs to --to hf or one of: {', '.join(filter(is_hugging_face, FORMATS))}")
    if options.max_shard_size is not None:
        if options.max_shard_size < 1:
            raise InputError(f"--max-shard-size {options.max_shard_size} must be at least 1 byte")
        extra["max_shard_size"] = options.max_shard_size
    refuse_existing(options.destination, replace=kept_checkpoint if options.force else None)
    with local_checkpoint(options.source) as source, progress() as bar:
        task = bar.add_task("converting", total=conversion_parts(source))
        done = convert(
            source,
            options.destination,
            options.to,
            dtype=options.dtype,
            force=options.force,
            allow_remote_code=options.allow_remote_code,
            name=real_path(options.destination).name,
            parity=parity_result(options.report) if options.report else "",
            advance=lambda parts: bar.advance(task, parts),
            adapter=options.adapter,
            **extra,
        )
    done = replace(done, source=options.source)
    if options.json:
        print_json(done.to_dict())
        return SUCCESS
    say(
        f"{done.source} ({done.source_format}) -> {done.destination} ({done.destination_format}): "
        f"{done.parameters:,} parameters, written in {done.write_seconds:.1f} s, "
        f"read back and equal in {done.verify_seconds:.1f} s"
    )
    if done.reason:
        say(f"{done.destination_format}: {done.reason}")
    for notice in done.notices:
        say(f"note: {notice}")
    return SUCCESS


def _convert_adapter(options: Namespace) -> int:
    refuse_existing(options.destination, replace=kept_adapter if options.force else None)
    with local_checkpoint(options.source) as source:
        done = export_adapter(source, options.destination, dtype=options.dtype, force=options.force)
    done = replace(done, source=options.source)
    if options.json:
        print_json(done.to_dict())
        return SUCCESS
    say(
        f"{done.source} -> {done.destination}: an adapter of {done.parameters:,} parameters for the base {done.base}, "
        f"by the modules of {done.architecture}"
    )
    return SUCCESS


def _verify(options: Namespace) -> int:
    from gpt_core.formats.hf_folder import write_parity_into_card
    from parity.checks.peer import verdict
    from parity.verify import verify_folder

    if options.new_tokens < 0:
        raise InputError(f"--new-tokens {options.new_tokens} must be at least 0")
    _require_report_folder(options)
    started = time.perf_counter()
    dtypes = [dtype for dtype in _PEER_DTYPES if dtype in options.dtype]
    with ExitStack() as stack, progress() as bar:
        folder = stack.enter_context(local_checkpoint(options.folder))
        against = None if options.against is None else stack.enter_context(local_checkpoint(options.against))
        task = bar.add_task("running in transformers", total=len(dtypes))
        results, found = verify_folder(
            folder,
            dtypes,
            lambda n: bar.advance(task, n),
            against=against,
            tokens=options.tokens,
            text=options.text,
            new_tokens=options.new_tokens,
            trust_remote_code=options.trust_remote_code,
        )
        if options.card:
            write_parity_into_card(folder, verdict(results))
    return _report(options, results, found, time.perf_counter() - started, _PEER_TITLE)


def _inspect(options: Namespace) -> int:
    from parity.checkpoints.inspect import inspect, print_inspection, print_verification, verify_files

    with local_checkpoint(options.path) as path:
        verified = verify_files(path) if options.verify else {}
        damaged = bool(verified.get("damaged_files"))
        content = verified if damaged else inspect(path) | verified
    if options.json:
        print_json(content)
    else:
        if not damaged:
            print_inspection(content, Console(width=None if os.isatty(1) else 160, highlight=False))
        if verified:
            print_verification(verified)
    return CHECK_FAILED if damaged else SUCCESS


def _record(options: Namespace) -> int:
    from gpt_core.checkpoints.adapted import config_of
    from parity.records.file import refuse_record
    from parity.records.recording import record_checkpoint
    from parity.records.tokens import tokens_for
    from parity.workers import framework_environment

    refuse_record(options.out, force=options.force)
    os.environ.update(framework_environment(options.dtype, workers=1))
    with (
        local_checkpoint(options.checkpoint) as checkpoint,
        status(f"running {options.checkpoint} in {options.framework}"),
    ):
        config = config_of(checkpoint)
        tokens = tokens_for(checkpoint, config, options.tokens, options.text)
        metadata = record_checkpoint(
            checkpoint,
            options.out,
            options.framework,
            options.dtype,
            tokens,
            trace=options.trace,
            gradients=options.gradients,
            force=options.force,
        )
    logits = [*tokens.shape, config.vocab_size]
    if options.json:
        print_json({"out": str(options.out), "tokens": list(tokens.shape), "logits": logits} | metadata)
    else:
        more = f", {len(metadata['sites'])} intermediates" if options.trace else ""
        more += f", loss and {len(metadata['gradients'])} gradients" if options.gradients else ""
        say(f"{options.out}: logits {logits}{more}, {options.framework} {options.dtype}")
    return SUCCESS


def _compare(options: Namespace) -> int:
    from parity.records.offline import (
        compare_records,
        open_checkpoint_record,
        print_comparison,
        record_pairs,
        write_json,
    )
    from parity.reports.report import print_verdict, report

    _require_report_folder(options)
    started = time.perf_counter()
    results, sources = [], []
    pairs = record_pairs(options.a, options.b)
    with progress() as bar:
        for name, *paths in bar.track(pairs, description="comparing records"):
            a, b = map(open_checkpoint_record, paths)
            results += compare_records(a, b, name=name, ignore_weights=options.ignore_weights)
            sources += [{"path": str(record.path)} | dict(record.metadata) for record in (a, b)]
    seconds = time.perf_counter() - started
    content = report(results, {}, seconds=seconds, records=sources)
    written = write_json(options.out, content) if options.out else None
    if options.json:
        print_json(content)
    else:
        console = Console(width=None if os.isatty(1) else 160)
        print_comparison(results, console)
        print_verdict(results, seconds, console)
        if written:
            console.print(one_line(f"report: {written}"), markup=False, soft_wrap=True)
    return SUCCESS if content["passed"] else CHECK_FAILED
