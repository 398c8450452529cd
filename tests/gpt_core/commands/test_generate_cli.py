"""`generate` as both twins have it, with a model that writes what it is told to."""

import json
from pathlib import Path

import pytest

from gpt_core.commands.generate import Chunks, Request, generate_command, generate_parser
from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.storage.checkpoint_config import write_checkpoint_config
from gpt_core.text.generation import Written
from gpt_core.text.gpt2 import gpt2_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint_config(tmp_path, ModelConfig(vocab_size=50304, n_layers=1, n_heads=2, embed_dim=8))
    gpt2_tokenizer().save(tmp_path)
    return tmp_path


def test_only_tokens_that_the_tokenizer_knows_are_asked_for(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Request] = []

    def start(request: Request) -> Chunks:
        asked.append(request)
        yield Written.plain([[995, 50300]])

    for more in ([], ["--json"]):
        assert generate_command(generate_parser("x").parse_args([str(checkpoint), "Hello", *more]), start) == 0
    assert {request.options.known_tokens for request in asked} == {50257}
    shown = capsys.readouterr().out
    line, _, rest = shown.partition("\n")
    assert line == "Hello world\ufffd"
    assert json.loads(rest)[0]["text"] == " world\ufffd"


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
def test_without_gpt2s_tokenizer_text_is_refused(
    checkpoint: Path, config: dict[str, bool] | None, message: str
) -> None:
    if config is None:
        (checkpoint / "vocab.json").unlink()
        (checkpoint / "merges.txt").unlink()
    else:
        (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{checkpoint}: .*{message}"):
        generate_command(generate_parser("x").parse_args([str(checkpoint), "Hello"]), lambda request: iter(()))
