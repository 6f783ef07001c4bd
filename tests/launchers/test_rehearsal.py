"""The start of several nodes, rehearsed on one machine: real ranks, stand-ins for ssh and Slurm."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.launchers.test_cluster_scripts import LAUNCH_VARIABLES, ROOT
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.test_resume import losses

STEPS = 100
pytestmark = pytest.mark.timeout(600)  # two launches each, with all that a start checks
STAND_INS = {
    # a host is a shell
    "ssh": 'while [[ "$1" == -* ]]; do shift 2; done\nshift\nexec bash -c "$*"\n',
    # a task is a process; the first that fails ends the step
    "srun": """
nodes=1 tasks=${SLURM_NTASKS:-1}
while [[ "$1" == -* ]]; do
    case "$1" in
        --nodes) nodes=$2 && shift ;;
        --ntasks) tasks=$2 && shift ;;
        --ntasks-per-node) shift ;;
    esac
    shift
done
started=()
for ((task = 0; task < tasks; task++)); do
    env SLURM_PROCID=$task SLURM_NTASKS=$tasks SLURM_LOCALID=$((task % (tasks / nodes))) "$@" &
    started+=($!)
done
trap 'kill -TERM "${started[@]}" 2>/dev/null' TERM
code=0
for process in "${started[@]}"; do
    wait "$process" || code=$?
done
exit $code
""",
    "scontrol": """
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >>"$REQUEUED" ;;
esac
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a run on two nodes with one rank each: a tiny model, a store of `STEPS` steps."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (programs / name).chmod(0o755)
    hf = tiny.write_hf_model(tmp_path / "hf")
    tiny.write_checkpoint(hf, tmp_path / "checkpoint")
    store = tiny.write_store(tmp_path / "store", tiny.random_rows(4 * STEPS, 64))
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCH_VARIABLES and not name.startswith("SLURM_")
    }
    return clean | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "GPUS_PER_NODE": "1",
        "MASTER_PORT": str(20_000 + os.getpid() % 10_000),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CHECKPOINT": str(tmp_path / "checkpoint"),
        "DATA": str(store),
        "OUT": str(tmp_path / "run"),
        "TP": "1",
        "PP": "2",
        "VPP": "1",
        "DEVICE": "cpu",
        "MIN_FREE_GIB": "0.1",
        "EXTRA_ARGS": "--seq-length 64 --global-batch-size 4 --no-bf16 --save-interval 10",
    }


@contextmanager
def started(script: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        ["bash", str(ROOT / script)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(run: Path) -> list[int]:
    """Process ids of the ranks that write to `run`."""
    listed = subprocess.run(
        ["ps", "-e", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True
    )
    processes = (line.split(maxsplit=2) for line in listed.stdout.splitlines())
    return [
        int(pid) for pid, program, *rest in processes if "python" in program and f"--save {run}" in str(rest)
    ]


def finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def assert_equals_one_launch(run: Path, work: Path) -> None:
    """The losses of the whole run, step by step, are those of two ranks that nothing interrupted."""
    from usdm_megatron.config_file import load_config

    config = load_config(run / "run_config.yaml")
    alone = str(work / "alone")
    checkpoint = dataclasses.replace(config.checkpoint, load=alone, save=alone)
    logging = dataclasses.replace(config.logging, tensorboard_dir=None)
    run_ranks(2, jobs.train, dataclasses.replace(config, checkpoint=checkpoint, logging=logging))
    assert losses(run) == losses(Path(alone))
    assert len(losses(run)) == STEPS


def test_two_hosts_stopped_and_started_again(cluster: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = cluster | {"HOSTS": "127.0.0.1 node1", "MASTER_ADDR": "127.0.0.1"}
    with started("examples/cluster/torchrun.sh", environment) as process:
        wait_for_step(run, 3, process)
        process.send_signal(signal.SIGTERM)
        output = finish(process, code=3)
    assert "2 ranks on 1 hosts" in output and "  ok    shared directory" in output
    reached = len(losses(run))
    assert 3 <= reached < STEPS
    with started("examples/cluster/torchrun.sh", environment) as process:
        finish(process, code=0)
    assert_equals_one_launch(run, tmp_path)


def test_slurm_requeues_what_it_stopped(cluster: dict[str, str], tmp_path: Path) -> None:
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    environment = cluster | {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "REQUEUED": str(requeued),
    }
    ours = "examples/cluster/slurm.sbatch"
    with started(ours, environment) as process:
        wait_for_step(run, 3, process)
        ranks = ranks_of(run)
        assert len(ranks) == 2
        for rank in ranks:  # as --signal=TERM@300 does
            os.kill(rank, signal.SIGTERM)
        output = finish(process, code=3)
    assert "2 ranks on 1 hosts" in output and "  ok    shared directory" in output
    assert requeued.read_text() == "7\n"
    with started(ours, environment) as process:
        finish(process, code=0)
    assert requeued.read_text() == "7\n"
    assert_equals_one_launch(run, tmp_path)


def test_machines_are_checked_before_a_run(cluster: dict[str, Any], tmp_path: Path) -> None:
    environment = cluster | {"HOSTS": "127.0.0.1 node1", "MASTER_ADDR": "127.0.0.1", "DEVICE": "cuda"}
    with started("examples/cluster/torchrun.sh", environment) as process:
        assert "  FAIL  gpus              none: ranks run on the CPU" in finish(process, code=1)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_wrong_input_ends_all_hosts(cluster: dict[str, Any], tmp_path: Path) -> None:
    environment = cluster | {"HOSTS": "127.0.0.1 node1", "MASTER_ADDR": "127.0.0.1"}
    with started("examples/cluster/torchrun.sh", environment | {"EXTRA_ARGS": "--lr -1"}) as process:
        assert "lr is -1.0; it must not be negative" in finish(process, code=2)
    assert not (tmp_path / "run/metrics.jsonl").exists()
