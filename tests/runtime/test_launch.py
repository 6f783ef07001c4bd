"""`launch_local_ranks` returns the run's own exit code, and no rank outlives a failure."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from usdm_megatron.runtime.launch import launch_local_ranks

MODULE = """
import os, sys, time
from pathlib import Path

directory, code = Path(sys.argv[1]), int(sys.argv[2])
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
(directory / f"started-{rank}").write_text(f"{os.getpid()} {world} {os.environ['MASTER_ADDR']} {sys.argv[3]}")
if rank == "1" or code == 0:
    while len(list(directory.glob("started-*"))) < int(world):
        time.sleep(0.01)
    sys.exit(code)
if code == 3:  # all ranks of a preempted run return 3
    sys.exit(3)
time.sleep(60)
(directory / f"survived-{rank}").write_text("")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_rank_of_a_test.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for name in (
        "OMP_NUM_THREADS",
        "GLOO_SOCKET_IFNAME",
    ):  # the launcher sets defaults of its own: undone here
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    return "a_rank_of_a_test"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("code", [0, 2, 3, 1])
def test_exit_code(code: int, module: str, tmp_path: Path) -> None:
    started_at = time.monotonic()
    assert launch_local_ranks(module, [str(tmp_path), str(code), "--a flag"], 2) == code
    assert time.monotonic() - started_at < 30, "the sibling was waited for instead of stopped"
    ranks = [(tmp_path / f"started-{rank}").read_text().split(" ", 3) for rank in range(2)]
    for pid, world, address, argument in ranks:
        assert (world, address, argument) == ("2", "127.0.0.1", "--a flag")
        assert not is_alive(int(pid))
    assert not list(tmp_path.glob("survived-*"))


def test_ranks_talk_over_the_loopback_and_share_the_cores(module: str, tmp_path: Path) -> None:
    launch_local_ranks(module, [str(tmp_path), "0", ""], 2)
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
