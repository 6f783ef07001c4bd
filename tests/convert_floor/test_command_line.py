"""`tools/convert_hf_checkpoint.py` from a checkout: what it prints, its exit codes, how fast it helps."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from usdm_megatron.cli.convert import main
from usdm_megatron.cli.entry import run_guarded

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_hf_checkpoint.py"


def run_tool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


def test_help_works_from_anywhere_and_waits_for_nothing(tmp_path: Path) -> None:
    started_at = time.perf_counter()
    done = run_tool("import", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--extend-vocab" in done.stdout
    assert time.perf_counter() - started_at < 5  # torch alone takes longer on a busy machine
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, usdm_megatron.cli.convert; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=TOOL.parents[1],
    )
    assert modules.stdout.strip() == "False"


def test_a_user_error_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    done = run_tool("export", "--load", "nowhere", "--hf-path", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: nowhere is not a directory"
    assert "Traceback" not in done.stderr


def test_unknown_flags_are_errors_with_a_suggestion(tmp_path: Path) -> None:
    done = run_tool("import", "--hf-path", "a", "--save", "b", "--extend-vocabulary", "usdm", cwd=tmp_path)
    assert done.returncode == 2 and "--extend-vocab" in done.stderr


def test_import_export_verify(
    small_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, checkpoint, target = str(small_model()), str(tmp_path / "ck"), str(tmp_path / "hf")
    assert run_guarded(main, ["import", "--hf-path", source, "--save", checkpoint]) == 0
    assert run_guarded(main, ["export", "--load", checkpoint, "--hf_path", target]) == 0  # snake case too
    assert run_guarded(main, ["verify", "--hf-path", target, "--load", checkpoint, "--mode", "weights"]) == 0
    out = capsys.readouterr().out
    assert f"{checkpoint}/release: 30 tensors mapped, 3 layers, 77 ids, fp32" in out
    assert f"{target}: from {checkpoint}/release, 30 tensors in 1 file, fp32" in out
    assert "30 tensors, every value equal" in out
    assert run_guarded(main, ["import", "--hf-path", source, "--save", checkpoint]) == 2
    assert "--overwrite" in capsys.readouterr().err
