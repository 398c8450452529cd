"""The report for CI systems: JUnit XML, a test case for each line and each planted fault."""

import json
import re
from pathlib import Path
from typing import Any

from junitparser import Failure, JUnitXml, TestCase, TestSuite

from gpt_core.files.writing import atomic_file
from parity.reports import summary

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(content: dict[str, Any], destination: Path) -> None:
    """Write a suite for each dtype, and one for the planted faults.

    Args:
        content: What `report.json` holds.
        destination: The .xml file.

    Raises:
        InputError: the file cannot be written.
    """
    report = JUnitXml("parity")
    for dtype in summary.dtypes_of(content):
        suite = _suite(dtype, content)
        for case in content["cases"]:
            if case["dtype"] == dtype:
                suite.add_testcase(_line(case, content))
        report.add_testsuite(suite)
    if content.get("faults"):
        suite = _suite("faults", content)
        for fault in content["faults"]:
            suite.add_testcase(_fault(fault))
        report.add_testsuite(suite)
    report.update_statistics()
    report.time = round(summary.number(content.get("seconds", 0)), 3)
    with atomic_file(destination) as temporary:
        report.write(str(temporary), pretty=True)


def _suite(name: str, content: dict[str, Any]) -> TestSuite:
    suite = TestSuite(f"parity.{name}")
    for key, value in content["environment"].items():
        suite.add_property(_xml(key), _xml(value if isinstance(value, str) else json.dumps(value)))
    return suite


def _line(case: summary.Case, content: dict[str, Any]) -> TestCase:
    origin = case.get("origin", "sharp")
    name = case["check"] if origin == "sharp" else f"{case['check']} [weights: {origin}]"
    test = TestCase(_xml(name), _xml(f"parity.{case['dtype']}.{case['variant']}"), case.get("seconds", 0.0))
    numbers = f"relative error {summary.short(case['relative_error'])} of {summary.short(case['tolerance'])} allowed"
    if case["passed"]:
        test.system_out = numbers
    else:
        test.result = [_failure(summary.why(case), case["check"], f"{numbers}\n{summary.rerun(case, content)}")]
    return test


def _fault(fault: summary.Case) -> TestCase:
    test = TestCase(_xml(fault["name"]), "parity.faults", 0.0)
    if summary.missed(fault):
        where = ", ".join(fault.get("missed_in") or [])
        message = "no check caught this planted fault" + (f" in {where}" if where else "")
        test.result = [_failure(message, "missed", f"{fault['imitates']}\n{summary.rerun_fault(fault)}")]
    else:
        margin, margin32 = (summary.short(fault.get(name)) for name in ("margin", "margin_float32"))
        test.system_out = _xml(f"caught by {fault['caught_by']}, margin {margin}, at the fp32 bound {margin32}")
    return test


def _failure(message: str, kind: str, text: str) -> Failure:
    failure = Failure(_xml(message), _xml(kind))
    failure.text = _xml(f"{message}\n{text}")
    return failure


def _xml(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)
