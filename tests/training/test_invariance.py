"""Under `corrected`, loss and gradients depend on the rows alone: not on TP, DP, MBS, accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs, reference
from tests.training.jobs import NEAR_STAGES, OVERLAP, Layout
from tests.training.test_model_parity import hf_tensors

# rows of very different numbers of targets, one of them nothing but padding
ROWS = [
    *tiny.random_rows(2, 64, seed=3),
    [[1, 7, 2]],
    None,
    *tiny.random_rows(3, 64, seed=4),
    [[1, 9, 8, 7, 2], [1, 2]],
]
NO_CLIP = {"clip_grad": 0.0}


def gradients(
    layout: Layout, tiny_model: Any, output: Path, rows: Any, micro_batch: int = 1, **job: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    options = {
        "data": {"micro_batch_size": micro_batch, "global_batch_size": len(rows)},
        "optimizer": NO_CLIP,
    }
    arguments = (
        layout,
        tiny_model.release,
        output,
        rows,
        options,
        job.get("loss_samples"),
        job.get("pad_value"),
    )
    results = run_ranks(layout.ranks, jobs.gradients, *arguments)
    assert all(result == results[0] for result in results), "ranks disagree on the loss or the norm"
    return results[0], hf_tensors(output / "iter_0000001")


@pytest.fixture(scope="module")
def serial(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gradients(Layout(), tiny_model, tmp_path_factory.mktemp("serial"), ROWS)


def assert_same(ours: Any, expected: Any) -> None:
    assert ours[0]["targets"] == expected[0]["targets"]
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert ours[0]["norm"] == pytest.approx(expected[0]["norm"], rel=1e-5)
    for name, gradient in expected[1].items():
        assert (ours[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


CASES = [
    (Layout(), 2), (Layout(), 8), (Layout(2), 1), (Layout(2, sp=True), 4),
    (Layout(1, 1, 2), 1), (Layout(1, 1, 2), 4),
    (Layout(1, 1, 4), 2), (Layout(1, 2, 2), 1), (Layout(2, 1, 2, sp=True), 2),
    (Layout(1, 1, 2, extra=OVERLAP), 2), (Layout(1, 2, 2, vpp=3, extra=(*OVERLAP, *NEAR_STAGES)), 2),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "micro_batch"), CASES, ids=str)
def test_loss_and_gradients_do_not_depend_on(
    layout: Layout, micro_batch: int, serial: Any, tiny_model: Any, tmp_path: Path
) -> None:
    assert_same(gradients(layout, tiny_model, tmp_path, ROWS, micro_batch), serial)


def test_a_masked_row_adds_nothing(serial: Any, tiny_model: Any, tmp_path: Path) -> None:
    assert None in ROWS
    assert_same(gradients(Layout(), tiny_model, tmp_path, [row for row in ROWS if row is not None]), serial)


@pytest.mark.parametrize("layout", [Layout(), Layout(2), Layout(2, sp=True)], ids=str)
def test_padding_of_the_vocabulary_adds_nothing(
    layout: Layout, serial: Any, tiny_model: Any, tmp_path: Path
) -> None:
    """Weights of 1e4 in the padding rows would own the softmax if they were in it."""
    assert_same(gradients(layout, tiny_model, tmp_path, ROWS, pad_value=1e4), serial)


@pytest.mark.parametrize(
    ("layout", "micro_batch"), [(Layout(), 1), (Layout(), 2), (Layout(1, 2, 2), 2)], ids=str
)
def test_original_objective_counts_a_masked_micro_batch_as_zero(
    layout: Layout, micro_batch: int, tiny_model: Any, tmp_path: Path
) -> None:
    """`--recipe usdm`: the mean over all micro-batches of their token means, empty ones with 0."""
    rows = [*ROWS[:3], None, None, None, *ROWS[4:6]]
    options = {
        "recipe": "usdm",
        "data": {"micro_batch_size": micro_batch, "global_batch_size": len(rows)},
    }
    results = run_ranks(layout.ranks, jobs.gradients, layout, tiny_model.release, tmp_path, rows, options)
    model = reference.load_model(tiny_model.hf)
    means = []
    for start in range(0, len(rows), micro_batch):
        parts = [reference.row_loss(model, row, True) for row in rows[start : start + micro_batch] if row]
        means.append(sum(p.item() for p, _ in parts) / sum(n for _, n in parts) if parts else 0.0)
    assert 0.0 in means
    assert results[0]["loss"] == pytest.approx(sum(means) / len(means), rel=1e-6)
