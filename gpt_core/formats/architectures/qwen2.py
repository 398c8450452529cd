"""The spoke of `Qwen2ForCausalLM`: Qwen 2 and 2.5, with biases on queries, keys and values alone.

Published files carry a window that `use_sliding_window` turns off.
"""

from gpt_core.formats.hf_architecture import ANY, kinds
from gpt_core.formats.hf_decoder import decoder
from gpt_core.formats.hf_parts import OptionalWindow

ARCHITECTURE = decoder(
    "qwen2",
    "Qwen2ForCausalLM",
    "RMSNorm, a gated MLP, rotation, q/k/v biases, and a window on some layers",
    holds={"qkv_bias": (True,), "sliding_window": ANY, "attention_pattern": kinds("LG")},
    parts=(OptionalWindow(),),
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
