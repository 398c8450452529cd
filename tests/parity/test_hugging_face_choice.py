"""Which architecture a model goes out as, and what keeps it out of one, follows from what each of them holds."""

from dataclasses import replace

import numpy_gpt
import pytest

from gpt_core.errors import InputError
from gpt_core.formats.targets import choose_target
from gpt_core.storage.adaptation import adapt

NOWHERE = ["irregular-pattern", "learned-pattern", "scaled-window"]  # choices that no family combines
MIXTURE = {"n_experts": 5, "expert_dim": 9, "mlp_bias": False}
MODERN = replace(numpy_gpt.CONFIGS["llama"], rope_scaling=None)


@pytest.mark.parametrize(
    ("changes", "format"),
    [
        ({}, "hf-llama"),
        ({"n_kv_heads": 1}, "hf-llama"),
        ({"bias": True, "qkv_bias": True, "mlp_bias": True}, "hf-llama"),
        ({"rope_scaling": {"kind": "linear", "factor": 2.0, "local_layers": True}}, "hf-llama"),  # of no such layer
        ({"activation": "gelu"}, "hf-llama"),
        ({"sliding_window": 4}, "hf-mistral"),
        ({"sliding_window": 16}, "hf-mistral"),  # that of no key, but as it is
        ({"n_heads": 9, "n_kv_heads": 3}, "hf-mistral"),  # which does not divide embed_dim, as Llama asks
        ({"sliding_window": 4, "rope_scaling": {"kind": "linear", "factor": 2.0, "local_layers": True}}, "hf-mistral"),
        ({"qkv_bias": True}, "hf-qwen2"),
        ({"sliding_window": 4, "attention_pattern": "LG"}, "hf-smollm3"),
        ({"sliding_window": 4, "attention_pattern": "LG", "qkv_bias": True}, "hf-qwen2"),
        ({"qk_norm": "head"}, "hf-qwen3"),
        ({"rope_fraction": 0.4}, "hf-phi3"),
        ({"attention_scale": 0.3}, "hf-granite"),
        ({"norm_placement": "post", "qk_norm": "whole"}, "hf-olmo2"),
        (MIXTURE, "hf-mixtral"),
        (MIXTURE | {"sliding_window": 4, "expert_dim": 12}, "hf-mixtral"),
        (MIXTURE | {"qk_norm": "head", "router_normalise": False}, "hf-qwen3_moe"),
        (MIXTURE | {"qk_norm": "whole", "experts_per_token": 1, "head_dim": None, "attention_scale": None}, "hf-olmoe"),
        ({"norm": "layer", "gated_mlp": False, "bias": True, "qkv_bias": True, "mlp_bias": True}, "hf-starcoder2"),
    ],
)
def test_hf_picks_what_changes_least_and_of_equal_ones_what_servers_read(changes, format):
    assert choose_target("hf", replace(MODERN, **changes)).format == format


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "to", "message"),
        [
            (
                "learned-mha-window",
                "hf",
                r"hf-gpt2 has sliding_window null and this model 4; .*hf-gpt_neo has qkv_bias false and this model true"
                r"; --to hf --allow-remote-code",
            ),
            ("learned-mha-window", "hf-gpt2", r"has sliding_window null and this model 4; .*--allow-remote-code"),
            ("rope-mha-full", "hf-gpt2", r"position 'learned' and this model 'rope'; hf-starcoder2 holds it"),
            ("rope-mha-full", "hf-gpt_bigcode", r"position 'learned' and this model 'rope'; hf-starcoder2 holds it"),
            ("rope-mha-window", "hf-gpt_neo", r"position 'learned' and this model 'rope'; hf-starcoder2 holds it"),
            ("learned-mha-full", "hf-starcoder2", r"position 'rope' and this model 'learned'; hf-gpt2 holds it"),
            ("learned-mha-full", "hf-gpt_neo", r"qkv_bias false and this model true; hf-gpt2 holds it"),
            ("learned-mha-full", "hf-twingpt", r"--allow-remote-code"),
            ("learned-mha-full", "hf-bert", r"unknown format 'hf-bert'; known are: .*hf-gpt2"),
            ("gemma-2", "hf-llama", r"sliding_window null and this model 4; hf-gemma2 holds it"),
            ("gemma-3", "hf-olmo3", r"attention_scale 0\.316\d* and this model 0\.25; hf-gemma3_text holds it"),
            ("smollm", "hf-qwen2", r"attention_pattern of L and G alone and this model 'GGGN'; hf-smollm3 holds it"),
            ("llama", "hf-phi3", r"rope_scaling null and this model \{kind: 'llama3', .*\}; hf-llama holds it"),
        ],
    )
    def test_with_the_reason_and_the_nearest_choice(self, name, to, message):
        with pytest.raises(InputError, match=message):
            choose_target(to, numpy_gpt.CONFIGS[name])

    @pytest.mark.parametrize(
        ("changes", "to", "message"),
        [
            (MIXTURE, "hf-llama", r"hf-llama has n_experts 0 and this model 5; hf-mixtral holds it"),
            ({}, "hf-mixtral", r"hf-mixtral has n_experts of at least 1 and this model 0; hf-llama holds it"),
            (
                MIXTURE | {"router_normalise": False},
                "hf",
                r"holds this model: hf-mixtral has router_normalise true and this model false; train one that",
            ),
            (MIXTURE, "hf-qwen3_moe", r"hf-qwen3_moe has qk_norm 'head' and this model null; hf-mixtral holds it"),
        ],
    )
    def test_a_mixture_for_what_keeps_it_out(self, changes, to, message):
        with pytest.raises(InputError, match=message):
            choose_target(to, replace(MODERN, **changes))

    def test_heads_that_are_not_as_wide_as_the_stream(self):
        config = replace(numpy_gpt.CONFIGS["learned-mha-full"], head_dim=10)
        with pytest.raises(InputError, match=r"hf-gpt2 has head_dim 4 and this model 10"):
            choose_target("hf", config)
        assert choose_target("hf", config, allow_remote_code=True).format == "hf-twingpt"

    @pytest.mark.parametrize("name", NOWHERE)
    def test_a_model_that_nothing_holds(self, name):
        with pytest.raises(
            InputError, match=r"no architecture of transformers holds this model: hf-\w+ has \w+ .* and"
        ):
            choose_target("hf", numpy_gpt.CONFIGS[name])
        with pytest.raises(InputError, match=r"hf-twingpt has \w+ "):
            choose_target("hf", numpy_gpt.CONFIGS[name], allow_remote_code=True)

    def test_a_scale_that_cannot_move_under_a_norm_of_queries(self):
        config = replace(numpy_gpt.CONFIGS["gemma-3"], attention_scale=0.3)
        with pytest.raises(InputError, match=r"attention_scale 0\.3015\d* or 0\.316\d* and this model 0\.3"):
            choose_target("hf-gemma3_text", config)
        with pytest.raises(InputError, match=r"attention_scale 0\.3 cannot move into queries that are normed"):
            adapt(config, attention_scale=1.0)

    def test_what_is_lost_in_training_is_said(self):
        notices = choose_target("hf", replace(numpy_gpt.CONFIGS["llama"], dropout=0.1)).adaptation.notices
        assert any("dropout 0.1 in training is not kept: hf-llama has none" in notice for notice in notices)

    def test_a_window_over_the_whole_context_is_a_full_mask(self):
        config = replace(numpy_gpt.CONFIGS["learned-mha-full"], sliding_window=16)
        target = choose_target("hf", config)
        assert target.format == "hf-gpt2"
        assert target.adaptation.after.sliding_window is None
