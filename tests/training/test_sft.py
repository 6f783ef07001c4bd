"""What fine-tuning does not depend on: tokens without loss, packing, padding."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.dialogs import Dialog, random_dialogs, write_rows
from tests.training.jobs import Layout
from tests.training.test_model_parity import hf_tensors
from tests.training.test_oracle import train_lines

DIALOGS = random_dialogs(12, seed=5, longest=30)
STEPS, DIALOGS_A_STEP = 3, 4
SERIAL = Layout()


def job(environment: Any, store: Any, config: Any) -> str:
    """A run; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert jobs.train(environment, store, config)["code"] == 0
    return printed.getvalue()


def fine_tune(
    rows: Sequence[Sequence[Dialog]], directory: Path, tiny_model: Any, layout: Layout = SERIAL, **data: Any
) -> str:
    """`STEPS` steps over these rows, `corrected`; returns what rank 0 printed."""
    prefix = write_rows(directory / "rows", rows)
    config = jobs.run_config(
        layout,
        task="sft",
        data={
            "train_data_path": (str(prefix),),
            "global_batch_size": len(rows) // STEPS,
            "row_padding": "step",
            **data,
        },
        checkpoint={"save": str(directory / "run"), "pretrained_checkpoint": str(tiny_model.root)},
    )
    return run_ranks(layout.ranks, job, config)[0]


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in train_lines(directory / "run")]


def with_other_tokens(dialog: Dialog, positions: slice) -> Dialog:
    """The ids at `positions` changed; labels follow where there are any."""
    ids, labels = list(dialog.ids), list(dialog.labels)
    for position in range(len(ids))[positions]:
        ids[position] = 3 + (ids[position] + 1) % 290
        labels[position] = labels[position] if labels[position] < 0 else ids[position]
    return dataclasses.replace(dialog, ids=tuple(ids), labels=tuple(labels))


@pytest.fixture(scope="module")
def padded(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dialog a row, a step's micro-batches padded to the longest."""
    directory = tmp_path_factory.mktemp("padded")
    fine_tune([[dialog] for dialog in DIALOGS], directory, tiny_model, micro_batch_size=2)
    return directory


def test_tokens_without_loss_contribute_nothing(padded: Path, tiny_model: Any, tmp_path: Path) -> None:
    """The last two of every dialog are targets of nothing and seen by no target: not a bit may change."""
    changed = [[with_other_tokens(dialog, slice(-2, None))] for dialog in DIALOGS]
    fine_tune(changed, tmp_path, tiny_model, micro_batch_size=2)
    assert losses(tmp_path) == losses(padded)
    assert [line["grad_norm"] for line in train_lines(tmp_path / "run")] == [
        line["grad_norm"] for line in train_lines(padded / "run")
    ]
    before, after = (hf_tensors(path / "run" / f"iter_{STEPS:07d}") for path in (padded, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_target_does_contribute(padded: Path, tiny_model: Any, tmp_path: Path) -> None:
    last_target = [max(i for i, target in enumerate(dialog.mask) if target) for dialog in DIALOGS]
    changed = [
        [with_other_tokens(dialog, slice(at, at + 1))]
        for dialog, at in zip(DIALOGS, last_target, strict=True)
    ]
    fine_tune(changed, tmp_path, tiny_model, micro_batch_size=2)
    assert losses(tmp_path) != losses(padded)


@pytest.mark.parametrize("layout", [SERIAL, Layout(1, 2)], ids=str)
@pytest.mark.parametrize(
    ("dialogs_a_row", "data"),
    [
        (1, {"micro_batch_size": 1}),
        (1, {"micro_batch_size": 2, "row_padding": "full"}),
        (2, {"micro_batch_size": 1}),
        (2, {"micro_batch_size": 2, "row_padding": "full"}),
    ],
    ids=str,
)
def test_packed_and_padded_rows_give_the_same_loss(
    dialogs_a_row: int, data: dict[str, Any], layout: Layout, padded: Path, tiny_model: Any, tmp_path: Path
) -> None:
    rows = [DIALOGS[start : start + dialogs_a_row] for start in range(0, len(DIALOGS), dialogs_a_row)]
    printed = fine_tune(rows, tmp_path, tiny_model, layout, **data)
    assert losses(tmp_path) == pytest.approx(losses(padded), rel=1e-6)
    says_packed = f"rows are packed: about 2.0 dialogs a row, {DIALOGS_A_STEP} dialogs a step" in printed
    assert says_packed == (dialogs_a_row == 2)


def test_crossing_sample_boundaries_adds_no_target(padded: Path, tiny_model: Any, tmp_path: Path) -> None:
    """A dialog's first token is none."""
    prefix = write_rows(
        tmp_path / "rows", [DIALOGS[start : start + 2] for start in range(0, len(DIALOGS), 2)]
    )
    config = jobs.run_config(
        SERIAL,
        task="sft",
        data={"train_data_path": (str(prefix),), "global_batch_size": 2},
        training={"train_sample_boundaries": True},
        checkpoint={"save": str(tmp_path / "run"), "pretrained_checkpoint": str(tiny_model.root)},
    )
    run_ranks(1, job, config)
    assert losses(tmp_path) == pytest.approx(losses(padded), rel=1e-6)


def test_micro_batches_are_as_long_as_the_longest_of_their_step(tmp_path: Path) -> None:
    """In a pipeline; on each replica by itself; a step of short dialogs is a short one."""
    expected = {  # 5 + 6 → 16, 20 + 25 → 48; 60 is all there is; an empty row still has a token
        0: [(48, 48), (16, 16)],
        1: [(60, 60), (8, 8)],
    }
    assert lengths_of_batches(tmp_path, one_length=True) == expected


def test_without_a_pipeline_micro_batches_are_as_long_as_they_need(tmp_path: Path) -> None:
    expected = {0: [(16, 48), (16, 8)], 1: [(60, 16), (8, 8)]}
    assert lengths_of_batches(tmp_path, one_length=False) == expected


def lengths_of_batches(directory: Path, *, one_length: bool) -> dict[int, list[tuple[int, ...]]]:
    """Tokens of the micro-batches that each of two replicas is given, by step; what they hold is checked."""
    from usdm_megatron.data.loader import MicroBatchLoader
    from usdm_megatron.data.order import RowOrder
    from usdm_megatron.data.token_store import TokenStore

    lengths = [5, 6, 30, 30, 20, 25, 7, 9, 11, 4, 8]
    dialogs = [Dialog((1, *[5] * (length - 1)), (-100, *[5] * (length - 1))) for length in lengths]
    store = TokenStore.open(write_rows(directory / "rows", [[dialog] for dialog in dialogs]))
    order = RowOrder(11, 11, global_batch_size=8, micro_batch_size=2, dp_size=2)
    found: dict[int, list[tuple[int, ...]]] = {}
    for rank in range(2):
        with MicroBatchLoader(
            store,
            order,
            rank,
            seq_length=30,
            vocabulary=tiny.VOCABULARY,
            train_sample_boundaries=False,
            pad_to_multiple_of=8,
            one_length=one_length,
        ) as loader:
            for step in range(2):
                batches = loader.step_batches(step)
                found.setdefault(rank, []).append(tuple(batch.tokens.numel() for batch in batches))
                for batch in batches:
                    size = batch.tokens.numel()
                    assert batch.labels.shape == (1, size)
                    assert int(batch.cu_seqlens[-1]) == size and int(batch.position_ids.max()) < 30
                    rows = [row for row in batch.row_ids if row >= 0]
                    assert int(batch.loss_mask.sum()) == sum(lengths[row] - 1 for row in rows)
    return found
