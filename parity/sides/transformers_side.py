"""Running a folder in Hugging Face transformers, on NumPy arrays in and out: the third party of a comparison."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, GenerationConfig

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.formats import open_checkpoint
from gpt_core.formats.hf_folder import GENERATION_CONFIG, TOKEN_IDS, read_object
from gpt_core.formats.hugging_face import Architecture, HuggingFaceCheckpoint
from gpt_core.precision import DType
from gpt_core.storage.checkpoint_config import CONFIG_FILE
from gpt_core.storage.weights import Weights, decode, slots
from parity.comparison.measures import Array
from parity.sides.runs import Batch, Run
from torch_gpt.arrays import to_numpy
from torch_gpt.dtypes import torch_dtype

_Place = tuple[str, str]
"""A module by its path within a block, and whether its input ("in") or its output ("out") is the site."""

_STARCODER2 = {
    "input": ("input_layernorm", "in"),
    "attention_norm": ("input_layernorm", "out"),
    "attention.query": ("self_attn.q_proj", "out"),
    "attention.key": ("self_attn.k_proj", "out"),
    "attention.value": ("self_attn.v_proj", "out"),
    "attention.mixed": ("self_attn.o_proj", "in"),
    "attention.output": ("self_attn.o_proj", "out"),
    "mlp_norm": ("post_attention_layernorm", "out"),
    "mlp.hidden": ("mlp.c_proj", "in"),
    "mlp.output": ("mlp.c_proj", "out"),
}
_GPT2 = {
    "input": ("ln_1", "in"),
    "attention_norm": ("ln_1", "out"),
    "attention.query": ("attn.c_attn", "out"),
    "attention.key": ("attn.c_attn", "out"),
    "attention.value": ("attn.c_attn", "out"),
    "attention.mixed": ("attn.c_proj", "in"),
    "attention.output": ("attn.c_proj", "out"),
    "mlp_norm": ("ln_2", "out"),
    "mlp.hidden": ("mlp.c_proj", "in"),
    "mlp.output": ("mlp.c_proj", "out"),
}
_GPT_NEO = _GPT2 | {
    "attention.query": ("attn.attention.q_proj", "out"),
    "attention.key": ("attn.attention.k_proj", "out"),
    "attention.value": ("attn.attention.v_proj", "out"),
    "attention.mixed": ("attn.attention.out_proj", "in"),
    "attention.output": ("attn.attention.out_proj", "out"),
}

# Model type -> path of the blocks, path of the final norm, places within a block.
_PLACES: dict[str, tuple[str, str, Mapping[str, _Place]]] = {
    "gpt2": ("transformer.h", "transformer.ln_f", _GPT2),
    "gpt_bigcode": ("transformer.h", "transformer.ln_f", _GPT2),
    "gpt_neo": ("transformer.h", "transformer.ln_f", _GPT_NEO),
    "twingpt_remote": ("transformer.h", "transformer.ln_f", _GPT_NEO),
    "starcoder2": ("model.layers", "model.norm", _STARCODER2),
}


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
        # Its cache of a window keeps the last W - 1 keys by a slice, which for a W of 1 is all of them.
        self.caches: bool = not (self.architecture.model_type == "starcoder2" and self.config.sliding_window == 1)
        self._double: bool = dtype == "float64"
        with self._computing():
            # from_pretrained is generic over classes that exist at run time alone
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=torch_dtype(dtype),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                generation_config=GenerationConfig(),
            ).eval()

    def run(self, tokens: Array, batch: Batch | None = None, *, gradients: bool = True, trace: bool = True) -> Run:
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
        sites = self._sites(seen) | {"logits": to_numpy(output.logits)} if trace else {}
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

    def _gradients(self) -> Weights:
        arrays = {name: to_numpy(parameter.grad).copy() for name, parameter in self.model.named_parameters()}
        self.model.zero_grad()
        spoke = self.architecture.spoke(self.config)
        return decode({key: arrays[key] for key in slots(self.config, spoke)}, self.config, spoke, "the peer")

    def _sites(self, seen: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        sites = {site: to_numpy(tensor) for site, tensor in seen.items()}
        for site, array in sites.items():
            if site.endswith(("attention.query", "attention.key", "attention.value", "attention.mixed")):
                sites[site] = self._heads(site, array)
        return {"embedding": sites["blocks.0.input"]} | sites

    def _heads(self, site: str, array: Array) -> Array:
        """A projection's output as `[batch, time, heads, head_dim]`; three in one are taken apart."""
        config = self.config
        name = site.rpartition(".")[2]
        parts = {"query": config.n_heads, "key": config.n_kv_heads, "value": config.n_kv_heads}
        if name in parts and self.architecture.model_type in ("gpt2", "gpt_bigcode"):
            index = list(parts).index(name)
            if self.architecture.model_type == "gpt_bigcode" and config.n_kv_heads > 1:
                return array.reshape(*array.shape[:2], config.n_heads, 3, config.head_dim)[:, :, :, index]
            ends = np.cumsum([heads * config.head_dim for heads in parts.values()])
            array = np.split(array, ends[:-1], axis=-1)[index]
        return array.reshape(*array.shape[:2], -1, config.head_dim)

    @contextmanager
    def _hooks(self, seen: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """Note what modules take and give, by site, along the data's path."""
        if seen is None:
            yield
            return
        blocks, norm, places = _PLACES[self.architecture.model_type]
        wanted = [
            (f"blocks.{layer}.{site}", f"{blocks}.{layer}.{module}", side)
            for layer in range(self.config.n_layers)
            for site, (module, side) in places.items()
        ]
        wanted.append(("final_norm", norm, "out"))
        modules = dict(self.model.named_modules())

        def note(site: str, side: str) -> Callable[..., None]:
            def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                seen[site] = inputs[0] if side == "in" else output

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
