"""`from_pretrained` and `save_pretrained`: every format in, every format out, the same model."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest

from gpt_core.errors import InputError
from gpt_core.formats import open_checkpoint
from gpt_core.precision import Precision
from jax_gpt.model import GPT, initialiser

CONFIG = replace(numpy_gpt.CONFIGS["rope-gqa-window"], context_length=32)


def logits(model):
    return np.asarray(model(jnp.asarray(numpy_gpt.random_tokens(CONFIG))))


@pytest.fixture(params=[True, False], ids=["stacked", "unrolled"])
def model(request):
    return GPT(CONFIG, initialiser(3), scan_layers=request.param)


@pytest.mark.parametrize("to", ["hf", "hf-starcoder2", "jax", "torch"])
def test_a_model_comes_back_from_every_format(to, model, tmp_path):
    written = model.save_pretrained(tmp_path / "out", to)
    assert open_checkpoint(tmp_path / "out").format == written.target.format
    back = GPT.from_pretrained(str(tmp_path / "out"), scan_layers=model.scan_layers)
    np.testing.assert_array_equal(logits(back), logits(model))


def test_hugging_face_is_the_default_and_the_native_class_is_picked(model, tmp_path):
    assert model.save_pretrained(tmp_path / "out").target.format == "hf-starcoder2"


def test_weights_are_cast_to_the_precision_that_is_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path / "out")
    back = GPT.from_pretrained(tmp_path / "out", precision=Precision("bfloat16", "bfloat16"))
    assert "bfloat16" in str(back.token_embedding.dtype)
    again = back.save_pretrained(tmp_path / "half")
    assert {dtype.name for dtype in open_checkpoint(tmp_path / "half").dtypes.values()} == {"bfloat16"}
    assert again.weights_sha256 == open_hash(tmp_path / "half")


def open_hash(folder):
    from gpt_core.checkpoints.hashing import hash_weights

    return hash_weights(open_checkpoint(folder))


def test_what_no_architecture_expresses_needs_leave_to_bring_code(tmp_path):
    model = GPT(numpy_gpt.CONFIGS["learned-mha-window"], initialiser(0))
    with pytest.raises(InputError, match="--allow-remote-code"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert model.save_pretrained(tmp_path / "out", allow_remote_code=True).target.format == "hf-twingpt"


def test_an_existing_folder_stays_unless_forced(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", force=True)
    assert open_checkpoint(tmp_path / "out").format == "hf-starcoder2"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        GPT.from_pretrained(tmp_path / "nowhere")
