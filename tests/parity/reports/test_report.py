"""The report: what its four files say of a run with everything that a run can have, and the page in a real browser."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from io import StringIO
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from junitparser import JUnitXml
from rich.console import Console

from gpt_core.errors import InputError
from parity.checks import CheckResult
from parity.reports.overview_figures import heat_map
from parity.reports.report import print_table, print_verdict, report, write_report
from parity.reports.summary import rerun
from parity.reports.variant_figures import variant_figures

BOUNDS = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2e-1}
MINUS = "\N{MINUS SIGN}"
VARIANTS = ("rope-gqa-window", "learned-mha-full")
FIGURES_OF_A_VARIANT = {"depth", "noise", "gradients", "optimizer", "losses"}
TROUBLE = "first differs at blocks.1.attention.key: 3.1e-03 at (0, 4, 1, 2) <script>alert(1)</script> | a & b\x00"


def fabricated(variants: tuple[str, ...] = VARIANTS, *, failing: bool = True) -> dict[str, Any]:
    """A report with every check in every dtype, faults and training; on request with lines that failed in every way."""
    random = np.random.default_rng(3)

    def near(bound: float) -> float:
        return bound * 10 ** random.uniform(-3.5, -0.5)

    sites = ["embedding"]
    sites += [
        f"blocks.{layer}.{site}" for layer in range(3) for site in ("input", "attention.query", "attention.mixed")
    ]
    sites += ["final_norm", "logits"]
    leaves = ["token_embedding", "blocks.attention.query.kernel", "blocks.mlp.up.bias", "final_norm.scale"]
    results = []
    for variant, (dtype, bound) in product(variants, BOUNDS.items()):
        results.append(CheckResult(variant, dtype, "weights", 0.0, 0.0, True))
        measures: dict[str, Any] = {"sites": {site: 0.0 if site == "embedding" else near(bound) for site in sites}}
        if dtype != "float64":
            measures["noise"] = {site: [near(bound), near(bound)] for site in sites}
        results.append(CheckResult(variant, dtype, "activations", near(bound), bound, True, measures=measures))
        noise = {"jax_rms_error": bound / 20, "torch_rms_error": bound / 15, "noise_ratio": 4 / 3}
        measures = {"kl": 1e-9, "cosine": 1.0} | (noise if dtype != "float64" else {})
        results.append(CheckResult(variant, dtype, "logits", near(bound), bound, True, measures=measures))
        results.append(CheckResult(variant, dtype, "logits", near(bound), bound, True, origin="jax"))
        results.append(CheckResult(variant, dtype, "loss", near(bound), bound, True))
        if dtype == "float64":
            errors = {name: near(bound) for name in leaves}
            results.append(
                CheckResult(variant, dtype, "gradients", near(bound), bound, True, measures={"leaves": errors})
            )
            errors = {f"{kind} of {name}": near(bound) for kind in ("mu", "nu", "delta") for name in leaves}
            results.append(
                CheckResult(variant, dtype, "optimizer", near(bound), bound, True, measures={"leaves": errors})
            )
        errors = {f"{side} with its cache against without": near(bound) for side in ("jax", "torch")}
        written = {"comparisons": errors, "positions": 111, "written": {"greedy": 108, "sampled": 108}}
        results.append(CheckResult(variant, dtype, "decode", max(errors.values()), bound, True, measures=written))
        if dtype != "bfloat16":
            curve = [10.8 * 0.97**step for step in range(50)]
            other = [loss * (1 + random.normal() * near(bound)) for loss in curve]
            losses = {"losses": {"jax": other, "torch": curve}}
            results.append(CheckResult(variant, dtype, "training", near(bound), bound, True, measures=losses))
    site = "blocks.0.attention.rotated_query"
    faults = [
        fault_row("interleaved-rope", variants[-1:], expected_site=site, found_site=site, hint="the other RoPE layout"),
        fault_row("bad-loss", variants, caught_by="loss", margin=float("inf"), margin_float32=None),
    ]
    if failing:
        first, last = variants[0], variants[-1]
        changed = {
            (first, "float64", "weights", "sharp"): {
                "relative_error": 0.5,
                "reason": "numpy -> jax -> numpy: a differs",
            },
            (last, "float64", "activations", "sharp"): {"relative_error": 3.1e-3, "reason": TROUBLE},
            (last, "float32", "logits", "sharp"): {"reason": "torch is 9.0 times as far from the fp64 truth"},
            (last, "bfloat16", "loss", "sharp"): {"relative_error": float("inf"), "reason": "NaN or inf in the loss"},
            (last, "float32", "logits", "jax"): {"relative_error": float("nan"), "reason": "NaN in the logits"},
        }
        for index, result in enumerate(results):
            change = changed.get((result.variant, result.dtype, result.check, result.origin))
            if change:
                fields = {name: getattr(result, name) for name in result.__dataclass_fields__}
                results[index] = CheckResult(**(fields | {"passed": False} | change))
        measured = next(r for r in results if not r.passed and r.check == "activations").measures["sites"]
        measured[sites[-1]] = float("inf")
        wrong = {"expected_site": "final_norm", "found_site": "logits", "site_right": False}
        faults.append(fault_row("tiny-eps", variants, caught=False, margin=0.5, missed_in=[last], **wrong))
    environment = {"jax": "0.10.2", "torch": "2.13.0", "config_differences": {"eps": [1e-5, 1e-6]}}
    return report(results, environment, faults, seconds=71.25, command="parity check --full --out runs/parity")


def fault_row(name: str, variants: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """A planted fault that was caught, unless `more` says otherwise."""
    usual = {"caught": True, "caught_by": "logits", "margin": 8e11, "margin_float32": 1.6e5, "missed_in": []}
    nowhere = {"expected_site": "", "found_site": "", "site_right": True, "hint": ""}
    return (
        {"name": name, "imitates": f"what {name} does | in the world"}
        | usual
        | nowhere
        | {"variants": list(variants)}
        | more
    )


def routing(decisions: int, flips: int, first: str) -> dict[str, Any]:
    """What a check of routing measures."""
    return {"decisions": decisions, "flips": flips, "first_flip": first, "least_margin": 2e-3}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    content = fabricated()
    folder = tmp_path_factory.mktemp("report")
    assert write_report(folder, content) == folder / "report.json"
    return content, folder


class TestJson:
    def test_keeps_the_contract(self, written):
        content, folder = written
        stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        assert stored == content
        assert stored.keys() >= {"passed", "environment", "seconds", "command", "cases", "faults"}
        for case in stored["cases"]:
            assert case.keys() >= {
                "variant",
                "dtype",
                "check",
                "relative_error",
                "tolerance",
                "passed",
                "origin",
                "reason",
            }

    def test_numbers_that_are_not_finite_are_strings_at_any_depth(self, written):
        content, _ = written
        assert {case["relative_error"] for case in content["cases"]} >= {"inf", "nan"}
        sites = next(case for case in content["cases"] if case["check"] == "activations" and not case["passed"])[
            "sites"
        ]
        assert "inf" in sites.values()
        assert "inf" in [fault["margin"] for fault in content["faults"]]

    def test_a_fault_that_got_through_fails_the_report(self):
        good = fabricated(failing=False)
        assert good["passed"]
        passing = [CheckResult("v", "float64", "logits", 0.0, 1e-12, True)]
        assert not report(passing, {}, [good["faults"][0] | {"caught": False}])["passed"]
        assert not report(passing, {}, [good["faults"][0] | {"missed_in": ["v"]}])["passed"]

    def test_a_run_that_checked_nothing_has_not_passed(self):
        assert not report([], {})["passed"]


class TestFiles:
    def test_all_four_are_written_and_nothing_else(self, written):
        _, folder = written
        assert {path.name for path in folder.iterdir()} == {"report.json", "report.html", "report.md", "junit.xml"}

    def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(self, tmp_path):
        (tmp_path / "report.html").mkdir()
        with pytest.raises(InputError, match=r"report\.html: is a folder"):
            write_report(tmp_path, fabricated())
        assert not list(tmp_path.glob("*.tmp"))
        assert not list(tmp_path.glob(".*.tmp"))

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(report([], {}), id="nothing"),
            pytest.param(
                report([CheckResult("a against b", "float32", "logits", 1e-7, 5e-6, True)], {}), id="one line"
            ),
            pytest.param({"passed": True, "environment": {}, "cases": []}, id="bare"),
            pytest.param(report([], {}, fabricated(failing=False)["faults"]), id="faults alone"),
        ],
    )
    def test_sections_may_be_missing(self, content, tmp_path):
        write_report(tmp_path, content)
        assert all(
            (tmp_path / name).stat().st_size for name in ("report.json", "report.html", "report.md", "junit.xml")
        )


class TestMarkdown:
    def test_names_each_failure_with_its_reason_and_how_to_run_it_again(self, written):
        content, folder = written
        text = (folder / "report.md").read_text(encoding="utf-8")
        assert text.startswith("## ❌ Parity of JAX and PyTorch: 5 of 44 checks failed, 1 planted fault got through\n")
        assert "Faults: 2 of 3 caught, 1 of 2 at the right site." in text
        for case in content["cases"]:
            if not case["passed"]:
                assert f"`parity check --full --variant {case['variant']} --dtype {case['dtype']}`" in text
        assert "`parity check --fault tiny-eps --variant " in text

    def test_every_row_has_the_columns_of_its_table(self, written):
        _, folder = written
        blocks = (folder / "report.md").read_text(encoding="utf-8").split("\n\n")
        tables = [block.splitlines() for block in blocks if block.startswith("|")]
        assert len(tables) == 4
        for rows in tables:
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1

    def test_what_a_report_quotes_cannot_become_html(self, written):
        _, folder = written
        assert "<script" not in (folder / "report.md").read_text(encoding="utf-8")

    def test_success_is_short(self, tmp_path):
        write_report(tmp_path, fabricated(failing=False))
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert text.startswith("## ✅ Parity of JAX and PyTorch: all 44 checks passed\n")
        assert "Failed" not in text
        assert len(text.splitlines()) < 40


class TestJUnit:
    def test_holds_a_test_case_for_every_line_and_every_fault(self, written):
        content, folder = written
        suites = ElementTree.parse(folder / "junit.xml").getroot()
        assert suites.tag == "testsuites"
        cases = list(suites.iter("testcase"))
        assert len(cases) == len(content["cases"]) + len(content["faults"]) == int(suites.attrib["tests"])
        assert all(case.attrib["name"] and case.attrib["classname"].startswith("parity.") for case in cases)
        assert len({(case.attrib["classname"], case.attrib["name"]) for case in cases}) == len(cases)
        assert {suite.attrib["name"] for suite in suites} == {f"parity.{name}" for name in (*BOUNDS, "faults")}
        assert sum(int(suite.attrib["tests"]) for suite in suites) == len(cases)

    def test_failures_carry_reason_and_command(self, written):
        _, folder = written
        parsed = JUnitXml.fromfile(str(folder / "junit.xml"))
        assert parsed.failures == 6
        failures = {
            f"{case.classname} {case.name}": case.result[0] for suite in parsed for case in suite if case.result
        }
        failure = failures["parity.float64.learned-mha-full activations"]
        assert failure.message == TROUBLE.replace("\x00", "\N{REPLACEMENT CHARACTER}")
        assert "parity check --full --variant learned-mha-full --dtype float64" in failure.text
        assert "parity.faults tiny-eps" in failures


class TestDescriptions:
    def test_what_a_numbered_case_is_stands_beside_its_failure_and_where_it_is_chosen(self, tmp_path):
        said = {VARIANTS[-1]: "rope, gqa, LGN, RMSNorm"}
        write_report(tmp_path, fabricated() | {"descriptions": said})
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        option = re.search(rf'<option value="{VARIANTS[-1]}"[^>]*>([^<]*)</option>', page)
        assert option is not None
        assert option[1] == f"{VARIANTS[-1]}: {said[VARIANTS[-1]]}"
        assert f"| {VARIANTS[-1]} ({said[VARIANTS[-1]]}) | float64 |" in (tmp_path / "report.md").read_text("utf-8")

    def test_a_fault_names_the_thread_it_was_seen_in(self, tmp_path):
        content = fabricated()
        for fault in content["faults"]:
            fault["seen_in"] = f"project#{fault['name']}"
        write_report(tmp_path, content)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert all(f">project#{fault['name']}</span>" in page for fault in content["faults"])
        assert "(project#tiny-eps)" in (tmp_path / "report.md").read_text(encoding="utf-8")


class TestFigures:
    def test_sites_stay_in_the_order_of_the_data(self):
        """Plotly draws equal groups side by side: what lies before the blocks and behind them must not share one."""
        content = fabricated()
        groups, leaves = variant_figures(content, VARIANTS[0])["depth"]["data"][0]["x"]
        measured = next(case["sites"] for case in content["cases"] if case["check"] == "activations")
        assert [f"{group.strip()}.{leaf}".strip(".") for group, leaf in zip(groups, leaves, strict=True)] == list(
            measured
        )
        runs = [group for group, _ in groupby(groups)]
        assert len(runs) == len(set(runs)) == 5

    def test_cells_of_the_heat_map_are_the_worst_of_their_lines(self):
        lines = [(1e-15, True, "sharp"), (1e-13, True, "jax"), (0.0, False, "torch")]
        results = [CheckResult("v", "float64", "logits", error, 1e-12, passed, origin=o) for error, passed, o in lines]
        for count, (heat, text) in enumerate([(-3.0, f"{MINUS}3.0"), (-1.0, f"{MINUS}1.0"), (2.0, "✗ =")], start=1):
            drawn = heat_map(report(results[:count], {}))
            assert drawn is not None
            assert drawn["data"][0]["z"] == [[pytest.approx(heat)]]
            assert drawn["data"][0]["text"] == [[text]]

    def test_a_bound_of_zero_is_kept_or_broken(self):
        for error, text in ((0.0, "="), (1e-300, "✗ ∞")):
            drawn = heat_map(report([CheckResult("v", "float64", "weights", error, 0.0, error == 0)], {}))
            assert drawn is not None
            assert drawn["data"][0]["text"] == [[text]]


class Links(HTMLParser):
    """Everything by which a page could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in {"iframe", "object", "embed", "base"}
        loading = {"src", "srcset", "href", "action", "data", "poster", "background"}
        self.found += [value or "" for name, value in attributes if name in loading]


class TestPage:
    def test_loads_nothing_from_anywhere(self, written):
        _, folder = written
        page = (folder / "report.html").read_text(encoding="utf-8")
        links = Links()
        links.feed(page)
        assert all(link.startswith(("#", "data:")) for link in links.found)
        assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", page)

    def test_is_small(self, written):
        _, folder = written
        assert (folder / "report.html").stat().st_size < 2_500_000

    def test_quotes_reasons_as_text(self, written):
        _, folder = written
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert html.escape(TROUBLE.replace("\x00", ""), quote=False)[:60] in page
        assert "<script>alert" not in page

    def test_every_line_has_the_command_that_runs_it_again(self, written):
        content, folder = written
        page = (folder / "report.html").read_text(encoding="utf-8")
        for case in content["cases"]:
            assert f"<code>parity check --full --variant {case['variant']} --dtype {case['dtype']}</code>" in page

    def test_light_and_dark(self, written):
        _, folder = written
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert page.count("prefers-color-scheme: dark") == 2  # once for the page, once for its figures


def browser() -> str | None:
    """A Chromium of any name, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


needs_chromium = pytest.mark.skipif(browser() is None, reason="no chromium here: apt-get install chromium")


def open_in_chromium(page: Path, profile: Path, scheme: str = "light") -> tuple[str, list[str]]:
    """The page's elements after its scripts have run, and all that it said on the console; offline."""
    command = [
        str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=20000",
        "--window-size=1300,900", f"--user-data-dir={profile}",
        f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=os.environ | {"LANG": "C"}
    )
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def plots_in(document: str) -> set[str]:
    """Names of the places in which Plotly has drawn, and which can be seen."""
    document = re.sub(r'<figure hidden="">.*?</figure>', "", document, flags=re.DOTALL)
    places = re.findall(r'<div[^>]*class="[^"]*js-plotly-plot[^"]*"[^>]*>', document)
    names = [re.search(r'data-(?:overview|variant-figure)="(\w+)"', place) for place in places]
    return {name[1] for name in names if name}


@needs_chromium
class TestBrowser:
    def test_console_errors_are_seen(self, tmp_path):
        page = tmp_path / "bad.html"
        page.write_text("<script>console.error('a'); Promise.reject(new Error('b')); undefinedName()</script>")
        _, said = open_in_chromium(page, tmp_path / "profile")
        assert len(said) == 3

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_every_figure_is_drawn_and_the_console_stays_silent(self, scheme, written, tmp_path):
        _, folder = written
        document, said = open_in_chromium(folder / "report.html", tmp_path / "profile", scheme)
        assert said == []
        assert f'data-drawn="{scheme}"' in document
        assert plots_in(document) == {"heat_map", "noise_floor"} | FIGURES_OF_A_VARIANT
        assert all(f">{variant}</text>" in document for variant in VARIANTS)

    def test_a_person_can_choose_the_variant(self, tmp_path):
        content = fabricated()
        chosen = VARIANTS[1]
        content["cases"] = [
            case for case in content["cases"] if (case["variant"], case["check"]) != (chosen, "training")
        ]
        write_report(tmp_path, content)
        page = tmp_path / "report.html"
        choose = (
            "<script>new MutationObserver(() => { if (select.value !== 'CHOSEN') {"
            "select.value = 'CHOSEN'; select.dispatchEvent(new Event('change')); } })"
            ".observe(document.body, { attributeFilter: ['data-drawn'] })</script></body>"
        )
        page.write_text(page.read_text(encoding="utf-8").replace("</body>", choose.replace("CHOSEN", chosen)))
        document, said = open_in_chromium(page, tmp_path / "profile")
        assert said == []
        assert plots_in(document) == {"heat_map", "noise_floor", *FIGURES_OF_A_VARIANT} - {"losses"}

    def test_a_page_without_figures_opens_too(self, tmp_path):
        write_report(tmp_path, report([], {}))
        document, said = open_in_chromium(tmp_path / "report.html", tmp_path / "profile")
        assert said == []
        assert 'data-drawn="light"' in document
        assert plots_in(document) == set()


class TestTerminal:
    def printed(self, results: list[CheckResult], faults: list[dict[str, Any]]) -> str:
        console = Console(file=StringIO(), width=120, color_system=None)
        print_table(results, console, faults=faults)
        print_verdict(results, 71.25, console, faults=faults)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    def test_says_each_check_in_each_dtype_in_one_line_a_variant(self):
        results = [
            CheckResult("rope-mqa-full", dtype, check, error, 1e-1, True)
            for check in ("weights", "logits", "loss")
            for dtype, error in (("float64", 2e-15), ("float32", 3e-6), ("bfloat16", 4e-2))
        ]
        text = self.printed(results, [])
        row = next(line for line in text.splitlines() if line.startswith("rope-mqa-full"))
        assert row.split() == ["rope-mqa-full", "bitwise", *["2e-15", "3e-6", "4e-2"] * 2, "equal"]
        assert "faults" not in text
        assert text.endswith("all 9 checks passed in 71 s\n")

    def test_names_are_whole_and_what_few_variants_have_stands_below(self):
        names = [f"covering-{number:02}" for number in range(10)] + ["rope-gqa-window-moe"]
        results = [
            CheckResult(name, dtype, check, 1e-6, 1e-1, True)
            for name, dtype, check in product(names, BOUNDS, ("weights", "activations", "logits", "loss", "decode"))
        ]
        results += [CheckResult(names[-1], dtype, "segments", 7e-15, 1e-12, True) for dtype in BOUNDS]
        text = self.printed(results, [])
        assert all(any(line.startswith(name) for line in text.splitlines()) for name in names)
        assert "segments" not in next(line for line in text.splitlines() if line.startswith("variant"))
        assert "segments, in 1 of them: 7e-15 7e-15 7e-15\n" in text

    def test_says_how_many_faults_were_caught_and_which_were_not(self):
        faults = fabricated()["faults"]
        results = [CheckResult("rope-mqa-full", "float64", "logits", 2e-15, 1e-12, True)]
        assert "faults: 2 of 2 caught, 1 of 1 at the right site\n" in self.printed(results, faults[:2])
        text = self.printed(results, faults)
        assert "faults: 2 of 3 caught, 1 of 2 at the right site\n" in text
        assert "NOT CAUGHT tiny-eps, in learned-mha-full" in text
        assert text.endswith("1 of 3 planted faults NOT CAUGHT in 71 s\n")

    def test_says_how_many_choices_of_experts_differ_and_which_is_the_first(self, tmp_path):
        flip = "token (1, 11), block 1: experts {2, 3} against {2, 4}, margin 3e-02"
        rows = [("one", 0, ""), ("two", 3, flip), ("three", 1, "token (0, 0), block 0")]
        results = [
            CheckResult(name, "bfloat16", "routing", 0.0, 1e-9, True, measures=routing(100, found, first))
            for name, found, first in rows
        ] + [CheckResult("one", "float64", "routing", 0.0, 1e-9, True, measures=routing(100, 0, ""))]
        of_all = routing(50, 0, "") | {"least_margin": math.inf}
        results.append(CheckResult("one", "float32", "routing", 0.0, 1e-9, True, measures=of_all))
        text = self.printed(results, [])
        assert "choices of experts, float32: 0 of 50 differ (0.0%)\n" in text
        assert "choices of experts, float64: 0 of 100 differ (0.0%), by margins of 2e-03 at least\n" in text
        told = f"hoices of experts, bfloat16: 4 of 300 differ (1.3%); first in two: {flip}"
        assert f"c{told}\n" in text
        write_report(tmp_path, report(results, {}))
        assert f"C{told}." in (tmp_path / "report.md").read_text(encoding="utf-8")
        assert f"C{told}." in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_a_failure_says_where_and_why(self):
        results = [CheckResult("rope-mqa-full", "float32", "loss", float("nan"), 1e-6, False, reason="NaN in the loss")]
        assert "FAILED rope-mqa-full float32 loss, weights sharp: NaN in the loss\n" in self.printed(results, [])


def test_a_line_runs_again_with_the_implementations_of_its_run() -> None:
    case = {"variant": "rope-mqa-full", "dtype": "float32"}
    flags = "--jax-attention banded --torch-attention sdpa"
    again = rerun(case, {"command": f"parity check --out runs/parity {flags}"})
    assert again == f"parity check --variant rope-mqa-full --dtype float32 {flags}"
    assert rerun(case, {"command": "parity check"}) == "parity check --variant rope-mqa-full --dtype float32"
