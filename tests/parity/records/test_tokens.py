"""Which tokens a checkpoint runs on: its own tokenizer's or a file's, and never ids that it does not know."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt_core.errors import InputError
from gpt_core.text.gpt2 import gpt2_tokenizer
from parity.records.tokens import require_fitting, tokens_for

VOCABULARY = 50257


@pytest.fixture
def with_tokenizer(tiny, tmp_path):
    """A folder with GPT-2's tokenizer, and a config of its vocabulary."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    gpt2_tokenizer().save(folder)
    return folder, replace(tiny, vocab_size=VOCABULARY)


def save(path, array):
    np.save(path, array)
    return path


def test_ids_come_from_the_file_as_they_are(tiny, tmp_path):
    ids = np.array([[3, 1, 4], [1, 5, 28]], np.int32)
    found = tokens_for(tmp_path, tiny, tokens=save(tmp_path / "ids.npy", ids))
    assert found.dtype == np.int64
    assert found.tolist() == ids.tolist()


def test_one_row_may_come_without_a_batch_axis(tiny, tmp_path):
    assert tokens_for(tmp_path, tiny, tokens=save(tmp_path / "ids.npy", np.array([7, 8, 9]))).tolist() == [[7, 8, 9]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int8, np.uint64])
def test_any_whole_numbers_will_do(tiny, dtype, tmp_path):
    path = save(tmp_path / "ids.npy", np.array([[0, 28]], dtype))
    assert tokens_for(tmp_path, tiny, tokens=path).tolist() == [[0, 28]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0, 29]]), r"token id 29 is outside the vocabulary 0\.\.28; give ids .* --tokens FILE\.npy"),
        (np.array([[0, 31]]), r"token id 31 is outside"),  # a padded row exists, and is no token
        (np.array([[-1, 2]]), "token id -1 is outside"),
        (np.zeros((1, 41), np.int64), "rows of 41 tokens are longer than context_length = 40"),
        (np.zeros((0, 4), np.int64), "holds no tokens"),
        (np.array([[0.0, 1.0]]), "expected one array of whole numbers"),
        (np.zeros((1, 2, 3), np.int64), "expected one array of whole numbers"),
        (np.array([True, False]), "expected one array of whole numbers"),
        (np.array(["a"]), "expected one array of whole numbers"),
        (np.array(5), "expected one array of whole numbers"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tiny, array, message, tmp_path):
    path = save(tmp_path / "ids.npy", array)
    with pytest.raises(InputError, match=message) as caught:
        tokens_for(tmp_path, tiny, tokens=path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array", b"PK\x03\x04"])
def test_a_file_that_is_no_array_is_refused(tiny, content, tmp_path):
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"ids\.npy: not a \.npy file of token ids"):
        tokens_for(tmp_path, tiny, tokens=tmp_path / "ids.npy")


def test_a_truncated_array_is_refused(tiny, tmp_path):
    path = save(tmp_path / "ids.npy", np.zeros((2, 9), np.int64))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"not a \.npy file"):
        tokens_for(tmp_path, tiny, tokens=path)


def test_a_pickled_array_is_refused_and_not_opened(tiny, tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    np.save(tmp_path / "ids.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not a \.npy file"):
        tokens_for(tmp_path, tiny, tokens=tmp_path / "ids.npy")


def test_a_header_that_promises_more_than_there_is_is_refused(tiny, tmp_path):
    path = save(tmp_path / "ids.npy", np.zeros((2, 9), np.int64))
    path.write_bytes(path.read_bytes().replace(b"(2, 9), }           ", b"(2, 999999999999), }"))
    with pytest.raises(InputError, match=r"ids\.npy: not a \.npy file of token ids \(.*, and 144 are there\)"):
        tokens_for(tmp_path, tiny, tokens=path)


@pytest.mark.parametrize("option", ["tokens", "text"])
def test_a_device_is_no_file(with_tokenizer, option, tmp_path):
    folder, config = with_tokenizer
    with pytest.raises(InputError, match="/dev/zero: is a device or a pipe"):
        tokens_for(folder, config, **{option: Path("/dev/zero")})


def test_a_text_of_more_than_16_mib_is_refused(with_tokenizer, tmp_path):
    folder, config = with_tokenizer
    with (tmp_path / "text").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="has more than 16,777,216 bytes"):
        tokens_for(folder, config, text=tmp_path / "text")


def test_an_archive_of_arrays_is_refused(tiny, tmp_path):
    np.savez(tmp_path / "ids.npz", a=np.zeros(3, np.int64))
    with pytest.raises(InputError, match="expected one array of whole numbers"):
        tokens_for(tmp_path, tiny, tokens=tmp_path / "ids.npz")


@pytest.mark.parametrize("option", ["tokens", "text"])
def test_a_missing_file_is_named(with_tokenizer, option, tmp_path):
    folder, config = with_tokenizer
    with pytest.raises(InputError, match="nowhere: no such file"):
        tokens_for(folder, config, **{option: tmp_path / "nowhere"})


def test_tokens_and_text_exclude_each_other(tiny, tmp_path):
    with pytest.raises(InputError, match="--tokens and --text exclude each other"):
        tokens_for(tmp_path, tiny, tokens=tmp_path / "a", text=tmp_path / "b")


def test_text_goes_through_the_checkpoints_own_tokenizer(with_tokenizer, tmp_path):
    folder, config = with_tokenizer
    (tmp_path / "text").write_text("Hello world" * 3, encoding="utf-8")
    found = tokens_for(folder, config, text=tmp_path / "text")
    assert found.tolist() == [[15496, 995, 15496], [995, 15496, 995]]


def test_without_a_tokenizer_text_is_refused_and_tokens_are_asked_for(tiny, tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer beside its weights.*give --tokens FILE\.npy"):
        tokens_for(tmp_path, tiny)


def test_a_tokenizer_that_knows_more_than_the_model_asks_for_tokens(with_tokenizer):
    folder, config = with_tokenizer
    with pytest.raises(InputError, match=r"outside the vocabulary 0\.\.99; give ids .* --tokens FILE\.npy"):
        tokens_for(folder, replace(config, vocab_size=100))


@pytest.mark.parametrize("content", [b"", b"a"])
def test_text_of_fewer_than_two_tokens_is_refused(with_tokenizer, content, tmp_path):
    folder, config = with_tokenizer
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match="holds fewer than two tokens"):
        tokens_for(folder, config, text=tmp_path / "text")


def test_bytes_that_are_no_text_are_refused(with_tokenizer, tmp_path):
    folder, config = with_tokenizer
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        tokens_for(folder, config, text=tmp_path / "text")


@pytest.mark.parametrize("window", [1, 7, 40, 60])
def test_built_in_text_is_longer_than_two_windows_and_no_multiple_of_one(with_tokenizer, window):
    folder, config = with_tokenizer
    ids = tokens_for(folder, replace(config, context_length=1024, sliding_window=window))
    batch, time = ids.shape
    assert batch == 2
    assert time > 2 * window
    assert window == 1 or time % window


def test_built_in_text_is_cut_to_the_context(with_tokenizer):
    folder, config = with_tokenizer
    assert tokens_for(folder, config).shape == (2, config.context_length)


def test_both_models_must_know_the_ids(tiny):
    ids = np.array([[0, 28]])
    require_fitting(ids, tiny, "ids")
    with pytest.raises(InputError, match=r"ids: token id 28 is outside the vocabulary 0\.\.27"):
        require_fitting(ids, replace(tiny, vocab_size=28), "ids")
