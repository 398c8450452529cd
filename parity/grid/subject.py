"""One worker's share of the grid: build both twins for each case, run them, check them, plant faults."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.optimization import AdamWConfig
from gpt_core.precision import DType, Precision
from gpt_core.runs.config import JaxAttention, TorchAttention
from gpt_core.schedule import warmup_cosine
from gpt_core.sites import model_sites
from gpt_core.storage.weights import Source, Weights, cast, weights_source
from gpt_core.text.generation import SamplingConfig
from parity.checkpoints.convert import DTYPES
from parity.checks import CheckResult
from parity.checks.activations import check_activations
from parity.checks.decode import check_decode
from parity.checks.gradients import check_gradients
from parity.checks.logits import check_logits
from parity.checks.loss import check_loss
from parity.checks.optimizer import check_optimizer
from parity.checks.training import check_training
from parity.checks.weights import check_weights, through_files
from parity.comparison.divergence import Divergence, first_divergence
from parity.comparison.hints import explain
from parity.comparison.measures import Array
from parity.comparison.tolerances import tolerance
from parity.faults.catalogue import fault_named, planted
from parity.faults.fault import Fault
from parity.grid.variants import (
    NEW_TOKENS,
    Case,
    next_token_batch,
    ragged_text,
    select,
    sharp_weights,
    text_batches,
    text_tokens,
)
from parity.sides import FRAMEWORKS, side_of
from parity.sides.products import Libraries, library_noise
from parity.sides.runs import Batch, CachedRun, RaggedText, Run, Training
from parity.workers import Emit

ADAMW = AdamWConfig(clip_norm=1.0)
OPTIMIZER_STEPS, TRAINING_STEPS = 5, 50
SAMPLINGS = {
    "greedy": SamplingConfig(NEW_TOKENS),
    "sampled": SamplingConfig(NEW_TOKENS, temperature=2.0, top_k=50, top_p=0.95, seed=1),
}


@dataclass(frozen=True)
class Attention:
    """The implementations that the twins are checked with; the fp64 truth and planted faults keep to the definition.

    Args:
        jax: Of the JAX twin.
        torch: Of the PyTorch twin.
    """

    jax: JaxAttention = "reference"
    torch: TorchAttention = "reference"

    def require(self, config: ModelConfig, dtypes: Sequence[DType]) -> None:
        """See that both can run a model here, in every dtype.

        Raises:
            InputError: one cannot; the message says why.
        """
        for framework in FRAMEWORKS:
            name = getattr(self, framework)
            for dtype in dtypes if name != "reference" else ():
                try:
                    side_of(framework).require_attention(name, config, dtype)
                except InputError as error:
                    raise InputError(f"--{framework}-attention {name}, {dtype}: {error}") from None


@dataclass(frozen=True)
class GridOptions:
    """What to run.

    Args:
        variants: Names of cases; empty for all.
        dtypes: What to compute in.
        fault: Name of a fault to plant in the PyTorch twin for every check, or None.
        checks: Whether to run the checks.
        faults: Whether to plant every fault where it bites, and see it caught.
        full: Run what is heavier too: training curves, fp32 gradients, every fault in every variant.
        attention: What each side runs.
    """

    variants: list[str] = field(default_factory=list)
    dtypes: list[DType] = field(default_factory=lambda: ["float64"])
    fault: str | None = None
    checks: bool = True
    faults: bool = False
    full: bool = False
    attention: Attention = Attention()


def rates(steps: int) -> list[float]:
    """Learning rates of a warmup-cosine schedule, two steps of warmup."""
    return [warmup_cosine(step, peak=3e-3, warmup_steps=2, total_steps=steps + 1) for step in range(steps)]


class Subject:
    """One case in one dtype: weights, tokens, and both twins' runs, each made when it is first asked for."""

    def __init__(self, case: Case, dtype: DType, attention: Attention = Attention(), *, full: bool = False) -> None:
        self.case, self.dtype, self.config, self.attention = case, dtype, case.config, attention
        self.full, self.gradients = full, dtype == "float64" or (full and dtype == "float32")
        self.jax, self.torch = side_of("jax"), side_of("torch")
        stored = DTYPES[Precision.of(dtype).param_dtype]
        self.weights: Weights = {name: a.astype(stored) for name, a in sharp_weights(case.config).items()}
        self.source = weights_source(self.weights)
        self.tokens: Array = text_tokens(case.config.vocab_size)
        self.batch: Batch = next_token_batch(self.tokens)
        self.text: RaggedText = ragged_text(self.tokens)
        # bf16 noise decides between tokens that are almost equally likely: there only logits are compared.
        self.samplings = SAMPLINGS if dtype != "bfloat16" else {}

    @cached_property
    def jax_model(self) -> Any:
        """The JAX twin."""
        return self.build_jax(self.source)

    def build_jax(self, source: Source) -> Any:
        """A JAX model of this case, with other weights."""
        scan_layers, implementation = self.case.scan_layers, self.attention.jax
        return self.jax.build(self.config, source, self.dtype, implementation=implementation, scan_layers=scan_layers)

    def torch_model(self) -> Any:
        """A PyTorch twin of its own for each caller, who may change it."""
        return self.torch.build(self.config, self.source, self.dtype, implementation=self.attention.torch)

    def definition(self) -> Any:
        """A PyTorch twin that runs the reference attention, for a caller who breaks it."""
        return self.torch.build(self.config, self.source, self.dtype)

    @cached_property
    def program(self) -> Any:
        """The JAX twin's compiled program: logits, loss and trace, and gradients where they are checked."""
        return self.jax.Program(self.jax_model, self.tokens, self.batch, gradients=self.gradients)

    @cached_property
    def jax_run(self) -> Run:
        """The reference of every comparison."""
        run: Run = self.program(self.jax_model)
        return run

    @cached_property
    def jax_training(self) -> Training:
        """The reference of optimizer steps."""
        return self.train_jax(OPTIMIZER_STEPS)

    def train_jax(self, steps: int) -> Training:
        """Optimizer steps of the JAX twin, from the start."""
        batches = text_batches(self.config.vocab_size, steps)
        training: Training = self.program.train(self.jax_model, batches, ADAMW, rates(steps))
        return training

    def train_torch(self, steps: int, model: Any) -> Training:
        """The same steps of a PyTorch twin, which is changed."""
        batches = text_batches(self.config.vocab_size, steps)
        training: Training = self.torch.train(model, batches, ADAMW, rates(steps))
        return training

    @cached_property
    def jax_cached(self) -> CachedRun:
        """The reference of decoding."""
        run: CachedRun = self.jax.run_cached(self.jax_model, self.text, self.samplings)
        return run

    @cached_property
    def truth(self) -> Run:
        """The same weights in fp64 (where the twins are proven equal), for the noise floor."""
        model = self.torch.build(self.config, cast(self.source, np.float64), "float64")
        run: Run = self.torch.run(model, self.tokens)
        return run

    @cached_property
    def libraries(self) -> Libraries | None:
        """What each framework's library can do, for the noise floor of fp32."""
        if self.dtype != "float32":
            return None
        return {framework: library_noise(framework, self.config) for framework in FRAMEWORKS}

    def divergence(self, model: Any, run: Run) -> Divergence | None:
        """Where a PyTorch run first parts from the JAX one; `model` must still be as it was in the run."""
        reference = self.jax_run.sites

        def hint(site: str) -> str:
            return explain(site, run.sites[site], reference, self.weights, self.config, self.tokens)

        return first_divergence(
            run.sites,
            reference,
            model_sites(self.config),
            tolerance("activations", self.dtype),
            replay=lambda site: self.torch.replay(model, site, reference, self.tokens),
            hint=hint,
        )


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
            subject = Subject(case, dtype, attention, full=options.full)
            found: list[Any] = list(checks(subject, fault)) if options.checks else []
            if options.faults:
                from parity.grid.planting import fault_runs

                found += fault_runs(subject)
            emit(found)


def checks(subject: Subject, fault: Fault | None = None) -> Iterator[CheckResult]:
    """Every check of one case in one dtype, with a fault planted in the PyTorch twin where it shows, or none."""
    variant, dtype = subject.case.variant, subject.dtype
    if fault is None:
        yield _weights(subject)
    elif not fault.bites(subject.config) or (fault.caught_by == "noise" and dtype != "float32"):
        fault = replace(fault, plant=nullcontext)  # noise is made of fp32 numbers

    model = subject.torch_model()
    with planted(fault, model):
        run: Run = subject.torch.run(model, subject.tokens, subject.batch, gradients=subject.gradients)
        divergence = subject.divergence(model, run)
    reference = subject.jax_run
    truth = None if dtype == "float64" else subject.truth
    libraries = subject.libraries
    sites = {"jax": reference.sites, "torch": run.sites}
    yield check_activations(variant, dtype, sites, None if truth is None else truth.sites, divergence, libraries)
    logits = {"jax": reference.logits, "torch": run.logits}
    yield check_logits(variant, dtype, logits, None if truth is None else truth.logits, libraries=libraries)
    yield check_loss(variant, dtype, {"jax": reference.loss, "torch": run.loss})
    if dtype == "float64" or "+" not in variant:
        yield _decode(subject, fault, run, truth)
    if subject.gradients:
        gradients = {"jax": reference.gradients, "torch": run.gradients}
        yield check_gradients(variant, dtype, subject.config, gradients, forward_differs=divergence is not None)
    if dtype == "float64":
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
    if fault is None and dtype != "bfloat16":
        yield from _own_initialisations(subject)


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


def _weights(subject: Subject) -> CheckResult:
    """Round trips through both models and through the files of both formats."""
    stored: dict[str, Any] = {name: a.astype(DTYPES[subject.dtype]) for name, a in subject.weights.items()}
    chain = ["jax", "torch", "jax", "torch"]
    places = through_files(subject.config, stored, chain, unrolled=not subject.case.scan_layers)
    copies = {"jax file -> torch file -> jax file": places[2], "torch file -> jax file -> torch file": places[3]}
    if subject.dtype != "bfloat16":  # models keep fp32 parameters then
        copies["numpy -> jax model -> numpy"] = subject.jax.weights_of(subject.jax_model)
        copies["numpy -> torch model -> numpy"] = subject.torch.weights_of(subject.torch_model())
    return check_weights(subject.case.variant, subject.dtype, stored, copies)
