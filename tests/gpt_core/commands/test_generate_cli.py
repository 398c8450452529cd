"""`generate` as both twins have it, with a model that writes what it is told to."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gpt_core.commands.conversation import Chunks, Writer
from gpt_core.commands.generate import Request, generate_command, generate_parser
from gpt_core.config import ModelConfig
from gpt_core.data.stdlib import prose
from gpt_core.errors import InputError
from gpt_core.formats import safetensors_torch
from gpt_core.parameters import parameter_table
from gpt_core.text.generation import SamplingConfig, Written
from gpt_core.text.gpt2 import gpt2_tokenizer

Asked = list[tuple[list[list[int]], SamplingConfig]]


def written(folder: Path, vocab_size: int) -> Path:
    """A checkpoint of zeros, without a tokenizer."""
    model = ModelConfig(vocab_size=vocab_size, context_length=64, n_layers=1, n_heads=2, embed_dim=8, position="rope")
    dtypes = dict.fromkeys(parameter_table(model), np.dtype(np.float32))
    safetensors_torch.write(folder, model, lambda p: np.zeros(p.shape, np.float32), dtypes, None)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    gpt2_tokenizer().save(written(tmp_path, 50304))
    return tmp_path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer puts a token in front, and whose texts may end in two ways."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<end>"], show_progress=False)
    made.train_from_iterator([prose()[:20_000]], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(written(tmp_path, 320) / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return tmp_path


def run(checkpoint: Path, *words: str, rows: list[list[int]]) -> Asked:
    asked: Asked = []

    def load(request: Request) -> Writer:
        def write(prompts: list[list[int]], sampling: SamplingConfig) -> Chunks:
            asked.append((prompts, sampling))
            for column in zip(*rows, strict=True):
                yield Written.plain([[token] for token in column])

        return write

    assert generate_command(generate_parser("x").parse_args([str(checkpoint), *words]), load) == 0
    return asked


def test_only_tokens_that_the_tokenizer_knows_are_asked_for(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--json"]):
        [(prompts, sampling)] = run(checkpoint, "Hello", *more, rows=[[995, 50300]])
        assert prompts == [[15496]]
        assert (sampling.known_tokens, sampling.stop_tokens) == (50257, (50256,))
    shown = capsys.readouterr().out
    line, _, rest = shown.partition("\n")
    assert line == "Hello world\ufffd"
    assert json.loads(rest)[0]["text"] == " world\ufffd"


@pytest.mark.parametrize(("stop", "ends"), [([], (1, 2)), (["--stop", "<end>"], (2,))])
def test_prompts_stops_and_texts_are_those_of_the_checkpoints_own_tokenizer(
    stop: list[str], ends: tuple[int, ...], other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    prompt, new = own.encode("the name").ids, own.encode("of a class", add_special_tokens=False).ids
    assert prompt[0] == 0
    [(prompts, sampling)] = run(other, "the name", *stop, rows=[new])
    assert prompts == [prompt]
    assert (sampling.known_tokens, sampling.stop_tokens) == (300, ends)
    assert capsys.readouterr().out == "the name of a class\n"
    run(other, "the name", "and", *stop, rows=[new, new])
    assert capsys.readouterr().out == "the name of a class\n\nand of a class\n"
    run(other, "the name", "--json", *stop, rows=[new])
    assert json.loads(capsys.readouterr().out)[0] == {"prompt": "the name", "text": " of a class", "tokens": new}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no tokenizer beside its weights, .*takes token ids"),
        (
            {"add_prefix_space": True},
            r"is not GPT-2's \(tokenizer_config.json differs in add_prefix_space\), .*token ids",
        ),
    ],
)
def test_without_a_tokenizer_that_can_be_read_text_is_refused(
    checkpoint: Path, config: dict[str, bool] | None, message: str
) -> None:
    if config is None:
        (checkpoint / "vocab.json").unlink()
        (checkpoint / "merges.txt").unlink()
    else:
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{checkpoint}: .*{message}"):
        run(checkpoint, "Hello", rows=[])


@pytest.mark.parametrize("more", [[], ["--chat"]])
def test_no_tokens_are_refused_as_too_few(more: list[str], chatty: Path) -> None:
    with pytest.raises(InputError, match="max_new_tokens = 0 must be a whole number of at least 1"):
        run(chatty, "the", "--max-new-tokens", "0", *more, rows=[])


@pytest.mark.parametrize("ends", ["text", [1, "2"], {"a": 1}, -1])
def test_an_end_that_is_no_token_is_refused(ends: object, other: Path) -> None:
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id = .* must be a token id"):
        run(other, "the", rows=[])


CHATML = (
    "{% for message in messages %}{{ '<s>' + message.role + ':' + message.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


@pytest.fixture
def chatty(other: Path) -> Path:
    (other / "chat_template.jinja").write_text(CHATML)
    return other


def test_a_question_is_asked_through_the_template_and_the_answer_stands_alone(
    chatty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tokenizers.Tokenizer.from_file(str(chatty / "tokenizer.json"))
    answer = own.encode("of a class", add_special_tokens=False).ids
    asked = "<s>system:be<end><s>user:the name<end><s>assistant:"
    [(prompts, sampling)] = run(chatty, "the name", "--chat", "--system", "be", rows=[[*answer, 2]])
    assert prompts == [own.encode(asked, add_special_tokens=False).ids]
    assert (sampling.stop_tokens, sampling.max_new_tokens) == ((1, 2), 512)
    assert capsys.readouterr().out == "of a class\n"
    run(chatty, "the name", "--chat", "--json", rows=[[*answer, 2]])
    assert json.loads(capsys.readouterr().out) == [{"prompt": "the name", "text": "of a class", "tokens": answer}]


def test_a_conversation_remembers_and_begins_anew_when_it_outgrows_the_context(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tokenizers.Tokenizer.from_file(str(chatty / "tokenizer.json"))
    answer = own.encode("of a class", add_special_tokens=False).ids
    said = iter(["the name", "", "and", "no more room"])

    def typed(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    asked: list[str] = []

    def load(request: Request) -> Writer:
        def write(prompts: list[list[int]], sampling: SamplingConfig) -> Chunks:
            text = own.decode(prompts[0], skip_special_tokens=False)
            asked.append(text)
            if "room" in text and "the name" in text:
                raise InputError("the prompt is too long")
            return iter([Written.plain([[*answer, 1]])])

        return write

    assert generate_command(generate_parser("x").parse_args([str(chatty), "--chat"]), load) == 0
    wanted = [
        "<s>user:the name<end><s>assistant:",
        "<s>user:the name<end><s>assistant:of a class<end><s>user:and<end><s>assistant:",
    ]
    assert [text.replace(" ", "") for text in asked[:2]] == [text.replace(" ", "") for text in wanted]
    assert "name" in asked[2]
    assert "name" not in asked[3]
    shown = capsys.readouterr().out
    assert shown.count("of a class\n") == 3
    assert "the prompt is too long; the conversation begins anew" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no prompt"),
        (["--chat"], "there is no prompt; give one, or none with --chat on a terminal"),
        (["hi", "--system", "be"], "--system goes with --chat"),
    ],
)
def test_a_conversation_needs_a_terminal_and_a_template(words: list[str], message: str, chatty: Path) -> None:
    with pytest.raises(InputError, match=message):
        run(chatty, *words, rows=[])
    (chatty / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        run(chatty, "hi", "--chat", rows=[])
