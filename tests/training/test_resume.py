"""A run that was stopped and resumed is the run that was not: losses, weights, optimizer, row order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import Layout
from tests.training.test_oracle import train_lines
from usdm_megatron.checkpoint.store import load_full_tensors, single_process_group, stored_tensors

ROWS, SAVED_AT, STEPS = 46, 2, 12  # 46 rows in steps of 4: the last one is half empty


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    tiny.write_store(directory / "train", tiny.random_rows(ROWS, 64, seed=1))
    tiny.write_store(directory / "valid", tiny.random_rows(7, 64, seed=2))
    return directory


def config(layout: Layout, stores: Path, tiny_model: Any, run: Path, **sections: Any) -> Any:
    return jobs.run_config(
        layout,
        data={
            "train_data_path": (str(stores / "train"),),
            "valid_data_path": str(stores / "valid"),
            **sections.pop("data", {}),
        },
        optimizer={"lr_warmup_fraction": 0.1},
        training={"eval_interval": 5, **sections.pop("training", {})},
        checkpoint={
            "load": str(run),
            "save": str(run),
            "pretrained_checkpoint": str(tiny_model.root),
            "save_interval": 2,
            **sections.pop("checkpoint", {}),
        },
    )


def train(layout: Layout, *args: Any, **sections: Any) -> list[dict[str, Any]]:
    results = run_ranks(layout.ranks, jobs.train, config(layout, *args, **sections))
    assert [result["code"] for result in results] == [0] * layout.ranks
    return results


def killed_after(step: int, run: Path, copy: Path) -> None:
    """What a kill some steps after the checkpoint of `step` leaves behind."""
    shutil.copytree(run, copy)
    for directory in copy.glob("iter_*"):
        if int(directory.name[5:]) > step:
            shutil.rmtree(directory)
    (copy / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[: 2 * step + 6]) + "\n" + lines[-1][:30])
    shutil.copytree(copy / f"iter_{step:07d}", copy / f"iter_{step + 2:07d}.tmp-{'0' * 32}")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    with single_process_group():
        return load_full_tensors(directory, stored_tensors(directory))


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in train_lines(run)]


EXACT = [
    (Layout(), {}),
    (Layout(2, 2, sp=True), {}),
    (Layout(1, 1, 2), {}),
    (Layout(1, 2, 2), {}),
    (Layout(1, 2, vpp=3), {}),
    (Layout(1, 1, 2), {"training": {"bf16": True, "eval_interval": 5}}),
    (Layout(), {"data": {"shuffle": True}}),
]


@pytest.mark.parametrize(("layout", "sections"), EXACT, ids=str)
def test_resume_is_bit_exact(
    layout: Layout, sections: Any, stores: Path, tiny_model: Any, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    rows = train(layout, stores, tiny_model, whole, **json.loads(json.dumps(sections)))
    killed_after(SAVED_AT, whole, resumed)
    rows_again = train(layout, stores, tiny_model, resumed, **json.loads(json.dumps(sections)))
    assert len(losses(whole)) == STEPS
    assert losses(resumed) == losses(whole)  # ten further steps, every bit
    assert metrics(resumed, "eval") == metrics(whole, "eval")
    for again, first in zip(rows_again, rows, strict=True):
        assert again["ledger"] == {step: ids for step, ids in first["ledger"].items() if step >= SAVED_AT}
    expected, found = (tensors(run / f"iter_{STEPS:07d}") for run in (whole, resumed))
    assert found.keys() == expected.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not list(resumed.glob("*.tmp-*"))
    assert metrics(resumed, "event")[-1]["what"] == "resume"


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def serial_run(stores: Path, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("serial") / "run"
    train(Layout(), stores, tiny_model, run)
    return run


OTHER_LAYOUTS = [
    Layout(2, 2, sp=True), Layout(1, 1, 2), Layout(2, 1, 2), Layout(1, 2, vpp=3), Layout(1, 3),
    Layout(1, 2, 2, vpp=2, extra=(*jobs.chunks("Ett|t|t|ttL"), *jobs.OVERLAP, *jobs.NEAR_STAGES)),
]  # fmt: skip
UNEVEN = Layout(1, 3, extra=jobs.chunks("E|t*5|tL"))


@pytest.mark.parametrize("layout", OTHER_LAYOUTS, ids=str)
def test_resume_at_another_layout(
    layout: Layout, serial_run: Path, stores: Path, tiny_model: Any, tmp_path: Path
) -> None:
    """The same rows, every later loss within 1e-5: weights, moments, masters, Adam's step are resharded."""
    resumed = tmp_path / "run"
    killed_after(SAVED_AT, serial_run, resumed)
    micro_batch = 1 if layout.vpp > 1 and layout.dp > 1 else 2  # as many micro-batches as stages, at least
    results = train(layout, stores, tiny_model, resumed, data={"micro_batch_size": micro_batch})
    for (step, loss, norm), (again, loss_again, norm_again) in zip(
        losses(serial_run), losses(resumed), strict=True
    ):
        assert step == again
        assert loss_again == pytest.approx(loss, rel=1e-5)
        assert norm_again == pytest.approx(norm, rel=1e-4)
    rows = [row for step in range(SAVED_AT, STEPS) for row in rows_of(results, step)]
    assert rows == list(range(SAVED_AT * 4, ROWS))


def test_resume_of_an_uneven_pipeline_elsewhere(
    serial_run: Path, stores: Path, tiny_model: Any, tmp_path: Path
) -> None:
    """What stages of other sizes save belongs to the model's layers, not to the stages."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(UNEVEN, stores, tiny_model, first)
    expected, found = (tensors(run / f"iter_{STEPS:07d}") for run in (serial_run, first))
    assert {key: tensor.shape for key, tensor in found.items() if key != "random_state"} == {
        key: tensor.shape for key, tensor in expected.items() if key != "random_state"
    }
    killed_after(SAVED_AT, first, second)
    train(Layout(2, 2), stores, tiny_model, second)
    for (_, loss, _), (_, again, _) in zip(losses(serial_run), losses(second), strict=True):
        assert again == pytest.approx(loss, rel=1e-5)


def rows_of(results: list[dict[str, Any]], step: int) -> list[int]:
    """Rows that all ranks read in a step, empty ones and replicas dropped."""
    return sorted({row for result in results for row in result["ledger"][step] if row >= 0})


def test_ledger_is_the_stores_order_across_a_change_of_dp(
    stores: Path, tiny_model: Any, tmp_path: Path
) -> None:
    """Rows 0, 1, 2, … each read once by one data parallel rank, none skipped or repeated."""
    run = tmp_path / "run"
    first = train(Layout(1, 1, 2), stores, tiny_model, run, training={"train_iters": 5, "eval_interval": 5})
    second = train(Layout(1, 1, 4), stores, tiny_model, run)
    read = [
        sorted(row for result in results for row in result["ledger"].get(step, []) if row >= 0)
        for results, steps in ((first, range(5)), (second, range(5, STEPS)))
        for step in steps
    ]
    assert [row for rows in read for row in rows] == list(range(ROWS))
    assert read[-1] == [44, 45]


def test_a_finished_run_writes_nothing(serial_run: Path, stores: Path, tiny_model: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in serial_run.rglob("*") if path.is_file()}
    train(Layout(), stores, tiny_model, serial_run)
    assert {path: path.stat().st_mtime_ns for path in serial_run.rglob("*") if path.is_file()} == before


def test_a_bf16_start_does_not_jump(serial_run: Path, stores: Path, tiny_model: Any, tmp_path: Path) -> None:
    """Masters that keep the random start would undo the loaded weights at the first update."""
    run = tmp_path / "run"
    layout = Layout(1, 1, 2)
    started = config(
        layout, stores, tiny_model, run, training={"bf16": True, "eval_interval": 5}, data={"shuffle": False}
    )
    started = replace_checkpoint(started, pretrained_checkpoint=str(serial_run))
    results = run_ranks(layout.ranks, jobs.train, started)
    assert [result["code"] for result in results] == [0, 0]
    fp32 = tmp_path / "fp32"
    other = replace_checkpoint(
        config(layout, stores, tiny_model, fp32), pretrained_checkpoint=str(serial_run)
    )
    run_ranks(layout.ranks, jobs.train, other)
    for (_, ours, _), (_, expected, _) in zip(losses(run), losses(fp32), strict=True):
        assert ours == pytest.approx(expected, rel=5e-3)  # bf16's own noise; the jump is 5 % and more


def replace_checkpoint(run_config: Any, **fields: Any) -> Any:
    import dataclasses

    return dataclasses.replace(run_config, checkpoint=dataclasses.replace(run_config.checkpoint, **fields))


def test_damaged_newest_checkpoint_falls_back(
    serial_run: Path, stores: Path, tiny_model: Any, tmp_path: Path
) -> None:
    """A flipped byte in the newest checkpoint: the one before it is taken, and the log says why."""
    run = tmp_path / "run"
    killed_after(6, serial_run, run)
    damaged = next((run / "iter_0000006").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    train(Layout(), stores, tiny_model, run)
    assert losses(run) == losses(serial_run)
    skipped = [event for event in metrics(run, "event") if event["what"] == "skipped checkpoint"]
    assert skipped and "iter_0000006" in skipped[0]["path"] and damaged.name in skipped[0]["why"]


def test_overlapped_gathers_are_finished_before_a_save(stores: Path, tiny_model: Any, tmp_path: Path) -> None:
    """Core leaves them to the next forward pass; a checkpoint must not hold the weights of one step ago."""
    overlap = (("overlap_grad_reduce", True), ("overlap_param_gather", True))
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    train(Layout(1, 1, 2), stores, tiny_model, plain)
    train(Layout(1, 1, 2, extra=overlap), stores, tiny_model, overlapped)
    assert losses(overlapped) == losses(plain)
    for step in (SAVED_AT, STEPS):
        expected, found = (tensors(run / f"iter_{step:07d}") for run in (plain, overlapped))
        assert all(torch.equal(found[key], expected[key]) for key in expected), step
    resumed = tmp_path / "resumed"
    killed_after(SAVED_AT, overlapped, resumed)
    train(Layout(1, 1, 2, extra=overlap), stores, tiny_model, resumed)
    assert losses(resumed) == losses(plain)
