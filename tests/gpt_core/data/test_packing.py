import numpy as np
import pytest

from gpt_core.data.batches import next_token_batch, separated
from gpt_core.data.packing import Document, batch_of_rows, first_fit, packed_row


def by_looking_at_each_row(lengths: list[int], room: int) -> list[list[int]]:
    """First fit as it is defined."""
    rows: list[list[int]] = []
    for number, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= room:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


def draw_lengths(count: int, room: int, shape: str) -> list[int]:
    generator = np.random.default_rng(count)
    if shape == "short":
        return generator.integers(1, max(2, room // 8), count).tolist()
    if shape == "long":
        return generator.integers(room // 2, room + 1, count).tolist()
    return generator.integers(1, room + 1, count).tolist()


@pytest.mark.parametrize("shape", ["any", "short", "long"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 100, 257])
@pytest.mark.parametrize("room", [16, 1024])
def test_each_document_goes_into_the_first_row_that_has_room(count: int, room: int, shape: str) -> None:
    lengths = draw_lengths(count, room, shape)
    assert first_fit(lengths, room) == by_looking_at_each_row(lengths, room)


def test_little_is_left_empty() -> None:
    lengths = draw_lengths(1024, 2048, "short") + draw_lengths(200, 2048, "any")
    rows = first_fit(lengths, 2048)
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert max(filled) <= 2048
    assert sum(2 * length <= 2048 for length in filled) <= 1
    assert sum(filled) > 0.9 * 2048 * len(rows)


def document(tokens: list[int], learned: str) -> Document:
    return Document(np.array(tokens), np.array([sign == "x" for sign in learned]))


def test_a_row_is_documents_and_padding_and_no_target_crosses() -> None:
    row = packed_row([document([1, 2, 3], ".xx"), document([4, 5], "xx"), document([6], "x")], 8)
    assert row["tokens"].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert row["segments"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert row["mask"].tolist() == [True, True, False, True, False, False, False, False]
    assert row["targets"][row["mask"]].tolist() == [2, 3, 5]


@pytest.mark.parametrize("length", [4, 5, 6])
def test_a_document_as_long_as_a_row_has_all_its_targets(length: int) -> None:
    row = packed_row([document(list(range(1, length + 1)), "x" * length)], 4)
    assert row["tokens"].tolist() == [1, 2, 3, 4]
    assert row["targets"][row["mask"]].tolist() == [2, 3, 4, 5][: length - 1]
    assert not row["segments"].any()


def test_rows_that_are_not_separate_have_no_segments_and_the_same_targets() -> None:
    rows = [packed_row([document([1, 2], ".x"), document([3, 4], ".x")], 5), packed_row([], 5)]
    separate, joined = batch_of_rows(rows, separate=True), batch_of_rows(rows, separate=False)
    assert joined.keys() == {"tokens", "targets", "mask"}
    assert separate["segments"].dtype == np.int32
    assert not separate["mask"][1].any()
    for name in joined:
        np.testing.assert_array_equal(joined[name], separate[name])


def test_an_end_of_text_ends_a_segment_and_has_no_target() -> None:
    batch = next_token_batch(np.array([[9, 1, 2, 9, 9, 3, 4], [1, 2, 3, 4, 5, 9, 1]]))
    found = separated(batch, 9)
    assert found["segments"].tolist() == [[0, 1, 1, 1, 2, 3], [0, 0, 0, 0, 0, 0]]
    assert found["mask"].tolist() == [[False, True, True, False, False, True], [True] * 5 + [False]]
    np.testing.assert_array_equal(found["tokens"], batch["tokens"])
    assert separated(batch, None) is batch
