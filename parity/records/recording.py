"""Running one checkpoint in one framework and keeping what it computed, for a comparison elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.checkpoints.adapted import open_checkpoint
from gpt_core.checkpoints.hashing import hash_weights, unpadded
from gpt_core.errors import InputError
from gpt_core.files.reading import real_path
from gpt_core.parameters import parameter_table
from gpt_core.precision import DType
from gpt_core.sites import ROUTING_SITES, model_sites
from parity.comparison.measures import Array
from parity.comparison.tolerances import TOLERANCE
from parity.records.file import hash_tokens, refuse_record, write_record
from parity.reports.report import machine
from parity.sides import TRANSFORMERS, side_of
from parity.sides.products import library_noise
from parity.sides.runs import Batch, Run, Trace
from parity.workers import Emit


def run_checkpoint(
    path: Path, framework: str, dtype: DType, tokens: Array, batch: Batch | None = None, *, trace: Trace = False
) -> Run:
    """Logits `[batch, time, vocab]` of a checkpoint; loss and gradients where a batch is given.

    Args:
        path: A checkpoint in any known format.
        framework: "jax", "torch", or "transformers" for a folder of Hugging Face.
        dtype: What to compute in. In JAX, one process runs either float64 or the others.
        tokens: `[batch, time]`.
        batch: What the model should predict.
        trace: Which named sites to keep.

    Raises:
        InputError: a bad checkpoint, or the framework is not installed.
    """
    side = side_of(framework)
    side.prepare(dtype)
    if framework == TRANSFORMERS:  # which reads the folder itself
        peer_run: Run = side.Peer(path, dtype).run(tokens, batch, trace=trace)
        return peer_run
    checkpoint = open_checkpoint(path)
    run: Run = side.run(side.build(checkpoint.config, checkpoint.read, dtype), tokens, batch, trace=trace)
    return run


def record_checkpoint(
    path: Path,
    destination: Path,
    framework: str,
    dtype: DType,
    tokens: Array,
    *,
    trace: bool = False,
    gradients: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Run a checkpoint and write what it computed as a record (docs/records.md), one array at a time.

    Args:
        path: A checkpoint in any known format.
        destination: A file name ending in .npz, or the name of a folder.
        framework: "jax" or "torch".
        dtype: What to compute in.
        tokens: `[batch, time]`.
        trace: Whether to keep every named intermediate; what the routers of a mixture decide is kept in any case.
        gradients: Whether to keep the loss (of the next token, the mean over all positions that have one) and its
            gradient for every parameter.
        force: Whether to replace a record that is there.

    Returns:
        The metadata that was written.

    Raises:
        InputError: a bad checkpoint, tokens without a next one, a dtype that has no bound for gradients, or a
            destination that cannot be written.
    """
    refuse_record(destination, force=force)
    if gradients and ("gradients", dtype) not in TOLERANCE:
        known = [known_dtype for check, known_dtype in TOLERANCE if check == "gradients"]
        raise InputError(f"--gradients: there is no bound for gradients in {dtype}; record in {' or '.join(known)}")
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    batch = next_tokens(tokens) if gradients else None
    run = run_checkpoint(path, framework, dtype, tokens, batch, trace=trace or ROUTING_SITES)
    # "logits" is the last site and stands in every record by itself. What a router decides does too: without it nobody
    # could tell a flip from a mistake.
    kept = "" if trace else ROUTING_SITES
    sites = [site for site in model_sites(config) if site != "logits" and site.endswith(kept)]
    metadata = {
        "kind": "checkpoint",
        "framework": framework,
        "dtype": dtype,
        "checkpoint": real_path(path).name,
        "checkpoint_format": checkpoint.format,
        "config": config.to_dict(),
        "environment": machine() | side_of(framework).describe(),
        "library": library_noise(framework, config).to_dict() if dtype == "float32" else None,
        "tokens_sha256": hash_tokens(tokens),
        "weights_sha256": hash_weights(checkpoint),
        "sites": sites,
        "gradients": list(parameter_table(config)) if gradients else [],
    }

    def arrays() -> Iterator[tuple[str, Array]]:
        yield "tokens", tokens
        if gradients:
            yield "loss", np.asarray(run.loss)
            for name, parameter in parameter_table(config).items():
                yield f"gradient:{name}", unpadded(run.gradients.pop(name), parameter, config)
        for site in sites:
            yield f"site:{site}", run.sites.pop(site)
        yield "logits", run.logits

    write_record(destination, metadata, arrays(), force=force)
    return metadata


def next_tokens(tokens: Array) -> Batch:
    """At every position the token that follows; the last position has none and is masked out.

    Args:
        tokens: `[batch, time]`.

    Raises:
        InputError: rows of one token.
    """
    if tokens.shape[1] < 2:
        raise InputError("--gradients: rows of one token have no next token to predict; give longer ones")
    mask = np.ones(tokens.shape, bool)
    mask[:, -1] = False
    return Batch(np.roll(tokens, -1, axis=1), mask)


def worker(
    emit: Emit,
    path: Path,
    framework: str,
    dtypes: list[DType],
    tokens: Array,
    routing: Mapping[str, Array] | None = None,
) -> None:
    """Emit (dtype, run) for each dtype, with what routers decide, then {"environment": ..., "library": ...}.

    With `routing`, which PyTorch alone takes, routers choose what another model's have chosen.
    """
    chosen = nullcontext() if routing is None else side_of(framework).routed_as(routing)
    with chosen:
        for dtype in dtypes:
            emit((dtype, run_checkpoint(path, framework, dtype, tokens, trace=ROUTING_SITES)))
    library = library_noise(framework, open_checkpoint(path).config) if "float32" in dtypes else None
    emit({"environment": side_of(framework).describe(), "library": library})
