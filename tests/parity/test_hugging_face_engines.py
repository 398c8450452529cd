"""Other engines than transformers read the exports."""

from dataclasses import replace

import numpy as np
import numpy_gpt
import pytest

from gpt_core.text.gpt2 import gpt2_tokenizer
from parity.checkpoints.convert import convert


@pytest.mark.parametrize("name", ["learned-gqa-full", "learned-mqa-full"])
def test_another_engine_reads_the_export_and_agrees(name, tmp_path):
    """CTranslate2 has converters and kernels of its own for GPT-2 and GPTBigCode."""
    import ctranslate2

    from gpt_core.formats import format_of
    from gpt_core.storage.weights import weights_source

    config = replace(
        numpy_gpt.CONFIGS[name],
        vocab_size=50257,
        pad_vocab_size_multiple=1,
        head_dim=8,
        embed_dim=48,
        attention_scale=None,
    )
    weights = {row: array.astype(np.float32) for row, array in numpy_gpt.random_weights(config).items()}
    (tmp_path / "ours").mkdir()
    stored = {row: array.dtype for row, array in weights.items()}
    format_of("torch").write(tmp_path / "ours", config, weights_source(weights), stored, gpt2_tokenizer())
    convert(tmp_path / "ours", tmp_path / "export", "hf")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "export")).convert(str(tmp_path / "engine"))
    generator = ctranslate2.Generator(str(tmp_path / "engine"), device="cpu", intra_threads=1)
    ids = np.random.default_rng(0).integers(0, 50257, (1, 13))
    logits = np.array(generator.forward_batch(ids.tolist()))[..., :50257]
    exact = {row: array.astype(np.float64) for row, array in weights.items()}
    assert numpy_gpt.relative_error(logits, numpy_gpt.forward(config, exact, ids)["logits"]) < 1e-4
