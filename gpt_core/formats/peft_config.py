"""`adapter_config.json` of PEFT: which of its fields we read, and what of it is beyond our adapters."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_core.adapter import scale_of
from gpt_core.errors import InputError, shown
from gpt_core.files.reading import exists, read_json
from gpt_core.sections import is_number, is_whole

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FREE = {
    *("base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode", "auto_mapping"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors say it
    *("lora_dropout", "fan_in_fan_out"),  # of training, and of how the base is stored
    # Of what is off here:
    *("megatron_core", "qalora_group_size", "runtime_config", "eva_config", "loftq_config"),
}
"""Fields that do not change the function of the tensors beside them."""

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"}

_MEANING = {
    "use_dora": "which scales the columns of the merged weight",
    "modules_to_save": "which replaces whole modules of the base",
    "lora_bias": "which adds a bias to the adapter",
    "trainable_token_indices": "which replaces rows of the embedding",
    "layer_replication": "which repeats layers of the base",
    "alora_invocation_tokens": "which turns the adapter on within a text",
    "target_parameters": "which adapts parameters that belong to no linear layer",
}

_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")
"""First weights that are taken out of the base, which is then another one."""

_MOST_RANK = 2**16


@dataclass(frozen=True)
class PeftConfig:
    """What a folder of PEFT says of its tensors.

    Args:
        path: The file.
        rank: Of modules that `ranks` does not name.
        alpha: The same of the scale.
        rslora: Whether the scale is alpha / sqrt(rank).
        ranks: Pattern of a module's name -> its rank.
        alphas: The same of the scale.
        base_name: What the base was called, or None.
    """

    path: Path
    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    base_name: str | None

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return self._named(module, self.ranks, self.rank)

    def alpha_of(self, module: str) -> float:
        """What stands over the rank of a module's adapter."""
        return self._named(module, self.alphas, self.alpha)

    def scale_of(self, module: str) -> float:
        """What the product of a module's A and B is multiplied by."""
        return scale_of(self.rank_of(module), self.alpha_of(module), rslora=self.rslora)

    @staticmethod
    def _named(module: str, patterns: Mapping[str, Any], otherwise: Any) -> Any:
        found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, otherwise)


def read_peft_config(folder: Path) -> PeftConfig:
    """Read the config of an adapter.

    Raises:
        InputError: it is missing or damaged, of another kind, or has an option that our adapters have not.
    """
    file = folder / ADAPTER_CONFIG
    if not exists(file):
        raise InputError(f"{folder}: holds no adapter of PEFT (no {ADAPTER_CONFIG})")
    content = read_json(file)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else None
        raise InputError(f"{file}: peft_type is {shown(kind)}; adapters of the kind LORA alone are read")
    _refuse_options(file, content)
    rank, alpha = content.get("r", 8), content.get("lora_alpha", 8)
    ranks, alphas = (content.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    base, rslora = content.get("base_model_name_or_path"), content.get("use_rslora", False)
    for name, values in (("r", [rank]), ("rank_pattern", _values(file, "rank_pattern", ranks))):
        if not all(is_whole(value, 1, _MOST_RANK) for value in values):
            raise InputError(f"{file}: {name} = {shown(content.get(name))} must be of whole numbers of at least 1")
    for name, values in (("lora_alpha", [alpha]), ("alpha_pattern", _values(file, "alpha_pattern", alphas))):
        if not all(is_number(value) for value in values):
            raise InputError(f"{file}: {name} = {shown(content.get(name))} must be of numbers")
    if not isinstance(rslora, bool) or not isinstance(base, str | None):
        raise InputError(f"{file}: use_rslora must be true or false, and base_model_name_or_path a text or null")
    return PeftConfig(
        file, rank, float(alpha), rslora, ranks, {key: float(value) for key, value in alphas.items()}, base
    )


def _refuse_options(file: Path, content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if name not in _FREE | _READ and value not in (None, False, {}, []):
            why = _MEANING.get(name, "an option that may change what the adapter computes")
            raise InputError(f"{file}: {name} = {shown(value)}, {why}; merge it with PEFT and convert the model")
    bias, first = content.get("bias", "none"), content.get("init_lora_weights")
    if bias != "none":
        raise InputError(f"{file}: bias = {shown(bias)}, which trains biases of the base; 'none' alone can be read")
    if isinstance(first, str) and _CHANGES_BASE.fullmatch(first):
        raise InputError(
            f"{file}: init_lora_weights = {shown(first)}, which changes the base; save it converted to LORA "
            f"(path_initial_model_for_weight_conversion of PEFT)"
        )


def _values(file: Path, name: str, patterns: Any) -> list[Any]:
    if not isinstance(patterns, dict):
        raise InputError(f"{file}: {name} = {shown(patterns)} must be a mapping")
    for key in patterns:
        try:
            re.compile(key)
        except re.error:
            raise InputError(f"{file}: {name}: {shown(key)} is no pattern of names") from None
    return list(patterns.values())


def write_peft_config(
    folder: Path, modules: list[str], ranks: Mapping[str, int], alphas: Mapping[str, float], **fields: Any
) -> None:
    """Write the config of an adapter.

    Args:
        folder: Where to.
        modules: The last parts of the names of its modules, for `target_modules`.
        ranks: Of each of them.
        alphas: Of each of them.
        fields: Others of PEFT's.
    """
    rank, alpha = ranks[modules[0]], alphas[modules[0]]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "target_modules": modules,
        "rank_pattern": {re.escape(name): of for name, of in ranks.items() if of != rank},
        "alpha_pattern": {re.escape(name): _whole(of) for name, of in alphas.items() if of != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        **fields,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
