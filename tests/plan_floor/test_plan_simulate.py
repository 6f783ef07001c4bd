"""`plan --simulate`: the planned layout's ranks, built; their memory is what was planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from usdm_megatron.cli import main

LAYOUT = "tp=2,pp=2"


def plan(hf: Path, *more: str) -> list[str]:
    sizes = ["--world-size", "8", "--seq-length", "64", "--global-batch-size", "8"]
    return ["plan", "--model", str(hf), "--gpu", "a100-40gb", *sizes, "--layout", LAYOUT, *more]


def test_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = tiny.write_hf_model(tmp_path / "hf")
    assert main(plan(hf, "--simulate", "--json")) == 0
    built = json.loads(capsys.readouterr().out)
    assert main(plan(hf, "--json")) in (0, None)
    planned = json.loads(capsys.readouterr().out)
    (row,) = (
        entry
        for entry in planned["layouts"]
        if (entry["tp"], entry["pp"], entry["vpp"], entry["recompute"]) == (2, 2, 1, "none")
    )
    peaks = [rank["memory"]["peak"] / 2**30 for rank in built["ranks"] if rank["memory"]["peak"] is not None]
    assert len(built["ranks"]) == 8 and len(peaks) >= 4
    assert max(peaks) == pytest.approx(row["memory_gib"], rel=0.05)


@pytest.mark.parametrize(("rank", "problem"), [("9", "rank"), ("-1", "--simulate is -1"), ("some", "or all")])
def test_no_such_rank(tmp_path: Path, rank: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(plan(tiny.write_hf_model(tmp_path / "hf"), "--simulate", rank)) == 2
    assert problem in capsys.readouterr().err
