"""Conversations as training data, against the same rows written down here without the code that makes them.

Every byte is a token of its own and the template is ChatML, so that the rows of a few conversations can be laid out by
hand: which tokens stand where, what is learned, and where one conversation ends.
"""

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpt_core.data import chats, packing
from gpt_core.text.finding import open_tokenizer
from gpt_core.text.tokenizer_rules import TOKENIZER_CONFIG, TOKENIZER_FILE
from parity.checks import CheckResult
from parity.comparison.tolerances import tolerance

Arrays = dict[str, np.ndarray]

BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
CONTEXT = 80
CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "2+2?"), ("assistant", "4")),
    (("system", "be brief"), ("user", "hi"), ("assistant", "hi!"), ("user", "ok"), ("assistant", "é")),
    (("user", "a"), ("assistant", " b\n")),
)
ROWS = ((0, 2), (1,))
"""Which conversation lies in which row: the second has no room beside the first, the third has."""


def check_chat(variant: str, dtype: str) -> CheckResult:
    """Hold the rows that training would read against those of this file."""
    made, wanted = _made(), expected_rows()
    learned = wanted["mask"]
    differing = {name: float(np.mean(made[name] != wanted[name])) for name in ("tokens", "mask", "segments")} | {
        "targets": float(np.mean((made["targets"] != wanted["targets"])[learned]))
    }
    bound = tolerance("chat", dtype)
    reasons = [f"{name}: {share:.1%} of the entries differ" for name, share in differing.items() if not share <= bound]
    return CheckResult(
        variant,
        dtype,
        "chat",
        max(differing.values()),
        bound,
        passed=not reasons,
        reason="; ".join(reasons),
        measures={"differing": differing},
    )


def _made() -> Arrays:
    encoder = _encoder()
    records = ([{"role": role, "content": content} for role, content in turns] for turns in CONVERSATIONS)
    documents = [encoder.encode({"messages": messages}) for messages in records]
    rows = chats.packed(documents, CONTEXT)
    packed = [packing.packed_row([documents[number] for number in row], CONTEXT) for row in rows]
    return {name: np.asarray(array) for name, array in packing.batch_of_rows(packed, separate=True).items()}


def expected_rows() -> Arrays:
    """What training must read of these conversations: `[row, CONTEXT]` each."""
    shape = (len(ROWS), CONTEXT)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
    arrays["mask"] = np.zeros(shape, bool)
    for row, numbers in enumerate(ROWS):
        place = 0
        for segment, number in enumerate(numbers):
            ids, learned = _written_out(CONVERSATIONS[number])
            for index, token in enumerate(ids):
                arrays["tokens"][row, place] = token
                arrays["segments"][row, place] = segment
                if index + 1 < len(ids):
                    arrays["targets"][row, place] = ids[index + 1]
                    arrays["mask"][row, place] = learned[index + 1]
                place += 1
        arrays["segments"][row, place:] = len(numbers)
    return arrays


def _written_out(turns: tuple[tuple[str, str], ...]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the assistant wrote: its words and the token that ends them."""
    ids, learned = [], []
    for role, content in turns:
        head = [0, *(byte + 2 for byte in f"{role}\n".encode())]
        said = [*(byte + 2 for byte in content.encode()), 1]
        ids += [*head, *said, ord("\n") + 2]
        learned += [False] * len(head) + [role == "assistant"] * len(said) + [False]
    return ids, learned


@lru_cache(maxsize=1)
def _encoder() -> chats.ChatEncoder:
    """By a tokenizer of two special tokens and one for each byte, by its number."""
    made = Tokenizer(models.BPE({BEGIN: 0, END: 1} | {letter: byte + 2 for byte, letter in _letters().items()}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([BEGIN, END])
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as name:
        made.save(str(Path(name) / TOKENIZER_FILE))
        config = {"bos_token": BEGIN, "eos_token": END, "chat_template": TEMPLATE}
        (Path(name) / TOKENIZER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        return chats.ChatEncoder(open_tokenizer(name))


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in files (Radford et al., 2019): itself where it can be seen."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)}
    others = (byte for byte in range(256) if byte not in seen)
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + number) for number, byte in enumerate(others)}
