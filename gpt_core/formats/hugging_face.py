"""What the Hugging Face spokes share: opening and writing a folder for one architecture of transformers.

An architecture is a map of tensors and two translations of its `config.json`. Needs no transformers and no PyTorch.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.files.reading import read_json
from gpt_core.formats.hf_architecture import Architecture
from gpt_core.formats.hf_fields import Fields
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
    parameter_dtypes,
    require_keys,
    slots,
    source_of,
    tensors_of,
    wrapper_of,
)
from gpt_core.text.finding import find_tokenizer, tokenizer_of
from gpt_core.text.tokenizer import Tokenizer

MAX_SHARD_SIZE = 5_000_000_000
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\.")


def read_config(file: Path, architecture: Architecture) -> tuple[ModelConfig, tuple[str, ...]]:
    """Translate a config.json, whatever weights lie beside it.

    Returns:
        The model, and what of it is not kept, one sentence each.

    Raises:
        InputError: the file is missing or damaged, or a field is unknown, of the wrong kind or beyond our models.
    """
    content = read_json(file)
    fields = Fields(file, dict(architecture.defaults) | content if isinstance(content, dict) else content)
    values = architecture.fixed
    try:
        for part in architecture.parts:
            values |= part.read(fields, values)
        config = ModelConfig(**values)
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
        self.format = architecture.format
        self.config, self.notices = read_config(path / CONFIG_FILE, architecture)
        spoke = architecture.spoke(self.config)
        self._embedding, self._head = spoke["token_embedding"][0], spoke["head.kernel"][0]
        buffers = re.compile(f"({'|'.join(map(re.escape, WRAPPERS))})*({architecture.buffers})")
        self._reader = ShardsReader(path, lambda key: buffers.fullmatch(key) is not None, self._is_tied)
        self._keys, self._wrapper, self._bare = self._full_keys()
        self.tensors: Mapping[str, TensorInfo] = {
            key: self._reader.tensors[stored] for key, stored in self._keys.items()
        }
        self._expected = slots(self.config, spoke)
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
        embedding = self._embedding.removeprefix(self.architecture.prefix)
        return self.config.tied_embeddings and stored.endswith((self._head, embedding))

    def _full_keys(self) -> tuple[dict[str, str], str, bool]:
        """Full key of every tensor -> the key it is stored under; what wrappers put before all; whether the body's
        prefix is left out.

        Of a tied head and its embedding one is kept, under the name of the embedding.
        """
        prefix, embedding, head = self.architecture.prefix, self._embedding, self._head
        wrapper = wrapper_of(self._reader.tensors)
        self._refuse_adapters()
        inner = {stored.removeprefix(wrapper): stored for stored in self._reader.tensors}
        bare = not any(key.startswith(prefix) for key in inner if key != head)
        keys = {key if key == head or not bare else prefix + key: stored for key, stored in inner.items()}
        if self.config.tied_embeddings and head in keys:
            stored = keys.pop(head)
            other = keys.setdefault(embedding, stored)
            if other != stored and not self._same_bytes(stored, other):
                raise InputError(
                    f"{self.path}: {stored} differs from {other}, and config.json ties them; set tie_word_embeddings "
                    f"to false if the head is one of its own"
                )
        return keys, wrapper, bare

    def _same_bytes(self, *stored: str) -> bool:
        one, two = (_bytes(self._reader.read(key)) for key in stored)
        return np.array_equal(one, two)

    def _refuse_adapters(self) -> None:
        found = next((key for key in self._reader.tensors if _ADAPTER.search(key)), None)
        if found:
            raise InputError(
                f"{self.path}: {found} belongs to an adapter of PEFT, which changes the weights beside it; merge it "
                f"(merge_and_unload) and save the model"
            )

    def _stored(self, key: str) -> str:
        """What the file calls a tensor, or would call one that is missing."""
        bare = self._bare and key != self._head
        return self._keys.get(key, self._wrapper + (key.removeprefix(self.architecture.prefix) if bare else key))


class HuggingFaceFormat:
    """What a format module offers, for one architecture."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def open_checkpoint(self, path: Path) -> HuggingFaceCheckpoint:
        """Open a folder of this architecture.

        Raises:
            InputError: see `HuggingFaceCheckpoint`.
        """
        return HuggingFaceCheckpoint(path, self.architecture)

    def adapt_config(self, config: ModelConfig) -> Adaptation:
        """The config under which this architecture holds a model.

        Raises:
            InputError: it cannot hold it; names the first field that keeps it out.
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
        write_shards(path, tensors, tensors_of(expected, config, source), max_shard_size)
        # One dtype for all in config.json: the widest, so that no reader narrows.
        dtype = max((info.dtype for info in tensors.values()), key=lambda dtype: dtype.itemsize).name
        ids = token_ids(inherit, tokenizer)
        written: dict[str, Any] = {}
        for part in self.architecture.parts:
            written |= part.write(config)
        content = {
            "model_type": self.architecture.model_type,
            "architectures": [self.architecture.class_name],
            **written,
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


def _dtype(slot: Slot, dtypes: Mapping[str, DType]) -> DType:
    found = {dtypes[parameter.name] for parameter in slot.parameters}
    if len(found) > 1:
        names = ", ".join(parameter.name for parameter in slot.parameters)
        raise InputError(f"{names} share the tensor {slot.key} and differ in dtype; give one with --dtype")
    return found.pop()


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
