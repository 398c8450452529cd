"""`parity verify` and `parity check` with transformers as third party: what is right passes, what is wrong is found."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hugging_face import SAMPLES, edit, save, tokens

from gpt_core.errors import InputError
from gpt_core.formats import open_checkpoint
from parity.checkpoints.convert import convert
from parity.checks.peer import check_decode, check_runs, gap_at
from parity.sides.products import LibraryNoise
from parity.sides.runs import Batch

MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    names = ("gpt2", "gpt_bigcode, multi-head", "gpt_neo, local", "starcoder2, grouped, window", *MIXTURES)
    for name in names:
        save(SAMPLES[name], root / name)
    return {name: root / name for name in names}


@pytest.fixture
def ids(tmp_path):
    np.save(tmp_path / "ids.npy", tokens())
    return tmp_path / "ids.npy"


def batch():
    mask = np.ones(tokens().shape, bool)
    mask[:, -1] = False
    mask[0, 3:8] = False
    return Batch(np.roll(tokens(), -1, axis=1), mask)


def compare(folder, change=lambda model: None, dtype="float32"):
    """Our PyTorch model against transformers' with something changed in it."""
    from parity.sides import torch_side
    from parity.sides.transformers_side import Peer

    checkpoint = open_checkpoint(folder)
    ours = torch_side.run(torch_side.build(checkpoint.config, checkpoint.read, dtype), tokens(), batch())
    peer = Peer(folder, dtype)
    change(peer.model)
    results = check_runs("case", dtype, checkpoint.config, "torch", ours, peer.run(tokens(), batch()), None)
    return {result.check: result for result in results}


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode, multi-head", "gpt_neo, local", "starcoder2, grouped, window"])
def test_in_fp64_all_that_transformers_computes_is_equal(name, folders):
    results = compare(folders[name], dtype="float64")
    assert set(results) == {"activations", "logits", "loss", "gradients"}
    assert all(result.passed for result in results.values())
    sites = results["activations"].measures["sites"]
    # Every operation of a block but the rotation, which is no module of transformers.
    assert len(sites) == 2 * 10 + 3


@pytest.mark.parametrize(("name", "own"), [("mixtral", 12), ("qwen3_moe", 14)])
def test_in_fp64_a_mixture_is_equal_with_all_that_its_router_decides(name, own, folders):
    """In blocks of 12 sites, scores, experts and weights among them, or 14 with norms of queries and keys."""
    results = compare(folders[name], dtype="float64")
    assert all(result.passed for result in results.values())
    sites = {*results["activations"].measures["sites"]}
    assert len(sites) == 2 * own + 3
    assert {f"blocks.1.moe.{site}" for site in ("scores", "chosen", "weights", "output")} <= sites


def test_the_loss_is_held_without_that_of_balance(folders, tmp_path):
    """transformers adds it where the folder says so; it is a matter of training."""
    folder = tmp_path / "model"
    shutil.copytree(folders["mixtral"], folder)
    edit(folder / "config.json", output_router_logits=True, router_aux_loss_coef=0.5)
    assert compare(folder, dtype="float64")["loss"].passed


def swap_gelu(model):
    import torch

    model.transformer.h[1].mlp.act = torch.nn.GELU()


def widen_window(model):
    import torch

    attention = model.transformer.h[1].attn.attention
    attention.bias |= torch.ones_like(attention.bias).tril(0) & torch.ones_like(attention.bias).triu(-7)


def forget_the_scale(model):
    model.model.layers[0].self_attn.scaling *= 1.01


def change_eps(model):
    model.transformer.h[1].ln_2.eps = 1e-3


def swap_query_and_key(model):
    import torch

    weight = model.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        weight[:, :80] = weight[:, :80].roll(40, dims=1)


def swap_gate_and_up(model):
    import torch

    weight = model.model.layers[1].mlp.experts.gate_up_proj
    with torch.no_grad():
        weight[:] = weight.roll(24, dims=1)


def sort_experts_by_name(model):
    import torch

    order = sorted(range(11), key=str)
    with torch.no_grad():
        for weight in model.model.layers[1].mlp.experts.parameters():
            weight[:] = weight[order]


def forget_to_normalise(model):
    model.model.layers[1].mlp.gate.norm_topk_prob = False


@pytest.mark.parametrize(
    ("name", "change", "site"),
    [
        ("gpt2", swap_gelu, "blocks.1.mlp.hidden"),
        ("gpt2", change_eps, "blocks.1.mlp_norm"),
        ("gpt2", swap_query_and_key, "blocks.0.attention.query"),
        ("gpt_neo, local", widen_window, "blocks.1.attention.mixed"),
        ("starcoder2, grouped, window", forget_the_scale, "blocks.0.attention.mixed"),
        ("mixtral", swap_gate_and_up, "blocks.1.moe.output"),
        ("mixtral", sort_experts_by_name, "blocks.1.moe.output"),
        ("qwen3_moe", forget_to_normalise, "blocks.1.moe.weights"),
    ],
)
def test_a_mistake_is_found_at_its_module(name, change, site, folders):
    results = compare(folders[name], change)
    assert not results["activations"].passed
    assert not results["logits"].passed
    assert results["activations"].measures["first_divergence"]["site"] == site


def test_noise_beyond_three_times_the_peers_is_a_failure(folders):
    from parity.sides import torch_side
    from parity.sides.transformers_side import Peer

    folder = folders["gpt2"]
    checkpoint = open_checkpoint(folder)
    model = torch_side.build(checkpoint.config, checkpoint.read, "float32")
    ours = torch_side.run(model, tokens(), batch())
    theirs = Peer(folder, "float32").run(tokens(), batch())
    truth = Peer(folder, "float64").run(tokens(), trace=False)

    def logits_check(run, libraries=None):
        results = check_runs("case", "float32", checkpoint.config, "torch", run, theirs, truth, libraries)
        return next(result for result in results if result.check == "logits")

    assert logits_check(ours).passed
    noise = np.random.default_rng(0).normal(0, 1.5e-6, ours.logits.shape) * np.abs(ours.logits).mean()
    loud = replace(ours, logits=(ours.logits + noise).astype(np.float32))
    noisy = logits_check(loud)
    assert noisy.relative_error < noisy.tolerance, "the bound alone would not see it"
    assert not noisy.passed
    assert "times as far from transformers' formulas in fp64" in noisy.reason
    louder, quieter = LibraryNoise({}, noisy.measures["noise_ratio"]), LibraryNoise({}, 1.0)
    assert logits_check(loud, {"torch": louder, "transformers": quieter}).passed, "its library explains it"
    assert not logits_check(loud, {"torch": quieter, "transformers": louder}).passed


def test_a_token_that_parts_is_named_with_the_gap_of_our_best_two_logits():
    """A model that says the token after the next, 0, 2, 4, ... modulo 7, and the one after it half as loud."""

    def logits_of(ids):
        return np.eye(7)[(ids + 2) % 7] + np.eye(7)[(ids + 3) % 7] / 2

    prompt, found = np.array([[1, 4], [0, 5]]), np.array([[6, 1, 3, 5, 0], [0, 2, 4, 6, 1]])
    gap = partial(gap_at, logits_of, prompt, found)
    assert gap(1, 3) == 0.5
    assert check_decode("case", "float32", found, found.copy(), gap).passed
    other = found.copy()
    other[1, 3] = 5
    wrong = check_decode("case", "float32", found, other, gap)
    assert not wrong.passed
    assert "row 1 parts at token 4 of 5: 6 against 5" in wrong.reason
    assert "differ by 5.0e-01" in wrong.reason


def decoded(folder, new=20):
    """The peer, and the check of its tokens against ours."""
    from parity.sides import torch_side
    from parity.sides.transformers_side import Peer

    checkpoint, peer = open_checkpoint(folder), Peer(folder, "float64")
    prompt = tokens()[:, :7]
    model = torch_side.build(checkpoint.config, checkpoint.read, "float64")
    ours = torch_side.write(model, prompt, new)
    gap = partial(gap_at, torch_side.logits_function(model), prompt, ours)
    return peer, check_decode("case", "float64", ours, peer.generate(prompt, new), gap)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_writes_64_tokens_as_transformers_does(name, tmp_path):
    sample = SAMPLES[name]
    save(replace(sample, fields=sample.fields | {"max_position_embeddings": 80}), tmp_path / "model")
    peer, result = decoded(tmp_path / "model", 64)
    assert result.passed, result.reason
    assert result.measures["tokens"] == 64
    assert len(np.unique(peer.generate(tokens()[:, :7], 16))) > 8, "such a text would be alike whatever the model did"


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "length_penalty": 0.5},
        {"suppress_tokens": list(range(90)), "min_length": 40},
        {"do_sample": True, "temperature": 0.7, "top_k": 40, "max_length": 9},
        {},
    ],
)
def test_greedy_is_greedy_whatever_the_folder_says(settings, folders, tmp_path):
    """With the settings of the folder transformers would write other tokens, or refuse."""
    folder = tmp_path / "model"
    shutil.copytree(folders["gpt2"], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "use_cache": True} | settings))
    peer, result = decoded(folder)
    assert result.passed, result.reason
    assert peer.set_aside == settings


def test_what_an_older_config_json_says_of_generation_is_set_aside_too(folders, tmp_path):
    from parity.sides.transformers_side import Peer

    peer = Peer(folders["gpt2"], "float32")
    peer.path = tmp_path
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 2, "eos_token_id": 7, "no_repeat_ngram_size": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "num_beams": 1}))
    assert peer.set_aside == {"no_repeat_ngram_size": 3}
    del peer.set_aside
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"generation_config\.json: holds no fields"):
        peer.set_aside  # noqa: B018


def test_what_was_set_aside_is_said(folders, ids, tmp_path, in_this_process, parity):
    folder = tmp_path / "model"
    shutil.copytree(folders["gpt2"], folder)
    content = {"repetition_penalty": 1.7, "suppress_tokens": list(range(90)), "num_beams": 1, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(content))
    called = parity("verify", folder, "--tokens", ids, "--new-tokens", 5, "--dtype", "float32", "--json")
    report = json.loads(called.out)
    assert called.code == 0, called.err
    (notice,) = report["notices"]
    assert "repetition_penalty 1.7, suppress_tokens [0, 1, 2," in notice
    assert len(notice) < 200
    aside = {name: content[name] for name in ("repetition_penalty", "suppress_tokens")}
    assert [case["set_aside"] for case in report["cases"] if case["check"] == "decode"] == [aside, aside]


@pytest.mark.parametrize(
    ("name", "change", "caches"),
    [("gpt_neo, local", {"window_size": 1}, True), ("starcoder2, grouped, window", {"sliding_window": 1}, False)],
)
def test_a_window_of_one_is_compared_without_a_cache_that_is_wrong_there(name, change, caches, tmp_path):
    from parity.verify import _notices, peer_checks

    sample = SAMPLES[name]
    save(replace(sample, fields=sample.fields | change), tmp_path / "model")
    peer, result = decoded(tmp_path / "model")
    assert result.passed, result.reason
    assert peer.caches == caches
    results = list(peer_checks("case", tmp_path / "model", "float32", tokens(), batch(), new_tokens=3))
    assert all(result.passed for result in results)
    assert [("without its own cache" in notice) for notice in _notices(results)] == [True] * (not caches)


def test_the_command_verifies_a_folder_and_its_source(folders, ids, tmp_path, in_this_process, parity):
    ours, export = tmp_path / "ours", tmp_path / "export"
    convert(folders["starcoder2, grouped, window"], ours, "jax")
    convert(ours, export, "hf")
    called = parity(
        "verify",
        export,
        "--against",
        ours,
        "--tokens",
        ids,
        "--new-tokens",
        16,
        "--card",
        "--json",
        "--out",
        tmp_path / "r",
    )
    report = json.loads(called.out)
    assert called.code == 0, called.err
    assert {(case["variant"], case["check"], case["dtype"]) for case in report["cases"]} == {
        ("export", "weights", "float32"),
        *(
            (f"export: {framework}", check, dtype)
            for framework in ("jax", "torch")
            for check in ("activations", "logits", "loss", "decode")
            for dtype in ("float64", "float32")
        ),
        *((f"export: {framework}", "gradients", "float64") for framework in ("jax", "torch")),
    }
    assert "transformers" in report["environment"]
    card = (export / "README.md").read_text()
    assert f"| parity | {len(report['cases'])} of {len(report['cases'])} checks against transformers passed" in card
    assert json.loads((tmp_path / "r" / "report.json").read_text())["passed"]


def test_a_folder_that_is_not_its_source_is_exit_code_1(folders, ids, tmp_path, in_this_process, parity):
    from safetensors.torch import load_file, save_file

    convert(folders["gpt2"], tmp_path / "ours", "torch")
    convert(tmp_path / "ours", tmp_path / "export", "hf")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] += 1e-3
    save_file(tensors, tmp_path / "export" / "model.safetensors", {"format": "pt"})
    command = ("verify", tmp_path / "export", "--against", tmp_path / "ours", "--tokens", ids, "--dtype", "float32")
    called = parity(*command, "--new-tokens", 0, "--json")
    assert called.code == 1
    weights = next(case for case in json.loads(called.out)["cases"] if case["check"] == "weights")
    assert "blocks.mlp.up.kernel differs at (1, 3, 4)" in weights["reason"]


def test_two_checkpoints_one_of_which_runs_in_transformers(folders, ids, tmp_path, in_this_process, parity):
    convert(folders["gpt_neo, local"], tmp_path / "ours", "jax")
    called = parity(
        "check", tmp_path / "ours", folders["gpt_neo, local"], "--tokens", ids, "--dtype", "float32", "--json"
    )
    report = json.loads(called.out)
    assert called.code == 0, called.err
    assert {"weights", "logits"} == {case["check"] for case in report["cases"]}
    logits = next(case for case in report["cases"] if case["check"] == "logits")
    assert any(name.startswith("B:hf-gpt_neo") for name in logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "OURS"], "verify takes a folder of Hugging Face"),
        (["verify", "HF", "--new-tokens", "-1"], "--new-tokens -1 must be at least 0"),
        (["verify", "HF"], "has no tokenizer beside its weights"),
        (["check", "--hugging-face", "--fault", "window-off-by-one"], "--hugging-face goes with"),
        (["check", "--hugging-face", "--variant", "rope-gqa"], "unknown variant 'rope-gqa'"),
        (["check", "--hugging-face", "--dtype", "bfloat16"], "computes in float64 or float32"),
        (["check", "HF", "HF", "--hugging-face"], "--hugging-face belong to the grid"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, folders, tmp_path, parity):
    convert(folders["gpt2"], tmp_path / "ours", "torch")
    places = {"OURS": tmp_path / "ours", "HF": folders["gpt2"]}
    called = parity(*(places.get(argument, argument) for argument in arguments))
    assert called.code == 2
    assert message in called.err


def test_code_that_lies_in_a_folder_runs_only_when_it_is_trusted(tmp_path, ids, in_this_process, parity):
    import numpy_gpt

    from gpt_core.formats import format_of
    from gpt_core.storage.weights import weights_source

    config = replace(numpy_gpt.CONFIGS["learned-gqa-window"], vocab_size=96, context_length=40)
    weights = {name: array.astype(np.float32) for name, array in numpy_gpt.random_weights(config).items()}
    (tmp_path / "ours").mkdir()
    stored = {row: array.dtype for row, array in weights.items()}
    format_of("torch").write(tmp_path / "ours", config, weights_source(weights), stored, None)
    convert(tmp_path / "ours", tmp_path / "export", "hf", allow_remote_code=True)
    (tmp_path / "export" / "modeling_twingpt.py").write_text("raise SystemExit('it ran')\n")
    called = parity("verify", tmp_path / "export", "--tokens", ids)
    assert called.code == 2
    assert "--trust-remote-code" in called.err


@pytest.mark.parametrize("variant", ["learned-mqa-window", pytest.param("hf-mixtral", marks=pytest.mark.slow)])
def test_one_variant_of_the_grid_as_an_export(variant, in_this_process, parity):
    called = parity("check", "--hugging-face", "--variant", variant, "--dtype", "float32", "--json")
    report = json.loads(called.out)
    assert called.code == 0, called.err
    expected = {"weights", "activations", "logits", "loss", "decode"} | ({"routing"} if "mixtral" in variant else set())
    assert {case["check"] for case in report["cases"]} == expected
    assert all(case["noise_ratio"] <= 3 for case in report["cases"] if case["check"] == "logits")
