"""Planting every fault where it must bite, and seeing that the very check that guards against it fails."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parity.checks import CheckResult
from parity.checks.activations import check_activations
from parity.checks.adapter import check_adapter
from parity.checks.balance import check_balance
from parity.checks.chat import check_chat
from parity.checks.decode import check_decode
from parity.checks.gradients import check_gradients
from parity.checks.logits import check_logits
from parity.checks.loss import check_loss
from parity.checks.optimizer import check_optimizer
from parity.checks.routing import check_routing
from parity.checks.segments import check_segments
from parity.comparison.measures import Array
from parity.comparison.tolerances import TOLERANCE
from parity.faults.catalogue import FAULTS, fault_named, planted
from parity.faults.fault import Fault
from parity.grid.subject import ADAMW, OPTIMIZER_STEPS, Subject
from parity.grid.variants import Case
from parity.sides.products import Libraries

_FIRST = ("learned-mha-full", "rope-gqa-window")
"""Cases of the twelve in which a fault is planted before all others."""

_LEFT_OUT = ("decode", "optimizer")
"""Checks that a brief case has not."""

_FURTHER = ("segments", "balance", "adapter", "chat")
"""Checks of documents, router losses, adapters and conversations, which few cases have where cases are not named."""

_OF_THE_TWELVE = ("noise", "adapter", "chat")
"""Checks that no other case has."""

_ENOUGH = 4
"""Cases in which the default run plants a fault. It bites in others too; --full plants it in them as well."""


@dataclass(frozen=True)
class FaultRun:
    """One fault in one variant.

    Args:
        fault: Its name.
        variant: Where it was planted.
        expected_site: Where the first-divergence search must point; "" for a fault that has no site.
        caught: Whether the check failed, as it must.
        margin: Error over tolerance.
        margin_float32: Error over the fp32 tolerance, for checks that have one.
        found_site: Where the first-divergence search pointed; "" when it was not asked.
        hint: What the search took it for.
    """

    fault: str
    variant: str
    expected_site: str
    caught: bool
    margin: float
    margin_float32: float | None
    found_site: str
    hint: str


def places(cases: Sequence[Case], *, full: bool, whole: bool = True) -> dict[str, list[str]]:
    """Variant -> names of the faults that are planted in it.

    Args:
        cases: Where to plant.
        full: Everywhere where a fault bites; otherwise in some cases, first of the twelve and then, of those that
            cover all choices, in the ones that have the fewest.
        whole: Whether all cases have every check; otherwise no fault is planted for one that a case has not.
    """
    planted: dict[str, list[str]] = {case.variant: [] for case in cases}
    for fault in FAULTS:
        biting = [case for case in cases if fault.bites(case.config)]
        if not full:
            # The noise floor's margin is that of a model, and the twelve show it; adapters stand beside any.
            biting = [case for case in biting if fault.caught_by not in _OF_THE_TWELVE or not case.covering]
            if fault.caught_by in _LEFT_OUT and not whole:
                biting = [case for case in biting if not case.brief]
            if fault.caught_by in _FURTHER and not whole:
                biting = [case for case in biting if case.further]
            biting.sort(key=lambda case: (case.variant not in _FIRST, not case.covering, len(planted[case.variant])))
            biting = biting[:_ENOUGH]
        for case in biting:
            planted[case.variant].append(fault.name)
    return planted


def fault_runs(subject: Subject, names: Sequence[str]) -> Iterator[FaultRun]:
    """Plant some faults in a case: those of the noise floor in fp32, all others in fp64."""
    for fault in map(fault_named, names):
        if subject.dtype == ("float32" if fault.caught_by == "noise" else "float64"):
            yield run_fault(fault, subject)


def run_fault(fault: Fault, subject: Subject) -> FaultRun:
    """Plant one fault in a PyTorch twin of its own and run the check that must catch it."""
    model = subject.adapted_torch() if fault.caught_by == "adapter" else subject.definition()
    # Made before the fault is planted: the truth and what the libraries can do must be free of it.
    truth = subject.truth.sites if fault.caught_by == "noise" else None
    libraries = subject.libraries
    with planted(fault, model):
        result, site, hint = _caught_by(fault, subject, model, truth, libraries)
    bound = TOLERANCE.get((fault.caught_by, "float32"))
    if fault.caught_by == "noise":
        margin, margin32 = result.measures["noise_ratio"] / result.measures["noise_allowed"], None
    else:
        margin = result.relative_error / result.tolerance
        margin32 = None if bound is None else result.relative_error / bound
    # By the error itself, and not by another reason for which the check may fail.
    caught = not result.passed and margin > 1 and (margin32 is None or margin32 > 1)
    site_expected = fault.site_in(subject.config)
    return FaultRun(fault.name, subject.case.variant, site_expected, caught, margin, margin32, site, hint)


def _caught_by(
    fault: Fault, subject: Subject, model: Any, truth: Mapping[str, Array] | None, libraries: Libraries | None
) -> tuple[CheckResult, str, str]:
    variant, dtype, reference = subject.case.variant, subject.dtype, subject.jax_run
    if fault.caught_by == "optimizer":
        trainings = {"jax": subject.jax_training, "torch": subject.train_torch(OPTIMIZER_STEPS, model)}
        result = check_optimizer(variant, dtype, subject.config, subject.weights, trainings, ADAMW.clip_norm)
        return result, "", ""
    if fault.caught_by == "segments":
        jax, torch = subject.jax_documents, subject.torch_documents(model, gradients=False)
        packed, alone = ({"jax": ours, "torch": theirs} for ours, theirs in zip(jax, torch, strict=True))
        return check_segments(variant, dtype, subject.config, packed, alone, forward=True), "", ""
    if fault.caught_by == "balance":
        sides = {"torch": subject.torch_balance(model), "jax": subject.jax_balance}
        result = check_balance(variant, dtype, subject.config, sides, reference.sites, subject.batch.mask)
        return result, "", ""
    if fault.caught_by == "chat":
        return check_chat(variant, dtype), "", ""
    if fault.caught_by == "adapter":
        run = subject.torch.run(model, subject.tokens, trace=False)
        return check_adapter(variant, dtype, {"torch": run.logits, "jax": subject.adapted_jax}), "", ""
    run = subject.torch.run(model, subject.tokens, subject.batch, gradients=fault.caught_by == "gradients")
    if fault.caught_by == "loss":
        return check_loss(variant, dtype, {"jax": reference.loss, "torch": run.loss}), "", ""
    if fault.caught_by == "decode":
        cached = {"jax": subject.jax_cached, "torch": subject.torch.run_cached(model, subject.text, {})}
        uncached = {"jax": reference.logits, "torch": run.logits}
        return check_decode(variant, dtype, subject.text, cached, uncached), "", ""
    if fault.caught_by == "gradients":
        gradients = {"jax": reference.gradients, "torch": run.gradients}
        result = check_gradients(variant, dtype, subject.config, gradients)
        return result, result.measures.get("site", ""), ""
    if fault.caught_by == "noise":
        sites = {"jax": reference.sites, "torch": run.sites}
        return check_activations(variant, dtype, sites, truth, libraries=libraries), "", ""
    if fault.caught_by == "routing":
        result = check_routing(variant, dtype, {"torch": run.sites, "jax": reference.sites})
    else:
        logits = {"jax": reference.logits, "torch": run.logits}
        result = check_logits(variant, dtype, logits, probabilities=False)
    if not fault.site:
        return result, "", ""
    divergence = subject.divergence(model, run)
    return result, divergence.site if divergence else "", divergence.hint if divergence else ""


def summarise(runs: Sequence[FaultRun]) -> list[dict[str, Any]]:
    """The `faults` of `report.json`: one row a fault, over all variants in which it was planted; margins are the least.

    A fault that was planted nowhere (no selected variant has what it needs) has no row.
    """
    rows = []
    for fault in FAULTS:
        ours = [run for run in runs if run.fault == fault.name]
        if not ours:
            continue
        wrong_site = [run for run in ours if run.expected_site and run.found_site != run.expected_site]
        shown = (wrong_site or ours)[0]
        margins32 = [run.margin_float32 for run in ours if run.margin_float32 is not None]
        rows.append(
            {
                "name": fault.name,
                "imitates": fault.imitates,
                "seen_in": fault.seen_in,
                "caught": all(run.caught for run in ours),
                "caught_by": fault.caught_by,
                "margin": min(run.margin for run in ours),
                "margin_float32": min(margins32) if margins32 else None,
                "expected_site": shown.expected_site,
                "found_site": shown.found_site,
                "site_right": not wrong_site,
                "hint": next((run.hint for run in ours if run.hint), ""),
                "variants": [run.variant for run in ours],
                "missed_in": [run.variant for run in ours if not run.caught],
            }
        )
    return rows
