"""Twenty steps equal plain PyTorch on transformers' Mistral, at every layout (`--recipe usdm`, fp32).

The reference (`reference.train`) reads the DatasetDict, runs each packed sample alone and imports
nothing of usdm_megatron. Our side is the product's own path: preprocess, pretrain, checkpoint.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs, reference
from tests.training.jobs import Layout
from tests.training.test_model_parity import hf_tensors

STEPS, GLOBAL_BATCH, SEQ_LENGTH, LR = 20, 4, 64, 1e-3
LAYOUTS = [
    Layout(),
    Layout(2),
    Layout(1, 2),
    Layout(1, 1, 2),
    Layout(2, 2),
    Layout(2, sp=True),
    Layout(2, 2, sp=True),
]
# Adam divides by sqrt(v): an element whose gradient is rounding noise moves by lr in a direction that is
# noise too, so weights are compared as whole tensors
WEIGHT_TOLERANCE, LOSS_TOLERANCE = 1e-3, 1e-5


@pytest.fixture(scope="module")
def cached_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The "cached training data" that both sides read: a DatasetDict on disk."""
    from datasets import Dataset, DatasetDict

    rows = [
        [token for sample in row for token in sample]
        for row in tiny.random_rows(STEPS * GLOBAL_BATCH, SEQ_LENGTH)
    ]
    directory = tmp_path_factory.mktemp("oracle") / "cache"
    DatasetDict(
        train=Dataset.from_dict({"input_ids": rows}), test=Dataset.from_dict({"input_ids": rows[:6]})
    ).save_to_disk(str(directory))
    return directory


@pytest.fixture(scope="module")
def store(cached_data: Path) -> Path:
    from usdm_megatron.preprocess.stores import StoreOptions, preprocess_cache

    prefix = cached_data.parent / "store"
    preprocess_cache(cached_data, prefix, StoreOptions(seq_length=SEQ_LENGTH, vocabulary=tiny.VOCABULARY))
    return prefix


@cache
def reference_run(
    hf: Path, cached_data: Path, micro_batch: int
) -> tuple[list[float], list[float], dict[str, Any]]:
    from datasets import load_from_disk

    rows = load_from_disk(str(cached_data))["train"]["input_ids"]
    model = reference.load_model(hf)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, rates = reference.train(
        model, list(rows), steps=STEPS, global_batch=GLOBAL_BATCH, micro_batch=micro_batch, lr=LR
    )
    return (
        losses,
        rates,
        {name: (before[name], parameter.detach()) for name, parameter in model.named_parameters()},
    )


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_equals_plain_pytorch(
    layout: Layout, micro_batch: int, tiny_model: Any, cached_data: Path, store: Path, tmp_path: Path
) -> None:
    losses, rates, weights = reference_run(tiny_model.hf, cached_data, micro_batch)
    run = tmp_path / "run"
    config = jobs.run_config(
        layout,
        recipe="usdm",
        data={
            "train_data_path": (f"{store}_train",),
            "seq_length": SEQ_LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": micro_batch,
        },
        optimizer={"lr": LR},
        checkpoint={"save": str(run), "pretrained_checkpoint": str(tiny_model.root)},
    )
    results = run_ranks(layout.ranks, jobs.train, config)
    assert [result["code"] for result in results] == [0] * layout.ranks
    ours = train_lines(run)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in ours] == pytest.approx(rates, rel=LOSS_TOLERANCE, abs=1e-12)
    assert [line["loss"] for line in ours] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    trained = hf_tensors(run / f"iter_{STEPS:07d}")
    worst = {name: relative_update_error(trained[name], *pair) for name, pair in weights.items()}
    assert trained.keys() == worst.keys()
    assert max(worst.values()) <= WEIGHT_TOLERANCE, worst
    record(layout, micro_batch, ours, losses, max(worst.values()))


def train_lines(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def relative_update_error(ours: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
    """‖ΔW − ΔW_ref‖ / ‖ΔW_ref‖."""
    reference_update = after - before
    assert reference_update.norm() > 0
    return ((ours - before - reference_update).norm() / reference_update.norm()).item()


def record(
    layout: Layout, micro_batch: int, ours: list[dict[str, Any]], losses: list[float], update: float
) -> None:
    """A row for `docs/parity.md` (`pytest -s`)."""
    loss = max(abs(line["loss"] - expected) / expected for line, expected in zip(ours, losses, strict=True))
    print(f"| {layout} | {micro_batch} | {loss:.1e} | {update:.1e} |")
