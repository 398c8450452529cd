"""docs/fine-tuning.md, run as it stands on SmolLM2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import smollm2

ROOT = Path(__file__).parents[2]
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

pytestmark = [pytest.mark.slow, smollm2.needed]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.made_once(tmp_path_factory)


def blocks() -> list[str]:
    page = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_page_is_true(folder: Path, tmp_path: Path) -> None:
    """Every command, in its order; the model learns the one sentence, here and as it is handed on."""
    found = blocks()
    assert len(found) == 4
    script = "set -e\n" + "".join(found).replace(NAME, str(folder))
    commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": commands, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert said[0] == "The capital of France is Paris."
    assert said.count("One model, written twice.") == 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "served" / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
