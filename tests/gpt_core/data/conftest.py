import json
from pathlib import Path

import pytest

from gpt_core.data.config import DataConfig
from gpt_core.data.prepare import prepare
from gpt_core.data.stdlib import prose

WORDS = prose().split()


def texts(count: int) -> list[str]:
    """Different documents of English words, of different lengths."""
    return [f"Document {i}. " + " ".join(WORDS[17 * i : 17 * i + 20 + 13 * (i % 7)]) for i in range(count)]


def write_json_lines(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: document}) + "\n" for document in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 300 documents."""
    return write_json_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts(300))


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, tokenized into several shards."""
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(DataConfig(source=str(corpus), validation_fraction=0.1), folder, shard_bytes=20_000)
    return folder
