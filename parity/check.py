"""`parity check`: the grid of variants, or two checkpoints against each other."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.checkpoints.adapted import open_checkpoint
from gpt_core.config import differing_fields
from gpt_core.errors import InputError
from gpt_core.formats import is_hugging_face
from gpt_core.formats.base import Checkpoint
from gpt_core.parameters import parameter_table
from gpt_core.precision import DType
from parity.checks import CheckResult
from parity.checks.logits import check_logits
from parity.checks.routing import check_routing
from parity.checks.weights import check_export, check_weights
from parity.comparison.measures import Array
from parity.comparison.routing import routed_blocks, settled_logits
from parity.grid.planting import FaultRun, places, summarise
from parity.grid.variants import select
from parity.grid.worker import GridOptions
from parity.records.tokens import require_fitting, tokens_for
from parity.sides import TRANSFORMERS
from parity.sides.products import LibraryNoise
from parity.sides.runs import Run
from parity.workers import Job, framework_environment, run_side_by_side

Outcome = tuple[list[CheckResult], dict[str, Any]]
Progress = Callable[[int], None]
_LAST = 0.22  # share of the cases whose fp64 takes as long as its process takes longer than that of the other dtypes


def dtype_groups(dtypes: list[DType]) -> list[list[DType]]:
    """Dtypes that may share a process: fp64 alone, and the others."""
    proof: list[DType] = ["float64"] if "float64" in dtypes else []
    others: list[DType] = [dtype for dtype in dtypes if dtype != "float64"]
    return [group for group in (proof, others) if group]


def check_grid(options: GridOptions, advance: Progress) -> Outcome:
    """Run the grid, fp64 and the other dtypes in processes of their own, side by side.

    Args:
        options: What to run.
        advance: Called with the number of cases just done; there are cases x dtypes in all.

    Returns:
        The results in the order of the grid, and more for the report: the frameworks' part of "environment", "faults",
        "descriptions" of variants whose name does not say what they are, and "notices" of those of them that failed.

    Raises:
        InputError: an unknown variant, or a framework that is not installed.
    """
    cases = select(options.variants)
    names = [case.variant for case in cases]
    options = replace(options, whole=options.full or bool(options.variants))
    planted_in = places(cases, full=options.full, whole=options.whole)
    groups = dtype_groups(options.dtypes)
    shares = [(group, names) for group in groups]
    last = max(2, round(_LAST * len(names)))
    if len(groups) > 1 and len(names) > last:  # fp64 takes longer: whoever is done first does the last of its cases
        shares = [(groups[0], names[:-last]), (groups[1], names), (groups[0], names[-last:])]
    jobs = [
        Job(
            "parity.grid.worker:worker",
            {"options": replace(options, dtypes=group, variants=share, places=planted_in)},
            framework_environment(group[0], workers=len(groups), quick_compile=not options.full),
        )
        for group, share in shares
    ]
    results: list[CheckResult] = []
    planted: list[FaultRun] = []
    environment: dict[str, Any] = {"xla_flags": jobs[0].environment["XLA_FLAGS"]}

    def on_event(_: int, event: Any) -> None:
        if isinstance(event, dict):
            environment.update(event["environment"])
            return
        results.extend(found for found in event if isinstance(found, CheckResult))
        planted.extend(found for found in event if isinstance(found, FaultRun))
        advance(1)

    run_side_by_side(jobs, on_event, at_once=len(groups))
    order = {"float64": 0, "float32": 1, "bfloat16": 2}
    results.sort(key=lambda result: (names.index(result.variant), order[result.dtype]))
    planted.sort(key=lambda run: names.index(run.variant))
    descriptions = {case.variant: case.description for case in cases if case.description}
    failed = dict.fromkeys(result.variant for result in results if not result.passed)
    more = {
        "descriptions": descriptions,
        "notices": [f"{name} is {descriptions[name]}" for name in failed if name in descriptions],
    }
    return results, {"environment": environment, "faults": summarise(planted)} | more


def check_checkpoints(
    first: Path,
    second: Path,
    dtypes: list[DType],
    advance: Progress,
    *,
    tokens: Path | None = None,
    text: Path | None = None,
) -> Outcome:
    """Compare two checkpoints, each run in the framework of its format.

    Args:
        first: A checkpoint in any known format; one of Hugging Face runs in transformers.
        second: Another; the reference.
        dtypes: What to compute in.
        advance: Called with the number of runs just done; there are 2 x dtypes in all.
        tokens: A .npy file of token ids; see `parity.records.tokens`.
        text: A text file for the checkpoint's own tokenizer.

    Raises:
        InputError: a bad checkpoint or bad tokens, or models whose logits cannot be compared.
    """
    opened = {"A": open_checkpoint(first), "B": open_checkpoint(second)}
    config_a, config_b = opened["A"].config, opened["B"].config
    if config_a.vocab_size != config_b.vocab_size:
        raise InputError(
            f"{first} and {second} have vocabularies of {config_a.vocab_size} and {config_b.vocab_size} tokens; "
            f"their logits cannot be compared"
        )
    ids = tokens_for(first, config_a, tokens, text)
    require_fitting(ids, config_b, str(tokens or text or "the built-in text"))

    runs: dict[tuple[str, DType], Run] = {}
    names = {side: f"{side}:{checkpoint.format}" for side, checkpoint in opened.items()}
    libraries: dict[str, LibraryNoise] = {}
    environment: dict[str, Any] = {"config_differences": differing_fields(config_a, config_b)}
    wanted: list[DType] = ["float64", *(dtype for dtype in dtypes if dtype != "float64")]
    for group in dtype_groups(wanted):
        jobs = [_job(checkpoint, group, ids) for checkpoint in opened.values()]

        def on_event(index: int, event: Any) -> None:
            if isinstance(event, dict):
                environment.update(event["environment"])
                if event["library"] is not None:
                    libraries[names["AB"[index]]] = event["library"]
            else:
                dtype, run = event
                runs["AB"[index], dtype] = run
                advance(1)

        run_side_by_side(jobs, on_event)

    name = f"{first.name} against {second.name}"
    results = [_check_stored(name, opened["A"], opened["B"])]
    for dtype in dtypes:
        ours = {names[side]: runs[side, dtype] for side in names}
        exact = [] if dtype == "float64" else [runs["B", "float64"]]
        if all(routed_blocks(run.sites) for run in ours.values()):
            sites = {side: run.sites for side, run in ours.items()}
            results.append(check_routing(name, dtype, sites, origin="checkpoint"))
            if dtype == "bfloat16" and results[-1].passed and results[-1].measures["flips"]:
                ours, exact = _under_one_choice(opened, names, ours, ids), []
        compared = [*ours.values(), *exact]
        logits = settled_logits([run.logits for run in compared], [run.sites for run in compared], dtype)
        pair, truth = dict(zip(ours, logits, strict=False)), logits[2] if exact else None
        results.append(check_logits(name, dtype, pair, truth, origin="checkpoint", libraries=libraries))
    return results, {"environment": environment}


def _under_one_choice(
    opened: Mapping[str, Checkpoint], names: Mapping[str, str], runs: Mapping[str, Run], tokens: Array
) -> dict[str, Run]:
    """Runs of two mixtures in bf16, where one that PyTorch runs chooses the experts of the other once more.

    As they are, where PyTorch runs neither.
    """
    follower = next((side for side in reversed(list(names)) if _framework(opened[side]) == "torch"), None)
    if follower is None:
        return dict(runs)
    leader = next(run for side, run in runs.items() if side != names[follower])
    followed = dict(runs)

    def on_event(_: int, event: Any) -> None:
        if not isinstance(event, dict):
            followed[names[follower]] = event[1]

    run_side_by_side([_job(opened[follower], ["bfloat16"], tokens, leader.sites)], on_event)
    return followed


def _framework(checkpoint: Checkpoint) -> str:
    return TRANSFORMERS if is_hugging_face(checkpoint.format) else checkpoint.format


def _job(checkpoint: Checkpoint, dtypes: list[DType], tokens: Array, routing: Mapping[str, Array] | None = None) -> Job:
    arguments = {"path": checkpoint.path, "framework": _framework(checkpoint), "dtypes": dtypes, "tokens": tokens}
    environment = framework_environment(dtypes[0], workers=2)
    return Job("parity.records.recording:worker", arguments | {"routing": routing}, environment)


def _check_stored(name: str, a: Checkpoint, b: Checkpoint) -> CheckResult:
    """Stored weights, bit by bit; where both store another dtype, by value in fp64.

    Where one of them is a folder of Hugging Face, the other is held against it as that format would hold it.
    """
    exports = [side for side in (a, b) if is_hugging_face(side.format)]
    if len(exports) == 1:
        return replace(check_export(name, a if exports[0] is b else b, exports[0]), origin="checkpoint")
    table_a, table_b = parameter_table(a.config), parameter_table(b.config)
    weights_a = {row: a.read(parameter) for row, parameter in table_a.items()}
    weights_b = {row: b.read(parameter) for row, parameter in table_b.items()}
    dtypes = {array.dtype.name for array in (*weights_a.values(), *weights_b.values())}
    if len(dtypes) > 1:
        weights_a, weights_b = (
            {row: array.astype(np.float64) for row, array in weights.items()} for weights in (weights_a, weights_b)
        )
    dtype = dtypes.pop() if len(dtypes) == 1 else "float64"
    return replace(check_weights(name, dtype, weights_b, {f"{a.path.name}": weights_a}), origin="checkpoint")
