"""`examples/sft_usdm.sh` and `scripts/launch.sh` without training."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from usdm_megatron.cli.sft import parse

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/sft_usdm.sh"
VARIABLES = (
    "NNODES", "GPUS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CHECKPOINT", "DATA", "VALID_DATA",
    "OUT", "TP", "PP", "RECIPE", "EPOCHS", "GLOBAL_BATCH_SIZE", "EXTRA_ARGS", "PYTHON", "SLURM_NODEID",
)  # fmt: skip


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A pre-training run and a store, as far as the script looks at them."""
    for name in ("pretrained", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "pretrained/latest_checkpointed_iteration.txt").write_text("20")
    (tmp_path / "dialogs_train.idx").touch()
    return tmp_path


def variables(directory: Path, **more: str) -> dict[str, str]:
    return {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "head",
        "CHECKPOINT": str(directory / "pretrained"),
        "DATA": str(directory / "dialogs_train"),
        "OUT": str(directory / "run"),
        **more,
    }


def stand_in(directory: Path, launch: str, dry_run: str = "exit 0") -> str:
    """A `python` that writes down how it is called."""
    path = directory / "python"
    path.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>{directory}/calls\n'
        f'case "$*" in *--dry-run*) {dry_run} ;; esac\n{launch}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_it_names_all_that_is_not_set() -> None:
    result = run(NNODES="2")
    assert result.returncode == 2
    for name in ("CHECKPOINT", "DATA", "OUT", "MASTER_ADDR", "NODE_RANK"):
        assert f"{name} is not set" in result.stderr
    assert run("--help").returncode == 2


def test_it_names_the_commands_that_make_what_is_missing(tmp_path: Path) -> None:
    result = run(**variables(tmp_path))
    assert result.returncode == 2
    for command in ("convert_hf_checkpoint.py import", "preprocess_data.py sft", "preprocess_data.py dialog"):
        assert f"python tools/{command}" in result.stderr


@pytest.mark.parametrize(
    ("launcher", "exit_json", "expected"),
    [
        (0, '{"code": 0, "step": 5}', 0),
        (1, '{"code": 3, "step": 5}', 3),
        (1, '{"code": 0, "step": 5}', 1),
        (1, None, 1),
    ],
)
def test_the_exit_code_is_the_runs_own(
    prepared: Path, launcher: int, exit_json: str | None, expected: int
) -> None:
    write = "" if exit_json is None else f"printf '%s' '{exit_json}' >{prepared}/run/exit.json"
    python = stand_in(prepared, f"sleep 0.1\n{write}\nexit {launcher}")
    (prepared / "run/exit.json").write_text('{"code": 3}')  # an earlier start's
    os.utime(prepared / "run/exit.json", (1, 1))
    result = run(PYTHON=python, **variables(prepared, EXTRA_ARGS="--keep-best"))
    assert result.returncode == expected, result.stderr
    dry_run, launch = (prepared / "calls").read_text().splitlines()
    assert dry_run.endswith("--dry-run --world-size 16")
    assert "--nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr head" in launch
    _, config = parse(launch.split("-m usdm_megatron.cli sft ")[1].split())
    assert (config.recipe, config.training.num_train_epochs, config.checkpoint.keep_best) == ("usdm", 1, True)
    data = config.data
    assert (data.global_batch_size, data.micro_batch_size, data.shuffle) == (64, 2, True)


def test_wrong_input_ends_before_the_launch(prepared: Path) -> None:
    python = stand_in(prepared, "exit 0", dry_run="echo error: wrong >&2; exit 2")
    result = run(PYTHON=python, **variables(prepared))
    assert (result.returncode, result.stderr) == (2, "error: wrong\n")
    assert len((prepared / "calls").read_text().splitlines()) == 1


def test_a_stop_signal_reaches_the_launcher(prepared: Path) -> None:
    python = stand_in(
        prepared,
        f'trap \'echo "{{\\"code\\": 3}}" >{prepared}/run/exit.json; exit 1\' TERM\n'
        f"touch {prepared}/started\nwhile true; do sleep 0.05; done",
    )
    process = subprocess.Popen(
        ["bash", str(SCRIPT)], env=os.environ | variables(prepared, PYTHON=python), cwd=ROOT
    )
    try:
        for _ in range(400):
            if (prepared / "started").exists():
                break
            subprocess.run(["sleep", "0.05"])
        process.terminate()
        assert process.wait(timeout=20) == 3
    finally:
        process.kill()
