"""The spoke of `Starcoder2ForCausalLM`: GPT-2's block with rotation, any heads and either mask.

One switch, `use_bias`, stands for all biases.
"""

from gpt_core.config import ModelConfig
from gpt_core.formats.hf_architecture import ANY, full_mask, one_switch
from gpt_core.formats.hf_decoder import ATTENTION, LAYER, WINDOW, decoder
from gpt_core.formats.hf_parts import Alias, Dropout, Field, Ignored, Only
from gpt_core.storage.weights import Spoke

SPOKE: Spoke = {
    **ATTENTION,
    "blocks.attention_norm.bias": (f"{LAYER}.input_layernorm.bias", "embed"),
    "blocks.mlp_norm.bias": (f"{LAYER}.post_attention_layernorm.bias", "embed"),
    "blocks.mlp.up.kernel": (f"{LAYER}.mlp.c_fc.weight", "mlp embed"),
    "blocks.mlp.up.bias": (f"{LAYER}.mlp.c_fc.bias", "mlp"),
    "blocks.mlp.down.kernel": (f"{LAYER}.mlp.c_proj.weight", "embed mlp"),
    "blocks.mlp.down.bias": (f"{LAYER}.mlp.c_proj.bias", "embed"),
    "final_norm.bias": ("model.norm.bias", "embed"),
}


def _notes(config: ModelConfig) -> tuple[str, ...]:
    ignored = "llama.cpp's graph of this architecture ignores sliding_window: do not serve it there"
    return () if full_mask(config) else (ignored,)


ARCHITECTURE = decoder(
    "starcoder2",
    "Starcoder2ForCausalLM",
    "rotary positions: the one with GPT-2's block that rotates, with any heads and any mask",
    spoke=SPOKE,
    holds={
        **one_switch("bias", "qkv_bias", "mlp_bias"),
        "norm": ("layer",),
        "gated_mlp": (False,),
        "sliding_window": ANY,
        "dropout": ANY,
    },
    names={**WINDOW, "use_bias": Field("bias", bool)},
    parts=(
        Alias("layer_norm_epsilon", "norm_eps", "norm_epsilon"),
        Ignored("rms_norm_eps", float),  # starcoder2-15b has it, and no norm that would read it
        Only("mlp_type", ("default",), because="another MLP"),
        Only("norm_type", ("layer_norm",), because="another norm"),
        Only("scale_attn_weights", (True,), because="which leaves the scores unscaled"),
        # Precision; ours is fp32 or better in any case.
        Ignored("attention_softmax_in_fp32", bool),
        Ignored("scale_attention_softmax_in_fp32", bool),
    ),
    eps="norm_epsilon",
    dropout=Dropout(kept=("embedding_dropout", "residual_dropout")),
    defaults={
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "norm_epsilon": 1e-5,
        "sliding_window": None,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    notes=_notes,
)
