import math
from dataclasses import dataclass, replace

import numpy as np
import numpy_gpt
import pytest
import torch
from numpy_gpt import CONFIGS, TIME, VARIANTS, random_tokens, random_weights, relative_error

from gpt_core.config import ModelConfig
from gpt_core.errors import InputError
from gpt_core.parameters import Parameter, block_table, parameter_table
from gpt_core.precision import Precision
from gpt_core.rotary import rotary_angles
from gpt_core.sites import model_sites
from torch_gpt.layers import Norm, dropout
from torch_gpt.model import GPT, initialiser
from torch_gpt.rotary import _angles, rotate
from torch_gpt.taps import Taps

FP64 = Precision.of("float64")


def build(config: ModelConfig, weights: dict[str, np.ndarray], precision: Precision = FP64) -> GPT:
    def create(parameter: Parameter) -> torch.Tensor:
        whole = weights[parameter.name]
        array = whole if parameter.layer is None else whole[parameter.layer]
        return torch.tensor(array, dtype=getattr(torch, precision.param_dtype))

    return GPT(config, create, precision=precision).eval()


def tokens_of(config: ModelConfig) -> torch.Tensor:
    return torch.tensor(random_tokens(config))


def expected_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Names in PyTorch of the table's rows: blocks one by one, kernels and scales called weight."""
    table = parameter_table(config)
    rows = {name: row for name, row in table.items() if not row.stacked}
    for layer in range(config.n_layers):
        block = block_table(table, layer)
        rows |= {name.replace("blocks.", f"blocks.{layer}."): row for name, row in block.items()}
    return {name.replace(".kernel", ".weight").replace(".scale", ".weight"): row for name, row in rows.items()}


def expected_shape(name: str, row: Parameter) -> tuple[int, ...]:
    """A weight of a linear layer is [outputs, inputs], heads flattened; everything else is as in the table."""
    if "experts" in row.axes and "expert_mlp" in row.axes:
        experts, inputs, outputs = row.shape
        return experts, outputs, inputs
    if row.name.endswith(".kernel"):
        inputs = 2 if "attention.output" in name else 1
        return math.prod(row.shape[inputs:]), math.prod(row.shape[:inputs])
    return (math.prod(row.shape),) if name.startswith("blocks.") and "_norm" not in name else row.shape


@dataclass(frozen=True)
class Run:
    """What one model gives: computed once, looked at from several sides."""

    config: ModelConfig
    truth: dict[str, np.ndarray]
    logits: torch.Tensor
    taps: Taps
    sensitivity: np.ndarray  # [time, time]: how much the logits at t move with the embedding at s


@pytest.fixture(scope="module", params=CONFIGS)
def run(request: pytest.FixtureRequest) -> Run:
    config = CONFIGS[request.param]
    weights = random_weights(config)
    model = build(config, weights)
    taps: Taps = {}
    with torch.no_grad():
        logits = model(tokens_of(config))
        traced = model(tokens_of(config), taps=taps)
    assert torch.equal(logits, traced), "taps change the logits"
    truth = numpy_gpt.forward(config, weights, random_tokens(config))
    return Run(config, truth, logits, taps, sensitivity(model))


def sensitivity(model: GPT) -> np.ndarray:
    x = model.embed(tokens_of(model.config)).detach().requires_grad_()
    logits = model.unembed(model.final_norm(model.run_blocks(x, None)))
    cotangent = torch.randn(logits.shape[2], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [torch.autograd.grad((logits[:, t] @ cotangent).sum(), x, retain_graph=True)[0] for t in range(TIME)]
    return torch.stack(rows).abs().amax(dim=(1, 3)).numpy()


def test_logits_are_those_of_an_independent_model(run: Run) -> None:
    assert run.logits.shape == (numpy_gpt.BATCH, TIME, run.config.vocab_size)
    assert relative_error(run.logits, run.truth["logits"]) <= 1e-12


@pytest.mark.parametrize("name", VARIANTS)
def test_the_fused_kernel_is_the_same_model_in_double_precision(name: str) -> None:
    """`sdpa` can be double, so it is held to the bound of the proof, in the whole model."""
    config = VARIANTS[name]
    weights = random_weights(config)
    model = build(config, weights)
    for block in model.blocks:
        block.attention.implementation = "sdpa"
    truth = numpy_gpt.forward(config, weights, random_tokens(config))["logits"]
    logits = model(torch.tensor(random_tokens(config))).detach().numpy()
    assert relative_error(logits, truth) <= 1e-12


def test_taps_are_the_sites_in_order_with_the_values_of_an_independent_model(run: Run) -> None:
    assert list(run.taps) == model_sites(run.config) == list(run.truth)
    for site, value in run.taps.items():
        assert relative_error(value, run.truth[site]) <= 1e-12, site


def test_causality(run: Run) -> None:
    """Logits at t (1) do not move with embeddings after t, (2) do with the one at t and with every one before it
    that the windows of all layers reach, (3) do not with any beyond that."""
    expected = numpy_gpt.reach(run.config)
    assert (run.sensitivity[~expected] == 0).all()
    assert (run.sensitivity[expected] > 1e-9).all()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.endswith("window")])
def test_window_excludes_the_key_one_past_its_edge(name: str) -> None:
    """In one layer the key at distance W - 1 is seen and the one at distance W is not."""
    config = replace(VARIANTS[name], n_layers=1)
    found = sensitivity(build(config, random_weights(config)))
    window = numpy_gpt.WINDOW
    assert (np.diagonal(found, -(window - 1)) > 1e-9).all()
    assert (np.diagonal(found, -window) == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_table(name: str) -> None:
    config = CONFIGS[name]
    found = {key: tuple(value.shape) for key, value in GPT(config, initialiser(0)).named_parameters()}
    expected = {key: expected_shape(key, row) for key, row in expected_parameters(config).items()}
    assert found == expected


def test_the_model_keeps_nothing_but_parameters() -> None:
    model = GPT(CONFIGS["untied"], initialiser(0))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


INIT = ModelConfig(vocab_size=300, context_length=200, n_layers=3, n_heads=4, n_kv_heads=2, embed_dim=64)


@pytest.mark.parametrize("config", [INIT, replace(INIT, tied_embeddings=False, init_std=0.3)])
def test_fresh_weights_have_the_distribution_of_the_table(config: ModelConfig) -> None:
    """Mean, deviation and the share beyond two deviations (4.55% of a normal), each within five standard errors."""
    state = GPT(config, initialiser(5)).state_dict()
    for name, row in expected_parameters(config).items():
        values = state[name].double().flatten().numpy()
        if row.std == 0:
            assert (values == row.mean).all(), name
            continue
        n = values.size
        assert abs(values.mean() - row.mean) < 5 * row.std / math.sqrt(n), name
        assert abs(values.std() / row.std - 1) < 5 / math.sqrt(2 * n), name
        assert abs((np.abs(values) > 2 * row.std).mean() - 0.0455) < 5 * math.sqrt(0.0455 * 0.9545 / n), name


def test_fresh_weights_follow_the_seed_and_differ_between_parameters_and_blocks() -> None:
    first, again, other = (GPT(INIT, initialiser(seed)).state_dict() for seed in (5, 5, 6))
    random = [name for name, row in expected_parameters(INIT).items() if row.std]
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [state[name].flatten()[:2048] / state[name].std() for name in random for state in (first, other)]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < 6 / math.sqrt(2048)


@pytest.mark.parametrize(("name", "key"), [("learned-gqa-full", "token_embedding"), ("untied", "head.weight")])
def test_padded_rows_get_no_gradient_and_never_reach_the_logits(name: str, key: str) -> None:
    config = CONFIGS[name]
    assert config.padded_vocab_size > config.vocab_size
    model = build(config, random_weights(config))
    logits = model(tokens_of(config))
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    padded = model.get_parameter(key)
    assert (padded.grad[config.vocab_size :] == 0).all()
    assert (padded.grad[: config.vocab_size].abs().amax(-1) > 0).all()
    with torch.no_grad():
        padded[config.vocab_size :] = torch.nan
        assert torch.equal(model(tokens_of(config)), logits)


def test_a_sequence_beyond_learned_positions_is_refused() -> None:
    config = VARIANTS["learned-mha-full"]
    model = GPT(config, initialiser(0))
    longest = torch.zeros(1, config.context_length, dtype=torch.int64)
    assert model(longest).shape[1] == config.context_length
    with pytest.raises(InputError, match="17 tokens are longer than context_length = 16"):
        model(torch.zeros(1, config.context_length + 1, dtype=torch.int64))


def test_a_sequence_beyond_the_context_is_fine_with_rope() -> None:
    config = VARIANTS["rope-mha-full"]
    weights = random_weights(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, config.context_length + 5))
    found = build(config, weights)(torch.tensor(tokens)).detach()
    assert relative_error(found, numpy_gpt.forward(config, weights, tokens)["logits"]) <= 1e-12


# ------------------------------------------------------------------------------------------------------------ dropout

RATE = 0.25
DROPPING = replace(VARIANTS["rope-gqa-window"], n_layers=3, dropout=RATE)


def test_dropout_is_off_in_evaluation() -> None:
    weights, tokens = random_weights(DROPPING), tokens_of(DROPPING)
    found = build(DROPPING, weights).eval()(tokens)
    assert torch.equal(found, build(replace(DROPPING, dropout=0.0), weights).train()(tokens))


def test_dropout_is_on_in_training_and_follows_the_generator() -> None:
    model, tokens = build(DROPPING, random_weights(DROPPING)), tokens_of(DROPPING)
    evaluated = model(tokens)
    model.train()
    torch.manual_seed(0)
    first, second = model(tokens), model(tokens)
    torch.manual_seed(0)
    again = model(tokens)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, evaluated)


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    n = 40_000
    dropped = dropout(torch.full((n,), 3.0, dtype=torch.float64), RATE, True)
    assert torch.isclose(dropped, torch.tensor(4.0, dtype=torch.float64))[dropped != 0].all()
    assert abs((dropped == 0).double().mean() - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / n)
    assert abs(dropped.mean() - 3) < 5 * 4 * math.sqrt(RATE * (1 - RATE) / n)


def test_dropout_acts_on_the_embedding_and_on_both_residual_branches() -> None:
    model = build(DROPPING, random_weights(DROPPING)).train()
    torch.manual_seed(0)
    taps: Taps = {}
    with torch.no_grad():
        model(tokens_of(DROPPING), taps=taps)
    kept = 1 - RATE
    entering = taps["blocks.0.input"]
    assert torch.allclose(entering, taps["embedding"] / kept * (entering != 0))
    assert 0.1 < (entering == 0).double().mean() < 0.4
    masks = []
    for layer in (0, 1):
        attended, hidden = (taps[f"blocks.{layer}.{part}.output"] / kept for part in ("attention", "mlp"))
        added = taps[f"blocks.{layer + 1}.input"] - taps[f"blocks.{layer}.input"]
        sums = torch.stack([0 * added, attended, hidden, attended + hidden])  # neither kept, one, the other, both
        distance, combination = (sums - added).abs().min(dim=0)
        assert distance.max() < 1e-12
        share = torch.bincount(combination.flatten(), minlength=4) / combination.numel()
        expected = torch.tensor([RATE * RATE, kept * RATE, RATE * kept, kept * kept])
        assert torch.allclose(share, expected, atol=0.1)
        masks.append(combination)
    assert not torch.equal(masks[0], masks[1])


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["rope-gqa-window", "learned-gqa-full", "untied"])
def test_every_site_is_in_the_dtype_of_the_policy(name: str, dtype: str) -> None:
    model = GPT(CONFIGS[name], initialiser(0, Precision.of(dtype)), precision=Precision.of(dtype))
    taps: Taps = {}
    model(tokens_of(CONFIGS[name]), taps=taps)
    stored, wide = ("float64", "float64") if dtype == "float64" else ("float32", "float32")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{stored}"}
    assert str(taps.pop("logits").dtype) == f"torch.{wide}"
    assert {str(value.dtype) for value in taps.values()} == {f"torch.{dtype}"}


def test_parameters_can_be_stored_in_bf16_too() -> None:
    precision = Precision(param_dtype="bfloat16", compute_dtype="float32")
    config = VARIANTS["rope-gqa-window"]
    model = GPT(config, initialiser(0, precision), precision=precision)
    taps: Taps = {}
    model(tokens_of(config), taps=taps)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in taps.values()} == {torch.float32}


def test_norm_statistics_of_bf16_are_in_fp32() -> None:
    """Around 100 neighbours in bf16 are 0.5 apart: a mean or a variance in bf16 would be noise."""
    config = ModelConfig(n_heads=4, embed_dim=64)
    table = parameter_table(config)
    norm = Norm("final_norm", table, lambda row: torch.full(row.shape, 0.7), config, Precision.of("bfloat16"))
    x = (100 + 3 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    expected = numpy_gpt.layer_norm(x.double().numpy(), np.float64(0.7), np.float64(0.7), 1e-5)
    assert norm(x).dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and the rounding of fp32; parameters in bf16 would be off by 8e-4.
    assert (np.abs(norm(x).detach().double().numpy() - expected) <= 2**-8 * np.abs(expected) + 5e-5).all()


def test_rotation_of_bf16_is_exact_at_far_positions() -> None:
    """Angles in bf16 would be off by whole turns beyond position 256."""
    config = replace(VARIANTS["rope-mha-full"], head_dim=8)
    x = torch.randn(1, 3000, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated = rotate(x, config.view("G").rotation, Precision.of("bfloat16"))
    assert rotated.dtype == torch.bfloat16
    expected = numpy_gpt.rotate(x.double().numpy(), config.rope_theta)
    # Half a unit in the last of 8 bits, and the rounding of fp32.
    assert (np.abs(rotated.double().numpy() - expected) <= 2**-8 * np.abs(expected) + 1e-6).all()


def test_the_rotary_tables_are_not_shared_with_the_model() -> None:
    config = VARIANTS["rope-mha-full"]
    tables = rotary_angles(config.view("G").rotation, TIME, "float64")
    before = [table.copy() for table in tables]
    model = build(config, random_weights(config))
    model(tokens_of(config)).sum().backward()
    assert all(np.array_equal(a, b) for a, b in zip(before, tables, strict=True))


def test_the_rotary_angles_are_marked_as_the_compiler_marks_constants() -> None:
    marks = vars(torch.compiler.assume_constant_result(lambda: None))
    assert marks
    assert marks.items() <= vars(_angles).items()
