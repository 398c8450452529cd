"""One worker's share of the grid: both twins of each case, every check, every fault."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt_core.precision import DType
from parity.faults.catalogue import fault_named
from parity.grid.cases import checks
from parity.grid.planting import fault_runs
from parity.grid.subject import Attention, Subject
from parity.grid.variants import select
from parity.sides import FRAMEWORKS, side_of
from parity.workers import Emit


@dataclass(frozen=True)
class GridOptions:
    """What to run.

    Args:
        variants: Names of cases; empty for all.
        dtypes: What to compute in.
        fault: Name of a fault to plant in the PyTorch twin for every check, or None.
        checks: Whether to run the checks.
        faults: Whether to plant every fault where it bites, and see it caught.
        places: Variant -> faults that are planted in it.
        full: Run what is heavier too: training curves, fp32 gradients, every fault in every variant.
        whole: Run every check of the cases that are brief too, as where they are named.
        attention: What each side runs.
    """

    variants: list[str] = field(default_factory=list)
    dtypes: list[DType] = field(default_factory=lambda: ["float64"])
    fault: str | None = None
    checks: bool = True
    faults: bool = False
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)
    full: bool = False
    whole: bool = True
    attention: Attention = field(default_factory=Attention)


def worker(emit: Emit, options: GridOptions) -> None:
    """Emit {"environment": ...} once, then for every case and dtype a list of `CheckResult`s and `FaultRun`s.

    The options' dtypes must be able to share a process: float64 alone, or the others.
    """
    jax_side, torch_side = side_of("jax"), side_of("torch")
    for side in (jax_side, torch_side):
        side.prepare(options.dtypes[0])
    attention = options.attention
    for case in select(options.variants):
        attention.require(case.config, options.dtypes)
    chosen = {f"{framework}_attention": getattr(attention, framework) for framework in FRAMEWORKS}
    emit({"environment": jax_side.describe() | torch_side.describe() | chosen})
    fault = None if options.fault is None else fault_named(options.fault)
    for case in select(options.variants):
        for dtype in options.dtypes:
            subject = Subject(case, dtype, attention, full=options.full, whole=options.whole)
            found: list[Any] = list(checks(subject, fault)) if options.checks else []
            if options.faults:
                found += fault_runs(subject, options.places.get(case.variant, ()))
            emit(found)
