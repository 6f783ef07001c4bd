"""The fine-tuning benchmark runs: contestants train the same thing, and losses that differ are not timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.oldest import TRANSFORMERS_4

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LAYERS, HIDDEN, KV, R = 2, 64, 32, 4


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("sft")


@pytest.mark.skipif(TRANSFORMERS_4, reason="the peer is transformers 5's Trainer")
def test_table(sft: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = sft.Options(
        groups=("lora q v",),
        precisions=("fp32",),
        threads=(1,),
        repeats=1,
        compared=2,
        global_batch=4,
        r=R,
        lr=1e-2,
        shape=sft.Shape(LAYERS, HIDDEN, ffn=96, heads=4, kv_heads=2, window=100, text_ids=100, units=50),
        directory=tmp_path,
        json=tmp_path / "found.json",
    )
    sft.main(options)
    (table,) = json.loads((tmp_path / "found.json").read_text())["measured"]
    results = table["results"]
    names = ["ours", "padded", "flattened"]
    assert [one["name"] for one in results] == names
    parameters = LAYERS * R * (HIDDEN + HIDDEN + HIDDEN + KV)  # A and B of q, A and B of v
    adam_steps = LAYERS * 4  # a tensor each
    for one in results:
        assert one["trainable_parameters"] == parameters
        assert one["optimizer_bytes"] == 2 * 4 * parameters + 4 * adam_steps
        assert one["losses"] == pytest.approx(results[0]["losses"], rel=1e-5)
        assert one["step_peak_bytes"] > one["imported_bytes"] > 2**20
        assert one["wall_s"] > 0 and one["cpu_s"] > 0 and 0 < one["overhead"] < 1
    assert results[0]["losses"][0] != results[0]["losses"][2]
    printed = capsys.readouterr().out
    assert all(f"lora q v  {name} " in printed for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_losses_that_differ_are_not_timed(sft: ModuleType) -> None:
    def process(group: str, *losses: float) -> SimpleNamespace:
        return SimpleNamespace(group=group, name="one", turns=[SimpleNamespace(loss=loss) for loss in losses])

    same = [process("full", 5.0, 4.0), process("full", 5.0, 4.00003), process("lora", 5.0, 4.5)]
    sft.check_losses(same, 0, 1e-5)
    sft.check_losses(same, 1, 1e-5)  # after the first update groups differ
    for others, step in (
        (process("full", 5.0, 4.0001), 1),
        (process("lora", 5.001, 4.5), 0),
        (process("full", float("nan")), 0),
    ):
        with pytest.raises(AssertionError, match=f"step {step + 1}: {others.group}, one: loss"):
            sft.check_losses([*same, others], step, 1e-5)


def test_dialogs(sft: ModuleType) -> None:
    """Bos to eos, loss on what is said and on the agent's units, none on the user's."""
    vocabulary = sft.Shape().vocabulary
    dialogs = sft.make_dialogs(30, vocabulary)
    for ids, labels in zip(dialogs.ids, dialogs.labels, strict=True):
        assert (ids[0], ids[-1], labels[0], labels[-1]) == (vocabulary.bos_id, vocabulary.eos_id, -100, -100)
        trained = labels != -100
        np.testing.assert_array_equal(labels[trained], ids[trained])
        is_unit = ids >= vocabulary.first_unit_id
        runs = np.flatnonzero(np.diff(is_unit.astype(int)))
        assert len(runs) == 4
        assert not trained[: runs[1] + 1].any() and trained[runs[2] + 1 : runs[3] + 1].all()
    again = sft.make_dialogs(30, vocabulary)
    assert all(np.array_equal(a, b) for a, b in zip(dialogs.ids, again.ids, strict=True))
