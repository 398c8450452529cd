"""`parity verify`: a folder of Hugging Face in transformers, against our models reading the same folder.

Also the grid of variants, each exported, loaded by transformers, and converted back (`parity check --hugging-face`).
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from gpt_core.checkpoints.adapted import open_checkpoint
from gpt_core.errors import InputError
from gpt_core.files.reading import real_path
from gpt_core.formats import format_of, is_hugging_face
from gpt_core.precision import DType
from gpt_core.sites import ROUTING_SITES
from gpt_core.storage.weights import weights_source
from parity.check import Outcome, Progress, dtype_groups
from parity.checkpoints.convert import convert
from parity.checks import CheckResult
from parity.checks.peer import check_decode, check_runs, gap_at
from parity.checks.weights import check_export
from parity.comparison.measures import Array
from parity.grid.families import family_configs
from parity.grid.variants import Case, attention_variants, next_token_batch, sharp_weights, text_tokens
from parity.records.recording import next_tokens
from parity.records.tokens import tokens_for
from parity.sides import FRAMEWORKS, TRANSFORMERS, side_of
from parity.sides.products import library_noise
from parity.sides.runs import Batch
from parity.workers import Emit, Job, framework_environment, run_side_by_side

NEW_TOKENS = 64
DTYPES: list[DType] = ["float64", "float32"]


def verify_folder(
    folder: Path,
    dtypes: list[DType],
    advance: Progress,
    *,
    against: Path | None = None,
    tokens: Path | None = None,
    text: Path | None = None,
    new_tokens: int = NEW_TOKENS,
    trust_remote_code: bool = False,
) -> Outcome:
    """Hold a folder, as transformers runs it, against our models of the same folder, in the frameworks that are there.

    Args:
        folder: An exported or downloaded folder.
        dtypes: What to compute in, out of `DTYPES`.
        advance: Called with 1 for each dtype done.
        against: A checkpoint that the folder was exported from: its weights must be the folder's, bit by bit.
        tokens: A .npy file of token ids; see `parity.records.tokens`.
        text: A text file for the folder's tokenizer.
        new_tokens: How many tokens to generate greedily; with learned positions, as many as the context leaves.
        trust_remote_code: Whether transformers may run modelling code that lies in the folder.

    Raises:
        InputError: a bad folder, or transformers and a framework are not installed.
    """
    checkpoint = open_checkpoint(folder)
    if not is_hugging_face(checkpoint.format):
        raise InputError(
            f"{folder}: is a {checkpoint.format} checkpoint; verify takes a folder of Hugging Face, which `parity "
            f"convert {folder} EXPORT --to hf` makes"
        )
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown:
        raise InputError(f"--dtype {unknown[0]}: verify computes in {' or '.join(DTYPES)}")
    ids = tokens_for(folder, checkpoint.config, tokens, text)
    if ids.shape[1] < 2:
        raise InputError("rows of one token have no next token to predict; give longer ones")
    results = [] if against is None else [check_export(real_path(folder).name, open_checkpoint(against), checkpoint)]
    shared = {"path": folder, "tokens": ids, "new_tokens": new_tokens, "trust_remote_code": trust_remote_code}
    jobs = [
        Job(
            "parity.verify:folder_worker",
            shared | {"dtypes": group},
            framework_environment(group[0], workers=len(dtype_groups(dtypes)), quick_compile=True),
        )
        for group in dtype_groups(dtypes)
    ]
    found, environment = _collect(jobs, advance)
    return results + found, {"environment": environment, "notices": _notices(found)}


def verify_grid(variants: list[str], dtypes: list[DType], advance: Progress) -> Outcome:
    """Every variant as an export: loaded by transformers and compared, and converted back bit by bit.

    Args:
        variants: Names of `hugging_face_cases`; all of them when there are none.
        dtypes: What to compute in, out of `DTYPES`; others are left out.
        advance: Called with 1 for each case and dtype done.

    Raises:
        InputError: an unknown variant or dtype, or transformers and a framework are not installed.
    """
    known = {case.variant: case for case in hugging_face_cases()}
    unknown = [name for name in variants if name not in known]
    if unknown:
        raise InputError(f"unknown variant {', '.join(map(repr, unknown))}; known are: {', '.join(known)}")
    dtypes = [dtype for dtype in dtypes if dtype in DTYPES]
    if not dtypes:
        raise InputError(f"--hugging-face computes in {' or '.join(DTYPES)}; add one of them to --dtype")
    names = variants or list(known)
    jobs = [
        Job(
            "parity.verify:grid_worker",
            {"variants": names, "dtypes": group},
            framework_environment(group[0], workers=len(dtype_groups(dtypes)), quick_compile=True),
        )
        for group in dtype_groups(dtypes)
    ]
    results, environment = _collect(jobs, advance)
    order = {name: place for place, name in enumerate(names)}
    results.sort(key=lambda result: (order[result.variant.split(":")[0]], DTYPES.index(result.dtype)))  # type: ignore[arg-type]  # only these are computed in
    return results, {"environment": environment}


def hugging_face_cases() -> list[Case]:
    """The twelve variants, those without q/k/v biases that have a native target only then, and every family.

    With room for 64 tokens. A family is named as the format that it goes to.
    """
    twelve = [replace(case, config=replace(case.config, context_length=128)) for case in attention_variants()]
    without = [
        replace(case, variant=f"{case.variant}+no-qkv-bias", config=replace(case.config, qkv_bias=False))
        for case in twelve
        if case.config.position == "learned" and case.config.sliding_window is not None
    ]
    return [*twelve, *without, *(Case(name, config) for name, config in family_configs().items())]


def _collect(jobs: list[Job], advance: Progress) -> tuple[list[CheckResult], dict[str, Any]]:
    results: list[CheckResult] = []
    environment: dict[str, Any] = {}

    def on_event(_: int, event: Any) -> None:
        if isinstance(event, dict):
            environment.update(event["environment"])
        else:
            results.extend(event)
            advance(1)

    run_side_by_side(jobs, on_event)
    return results, environment


def _notices(results: list[CheckResult]) -> list[str]:
    """How the peer generated otherwise than its folder says, one sentence each."""
    measures = [result.measures for result in results if result.check == "decode"]
    aside = {name: value for found in measures for name, value in found.get("set_aside", {}).items()}
    notices = []
    if aside:
        said = ", ".join(f"{name} {shorten(json.dumps(value), 40)}" for name, value in aside.items())
        notices.append(f"greedy is greedy: {TRANSFORMERS} generated without what the folder sets ({said})")
    if any(found.get("peer_cache") is False for found in measures):
        notices.append(
            f"{TRANSFORMERS} generated without its own cache, which at a window of 1 is another function than its model"
        )
    return notices


def folder_worker(
    emit: Emit, path: Path, dtypes: list[DType], tokens: Array, new_tokens: int, trust_remote_code: bool
) -> None:
    """Emit a list of results for each dtype, then {"environment": ...}."""
    sides = _prepared(dtypes[0])
    for dtype in dtypes:
        emit(
            list(
                peer_checks(
                    real_path(path).name,
                    path,
                    dtype,
                    tokens,
                    next_tokens(tokens),
                    new_tokens=new_tokens,
                    trust_remote_code=trust_remote_code,
                )
            )
        )
    emit({"environment": _describe(sides)})


def grid_worker(emit: Emit, variants: list[str], dtypes: list[DType]) -> None:
    """Emit a list of results for each variant and dtype, then {"environment": ...}."""
    sides = _prepared(dtypes[0])
    known = {case.variant: case for case in hugging_face_cases()}
    for name in variants:
        config = known[name].config
        weights = {row: array.astype(np.float32) for row, array in sharp_weights(config).items()}
        tokens = text_tokens(config.vocab_size)
        with tempfile.TemporaryDirectory() as temporary:
            ours, export, back, again = (Path(temporary) / part for part in ("ours", "export", "back", "again"))
            ours.mkdir()
            stored = {row: array.dtype for row, array in weights.items()}
            format_of("torch").write(ours, config, weights_source(weights), stored, None)
            target = name.split(",")[0] if name.startswith("hf-") else "hf"
            convert(ours, export, target, allow_remote_code=True)
            for dtype in dtypes:
                results = list(
                    peer_checks(
                        name,
                        export,
                        dtype,
                        tokens,
                        next_token_batch(tokens),
                        new_tokens=NEW_TOKENS,
                        trust_remote_code=True,
                        unrolled=dtype == "float64" and target != "hf",
                    )
                )
                if dtype == dtypes[0]:
                    convert(export, back, "jax")
                    convert(back, again, target, allow_remote_code=True)
                    results.insert(0, check_export(name, open_checkpoint(again), open_checkpoint(export)))
                emit(results)
    emit({"environment": _describe(sides)})


def peer_checks(
    variant: str,
    path: Path,
    dtype: DType,
    tokens: Array,
    batch: Batch,
    *,
    new_tokens: int,
    trust_remote_code: bool = False,
    unrolled: bool = False,
) -> Iterator[CheckResult]:
    """Every comparison of a folder in one dtype, for each of our frameworks that is installed.

    Args:
        variant: Name of the case; ": FRAMEWORK" is appended.
        path: A folder of Hugging Face.
        dtype: float64 or float32.
        tokens: `[batch, time]`.
        batch: What to predict.
        new_tokens: How many tokens to generate greedily.
        trust_remote_code: Whether transformers may run modelling code that lies in the folder.
        unrolled: Whether the JAX twin runs once more, its blocks one after the other.
    """
    peer_side, checkpoint = side_of(TRANSFORMERS), open_checkpoint(path)
    config = checkpoint.config
    gradients = dtype == "float64"
    peer = peer_side.Peer(path, dtype, trust_remote_code=trust_remote_code)
    theirs = peer.run(tokens, batch, gradients=gradients)
    truth = None
    if dtype == "float32":
        exact = peer_side.Peer(path, "float64", trust_remote_code=trust_remote_code)
        truth = exact.run(tokens, trace=ROUTING_SITES)
    prompt, new = _prompt(tokens, config.context_length, new_tokens)
    generated = peer.generate(prompt, new) if new else None
    for framework in _installed():
        side, name = side_of(framework), f"{variant}: {framework}"
        model = side.build(config, checkpoint.read, dtype)
        libraries = {of: library_noise(of, config) for of in (framework, TRANSFORMERS)} if dtype == "float32" else None
        run = side.run(model, tokens, batch, gradients=gradients)
        yield from check_runs(name, dtype, config, framework, run, theirs, truth, libraries)
        if generated is not None:
            ours = side.write(model, prompt, new)
            gap = partial(gap_at, side.logits_function(model), prompt, ours)
            settings = {"set_aside": peer.set_aside} if peer.set_aside else {}
            settings |= {} if peer.caches else {"peer_cache": False}
            yield check_decode(name, dtype, ours, generated, gap, settings)
        if unrolled and framework == "jax":
            run = side.run(side.build(config, checkpoint.read, dtype, scan_layers=False), tokens, batch)
            yield from check_runs(f"{name}, unrolled", dtype, config, framework, run, theirs, truth, libraries)


def _prompt(tokens: Array, context_length: int, new: int) -> tuple[Array, int]:
    """A prompt that leaves room for new tokens in the context, and for how many."""
    new = min(new, context_length - 1)
    return tokens[:, : max(1, min(tokens.shape[1], context_length - new))], new


def _prepared(dtype: DType) -> list[str]:
    """The frameworks that are there, made ready for a dtype.

    Raises:
        InputError: transformers is not, or neither of ours.
    """
    side_of(TRANSFORMERS)
    names = _installed()
    if not names:
        raise InputError("neither JAX nor PyTorch is installed: pip install 'twingpt[parity]'")
    for name in (*names, TRANSFORMERS):
        side_of(name).prepare(dtype)
    return names


def _installed() -> list[str]:
    names = []
    for name in FRAMEWORKS:
        try:
            side_of(name)
        except InputError:
            continue
        names.append(name)
    return names


def _describe(sides: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in (*sides, TRANSFORMERS):
        describe: Callable[[], dict[str, str]] = side_of(name).describe
        found |= describe()
    return found
