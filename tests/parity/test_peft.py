"""Adapters in PEFT's format against PEFT itself: its logits and its gradients are what ours are held to."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hugging_face import SAMPLES, make, save, tokens

from gpt_core.adapter import AdapterConfig, adapter_table
from gpt_core.checkpoints.adapted import open_checkpoint, open_with_adapter, pairs_of
from gpt_core.checkpoints.hashing import hash_weights
from gpt_core.checkpoints.replaceable import kept_adapter
from gpt_core.errors import InputError
from gpt_core.formats.peft import architecture_for, open_peft, source_of_peft, write_peft
from gpt_core.parameters import parameter_table
from gpt_core.precision import Precision
from gpt_core.storage.checkpoint_config import WEIGHTS_FILE
from gpt_core.storage.safetensors_file import SafetensorsReader, write_safetensors
from gpt_core.storage.weights import weights_source
from parity.sides.transformers_side import Peer
from torch_gpt import lora
from torch_gpt.model import GPT

peft = pytest.importorskip("peft")

FP64 = Precision.of("float64")
LLAMA = "llama, llama3"
OF_LAYER = ("q_proj", "down_proj", "c_attn", "c_fc", "qkv_proj", "gate_up_proj", "query_key_value", "dense")
BASES = (LLAMA, "gpt2", "phi3", "gpt_neox")  # separate; Conv1D, joined; joined, gate too; joined within each head


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of an architecture, in fp64."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(name: str) -> Path:
        if name not in made:
            model = make(SAMPLES[name]).double()
            model.save_pretrained(folder / name)
            made[name] = folder / name
        return made[name]

    return base


def random_adapter(model: Any, adapter: AdapterConfig, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.3, row.shape) for name, row in adapter_table(model, adapter).items()}


def written(base: Path, adapter: AdapterConfig, folder: Path) -> dict[str, np.ndarray]:
    """A random adapter of ours in PEFT's format; its parameters."""
    checkpoint = open_checkpoint(base)
    values = random_adapter(checkpoint.config, adapter)
    folder.mkdir()
    write_peft(
        folder,
        checkpoint.config,
        adapter,
        pairs_of(weights_source(values), checkpoint.config, adapter),
        np.dtype(np.float64),
        architecture_for(checkpoint.config, checkpoint.format),
        (str(base), hash_weights(checkpoint)),
    )
    return values


def beside(base: Path, adapter: AdapterConfig, values: dict[str, np.ndarray]) -> GPT:
    """Our model with the adapter beside its layers, unmerged."""
    model = GPT.from_pretrained(base, precision=FP64)
    read = weights_source(values)
    return lora.attach(model, adapter, lambda row: torch.tensor(read(row)))


def by_peft(base: Path, adapter: Path) -> tuple[Peer, Any]:
    peer = Peer(base, "float64")
    return peer, peft.PeftModel.from_pretrained(peer.model, str(adapter), is_trainable=True).eval()


def logits_of(peer: Peer, model: Any) -> torch.Tensor:
    with peer._computing():
        return model(input_ids=torch.tensor(tokens()), use_cache=False).logits


def assert_close(found: Any, expected: Any, bound: float) -> None:
    found, expected = (x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (found, expected))
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


CONFIGS = {
    "all": AdapterConfig(rank=3, alpha=5.0),
    "some": AdapterConfig(rank=2, alpha=3.0, targets=["attention.query", "attention.value", "mlp.up"], rslora=True),
    "output": AdapterConfig(rank=2, targets=["attention.output"]),  # c_proj in GPT-2: another one is called so too
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_of_ours_is_the_same_function_in_peft(
    name: str, config: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, adapter = bases(name), CONFIGS[config]
    values = written(base, adapter, tmp_path / "adapter")
    ours = beside(base, adapter, values)(torch.tensor(tokens()))
    peer, model = by_peft(base, tmp_path / "adapter")
    expected = logits_of(peer, model)
    assert_close(ours, expected, 1e-12)
    with model.disable_adapter():
        assert (logits_of(peer, model) - expected).abs().max() > 0.1  # it does something
    whole = open_with_adapter(base, tmp_path / "adapter")
    merged = GPT(whole.config, lambda row: torch.tensor(whole.read(row)), precision=FP64).eval()
    assert_close(merged(torch.tensor(tokens())), ours, 1e-12)


def test_an_adapter_of_a_mixture_is_that_of_its_attention(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT has no pair of matrices for a router or an expert."""
    base, folder = bases("mixtral"), tmp_path / "adapter"
    values = written(base, CONFIGS["all"], folder)
    peer, model = by_peft(base, folder)
    assert_close(beside(base, CONFIGS["all"], values)(torch.tensor(tokens())), logits_of(peer, model), 1e-12)
    tensors = SafetensorsReader(folder / "adapter_model.safetensors")
    other = {key: key.replace("self_attn.q_proj", "mlp.gate") for key in tensors.tensors}
    arrays = {new: np.array(tensors.read(key)) for key, new in other.items()}
    infos = {new: tensors.tensors[key] for key, new in other.items()}
    write_safetensors(folder / "adapter_model.safetensors", infos, arrays.__getitem__)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate is no .* block of hf-mixtral, .* routers and"):
        open_with_adapter(base, folder)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT's, of Conv1D
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
        {
            "r": 4,
            "lora_alpha": 2,
            "use_rslora": True,
            "target_modules": rf".*\.1\..*({'|'.join(OF_LAYER)})",
            "rank_pattern": {"q_proj|c_attn|qkv_proj|query_key_value": 2},
            "alpha_pattern": {r"mlp\.(down_proj|c_fc|gate_up_proj)|dense": 9},
        },
    ],
    ids=["everywhere", "one layer, ranks and scales of their own"],
)
def test_an_adapter_of_peft_is_the_same_function_here(
    name: str, options: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(name)
    peer = Peer(base, "float64")
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(peer.model, config).eval()
    model.save_pretrained(tmp_path)
    whole = open_with_adapter(base, tmp_path)
    ours = GPT(whole.config, lambda row: torch.tensor(whole.read(row)), precision=FP64).eval()
    assert_close(ours(torch.tensor(tokens())), logits_of(peer, model), 1e-12)


def test_gradients_of_a_and_b_are_those_of_peft(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base, adapter = bases(LLAMA), CONFIGS["all"]
    values = written(base, adapter, tmp_path / "adapter")
    ours = beside(base, adapter, values)
    (ours(torch.tensor(tokens())) ** 2).sum().backward()
    peer, model = by_peft(base, tmp_path / "adapter")
    (logits_of(peer, model) ** 2).sum().backward()
    modules = dict(model.named_modules())
    for theirs, here in {
        "self_attn.q_proj": "attention.query",
        "self_attn.o_proj": "attention.output",
        "mlp.down_proj": "mlp.down",
    }.items():
        for layer in range(2):
            module = modules[f"base_model.model.model.layers.{layer}.{theirs}"]
            own = ours.get_submodule(f"blocks.{layer}.{here}")
            assert_close(own.lora_a.grad, module.lora_A["default"].weight.grad, 1e-11)
            assert_close(own.lora_b.grad, module.lora_B["default"].weight.grad, 1e-11)
    assert {key for key, parameter in ours.named_parameters() if parameter.grad is not None} == set(lora.split(ours)[0])


def test_one_that_goes_on_here_begins_where_peft_ended(bases: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = CONFIGS["all"]
    values = written(bases(LLAMA), adapter, tmp_path / "adapter")
    base = open_checkpoint(bases(LLAMA))
    read = source_of_peft(open_peft(tmp_path / "adapter", base.config, base.format), base.config, adapter)
    for name, row in adapter_table(base.config, adapter).items():
        np.testing.assert_array_equal(read(row), values[name])


def test_a_base_in_our_own_format_has_the_modules_of_the_architecture_that_holds_it(
    bases: Callable[[str], Path], parity: Callable[..., Any], tmp_path: Path
) -> None:
    written(bases(LLAMA), CONFIGS["all"], tmp_path / "adapter")
    for to in ("torch", "jax"):
        assert parity("convert", bases(LLAMA), tmp_path / to, "--to", to).code == 0
        arguments = (
            "convert",
            tmp_path / to,
            tmp_path / f"merged-{to}",
            "--to",
            "hf",
            "--adapter",
            tmp_path / "adapter",
        )
        assert parity(*arguments).code == 0
    direct = open_with_adapter(bases(LLAMA), tmp_path / "adapter")
    for name, row in parameter_table(direct.config).items():
        for to in ("torch", "jax"):
            np.testing.assert_array_equal(open_checkpoint(tmp_path / f"merged-{to}").read(row), direct.read(row), name)


def edited(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"of_the_future": 3}, "of_the_future"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 2}, "another adapter_config.json"),
        ({"rank_pattern": {"q_proj": 5}}, "rank 5"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"rank_pattern": {"(": 5}}, "is no pattern"),
    ],
)
def test_what_would_be_another_function_is_refused_by_name(
    fields: dict[str, Any], said: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    written(bases(LLAMA), CONFIGS["all"], tmp_path / "adapter")
    edited(tmp_path / "adapter", **fields)
    with pytest.raises(InputError, match=said):
        open_with_adapter(bases(LLAMA), tmp_path / "adapter")


def test_another_base_a_strange_module_and_a_cut_file_are_refused(
    bases: Callable[[str], Path], parity: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    written(bases(LLAMA), CONFIGS["all"], adapter)
    save(replace(SAMPLES[LLAMA], seed=3), tmp_path / "other")
    tensors = SafetensorsReader(adapter / "adapter_model.safetensors")
    arrays = {key: np.array(tensors.read(key)) for key in tensors.tensors}

    def refused(base: Path, *words: str) -> None:
        found = parity("convert", base, tmp_path / "out", "--to", "hf", "--adapter", adapter)
        assert found.code == 2
        assert len(found.err.splitlines()) == 1
        assert all(word in found.err for word in words), found.err
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "other", "belongs to another base")
    refused(bases("gpt2"), "is no linear layer of a block of hf-gpt2")
    strange = {key.replace("q_proj", "r_proj"): array for key, array in arrays.items()}
    for content, said in (
        (strange, "r_proj"),
        (dict(list(arrays.items())[1:]), "alone"),
        ({}, "holds no tensors"),
        ({"base_model.model.lm_head.lora_A.weight": arrays[next(iter(arrays))]}, "embeddings and head"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": arrays[next(iter(arrays))]}, "no lora_A or lora_B"),
    ):
        path = adapter / "adapter_model.safetensors"
        infos = {key: tensors.tensors[next(iter(arrays))] for key in content}
        infos |= {key: type(infos[key])(content[key].shape, content[key].dtype) for key in content}
        write_safetensors(path, infos, content.__getitem__)
        refused(bases(LLAMA), said)
    path.write_bytes(path.read_bytes()[:-9])
    refused(bases(LLAMA), "not a whole safetensors file")
    (adapter / "adapter_config.json").unlink()
    refused(bases(LLAMA), "adapter_config.json")


def test_an_adapter_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    assert kept_adapter(tmp_path) == ""
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_model.safetensors" in kept_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("")
    assert kept_adapter(tmp_path) == ""
    (tmp_path / WEIGHTS_FILE).write_text("")
    assert WEIGHTS_FILE in kept_adapter(tmp_path)
