import hashlib
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_core.data.batches import Batch, BatchSource, PreparedBatches, evaluation_batches, spread_batches
from gpt_core.data.config import DataConfig
from gpt_core.data.loader import BatchIterator, training_batches, validation_batches
from gpt_core.data.order import host_rows
from gpt_core.data.prepared import PreparedTokens
from gpt_core.data.streaming import StreamedBatches, merge_states
from gpt_core.errors import InputError

from .conftest import texts, write_json_lines

CONTEXT, ROWS, STEPS = 24, 8, 60

Make = Callable[..., BatchSource]


def file_hash(batch: Batch) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in ("tokens", "targets", "mask"))).hexdigest()


def union(parts: list[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(params=["prepared", "streamed: 8 streams", "streamed: 3 streams", "streamed: many files"])
def make(request: pytest.FixtureRequest, prepared: Path, corpus: Path, tmp_path: Path) -> Make:
    """Makes batches of the rows it is given."""
    if request.param == "prepared":
        return lambda rows=None, seed=0: PreparedBatches(prepared, "train", ROWS, CONTEXT, seed, rows)
    source, streams = corpus, 3 if "3" in request.param else 8
    if "many" in request.param:
        source, streams = tmp_path / "many", 2
        source.mkdir()
        for number, text in enumerate(texts(64)):
            (source / f"{number}.txt").write_text(text)

    def streamed(rows: Any = None, seed: int = 0) -> BatchSource:
        config = DataConfig(source=str(source), streams=streams, shuffle_window=5, seed=seed)
        return StreamedBatches(config, "train", ROWS, CONTEXT, rows)

    return streamed


def take(source: BatchSource, count: int, state: dict[str, Any] | None = None) -> tuple[list[Batch], dict[str, Any]]:
    made = list(islice(source.iterate(state or source.initial_state()), count))
    return [batch for batch, _ in made], made[-1][1]


def test_four_hosts_read_what_one_reads(make: Make) -> None:
    alone, _ = take(make(), STEPS)
    hosts = [take(make(host_rows(ROWS, host, 4)), STEPS)[0] for host in range(4)]
    assert [file_hash(union(list(parts))) for parts in zip(*hosts, strict=True)] == [file_hash(b) for b in alone]


def test_the_order_is_that_of_the_seed(make: Make) -> None:
    hashes = [file_hash(batch) for batch in take(make(), 20)[0]]
    assert hashes == [file_hash(batch) for batch in take(make(), 20)[0]]
    assert len(set(hashes)) == 20
    assert not set(hashes) & {file_hash(batch) for batch in take(make(seed=1), 20)[0]}


@pytest.mark.parametrize("stop", [1, 7, 41])
def test_resuming_goes_on_with_the_same_batches(make: Make, stop: int) -> None:
    whole = [file_hash(batch) for batch in take(make(), STEPS)[0]]
    before, state = take(make(), stop)
    after, _ = take(make(), STEPS - stop, json.loads(json.dumps(state)))
    assert [file_hash(batch) for batch in before + after] == whole
    assert len(json.dumps(state)) < 2000


def test_four_hosts_go_on_from_the_states_of_two(make: Make) -> None:
    whole = [file_hash(batch) for batch in take(make(), 30)[0]]
    states = [take(make(host_rows(ROWS, host, 2)), 10)[1] for host in range(2)]
    state = json.loads(json.dumps(merge_states(states)))
    hosts = [take(make(host_rows(ROWS, host, 4)), 20, state)[0] for host in range(4)]
    assert [file_hash(union(list(parts))) for parts in zip(*hosts, strict=True)] == whole[10:]


def test_targets_are_the_next_tokens(make: Make) -> None:
    for batch in take(make(), 10)[0]:
        assert batch["tokens"].shape == batch["targets"].shape == batch["mask"].shape == (ROWS, CONTEXT)
        assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
        assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
        assert batch["mask"].all()


def test_prefetching_changes_nothing(make: Make) -> None:
    whole = [file_hash(batch) for batch in take(make(), 20)[0]]
    with BatchIterator(make(), prefetch=3) as batches:
        first = [file_hash(next(batches)) for _ in range(6)]
        state = json.loads(json.dumps(batches.state()))
        second = [file_hash(next(batches)) for _ in range(6)]
        batches.restore(state)
        assert second == [file_hash(next(batches)) for _ in range(6)]
    assert first + second == whole[:12]
    with pytest.raises(StopIteration):
        next(batches)


def test_a_state_of_other_settings_is_refused(make: Make) -> None:
    state = take(make(), 3)[1]
    with pytest.raises(InputError, match="does not fit: seed 0 against 1"):
        take(make(seed=1), 1, state)
    with pytest.raises(InputError, match="is of other batches"):
        take(make(), 1, state | {"kind": "other"})
    with BatchIterator(make(seed=1)) as batches:
        batches.restore(state)
        for _ in range(2):  # and it goes on failing
            with pytest.raises(InputError, match="seed 0 against 1"):
                next(batches)


@pytest.mark.parametrize(
    "damage",
    [{"step": "3"}, {"step": -1}, {"step": True}, {"identity": []}, {"places": []}, {"places": {"0": {"epoch": "x"}}}],
)
def test_a_damaged_state_is_refused(damage: dict[str, Any], make: Make) -> None:
    state = take(make(), 3)[1]
    if damage.keys() <= state.keys():
        with pytest.raises(InputError, match="state of the data"):
            take(make(), 1, state | damage)


def test_an_epoch_of_prepared_tokens_reads_each_window_once(prepared: Path) -> None:
    tokens = PreparedTokens(prepared, "train")
    windows = (len(tokens) - 1) // CONTEXT
    everything = tokens.read(0, windows * CONTEXT + 1).astype(np.int32)
    expected = sorted(everything[:-1].reshape(windows, CONTEXT).tolist())
    batches = PreparedBatches(prepared, "train", ROWS, CONTEXT, seed=5)
    rows = [row for step in range(-(-2 * windows // ROWS)) for row in batches.batch(step)["tokens"].tolist()]
    first, second = rows[:windows], rows[windows : 2 * windows]
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_any_batch_can_be_asked_for_alone(prepared: Path) -> None:
    batches = PreparedBatches(prepared, "train", ROWS, CONTEXT, seed=0)
    in_order = [file_hash(batch) for batch in take(batches, 30)[0]]
    assert [file_hash(batches.batch(step)) for step in (29, 3, 17)] == [in_order[step] for step in (29, 3, 17)]


def test_an_epoch_of_streams_reads_each_document_once(tmp_path: Path) -> None:
    documents = [f"{i:03d}" + " word" * (i % 5) for i in range(200)]
    source = write_json_lines(tmp_path / "a.jsonl", documents)
    config = DataConfig(source=str(source), streams=4, shuffle_window=16, validation_fraction=0)
    batches, _ = take(StreamedBatches(config, "train", 4, 8), 400)
    from gpt_core.text.gpt2 import gpt2_tokenizer

    for stream in range(4):
        tokens = np.concatenate([batch["tokens"][stream] for batch in batches]).tolist()
        read = gpt2_tokenizer().decode(tokens).split("<|endoftext|>")
        mine = documents[stream::4]
        assert sorted(read[: len(mine)]) == mine  # its share, once an epoch
        assert read[: len(mine)] != mine
        assert sorted(read[len(mine) : 2 * len(mine)]) == mine
        assert read[: len(mine)] != read[len(mine) : 2 * len(mine)]


@pytest.mark.parametrize("mode", ["prepared", "streamed"])
def test_validation_counts_every_token_once_on_any_number_of_hosts(mode: str, prepared: Path, corpus: Path) -> None:
    config = DataConfig(
        source=str(corpus), validation_fraction=0.1, prepared=str(prepared) if mode == "prepared" else None
    )
    tokens = PreparedTokens(prepared, "validation")
    alone = list(validation_batches(config, ROWS, CONTEXT))
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in alone])
    assert targets.tolist() == tokens.read(1, len(tokens)).tolist()
    assert all(batch["tokens"].shape == (ROWS, CONTEXT) for batch in alone)
    hosts = [validation_batches(config, ROWS, CONTEXT, host_rows(ROWS, host, 4)) for host in range(4)]
    assert [file_hash(union(list(parts))) for parts in zip(*hosts, strict=True)] == [file_hash(b) for b in alone]
    assert len(list(validation_batches(config, ROWS, CONTEXT, limit=2))) == 2


@pytest.mark.parametrize("length", [2, ROWS * CONTEXT, ROWS * CONTEXT + 1, ROWS * CONTEXT + 2, 500])
def test_the_end_of_an_evaluation_is_masked(length: int) -> None:
    chunks = np.array_split(np.arange(length), 3)
    batches = list(evaluation_batches(chunks, ROWS, CONTEXT))
    assert np.concatenate([batch["targets"][batch["mask"]] for batch in batches]).tolist() == list(range(1, length))
    assert np.concatenate([batch["tokens"][batch["mask"]] for batch in batches]).tolist() == list(range(length - 1))


@pytest.mark.parametrize("mode", ["prepared", "streamed"])
def test_a_corpus_shorter_than_one_context_is_refused(mode: str, prepared: Path, corpus: Path) -> None:
    config = DataConfig(
        source=str(corpus), validation_fraction=0.1, prepared=str(prepared) if mode == "prepared" else None
    )
    message = r"the train split has \d+ tokens, fewer than one context of 1000000"
    with pytest.raises(InputError, match=message), training_batches(config, ROWS, 1_000_000) as batches:
        next(batches)


def test_streams_without_text_are_refused(tmp_path: Path, corpus: Path) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", texts(3))
    config = DataConfig(source=str(source), streams=4, validation_fraction=0)
    with training_batches(config, ROWS, 4) as batches, pytest.raises(InputError, match="stream 3 of 4 has no train"):
        next(batches)
    with pytest.raises(InputError, match=r"streams = 8 is more than the 4 rows of a batch.*lower data.streams to 4"):
        training_batches(DataConfig(source=str(corpus)), 4, 4)
    with pytest.raises(InputError, match="validation_fraction = 0 leaves no validation text"):
        validation_batches(config, ROWS, 4)
    state = StreamedBatches(DataConfig(source=str(corpus)), "train", ROWS, 4, range(4)).initial_state()
    with pytest.raises(InputError, match="lacks stream 4; merge the states of all hosts"):
        take(StreamedBatches(DataConfig(source=str(corpus)), "train", ROWS, 4), 1, state)


def test_states_of_different_steps_are_not_merged(prepared: Path) -> None:
    source = PreparedBatches(prepared, "train", ROWS, CONTEXT, 0)
    with pytest.raises(InputError, match="of steps 1 and 2"):
        merge_states([take(source, 1)[1], take(source, 2)[1]])


def test_broken_records_are_skipped_and_counted_while_streaming(tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", texts(20))
    source.write_text("broken\n" + source.read_text())
    config = DataConfig(source=str(source), streams=1, on_error="skip")
    batches = StreamedBatches(config, "train", 1, CONTEXT)
    take(batches, 1)
    assert batches.skipped > 0
    with pytest.raises(InputError, match=r"a.jsonl:1: not a JSON record"):
        take(StreamedBatches(DataConfig(source=str(source), streams=1), "train", 1, CONTEXT), 1)


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_limited_evaluation_reads_windows_from_all_over_the_text(prepared: Path, hosts: int) -> None:
    tokens = PreparedTokens(prepared, "train")
    windows = (len(tokens) - 1) // CONTEXT
    limit = 2
    parts = [
        list(spread_batches(tokens, ROWS, CONTEXT, limit, list(host_rows(ROWS, host, hosts)))) for host in range(hosts)
    ]
    rows = np.concatenate([np.concatenate([part[step]["tokens"] for part in parts]) for step in range(limit)])
    text = tokens.read(0, len(tokens))
    expected = [text[(i * windows // (limit * ROWS)) * CONTEXT :][:CONTEXT] for i in range(limit * ROWS)]
    assert windows > 2 * limit * ROWS
    np.testing.assert_array_equal(rows, np.stack(expected))


def test_a_limit_beyond_the_text_reads_all_of_it(prepared: Path) -> None:
    tokens = PreparedTokens(prepared, "validation")
    counted = sum(int(batch["mask"].sum()) for batch in spread_batches(tokens, ROWS, CONTEXT, 10**6))
    assert counted == len(tokens) - 1
