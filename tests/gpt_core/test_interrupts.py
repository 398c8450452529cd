import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_core.interrupts import SIGNALS, Interrupted, interruptible, uninterrupted


@pytest.fixture(autouse=True)
def nothing_is_ignored() -> Iterator[None]:
    """Shells start background jobs with SIGINT ignored, `nohup` ignores SIGHUP."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_where_the_main_thread_stands(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(Interrupted) as caught, interruptible():
        signal.raise_signal(number)
    assert caught.value.number == number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with interruptible(), uninterrupted():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for_two(done: list[str]) -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        done.append("cleaned up")
    done.append("went on")


def test_signals_wait_until_what_must_not_be_interrupted_has_ended() -> None:
    done: list[str] = []
    with pytest.raises(Interrupted) as caught, interruptible():
        wait_for_two(done)
    assert done == ["cleaned up"]
    assert caught.value.number == signal.SIGTERM


def test_other_threads_are_left_alone() -> None:
    done = []

    def work() -> None:
        with interruptible(), uninterrupted():
            done.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["worked"]


def test_libraries_say_nothing_of_an_import_that_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / "cut.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    called: list[str] = []
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(Interrupted), interruptible(lambda: called.append("importing")):
            import cut  # noqa: F401  # type: ignore[import-not-found]  # made above
    finally:
        sys.path.remove(str(tmp_path))
    assert called == ["importing"]
    with pytest.raises(Interrupted), interruptible(lambda: called.append("elsewhere")):
        signal.raise_signal(signal.SIGINT)
    assert called == ["importing"]
