import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from chat_templates import CHATML, GEMMA, LLAMA3, write_tokenizer
from pyarrow import parquet

from gpt_core.data.batches import Batch, BatchSource, PreparedBatches
from gpt_core.data.chats import ChatBatches
from gpt_core.data.config import DataConfig
from gpt_core.data.loader import BatchIterator, batch_source, training_batches, validation_batches
from gpt_core.data.order import host_rows
from gpt_core.data.streaming import StreamedBatches, merge_states
from gpt_core.errors import InputError
from gpt_core.text.finding import open_tokenizer
from gpt_core.text.tokenizer import Tokenizer

CONTEXT, ROWS = 200, 4
SYSTEM = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(number: int) -> list[dict[str, str]]:
    """Conversations of different lengths."""
    turns = [(turn("user", f"Question {number}?"), turn("assistant", f"Answer {number}" + "!" * (number % 7)))]
    return [message for pair in turns * (1 + number % 3) for message in pair]


def written(messages: list[dict[str, str]]) -> str:
    """What ChatML makes of a conversation."""
    said = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return SYSTEM * (messages[0]["role"] != "system") + said


def learned(messages: list[dict[str, str]]) -> str:
    """What is learned of it."""
    return "".join(f"{message['content']}<|im_end|>" for message in messages if message["role"] == "assistant")


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 90 conversations."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    return write_records(path, [{"messages": conversation(number)} for number in range(90)])


def chats(path: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"source": str(path), "kind": "chat", "streams": 2, "shuffle_window": 8} | fields)


def everything(path: Path, **fields: Any) -> DataConfig:
    return chats(path, **{"streams": 1, "validation_fraction": 0} | fields)


def take(source: BatchSource, count: int, state: dict[str, Any] | None = None) -> list[tuple[Batch, dict[str, Any]]]:
    return list(islice(source.iterate(state or source.initial_state()), count))


def documents(batches: list[Batch], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Each document of some rows: its text, and its text that is a target."""
    found = []
    for batch in batches:
        for tokens, targets, mask, segments in zip(*(batch[name] for name in NAMES), strict=True):
            for segment in range(segments.max() + 1):
                mine = segments == segment
                if not tokens[mine].any():  # padding; the token 0 begins a text, which this template does not
                    assert not mask[mine].any()
                    continue
                text = tokenizer.decode(tokens[mine].tolist())
                found.append((text, tokenizer.decode(targets[mine & mask].tolist())))
    return found


NAMES = ("tokens", "targets", "mask", "segments")


def flat(batch: Batch) -> list[Any]:
    return [batch[name].tolist() for name in NAMES]


def test_an_epoch_has_each_conversation_once_and_learns_what_the_assistant_says(
    source: Path, tokenizer: Tokenizer
) -> None:
    batches = ChatBatches(everything(source), "train", 1, CONTEXT, tokenizer=tokenizer)
    found = documents([batch for batch, _ in take(batches, 200)], tokenizer)
    expected = sorted((written(messages), learned(messages)) for messages in map(conversation, range(90)))
    assert sorted(found[:90]) == sorted(found[90:180]) == expected
    assert found[:90] != found[90:180]


def test_four_hosts_read_what_one_reads(source: Path, tokenizer: Tokenizer) -> None:
    def of(rows: Any) -> list[Batch]:
        made = take(ChatBatches(chats(source), "train", ROWS, CONTEXT, rows, tokenizer), 30)
        return [batch for batch, _ in made]

    alone = [flat(batch) for batch in of(None)]
    for hosts in (2, 4):
        parts = [of(host_rows(ROWS, host, hosts)) for host in range(hosts)]
        joined = [
            {name: np.concatenate([part[name] for part in step]) for name in NAMES} for step in zip(*parts, strict=True)
        ]
        assert [flat(batch) for batch in joined] == alone


def test_resuming_after_any_step_goes_on_with_the_same_batches(source: Path, tokenizer: Tokenizer) -> None:
    def make() -> ChatBatches:
        return ChatBatches(chats(source, shuffle_window=12), "train", ROWS, CONTEXT, tokenizer=tokenizer)

    whole = take(make(), 40)
    for stop in range(1, 37):
        state = json.loads(json.dumps(whole[stop - 1][1]))
        assert [flat(batch) for batch, _ in take(make(), 4, state)] == [
            flat(batch) for batch, _ in whole[stop : stop + 4]
        ]


def test_hosts_go_on_from_the_merged_states_of_others(source: Path, tokenizer: Tokenizer) -> None:
    def make(rows: Any = None) -> ChatBatches:
        return ChatBatches(chats(source), "train", ROWS, CONTEXT, rows, tokenizer)

    whole = take(make(), 20)
    states = [take(make(host_rows(ROWS, host, 4)), 10)[-1][1] for host in range(4)]
    after = take(make(), 10, json.loads(json.dumps(merge_states(states))))
    assert [flat(batch) for batch, _ in after] == [flat(batch) for batch, _ in whole[10:]]


def test_prefetching_changes_nothing(source: Path, tokenizer: Tokenizer) -> None:
    whole = take(ChatBatches(chats(source), "train", ROWS, CONTEXT, tokenizer=tokenizer), 6)
    with training_batches(chats(source), ROWS, CONTEXT, tokenizer=tokenizer) as batches:
        assert [flat(next(batches)) for _ in range(6)] == [flat(batch) for batch, _ in whole]
        assert batches.notices() == []


def test_a_state_of_other_settings_is_refused(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = take(ChatBatches(chats(source), "train", ROWS, CONTEXT, tokenizer=tokenizer), 2)[-1][1]

    def go_on(config: DataConfig, known: Tokenizer = tokenizer) -> None:
        take(ChatBatches(config, "train", ROWS, CONTEXT, tokenizer=known), 1, state)

    with pytest.raises(InputError, match="does not fit: too_long 'truncate' against 'drop'"):
        go_on(chats(source, too_long="drop"))
    with pytest.raises(InputError, match="does not fit: separate_documents True against False"):
        go_on(chats(source, separate_documents=False))
    with pytest.raises(InputError, match="does not fit: chat_template"):
        go_on(chats(source), open_tokenizer(str(write_tokenizer(tmp_path, GEMMA))))
    with pytest.raises(InputError, match="is of streamed batches, these are chat"):
        take(ChatBatches(chats(source), "train", ROWS, CONTEXT, tokenizer=tokenizer), 1, state | {"kind": "streamed"})
    damaged = state | {"places": {"0": {"row": "x"}, "1": {}}}
    with pytest.raises(InputError, match="row = 'x' must be a whole number"):
        take(ChatBatches(chats(source), "train", ROWS, CONTEXT, tokenizer=tokenizer), 1, damaged)


def test_conversations_that_are_not_separate_are_packed_the_same_way(source: Path, tokenizer: Tokenizer) -> None:
    separate = take(ChatBatches(chats(source), "train", ROWS, CONTEXT, tokenizer=tokenizer), 5)
    config = chats(source, separate_documents=False)
    joined = take(ChatBatches(config, "train", ROWS, CONTEXT, tokenizer=tokenizer), 5)
    for (one, _), (other, _) in zip(separate, joined, strict=True):
        assert other.keys() == {"tokens", "targets", "mask"}
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_validation_has_every_conversation_once_in_order(source: Path, tokenizer: Tokenizer, hosts: int) -> None:
    config = chats(source, validation_fraction=0.999, shuffle_window=1)
    parts = [
        list(validation_batches(config, ROWS, CONTEXT, host_rows(ROWS, host, hosts), tokenizer=tokenizer))
        for host in range(hosts)
    ]
    batches = [
        {name: np.concatenate([part[name] for part in step]) for name in NAMES} for step in zip(*parts, strict=True)
    ]
    expected = [(written(messages), learned(messages)) for messages in map(conversation, range(90))]
    assert documents(batches, tokenizer) == expected
    assert all(batch["tokens"].shape == (ROWS, CONTEXT) for batch in batches)
    assert len(list(validation_batches(config, ROWS, CONTEXT, limit=2, tokenizer=tokenizer))) == 2


def one(record: dict[str, Any], tokenizer: Tokenizer, path: Path, **fields: Any) -> tuple[str, str]:
    """The document of one record."""
    source = write_records(path / "one.jsonl", [record])
    made = ChatBatches(everything(source, **fields), "train", 1, CONTEXT, tokenizer=tokenizer)
    return documents([take(made, 1)[0][0]], tokenizer)[0]


def test_of_a_prompt_and_its_completion_the_completion_is_learned(tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = [turn("user", "One?"), turn("assistant", "1"), turn("user", "Two?")]
    record = {"prompt": before, "completion": [turn("assistant", "2")]}
    assert one(record, tokenizer, tmp_path) == (written([*before, turn("assistant", "2")]), "2<|im_end|>")
    text = {"prompt": "One and <|im_end|> ", "completion": "two"}
    assert one(text, tokenizer, tmp_path) == ("One and <|im_end|> two</s>", "two</s>")
    assert tokenizer.encode_marked("<|im_end|>")[0] not in tokens_of(text, tokenizer, tmp_path)  # plain text


def tokens_of(record: dict[str, Any], tokenizer: Tokenizer | None, path: Path) -> list[int]:
    source = write_records(path / "one.jsonl", [record])
    batch = take(ChatBatches(everything(source), "train", 1, CONTEXT, tokenizer=tokenizer), 1)[0][0]
    row: list[int] = batch["tokens"][0][batch["segments"][0] == 0].tolist()
    return row


def test_a_begin_token_stands_in_front_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    folder = write_tokenizer(tmp_path, None)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    record = {"prompt": "One", "completion": " two"}
    found = tokens_of(record, open_tokenizer(str(folder)), tmp_path)
    plain = [backend.encode(text, add_special_tokens=False).ids for text in ("One", " two")]
    assert found == [0, *plain[0], *plain[1], 1]


def test_texts_need_no_chat_template(tmp_path: Path) -> None:
    from gpt_core.text.gpt2 import gpt2_tokenizer

    encode, end = gpt2_tokenizer().encode, gpt2_tokenizer().end_of_text
    record = {"prompt": "The capital of France", "completion": " is Paris."}
    assert tokens_of(record, None, tmp_path) == [*encode("The capital of France"), *encode(" is Paris."), end]


def test_a_template_is_told_of_the_tools(tmp_path: Path) -> None:
    known = open_tokenizer(str(write_tokenizer(tmp_path / "llama", LLAMA3)))
    tools = [{"name": "look_up"}]
    text, said = one({"messages": conversation(0)[:2], "tools": tools}, known, tmp_path)
    assert json.dumps(tools[0], indent=4) in text
    assert said == "Answer 0<|eot_id|>"


def test_today_is_a_fixed_day(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }} " + CHATML
    known = open_tokenizer(str(write_tokenizer(tmp_path / "dated", template)))
    assert one({"messages": conversation(0)}, known, tmp_path)[0].startswith("2025-01-01 <|im_start|>")


def test_parquet_is_read_as_json_lines_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"messages": conversation(number)} for number in range(20)]
    records[3] = {"messages": None}
    records[5]["messages"][1]["name"] = "somebody"  # a column of which the others have nothing
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=7)
    config = chats(tmp_path / "a.parquet", validation_fraction=0.999, shuffle_window=1, on_error="skip")
    expected = [
        (written(messages), learned(messages))
        for number in range(20)
        if number != 3
        for messages in [conversation(number)]
    ]
    assert documents(list(validation_batches(config, ROWS, CONTEXT, tokenizer=tokenizer)), tokenizer) == expected
    with pytest.raises(InputError, match=r"a.parquet: row 4: no field 'messages', nor 'prompt' and 'completion'; the"):
        list(validation_batches(chats(config.source, validation_fraction=0.9), ROWS, CONTEXT, tokenizer=tokenizer))


def test_a_hugging_face_dataset_is_read_as_json_lines_are(
    source: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    loaded = [{"id": number, "messages": conversation(number)} for number in range(90)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: iter(loaded))
    fields = {"validation_fraction": 0.999, "shuffle_window": 1}
    found = validation_batches(
        DataConfig(source="hf:some/chats", kind="chat", **fields), ROWS, CONTEXT, tokenizer=tokenizer
    )
    expected = validation_batches(chats(source, **fields), ROWS, CONTEXT, tokenizer=tokenizer)
    assert [flat(batch) for batch in found] == [flat(batch) for batch in expected]


LONG = [turn("user", "Q?"), turn("assistant", "Yes. " * 30), turn("user", "And?"), turn("assistant", "No. " * 300)]


def test_a_long_conversation_is_cut_at_its_end_or_left_out_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    late = [turn("user", "Why? " * 400), turn("assistant", "So.")]
    source = write_records(tmp_path / "a.jsonl", [{"messages": m} for m in (LONG, late, conversation(0))])
    batches = BatchIterator(ChatBatches(everything(source), "train", 1, 300, tokenizer=tokenizer), prefetch=1)
    with batches:
        found = [next(batches) for _ in range(4)]
        said = batches.notices()
        assert batches.notices() == []  # said once
    full = next(batch for batch in found if not batch["segments"].any())
    tokens = tokenizer.encode_marked(written(LONG))
    assert full["tokens"][0].tolist() == tokens[:300]
    assert full["targets"][0].tolist() == tokens[1:301]
    assert len(said) == 2
    assert "conversations read so far were left out: longer than the context of 300 tokens before the" in said[0]
    assert "conversations read so far were cut at their end: longer than the context of 300 tokens" in said[1]

    dropping = ChatBatches(everything(source, too_long="drop"), "train", 1, 300, tokenizer=tokenizer)
    (batch, _), *_ = take(dropping, 1)
    assert documents([batch], tokenizer) == [(written(conversation(0)), learned(conversation(0)))]
    assert list(dropping.notices().values()) == [
        "2 of 3 conversations read so far were left out: longer than the context of 300 tokens"
    ]


def test_a_conversation_that_just_fits_is_not_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = tokenizer.encode_marked(written(conversation(1)))
    source = write_records(tmp_path / "a.jsonl", [{"messages": conversation(1)}])
    for context, cut in ((len(tokens), 0), (len(tokens) - 1, 0), (len(tokens) - 2, 1)):
        made = ChatBatches(everything(source), "train", 1, context, tokenizer=tokenizer)
        (batch, _), *_ = take(made, 1)
        assert batch["tokens"][0].tolist() == tokens[:context]
        assert len(made.notices()) == cut


def test_conversations_without_an_answer_are_left_out_and_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"messages": [turn("user", "Hello?")]}, {"messages": conversation(0)}]
    made = ChatBatches(
        everything(write_records(tmp_path / "a.jsonl", records)), "train", 1, CONTEXT, tokenizer=tokenizer
    )
    (batch, _), *_ = take(made, 1)
    assert len(documents([batch], tokenizer)) == 1
    assert list(made.notices().values()) == [
        "1 of 2 conversations read so far were left out: the assistant says nothing in them"
    ]
    alone = everything(write_records(tmp_path / "b.jsonl", records[:1]))
    with pytest.raises(InputError, match=r"has no train document; .*1 of 1 conversations read so far were left out"):
        take(ChatBatches(alone, "train", 1, CONTEXT, tokenizer=tokenizer), 1)


def test_evaluating_what_was_all_left_out_says_why(tokenizer: Tokenizer, tmp_path: Path) -> None:
    silent = [{"messages": [turn("user", f"Hello {number}?")]} for number in range(9)]
    long = [{"messages": conversation(number)} for number in range(9)]
    for records, told in (
        (silent, "the assistant says nothing in them"),
        (long, "longer than the context of 8 tokens"),
    ):
        config = chats(write_records(tmp_path / "a.jsonl", records), validation_fraction=0.9)
        with pytest.raises(InputError, match=f"validation split has nothing to learn: .* were left out: {told}"):
            next(validation_batches(config, 2, 8, tokenizer=tokenizer))
    never = chats(tmp_path / "a.jsonl", validation_fraction=1e-9)
    with pytest.raises(InputError, match="no document fell into the validation split"):
        next(validation_batches(never, 2, CONTEXT, tokenizer=tokenizer))


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no fields": ({"text": "x"}, "no field 'messages', nor 'prompt' and 'completion'; it has: text"),
    "half a pair": ({"prompt": "x"}, "no field 'messages', nor 'prompt' and 'completion'; it has: prompt"),
    "no list": ({"messages": "hi"}, "messages must be a list of at least one message"),
    "none": ({"messages": []}, "messages must be a list of at least one message"),
    "no message": ({"messages": ["hi"]}, "messages: message 1 is no object with role and content, but str"),
    "no role": ({"messages": [{"content": "x"}]}, "messages: message 1 has no role"),
    "role": ({"messages": [{"role": 3, "content": "x"}]}, "messages: message 1 has a role that is no text: 3"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages: message 1 \('user'\) has no content"),
    "number": ({"messages": [{"role": "user", "content": 3}]}, "has content that is neither text nor a list .* int"),
    "empty": ({"messages": [turn("user", "x"), turn("assistant", " \n")]}, "message 2 is an empty turn of the assist"),
    "mixed": ({"prompt": "x", "completion": [turn("assistant", "y")]}, "must both be texts, or both lists of"),
    "empty completion": ({"prompt": "x", "completion": " "}, "the completion is empty"),
    "empty list": ({"prompt": [turn("user", "x")], "completion": []}, "completion must be a list of at least one"),
    "tools": ({"messages": conversation(0), "tools": "x"}, "tools must be a list of descriptions"),
    "template": ({"messages": [turn("system", "x"), *conversation(0)]}, "refuses the conversation: System role not"),
    "half a character": ({"messages": [turn("user", "\ud800")]}, "the fields of a chat is no valid Unicode"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_stops_with_its_line_or_is_skipped_and_said(case: str, tmp_path: Path) -> None:
    record, message = BROKEN[case]
    known = open_tokenizer(str(write_tokenizer(tmp_path / "gemma", GEMMA)))
    source = write_records(tmp_path / "a.jsonl", [{"messages": conversation(0)}, record])
    with pytest.raises(InputError, match=rf"a.jsonl:2: .*{message}.*; mend it, or pass --on-error skip"):
        take(ChatBatches(everything(source), "train", 1, CONTEXT, tokenizer=known), 1)
    skipping = ChatBatches(everything(source, on_error="skip"), "train", 1, CONTEXT, tokenizer=known)
    take(skipping, 1)
    (said,) = skipping.notices().values()
    assert said.startswith("1 broken records skipped so far; the first: ")
    assert "a.jsonl:2: " in said


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_conversations_without_a_chat_template_are_refused(on_error: str, source: Path) -> None:
    made = ChatBatches(everything(source, on_error=on_error), "train", 1, CONTEXT)
    with pytest.raises(InputError, match=r"^gpt2: this tokenizer has no chat template"):
        take(made, 1)


def test_a_template_that_is_none_is_refused_before_anything_is_read(source: Path, tmp_path: Path) -> None:
    known = open_tokenizer(str(write_tokenizer(tmp_path, "{% if %}")))
    with pytest.raises(InputError, match=r"the chat template of .*: no Jinja template: line 1"):
        batch_source(chats(source), "train", ROWS, CONTEXT, tokenizer=known)


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_files_without_fields_are_refused(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_text("messages\nhi\n")
    with pytest.raises(InputError, match=rf"{name}: has no fields: chats .data.kind: chat. are read out of JSON Lines"):
        take(ChatBatches(everything(tmp_path / name), "train", 1, CONTEXT, tokenizer=tokenizer), 1)


@pytest.mark.parametrize("mode", ["prepared", "streamed"])
def test_texts_are_separated_where_they_end(mode: str, prepared: Path, corpus: Path) -> None:
    where = {"prepared": str(prepared)} if mode == "prepared" else {}
    plain = DataConfig(source=str(corpus), streams=2, validation_fraction=0.1, **where)
    separate = DataConfig(source=str(corpus), streams=2, validation_fraction=0.1, separate_documents=True, **where)

    def train(config: DataConfig) -> list[Batch]:
        return [batch for batch, _ in take(batch_source(config, "train", ROWS, 64), 12)]

    readers: list[Callable[[DataConfig], list[Batch]]] = [
        train,
        lambda config: list(validation_batches(config, ROWS, 64)),
        lambda config: list(validation_batches(config, ROWS, 64, limit=3)),
    ]
    for read in readers:
        boundaries = 0
        for before, after in zip(read(plain), read(separate), strict=True):
            assert "segments" not in before
            np.testing.assert_array_equal(before["tokens"], after["tokens"])
            np.testing.assert_array_equal(before["targets"], after["targets"])
            for row in range(ROWS):
                segment = 0
                for place, token in enumerate(before["tokens"][row]):
                    assert after["segments"][row, place] == segment
                    assert after["mask"][row, place] == (before["mask"][row, place] and token != 50256)
                    segment += token == 50256
                boundaries += segment
        assert boundaries > 5


def test_whether_documents_are_separate_belongs_to_the_saved_state(prepared: Path, corpus: Path) -> None:
    plain = PreparedBatches(prepared, "train", ROWS, 16, 0)
    separate = PreparedBatches(prepared, "train", ROWS, 16, 0, separate=True)
    with pytest.raises(InputError, match="does not fit: separate_documents None against True"):
        take(separate, 1, plain.initial_state())
    with pytest.raises(InputError, match="does not fit: separate_documents True against None"):
        take(plain, 1, separate.initial_state())
    names = {"source", "files", "text_field", "on_error", "split", "validation_fraction", "seed", "streams"}
    streamed = StreamedBatches(DataConfig(source=str(corpus), streams=2), "train", ROWS, 16)
    identity = streamed.initial_state()["identity"]
    assert identity.keys() == names | {"shuffle_window", "batch_size", "context_length"}  # as before there were chats
