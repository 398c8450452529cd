"""One case of the grid in one dtype: weights, tokens, and what both twins compute of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from gpt_core.adapter import AdapterConfig, adapter_table
from gpt_core.checkpoints.adapted import pairs_of
from gpt_core.config import ModelConfig
from gpt_core.data.config import DataConfig
from gpt_core.errors import InputError
from gpt_core.optimization import AdamWConfig
from gpt_core.precision import DType, Precision
from gpt_core.runs.config import JaxAttention, RunConfig, TorchAttention, TrainConfig
from gpt_core.schedule import warmup_cosine
from gpt_core.sites import model_sites
from gpt_core.storage.merging import merged
from gpt_core.storage.weights import Source, Weights, cast, weights_source
from gpt_core.text.generation import SamplingConfig
from parity.checkpoints.convert import DTYPES
from parity.comparison.divergence import Divergence, first_divergence
from parity.comparison.hints import explain
from parity.comparison.measures import Array
from parity.comparison.tolerances import tolerance
from parity.grid.variants import (
    NEW_TOKENS,
    Case,
    next_token_batch,
    packed_text,
    ragged_text,
    sharp_weights,
    text_batches,
    text_tokens,
)
from parity.sides import FRAMEWORKS, side_of
from parity.sides.products import Libraries, library_noise
from parity.sides.runs import Balance, Batch, CachedRun, PackedText, RaggedText, Run, Training

ADAMW = AdamWConfig(clip_norm=0.5)
OPTIMIZER_STEPS = 5
ROUTER_LOSSES: dict[str, Any] = {"balance_loss": 1.0, "router_z_loss": 0.1}
ADAPTER = AdapterConfig(rank=3, alpha=2.0)
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


def rates(steps: int) -> list[float]:
    """Learning rates of a warmup-cosine schedule, two steps of warmup."""
    return [warmup_cosine(step, peak=3e-3, warmup_steps=2, total_steps=steps + 1) for step in range(steps)]


class Subject:
    """One case in one dtype: weights, tokens, and both twins' runs, each made when it is first asked for."""

    def __init__(
        self,
        case: Case,
        dtype: DType,
        attention: Attention = Attention(),
        *,
        full: bool = False,
        whole: bool = True,
    ) -> None:
        self.case, self.dtype, self.config, self.attention = case, dtype, case.config, attention
        self.whole = full or whole or not case.brief  # or what is brief, briefly
        self.further = full or whole or case.further
        self.full, self.gradients = full, dtype == "float64" or (full and dtype == "float32")
        self.jax, self.torch = side_of("jax"), side_of("torch")
        stored = DTYPES[Precision.of(dtype).param_dtype]
        self.weights: Weights = {name: a.astype(stored) for name, a in sharp_weights(case.config).items()}
        self.source = weights_source(self.weights)
        self.tokens: Array = text_tokens(case.config.vocab_size)
        self.batch: Batch = next_token_batch(self.tokens)
        self.text: RaggedText = ragged_text(self.tokens)
        self.documents: PackedText = packed_text(self.tokens)
        # bf16 noise decides between tokens that are almost equally likely: there only logits are compared. How a token
        # is chosen is the same in all models: the twelve show it.
        self.samplings = SAMPLINGS if dtype != "bfloat16" and not case.covering else {}

    @cached_property
    def jax_model(self) -> Any:
        """The JAX twin."""
        return self.build_jax(self.source)

    def build_jax(self, source: Source) -> Any:
        """A JAX model of this case, with other weights."""
        options = {"implementation": self.attention.jax, "experts": self._experts("jax")}
        return self.jax.build(self.config, source, self.dtype, scan_layers=self.case.scan_layers, **options)

    def torch_model(self) -> Any:
        """A PyTorch twin of its own for each caller, who may change it."""
        options = {"implementation": self.attention.torch, "experts": self._experts("torch")}
        return self.torch.build(self.config, self.source, self.dtype, **options)

    def _experts(self, framework: str) -> str:
        return "grouped" if self.case.grouped == framework else "reference"

    def definition(self) -> Any:
        """A PyTorch twin that runs reference attention and experts, for a caller who breaks it."""
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

    @property
    def adapted(self) -> bool:
        """Whether the case is checked with an adapter too."""
        return self.dtype == "float64" and self.further and not self.case.covering

    def adapted_torch(self) -> Any:
        """A PyTorch twin with an adapter beside its layers."""
        return self.torch.adapted(self.definition(), ADAPTER, weights_source(self._adapter))

    @cached_property
    def adapted_jax(self) -> Array:
        """The reference of adapters: logits of the JAX twin with the same one merged into its weights."""
        pairs = pairs_of(weights_source(self._adapter), self.config, ADAPTER)
        run: Run = self.program(self.build_jax(merged(self.source, pairs, np.dtype(np.float64))))
        return run.logits

    @cached_property
    def _adapter(self) -> Weights:
        """The parameters of an adapter, of the size of weights."""
        random = np.random.default_rng(7)
        return {
            name: random.normal(0, 1 / np.sqrt(row.shape[1]), row.shape)
            for name, row in adapter_table(self.config, ADAPTER).items()
        }

    @property
    def step(self) -> RunConfig:
        """A training step of this case, a row a micro-batch, in which the losses of routers weigh."""
        rows, time = self.tokens.shape
        train = TrainConfig(batch_size=rows, accumulation=rows, context_length=time, dtype=self.dtype)
        return RunConfig(model=self.config, data=DataConfig(streams=rows), train=replace(train, **ROUTER_LOSSES))

    @cached_property
    def jax_balance(self) -> Balance:
        """The reference of the losses of routers, over all rows at once."""
        found: Balance = self.jax.balance(self.jax_model, self.tokens, self.batch, self.step)
        return found

    def torch_balance(self, model: Any) -> Balance:
        """The same of a PyTorch twin, a micro-batch after the other."""
        found: Balance = self.torch.balance(model, self.tokens, self.batch, self.step)
        return found

    @cached_property
    def jax_cached(self) -> CachedRun:
        """The reference of decoding."""
        run: CachedRun = self.jax.run_cached(self.jax_model, self.text, self.samplings)
        return run

    @cached_property
    def jax_documents(self) -> tuple[Run, Run]:
        """The JAX twin's run of rows of documents, and of each document alone through the program that there is."""
        text, model = self.documents, self.jax_model
        packed = self.jax.run(model, text.tokens, text.packed, gradients=self.gradients, trace=False)
        return packed, text.together([self.program(model, *part) for part in text.alone])

    def torch_documents(self, model: Any, *, gradients: bool) -> tuple[Run, Run]:
        """The same of a PyTorch twin."""
        packed, *alone = (
            self.torch.run(model, tokens, batch, gradients=gradients, trace=False)
            for tokens, batch in ((self.documents.tokens, self.documents.packed), *self.documents.alone)
        )
        return packed, self.documents.together(alone)

    @cached_property
    def truth(self) -> Run:
        """The same weights in fp64 (where the twins are proven equal), for the noise floor."""
        model = self.torch.build(self.config, cast(self.source, np.float64), "float64")
        with self.routed():
            run: Run = self.torch.run(model, self.tokens)
        return run

    def routed(self) -> AbstractContextManager[None]:
        """Where rounding chooses other experts, in bf16, PyTorch follows the choice of the JAX twin in here."""
        rounded = self.dtype == "bfloat16" and self.config.n_experts
        following: AbstractContextManager[None] = self.torch.routed_as(self.jax_run.sites) if rounded else nullcontext()
        return following

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
