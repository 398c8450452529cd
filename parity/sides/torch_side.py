"""Running a model in PyTorch, on NumPy arrays in and out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.amp.grad_scaler import GradScaler

from gpt_core.adapter import AdapterConfig
from gpt_core.config import ModelConfig
from gpt_core.formats.safetensors_torch import SPOKE
from gpt_core.optimization import AdamWConfig
from gpt_core.precision import DType, Precision
from gpt_core.runs.config import RunConfig
from gpt_core.sites import ROUTING_SITES
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import Source, Weights, decode, slots
from gpt_core.text.generation import SamplingConfig, cache_slots
from parity.comparison.inputs import attended, read_by
from parity.sides.runs import Balance, Batch, Batches, CachedRun, RaggedText, Run, Trace, Training
from torch_gpt import decode as decoding
from torch_gpt import lora, moe, step
from torch_gpt import loss as loss_module
from torch_gpt import optimizer as optimization
from torch_gpt.arrays import from_numpy, to_numpy
from torch_gpt.attention import Implementation, attention
from torch_gpt.dtypes import torch_dtype
from torch_gpt.generate import generate
from torch_gpt.model import GPT, initialiser
from torch_gpt.parallel import Objective
from torch_gpt.taps import Kept, Taps


def build(
    config: ModelConfig,
    source: Source,
    dtype: DType,
    *,
    implementation: Implementation = "reference",
    experts: moe.Implementation = "reference",
) -> GPT:
    """A model with its weights from `source` through the format's map, computing in `dtype`."""
    precision = Precision.of(dtype)
    model = GPT(
        config,
        lambda parameter: torch.empty(parameter.shape, dtype=torch_dtype(precision.param_dtype), device="meta"),
        precision=precision,
        implementation=implementation,
        experts=experts,
    )
    state = {}
    for key, slot in slots(config, SPOKE).items():
        tensor = from_numpy(slot.encode(np.asarray(source(slot.parameter))))
        state[key] = tensor.to(device(dtype), torch_dtype(precision.param_dtype), copy=True)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def adapted(model: GPT, adapter: AdapterConfig, source: Source) -> GPT:
    """The model with an adapter beside its layers, in place; `source` gives the parameters of `adapter_table`."""
    dtype, place = torch_dtype(model.precision.param_dtype), model.token_embedding.device
    return lora.attach(model, adapter, lambda row: from_numpy(np.asarray(source(row))).to(place, dtype, copy=True))


def fresh(
    config: ModelConfig,
    seed: int,
    dtype: DType,
    *,
    implementation: Implementation = "reference",
    experts: moe.Implementation = "reference",
) -> GPT:
    """A model with this framework's own initialisation."""
    precision = Precision.of(dtype)
    create = initialiser(seed, precision)
    model = GPT(config, create, precision=precision, implementation=implementation, experts=experts)
    return model.to(device(dtype)).eval()


def weights_of(model: GPT) -> Weights:
    """Canonical weights of a model, as copies."""
    return canonical(model, lambda parameter: parameter)


def run(model: GPT, tokens: Array, batch: Batch | None = None, *, gradients: bool = True, trace: Trace = True) -> Run:
    """Run a model once; loss and gradients where a batch says what to predict, sites with `trace`."""
    with torch.set_grad_enabled(batch is not None and gradients):
        taps: Taps | None = Kept(*trace) if isinstance(trace, tuple) else {} if trace else None
        segments = None if batch is None or batch.segments is None else _tensor(model, batch.segments)
        logits = model(_tensor(model, tokens), taps=taps, segments=segments)
        sites = {site: to_numpy(value) for site, value in (taps or {}).items()}
        if batch is None:
            return Run(to_numpy(logits), sites)
        loss = loss_module.token_loss(logits, _tensor(model, batch.targets), _tensor(model, batch.mask))
        if not gradients:
            return Run(to_numpy(logits), sites, loss.item())
        loss.backward()
    found = canonical(model, lambda parameter: parameter.grad)
    model.zero_grad()
    return Run(to_numpy(logits), sites, loss.item(), found)


@contextmanager
def routed_as(sites: Mapping[str, Array]) -> Iterator[None]:
    """Mixtures that run in this context once, block after block, choose the experts that another model has chosen.

    The weights of these experts are made of a model's own scores.

    Args:
        sites: What the other model computed; nothing happens without `moe.chosen` of every block.
    """
    chosen = iter([value for site, value in sites.items() if site.endswith(".moe.chosen")])

    def follow(scores: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
        experts = torch.tensor(next(chosen), device=scores.device, dtype=torch.int64)
        best = scores.take_along_dim(experts, dim=-1)
        among = best if config.router_normalise else scores
        return experts, torch.exp(best - torch.logsumexp(among, dim=-1, keepdim=True))

    with mock.patch("torch_gpt.moe.route", follow):
        yield


def logits_function(model: GPT) -> Callable[[Array], Array]:
    """Token ids `[batch, time]` to logits `[batch, time, vocab]`."""
    return lambda tokens: run(model, tokens, trace=False).logits


def run_cached(model: GPT, text: RaggedText, samplings: Mapping[str, SamplingConfig]) -> CachedRun:
    """Prefill of prompts, then steps on the text's own tokens; and for each way to go on what `generate` writes.

    Args:
        model: The model.
        text: What to run on.
        samplings: Ways to go on from the prompts, by name.
    """
    config = model.config
    limit = text.limit(samplings)
    slots, weights = cache_slots(config, limit, 1), decoding.prepare(model, limit)
    first, cache = decoding.prefill(model, _tensor(model, text.padded), _tensor(model, text.lengths), slots)
    logits = [first]
    tokens, positions = _tensor(model, text.fed), _tensor(model, text.positions)  # [batch, 1 + steps]
    for index in range(1, tokens.shape[1]):
        token, position = tokens[:, index, None], positions[:, index]
        after, cache = decoding.step(weights, config, model.precision, token, position, cache)
        logits.append(after[:, 0])
    written = {name: generate(model, text.prompts, way, weights=weights) for name, way in samplings.items()}
    return CachedRun(to_numpy(torch.stack(logits, dim=1)), written)


def write(model: GPT, prompt: Array, new: int) -> Array:
    """Tokens `[batch, new]` that greedy decoding through the cache appends to `prompt` `[batch, time]`."""
    return np.asarray(generate(model, prompt.tolist(), SamplingConfig(max_new_tokens=new)))


def require_attention(implementation: Implementation, config: ModelConfig, dtype: DType) -> None:
    """See that an implementation of attention can run a model here.

    Raises:
        InputError: it cannot; the message says why.
    """

    def heads(count: int) -> torch.Tensor:
        shape, format = (1, 2, count, config.head_dim), torch_dtype(Precision.of(dtype).compute_dtype)
        return torch.zeros(shape, dtype=format, device=device(dtype))

    query, key = heads(config.n_heads), heads(config.n_kv_heads)
    scale, softcap = config.attention_scale, config.attention_softcap
    for kind in set(config.layer_kinds):
        window = config.view(kind).window
        attention(query, key, key, window=window, scale=scale, softcap=softcap, implementation=implementation)


def train(model: GPT, batches: Batches, config: AdamWConfig, rates: Sequence[float]) -> Training:
    """AdamW steps, one for each batch and its rate; changes the model."""
    optimizer = optimization.create_optimizer(config, model)
    losses, norms = [], []
    for (tokens, batch), rate in zip(batches, rates, strict=True):
        ids, targets, mask = (_tensor(model, array) for array in (tokens, batch.targets, batch.mask))
        loss = loss_module.token_loss(model(ids), targets, mask)
        loss.backward()
        norms.append(optimization.update(optimizer, config, model, rate))
        losses.append(loss.detach())
    return Training(
        losses=[loss.item() for loss in losses],
        norms=[norm.item() for norm in norms],
        weights=weights_of(model),
        mu=canonical(model, lambda parameter: optimizer.state[parameter].get("exp_avg")),
        nu=canonical(model, lambda parameter: optimizer.state[parameter].get("exp_avg_sq")),
    )


def balance(model: GPT, tokens: Array, batch: Batch, config: RunConfig) -> Balance:
    """The losses of a mixture's routers in a step of training as a run takes it, and the gradient of the step's loss.

    Args:
        model: A mixture; is not changed.
        tokens: `[batch, time]`.
        batch: What it predicts.
        config: Of the run: weights of the losses, and the micro-batches of a step.
    """
    rows = {"tokens": tokens, "targets": batch.targets, "mask": batch.mask}
    found: Weights = {}

    def keep(optimizer: Any, adamw: Any, model: GPT, rate: float, **_: Any) -> torch.Tensor:
        found.update(canonical(model, lambda parameter: parameter.grad))
        return torch.zeros(())

    take = step.training_step(config, model, Objective(model, tokens.shape[1]))
    state = step.TrainState(
        {}, optimization.create_optimizer(config.optimizer, model), 0, GradScaler("cpu", enabled=False)
    )
    with mock.patch("torch_gpt.step.update", keep):
        _, metrics = take(state, {name: _tensor(model, array) for name, array in rows.items()}, 0.0)
    model.zero_grad()
    return Balance(float(metrics["balance_loss"]), float(metrics["router_z_loss"]), found)


def canonical(model: GPT, tensor_of: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Weights:
    """Canonical arrays of something that every parameter of a model has."""
    arrays = {}
    for key, parameter in model.named_parameters():
        tensor = tensor_of(parameter)
        # PyTorch leaves gradient and moments out where nothing depends on the parameter; they are zero.
        arrays[key] = to_numpy(torch.zeros_like(parameter) if tensor is None else tensor).copy()
    return decode(arrays, model.config, SPOKE, "the PyTorch model")


@torch.no_grad()
def replay(model: GPT, site: str, sites: Mapping[str, Array], tokens: Array) -> Array:
    """The output of one site's operation in this model, on inputs recorded elsewhere.

    Args:
        model: The model.
        site: A name of `gpt_core.sites`.
        sites: What another model computed at every site.
        tokens: `[batch, time]`.
    """

    def given(name: str) -> torch.Tensor:
        value = from_numpy(np.array(sites[name])).to(model.token_embedding.device)
        exact = name.endswith(ROUTING_SITES)  # in wide_dtype, or whole numbers
        return value if exact else value.to(torch_dtype(model.precision.compute_dtype))

    if site == "embedding":
        return to_numpy(model.embed(_tensor(model, tokens)))
    if site == "logits":
        return to_numpy(model.unembed(given("final_norm")))
    if site == "final_norm":
        return to_numpy(model.final_norm(_after_block(model, sites, given, model.config.n_layers - 1)))
    _, number, local = site.split(".", 2)
    layer = int(number)
    if local == "input":
        return to_numpy(given("embedding") if layer == 0 else _after_block(model, sites, given, layer - 1))
    block: Any = model.blocks[layer]
    kind, config = model.config.layer_kinds[layer], model.config

    def here(name: str) -> torch.Tensor:
        return given(f"blocks.{layer}.{name}")

    if local == "attention.mixed":
        return to_numpy(block.attention.mix(*attended(here, config, kind), kind))
    x = read_by(local, here, config, kind)
    if "rotated" in local:
        return to_numpy(block.attention.rotated(x, kind))
    taps: Taps = {}
    if local in ("mlp.hidden", "moe.scores"):
        block.feed_forward(x, taps)
    elif local in ("moe.chosen", "moe.weights"):
        chosen, weights = moe.route(x, block.moe.config)
        return to_numpy(chosen if local == "moe.chosen" else weights)
    elif local == "moe.output":
        routing = here("moe.chosen").long(), here("moe.weights")
        with mock.patch("torch_gpt.moe.route", return_value=routing):
            return to_numpy(block.moe(x))
    elif local in ("attention.query", "attention.key", "attention.value"):
        block.attention(x, kind, taps)
    elif local == "attention.output":
        return to_numpy(block.attention.output(x.flatten(2)))
    elif local == "mlp.output":
        return to_numpy(block.mlp.down(x))
    else:
        place = local.replace("normed_query", "query_norm").replace("normed_key", "key_norm")
        return to_numpy(block.get_submodule(place)(x))
    return to_numpy(taps[local])


def _after_block(
    model: GPT, sites: Mapping[str, Array], given: Callable[[str], torch.Tensor], layer: int
) -> torch.Tensor:
    place = f"blocks.{layer}."
    with routed_as({site: value for site, value in sites.items() if site.startswith(place)}):
        after: torch.Tensor = model.blocks[layer](given(f"{place}input"), model.config.layer_kinds[layer])
    return after


def _tensor(model: GPT, array: Array | tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(array, device=model.token_embedding.device)


def multiply(a: Array, b: Array) -> Array:
    """The product of fp32 matrices `[rows, terms]` and `[terms, columns]`, as a linear layer makes it."""
    x, weight = (torch.tensor(array, device=device("float32")) for array in (a, b.T.copy()))
    return to_numpy(torch.nn.functional.linear(x, weight))


def prepare(dtype: DType) -> None:
    """Set what is global in PyTorch for a process that runs in this dtype."""
    torch.set_float32_matmul_precision("highest")


def device(dtype: DType) -> torch.device:
    """fp64 is proven on the CPU; other dtypes use a GPU where there is one."""
    return torch.device("cuda" if dtype != "float64" and torch.cuda.is_available() else "cpu")


def describe() -> dict[str, str]:
    """Versions, device and precision settings, for reports."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "torch": torch.__version__,
        "torch_device": f"cuda: {gpu}" if gpu else "cpu",
        "torch_matmul_precision": torch.get_float32_matmul_precision(),
    }
