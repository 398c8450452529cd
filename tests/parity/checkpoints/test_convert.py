"""`parity convert`: every bit arrives, and a conversion that cannot finish leaves nothing behind."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt_core.errors import InputError
from gpt_core.formats import open_checkpoint
from gpt_core.parameters import parameter_table
from gpt_core.text.finding import tokenizer_of
from gpt_core.text.gpt2 import gpt2_tokenizer
from parity.checkpoints.convert import conversion_parts, convert

SHAPES = {
    "tied": {},
    "untied": {"tied_embeddings": False},
    "unpadded": {"pad_vocab_size_multiple": 1},
    "no-bias-learned": {"bias": False, "qkv_bias": False, "position": "learned"},
    "rope": {"position": "rope"},
}


def stored_bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    checkpoint = open_checkpoint(folder)
    arrays = {name: checkpoint.read(row) for name, row in parameter_table(checkpoint.config).items()}
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def bits_of(weights):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in weights.items()}


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("unrolled", [False, True], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
class TestRoundTrip:
    def test_torch_to_jax_to_torch(self, tiny, changes, dtype, unrolled, write_checkpoint, draw_weights, tmp_path):
        config = replace(tiny, **changes)
        weights = draw_weights(config, dtype)
        source = write_checkpoint("torch", config, weights)
        convert(source, tmp_path / "jax", "jax", unrolled=unrolled)
        assert stored_bits(tmp_path / "jax") == bits_of(weights)
        convert(tmp_path / "jax", tmp_path / "back", "torch")
        assert stored_bits(tmp_path / "back") == bits_of(weights)
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()

    def test_jax_to_torch_to_jax(self, tiny, changes, dtype, unrolled, write_checkpoint, draw_weights, tmp_path):
        config = replace(tiny, **changes)
        weights = draw_weights(config, dtype)
        source = write_checkpoint("jax", config, weights, unrolled=unrolled)
        convert(source, tmp_path / "torch", "torch")
        convert(tmp_path / "torch", tmp_path / "back", "jax", unrolled=unrolled)
        assert stored_bits(tmp_path / "back") == bits_of(weights)
        assert open_checkpoint(tmp_path / "back").tensors == open_checkpoint(source).tensors
        assert open_checkpoint(tmp_path / "back").config == config


def test_a_stacked_checkpoint_becomes_an_unrolled_one_and_back(tiny, write_checkpoint, draw_weights, tmp_path):
    weights = draw_weights(tiny)
    source = write_checkpoint("jax", tiny, weights)
    convert(source, tmp_path / "apart", "jax", unrolled=True)
    assert "blocks.2.mlp.up.kernel" in open_checkpoint(tmp_path / "apart").tensors
    convert(tmp_path / "apart", tmp_path / "stacked", "jax")
    assert stored_bits(tmp_path / "stacked") == bits_of(weights)


@pytest.mark.parametrize("to", ["jax", "torch"])
def test_nan_infinity_and_negative_zero_arrive_as_they_are(tiny, to, write_checkpoint, draw_weights, tmp_path):
    weights = draw_weights(tiny)
    weights["token_embedding"][0, :4] = [np.nan, -np.inf, -0.0, 1e-42]
    weights["blocks.attention.query.bias"][:] = 0  # a chunk of nothing but zeros must exist too
    source = write_checkpoint("torch", tiny, weights)
    convert(source, tmp_path / "copy", to)
    assert stored_bits(tmp_path / "copy") == bits_of(weights)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("to", ["jax", "torch"])
def test_a_cast_is_numpys_own(tiny, to, dtype, write_checkpoint, draw_weights, tmp_path):
    weights = draw_weights(tiny)
    source = write_checkpoint("jax" if to == "torch" else "torch", tiny, weights)
    convert(source, tmp_path / "cast", to, dtype=dtype)
    wanted = open_checkpoint(tmp_path / "cast").dtypes["token_embedding"]
    assert wanted.name == dtype
    assert stored_bits(tmp_path / "cast") == bits_of({name: array.astype(wanted) for name, array in weights.items()})


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e300), ("bfloat16", 3.4e38)])
@pytest.mark.parametrize("to", ["jax", "hf"])
def test_a_number_beyond_the_dtype_becomes_infinite_and_is_said(
    tiny, to, dtype, largest, write_checkpoint, draw_weights, tmp_path
):
    """The cast's, not the source's: 3.4e38 is a float32, and more than any bfloat16 (3.39e38)."""
    config = replace(tiny, position="rope")  # so that hf can hold it
    weights = draw_weights(config, "float64" if dtype == "float32" else "float32")
    weights["blocks.mlp.up.kernel"][1, 2, 3] = -largest
    source = write_checkpoint("torch", config, weights)
    done = convert(source, tmp_path / "cast", to, dtype=dtype)
    found = open_checkpoint(tmp_path / "cast").read(parameter_table(config)["blocks.mlp.up.kernel"])
    assert found[1, 2, 3] == -np.inf
    assert np.isfinite(found).sum() == found.size - 1
    said = [notice for notice in done.notices if "inf" in notice]
    assert said == [f"1 tensors hold values that become infinite in {dtype}, such as blocks.mlp.up.kernel, layer 1"]


def test_an_infinity_of_the_source_is_the_sources_after_a_cast_too(tiny, write_checkpoint, draw_weights, tmp_path):
    weights = draw_weights(tiny, "float64")
    weights["blocks.mlp.up.kernel"][0, 0, 0] = np.inf
    weights["token_embedding"][0, 0] = 1e300
    source = write_checkpoint("torch", tiny, weights)
    done = convert(source, tmp_path / "cast", "torch", dtype="float32")
    assert done.notices == (
        "1 tensors hold NaN or infinity, such as blocks.mlp.up.kernel, layer 0",
        "1 tensors hold values that become infinite in float32, such as token_embedding",
    )
    assert convert(source, tmp_path / "copy", "jax").notices == done.notices[:1]


class TestLayersOfTwoDtypes:
    @pytest.fixture
    def config(self, tiny):
        return replace(tiny, position="rope", pad_vocab_size_multiple=1)  # so that every format holds it as it is

    @pytest.fixture
    def source(self, config, write_checkpoint, draw_weights):
        """A checkpoint whose last block was saved in fp64 and whose first in bf16."""
        from safetensors.torch import load_file, save_file

        folder = write_checkpoint("torch", config, draw_weights(config, "bfloat16"))
        tensors = load_file(folder / "model.safetensors")
        mixed = {key: tensor.double() if "blocks.1." in key else tensor for key, tensor in tensors.items()}
        save_file(mixed, folder / "model.safetensors")
        return folder

    def test_without_a_choice_they_are_refused_by_name(self, source, tmp_path):
        told = r"blocks\.1\.\S+ is float64 where other blocks are bfloat16; choose one with --dtype"
        with pytest.raises(InputError, match=told):
            convert(source, tmp_path / "out", "jax")
        assert left_behind(tmp_path) == ["checkpoint"]

    @pytest.mark.parametrize("to", ["jax", "torch", "hf"])
    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
    def test_the_dtype_that_is_asked_for_decides(self, config, to, dtype, source, draw_weights, tmp_path):
        convert(source, tmp_path / "out", to, dtype=dtype)
        weights = draw_weights(config, "bfloat16")
        wanted = open_checkpoint(tmp_path / "out").dtypes["token_embedding"]
        assert wanted.name == dtype
        assert stored_bits(tmp_path / "out") == bits_of({name: a.astype(wanted) for name, a in weights.items()})

    def test_a_whole_parameter_is_as_wide_as_its_widest_block(self, config, source):
        checkpoint = open_checkpoint(source)
        assert checkpoint.read(parameter_table(config)["blocks.mlp.up.kernel"]).dtype == np.float64


def test_an_unknown_dtype_is_refused(tiny, write_checkpoint, tmp_path):
    source = write_checkpoint("torch", tiny)
    with pytest.raises(InputError, match="'float8' must be one of: float64, float32, bfloat16"):
        convert(source, tmp_path / "cast", "torch", dtype="float8")


def test_the_tokenizer_travels_byte_for_byte(tiny, write_checkpoint, tmp_path):
    source = write_checkpoint("jax", tiny, tokenizer=gpt2_tokenizer())
    convert(source, tmp_path / "torch", "torch")
    convert(tmp_path / "torch", tmp_path / "back", "jax")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = tokenizer_of(tmp_path / "back")
    assert tokenizer is not None
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_a_changed_tokenizer_goes_along_as_it_is_and_is_said(tiny, write_checkpoint, tmp_path):
    source = write_checkpoint("jax", tiny, tokenizer=gpt2_tokenizer())
    (source / "merges.txt").write_text("#version: 0.2\nĠ t\n", encoding="utf-8")
    (notice,) = convert(source, tmp_path / "torch", "torch").notices
    assert "not GPT-2's (merges.txt holds other merges)" in notice
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "torch" / name).read_bytes() == (source / name).read_bytes()


def test_what_was_done_is_reported(tiny, write_checkpoint, tmp_path):
    source = write_checkpoint("torch", tiny)
    done = convert(source, tmp_path / "new" / "jax", "jax").to_dict()
    assert (done["source_format"], done["destination_format"]) == ("torch", "jax")
    assert (done["source"], done["destination"]) == (str(source), str(tmp_path / "new" / "jax"))
    held = sum(np.prod(row.shape) for row in parameter_table(tiny).values())
    assert done["parameters"] == held
    assert done["write_seconds"] > 0 < done["verify_seconds"]


@pytest.mark.parametrize("to", ["jax", "torch"])
class TestDestination:
    def test_a_folder_that_exists_is_kept_without_force(self, tiny, to, write_checkpoint, tmp_path):
        source = write_checkpoint("torch", tiny)
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "thesis.tex").write_text("years of work", encoding="utf-8")
        with pytest.raises(InputError, match=r"exists already; .* --force"):
            convert(source, tmp_path / "there", to)
        assert left_behind(tmp_path / "there") == ["thesis.tex"]
        assert left_behind(tmp_path) == ["checkpoint", "there"]

    def test_force_replaces_all_of_it(self, tiny, to, write_checkpoint, draw_weights, tmp_path):
        weights = draw_weights(tiny)
        source = write_checkpoint("torch", tiny, weights)
        other = write_checkpoint("jax" if to == "torch" else "torch", replace(tiny, n_layers=1), name="old")
        convert(source, other, to, force=True)
        assert stored_bits(other) == bits_of(weights)
        assert open_checkpoint(other).format == to
        assert left_behind(tmp_path) == ["checkpoint", "old"]

    def test_the_source_itself_is_refused_even_by_another_name(self, tiny, to, write_checkpoint, tmp_path):
        source = write_checkpoint("torch", tiny)
        before = stored_bits(source)
        (tmp_path / "link").symlink_to(source)
        for destination in (source, tmp_path / "link", source / ".." / "checkpoint"):
            with pytest.raises(InputError, match="source and destination are the same folder"):
                convert(source, destination, to, force=True)
        assert stored_bits(source) == before

    def test_a_file_in_its_place_is_refused(self, tiny, to, write_checkpoint, tmp_path):
        source = write_checkpoint("torch", tiny)
        (tmp_path / "file").write_text("x", encoding="utf-8")
        with pytest.raises(InputError, match="file: is a file"):
            convert(source, tmp_path / "file", to, force=True)
        with pytest.raises(InputError, match="cannot be written"):
            convert(source, tmp_path / "file" / "below", to)
        assert (tmp_path / "file").read_text(encoding="utf-8") == "x"

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
    def test_a_place_that_cannot_be_written_is_named(self, tiny, to, code, write_checkpoint, tmp_path, monkeypatch):
        source = write_checkpoint("torch", tiny)

        def refuse(*_: object) -> None:
            raise OSError(code, "no way")

        monkeypatch.setattr("gpt_core.files.writing.Lease", refuse)
        with pytest.raises(InputError, match="copy: cannot be written: no way; nothing was changed"):
            convert(source, tmp_path / "copy", to)
        assert left_behind(tmp_path) == ["checkpoint"]


def after_the_weights(monkeypatch, to, act):
    """Run `act(folder)` inside the conversion, when the weights are written and have not been read back."""
    module = {"torch": "gpt_core.formats.safetensors_torch", "jax": "gpt_core.formats.orbax_jax"}[to]
    from gpt_core.storage.checkpoint_config import write_checkpoint_config

    def write_then_act(folder, config):
        write_checkpoint_config(folder, config)
        act(folder)

    monkeypatch.setattr(f"{module}.write_checkpoint_config", write_then_act)


def weights_file(folder: Path) -> Path:
    torch, jax = folder / "model.safetensors", folder / "params" / "final_norm.bias" / "0"
    return torch if torch.exists() else jax


def flip_one_bit(folder: Path) -> None:
    path = weights_file(folder)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("to", ["jax", "torch"])
class TestHalfWay:
    """The destination is written whole or not at all, whatever happens, and what stood there before stays."""

    @pytest.fixture(params=["nothing there", "something there"])
    def destination(self, request, tmp_path) -> Path:
        folder = tmp_path / "copy"
        if request.param == "something there":
            folder.mkdir()
            (folder / "model.safetensors").touch()
            (folder / "README.md").write_text("kept", encoding="utf-8")
        return folder

    def assert_as_before(self, destination: Path, existed: bool) -> None:
        assert left_behind(destination.parent) == (["checkpoint", "copy"] if existed else ["checkpoint"])
        if existed:
            assert (destination / "README.md").read_text(encoding="utf-8") == "kept"

    def test_one_flipped_bit_is_seen(self, tiny, to, destination, write_checkpoint, monkeypatch):
        source, existed = write_checkpoint("torch", tiny), destination.exists()
        after_the_weights(monkeypatch, to, flip_one_bit)
        with pytest.raises(
            InputError, match=r"copy: not kept, it reads back wrong; is the disk sound\? \(final_norm\.bias differs"
        ):
            convert(source, destination, to, force=True)
        self.assert_as_before(destination, existed)

    def test_a_file_cut_short_is_seen(self, tiny, to, destination, write_checkpoint, monkeypatch):
        source, existed = write_checkpoint("torch", tiny), destination.exists()
        after_the_weights(monkeypatch, to, lambda folder: weights_file(folder).write_bytes(b""))
        with pytest.raises(InputError):
            convert(source, destination, to, force=True)
        self.assert_as_before(destination, existed)

    @pytest.mark.parametrize("reason", [KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "disk full")])
    def test_an_interruption_between_two_tensors_leaves_nothing(
        self, tiny, to, reason, destination, write_checkpoint, monkeypatch
    ):
        from gpt_core.storage.safetensors_file import SafetensorsReader

        source, existed = write_checkpoint("torch", tiny), destination.exists()
        read, calls = SafetensorsReader.read, []

        def read_some(self, key):
            calls.append(key)
            if len(calls) == 6:
                raise reason
            return read(self, key)

        monkeypatch.setattr(SafetensorsReader, "read", read_some)
        with pytest.raises(InputError if isinstance(reason, OSError) else type(reason)):
            convert(source, destination, to, force=True)
        assert 6 <= len(calls) < conversion_parts(source) // 2  # what was under way may end, the rest never begins
        self.assert_as_before(destination, existed)

    def test_ctrl_c_on_the_command_line_is_130_and_quiet(
        self, tiny, to, destination, write_checkpoint, monkeypatch, parity
    ):
        source, existed = write_checkpoint("torch", tiny), destination.exists()

        def interrupt(_: Path) -> None:
            raise KeyboardInterrupt

        after_the_weights(monkeypatch, to, interrupt)
        called = parity("convert", source, destination, "--to", to, "--force")
        assert called.code == 130
        assert called.err == "interrupted; nothing half written was left\n"
        self.assert_as_before(destination, existed)


class TestBadSource:
    """One line that names the file and the trouble, and no destination."""

    def refused(self, source: Path, message: str) -> None:
        destination = source.parent / "copy"
        before = left_behind(source.parent)
        with pytest.raises(InputError, match=message) as caught:
            convert(source, destination, "torch")
        assert str(source.name) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert left_behind(source.parent) == before

    def edit_config(self, folder: Path, **changes: object) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(content | changes), encoding="utf-8")

    def edit_model(self, folder: Path, **changes: object) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.edit_config(folder, model=content["model"] | changes)

    def test_nothing_there(self, tmp_path):
        self.refused(tmp_path / "nowhere", "nowhere: no such file or folder")

    def test_a_file_in_place_of_a_folder(self, tmp_path):
        (tmp_path / "weights.safetensors").write_bytes(b"x")
        self.refused(tmp_path / "weights.safetensors", "is a file; give the folder")

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / "empty").mkdir()
        self.refused(tmp_path / "empty", r"no known checkpoint; expected model\.safetensors .* params \(jax\)")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.pth", "epoch=3.ckpt"])
    def test_a_pickle_is_never_opened(self, name, tmp_path):
        import pickle

        class Trap:
            def __reduce__(self):
                return pytest.fail, ("it was unpickled",)

        (tmp_path / "old").mkdir()
        (tmp_path / "old" / name).write_bytes(pickle.dumps(Trap()))
        self.refused(tmp_path / "old", "may be a pickle and is never opened; save the weights as safetensors")

    @pytest.mark.parametrize("format", ["jax", "torch"])
    def test_no_config(self, tiny, format, write_checkpoint):
        folder = write_checkpoint(format, tiny)
        (folder / "config.json").unlink()
        self.refused(folder, r"config\.json: missing")

    @pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\x00\x01"])
    def test_a_broken_config(self, tiny, content, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        (folder / "config.json").write_text(content, encoding="utf-8")
        self.refused(folder, r"config\.json: ")

    def test_a_config_of_another_program(self, tiny, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        self.edit_config(folder, model_type="bert")
        self.refused(folder, "model_type is 'bert'; only .* twingpt can be read")

    def test_a_config_of_a_later_version(self, tiny, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        self.edit_config(folder, format_version=99)
        self.refused(folder, "format_version is 99")

    def test_an_unknown_field_at_the_top(self, tiny, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        self.edit_config(folder, quantization={"bits": 4})
        self.refused(folder, "unknown field 'quantization'")

    def test_an_unknown_field_of_the_model(self, tiny, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        self.edit_model(folder, attention_sinks=8)
        self.refused(folder, "unknown model field 'attention_sinks'; known are: vocab_size")

    def test_an_impossible_model(self, tiny, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        self.edit_model(folder, n_kv_heads=3)
        self.refused(folder, "n_heads = 4 is not a multiple of n_kv_heads = 3")

    @pytest.mark.parametrize("format", ["jax", "torch"])
    @pytest.mark.parametrize(
        ("changes", "trouble"),
        [
            ({"n_layers": 4}, "blocks"),
            ({"n_layers": 2}, "blocks"),
            ({"mlp_dim": 20}, "mlp"),
            ({"n_kv_heads": 4}, "attention"),
            ({"tied_embeddings": False}, "head"),
            ({"position": "rope"}, "position_embedding"),
            ({"qkv_bias": False}, "bias"),
            ({"vocab_size": 33}, "token_embedding"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_a_config_that_does_not_fit_the_weights(self, tiny, format, changes, trouble, write_checkpoint):
        folder = write_checkpoint(format, tiny)
        self.edit_model(folder, **changes)
        self.refused(folder, f"weights and config do not fit: .*{trouble}")

    @pytest.mark.parametrize("keep", [0, 4, 40, -1])
    def test_a_truncated_safetensors_file(self, tiny, keep, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(folder, r"model\.safetensors: not a whole safetensors file")

    def test_a_safetensors_file_with_bytes_behind_its_end(self, tiny, write_checkpoint):
        folder = write_checkpoint("torch", tiny)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes() + b"more")
        self.refused(folder, "not a whole safetensors file")

    def test_integers_are_no_weights(self, tiny, write_checkpoint):
        from safetensors.numpy import load_file, save_file

        folder = write_checkpoint("torch", tiny)
        tensors = load_file(folder / "model.safetensors")
        tensors["final_norm.bias"] = tensors["final_norm.bias"].astype(np.int32)
        save_file(tensors, folder / "model.safetensors")
        self.refused(folder, r"final_norm\.bias is of dtype I32; weights are of F64, F32, BF16, F16")

    def test_integers_are_no_weights_in_jax_either(self, tiny, write_checkpoint):
        from gpt_core.storage.orbax_file import write_orbax
        from gpt_core.storage.tensor_info import TensorInfo

        folder = write_checkpoint("jax", tiny)
        zeros = np.zeros(tiny.embed_dim, np.int32)
        (folder / "integers").mkdir()
        write_orbax(folder / "integers", {"final_norm.bias": TensorInfo(zeros.shape, zeros.dtype)}, lambda *_: zeros)
        shutil.rmtree(folder / "params" / "final_norm.bias")
        (folder / "integers" / "final_norm.bias").rename(folder / "params" / "final_norm.bias")
        self.refused(folder, r"final_norm\.bias is of dtype int32; weights are of float64, float32, bfloat16, float16")

    @pytest.mark.parametrize("chunk", ["token_embedding/0.0", "blocks.mlp.up.kernel/1.0.0"])
    @pytest.mark.parametrize("keep", [0, 8, -1])
    def test_a_truncated_orbax_chunk(self, tiny, chunk, keep, write_checkpoint):
        folder = write_checkpoint("jax", tiny)
        path = folder / "params" / chunk
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(folder, f"the array {chunk.split('/')[0]} is damaged or missing")

    @pytest.mark.parametrize("chunk", ["token_embedding/0.0", "blocks.mlp.up.kernel/1.0.0"])
    def test_a_missing_orbax_chunk_is_no_zeros(self, tiny, chunk, write_checkpoint):
        folder = write_checkpoint("jax", tiny)
        (folder / "params" / chunk).unlink()
        self.refused(folder, f"the array {chunk.split('/')[0]} is damaged or missing")

    def test_a_missing_orbax_array(self, tiny, write_checkpoint):
        folder = write_checkpoint("jax", tiny)
        (folder / "params" / "token_embedding" / ".zarray").unlink()
        self.refused(folder, "the array token_embedding is damaged or missing")

    @pytest.mark.parametrize("content", ["", "{}", '{"tree_metadata": 3}', "[]"])
    def test_a_damaged_orbax_tree(self, tiny, content, write_checkpoint):
        folder = write_checkpoint("jax", tiny)
        (folder / "params" / "_METADATA").write_text(content, encoding="utf-8")
        self.refused(folder, "_METADATA( is damaged|: cannot be read)")

    def test_a_params_folder_of_something_else(self, tiny, write_checkpoint):
        folder = write_checkpoint("jax", tiny)
        (folder / "params" / "_METADATA").unlink()
        self.refused(folder, "not an Orbax checkpoint: it has no _METADATA")

    def test_an_unknown_format_to_write(self, tiny, write_checkpoint, tmp_path):
        folder = write_checkpoint("jax", tiny)
        with pytest.raises(InputError, match="unknown format 'gguf'; known are: jax, torch"):
            convert(folder, tmp_path / "copy", "gguf")
        assert left_behind(tmp_path) == ["checkpoint"]


class TestOtherPeoplesReaders:
    """The files are the formats' own: their libraries read ours, and we read theirs."""

    def test_the_library_of_safetensors_reads_what_was_written(self, tiny, write_checkpoint, draw_weights):
        from safetensors.numpy import load_file

        weights = draw_weights(tiny)
        tensors = load_file(write_checkpoint("torch", tiny, weights) / "model.safetensors")
        np.testing.assert_array_equal(tensors["token_embedding"], weights["token_embedding"])
        np.testing.assert_array_equal(tensors["blocks.2.mlp.up.weight"], weights["blocks.mlp.up.kernel"][2].T)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_orbax_reads_what_was_written(self, tiny, dtype, write_checkpoint, draw_weights):
        import orbax.checkpoint as ocp

        weights = draw_weights(tiny, dtype)
        folder = write_checkpoint("jax", tiny, weights)
        tree = ocp.StandardCheckpointer().restore((folder / "params").absolute())
        kernel = np.asarray(tree["blocks"]["mlp"]["up"]["kernel"])
        assert kernel.dtype == weights["blocks.mlp.up.kernel"].dtype
        assert kernel.tobytes() == weights["blocks.mlp.up.kernel"].tobytes()

    def test_what_orbax_writes_is_read(self, tiny, write_checkpoint, draw_weights):
        import shutil

        import orbax.checkpoint as ocp

        weights = draw_weights(tiny)
        folder = write_checkpoint("jax", tiny, weights)
        tree: dict = {}
        for name, array in weights.items():
            *parents, leaf = name.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array
        shutil.rmtree(folder / "params")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "params").absolute(), tree)
        assert stored_bits(folder) == bits_of(weights)


def test_progress_counts_every_part_once(write_checkpoint, tiny, tmp_path):
    source = write_checkpoint("torch", tiny)
    for to in ("jax", "torch"):
        parts = []
        convert(source, tmp_path / f"to-{to}", to, advance=parts.append)
        assert sum(parts) == conversion_parts(source)
