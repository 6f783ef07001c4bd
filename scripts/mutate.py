#!/usr/bin/env python
"""Prove that the tests can fail: one named fault at a time in a copy of the repository, and its tests.

    python scripts/mutate.py                   every fault; exit 1 if one survives
    python scripts/mutate.py --only NAME ...   some of them
    python scripts/mutate.py --list            names, and what each one breaks
    python scripts/mutate.py --markdown        the table of tests/faults.md

The working tree is only read. A fault is caught when every test named for it fails by an assertion: a
crash of the broken copy (import error, a rank that raised) proves nothing and is reported as such. Each
fault is a silent one: the run goes on, and its numbers are wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mutations import FAULTS, Fault

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINE_TIMEOUT_S, FAULT_TIMEOUT_S = 900, 180


def apply_fault(fault: Fault, root: Path) -> None:
    """Edit the copy at `root`; raises `ValueError` unless the text occurs exactly once."""
    path = root / fault.file
    content = path.read_text(encoding="utf-8")
    if (found := content.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} occurs {found} times in {fault.file}, expected 1")
    path.write_text(content.replace(fault.old, fault.new), encoding="utf-8")


def markdown() -> str:
    """The table of `tests/faults.md`."""
    rows = ["| fault | file | caught by | why it is silent otherwise |", "| --- | --- | --- | --- |"]
    for fault in FAULTS:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in fault.tests)
        rows.append(f"| {fault.name} | `{fault.file}` | {tests} | {fault.why} |")
    return "\n".join(rows) + "\n"


def copy_repository(source_root: Path, target: Path) -> Path:
    """What the tests need, without caches; returns `target`."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
    for name in ("usdm_megatron", "tests"):
        shutil.copytree(source_root / name, target / name, ignore=ignore)
    shutil.copy2(source_root / "pyproject.toml", target)
    return target


@dataclass(frozen=True)
class TestRun:
    """`outcomes` by node id: "" for a pass, otherwise what pytest says of the failure."""

    outcomes: dict[str, str]
    output: str
    seconds: float


def run_tests(root: Path, tests: Sequence[str], timeout_s: float) -> TestRun:
    """Run these node ids in the copy at `root`, which is what gets imported, in ranks too."""
    report = root / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    started_at = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, text=True, timeout=timeout_s, capture_output=True
        )
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        output = f"no end after {timeout_s:.0f} s"
    outcomes = _outcomes(report) if report.exists() else {}
    return TestRun(outcomes, output, time.perf_counter() - started_at)


def _outcomes(report: Path) -> dict[str, str]:
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [*case.findall("failure"), *case.findall("error"), *case.findall("skipped")]
        node = case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", "")
        outcomes[node] = "\n".join(f"{p.tag}: {p.get('message')}\n{p.text}" for p in problems)
    return outcomes


def verdict(fault: Fault, run: TestRun) -> str:
    """`caught`, or why not."""
    for test in fault.tests:
        if test not in run.outcomes:
            return f"BROKEN: {test} did not run: {run.output[-300:]}"
        outcome = run.outcomes[test]
        if not outcome:
            return f"SURVIVED {test}"
        asserted = outcome.startswith("failure:") and re.search(r"\bassert\b|AssertionError", outcome)
        if not asserted or re.search(r"rank \d+ of \d+ failed|ranks died|did not finish in time", outcome):
            return f"BROKEN: {test} crashed instead of failing: {outcome[:600]}"
    return "caught"


def check_baseline(faults: Sequence[Fault], root: Path) -> bool:
    """Whether all named tests pass in the copy at `root`, without a fault."""
    tests = sorted({test for fault in faults for test in fault.tests})
    run = run_tests(root, tests, BASELINE_TIMEOUT_S)
    failed = [test for test in tests if run.outcomes.get(test, "did not run")]
    passed = len(tests) - len(failed)
    print(f"{passed} of {len(tests)} named tests pass without a fault ({run.seconds:.0f} s)\n")
    if failed:
        print(run.output[-4000:], *failed, "they must pass before they can catch a fault", sep="\n")
    return not failed


def inject(fault: Fault, snapshot: Path) -> bool:
    """Run one fault in a copy of `snapshot`, print a row; whether it was caught."""
    root = copy_repository(snapshot, snapshot.parent / fault.name)
    apply_fault(fault, root)
    run = run_tests(root, fault.tests, FAULT_TIMEOUT_S)
    shutil.rmtree(root)
    result = verdict(fault, run)
    print(f"| {fault.name:<40} | {len(fault.tests):>5} | {run.seconds:3.0f} s | {result} |", flush=True)
    return result == "caught"


def inject_all(faults: Sequence[Fault]) -> int:
    """The exit code of the whole run; one snapshot, so that edits meanwhile change nothing."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        snapshot = copy_repository(REPOSITORY, Path(directory) / "unmutated")
        if not check_baseline(faults, snapshot):
            return 1
        print(
            f"| {'fault':<40} | tests |  time | result |\n| {'-' * 40} | ----- | ----- | ------ |", flush=True
        )
        missed = [fault.name for fault in faults if not inject(fault, snapshot)]
    print(f"\n{len(faults) - len(missed)} of {len(faults)} faults caught", *missed, sep="\nnot caught: ")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--markdown", action="store_true", help="print the table of tests/faults.md and stop")
    options = parser.parse_args()
    if options.list or options.markdown:
        names = "".join(f"{fault.name:<42} {fault.why}\n" for fault in FAULTS)
        print(markdown() if options.markdown else names, end="")
        return 0
    return inject_all([fault for fault in FAULTS if not options.only or fault.name in options.only])


if __name__ == "__main__":
    sys.exit(main())
