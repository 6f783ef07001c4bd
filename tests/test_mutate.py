"""The fault table of scripts/mutate.py fits the tree, without running it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


sys.path.insert(0, str(REPOSITORY / "scripts"))  # as a script is started
mutate: Any = importlib.import_module("mutate")


@pytest.mark.parametrize("fault", mutate.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_one_edit_that_still_compiles(fault: Any, tmp_path: Path) -> None:
    """Code that moved must move its fault too: rewrite `old`, and see that the tests still catch it."""
    content = (REPOSITORY / fault.file).read_text(encoding="utf-8")
    copy = tmp_path / fault.file
    copy.parent.mkdir(parents=True)
    copy.write_text(content, encoding="utf-8")
    mutate.apply_fault(fault, tmp_path)
    assert copy.read_text(encoding="utf-8") != content
    compile(copy.read_text(encoding="utf-8"), fault.file, "exec")
    assert fault.tests and fault.why


def test_text_that_is_not_there_once_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    for old, count in (("a = 1", 2), ("b = 1", 0)):
        fault = mutate.Fault("twice", "code.py", old, "a = 2", ("t",), "because")
        with pytest.raises(ValueError, match=f"twice: .* occurs {count} times in code.py, expected 1"):
            mutate.apply_fault(fault, tmp_path)


def test_names_are_unique() -> None:
    names = [fault.name for fault in mutate.FAULTS]
    assert len(set(names)) == len(names)


def test_the_named_tests_exist() -> None:
    """Parametrised ids too: pytest itself is asked."""
    tests = sorted({test for fault in mutate.FAULTS for test in fault.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(tests) <= set(done.stdout.splitlines())


def test_faults_md_is_the_scripts_table() -> None:
    written = (REPOSITORY / "tests" / "faults.md").read_text(encoding="utf-8")
    assert mutate.markdown() in written, "run `python scripts/mutate.py --markdown` and put the table there"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("", "SURVIVED t"),
        ("failure: AssertionError: the loss is 2.0\n> assert 1 == 2", "caught"),
        ("failure: AssertionError: Tensor-likes are not close!", "caught"),
        ("failure: NameError: name 'x' is not defined", "BROKEN: t crashed"),
        ("failure: AssertionError: rank 0 of 2 failed:\nTypeError: …", "BROKEN: t crashed"),
        ("failure: AssertionError: ranks [1] of 2 did not finish in time", "BROKEN: t crashed"),
        ("error: failed on setup with AssertionError", "BROKEN: t crashed"),
        ("skipped: no GPU", "BROKEN: t crashed"),
    ],
)
def test_only_an_assertion_of_the_test_itself_catches(outcome: str, expected: str) -> None:
    fault = mutate.Fault("f", "f.py", "a", "b", ("t",), "because")
    assert mutate.verdict(fault, mutate.TestRun({"t": outcome}, "", 1.0)).startswith(expected)
    assert mutate.verdict(fault, mutate.TestRun({}, "usage", 1.0)).startswith("BROKEN: t did not run")
