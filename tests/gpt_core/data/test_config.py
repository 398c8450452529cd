from typing import Any

import pytest

from gpt_core.data.config import DataConfig
from gpt_core.errors import InputError


def test_a_config_survives_its_dictionary() -> None:
    config = DataConfig(source="a.txt", prepared="tokens", seed=3, on_error="skip")
    assert DataConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", "", "source = '' must be a text that is not empty"),
        ("prepared", "", "prepared = ''"),
        ("on_error", "ignore", "on_error = 'ignore' must be one of: stop, skip"),
        ("validation_fraction", 1, r"validation_fraction = 1 must be a number in \[0, 1\)"),
        ("seed", -1, "seed = -1 must be a whole number of at least 0"),
        ("seed", 2**63, "seed = 9223372036854775808 must be a whole number of at least 0 and at most 9,223,"),
        ("streams", 2**40, "streams = 1099511627776"),
        ("shuffle_window", 10**12, "shuffle_window = 1000000000000"),
        ("prefetch", 10**9, "prefetch = 1000000000"),
        ("streams", 0, "streams = 0 must be a whole number of at least 1"),
        ("shuffle_window", 1.5, "shuffle_window = 1.5"),
        ("prefetch", True, "prefetch = True"),
        ("kind", "chats", "kind = 'chats' must be one of: text, chat"),
        ("too_long", "cut", "too_long = 'cut' must be one of: truncate, drop"),
        ("separate_documents", "no", "separate_documents = 'no' must be true or false"),
        ("verify", "no", "verify = 'no' must be true or false"),
        ("sources", "x", "unknown data field 'sources'; known are: source, "),
    ],
)
def test_bad_fields_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"run.yaml: .*{message}"):
        DataConfig.from_dict({field: value}, source="run.yaml")


def test_a_section_must_be_a_mapping() -> None:
    with pytest.raises(InputError, match="expected a mapping of data fields, found list"):
        DataConfig.from_dict([])


def test_chats_are_not_prepared() -> None:
    with pytest.raises(InputError, match=r"prepared = 'tokens' does not go with kind = 'chat': .*leave prepared out"):
        DataConfig(kind="chat", prepared="tokens")


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [("text", None, False), ("chat", None, True), ("text", True, True), ("chat", False, False)],
)
def test_documents_are_separate_in_chats_unless_one_says_otherwise(kind: Any, asked: Any, expected: bool) -> None:
    assert DataConfig(kind=kind, separate_documents=asked).separates is expected
