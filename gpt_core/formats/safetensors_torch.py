"""The PyTorch spoke: `model.safetensors` in the layout of `torch_gpt.model`, with `config.json` beside it.

A weight of `nn.Linear` is `[outputs, inputs]`, the transpose of the canonical kernel; heads are flattened into one
axis, head by head. Needs no PyTorch.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from gpt_core.adapter import A, B
from gpt_core.config import ModelConfig
from gpt_core.formats.hf_fields import HUGGING_FACE_TYPES, model_type_of
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.storage.adaptation import unchanged
from gpt_core.storage.checkpoint_config import WEIGHTS_FILE, read_checkpoint_config, write_checkpoint_config
from gpt_core.storage.safetensors_file import SafetensorsReader, write_safetensors
from gpt_core.storage.tensor_info import Array, TensorInfo
from gpt_core.storage.weights import DType, Source, Spoke, parameter_dtypes, require_keys, slots, source_of
from gpt_core.text.finding import find_tokenizer, tokenizer_of
from gpt_core.text.tokenizer import Tokenizer

SPOKE: dict[str, tuple[str, str]] = {
    "token_embedding": ("token_embedding", "vocab embed"),
    "position_embedding": ("position_embedding", "position embed"),
    "blocks.attention_norm.scale": ("blocks.{layer}.attention_norm.weight", "embed"),
    "blocks.attention_norm.bias": ("blocks.{layer}.attention_norm.bias", "embed"),
    "blocks.attention.query.kernel": ("blocks.{layer}.attention.query.weight", "(heads head_dim) embed"),
    "blocks.attention.query.bias": ("blocks.{layer}.attention.query.bias", "(heads head_dim)"),
    "blocks.attention.key.kernel": ("blocks.{layer}.attention.key.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.key.bias": ("blocks.{layer}.attention.key.bias", "(kv_heads head_dim)"),
    "blocks.attention.value.kernel": ("blocks.{layer}.attention.value.weight", "(kv_heads head_dim) embed"),
    "blocks.attention.value.bias": ("blocks.{layer}.attention.value.bias", "(kv_heads head_dim)"),
    "blocks.attention.query_norm.scale": ("blocks.{layer}.attention.query_norm.weight", "..."),
    "blocks.attention.query_norm.bias": ("blocks.{layer}.attention.query_norm.bias", "..."),
    "blocks.attention.key_norm.scale": ("blocks.{layer}.attention.key_norm.weight", "..."),
    "blocks.attention.key_norm.bias": ("blocks.{layer}.attention.key_norm.bias", "..."),
    "blocks.attention.output.kernel": ("blocks.{layer}.attention.output.weight", "embed (heads head_dim)"),
    "blocks.attention.output.bias": ("blocks.{layer}.attention.output.bias", "embed"),
    "blocks.attention_post_norm.scale": ("blocks.{layer}.attention_post_norm.weight", "embed"),
    "blocks.attention_post_norm.bias": ("blocks.{layer}.attention_post_norm.bias", "embed"),
    "blocks.mlp_norm.scale": ("blocks.{layer}.mlp_norm.weight", "embed"),
    "blocks.mlp_norm.bias": ("blocks.{layer}.mlp_norm.bias", "embed"),
    "blocks.mlp.gate.kernel": ("blocks.{layer}.mlp.gate.weight", "mlp embed"),
    "blocks.mlp.gate.bias": ("blocks.{layer}.mlp.gate.bias", "mlp"),
    "blocks.mlp.up.kernel": ("blocks.{layer}.mlp.up.weight", "mlp embed"),
    "blocks.mlp.up.bias": ("blocks.{layer}.mlp.up.bias", "mlp"),
    "blocks.mlp.down.kernel": ("blocks.{layer}.mlp.down.weight", "embed mlp"),
    "blocks.mlp.down.bias": ("blocks.{layer}.mlp.down.bias", "embed"),
    "blocks.moe.router.kernel": ("blocks.{layer}.moe.router.weight", "experts embed"),
    "blocks.moe.gate.kernel": ("blocks.{layer}.moe.gate.weight", "experts expert_mlp embed"),
    "blocks.moe.up.kernel": ("blocks.{layer}.moe.up.weight", "experts expert_mlp embed"),
    "blocks.moe.down.kernel": ("blocks.{layer}.moe.down.weight", "experts embed expert_mlp"),
    "blocks.mlp_post_norm.scale": ("blocks.{layer}.mlp_post_norm.weight", "embed"),
    "blocks.mlp_post_norm.bias": ("blocks.{layer}.mlp_post_norm.bias", "embed"),
    "final_norm.scale": ("final_norm.weight", "embed"),
    "final_norm.bias": ("final_norm.bias", "embed"),
    "head.kernel": ("head.weight", "vocab embed"),
}


def spoke_of(table: Mapping[str, Parameter]) -> Spoke:
    """The map of a table, which may be that of an adapter: its matrices are `[outputs, inputs]` too."""
    return SPOKE | {name: _of_adapter(row) for name, row in table.items() if name.endswith((A, B))}


def _of_adapter(row: Parameter) -> tuple[str, str]:
    _, *axes = row.axes
    pattern = f"({' '.join(axes[1:])}) rank" if axes[0] == "rank" else f"rank ({' '.join(axes[:-1])})"
    return row.name.replace("blocks.", "blocks.{layer}.", 1), pattern


def matches(path: Path) -> bool:
    """Whether the folder holds `model.safetensors`, and its config is not one of transformers."""
    return (path / WEIGHTS_FILE).exists() and model_type_of(path) not in HUGGING_FACE_TYPES


class TorchCheckpoint:
    """An opened PyTorch checkpoint.

    Args:
        path: Its folder.
        table: What it holds, where that is not the model: an adapter.
    """

    format = "torch"

    def __init__(self, path: Path, table: Mapping[str, Parameter] | None = None) -> None:
        self.path = path
        self.config = read_checkpoint_config(path)
        self.table = parameter_table(self.config) if table is None else table
        self._reader = SafetensorsReader(path / WEIGHTS_FILE)
        self.tensors = self._reader.tensors
        self.expected = slots(self.config, spoke_of(self.table), self.table)
        require_keys(str(path), self.expected, {key: info.shape for key, info in self.tensors.items()})
        self._source = source_of(self.expected, self._reader.read)

    @cached_property
    def dtypes(self) -> Mapping[str, DType]:
        """The stored dtype of every canonical parameter.

        Raises:
            InputError: blocks of one differ.
        """
        found = {key: info.dtype for key, info in self.tensors.items()}
        return parameter_dtypes(str(self.path), self.expected, found)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """GPT-2's tokenizer, where it lies beside the weights."""
        return tokenizer_of(self.path)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know of reading it."""
        return find_tokenizer(self.path).notices

    def read(self, parameter: Parameter) -> Array:
        """A parameter, or one block of it, in canonical axes and the stored dtype."""
        return self._source(parameter)


adapt_config = unchanged  # it holds every config as it is


def open_checkpoint(path: Path, table: Mapping[str, Parameter] | None = None) -> TorchCheckpoint:
    """Open a folder with `config.json` and `model.safetensors`; `table` as `TorchCheckpoint` has it.

    Raises:
        InputError: a file is missing or damaged, or weights and config do not fit.
    """
    return TorchCheckpoint(path, table)


def write(
    path: Path, config: ModelConfig, source: Source, dtypes: Mapping[str, DType], tokenizer: Tokenizer | None
) -> None:
    """Write a checkpoint into an empty folder, one tensor in memory at a time."""
    expected = slots(config, SPOKE)
    tensors = {key: TensorInfo(slot.shape, dtypes[slot.parameter.name]) for key, slot in expected.items()}
    write_safetensors(
        path / WEIGHTS_FILE,
        tensors,
        lambda key: expected[key].encode(source(expected[key].parameter)),
    )
    write_checkpoint_config(path, config)
    if tokenizer is not None:
        tokenizer.save(path)
