"""Writing a model as another config of the same function, for formats that cannot express the first.

Five changes are known, and each keeps the function: the rows that pad the vocabulary are cut, key/value heads are
repeated for the query heads that read them, absent biases become zeros, a window that covers the context is left out,
and the attention scale moves into the queries. All but the last copy numbers bit by bit; a scale rounds unless its
factor is a power of two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, parameter_table
from gpt_core.storage.tensor_info import Array
from gpt_core.storage.weights import DType, Source

_QUERY = ("blocks.attention.query.kernel", "blocks.attention.query.bias")
_FREE = {"dropout", "init_std"}  # no part of the function of trained weights
_CHANGES = {
    *("n_kv_heads", "attention_scale", "bias", "qkv_bias", "mlp_bias", "pad_vocab_size_multiple"),
    *("sliding_window", "attention_pattern", "rope_scaling"),
}


@dataclass(frozen=True)
class Adaptation:
    """A model as a format will hold it.

    Args:
        before: The model's own config.
        after: The config under which the format holds it: the same function.
        notices: What a person should know of the change, one sentence each.
    """

    before: ModelConfig
    after: ModelConfig
    notices: tuple[str, ...] = ()

    def source(self, source: Source, dtypes: Mapping[str, DType]) -> Source:
        """Parameters of `after` out of those of `before`, whole or one block at a time."""
        table = parameter_table(self.before)
        stored = self.dtypes(dtypes)

        def read(parameter: Parameter) -> Array:
            original = table.get(parameter.name)
            if original is None:  # a bias that the model has not
                return np.zeros(parameter.shape, stored[parameter.name])
            array = source(original if parameter.layer is None else original.of_layer(parameter.layer))
            if "vocab" in parameter.axes:
                rows = tuple(
                    slice(self.after.padded_vocab_size) if a == "vocab" else slice(None) for a in parameter.axes
                )
                array = array[rows]
            if "kv_heads" in parameter.axes and self.before.n_kv_heads != self.after.n_kv_heads:
                copies = self.after.n_kv_heads // self.before.n_kv_heads
                array = np.repeat(array, copies, axis=parameter.axes.index("kv_heads"))
            if parameter.name in _QUERY and self.query_factor != 1:
                array = (array.astype(np.float64) * self.query_factor).astype(array.dtype)
            return array

        return source if self.before == self.after else read

    def dtypes(self, dtypes: Mapping[str, DType]) -> dict[str, DType]:
        """The dtype of every parameter of `after`; a bias of zeros has that of its kernel."""
        return {
            name: dtypes[name if name in dtypes else name.replace(".bias", ".kernel")]
            for name in parameter_table(self.after)
        }

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by."""
        if math.isclose(self.before.attention_scale, self.after.attention_scale, rel_tol=1e-12):
            return 1.0
        return self.before.attention_scale / self.after.attention_scale


def unchanged(config: ModelConfig) -> Adaptation:
    """For formats that can hold every config."""
    return Adaptation(config, config)


def adapt(config: ModelConfig, **changes: Any) -> Adaptation:
    """Change the fields that a format asks for; the padding of the vocabulary is always cut.

    Args:
        config: The model's own config.
        changes: Out of n_kv_heads (a multiple of the model's), attention_scale, bias, qkv_bias and mlp_bias (only from
            off to on), what `without_window` changes, and rope_scaling (where it says the same of every layer).

    Raises:
        InputError: the attention scale cannot move, since a norm of the queries would undo it.
    """
    if "attention_scale" in changes and config.qk_norm is not None:
        raise InputError(
            f"attention_scale {config.attention_scale:.6g} cannot move into queries that are normed (qk_norm = "
            f"{config.qk_norm!r})"
        )
    after = replace(config, **changes, pad_vocab_size_multiple=1)
    before, stored = config.to_dict(), after.to_dict()
    assert {name for name, value in before.items() if stored[name] != value} <= _CHANGES
    adaptation = Adaptation(config, after)
    notices = []
    if config.padded_vocab_size != after.padded_vocab_size:
        rows = config.padded_vocab_size - after.padded_vocab_size
        notices.append(f"{rows} rows that pad the vocabulary are cut")
    if config.n_kv_heads != after.n_kv_heads:
        copies = after.n_kv_heads // config.n_kv_heads
        notices.append(
            f"each key/value head is written {copies} times: this architecture has no grouped queries, so the KV cache "
            f"grows {copies} times"
        )
    added = [name for name in parameter_table(after) if name not in parameter_table(config)]
    if added:
        notices.append(f"{len(added)} absent biases are written as zeros, such as {added[0]}")
    factor = adaptation.query_factor
    if factor != 1:
        exact = math.frexp(factor)[0] == 0.5
        notices.append(
            f"attention_scale {config.attention_scale:.6g} moves into the queries, times {factor:.6g}: "
            + ("exact, a power of two" if exact else "they are rounded once, in their dtype")
        )
    if config.sliding_window is not None and after.sliding_window is None:
        notices.append(f"sliding_window {config.sliding_window} covers the whole context and is left out")
    return replace(adaptation, notices=tuple(notices))


def without_window(config: ModelConfig) -> ModelConfig:
    """The same function without local layers; as it is where their window is too short or they turn otherwise."""
    window, scaling = config.sliding_window, config.rope_scaling
    turn_alike = config.rope_local_theta is None and (scaling is None or scaling.local_layers)
    if window is None or window < config.context_length or not turn_alike:
        return config
    pattern = config.layer_kinds.replace("L", "G")
    return replace(config, sliding_window=None, attention_pattern=pattern)


def same_function(config: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs give the same function of the same weights."""
    a, b = config.to_dict(), other.to_dict()
    idle = set(_FREE)
    if config.position == other.position == "learned":
        idle.add("rope_theta")
    if config.n_experts and other.n_experts:  # whose width is expert_dim
        idle.add("mlp_dim")
    return all(_same(a[name], b[name]) for name in a if name not in idle)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)
