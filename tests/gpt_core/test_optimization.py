import pytest

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.optimization import AdamWConfig, canonical_name, clip_scale
from gpt_core.parameters import parameter_table

TABLE = parameter_table(ModelConfig(n_layers=2, tied_embeddings=False))


@pytest.mark.parametrize(
    ("field", "value"), [("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0), ("weight_decay", -1.0), ("clip_norm", 0.0)]
)
def test_a_number_outside_its_range_is_named(field, value):
    with pytest.raises(InputError, match=field):
        AdamWConfig(**{field: value})


@pytest.mark.parametrize(("norm", "expected"), [(4.0, 0.5), (2.0, 1.0), (0.1, 1.0)])
def test_gradients_are_only_ever_scaled_down_and_exactly_to_the_limit(norm, expected):
    assert clip_scale(norm, 2.0, min) == expected


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("token_embedding", "token_embedding"),
        ("blocks.mlp.up.kernel", "blocks.mlp.up.kernel"),
        ("blocks.11.mlp.up.kernel", "blocks.mlp.up.kernel"),
        ("blocks.3.attention.query.weight", "blocks.attention.query.kernel"),
        ("blocks.3.attention.query.bias", "blocks.attention.query.bias"),
        ("blocks.0.mlp_norm.weight", "blocks.mlp_norm.scale"),
        ("final_norm.weight", "final_norm.scale"),
        ("head.weight", "head.kernel"),
    ],
)
def test_names_of_either_framework_lead_to_one_row(key, name):
    assert canonical_name(key, TABLE) == name
