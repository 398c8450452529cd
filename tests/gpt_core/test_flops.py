import pytest

from gpt_core.adapter import AdapterConfig
from gpt_core.config import ModelConfig
from gpt_core.flops import forward_flops_per_token, peak_flops, training_flops_per_token


def visible_pairs(context_length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, counted one by one."""
    return sum(
        1
        for query in range(context_length)
        for key in range(context_length)
        if key <= query and (window is None or query - key < window)
    )


def counted(config: ModelConfig, context_length: int) -> float:
    """Multiplications and additions of every product of a row, divided by its tokens."""
    width, queries = config.embed_dim, config.n_heads * config.head_dim
    keys_and_values = 2 * config.n_kv_heads * config.head_dim
    matrices = 3 if config.gated_mlp else 2
    block = width * queries + width * keys_and_values + queries * width + matrices * width * config.mlp_dim
    row = 2 * context_length * (config.n_layers * block + width * config.vocab_size)
    for layer in range(config.n_layers):
        pattern = config.attention_pattern
        local = pattern is None or pattern[layer % len(pattern)] == "L"
        pairs = visible_pairs(context_length, config.sliding_window if local else None)
        row += config.n_heads * 2 * 2 * config.head_dim * pairs
    return row / context_length


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 13, 40])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_flops_are_those_of_every_product_and_visible_pair(position: str, window: int | None, n_kv_heads: int) -> None:
    config = ModelConfig(
        vocab_size=101,
        context_length=40,
        n_layers=3,
        n_heads=4,
        n_kv_heads=n_kv_heads,
        embed_dim=24,
        head_dim=10,
        mlp_dim=50,
        position=position,
        sliding_window=window,
        tied_embeddings=window is None,
        pad_vocab_size_multiple=64,
    )
    for context_length in (1, 12, 13, 40):
        assert forward_flops_per_token(config, context_length) == pytest.approx(
            counted(config, context_length), rel=1e-12
        )


@pytest.mark.parametrize("pattern", ["LG", "LLG", "GGLLL", "NL", "GGGN", "LGN"])
def test_flops_of_a_pattern_are_those_of_its_layers_one_by_one(pattern: str) -> None:
    config = ModelConfig(
        vocab_size=101,
        n_layers=5,
        n_heads=4,
        embed_dim=24,
        head_dim=10,
        mlp_dim=50,
        position="rope",
        sliding_window=7 if "L" in pattern else None,
        attention_pattern=pattern,
        gated_mlp=True,
        qk_norm="head",
        norm_placement="sandwich",
    )
    for context_length in (1, 7, 20):
        expected = counted(config, context_length)
        assert forward_flops_per_token(config, context_length) == pytest.approx(expected, rel=1e-12)
        assert training_flops_per_token(config, context_length) == pytest.approx(3 * expected, rel=1e-12)


def test_an_adapter_takes_the_gradients_of_frozen_weights_away_and_adds_its_own_products() -> None:
    # Rank 8 beside the 768 x 768 queries of 12 blocks: 12 x 8 x (768 + 768) weights, two operations each, three times.
    adapter = AdapterConfig(rank=8, targets=["attention.query"])
    frozen = 247_064_064  # the gradients of 123,532,032 weights
    expected = 797_870_592 - frozen + 3 * 2 * 147_456
    assert training_flops_per_token(ModelConfig(), 1024, adapter) == expected


def test_gpt2_has_the_flops_counted_by_hand() -> None:
    # 12 blocks of 12 x 768 x 768 weights and a head of 50257 x 768: 84,934,656 + 38,597,376, two operations each.
    # 1024 queries see 512.5 keys on average: 4 x 12 x 768 x 512.5 operations.
    assert forward_flops_per_token(ModelConfig(), 1024) == 247_064_064 + 18_892_800
    assert training_flops_per_token(ModelConfig(), 1024) == 797_870_592


@pytest.mark.parametrize(
    ("device", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H100 NVL", 835e12, 417.5e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("TPU v4", 275e12, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v6 lite", 918e12, None),
    ],
)
def test_peaks_are_dense_and_of_the_right_card(device: str, bfloat16: float, float32: float | None) -> None:
    assert peak_flops(device, "bfloat16") == bfloat16
    assert peak_flops(device, "float32") == float32


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA GeForce RTX 4090", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
    ],
)
def test_what_is_unknown_has_no_peak(device: str, dtype: str) -> None:
    assert peak_flops(device, dtype) is None
