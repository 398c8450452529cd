"""The architecture of a model: one frozen, validated dataclass for both frameworks.

Models covered: pre-LN GPT-2 (Radford et al., 2019) with learned or rotary positions (Su et al., 2021),
multi-head, grouped-query (Ainslie et al., 2023) or multi-query attention (Shazeer, 2019), and a full or a
sliding-window causal mask (Beltagy et al., 2020; Jiang et al., 2023).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from gpt_core.errors import InputError
from gpt_core.files.reading import exists, read_yaml
from gpt_core.sections import from_mapping, require_count, require_filled, require_flag, require_number, require_one_of

# Default of a field that follows another field unless given. It is filled in on creation, so readers of a
# config always see a number.
_FOLLOWS: Any = None

Position = Literal["learned", "rope"]

LARGEST_VOCABULARY = 2**24
"""Sixty times the largest in use."""

_MOST = {
    "vocab_size": LARGEST_VOCABULARY,
    "context_length": 2**30,
    "sliding_window": 2**30,
    "n_layers": 10_000,  # ten times the deepest that was trained; every layer is some objects in memory
    "n_heads": 2**16,
    "n_kv_heads": 2**16,
    "embed_dim": 2**20,
    "head_dim": 2**16,
    "mlp_dim": 2**24,
    "pad_vocab_size_multiple": 2**20,
}
"""Largest value of each count, far beyond any model there is: what is larger is a mistake, or an attack."""

_MOST_PARAMETERS = 10**15
"""A hundred times the largest model that anybody planned; no product of axes leaves 64 bits."""

SWEEPS = "sweeps"
"""Folder within `config_directory()` whose files are no presets; see `gpt_core.runs.sweep`."""


@dataclass(frozen=True)
class ModelConfig:
    """Every choice that defines the function of a model.

    Args:
        vocab_size: Tokens the tokenizer knows. Logits have exactly this many columns.
        context_length: Longest sequence, in tokens. With learned positions it is the size of their table.
        n_layers: Transformer blocks.
        n_heads: Query heads.
        n_kv_heads: Key/value heads; query head h reads kv head h // (n_heads / n_kv_heads). Default: n_heads
            (multi-head attention); 1 is multi-query, anything between is grouped-query.
        embed_dim: Width of the residual stream.
        head_dim: Width of one head. Default: embed_dim / n_heads.
        mlp_dim: Width of the hidden layer of the MLP. Default: 4 embed_dim.
        position: "learned" adds a table to the token embedding; "rope" rotates queries and keys (half-split).
        rope_theta: Base of the rotary frequencies.
        sliding_window: Keys that a query sees, itself included: 0 <= i - j < window. Null means all before it.
        attention_scale: Factor on query-key products. Default: 1 / sqrt(head_dim).
        norm_eps: Added to the variance in every LayerNorm.
        tied_embeddings: Whether the head reuses the token embedding.
        bias: Whether linear layers have a bias. (LayerNorm always has one; the head never does.)
        qkv_bias: The same for query, key and value alone. Default: as bias.
        pad_vocab_size_multiple: Rows of the token embedding are padded up to a multiple of this, for the hardware.
        init_std: Standard deviation of fresh matrices and embeddings; the two residual projections of a block
            are scaled by 1 / sqrt(2 n_layers) on top.
        dropout: Rate on the embedding and on both residual branches, in training only.

    Raises:
        InputError: a value is of the wrong type or outside its range; the message names field and range.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = _FOLLOWS
    embed_dim: int = 768
    head_dim: int = _FOLLOWS
    mlp_dim: int = _FOLLOWS
    position: Position = "learned"
    rope_theta: float = 10_000.0
    sliding_window: int | None = None
    attention_scale: float = _FOLLOWS
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    bias: bool = True
    qkv_bias: bool = _FOLLOWS
    pad_vocab_size_multiple: int = 1
    init_std: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layers", "n_heads", "embed_dim", "pad_vocab_size_multiple"):
            self._require_count(name)
        self._follow("n_kv_heads", self.n_heads)
        self._require_count("n_kv_heads")
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.n_kv_heads}; every kv head "
                f"serves the same number of query heads, so choose a divisor of n_heads"
            )
        if self.head_dim is None and self.embed_dim % self.n_heads:
            raise InputError(
                f"embed_dim = {self.embed_dim} is not a multiple of n_heads = {self.n_heads}; change one of them "
                f"or give head_dim"
            )
        self._follow("head_dim", self.embed_dim // self.n_heads)
        self._follow("mlp_dim", 4 * self.embed_dim)
        self._require_count("head_dim")
        self._require_count("mlp_dim")
        if self.sliding_window is not None:
            self._require_count("sliding_window")
        require_one_of(self, "position", get_args(Position))
        if self.position == "rope" and self.head_dim % 2:
            raise InputError(f"head_dim = {self.head_dim} must be even with position = 'rope': pairs are rotated")
        self._follow("attention_scale", 1.0 / math.sqrt(self.head_dim))
        for name in ("rope_theta", "attention_scale", "norm_eps", "init_std"):
            self._require_number(name, "a positive number", lambda value: value > 0)
        self._require_number("dropout", "a number in [0, 1)", lambda value: 0 <= value < 1)
        self._follow("qkv_bias", self.bias)
        for name in ("tied_embeddings", "bias", "qkv_bias"):
            require_flag(self, name)
        self._require_possible_size()

    def _require_possible_size(self) -> None:
        from gpt_core.parameters import parameter_count  # which reads this module

        count = parameter_count(self)
        if count > _MOST_PARAMETERS:
            raise InputError(
                f"the model would have {count:.1e} parameters, more than {_MOST_PARAMETERS:.0e}; lower n_layers, "
                f"embed_dim, mlp_dim, n_heads, head_dim, vocab_size or context_length"
            )

    def _follow(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _require_count(self, name: str) -> None:
        require_count(self, name, most=_MOST[name])

    def _require_number(self, name: str, what: str, allowed: Callable[[float], bool]) -> None:
        require_number(self, name, what, allowed)
        object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding (and columns of an untied head)."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    @property
    def variant(self) -> str:
        """Which of the twelve attention variants this is, such as "rope-gqa-window"."""
        heads = "mha" if self.n_kv_heads == self.n_heads else "mqa" if self.n_kv_heads == 1 else "gqa"
        return f"{self.position}-{heads}-{'full' if self.sliding_window is None else 'window'}"

    def to_dict(self) -> dict[str, Any]:
        """Every field with its value, defaults filled in; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str = "model config") -> Self:
        """Make a config from a mapping, refusing fields that it does not know.

        Raises:
            InputError: `values` is no mapping, or has an unknown field or a bad value; names `source`.
        """
        return from_mapping(cls, values, "model", source)

    @classmethod
    def from_yaml(cls, path_or_preset: str | Path) -> Self:
        """Read the `model` section of a YAML file, or of a shipped preset by name.

        Raises:
            InputError: no such file or preset, no YAML, no `model` section, or a bad field.
        """
        path = find_config(path_or_preset)
        sections = read_yaml(path)
        if "model" not in sections:
            raise InputError(f"{path}: has no 'model' section")
        require_filled(sections, str(path))
        return cls.from_dict(sections["model"], source=str(path))


def differing_fields(ours: ModelConfig, theirs: ModelConfig) -> str:
    """Name the fields in which two configs differ with both values: "n_heads 12 against 16"; "" when equal."""
    a, b = ours.to_dict(), theirs.to_dict()
    return ", ".join(f"{name} {a[name]} against {b[name]}" for name in a if a[name] != b[name])


def config_directory() -> Path:
    """The folder of the shipped presets, in an installed wheel as in a source tree."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names that `find_config` knows without a path."""
    return sorted(path.stem for path in _preset_files())


def _preset_files() -> list[Path]:
    folder = config_directory()
    return [path for path in folder.rglob("*.yaml") if path.relative_to(folder).parts[0] != SWEEPS]


def find_config(path_or_preset: str | Path) -> Path:
    """Resolve a path of a YAML file or the name of a shipped preset.

    Raises:
        InputError: neither exists; the message lists the presets.
    """
    return find_shipped(path_or_preset, _preset_files(), "preset")


def find_shipped(path_or_name: str | Path, files: Sequence[Path], kind: str) -> Path:
    """Resolve a path of a YAML file, or the name of one that is shipped.

    Args:
        path_or_name: A path ends in .yaml or .yml.
        files: That are shipped; their names are those of the files without the ending.
        kind: Of the files, for the message.

    Raises:
        InputError: it is neither; the message lists the names.
    """
    path = Path(path_or_name)
    if path.suffix in {".yaml", ".yml"}:
        if exists(path):
            return path
        raise InputError(f"{path}: no such file")
    named = {file.stem: file for file in files}
    if str(path_or_name) in named:
        return named[str(path_or_name)]
    raise InputError(f"unknown {kind} {str(path_or_name)!r}; known are: {', '.join(sorted(named))}")
