"""The benchmarks of the data path run: tiny input, results compared with the peers', every line printed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TABLES = {
    "packed": [("1 worker", "packed (ours)"), ("1 worker", "stage 4 (original)")],
    "cache": [
        ("1 worker", "cache (ours)"),
        ("1 worker", "IndexedDatasetBuilder, list"),
        ("1 worker", "IndexedDatasetBuilder, list, synced"),
        ("1 worker", "IndexedDatasetBuilder, numpy"),
        ("1 worker", "IndexedDatasetBuilder, numpy, synced"),
    ],
    "speech-text": [("1 worker", "30 utterances x 2")],
    "read": [
        ("open", "TokenStore (ours)"),
        ("open", "IndexedDataset"),
        ("open", "GPTDataset, builds its index"),
        ("open", "GPTDataset, index built before"),
        ("in order", "TokenStore.row (ours)"),
        ("in order", "IndexedDataset.get"),
        ("micro-batch", "build_packed_batch (ours)"),
        ("micro-batch", "GPTDataset"),
        ("micro-batch", "GPTDataset, positions restart"),
    ],
}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("data")


@pytest.mark.parametrize("table", TABLES)
def test_table(table: str, data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = data.Options(
        tables=(table,),
        tokens=20_000,
        workers=(1,),
        utterances=30,
        read_tokens=50_000,
        batch_tokens=20_000,
        seq_length=1024,
        repeats=1,
        directory=tmp_path,
        json=tmp_path / "found.json",
    )
    data.main(options)
    measured = json.loads((tmp_path / "found.json").read_text())["measured"][table]
    assert [(one["group"], one["name"]) for one in measured] == TABLES[table]
    assert all(one["wall_s"] > 0 and one["cpu_s"] >= 0 for one in measured)
    assert all(one["tokens"] >= 10_000 for one in measured if one["group"] != "open")
    printed = capsys.readouterr().out
    assert all(name in printed for _, name in TABLES[table])
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_results_that_differ_are_not_timed(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("data_peers"), "_to_ids", lambda row: {"input_ids": [1, 2]})
    options = data.Options(tokens=5000, workers=(1,), seq_length=512)
    with pytest.raises(AssertionError):
        data.packed(options, tmp_path)


def test_turns(data: ModuleType) -> None:
    side_by_side = importlib.import_module("side_by_side")
    turns: list[str] = []
    contestants = [
        side_by_side.Contestant("group", name, lambda name=name: turns.append(name), tokens)
        for name, tokens in (("ours", 10), ("peer", 20))
    ]
    ours, peer = side_by_side.measure(contestants, repeats=3)
    assert turns == ["ours", "peer"] * 3
    assert (ours.tokens, peer.tokens) == (10, 20)


def test_ratio_is_by_token(data: ModuleType) -> None:
    measured = importlib.import_module("side_by_side").Measured
    ours, peer = measured("group", "ours", 100, 1.0, 1.0), measured("group", "peer", 50, 4.0, 4.0)
    assert peer.times_as_slow_as(ours) == 8
    assert peer.line(ours).endswith("8.00x")
    assert not ours.line(ours).endswith("x")


def test_packing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    packing = importlib.import_module("packing")
    packing.main(packing.Options(samples=2000, repeats=1, json=tmp_path / "found.json"))
    assert "best-fit (ours)" in json.loads((tmp_path / "found.json").read_text())["measured"]
    assert "% full" in capsys.readouterr().out
