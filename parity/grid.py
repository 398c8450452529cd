"""One worker's share of the grid: build both twins for each case, run them, check them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt_core.precision import DType, Precision
from parity.checks import CheckResult
from parity.checks.logits import check_logits
from parity.checks.weights import check_weights, through_files
from parity.compare import Array
from parity.convert import DTYPES
from parity.faults import fault_named, planted
from parity.sides import side_of
from parity.variants import Case, select, sharp_weights, text_tokens
from parity.weights import Weights, cast, weights_source
from parity.workers import Emit


@dataclass(frozen=True)
class GridOptions:
    """What to run.

    Args:
        variants: Names of cases; empty for all.
        dtypes: What to compute in.
        fault: Name of a fault to plant in the PyTorch twin, or None.
    """

    variants: list[str] = field(default_factory=list)
    dtypes: list[DType] = field(default_factory=lambda: ["float64"])
    fault: str | None = None


def worker(emit: Emit, options: GridOptions) -> None:
    """Emit {"environment": ...} once, then a list of `CheckResult`s for every case and dtype.

    The options' dtypes must be able to share a process: float64 alone, or the others.
    """
    jax_side, torch_side = side_of("jax"), side_of("torch")
    for side in (jax_side, torch_side):
        side.prepare(options.dtypes[0])
    emit({"environment": jax_side.describe() | torch_side.describe()})
    tokens = text_tokens()
    for case in select(options.variants):
        for dtype in options.dtypes:
            emit(list(check_case(case, dtype, tokens, options.fault)))


def check_case(case: Case, dtype: DType, tokens: Array, fault_name: str | None = None) -> Iterator[CheckResult]:
    """Every check of one case in one dtype."""
    jax_side, torch_side = side_of("jax"), side_of("torch")
    fault = None if fault_name is None else fault_named(fault_name)
    stored = DTYPES[Precision.of(dtype).param_dtype]
    sharp = {name: array.astype(stored) for name, array in sharp_weights(case.config).items()}
    source = weights_source(sharp)

    jax_model = jax_side.build(case.config, source, dtype, scan_layers=case.scan_layers)
    torch_model = torch_side.build(case.config, source, dtype)
    yield _weights(case, dtype, sharp, jax_side.weights_of(jax_model), torch_side.weights_of(torch_model))

    program = jax_side.Program(jax_model, tokens)
    jax_logits, _ = program(jax_model)
    truth = None
    if dtype != "float64":
        truth, _ = torch_side.forward(torch_side.build(case.config, cast(source, np.float64), "float64"), tokens)
    with planted(fault, torch_model):
        torch_logits, _ = torch_side.forward(torch_model, tokens)
    yield check_logits(case.variant, dtype, {"jax": jax_logits, "torch": torch_logits}, truth)

    if dtype == "bfloat16" or fault is not None:
        return
    # Each framework's own initialisation, carried to the other.
    started_in_jax = jax_side.fresh(case.config, seed=1, dtype=dtype, scan_layers=case.scan_layers)
    carried_to_torch = torch_side.build(case.config, weights_source(jax_side.weights_of(started_in_jax)), dtype)
    logits = {"jax": program(started_in_jax)[0], "torch": torch_side.forward(carried_to_torch, tokens)[0]}
    yield check_logits(case.variant, dtype, logits, origin="jax")

    started_in_torch = torch_side.fresh(case.config, seed=1, dtype=dtype)
    source = weights_source(torch_side.weights_of(started_in_torch))
    carried_to_jax = jax_side.build(case.config, source, dtype, scan_layers=case.scan_layers)
    logits = {"jax": program(carried_to_jax)[0], "torch": torch_side.forward(started_in_torch, tokens)[0]}
    yield check_logits(case.variant, dtype, logits, origin="torch")


def _weights(case: Case, dtype: DType, sharp: Weights, from_jax: Weights, from_torch: Weights) -> CheckResult:
    """Round trips through both models and, in the dtype that files keep, through both formats."""
    as_stored: dict[str, Any] = {name: array.astype(DTYPES[dtype]) for name, array in sharp.items()}
    copies = {
        "torch file -> jax file -> torch file": through_files(case.config, as_stored, ["torch", "jax", "torch"]),
        "jax file -> torch file -> jax file": through_files(case.config, as_stored, ["jax", "torch", "jax"]),
    }
    if dtype == "bfloat16":  # models keep fp32 parameters then
        return check_weights(case.variant, dtype, as_stored, copies)
    models = {"numpy -> jax model -> numpy": from_jax, "numpy -> torch model -> numpy": from_torch}
    return check_weights(case.variant, dtype, as_stored, models | copies)
