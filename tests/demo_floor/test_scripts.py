"""`examples/pretrain_usdm.sh` and `scripts/setup.sh` without training and without installing."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from usdm_megatron.demo.corpus import DIALOGS, UTTERANCES
from usdm_megatron.demo.settings import DEMO

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/pretrain_usdm.sh"
SETUP = ROOT / "scripts/setup.sh"
CLUSTER = (
    "NNODES",
    "GPUS_PER_NODE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CHECKPOINT",
    "DATA",
    "VALID_DATA",
)
OTHERS = (
    "OUT",
    "TP",
    "PP",
    "VPP",
    "HEALTH_CHECK",
    "DEVICE",
    "MIN_FREE_GIB",
    "MIN_BUS_GBS",
    "RECIPE",
    "EXTRA_ARGS",
    "PYTHON",
    "SLURM_NODEID",
    "USDM_PYTHON",
    "USDM_SKIP_SETUP",
)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (*CLUSTER, *OTHERS)}
    environment |= variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("*/*.sh")) + [ROOT / ".ci/run"], ids=lambda path: path.name
)
def test_every_script_parses(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_the_demo_passes_the_settings_that_the_corpus_was_made_for() -> None:
    demo = EXAMPLE.read_text(encoding="utf-8").partition("cluster() {")[0]

    def numbers(flag: str) -> list[float]:
        return [float(value) for value in re.findall(rf"--{flag} ([0-9.e-]+)", demo)]

    assert numbers("seq-length") == [DEMO.seq_length] * 2
    assert numbers("epochs") == [DEMO.epochs]
    assert f"--split {1 - DEMO.heldout_share},{DEMO.heldout_share}" in demo
    assert f"/{UTTERANCES}" in demo and f"/{DIALOGS}" in demo
    assert numbers("global-batch-size") == [DEMO.global_batch_size]
    assert numbers("micro-batch-size") == [DEMO.micro_batch_size]
    assert numbers("lr") == [DEMO.lr]
    assert numbers("lr-warmup-iters") == [DEMO.lr_warmup_iters]
    assert numbers("lr-decay-iters") == [DEMO.train_iters]
    assert numbers("train-iters") == [DEMO.train_iters // 2, DEMO.train_iters]
    assert numbers("save-interval") == [DEMO.train_iters // 2]


def test_arguments_are_refused() -> None:
    result = run("bash", str(EXAMPLE), "--help")
    assert result.returncode == 2
    assert "variables" in result.stderr


def test_a_cluster_run_names_all_that_is_not_set() -> None:
    result = run("bash", str(EXAMPLE), NNODES="2")
    assert result.returncode == 2
    for name in ("CHECKPOINT", "DATA", "OUT", "MASTER_ADDR", "NODE_RANK"):
        assert f"{name} is not set" in result.stderr


def test_a_cluster_run_names_the_commands_that_make_what_is_missing(tmp_path: Path) -> None:
    result = run("bash", str(EXAMPLE), **cluster_variables(tmp_path))
    assert result.returncode == 2
    assert "tools/convert_hf_checkpoint.py import" in result.stderr
    assert "tools/preprocess_data.py cache" in result.stderr
    assert "set-up" not in result.stderr


def cluster_variables(directory: Path, **more: str) -> dict[str, str]:
    return {
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "head",
        "CHECKPOINT": str(directory / "checkpoint"),
        "DATA": str(directory / "data_train"),
        "OUT": str(directory / "run"),
        "HEALTH_CHECK": "0",
        **more,
    }


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A converted checkpoint and a store, as far as the script looks at them."""
    for name in ("checkpoint", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "data_train.idx").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("launcher", "exit_json", "expected"),
    [
        (0, '{"code": 0, "reason": "done", "step": 5}', 0),
        (1, '{"code": 3, "reason": "preempted", "step": 5}', 3),
        (1, '{"code": 2, "reason": "wrong", "step": null}', 2),
        (1, '{"code": 0, "reason": "done", "step": 5}', 1),  # torchrun failed after the run had ended
        (1, None, 1),
    ],
)
def test_the_exit_code_is_the_runs_own(
    prepared: Path, launcher: int, exit_json: str | None, expected: int
) -> None:
    write = "" if exit_json is None else f"printf '%s\\n' '{exit_json}' >{prepared}/run/exit.json"
    python = executable(
        prepared / "python",
        "#!/usr/bin/env bash\n"
        f'echo "$*" >>{prepared}/calls\n'
        'case "$*" in *--dry-run*) exit 0 ;; esac\n'
        f"sleep 0.1\n{write}\nexit {launcher}\n",
    )
    (prepared / "run/exit.json").write_text('{"code": 3}')  # an earlier start's
    os.utime(prepared / "run/exit.json", (1, 1))
    result = run(
        "bash",
        str(EXAMPLE),
        PYTHON=str(python),
        **cluster_variables(prepared, NODE_RANK="0", EXTRA_ARGS="--shuffle"),
    )
    assert result.returncode == expected, result.stderr
    dry_run, launch = (prepared / "calls").read_text().splitlines()
    assert dry_run.endswith("--dry-run --world-size 16")
    assert "--nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr head" in launch
    assert "--global-batch-size 1024" in launch and launch.endswith("--use-tp-pp-dp-mapping --shuffle")


def test_wrong_input_ends_before_the_launch(prepared: Path) -> None:
    python = executable(
        prepared / "python",
        f'#!/usr/bin/env bash\necho "$*" >>{prepared}/calls\necho error: wrong >&2\nexit 2\n',
    )
    result = run("bash", str(EXAMPLE), PYTHON=str(python), **cluster_variables(prepared, NODE_RANK="0"))
    assert result.returncode == 2
    assert len((prepared / "calls").read_text().splitlines()) == 1


def test_one_node_checks_for_all(prepared: Path) -> None:
    """The check reads every byte of the checkpoint: 64 nodes must not all do so."""
    python = executable(prepared / "python", f'#!/usr/bin/env bash\necho "$*" >>{prepared}/calls\nexit 0\n')
    result = run("bash", str(EXAMPLE), PYTHON=str(python), **cluster_variables(prepared, NODE_RANK="1"))
    assert result.returncode == 0, result.stderr
    (launch,) = (prepared / "calls").read_text().splitlines()
    assert "--node-rank 1" in launch and "--dry-run" not in launch


@pytest.mark.parametrize(("healthy", "code"), [(True, 0), (False, 1)])
def test_machines_are_checked_first(prepared: Path, healthy: bool, code: int) -> None:
    """By the ranks of the run, on a port of their own; where one is not well, no rank trains."""
    python = executable(
        prepared / "python",
        f'#!/usr/bin/env bash\necho "$*" >>{prepared}/calls\n'
        f'case "$*" in *--check*) exit {int(not healthy)} ;; esac\n',
    )
    variables = cluster_variables(prepared, HEALTH_CHECK="1", MASTER_PORT="3000", MIN_BUS_GBS="150")
    result = run("bash", str(EXAMPLE), PYTHON=str(python), **variables)
    assert result.returncode == code, result.stderr
    check, *launch = (prepared / "calls").read_text().splitlines()
    where = "-m torch.distributed.run --nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr head"
    assert check == (
        f"{where} --master-port 3001 -m usdm_megatron.cli inspect env --check --path {prepared}/run "
        "--device cuda --min-free-gib 200 --min-bus-gbs 150"
    )
    assert [
        line.startswith(f"{where} --master-port 3000 -m usdm_megatron.cli pretrain") for line in launch
    ] == ([True] * healthy)


def test_a_stop_signal_reaches_the_launcher(prepared: Path) -> None:
    python = executable(
        prepared / "python",
        "#!/usr/bin/env bash\n"
        'case "$*" in *--dry-run*) exit 0 ;; esac\n'
        f'trap \'echo "{{\\"code\\": 3}}" >{prepared}/run/exit.json; exit 1\' TERM\n'
        f"touch {prepared}/started\nwhile true; do sleep 0.05; done\n",
    )
    environment = os.environ | cluster_variables(prepared) | {"PYTHON": str(python)}
    process = subprocess.Popen(["bash", str(EXAMPLE)], env=environment, cwd=ROOT)
    try:
        for _ in range(400):
            if (prepared / "started").exists():
                break
            subprocess.run(["sleep", "0.05"])
        process.terminate()
        assert process.wait(timeout=20) == 3
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("slow", "signalled"),
    [
        ('trap() { builtin trap "$@"; sleep 0.3; }', False),  # ended before anyone waits for it
        ('wait() { sleep 0.3; builtin wait "$@"; }', False),
        ('kill() { builtin kill "$@"; sleep 0.3; }', True),  # ended while the signal is passed on
        ('wait() { builtin wait "$@" && return; local c=$?; sleep 0.3; return $c; }', True),
    ],
)
def test_the_code_of_a_child_that_ends_early_is_its_own(slow: str, signalled: bool) -> None:
    child = "trap 'exit 5' TERM; kill -TERM $PPID; while true; do sleep 0.02; done" if signalled else "exit 5"
    script = f'set -euo pipefail; source scripts/launch.sh; {slow}; launch_wait bash -c "$0"'
    assert run("bash", "-c", script, child).returncode == 5


def base_python(path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The interpreter that set-up would make `.venv` from, found on `path`."""
    script = f'source {SETUP} >/dev/null 2>&1; PATH="{path}"; _usdm_base_python'
    return run("bash", "-c", script, USDM_SKIP_SETUP="1", **variables)


def test_the_first_usable_interpreter_is_chosen(tmp_path: Path) -> None:
    too_old = '#!/bin/sh\ncase "$2" in *version_info*) exit 1 ;; esac\n'
    executable(tmp_path / "python3", too_old)
    (tmp_path / "python3.11").symlink_to(sys.executable)
    result = base_python(f"{tmp_path}:/nowhere")
    assert (result.returncode, result.stdout) == (0, "python3.11\n")
    assert base_python(str(tmp_path), USDM_PYTHON=sys.executable).stdout == f"{sys.executable}\n"


def test_no_usable_interpreter_is_said_clearly(tmp_path: Path) -> None:
    executable(tmp_path / "python3", "#!/bin/sh\nexit 1\n")
    result = base_python(str(tmp_path))
    assert result.returncode == 1
    assert "no Python >= 3.10" in result.stderr


def test_an_unknown_set_is_refused() -> None:
    result = run("bash", str(SETUP), "everything")
    assert result.returncode == 2
    assert "demo or dev" in result.stderr
