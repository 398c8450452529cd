"""What is wrong with a folder of Hugging Face is named in one line, and never guessed around."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hugging_face import SAMPLES, edit, save

from gpt_core.errors import InputError
from gpt_core.formats import open_checkpoint
from parity.checkpoints.convert import convert


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("original") / "model"
            save(SAMPLES[name], made[name])
        return made[name]

    return get


@pytest.fixture
def folder_of(originals, tmp_path):
    """A copy of a sample's folder, to be damaged."""

    def copy(name):
        shutil.copytree(originals(name), tmp_path / "model")
        return tmp_path / "model"

    return copy


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_what_does_not_change_the_function_is_read(folder_of):
    folder = folder_of("gpt2")
    before = open_checkpoint(folder).config
    edit(
        folder / "config.json",
        resid_pdrop=0.3,
        embd_pdrop=0.1,
        attn_pdrop=0.2,
        task_specific_params={"a": 1},
        use_cache=False,
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == replace(before, dropout=0.0)
    assert any("resid_pdrop 0.3" in notice for notice in checkpoint.notices)


@pytest.mark.parametrize("ending", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_and_how_to_convert_it_is_said(ending, folder_of):
    folder = folder_of("gpt2")
    (folder / "model.safetensors").rename(folder / ending)
    refused(folder, f"{ending}, which may be a pickle and is never opened.*save_pretrained")


def test_no_weights_at_all(folder_of):
    folder = folder_of("gpt2")
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors")


SHARDED = "gpt_neo, local"
INDEX = "model.safetensors.index.json"


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_missing_shards_are_counted(folder_of):
    folder = folder_of(SHARDED)
    first = shards(folder)[0]
    first.unlink()
    refused(folder, f"1 of {len(shards(folder)) + 1} shards are missing, such as {first.name}")


def test_an_index_that_names_another_shard(folder_of):
    folder = folder_of(SHARDED)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    key = next(iter(places))
    other = next(name for name in places.values() if name != places[key])
    edit(folder / INDEX, weight_map=places | {key: other})
    refused(folder, "the index says")


def test_an_index_that_names_a_tensor_that_is_nowhere(folder_of):
    folder = folder_of(SHARDED)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=places | {"transformer.h.7.ln_1.weight": places[next(iter(places))]})
    refused(folder, r"transformer\.h\.7\.ln_1\.weight is not in .*, where the index says")


def test_an_index_that_leaves_a_tensor_out(folder_of):
    folder = folder_of(SHARDED)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={k: v for k, v in places.items() if k != "transformer.wpe.weight"})
    refused(folder, r"(transformer\.wpe\.weight lies in .* the index says nowhere|missing)")


@pytest.mark.parametrize("places", [{"a": "../../etc/passwd"}, {"a": "/etc/passwd"}, {}, {"a": 1}, "text"])
def test_an_index_that_points_elsewhere_or_at_nothing(places, folder_of):
    folder = folder_of(SHARDED)
    edit(folder / INDEX, weight_map=places)
    refused(folder, "no safetensors file of this folder|has no weight_map")


def test_a_tensor_in_two_shards(folder_of):
    from safetensors.torch import load_file, save_file

    folder = folder_of(SHARDED)
    first, second = shards(folder)[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {key: tensor}, second, {"format": "pt"})
    refused(folder, f"{key} lies in {first.name} and in {second.name}")


def test_shards_and_a_whole_file(folder_of):
    folder = folder_of(SHARDED)
    shutil.copy(shards(folder)[0], folder / "model.safetensors")
    refused(folder, "holds both")


def test_a_truncated_file(folder_of):
    folder = folder_of("gpt2")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "not a whole safetensors file")


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_an_unknown_and_a_wrongly_shaped_tensor_are_named(folder_of):
    import torch

    folder = folder_of("gpt2")

    def damage(tensors):
        tensors["transformer.h.0.attn.rotary.inv_freq"] = torch.ones(3)
        tensors["transformer.ln_f.weight"] = torch.ones(41)
        del tensors["transformer.h.1.mlp.c_fc.bias"]

    rewrite(folder, damage)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    for part in ("transformer.h.1.mlp.c_fc.bias", "transformer.h.0.attn.rotary.inv_freq", "(41,)", "(40,)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("n_inner", 57), ("n_layer", 3), ("vocab_size", 95), ("n_positions", 39)])
def test_config_and_weights_that_disagree(field, value, folder_of):
    folder = folder_of("gpt2")
    edit(folder / "config.json", **{field: value})
    refused(folder, "weights and config do not fit")


def test_a_router_of_other_experts_than_the_config_says(folder_of):
    folder = folder_of("mixtral")
    edit(folder / "config.json", num_local_experts=8)
    gate, spare = r"model\.layers\.0\.block_sparse_moe\.gate\.weight", r"block_sparse_moe\.experts\.(8|9|10)\.w[123]"
    told = (
        rf"18 tensors have no place in it, such as \S+{spare}\.weight; {gate} has shape \(11, 40\) where .* \(8, 40\)"
    )
    refused(folder, told)


def test_a_head_that_is_tied_in_the_config_and_another_in_the_file(folder_of):
    folder = folder_of("gpt2")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    refused(folder, "lm_head.weight differs from transformer.wte.weight, and config.json ties them")


def rename(folder, change):
    def all_of_them(tensors):
        renamed = {change(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    rewrite(folder, all_of_them)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda key: f"model.{key}",
            r"no place in it, such as model\.transformer\.\S+ \(it would, without 'model\.' before it\)",
        ),
        (
            lambda key: f"module.model.{key}",
            r"no place in it, such as module\.model\.transformer\.\S+ \(it would, without 'module\.model\.' before",
        ),
        (lambda key: key if "ln_f" in key else f"module.{key}", r"no place in it, such as module\.transformer"),
        (lambda key: key.replace("h.0.attn", "h.0._orig_mod.attn"), r"transformer\.h\.0\._orig_mod\.attn\.c_attn"),
        (
            lambda key: "base_model.model." + key.replace("c_attn.", "c_attn.base_layer."),
            r"base_model\.model\.transformer\.h\.0\.attn\.c_attn\.base_layer\.bias belongs to an adapter of PEFT",
        ),
    ],
    ids=["unknown", "unknown within a known one", "not before all", "in the middle", "adapters"],
)
def test_a_prefix_that_cannot_be_left_out_is_named_as_the_file_has_it(change, message, folder_of):
    folder = folder_of("gpt2")
    rename(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("body", [False, True])
def test_what_does_not_fit_is_named_as_the_file_has_it(wrapper, body, folder_of):
    """Whether the body's prefix is left out, and what a wrapper put before it, is the file's own."""
    folder = folder_of("gpt2")
    rename(folder, lambda key: wrapper + (key.removeprefix("transformer.") if body else key))
    prefix = wrapper + ("" if body else "transformer.")
    rewrite(folder, lambda tensors: tensors.pop(f"{prefix}h.1.ln_1.bias"))
    refused(folder, f"1 tensors are missing, such as {prefix}h.1.ln_1.bias$")


def test_blocks_of_two_dtypes_are_named_as_the_file_has_them(folder_of):
    folder = folder_of("gpt2")
    rename(folder, lambda key: f"module.{key}")
    rewrite(
        folder, lambda t: t.update({"module.transformer.h.1.ln_1.bias": t["module.transformer.ln_f.bias"].double()})
    )
    told = r"module\.transformer\.h\.1\.ln_1\.bias is float64 where other blocks are float32"
    with pytest.raises(InputError, match=told):
        _ = open_checkpoint(folder).dtypes


def test_quantised_weights(folder_of):
    import torch

    folder = folder_of("gpt2")
    rewrite(folder, lambda t: t.update({"transformer.ln_f.weight": torch.ones(40, dtype=torch.int8)}))
    refused(folder, r"transformer\.ln_f\.weight is of dtype I8")


def test_nan_weights_are_converted_bit_for_bit_with_a_warning(folder_of, tmp_path):
    folder = folder_of("gpt2")
    rewrite(folder, lambda t: t["transformer.h.1.mlp.c_fc.weight"].__setitem__((3, 4), float("nan")))
    done = convert(folder, tmp_path / "out", "jax")
    assert any("1 tensors hold NaN or infinity, such as blocks.mlp.up.kernel, layer 1" in n for n in done.notices)


def test_sound_weights_give_no_warning(folder_of, tmp_path):
    notices = convert(folder_of("gpt2"), tmp_path / "out", "jax").notices
    assert notices == ("dropout in training is 0.1: attn_pdrop 0.1 is not kept",)


@pytest.mark.parametrize(("name", "shown"), [("bert", "'bert'"), ([[]], r"\[\[\]\]"), ({}, "{}"), (None, "None")])
def test_another_architecture_is_named(folder_of, name, shown):
    folder = folder_of("gpt2")
    edit(folder / "config.json", model_type=name)
    refused(folder, f"model_type is {shown}")


class TestHubNames:
    def test_without_a_network_the_error_says_so(self, monkeypatch, tmp_path, parity):
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError

        def unreachable(*_, **__):
            raise LocalEntryNotFoundError("Cannot reach the hub\nand more")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
        monkeypatch.chdir(tmp_path)
        called = parity("inspect", "somebody/some-model")
        assert called.code == 2
        assert "somebody/some-model: no such folder" in called.err
        assert "(Cannot reach the hub)" in called.err
        assert "Traceback" not in called.err

    def test_what_was_fetched_is_opened_and_only_safe_files_are_asked_for(self, monkeypatch, tmp_path, originals):
        import huggingface_hub

        asked = {}

        def fetch(name, allow_patterns, **_):
            asked.update(name=name, patterns=allow_patterns)
            return str(originals("gpt2"))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        monkeypatch.chdir(tmp_path)
        from gpt_core.checkpoints.pretrained import open_pretrained

        assert open_pretrained("somebody/some-model").format == "hf-gpt2"
        assert asked["name"] == "somebody/some-model"
        assert not any(name.endswith((".bin", ".pt", ".py", "*")) for name in asked["patterns"])

    @pytest.mark.parametrize("name", ["gpt2", "runs/jax", "./a/b", "a/b/c", "/a/b"])
    def test_a_mistyped_path_asks_nobody(self, name, monkeypatch, tmp_path):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        from gpt_core.checkpoints.pretrained import open_pretrained

        with pytest.raises(InputError, match="no such file or folder"):
            open_pretrained(name)

    def test_a_repository_without_safetensors(self, monkeypatch, tmp_path):
        import huggingface_hub

        from gpt_core.checkpoints.pretrained import open_pretrained

        (tmp_path / "fetched").mkdir()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "fetched"))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match="no safetensors files"):
            open_pretrained("somebody/some-model")


def test_the_convert_command_says_what_was_picked_and_why(folder_of, tmp_path, parity):
    called = parity("convert", folder_of("gpt_bigcode, multi-query"), tmp_path / "out", "--to", "hf")
    assert called.code == 0
    assert "(hf-gpt_bigcode)" in called.out
    assert "hf-gpt_bigcode: learned positions, a full mask and multi-query attention" in called.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "jax", "--allow-remote-code"], "--allow-remote-code belongs to --to hf"),
        (["--to", "torch", "--report", "x.json"], "--report belongs to --to hf"),
        (["--to", "hf", "--unrolled"], "--unrolled belongs to --to jax"),
        (["--to", "hf", "--max-shard-size", "0"], "must be at least 1 byte"),
        (["--to", "hf-gpt_neo"], "hf-gpt_neo has qkv_bias false and this model true; hf-gpt2 holds it"),
        (["--to", "hf", "--report", "nowhere.json"], "nowhere.json: missing"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message, folder_of, tmp_path, parity):
    called = parity("convert", folder_of("gpt2"), tmp_path / "out", *flags)
    assert called.code == 2
    assert message in called.err
    assert not (tmp_path / "out").exists()


def test_an_export_that_reads_back_wrong_is_not_kept(folder_of, tmp_path, monkeypatch):
    """The last step before the name: a disk that turned one number is noticed."""
    from gpt_core.storage import safetensors_file

    folder = folder_of("gpt2")
    original = safetensors_file.SafetensorsReader.read

    def broken(self, key):
        array = original(self, key)
        if ".tmp" in str(self.path) and key == "transformer.h.1.ln_2.bias":
            array = array.copy()
            array[3] = np.nextafter(array[3], np.float32(9))
        return array

    monkeypatch.setattr(safetensors_file.SafetensorsReader, "read", broken)
    with pytest.raises(InputError, match=r"not kept, it reads back wrong.*blocks\.mlp_norm\.bias"):
        convert(folder, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == [folder]
