"""`kill -9` of a rank in a real local run: the others end at once, and the run goes on bit-exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import Layout
from tests.training.test_resume import losses

LAYOUT = Layout(1, 2)
STEPS = 40
BOUND_S = 30  # from the kill to the launcher's end


def test_kill_of_a_rank(tiny_model: Any, tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "store", tiny.random_rows(4 * STEPS, 64))
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def config(run: Path) -> Any:
        return jobs.run_config(
            LAYOUT,
            data={"train_data_path": (str(store),)},
            checkpoint={
                "load": str(run),
                "save": str(run),
                "pretrained_checkpoint": str(tiny_model.root),
                "save_interval": 3,
            },
        )

    run_ranks(LAYOUT.ranks, jobs.train, config(whole))
    from usdm_megatron.config_file import dump_config

    (tmp_path / "run.yaml").write_text(dump_config(config(killed)))
    command = [sys.executable, "-m", "usdm_megatron.cli", "pretrain", "--config", str(tmp_path / "run.yaml")]
    launcher = subprocess.Popen(
        [*command, "--nproc-per-node", "2"], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_step(killed, 8, launcher)
        os.kill(max(ranks_of(launcher.pid)), signal.SIGKILL)
        killed_at = time.monotonic()
        code = launcher.wait(timeout=BOUND_S)
    finally:
        launcher.kill()
    assert code == 1
    assert time.monotonic() - killed_at < BOUND_S
    assert json.loads((killed / "exit.json").read_text())["code"] == 1
    reached = losses(killed)[-1][0]
    assert 8 <= reached < STEPS
    results = run_ranks(LAYOUT.ranks, jobs.train, config(killed))
    assert [result["code"] for result in results] == [0, 0]
    assert losses(killed) == losses(whole)
    assert json.loads((killed / "exit.json").read_text()) == {"code": 0, "reason": "done", "step": STEPS}


def wait_for_step(run: Path, step: int, launcher: Any) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the launcher's ranks."""
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(launcher)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in children.stdout.splitlines() if "usdm_megatron.cli" in line]
