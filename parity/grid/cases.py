"""Every check of one case of the grid."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from gpt_core.storage.weights import weights_source
from parity.checkpoints.convert import DTYPES
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
from parity.checks.training import check_training
from parity.checks.weights import check_weights, through_files
from parity.faults.catalogue import planted
from parity.faults.fault import Fault
from parity.grid.subject import ADAMW, OPTIMIZER_STEPS, Subject
from parity.sides.runs import Run

TRAINING_STEPS = 50


def checks(subject: Subject, fault: Fault | None = None) -> Iterator[CheckResult]:
    """Every check of one case in one dtype, with a fault planted in the PyTorch twin where it shows, or none.

    Of the cases beyond the twelve, conversion and caches are checked in fp64 alone, files and each framework's own
    initialisation are not. In those that are brief caches, the optimizer and bf16 are not either. Rows of several
    documents, in fp64, and caches in bf16 are checked in the cases that were chosen for them or named.
    """
    variant, dtype, whole = subject.case.variant, subject.dtype, subject.whole
    everything = dtype == "float64" or not subject.case.covering
    if dtype == "bfloat16" and not whole:
        return
    if fault is None:
        yield from _weights(subject) if everything else ()
    elif not fault.bites(subject.config) or (fault.caught_by == "noise" and dtype != "float32"):
        fault = replace(fault, plant=nullcontext)  # noise is made of fp32 numbers

    model = subject.torch_model()
    reference = subject.jax_run
    with planted(fault, model):
        if subject.config.n_experts:
            yield _routing(subject, model)
        with subject.routed():
            run: Run = subject.torch.run(model, subject.tokens, subject.batch, gradients=subject.gradients)
        divergence = subject.divergence(model, run)
    truth = None if dtype == "float64" else subject.truth
    libraries = subject.libraries
    sites = {"jax": reference.sites, "torch": run.sites}
    yield check_activations(variant, dtype, sites, None if truth is None else truth.sites, divergence, libraries)
    logits = {"jax": reference.logits, "torch": run.logits}
    yield check_logits(variant, dtype, logits, None if truth is None else truth.logits, libraries=libraries)
    yield check_loss(variant, dtype, {"jax": reference.loss, "torch": run.loss})
    if everything and whole and (dtype != "bfloat16" or subject.further):
        yield _decode(subject, fault, run, truth)
    if dtype == "float64" and subject.further:
        yield _segments(subject, fault)
    if subject.gradients:
        gradients = {"jax": reference.gradients, "torch": run.gradients}
        yield check_gradients(variant, dtype, subject.config, gradients, forward_differs=divergence is not None)
    if dtype == "float64" and subject.further and subject.config.n_experts:
        yield _balance(subject, fault)
    if subject.adapted:
        yield _adapter(subject, fault)
        with planted(fault if fault is not None and fault.caught_by == "chat" else None, None):
            yield check_chat(variant, dtype)
    if dtype == "float64" and whole:
        trained = subject.torch_model()
        with planted(fault, trained):
            torch_training = subject.train_torch(OPTIMIZER_STEPS, trained)
        trainings = {"jax": subject.jax_training, "torch": torch_training}
        yield check_optimizer(variant, dtype, subject.config, subject.weights, trainings, ADAMW.clip_norm)
    if subject.full and dtype != "bfloat16":
        trained = subject.torch_model()
        with planted(fault, trained):
            torch_training = subject.train_torch(TRAINING_STEPS, trained)
        curves = {"jax": subject.train_jax(TRAINING_STEPS).losses, "torch": torch_training.losses}
        yield check_training(variant, dtype, curves)
    if fault is None and dtype != "bfloat16" and not subject.case.covering:
        yield from _own_initialisations(subject)


def _routing(subject: Subject, model: Any) -> CheckResult:
    """The experts that both twins choose by themselves."""
    run: Run = subject.torch.run(model, subject.tokens)
    sites = {"torch": run.sites, "jax": subject.jax_run.sites}
    return check_routing(subject.case.variant, subject.dtype, sites)


def _decode(subject: Subject, fault: Fault | None, run: Run, truth: Run | None) -> CheckResult:
    """Both twins through their caches, against their runs without one."""
    model = subject.torch_model()
    with planted(fault, model):
        through_cache = subject.torch.run_cached(model, subject.text, subject.samplings)
    cached = {"jax": subject.jax_cached, "torch": through_cache}
    uncached = {"jax": subject.jax_run.logits, "torch": run.logits}
    known = None if truth is None else truth.logits
    variant, dtype, text = subject.case.variant, subject.dtype, subject.text
    return check_decode(variant, dtype, text, cached, uncached, known, subject.libraries)


def _segments(subject: Subject, fault: Fault | None) -> CheckResult:
    """Both twins on rows of several documents, against their runs of each alone."""
    model = subject.torch_model()
    with planted(fault, model):
        torch = subject.torch_documents(model, gradients=True)
    packed, alone = ({"jax": ours, "torch": theirs} for ours, theirs in zip(subject.jax_documents, torch, strict=True))
    return check_segments(subject.case.variant, subject.dtype, subject.config, packed, alone)


def _balance(subject: Subject, fault: Fault | None) -> CheckResult:
    """The losses of routers in a step of training: all rows at once in JAX, micro-batches in PyTorch."""
    model = subject.torch_model()
    with planted(fault, model):
        sides = {"torch": subject.torch_balance(model), "jax": subject.jax_balance}
    variant, dtype, config = subject.case.variant, subject.dtype, subject.config
    return check_balance(variant, dtype, config, sides, subject.jax_run.sites, subject.batch.mask)


def _adapter(subject: Subject, fault: Fault | None) -> CheckResult:
    """An adapter beside the layers of one twin, merged into the weights of the other."""
    model = subject.adapted_torch()
    with planted(fault, model):
        run: Run = subject.torch.run(model, subject.tokens, trace=False)
    logits = {"torch": run.logits, "jax": subject.adapted_jax}
    return check_adapter(subject.case.variant, subject.dtype, logits)


def _own_initialisations(subject: Subject) -> Iterator[CheckResult]:
    """Weights that one framework initialised, carried to the other."""
    config, dtype, case, attention = subject.config, subject.dtype, subject.case, subject.attention
    in_jax = subject.jax.fresh(config, seed=1, dtype=dtype, implementation=attention.jax, scan_layers=case.scan_layers)
    source = weights_source(subject.jax.weights_of(in_jax))
    carried = subject.torch.build(config, source, dtype, implementation=attention.torch)
    logits = {"jax": subject.program(in_jax).logits, "torch": subject.torch.run(carried, subject.tokens).logits}
    yield check_logits(case.variant, dtype, logits, origin="jax")

    in_torch = subject.torch.fresh(config, seed=1, dtype=dtype, implementation=attention.torch)
    carried = subject.build_jax(weights_source(subject.torch.weights_of(in_torch)))
    logits = {"jax": subject.program(carried).logits, "torch": subject.torch.run(in_torch, subject.tokens).logits}
    yield check_logits(case.variant, dtype, logits, origin="torch")


def _weights(subject: Subject) -> Iterator[CheckResult]:
    """Round trips through both models and, in the twelve, through the files of both formats."""
    stored: dict[str, Any] = {name: a.astype(DTYPES[subject.dtype]) for name, a in subject.weights.items()}
    copies: dict[str, Mapping[str, Any]] = {}
    if not subject.case.covering:
        places = through_files(subject.config, stored, ["jax", "torch", "jax", "torch"])
        copies |= {"jax file -> torch file -> jax file": places[2], "torch file -> jax file -> torch file": places[3]}
    if subject.dtype != "bfloat16":  # models keep fp32 parameters then
        copies["numpy -> jax model -> numpy"] = subject.jax.weights_of(subject.jax_model)
        copies["numpy -> torch model -> numpy"] = subject.torch.weights_of(subject.torch_model())
    yield check_weights(subject.case.variant, subject.dtype, stored, copies)
