"""Models that transformers made and saved are read, agree in both frameworks, and go back bit by bit."""

import json

import numpy as np
import pytest
from hugging_face import SAMPLES, save, tokens

from gpt_core.formats import format_of, open_checkpoint
from gpt_core.formats.architectures import MODEL_TYPES
from gpt_core.formats.hf_architecture import format_name
from gpt_core.parameters import parameter_table
from gpt_core.precision import Precision
from parity.checkpoints.convert import convert

REASONABLE = 1e-5  # fp32 error of a model of two layers, relative to its largest logit


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (folder, the model that lies in it), each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("hf") / "model"
            made[name] = folder, save(SAMPLES[name], folder)
        return made[name]

    return get


def rms(error, truth):
    return np.sqrt(np.mean(np.square(error.astype(np.float64) - truth)) / np.mean(np.square(truth)))


def peer_logits(folder, dtype):
    from parity.sides.transformers_side import Peer

    return Peer(folder, dtype).run(tokens(), trace=False).logits


def own_logits(framework, folder):
    if framework == "jax":
        import jax

        from jax_gpt.model import GPT

        model = GPT.from_pretrained(folder, precision=Precision.of("float32"))
        return np.asarray(jax.jit(lambda ids: model(ids))(tokens()))
    import torch

    from torch_gpt.model import GPT

    with torch.no_grad():
        return GPT.from_pretrained(folder, precision=Precision.of("float32"))(torch.tensor(tokens())).numpy()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_our_error_is_at_most_three_times_the_peers_own(name, framework, saved, global_settings_restored):
    folder, _ = saved(name)
    truth = peer_logits(folder, "float64")
    ours, theirs = own_logits(framework, folder), peer_logits(folder, "float32")
    assert rms(ours, truth) <= 3 * rms(theirs, truth)
    assert np.abs(ours - truth).max() <= REASONABLE * np.abs(truth).max()
    assert truth.std() > 0.5, "such logits would be alike whatever the model did"


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.dtype == "float32"])
def test_the_fp64_run_of_the_peer_is_the_peer(name, saved):
    """What our error is measured against is what the model computes that transformers made, but for rounding."""
    import torch

    folder, model = saved(name)
    with torch.no_grad():
        original = model(torch.tensor(tokens())).logits.numpy()
    truth = peer_logits(folder, "float64")
    assert truth.dtype == np.float64
    assert np.abs(original - truth).max() <= REASONABLE * np.abs(truth).max()


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if "num_experts_per_tok" in sample.fields])
def test_no_router_of_a_sample_is_near_a_tie(name, saved):
    """Rounding would send a token to another expert, and its error would say nothing of ours."""
    from parity.sides.transformers_side import Peer

    fields = SAMPLES[name].fields
    experts, last = fields["num_local_experts"], fields["num_experts_per_tok"] - 1
    sites = Peer(saved(name)[0], "float64").run(tokens()).sites
    scores = [np.sort(array, axis=-1)[..., ::-1] for site, array in sites.items() if site.endswith("moe.scores")]
    assert [array.shape for array in scores] == [(*tokens().shape, experts)] * fields["num_hidden_layers"]
    assert min((array[..., last] - array[..., last + 1]).min() for array in scores) >= 1e-3


@pytest.mark.parametrize("name", SAMPLES)
def test_there_and_back_is_the_same_class_and_every_bit(name, saved, tmp_path):
    folder, _ = saved(name)
    # A multi-head GPTBigCode is the function of a GPT-2, which hf picks; its own class is asked for by name.
    to = SAMPLES[name].format if name == "gpt_bigcode, multi-head" else "hf"
    first = convert(folder, tmp_path / "ours", "jax")
    second = convert(tmp_path / "ours", tmp_path / "back", to)
    assert first.source_format == second.destination_format == SAMPLES[name].format
    assert first.weights_sha256 == second.weights_sha256
    assert bits(folder) == bits(tmp_path / "back")
    classes = [json.loads((path / "config.json").read_text())["architectures"] for path in (folder, tmp_path / "back")]
    assert classes[0] == classes[1]
    theirs, ours = as_transformers_reads(folder), as_transformers_reads(tmp_path / "back")
    assert {field: ours.get(field) for field in theirs} == theirs


# Rates that our models have not; numbers that a file may leave to follow others; and what the layers that are listed
# leave without effect.
IDLE = {
    *("attn_pdrop", "n_inner", "intermediate_size", "max_window_layers", "no_rope_layer_interval"),
    *("attention_types", "attention_layers", "window_size"),
    *("_name_or_path", "transformers_version"),
}


def as_transformers_reads(folder):
    from transformers import AutoConfig

    content = AutoConfig.from_pretrained(folder).to_dict()
    content.get("rope_parameters", {}).pop("type", None)  # version 4's name of rope_type
    return {field: value for field, value in content.items() if field not in IDLE}


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if not name.endswith("_remote")])
def test_what_a_file_leaves_out_is_what_transformers_gives_it(model_type):
    """Each default that we declare is its config class's own, but for those that the class makes of other fields."""
    from transformers import AutoConfig

    declared = format_of(format_name(model_type)).architecture.defaults
    theirs = AutoConfig.for_model(model_type).to_dict()
    following = {"head_dim", "num_key_value_heads", "sliding_window", "sliding_window_pattern", "n_inner"}
    assert len(declared) > 3
    for field in declared.keys() & theirs.keys() - following:
        assert theirs[field] == declared[field], field


def bits(folder):
    """Every tensor of a folder as bytes, read by safetensors alone."""
    import torch
    from safetensors.torch import load_file

    arrays = {}
    for file in folder.glob("*.safetensors"):
        arrays |= load_file(file)
    return {key: (array.dtype, array.shape, array.view(torch.uint8).numpy().tobytes()) for key, array in arrays.items()}


@pytest.mark.parametrize("name", ["gpt2, sharded bf16, untied", "gpt_neo, local"])
def test_shards_are_read_through_their_index(name, saved):
    folder, _ = saved(name)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.tensors) > 20
    assert {dtype.name for dtype in checkpoint.dtypes.values()} == {SAMPLES[name].dtype}


TIED_NEOX = "gpt_neox, one branch after the other, tied"


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo, local", "starcoder2, grouped, window", "gemma2", TIED_NEOX])
def test_a_checkpoint_of_the_body_alone_is_the_same_model(name, saved, tmp_path):
    folder, model = saved(name)
    model.base_model.save_pretrained(tmp_path / "body")
    keys = set(open_checkpoint(folder).tensors)
    assert set(open_checkpoint(tmp_path / "body").tensors) == keys
    whole, body = (convert(path, tmp_path / f"{n}", "torch") for n, path in enumerate((folder, tmp_path / "body")))
    assert whole.weights_sha256 == body.weights_sha256


def test_a_tied_head_that_was_saved_too_is_left_out(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = saved("gpt2")
    (tmp_path / "twice").mkdir()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    (tmp_path / "twice" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "twice").tensors


class TestATiedHead:
    """Either name of the pair serves: which one is kept is up to the writer."""

    @pytest.fixture(params=["gpt2", "starcoder2, grouped, window"])
    def model(self, request, saved):
        return saved(request.param)

    def test_the_head_alone_is_the_embedding_too(self, model, tmp_path):
        """As safetensors' `save_model` leaves it."""
        from safetensors.torch import load_file, save_model

        folder, original = model
        (tmp_path / "head").mkdir()
        save_model(original, str(tmp_path / "head" / "model.safetensors"))
        (tmp_path / "head" / "config.json").write_bytes((folder / "config.json").read_bytes())
        kept = load_file(tmp_path / "head" / "model.safetensors").keys() & {"lm_head.weight", embedding_of(original)}
        assert len(kept) == 1
        assert same_weights(tmp_path / "head", folder)

    @pytest.mark.parametrize("wrapper", ["", "module."])
    def test_the_head_alone_by_its_name(self, wrapper, model, tmp_path):
        folder, original = model

        def rename(key):
            return wrapper + ("lm_head.weight" if key == embedding_of(original) else key)

        renamed(folder, tmp_path / "head", rename)
        assert same_weights(tmp_path / "head", folder)

    @pytest.mark.parametrize("listed", ["lm_head.weight", "transformer.wte.weight"])
    def test_an_index_may_list_both_where_one_is_stored(self, listed, saved, tmp_path):
        folder, _ = saved("gpt2")
        stored = ({"lm_head.weight", "transformer.wte.weight"} - {listed}).pop()
        keys = renamed(folder, tmp_path / "both", lambda key: stored if key == "transformer.wte.weight" else key)
        (tmp_path / "both" / "model.safetensors").rename(tmp_path / "both" / "model-1.safetensors")
        index = {"weight_map": dict.fromkeys([*keys, listed], "model-1.safetensors")}
        (tmp_path / "both" / "model.safetensors.index.json").write_text(json.dumps(index))
        assert same_weights(tmp_path / "both", folder)


@pytest.mark.parametrize("body", [False, True], ids=["whole", "body"])
@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("name", ["gpt2", "starcoder2, grouped, window"])
def test_what_wrappers_put_before_every_key_is_no_part_of_it(name, wrapper, body, saved, tmp_path):
    folder, original = saved(name)
    prefix = f"{original.base_model_prefix}." if body else ""
    renamed(folder, tmp_path / "wrapped", lambda key: wrapper + key.removeprefix(prefix))
    assert same_weights(tmp_path / "wrapped", folder)


def test_masks_within_a_wrapper_are_no_weights_either(saved, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder, _ = saved("gpt2")
    renamed(folder, tmp_path / "wrapped", lambda key: f"module.{key}")
    file = tmp_path / "wrapped" / "model.safetensors"
    save_file(load_file(file) | {"module.transformer.h.0.attn.bias": torch.ones(1, 1, 40, 40, dtype=torch.uint8)}, file)
    assert same_weights(tmp_path / "wrapped", folder)


def embedding_of(model):
    return "model.embed_tokens.weight" if model.config.model_type == "starcoder2" else "transformer.wte.weight"


def renamed(source, folder, rename):
    """A copy of a folder whose tensors have other names, in one file; the names."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= {rename(key): tensor for key, tensor in load_file(file).items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return list(tensors)


def same_weights(folder, other):
    one, two = open_checkpoint(folder), open_checkpoint(other)
    assert one.config == two.config
    return all(np.array_equal(one.read(row), two.read(row)) for row in parameter_table(one.config).values())


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("llama, llama3", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt_neox", [f"gpt_neox.layers.1.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")]),
    ],
)
def test_masks_and_frequencies_that_older_versions_saved_are_no_weights(name, buffers, saved, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder, _ = saved(name)
    (tmp_path / "old").mkdir()
    tensors = load_file(folder / "model.safetensors") | {key: torch.ones(1, 1, 4, 4) for key in buffers}
    save_file(tensors, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    (tmp_path / "old" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert set(open_checkpoint(tmp_path / "old").tensors) == set(open_checkpoint(folder).tensors)
