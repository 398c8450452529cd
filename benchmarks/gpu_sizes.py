"""At what size the questions of `gpu_box.py` are asked: as promised on a GPU, or as a toy that a CPU answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Of models and batches.

    Args:
        dtype: Of computation.
        model: Fields of the model beside those of GPT-2 124M.
        hugging_face: The same for `transformers`' GPT-2.
        rows: Of a training batch.
        length: Tokens of its rows.
        window: Of the model with a window; it has RoPE and a third of the heads for keys and values.
        window_rows: Of its batch.
        window_length: Tokens of its rows.
        batches: Rows that are decoded together.
        new: Tokens that are decoded.
        rounds: Turns of a side.
        steps: Of a turn.
        copied: Bytes of the copy that measures the memory's speed.
        multiplied: Rows of the square matrices that measure the speed of products.
        compiled: Whether PyTorch's models become machine code; otherwise those of its trials are traced, and no more.
    """

    dtype: str = "bfloat16"
    model: Mapping[str, Any] = field(default_factory=dict)
    hugging_face: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 16
    length: int = 1024
    window: int = 256
    window_rows: int = 4
    window_length: int = 4096
    batches: tuple[int, ...] = (1, 8, 64)
    new: int = 128
    rounds: int = 3
    steps: int = 6
    copied: int = 2**32
    multiplied: int = 8192
    compiled: bool = True

    @property
    def heads(self) -> int:
        return int(self.model.get("n_heads", 12))

    @property
    def head_dim(self) -> int:
        return int(self.model.get("embed_dim", 768)) // self.heads

    @property
    def windowed(self) -> dict[str, Any]:
        """Fields of the model with a window."""
        return {**self.model, "position": "rope", "n_kv_heads": self.heads // 3, "sliding_window": self.window}


REAL = Sizes()
TOY = Sizes(
    model={"n_layers": 1, "n_heads": 3, "embed_dim": 24, "vocab_size": 96, "pad_vocab_size_multiple": 32},
    hugging_face={"n_layer": 1, "n_head": 3, "n_embd": 24, "vocab_size": 96},
    rows=2,
    length=32,
    window=8,
    window_rows=1,
    window_length=64,
    batches=(1, 2),
    new=4,
    rounds=2,
    steps=2,
    copied=2**20,
    multiplied=64,
    compiled=False,
)
