"""The architecture of a model: one frozen, validated dataclass for both frameworks.

Models covered: GPT-2 (Radford et al., 2019) with learned or rotary positions (Su et al., 2021), multi-head,
grouped-query (Ainslie et al., 2023) or multi-query attention (Shazeer, 2019), a full or a sliding-window causal mask
(Beltagy et al., 2020; Jiang et al., 2023) or a cycle of both, and the norms, MLPs and scales of the decoders since:
Llama, Mistral, Qwen, Gemma, OLMo, SmolLM, Phi, Granite, GPT-NeoX; and mixtures of experts (Shazeer et al., 2017), as
Mixtral, Qwen 3 and OLMoE have them. docs/variants.md maps each to these fields.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from gpt_core.errors import InputError, shown
from gpt_core.files.reading import exists, read_yaml
from gpt_core.rotary import RopeScaling, Rotation
from gpt_core.sections import from_mapping, require_count, require_filled, require_flag, require_number, require_one_of

# Default of a field that follows another field unless given. It is filled in on creation, so readers of a
# config always see a number.
_FOLLOWS: Any = None

Position = Literal["learned", "rope"]
Norm = Literal["layer", "rms"]
NormPlacement = Literal["pre", "post", "sandwich"]
Activation = Literal["gelu_tanh", "gelu", "silu"]
QKNorm = Literal["head", "whole"]
Kind = Literal["L", "G", "N"]
"""Of a layer: local, with a window; global; global without rotation."""

LARGEST_VOCABULARY = 2**24
"""Sixty times the largest in use."""

_CHOICES = {"position": Position, "norm": Norm, "norm_placement": NormPlacement, "activation": Activation}
_FLAGS = (
    *("tied_embeddings", "bias", "qkv_bias", "mlp_bias"),
    *("norm_unit_offset", "parallel_residual", "gated_mlp", "router_normalise"),
)
_OF_EXPERTS = ("experts_per_token", "expert_dim", "router_normalise")
_RANGE = "from 1e-6 to 1e6"
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
    "n_experts": 2**16,
    "experts_per_token": 2**16,
    "expert_dim": 2**24,
    "pad_vocab_size_multiple": 2**20,
}
"""Largest value of each count, far beyond any model there is: what is larger is a mistake, or an attack."""

_MOST_PARAMETERS = 10**15
"""A hundred times the largest model that anybody planned; no product of axes leaves 64 bits."""


class LayerView(NamedTuple):
    """What layers of different kinds differ in.

    Args:
        window: Keys that a query sees, itself included; None means all before it.
        rotation: Of queries and keys, or None.
    """

    window: int | None
    rotation: Rotation | None


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
        norm_eps: Added to the variance (or mean square) in every norm.
        tied_embeddings: Whether the head reuses the token embedding.
        bias: Whether linear layers have a bias. (LayerNorm always has one; RMSNorm and the head never do.)
        qkv_bias: The same for query, key and value alone. Default: as bias.
        pad_vocab_size_multiple: Rows of the token embedding are padded up to a multiple of this, for the hardware.
        init_std: Standard deviation of fresh matrices and embeddings; the two residual projections of a block
            are scaled by 1 / sqrt(2 n_layers) on top.
        dropout: Rate on the embedding and on both residual branches, in training only.
        mlp_bias: As bias, for the MLP alone. Default: as bias.
        norm: "layer" subtracts the mean; "rms" does not and has no bias (Zhang and Sennrich, 2019).
        norm_unit_offset: Whether a norm multiplies by 1 + scale, whose fresh value is then 0 (Gemma).
        norm_placement: "pre" is x + f(norm(x)), "post" x + norm(f(x)) (OLMo 2), "sandwich" x + norm(f(norm(x)))
            (Gemma 2).
        parallel_residual: x + attention(norm(x)) + mlp(norm(x)): the MLP reads what attention reads (GPT-NeoX).
        activation: Of the MLP: "gelu_tanh", the exact "gelu", or "silu".
        gated_mlp: down(activation(gate(x)) * up(x)) for down(activation(up(x))) (Shazeer, 2020).
        qk_norm: Norm of queries and keys before they are rotated: of each "head" (Qwen 3, Gemma 3), or over the
            "whole" of all heads (OLMo 2). Null means none.
        rope_fraction: Part of a head that is rotated, its first dimensions; the rest passes (GPT-NeoX).
        rope_scaling: For long texts: a section of `gpt_core.rotary.RopeScaling`, or null.
        rope_local_theta: rope_theta of the local layers of a pattern (Gemma 3). Null means the same.
        attention_pattern: Kinds of layers, a cycle from the first on: L local, with the sliding window; G global;
            N global and without rotation, such as "LLLLLG" or "GGGN". Null means all alike.
        attention_softcap: Scores become cap * tanh(score / cap), after their scale and before the mask. Null: not.
        logit_softcap: The same of the logits.
        embedding_scale: Factor on token embeddings, rounded to the format of computation (Gemma, Granite).
        residual_scale: Factor on both residual branches (Granite).
        logit_scale: Factor on the logits (Granite).
        n_experts: MLPs of every layer, of which a router chooses some for each token; 0 is one MLP for all tokens.
            Experts are gated and have no biases.
        experts_per_token: Experts that a token is sent to.
        expert_dim: Width of the hidden layer of an expert. Default: mlp_dim, which nothing else reads then.
        router_normalise: Whether the weights of a token's experts sum to one (Mixtral); else they are probabilities
            among all experts (OLMoE).

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
    mlp_bias: bool = _FOLLOWS
    norm: Norm = "layer"
    norm_unit_offset: bool = False
    norm_placement: NormPlacement = "pre"
    parallel_residual: bool = False
    activation: Activation = "gelu_tanh"
    gated_mlp: bool = False
    qk_norm: QKNorm | None = None
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    attention_pattern: str | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    n_experts: int = 0
    experts_per_token: int = 2
    expert_dim: int | None = _FOLLOWS
    router_normalise: bool = True

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
        for name, choices in _CHOICES.items():
            require_one_of(self, name, get_args(choices))
        if self.qk_norm is not None:
            require_one_of(self, "qk_norm", get_args(QKNorm))
        self._follow("attention_scale", 1.0 / math.sqrt(self.head_dim))
        self._require_number("rope_theta", "a positive number of at least 1", lambda value: value >= 1)
        for name in ("attention_scale", "norm_eps", "init_std"):
            self._require_number(name, "a positive number", lambda value: value > 0)
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            self._require_number(name, f"a positive number {_RANGE}", lambda value: 1e-6 <= value <= 1e6)
        for name in ("attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                self._require_number(name, f"a positive number {_RANGE}, or null", lambda value: 1e-6 <= value <= 1e6)
        if self.rope_local_theta is not None:
            self._require_number(
                "rope_local_theta", "a positive number of at least 1, or null", lambda value: value >= 1
            )
        self._require_number("dropout", "a number in [0, 1)", lambda value: 0 <= value < 1)
        self._require_number("rope_fraction", "a number in (0, 1]", lambda value: 0 < value <= 1)
        self._follow("qkv_bias", self.bias)
        self._follow("mlp_bias", self.bias and not self.n_experts)
        for name in _FLAGS:
            require_flag(self, name)
        self._require_experts()
        self._require_pattern()
        self._require_rotation()
        if self.parallel_residual and self.norm_placement != "pre":
            raise InputError(
                f"parallel_residual has both branches read norms of the same input, which norm_placement = "
                f"{self.norm_placement!r} has not; use 'pre'"
            )
        self._require_possible_size()

    def _require_experts(self) -> None:
        require_count(self, "n_experts", least=0, most=_MOST["n_experts"])
        if not self.n_experts:
            idle = [name for name in _OF_EXPERTS if getattr(self, name) != getattr(ModelConfig, name)]
            if idle:
                raise InputError(f"{idle[0]} = {shown(getattr(self, idle[0]))} needs experts; give n_experts")
            return
        self._follow("expert_dim", self.mlp_dim)
        self._require_count("expert_dim")
        self._require_count("experts_per_token")
        if self.experts_per_token > self.n_experts:
            raise InputError(
                f"experts_per_token = {self.experts_per_token} is more than n_experts = {self.n_experts}; a token is "
                f"sent to each expert once"
            )
        for name, only in (("gated_mlp", True), ("mlp_bias", False)):
            if getattr(self, name) is not only:
                raise InputError(
                    f"{name} = {shown(not only)} and n_experts = {self.n_experts}: experts are gated and have no "
                    f"biases; set {name} to {str(only).lower()}"
                )

    def _require_pattern(self) -> None:
        pattern = self.attention_pattern
        if pattern is None:
            return
        if not _is_cycle(pattern):
            raise InputError(
                f"attention_pattern = {shown(pattern)} must be a cycle of the letters L (local), G (global) and N "
                f"(global without rotation), such as LLLLLG"
            )
        if "L" in pattern and self.sliding_window is None:
            raise InputError(f"attention_pattern = {shown(pattern)} has local layers (L); give sliding_window")
        if "L" not in pattern and self.sliding_window is not None:
            raise InputError(
                f"attention_pattern = {shown(pattern)} has no local layer (L) for sliding_window = "
                f"{self.sliding_window}; add one, or set the window to null"
            )
        if "N" in pattern and self.position != "rope":
            raise InputError(f"attention_pattern = {shown(pattern)}: without rotation (N) needs position = 'rope'")
        # The shortest that says the same, so that equal models have equal configs.
        layers = self.layer_kinds
        size = next(size for size in range(1, self.n_layers + 1) if layers.startswith(layers[size:]))
        if "L" not in layers:  # the pattern is cut before its first
            object.__setattr__(self, "sliding_window", None)
        alike = layers[:size] == ("G" if self.sliding_window is None else "L")
        object.__setattr__(self, "attention_pattern", None if alike else layers[:size])
        self._leave_out(set(pattern) - set(layers), set(layers))

    def _leave_out(self, cut: set[str], kept: set[str]) -> None:
        """What belongs to kinds of layers that the pattern has and the model, which is shorter, has not."""
        if "G" in cut and "L" in kept and self.rope_local_theta is not None:
            object.__setattr__(self, "rope_theta", self.rope_local_theta)
        if cut & {"L", "G"}:
            object.__setattr__(self, "rope_local_theta", None)
        if "G" in cut and not (self.rope_scaling is not None and RopeScaling.of(self.rope_scaling).local_layers):
            object.__setattr__(self, "rope_scaling", None)

    def _require_rotation(self) -> None:
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", RopeScaling.of(self.rope_scaling))
        if self.position != "rope":
            idle = [
                name
                for name, off in (("rope_fraction", 1.0), ("rope_scaling", None), ("rope_local_theta", None))
                if getattr(self, name) != off
            ]
            if idle:
                raise InputError(f"{idle[0]} = {shown(getattr(self, idle[0]))} needs position = 'rope'")
            return
        if self.rotary_dim % 2 or not self.rotary_dim:
            whole = (
                f"head_dim = {self.head_dim}"
                if self.rope_fraction == 1
                else (
                    f"the rotated part of a head, rope_fraction = {self.rope_fraction} of head_dim = {self.head_dim},"
                )
            )
            raise InputError(f"{whole} must be even with position = 'rope': pairs are rotated")
        kinds = set(self.layer_kinds)
        if self.rope_local_theta is not None and not {"L", "G"} <= kinds:
            raise InputError("rope_local_theta needs an attention_pattern with local and global layers (L and G)")
        if self.rope_local_theta == self.rope_theta:
            object.__setattr__(self, "rope_local_theta", None)
        scaling = self.rope_scaling
        if scaling is not None and scaling.local_layers and "L" not in kinds:  # which says nothing
            scaling = replace(scaling, local_layers=False)
            object.__setattr__(self, "rope_scaling", scaling)
        if scaling is not None and not kinds & ({"L", "G"} if scaling.local_layers else {"G"}):
            ways = "set rope_scaling.local_layers to true, or leave it out" if "L" in kinds else "leave it out"
            raise InputError(f"rope_scaling scales no layer of the kinds {', '.join(sorted(kinds))}; {ways}")
        scaled = {view.rotation for view in map(self.view, kinds) if view.rotation is not None}
        if any(rotation.scaling is not None and rotation.theta == 1 for rotation in scaled):
            raise InputError("rope_theta = 1 turns all pairs alike, which rope_scaling cannot tell apart; raise it")

    def _require_possible_size(self) -> None:
        from gpt_core.parameters import parameter_count  # which reads this module

        count = parameter_count(self)
        if count > _MOST_PARAMETERS:
            raise InputError(
                f"the model would have {count:.1e} parameters, more than {_MOST_PARAMETERS:.0e}; lower n_layers, "
                f"embed_dim, mlp_dim, n_experts, n_heads, head_dim, vocab_size or context_length"
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
    def layer_kinds(self) -> str:
        """The kind of every layer, a letter each: the pattern over all of them."""
        cycle = self.attention_pattern or ("G" if self.sliding_window is None else "L")
        return (cycle * self.n_layers)[: self.n_layers]

    def view(self, kind: str) -> LayerView:
        """What a layer of a kind sees, and how it turns."""
        local = kind == "L"
        theta = self.rope_local_theta if local and self.rope_local_theta is not None else self.rope_theta
        scaled = self.rope_scaling is not None and (self.rope_scaling.local_layers or not local)
        turns = self.position == "rope" and kind != "N"
        rotation = Rotation(self.rotary_dim, theta, self.rope_scaling if scaled else None) if turns else None
        return LayerView(self.sliding_window if local else None, rotation)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated, the first ones."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding (and columns of an untied head)."""
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    @property
    def variant(self) -> str:
        """Position, heads and mask, such as "rope-gqa-window"; the mask of a model of both kinds is its pattern."""
        heads = "mha" if self.n_kv_heads == self.n_heads else "mqa" if self.n_kv_heads == 1 else "gqa"
        mask = self.attention_pattern or ("full" if self.sliding_window is None else "window")
        return f"{self.position}-{heads}-{mask}"

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


def _is_cycle(pattern: Any) -> bool:
    letters = isinstance(pattern, str) and 0 < len(pattern) <= _MOST["n_layers"]
    return letters and set(pattern) <= set(get_args(Kind))


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
