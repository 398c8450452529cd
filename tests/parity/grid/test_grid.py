"""The grid proves what it says: equal twins pass, and every planted fault makes the very same call fail."""

import functools
import json
import re

import pytest

from parity.check import check_grid
from parity.faults.catalogue import FAULTS, fault_named
from parity.grid.planting import places
from parity.grid.subject import Attention, Subject
from parity.grid.variants import WINDOW, attention_variants, grid, select, sharp_weights, text_tokens
from parity.grid.worker import GridOptions
from parity.sides.runs import RaggedText

VARIANTS = {case.variant: case for case in attention_variants()}
CONTRACT = {"passed", "environment", "cases", "faults"}
CASE = {"variant", "dtype", "check", "relative_error", "tolerance", "passed"}
FAULT = {"name", "imitates", "caught", "caught_by", "margin", "expected_site", "found_site"}
CHECKS = {"weights", "activations", "logits", "loss", "gradients", "optimizer", "decode", "segments", "adapter", "chat"}
REFERENCE = Attention()
FORWARD = [fault for fault in FAULTS if fault.caught_by in {"activations", "logits", "decode", "segments"}]
OF_MIXTURES = {"routing", "balance"}
"""Checks that mixtures alone have."""
FIRST_OF_AREA = {fault.caught_by: fault for fault in reversed(FAULTS)}

GRID = {case.variant: case for case in grid()}
PLACES = (
    *("rope-gqa-window", "learned-mha-full", "covering-02", "covering-03", "covering-04", "covering-25"),
    *("rope-gqa-window-moe", "rope-mha-full-moe"),
)
"""Cases that have, among them, all that any fault needs."""

# What makes each fault visible at all, stated apart from the code under test; nothing is everywhere.
NEEDS = {
    "interleaved-rope": {"rope"},
    "reversed-rope": {"rope"},
    "rope-theta": {"rope"},
    "one-theta": {"two thetas"},
    "partial-rotation-ignored": {"a part turns"},
    "last-part-rotated": {"a part turns"},
    "frequencies-over-head": {"a part turns"},
    "rope-unscaled": {"scaled"},
    "rope-factor": {"scaled"},
    "local-layers-scaled": {"scaled", "L", "more than L"},
    "llama3-factors-swapped": {"llama3"},
    "yarn-betas-swapped": {"yarn"},
    "yarn-length-missing": {"yarn"},
    "shifted-positions": {"learned"},
    "tiled-kv-heads": {"gqa"},
    "window-off-by-one": {"L"},
    "window-one-short": {"L"},
    "window-ignored": {"L"},
    "softcap-missing": {"softcap"},
    "softcap-before-scale": {"softcap"},
    "pattern-shifted": {"pattern"},
    "unrotated-layer-rotated": {"N"},
    "positions-not-restarted": {"learned"},
    "ring-in-global-layer": {"L", "more than L"},
    "ring-off-by-one": {"L"},
    "rms-norm": {"layer"},
    "centred-rms-norm": {"rms"},
    "rms-eps-outside": {"rms"},
    "rms-sum-for-mean": {"rms"},
    "one-plus-scale": {"no offset"},
    "missing-unit-offset": {"offset"},
    "qk-norm-without-offset": {"offset", "qk-norm"},
    "unit-offset-twice": {"offset"},
    "qk-norm-after-rope": {"qk-norm", "rope"},
    "qk-norm-by-head": {"whole qk-norm"},
    "erf-gelu": {"gelu_tanh"},
    "tanh-gelu": {"gelu"},
    "sigmoid-gelu": {"a GELU"},
    "gelu-for-silu": {"silu"},
    "swapped-gate-and-up": {"gate", "one MLP"},
    "lowest-scores": {"experts"},
    "one-expert-fewer": {"experts"},
    "bias-in-choice": {"experts"},
    "bf16-router": {"experts"},
    "router-not-normalised": {"experts", "normalised"},
    "router-normalised": {"experts", "not normalised"},
    "sigmoid-router": {"experts"},
    "weights-on-inputs": {"experts"},
    "dropped-tokens": {"experts"},
    "experts-by-name": {"experts", "an expert 10"},
    "swapped-w1-and-w3": {"experts"},
    "detached-router": {"experts"},
    "softmax-twice": {"experts"},
    "balance-of-a-part": {"experts"},
    "serial-for-parallel": {"parallel"},
    "post-norm-of-sum": {"post"},
    "post-attention-norm-for-mlp": {"sandwich"},
    "residual-scale-missing": {"residual scale"},
    "scaled-embedding": {"no embedding scale"},
    "embedding-scale-missing": {"embedding scale"},
    "embedding-scale-rounded": {"long embedding scale"},
    "random-head": {"tied"},
    "logit-scale-missing": {"logit scale"},
    "logit-softcap-missing": {"logit softcap"},
    "softcap-on-logits": {"softcap"},
    "transposed-kernel": {"square queries"},
    "adapter-factors-swapped": {"square queries"},
    "dropped-bias": {"query bias"},
    "detached-norm": {"norms first"},
    "decay-on-unit-offset": {"offset"},
}


def has(config) -> set[str]:
    """What a model has, in the words of `NEEDS`."""
    kinds, scaling = set(config.layer_kinds), config.rope_scaling
    facts = {
        "a part turns": config.rope_fraction < 1,
        "two thetas": config.rope_local_theta is not None,
        # Of no use where the local layers are scaled already.
        "scaled": scaling is not None,
        "llama3": scaling is not None and scaling.kind == "llama3",
        "yarn": scaling is not None and scaling.kind == "yarn",
        "gqa": config.n_kv_heads not in (1, config.n_heads),
        "more than L": len(kinds) > 1,
        "pattern": len(kinds) > 1,
        "offset": config.norm_unit_offset,
        "no offset": not config.norm_unit_offset,
        "qk-norm": config.qk_norm is not None,
        "whole qk-norm": config.qk_norm == "whole",
        "a GELU": config.activation in ("gelu", "gelu_tanh"),
        "gate": config.gated_mlp,
        "one MLP": config.n_experts == 0,
        "experts": config.n_experts in (5, 11),
        "an expert 10": config.n_experts == 11,
        "normalised": config.n_experts == 5,
        "not normalised": config.n_experts == 11,
        "parallel": config.parallel_residual,
        "norms first": config.norm_placement in ("pre", "sandwich"),
        "residual scale": config.residual_scale == 0.4,
        "embedding scale": config.embedding_scale > 1,
        "no embedding scale": config.embedding_scale == 1,
        "long embedding scale": 6.9 < config.embedding_scale < 7,
        "logit scale": config.logit_scale == 0.25,
        "softcap": config.attention_softcap == 2,
        "logit softcap": config.logit_softcap == 4,
        "tied": config.tied_embeddings,
        "square queries": config.head_dim == 8,
        "query bias": config.qkv_bias,
    }
    named = {config.position, config.norm, config.norm_placement, config.activation}
    return kinds | named | {word for word, holds in facts.items() if holds}


def visible(fault, variant) -> bool:
    return NEEDS.get(fault.name, set()) <= has(GRID[variant].config)


@pytest.fixture
def in_this_process(in_this_process, monkeypatch):
    """What jobs build once for a case is kept for the next test."""
    monkeypatch.setattr("parity.grid.worker.Subject", subject)


@pytest.fixture
def checks_alone(in_this_process, monkeypatch):
    """The run's own section of faults is left out, which has a test to itself."""
    monkeypatch.setattr("parity.grid.planting.FAULTS", ())


@functools.cache
def subject(case, dtype, attention=REFERENCE, full=False, whole=True):
    """Text that the twins write themselves is compared in `test_decode_checks`."""
    here = Subject(case, dtype, attention, full=full, whole=whole)
    here.samplings = {}
    return here


@functools.cache
def outputs_without_a_fault(variant):
    return outputs(subject(GRID[variant], "float64"))


def outputs(here):
    """Of a PyTorch twin, with a cache and without one; one row goes round the window, one starts beyond it."""
    model, text = here.torch_model(), RaggedText(here.tokens[:, : WINDOW + 4], rows=(0, 1), lengths=(1, WINDOW + 2))
    return (
        here.torch.run(model, here.tokens).logits.tobytes(),
        here.torch.run_cached(model, text, {}).logits.tobytes(),
    )


def variant_for(fault) -> str:
    return next(variant for variant in PLACES if fault.bites(GRID[variant].config))


def dtype_for(fault) -> str:
    return "float32" if fault.caught_by == "noise" else "float64"


class TestFaults:
    @pytest.mark.parametrize("fault", FIRST_OF_AREA.values(), ids=lambda fault: fault.name)
    def test_a_planted_fault_ends_in_exit_code_1_by_the_check_that_must_catch_it(self, fault, in_this_process, parity):
        called = parity(
            *("check", "--variant", variant_for(fault), "--dtype", dtype_for(fault), "--fault", fault.name, "--json")
        )
        report = json.loads(called.out)
        assert called.code == 1
        assert not report["passed"]
        failed = {case["check"] for case in report["cases"] if not case["passed"]}
        assert ("logits" if fault.caught_by == "noise" else fault.caught_by) in failed
        assert all(case["reason"] for case in report["cases"] if not case["passed"])

    @pytest.mark.parametrize("name", ["shifted-positions", "ring-off-by-one"])
    def test_beside_variants_that_it_cannot_change_it_is_planted_where_it_can(self, name, in_this_process, parity):
        variants = ("rope-gqa-window", "learned-mha-full")
        called = parity("check", "--variant", *variants, "--dtype", "float64", "--fault", name, "--json")
        failed = {case["variant"] for case in json.loads(called.out)["cases"] if not case["passed"]}
        assert called.code == 1, called.err
        assert failed == {variant for variant in variants if visible(fault_named(name), variant)}

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("variant", ["rope-gqa-window", "learned-mha-full"])
    def test_the_very_same_call_without_a_fault_ends_in_0(self, variant, dtype, checks_alone, parity):
        called = parity("check", "--variant", variant, "--dtype", dtype, "--json")
        report = json.loads(called.out)
        assert called.code == 0
        assert report["passed"]
        assert all(case["passed"] for case in report["cases"])
        assert {case["origin"] for case in report["cases"] if case["check"] == "logits"} == {"sharp", "jax", "torch"}

    @pytest.mark.slow
    def test_every_fault_is_caught_with_room_to_spare_and_at_its_site(self, in_this_process, parity, monkeypatch):
        """In fp64 by four orders of magnitude; a fault of the forward pass by one even at the fp32 tolerance."""
        monkeypatch.setattr("parity.grid.planting._ENOUGH", 2)
        called = parity("check", "--variant", *PLACES, "--dtype", "float64", "float32", "--faults", "--json")
        assert called.code == 0, called.err
        rows = {row["name"]: row for row in json.loads(called.out)["faults"]}
        assert rows.keys() == {fault.name for fault in FAULTS}
        for fault in FAULTS:
            row = rows[fault.name]
            assert row.keys() >= FAULT
            assert row["caught"], row
            assert row["margin"] > (1 if fault.caught_by == "noise" else 1e4), row
            assert row["expected_site"] == fault.site_in(GRID[row["variants"][0]].config)
            assert row["site_right"], row
            assert row["seen_in"] == fault.seen_in
        for fault in FORWARD:
            assert rows[fault.name]["margin_float32"] >= 10, rows[fault.name]

    def test_a_fault_that_no_check_sees_fails_the_run(self, in_this_process, parity, monkeypatch):
        from contextlib import nullcontext
        from dataclasses import replace

        blunt = replace(FAULTS[0], name="blunt", plant=lambda model: nullcontext(), site="")
        for module in ("faults.catalogue", "grid.planting"):
            monkeypatch.setattr(f"parity.{module}.FAULTS", (blunt,))
        called = parity("check", "--variant", "rope-gqa-window", "--dtype", "float64", "--faults", "--json")
        report = json.loads(called.out)
        assert called.code == 1
        assert not report["passed"]
        assert [row["caught"] for row in report["faults"]] == [False]

    @pytest.mark.parametrize("variant", GRID)
    def test_faults_bite_where_they_can_be_seen_and_nowhere_else(self, variant):
        scaling = GRID[variant].config.rope_scaling
        for fault in FAULTS:
            if fault.name == "local-layers-scaled" and scaling is not None and scaling.local_layers:
                assert not fault.bites(GRID[variant].config)
            else:
                assert fault.bites(GRID[variant].config) == visible(fault, variant), fault.name

    def test_there_are_at_least_103_by_different_names(self):
        assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 103

    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
    def test_threads_are_named_as_github_does(self, fault):
        for thread in fault.seen_in.split(", ") if fault.seen_in else []:
            assert re.fullmatch(r"([\w.-]+/)?[\w.-]+#\d+", thread)

    @pytest.mark.parametrize("full", [False, True])
    def test_every_fault_has_a_place_and_the_full_run_has_all(self, full):
        planted = places(grid(), full=full)
        for fault in FAULTS:
            where = [variant for variant, names in planted.items() if fault.name in names]
            bitten = [case.variant for case in grid() if fault.bites(case.config)]
            assert set(where) <= set(bitten)
            assert where == bitten if full else len(where) == min(4, len(bitten)), fault.name
            assert len(bitten) >= 4 or "experts" in NEEDS[fault.name]

    def test_by_default_documents_leak_only_where_rows_of_documents_are_checked(self):
        planted = places(grid(), full=False, whole=False)
        leaking = {variant for variant, names in planted.items() if "segment-leak" in names}
        counting = {variant for variant, names in planted.items() if "positions-not-restarted" in names}
        assert leaking == {case.variant for case in grid() if case.further}
        assert counting == {variant for variant in leaking if "learned" in has(GRID[variant].config)}
        assert {(case.config.position, case.config.sliding_window) for case in grid() if case.further} == {
            ("learned", None),
            ("rope", WINDOW),
        }

    def test_a_run_of_one_variant_plants_all_that_bite_in_it(self):
        case = GRID["covering-03"]
        assert places([case], full=False)[case.variant] == [
            fault.name
            for fault in FAULTS
            if fault.bites(case.config) and fault.caught_by not in {"noise", "adapter", "chat"}
        ]

    @pytest.mark.parametrize("variant", PLACES)
    def test_faults_are_gone_when_their_contexts_end(self, variant, global_settings_restored):
        from parity.sides import side_of

        side_of("jax").prepare("float64")
        side_of("torch").prepare("float64")
        here = subject(GRID[variant], "float64")
        before = outputs_without_a_fault(variant)
        ours = [fault for fault in FAULTS if variant_for(fault) == variant]
        for fault in ours:
            with fault.plant(here.torch_model()):
                pass
        assert outputs(here) == before, f"one of {', '.join(fault.name for fault in ours)} stays"

    def test_every_fault_is_among_them(self):
        assert {variant_for(fault) for fault in FAULTS} <= set(PLACES)


class TestReport:
    @pytest.mark.slow
    def test_real_workers_share_the_cases_out(self, tmp_path, parity, monkeypatch):
        """Three of them: the last cases of fp64 have one to themselves. One fault, which they are told to plant."""
        monkeypatch.setattr("parity.grid.planting.FAULTS", (fault_named("future-leak"),))
        variants = ["rope-gqa-full", "rope-mqa-full", "learned-mqa-full"]
        dtypes = ("float64", "bfloat16")
        called = parity("check", "--variant", *variants, "--dtype", *dtypes, "--out", tmp_path / "new")
        assert (called.code, called.err) == (0, "")
        report = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
        found = [(case["variant"], case["dtype"]) for case in report["cases"]]
        assert list(dict.fromkeys(found)) == [(variant, dtype) for variant in variants for dtype in dtypes]
        assert sum(len(row["variants"]) for row in report["faults"] if row["name"] == "future-leak") == len(variants)

    @pytest.mark.parametrize("variants", [[], ["rope-mqa-full", "learned-mha-window"]])
    @pytest.mark.parametrize("dtypes", [["float64"], ["bfloat16", "float32"], ["float32", "float64", "bfloat16"]])
    def test_every_case_has_one_worker_in_every_dtype(self, variants, dtypes, monkeypatch):
        shares = []

        def run(jobs, on_event, *, at_once):
            shares.extend(job.arguments["options"] for job in jobs)
            assert at_once == len({"float64" in share.dtypes for share in shares}) <= 2

        monkeypatch.setattr("parity.check.run_side_by_side", run)
        check_grid(GridOptions(variants=variants, dtypes=dtypes), advance=lambda cases: None)
        assert all(share.dtypes == ["float64"] or "float64" not in share.dtypes for share in shares)
        pairs = [(variant, dtype) for share in shares for variant in share.variants for dtype in share.dtypes]
        wanted = variants or [case.variant for case in grid()]
        assert sorted(pairs) == sorted((variant, dtype) for variant in wanted for dtype in dtypes)

    def test_a_run_writes_the_contract(self, in_this_process, tmp_path, parity, monkeypatch):
        """Both frameworks, fp64, one variant, and the first fault of each kind."""
        monkeypatch.setattr("parity.grid.planting.FAULTS", tuple(FIRST_OF_AREA.values()))
        called = parity("check", "--variant", "rope-gqa-window", "--dtype", "float64", "--out", tmp_path / "new")
        assert called.code == 0
        assert called.err == ""
        assert str(tmp_path / "new" / "report.json") in called.out
        report = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
        assert report.keys() >= CONTRACT
        assert report["passed"] is True
        environment = report["environment"]
        assert environment.keys() >= {"jax", "torch", "numpy", "python", "jax_device", "torch_device"}
        assert environment["jax_matmul_precision"] == environment["torch_matmul_precision"] == "highest"
        for case in report["cases"]:
            assert case.keys() >= CASE
            assert case["variant"] == "rope-gqa-window"
            assert case["dtype"] == "float64"
            assert case["passed"] is True
            assert 0 <= case["relative_error"] <= case["tolerance"]
        assert {case["check"] for case in report["cases"]} >= CHECKS
        bounds = {case["check"]: case["tolerance"] for case in report["cases"]}
        assert bounds["weights"] == 0
        assert bounds["logits"] <= 1e-12
        assert bounds["gradients"] <= 1e-11
        logits = next(case for case in report["cases"] if case["check"] == "logits")
        assert logits.keys() >= {"max_abs", "rms", "cosine", "kl", "top1_agreement", "worst_index"}
        assert {row["caught_by"] for row in report["faults"]} == FIRST_OF_AREA.keys() - {"noise", *OF_MIXTURES}
        assert all(row.keys() >= FAULT and row["caught"] for row in report["faults"])

    def test_a_report_that_cannot_be_written_is_exit_code_2(self, in_this_process, tmp_path, parity):
        (tmp_path / "file").write_text("kept", encoding="utf-8")
        called = parity(
            *("check", "--variant", "rope-gqa-window", "--dtype", "float64", "--fault", "erf-gelu"),
            *("--out", tmp_path / "file"),
        )
        assert called.code == 2
        assert "file: is a file; give the name of a folder" in called.err
        assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"

    def test_fp32_is_judged_by_the_distance_to_the_fp64_truth(self, checks_alone, parity):
        report = json.loads(parity("check", "--variant", "rope-gqa-window", "--dtype", "float32", "--json").out)
        sharp = next(c for c in report["cases"] if c["check"] == "logits" and c["origin"] == "sharp")
        assert 0 < sharp["jax_rms_error"] < 1e-5
        assert 0 < sharp["torch_rms_error"] < 1e-5
        ratio = sharp["jax_rms_error"] / sharp["torch_rms_error"]
        assert sharp["noise_ratio"] == pytest.approx(max(ratio, 1 / ratio))
        assert sharp["noise_ratio"] <= 2


class TestConditions:
    """What makes a pass worth something."""

    def test_the_twelve_are_position_by_heads_by_mask(self):
        assert list(VARIANTS) == [
            f"{position}-{heads}-{mask}"
            for position in ("learned", "rope")
            for heads in ("mha", "gqa", "mqa")
            for mask in ("full", "window")
        ]
        for name, case in VARIANTS.items():
            assert case.config.variant == name

    @pytest.mark.parametrize("case", grid(), ids=lambda case: case.variant)
    def test_sizes_leave_no_mistake_unseen(self, case):
        config = case.config
        batch, time = text_tokens(config.vocab_size).shape
        assert batch >= 2
        assert time <= config.context_length
        if config.sliding_window is not None:
            assert time > 2 * config.sliding_window
            assert time % config.sliding_window
        if "gqa" in case.variant + case.description:
            assert config.n_kv_heads not in (1, config.n_heads)

    def test_the_vocabulary_is_padded_unless_the_case_says_otherwise(self):
        for case in grid():
            padded = case.config.padded_vocab_size > case.config.vocab_size
            assert padded == ("unpadded" not in case.description), case.variant

    @pytest.mark.parametrize("case", grid(), ids=lambda case: case.variant)
    def test_weights_are_sharp_and_nothing_is_left_at_zero_or_one(self, case):
        for name, array in sharp_weights(case.config).items():
            assert array.dtype == "float64"
            if name.endswith(("kernel", "embedding")):
                # An MLP that reads the stream without a norm would saturate.
                flat = case.config.norm_placement == "post" and name.endswith(("up.kernel", "gate.kernel"))
                assert array.std() == pytest.approx((0.8 if flat else 1.6) / case.config.embed_dim**0.5, rel=0.1), name
            else:
                rest = 1.0 if name.endswith("scale") and not case.config.norm_unit_offset else 0.0
                assert abs(array - rest).min() > 0.05, name

    def test_names_select_cases_in_the_order_given_and_once(self):
        names = ["rope-mqa-full", "learned-mha-full", "rope-mqa-full"]
        assert [case.variant for case in select(names)] == ["rope-mqa-full", "learned-mha-full"]
