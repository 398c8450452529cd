"""`parity compare`: two records against each other, with no checkpoint, no framework and nothing but NumPy."""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt_core.config import ModelConfig, differing_fields
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import exists, is_folder
from gpt_core.files.writing import atomic_file
from gpt_core.parameters import parameter_table
from gpt_core.sites import model_sites
from parity.checks import CheckResult
from parity.checks.activations import check_activations
from parity.checks.gradients import check_gradients
from parity.checks.logits import check_logits
from parity.checks.loss import check_loss
from parity.checks.routing import check_routing
from parity.comparison.divergence import first_divergence
from parity.comparison.measures import Array, difference
from parity.comparison.routing import Settled, routed_blocks
from parity.comparison.tolerances import TOLERANCE, tolerance
from parity.records.file import StoredRecord, hash_tokens
from parity.reports.summary import routing_lines

_FIELDS = {
    "framework": str,
    "dtype": str,
    "checkpoint": str,
    "config": dict,
    "environment": dict,
    "tokens_sha256": str,
    "weights_sha256": str,
    "sites": list,
    "gradients": list,
}


@dataclass(frozen=True)
class CheckpointRecord:
    """What `parity record` wrote of one checkpoint; its arrays are read when they are looked up.

    Args:
        path: Where it lies.
        metadata: As written.
        config: The model.
        sites: Every named intermediate along the data's path, and "logits" at its end; empty without a trace.
        gradients: Canonical name -> gradient; empty without gradients.
        shapes: Of every array, by its name in the record.
        stored: The record itself.
    """

    path: Path
    metadata: Mapping[str, Any]
    config: ModelConfig
    sites: Mapping[str, Array]
    gradients: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]
    stored: StoredRecord

    @property
    def dtype(self) -> str:
        """What it was computed in."""
        return str(self.metadata["dtype"])

    @property
    def logits(self) -> Array:
        """`[batch, time, vocab]`."""
        return self.stored.read("logits")

    def __str__(self) -> str:
        return f"{self.path} ({self.metadata['framework']} {self.dtype}, {self.metadata['checkpoint']})"


def open_checkpoint_record(path: Path) -> CheckpointRecord:
    """Open a record of a checkpoint and hold it against what it announces.

    Raises:
        InputError: it is missing, damaged, of another version, or no record of a checkpoint.
    """
    stored = StoredRecord(path)
    metadata = stored.metadata
    if metadata.get("kind") != "checkpoint":
        raise InputError(
            f"{path}: was not written by `parity record`; compare records of other models with parity.api.compare"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(metadata.get(name), kind):
            raise InputError(f"{path}: its metadata has no {name}; record it again with `parity record`")
    sites, of_gradients = stored.listed("sites"), stored.listed("gradients")
    if ("logits", metadata["dtype"]) not in TOLERANCE:
        raise InputError(f"{path}: was computed in {shown(metadata['dtype'])}, for which there are no bounds")
    config = ModelConfig.from_dict(metadata["config"], source=f"{path}: config")
    _require_known(path, "site", sites, model_sites(config))
    _require_known(path, "gradient", of_gradients, parameter_table(config))
    members = {site: f"site:{site}" for site in sites}
    if members:
        members["logits"] = "logits"
    gradients = {name: f"gradient:{name}" for name in of_gradients}
    expected = ["tokens", *(["loss"] if gradients else []), *gradients.values(), *members.values(), "logits"]
    stored.require(expected)
    headers = {name: stored.header(name) for name in expected}
    _require_arrays(path, headers, config)
    if hash_tokens(stored.read("tokens")) != metadata["tokens_sha256"]:
        raise InputError(f"{path}: its tokens are not those that were hashed; record it again")
    return CheckpointRecord(
        path,
        metadata,
        config,
        stored.arrays(members),
        stored.arrays(gradients),
        {name: shape for name, (shape, _) in headers.items()},
        stored,
    )


def _require_known(path: Path, kind: str, names: Sequence[str], known: Container[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{path}: announces the {kind} {shown(unknown[0])}, which its config does not have")


def _require_arrays(path: Path, headers: Mapping[str, tuple[tuple[int, ...], Any]], config: ModelConfig) -> None:
    """Refuse arrays that `parity record` does not write: whole numbers in place of floats, other axes."""
    for name, (_, dtype) in headers.items():
        whole = name == "tokens" or name.endswith(".moe.chosen")
        if dtype.kind not in ("iu" if whole else "f") or dtype.itemsize > 8:
            wanted = "whole numbers" if whole else "floats of at most 64 bits"
            raise InputError(f"{path}: {name} are {dtype}, not {wanted}; record it again with `parity record`")
    tokens = headers["tokens"][0]
    shapes = {"logits": [*tokens, config.vocab_size], "loss": []} if len(tokens) == 2 and min(tokens) else {}
    wrong = [name for name in shapes.keys() & headers if list(headers[name][0]) != shapes[name]]
    if not shapes or wrong:
        name = wrong[0] if shapes else "tokens"
        raise InputError(
            f"{path}: {name} of shape {list(headers[name][0])}, expected {shapes.get(name, '[batch, time]')}"
        )


def compare_records(
    a: CheckpointRecord, b: CheckpointRecord, *, name: str = "", ignore_weights: bool = False
) -> list[CheckResult]:
    """Compare everything that two records hold, one tensor at a time; `b` is the reference.

    Args:
        a: The record in question.
        b: The reference.
        name: What to call the comparison; the config's variant unless given.
        ignore_weights: Compare runs of different weights too.

    Raises:
        InputError: they do not belong together: other tokens, weights or dtype, or arrays on one side only.
    """
    require_comparable(a, b, ignore_weights=ignore_weights)
    name, dtype = name or b.config.variant, b.dtype
    results, flipped = list[CheckResult](), False
    sites, logits = ({side: r.sites for side, r in _sides(a, b)}, {side: r.logits for side, r in _sides(a, b)})
    if routed_blocks(b.sites):
        results.append(check_routing(name, dtype, sites))
        flipped = results[0].passed and results[0].measures["flips"] > 0
        sites["a"] = Settled(a.sites, b.sites, dtype)
        logits["a"] = sites["a"]["logits"]
    results.append(check_logits(name, dtype, logits))
    if b.gradients and not flipped:  # or they are those of another function
        results.append(check_loss(name, dtype, {side: float(r.stored.read("loss")) for side, r in _sides(a, b)}))
        gradients = check_gradients(name, dtype, b.config, {side: r.gradients for side, r in _sides(a, b)})
        results.append(_name_non_finite(gradients, a.gradients, b.gradients, gradients.measures["worst_leaf"]))
    if b.sites:
        activations = check_activations(name, dtype, sites)
        if not activations.passed:
            divergence = first_divergence(sites["a"], b.sites, list(b.sites), tolerance("activations", dtype))
            activations = check_activations(name, dtype, sites, divergence=divergence)
            if divergence is not None:
                activations = _name_non_finite(activations, a.sites, b.sites, divergence.site)
        results.append(activations)
    return [_add_configs(result, a, b) for result in results]


def require_comparable(a: CheckpointRecord, b: CheckpointRecord, *, ignore_weights: bool = False) -> None:
    """Refuse records that cannot be expected to agree.

    Raises:
        InputError: with the reason, and what to do.
    """
    both = f"{a.path} and {b.path}"
    if a.metadata["tokens_sha256"] != b.metadata["tokens_sha256"]:
        shapes = " and ".join(str(list(r.shapes["tokens"])) for r in (a, b))
        raise InputError(
            f"{both}: were made from different tokens ({shapes}); give `parity record` the same --tokens FILE.npy twice"
        )
    if a.metadata["weights_sha256"] != b.metadata["weights_sha256"] and not ignore_weights:
        raise InputError(
            f"{both}: were made from different weights ({a.metadata['checkpoint']} and {b.metadata['checkpoint']}); "
            f"record the same checkpoint, converted without --dtype, or pass --ignore-weights to compare them anyway"
        )
    if a.dtype != b.dtype:
        raise InputError(f"{both}: were computed in {a.dtype} and {b.dtype}; record both with the same --dtype")
    for kind, flag, ours, theirs in (
        ("intermediates", "--trace", a.sites, b.sites),
        ("gradients", "--gradients", a.gradients, b.gradients),
    ):
        for here, there, has, lacks in ((a, b, ours, theirs), (b, a, theirs, ours)):
            missing = [site for site in has if site not in lacks]
            if missing and not lacks:
                raise InputError(f"{there.path}: has no {kind}, and {here.path} has; record both with {flag}")
            if missing:
                configs = differing_fields(a.config, b.config)
                because = f"; their configs differ: {configs}" if configs else f"; record both with {flag}"
                raise InputError(
                    f"{there.path}: lacks {len(missing)} {kind} of {here.path}, such as {missing[0]}{because}"
                )
    for member, shape in b.shapes.items():
        if a.shapes[member] != shape:
            raise InputError(
                f"{a.path} has {member} {list(a.shapes[member])} and {b.path} has {list(shape)}; record the same model"
            )


def record_pairs(a: Path, b: Path) -> list[tuple[str, Path, Path]]:
    """What to compare with what: two records, or the records of two folders by name.

    Returns:
        (name, record in question, reference); the name is "" for two records.

    Raises:
        InputError: one is a folder of records and the other is not, or they do not hold the same names.
    """
    folders = [is_folder(path) and not _is_record(path) for path in (a, b)]
    if not any(folders):
        return [("", a, b)]
    if not all(folders):
        single, folder = (b, a) if folders[0] else (a, b)
        if not exists(single):
            raise InputError(f"{single}: no such file or folder")
        raise InputError(f"{folder} is a folder of records and {single} is one record; give two of a kind")
    ours, theirs = ({path.name for path in folder.iterdir() if _is_record(path)} for folder in (a, b))
    for folder, names in ((a, ours), (b, theirs)):
        if not names:
            raise InputError(f"{folder}: holds no records; write some into it with `parity record`")
    for folder, alone in ((a, theirs - ours), (b, ours - theirs)):
        if alone:
            raise InputError(f"{folder}: lacks {len(alone)} records of the other folder, such as {min(alone)}")
    return [(name.removesuffix(".npz"), a / name, b / name) for name in sorted(ours)]


def print_comparison(results: Sequence[CheckResult], console: Console) -> None:
    """A table for people: one line a check, and below it why one failed."""
    table = Table("record", "check", "dtype", "largest at")
    table.add_column("relative error", justify="right")
    table.add_column("bound", justify="right")
    table.add_column("")
    for result in results:
        verdict = "[green]equal[/green]" if result.passed else "[red]DIFFER[/red]"
        error, bound = f"{result.relative_error:.1e}", f"{result.tolerance:.0e}"
        table.add_row(result.variant, result.check, result.dtype, _place(result), error, bound, verdict)
    console.print(table)
    for line in routing_lines([result.to_dict() for result in results]):
        console.print(line, markup=False, soft_wrap=True)
    for result in results:
        if not result.passed:
            place = f"{result.variant} {result.dtype} {result.check}"
            console.print(f"FAILED {place}: {result.reason}", style="red", markup=False, soft_wrap=True)


def write_json(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write `report.json` alone: pages and figures need libraries that a machine with records may lack.

    Raises:
        InputError: the folder cannot be written.
    """
    destination = folder / "report.json"
    with atomic_file(destination) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return destination


def _place(result: CheckResult) -> str:
    """Where a check found its largest error: a site, a leaf, or an index."""
    found = result.measures.get("worst_site") or result.measures.get("worst_leaf") or ""
    return str(found or result.measures.get("worst_index", ""))


def _is_record(path: Path) -> bool:
    return (path / "metadata.npy").is_file() if path.is_dir() else path.suffix == ".npz"


def _sides(a: CheckpointRecord, b: CheckpointRecord) -> Iterator[tuple[str, CheckpointRecord]]:
    yield from (("a", a), ("b", b))


def _name_non_finite(result: CheckResult, a: Mapping[str, Array], b: Mapping[str, Array], name: str) -> CheckResult:
    """The same result; where NaN or inf is why it failed, its reason says so first."""
    found = difference(a[name], b[name])
    if result.passed or found.max_abs < float("inf"):
        return result
    return replace(result, reason=f"NaN or inf in {name} at {found.worst_index}; {result.reason}")


def _add_configs(result: CheckResult, a: CheckpointRecord, b: CheckpointRecord) -> CheckResult:
    configs = differing_fields(a.config, b.config)
    if result.passed or not configs:
        return result
    return replace(result, reason=f"{result.reason}; the configs differ: {configs}")
