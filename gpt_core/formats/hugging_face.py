"""What the Hugging Face spokes share: opening and writing a folder for one architecture of transformers.

An architecture is a map of tensors and two translations of its `config.json`. Needs no transformers and no PyTorch.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.files.reading import read_json
from gpt_core.formats.hf_fields import Fields, model_type_of
from gpt_core.formats.hf_folder import token_ids, write_generation_config, write_tokenizer
from gpt_core.formats.hf_shards import ShardsReader, write_shards
from gpt_core.parameters import Parameter
from gpt_core.storage.adaptation import Adaptation
from gpt_core.storage.checkpoint_config import CONFIG_FILE
from gpt_core.storage.tensor_info import Array, TensorInfo
from gpt_core.storage.weights import (
    WRAPPERS,
    DType,
    Slot,
    Source,
    Spoke,
    parameter_dtypes,
    require_keys,
    slots,
    source_of,
    wrapper_of,
)
from gpt_core.text.tokenizer import Tokenizer, find_tokenizer, tokenizer_of

MAX_SHARD_SIZE = 5_000_000_000
_HEAD = "lm_head.weight"
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\.")


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers.

    Args:
        model_type: Its name in config.json.
        class_name: Its class with a language-modelling head.
        prefix: What the keys of its body begin with; checkpoints of the body alone leave it out.
        embedding: Key of the token embedding, which a tied head repeats.
        spoke: The map of tensors for a config.
        buffers: Keys, as a pattern, that are no weights: masks and frequencies that older versions saved.
        read: Translates the fields of config.json.
        write: Translates a config that `adapt` has returned.
        adapt: The config under which this architecture holds a model; an InputError says why it cannot.
        extra_files: Writes files that the architecture needs besides; most need none.
        format: Name of the format, unless it is "hf-" and the model type.
    """

    model_type: str
    class_name: str
    prefix: str
    embedding: str
    spoke: Callable[[ModelConfig], Spoke]
    buffers: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    adapt: Callable[[ModelConfig], Adaptation]
    extra_files: Callable[[Path], None] = lambda folder: None
    format: str = ""


def read_config(file: Path, architecture: Architecture) -> tuple[ModelConfig, tuple[str, ...]]:
    """Translate a config.json, whatever weights lie beside it.

    Returns:
        The model, and what of it is not kept, one sentence each.

    Raises:
        InputError: the file is missing or damaged, or a field is unknown, of the wrong kind or beyond our models.
    """
    fields = Fields(file, read_json(file))
    try:
        config = architecture.read(fields)
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    fields.finish()
    return config, tuple(fields.notices)


class HuggingFaceCheckpoint:
    """An opened folder of one architecture.

    Raises:
        InputError: a file is missing or damaged, a field is unknown or beyond our models, or weights and config do
            not fit.
    """

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self.path = path
        self.architecture = architecture
        self.format = architecture.format or f"hf-{architecture.model_type}"
        self.config, self.notices = read_config(path / CONFIG_FILE, architecture)
        buffers = re.compile(f"({'|'.join(map(re.escape, WRAPPERS))})*({architecture.buffers})")
        self._reader = ShardsReader(path, lambda key: buffers.fullmatch(key) is not None, self._is_tied)
        self._keys, self._wrapper, self._bare = self._full_keys()
        self.tensors = {key: self._reader.tensors[stored] for key, stored in self._keys.items()}
        self._expected = slots(self.config, architecture.spoke(self.config))
        shapes = {key: info.shape for key, info in self.tensors.items()}
        require_keys(str(path), self._expected, shapes, self._stored)
        self._source = source_of(self._expected, lambda key: self._reader.read(self._keys[key]))
        self.notices += find_tokenizer(path).notices

    @cached_property
    def dtypes(self) -> Mapping[str, DType]:
        """The stored dtype of every canonical parameter.

        Raises:
            InputError: blocks of one differ.
        """
        found = {key: info.dtype for key, info in self.tensors.items()}
        return parameter_dtypes(str(self.path), self._expected, found, self._stored)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """GPT-2's tokenizer, where it lies beside the weights."""
        return tokenizer_of(self.path)

    def read(self, parameter: Parameter) -> Array:
        """A parameter, or one block of it, in canonical axes and the stored dtype."""
        return self._source(parameter)

    def _is_tied(self, stored: str) -> bool:
        """Whether a tensor of the file is one of the two that a tied head and its embedding may stand under."""
        embedding = self.architecture.embedding.removeprefix(self.architecture.prefix)
        return self.config.tied_embeddings and stored.endswith((_HEAD, embedding))

    def _full_keys(self) -> tuple[dict[str, str], str, bool]:
        """Full key of every tensor -> the key it is stored under; what wrappers put before all; whether the body's
        prefix is left out.

        Of a tied head and its embedding one is kept, under the name of the embedding.
        """
        prefix, embedding = self.architecture.prefix, self.architecture.embedding
        wrapper = wrapper_of(self._reader.tensors)
        self._refuse_adapters()
        inner = {stored.removeprefix(wrapper): stored for stored in self._reader.tensors}
        bare = not any(key.startswith(prefix) for key in inner if key != _HEAD)
        keys = {key if key == _HEAD or not bare else prefix + key: stored for key, stored in inner.items()}
        if self.config.tied_embeddings and _HEAD in keys:
            head = keys.pop(_HEAD)
            other = keys.setdefault(embedding, head)
            if other != head and not np.array_equal(_bytes(self._reader.read(head)), _bytes(self._reader.read(other))):
                raise InputError(
                    f"{self.path}: {head} differs from {other}, and config.json ties them; set tie_word_embeddings to "
                    f"false if the head is one of its own"
                )
        return keys, wrapper, bare

    def _refuse_adapters(self) -> None:
        found = next((key for key in self._reader.tensors if _ADAPTER.search(key)), None)
        if found:
            raise InputError(
                f"{self.path}: {found} belongs to an adapter of PEFT, which changes the weights beside it; merge it "
                f"(merge_and_unload) and save the model"
            )

    def _stored(self, key: str) -> str:
        """What the file calls a tensor, or would call one that is missing."""
        bare = self._bare and key != _HEAD
        return self._keys.get(key, self._wrapper + (key.removeprefix(self.architecture.prefix) if bare else key))


class HuggingFaceFormat:
    """The functions of a format module for one architecture."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def matches(self, path: Path) -> bool:
        """Whether a folder's config.json names this architecture."""
        return model_type_of(path) == self.architecture.model_type

    def open_checkpoint(self, path: Path) -> HuggingFaceCheckpoint:
        """Open a folder of this architecture.

        Raises:
            InputError: see `HuggingFaceCheckpoint`.
        """
        return HuggingFaceCheckpoint(path, self.architecture)

    def adapt(self, config: ModelConfig) -> Adaptation:
        """The config under which this architecture holds a model.

        Raises:
            InputError: it cannot express the model; the message says why and names a format that can.
        """
        return self.architecture.adapt(config)

    def write(
        self,
        path: Path,
        config: ModelConfig,
        source: Source,
        dtypes: Mapping[str, DType],
        tokenizer: Tokenizer | None,
        *,
        max_shard_size: int = MAX_SHARD_SIZE,
        inherit: Path | None = None,
    ) -> None:
        """Write a folder that transformers loads; `config` is one that `adapt` returned.

        Args:
            path: An empty folder.
            config: The model.
            source: Gives its parameters.
            dtypes: Of its parameters.
            tokenizer: GPT-2's, or None.
            max_shard_size: Bytes of a weights file at most, unless one tensor is larger.
            inherit: The checkpoint that it comes from, whose token ids are taken over.
        """
        expected = slots(config, self.architecture.spoke(config))
        tensors = {key: TensorInfo(slot.shape, _dtype(slot, dtypes)) for key, slot in expected.items()}

        def read(key: str) -> Array:
            slot = expected[key]
            return slot.encode(*(source(parameter) for parameter in slot.parameters))

        write_shards(path, tensors, read, max_shard_size)
        # One dtype for all in config.json: the widest, so that no reader narrows.
        dtype = max((info.dtype for info in tensors.values()), key=lambda dtype: dtype.itemsize).name
        ids = token_ids(inherit, tokenizer)
        content = {
            "model_type": self.architecture.model_type,
            "architectures": [self.architecture.class_name],
            **self.architecture.write(config),
            "tie_word_embeddings": config.tied_embeddings,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,  # for transformers 4 and other readers
            **ids,
        }
        (path / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_generation_config(path, ids)
        self.architecture.extra_files(path)
        if tokenizer is not None:
            write_tokenizer(path, tokenizer, config.context_length)


def require_whole_heads(config: ModelConfig, name: str) -> None:
    """For architectures whose heads together are as wide as the residual stream.

    Raises:
        InputError: those of the config are not.
    """
    if config.n_heads * config.head_dim != config.embed_dim:
        raise InputError(
            f"hf-{name} needs n_heads x head_dim = embed_dim, and {config.n_heads} x {config.head_dim} is not "
            f"{config.embed_dim}; --allow-remote-code exports it with its own modelling code"
        )


def require_learned(config: ModelConfig, name: str) -> None:
    """For architectures that have learned positions.

    Raises:
        InputError: the config rotates.
    """
    if config.position != "learned":
        raise InputError(f"hf-{name} has learned positions and this model rotates (rope); hf-starcoder2 expresses it")


def full_mask(config: ModelConfig) -> bool:
    """Whether every query sees all keys before it: no window, or one that covers the context."""
    return config.sliding_window is None or config.sliding_window >= config.context_length


def default_scale(config: ModelConfig) -> float:
    """1 / sqrt(head_dim), as a config without attention_scale has it."""
    return replace(config, attention_scale=None).attention_scale  # type: ignore[arg-type]  # None means the default


def _dtype(slot: Slot, dtypes: Mapping[str, DType]) -> DType:
    found = {dtypes[parameter.name] for parameter in slot.parameters}
    if len(found) > 1:
        names = ", ".join(parameter.name for parameter in slot.parameters)
        raise InputError(f"{names} share the tensor {slot.key} and differ in dtype; give one with --dtype")
    return found.pop()


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
