"""Running a folder in Hugging Face transformers, on NumPy arrays in and out: the third party of a comparison."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, GenerationConfig

from gpt_core.checkpoints.adapted import open_checkpoint
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats.hf_architecture import Architecture
from gpt_core.formats.hf_folder import GENERATION_CONFIG, TOKEN_IDS, read_object
from gpt_core.formats.hugging_face import HuggingFaceCheckpoint
from gpt_core.parameters import Parameter
from gpt_core.precision import DType
from gpt_core.storage.checkpoint_config import CONFIG_FILE
from gpt_core.storage.weights import Slot, Spoke, Weights, decode, slots
from parity.comparison.measures import Array
from parity.sides.runs import Batch, Run, Trace
from torch_gpt.arrays import to_numpy
from torch_gpt.dtypes import torch_dtype

_SITES: dict[str, tuple[str, str | int]] = {
    "attention_norm": ("attention_norm.scale", "out"),
    "attention.query": ("attention.query.kernel", "out"),
    "attention.key": ("attention.key.kernel", "out"),
    "attention.value": ("attention.value.kernel", "out"),
    "attention.normed_query": ("attention.query_norm.scale", "out"),
    "attention.normed_key": ("attention.key_norm.scale", "out"),
    "attention.mixed": ("attention.output.kernel", "in"),
    "attention.output": ("attention.output.kernel", "out"),
    "attention_post_norm": ("attention_post_norm.scale", "out"),
    "mlp_norm": ("mlp_norm.scale", "out"),
    "mlp.hidden": ("mlp.down.kernel", "in"),
    "mlp.output": ("mlp.down.kernel", "out"),
    "moe.scores": ("moe.router.kernel", 0),
    "moe.weights": ("moe.router.kernel", 1),
    "moe.chosen": ("moe.router.kernel", 2),
    "moe.output": ("moe.down.kernel", "out"),
    "mlp_post_norm": ("mlp_post_norm.scale", "out"),
}
"""Site of a block -> a parameter of the module that computes it, and whether it takes ("in") or gives ("out") that, or
which of several things that it gives that is."""


class Peer:
    """A folder, loaded by transformers.

    In fp64, the peer's own casts to fp32 (rotary angles, scores, softmax, loss) become casts to fp64 while it is built
    and run: an fp64 run of its formulas, against which rounding can be told from another function.

    It generates by our settings alone: greedy is greedy. `set_aside` has those of the folder that would change it.

    Args:
        path: An exported or downloaded folder.
        dtype: What to compute in.
        trust_remote_code: Whether to run the modelling code that lies in the folder.

    Raises:
        InputError: it is no folder of an architecture that we know, or needs its own code and is not trusted.
    """

    def __init__(self, path: Path, dtype: DType, *, trust_remote_code: bool = False) -> None:
        checkpoint = open_checkpoint(path)
        if not isinstance(checkpoint, HuggingFaceCheckpoint):
            raise InputError(f"{path}: is a {checkpoint.format} checkpoint; transformers loads those of Hugging Face")
        if checkpoint.format == "hf-twingpt" and not trust_remote_code:
            raise InputError(
                f"{path}: runs the modelling code that lies in it; pass --trust-remote-code if you trust its source"
            )
        self.architecture: Architecture = checkpoint.architecture
        self.config: ModelConfig = checkpoint.config
        self.path: Path = path
        self._slots = slots(self.config, self._modules)
        self._double: bool = dtype == "float64"
        # The grouped products, which it would choose by itself, have no fp64.
        experts = {"experts_implementation": "eager"} if self.config.n_experts else {}
        with self._computing():
            # from_pretrained is generic over classes that exist at run time alone
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=torch_dtype(dtype),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                generation_config=GenerationConfig(),
                **experts,
            ).eval()
        # A token that pads is one like any other here, and has a gradient.
        self.model.get_input_embeddings().padding_idx = None
        if self.config.n_experts:
            self.model.config.output_router_logits = False  # or its loss would have that of balance in it
        # Its cache of a window keeps the last W - 1 keys by a slice, which for a W of 1 is all of them.
        self.caches: bool = getattr(self.model.config, "sliding_window", None) != 1

    def run(self, tokens: Array, batch: Batch | None = None, *, gradients: bool = True, trace: Trace = True) -> Run:
        """Run it once; its own loss and gradients where a batch says what to predict, sites with `trace`.

        Sites are those that one of its modules takes or gives; rotated queries and keys are none.
        """
        ids = torch.tensor(tokens)
        labels = None if batch is None else _labels(batch)
        seen: dict[str, torch.Tensor] = {}
        differentiate = labels is not None and gradients
        with self._computing(), self._hooks(seen if trace else None), torch.set_grad_enabled(differentiate):
            output = self.model(input_ids=ids, labels=labels, use_cache=False)
            if differentiate:
                output.loss.backward()
        found = self._gradients() if differentiate else {}
        loss = float("nan") if labels is None else output.loss.item()
        sites = self._sites(seen, tokens.shape) | {"logits": to_numpy(output.logits)} if trace else {}
        if isinstance(trace, tuple):
            sites = {site: array for site, array in sites.items() if site.endswith(trace)}
        return Run(to_numpy(output.logits), sites, loss, found)

    def generate(self, prompt: Array, new: int) -> Array:
        """Tokens `[batch, new]` that its own greedy decoding appends to `prompt` `[batch, time]`, with its cache."""
        settings = GenerationConfig(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, use_cache=self.caches)
        with self._computing(), torch.no_grad():
            ids = torch.tensor(prompt)
            tokens = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return to_numpy(tokens)[:, prompt.shape[1] :]

    @cached_property
    def set_aside(self) -> dict[str, Any]:
        """What the folder says of how to generate, where that is not plain greedy decoding.

        Raises:
            InputError: a file that says it is damaged.
        """
        known = set(GenerationConfig().to_dict())
        known -= {*TOKEN_IDS, "use_cache", "_from_model_config", "transformers_version"}
        found: dict[str, Any] = {}
        for file in (self.path / CONFIG_FILE, self.path / GENERATION_CONFIG):
            content = read_object(file) if file.is_file() else {}
            found |= {name: value for name, value in content.items() if name in known}
        off: tuple[Any, ...] = (None, 0, 1, "", [], {})  # no settings, no penalty, one beam
        return {name: value for name, value in found.items() if value is True or value not in off}

    @property
    def _modules(self) -> Spoke:
        """The map of its parameters, as they are called in memory."""
        return (self.architecture.modules or self.architecture.spoke)(self.config)

    def _gradients(self) -> Weights:
        arrays = {name: to_numpy(parameter.grad).copy() for name, parameter in self.model.named_parameters()}
        self.model.zero_grad()
        return decode({key: arrays[key] for key in self._slots}, self.config, self._modules, "the peer")

    def _sites(self, seen: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> dict[str, Array]:
        """Of what modules took and gave for tokens `[batch, time]` of a shape; mixtures have these as one axis."""
        arrays = {site: to_numpy(tensor) for site, tensor in seen.items()}
        apart = {site: array.reshape(*shape, -1) if array.ndim == 2 else array for site, array in arrays.items()}
        sites = {site: self._shaped(site, array) for site, array in apart.items()}
        known = {site: array for site, array in sites.items() if array is not None}
        return {"embedding": known["blocks.0.input"]} | known

    def _shaped(self, site: str, array: Array) -> Array | None:
        """As our sites have it: what belongs to heads as `[batch, time, heads, head_dim]`, joined projections apart.

        None where that cannot be told: some models norm queries and keys as `[batch, heads, time, head_dim]`.
        """
        name = site.rpartition(".")[2]
        if name in ("query", "key", "value"):
            return self._projected(f"blocks.attention.{name}.kernel", int(site.split(".")[1]), array)
        if array.ndim == 4:
            heads = self.config.n_heads if name == "normed_query" else self.config.n_kv_heads
            if array.shape[1] == array.shape[2]:
                return None
            return array if array.shape[2] == heads else array.swapaxes(1, 2)
        of_heads = name in ("mixed", "normed_query", "normed_key")
        return array.reshape(*array.shape[:2], -1, self.config.head_dim) if of_heads else array

    def _projected(self, name: str, layer: int, array: Array) -> Array:
        """The part of a projection's output `[batch, time, outputs]` that one kernel makes: its map, without inputs."""
        slot = next(slot for slot in self._slots.values() if (name, layer) in _held(slot))

        def outputs(parameter: Parameter) -> Parameter:
            own = dict(zip(parameter.axes, parameter.shape, strict=True))
            sizes = {"batch": array.shape[0], "time": array.shape[1], **own}
            axes = ("batch", "time", *(axis for axis in parameter.axes if axis != "embed"))
            return replace(parameter, axes=axes, shape=tuple(sizes[axis] for axis in axes))

        pattern = f"batch time {slot.pattern.replace('embed', '')}"
        joined = tuple(map(outputs, slot.joined))
        whole = replace(slot, parameter=outputs(slot.parameter), joined=joined, pattern=pattern)
        return whole.decode(array, _held(slot).index((name, layer)))

    @contextmanager
    def _hooks(self, seen: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """Note what modules take and give, by site, along the data's path."""
        if seen is None:
            yield
            return
        paths = {held: key.rpartition(".")[0] for key, slot in self._slots.items() for held in _held(slot)}
        first = "attention_norm.scale" if ("blocks.attention_norm.scale", 0) in paths else "attention.query.kernel"
        wanted = [
            (f"blocks.{layer}.{site}", paths[f"blocks.{name}", layer], side)
            for layer in range(self.config.n_layers)
            for site, (name, side) in {"input": (first, "in"), **_SITES}.items()
            if (f"blocks.{name}", layer) in paths
        ]
        wanted.append(("final_norm", paths["final_norm.scale", None], "out"))
        modules = dict(self.model.named_modules())

        def note(site: str, side: str | int) -> Callable[..., None]:
            def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
                whole = {"in": inputs[0], "out": output}
                seen[site] = whole[side] if side in whole else output[side]

            return hook

        hooks = [modules[module].register_forward_hook(note(site, side)) for site, module, side in wanted]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        if self._double:
            with _InDouble():
                yield
        else:
            yield


def _held(slot: Slot) -> list[tuple[str, int | None]]:
    """Name and block of every parameter in a tensor."""
    return [(parameter.name, parameter.layer) for parameter in slot.parameters]


class _InDouble(TorchFunctionMode):
    """Whatever asks for fp32 gets fp64."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        widened = [torch.float64 if value is torch.float32 else value for value in args]
        keywords = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*widened, **keywords)


def _labels(batch: Batch) -> torch.Tensor:
    """Targets as transformers wants them: the token itself, shifted there, and -100 where none counts."""
    assert not batch.mask[:, -1].any(), "transformers cannot predict beyond the last token"
    labels = np.full(batch.targets.shape, -100, np.int64)
    labels[:, 1:] = np.where(batch.mask[:, :-1], batch.targets[:, :-1], -100)
    return torch.tensor(labels)


def prepare(dtype: DType) -> None:
    """Set what is global for a process that runs in this dtype."""
    torch.set_float32_matmul_precision("highest")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def describe() -> dict[str, str]:
    """Versions, for reports."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}
