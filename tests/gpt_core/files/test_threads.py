import threading

import pytest

from gpt_core.files.threads import for_each


def test_every_item_is_worked_on_once():
    seen, lock = [], threading.Lock()

    def work(item):
        with lock:
            seen.append(item)

    for_each(range(50), work)
    assert sorted(seen) == list(range(50))


def test_the_first_error_is_raised_and_what_had_not_begun_never_does():
    begun = []

    def work(item):
        begun.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        for_each(range(1000), work)
    assert len(begun) < 10
