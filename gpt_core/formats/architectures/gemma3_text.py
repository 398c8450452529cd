"""The spoke of `Gemma3ForCausalLM`: the language model of Gemma 3, which is all of the 270M and the 1B.

Its local layers have a base of their own, and the global ones alone are scaled. Its config has softcaps on scores that
its module never reads.
"""

from collections.abc import Mapping
from typing import Any

from gpt_core.config import ModelConfig
from gpt_core.formats.hf_architecture import ANY, heads_that_divide, kinds, one_switch, scaled_globally
from gpt_core.formats.hf_decoder import ATTENTION_BIAS, HEAD_NORMS, SANDWICH, SPOKE, decoder
from gpt_core.formats.hf_fields import Fields
from gpt_core.formats.hf_gemma import DEFAULTS, HOLDS, LOGIT_SOFTCAP, PARTS, QUERY_SCALE, query_scale
from gpt_core.formats.hf_parts import Activation, Ignored, Layers, Only
from gpt_core.formats.hf_rope import RotationByKind


class _Layers(Layers):
    """With a global one every so many, where a file does not list them."""

    def read(self, fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
        every = fields.positive("sliding_window_pattern", int)
        fields.take("_sliding_window_pattern", int, None)  # what transformers 5 repeats of that
        return Layers("L" * min(every - 1, max(0, known["n_layers"])) + "G").read(fields, known)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        every = f"{config.layer_kinds}G".index("G") + 1
        return super().write(config) | {"sliding_window_pattern": every}


ARCHITECTURE = decoder(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "RMSNorm with 1 + scale around each branch and on each head of queries and keys, and local layers of another base",
    spoke={**SPOKE, **SANDWICH, **HEAD_NORMS},
    holds={
        **HOLDS,
        **one_switch("bias", "qkv_bias"),
        "norm_placement": ("sandwich",),
        "qk_norm": ("head",),
        "n_heads": heads_that_divide,
        "attention_scale": query_scale,
        "logit_softcap": ANY,
        "sliding_window": ANY,
        "attention_pattern": kinds("LG"),
        "rope_local_theta": ANY,
        "rope_scaling": scaled_globally,
    },
    names={**ATTENTION_BIAS, **QUERY_SCALE, **LOGIT_SOFTCAP},
    parts=(
        *PARTS,
        Ignored("hidden_act", str),
        Only("attn_logit_softcapping", (None,), because="which transformers ignores here and its name says otherwise"),
        _Layers(""),
    ),
    activation=Activation("hidden_activation"),
    rotation=RotationByKind(base=1e6, local_base=1e4, local_theta="rope_local_base_freq"),
    defaults={
        **DEFAULTS,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    },
)
