"""Reading the fields of a Hugging Face `config.json` one by one, so that none is left over unseen."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_core.checkpoint_config import CONFIG_FILE
from gpt_core.errors import InputError

# Fields that do not touch the logits of a decoder, written by some version of transformers or by some uploader.
BOOKKEEPING = frozenset(
    {
        *("_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation", "bos_token_id"),
        *("classifier_dropout", "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task"),
        *("gradient_checkpointing", "id2label", "inference_runner", "label2id", "max_batch_size"),
        *("max_sequence_length", "model_type", "name_or_path", "num_labels", "output_attentions"),
        *("output_hidden_states", "pad_key_length", "pad_token_id", "pre_allocate_kv_cache", "prefix", "problem_type"),
        *("return_dict", "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
        *("summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype"),
        *("transformers_version", "use_cache", "validate_runner_input"),
    }
)

HUGGING_FACE_TYPES = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "starcoder2", "twingpt_remote"})
"""What `model_type` says in the folders that our spokes for transformers read."""

_MISSING: Any = object()


class Fields:
    """The fields of a config.json; each is taken once, and `finish` refuses what nobody took.

    Args:
        path: The file, for messages.
        content: What it holds.
    """

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self.notices: list[str] = []
        self._left = {name: value for name, value in content.items() if name not in BOOKKEEPING}

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of a field; null counts as absent where there is a default.

        Raises:
            InputError: it is missing and has no default.
        """
        value = self._left.pop(name, _MISSING)
        if default is _MISSING and (value is _MISSING or value is None):
            raise InputError(f"{self.path}: {name} is missing")
        return default if value is _MISSING or value is None else value

    def only(self, name: str, *allowed: Any, because: str) -> None:
        """Take a field that may be absent or have one of some values.

        Raises:
            InputError: it has another value; the message says what that would change.
        """
        value = self._left.pop(name, allowed[0])
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed):
            wanted = " or ".join(json.dumps(other) for other in allowed)
            raise InputError(f"{self.path}: {name} is {json.dumps(value)}, {because}; only {wanted} can be read")

    def same(self, name: str, value: Any, as_name: str) -> None:
        """Take a field that repeats another one.

        Raises:
            InputError: the two disagree.
        """
        found = self.take(name, value)
        number = isinstance(found, int | float) and isinstance(value, int | float)
        if not (math.isclose(found, value, rel_tol=1e-9) if number else found == value):
            raise InputError(f"{self.path}: {name} is {found} and {as_name} is {value}; they must agree")

    def activation(self, name: str, default: str) -> None:
        """Take the name of the activation.

        Raises:
            InputError: it is no tanh GELU.
        """
        value = self.take(name, default)
        if value not in ("gelu_new", "gelu_pytorch_tanh"):
            raise InputError(
                f"{self.path}: {name} is {value!r}, another function than the tanh GELU; only 'gelu_new' or "
                f"'gelu_pytorch_tanh' can be read"
            )

    def dropout(self, embedding: str, residual: str, attention: str, default: float) -> float:
        """The one rate that our models have on the embedding and the residual branches; a notice where it differs."""
        rates = {name: self.take(name, default) for name in (embedding, residual, attention)}
        if rates[embedding] == rates[residual]:
            rate, lost = rates[embedding], [attention] if rates[attention] else []
        else:
            rate, lost = 0.0, [name for name, value in rates.items() if value]
        if lost:
            self.notices.append(
                f"dropout in training is {rate}: {', '.join(f'{n} {rates[n]}' for n in lost)} is not kept"
            )
        return float(rate)

    def finish(self) -> None:
        """Refuse fields that nobody took.

        Raises:
            InputError: there are such fields; they are named.
        """
        self.only("is_encoder_decoder", False, None, because="another architecture")
        self.only("add_cross_attention", False, None, because="another architecture")
        self.only("is_decoder", False, True, None, because="another architecture")
        self.only("pruned_heads", {}, None, [], because="heads were removed")
        self.only("chunk_size_feed_forward", 0, None, because="another order of computation")
        if self._left:
            raise InputError(
                f"{self.path}: unknown field {', '.join(map(repr, sorted(self._left)))}, which may change the model; "
                f"remove it if it does not"
            )


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def model_type_of(folder: Path) -> Any:
    """The `model_type` of a folder's config.json; None where there is none or it is damaged."""
    try:
        content = read_json(folder / CONFIG_FILE)
    except InputError:
        return None
    return content.get("model_type") if isinstance(content, dict) else None
