"""Gradients summed in bf16 against those summed in fp32; deterministic runs repeat to the bit."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import OVERLAP, Layout
from tests.training.test_oracle import train_lines
from tests.training.test_resume import tensors

ROWS = tiny.random_rows(8, 64, seed=5)
BF16_STEP = 2**-8  # from one number to the next, at 1


def both_dtypes(environment: Any, store: Any, layout: Layout, checkpoint: Path) -> list[dict[str, Any]]:
    """One step with gradients in fp32, one with gradients in bf16, of the same bf16 model."""
    from usdm_megatron.data.order import RowOrder

    results = []
    with jobs.opened(environment, store, layout) as groups:
        for in_fp32 in (True, False):
            extra = (*layout.extra, ("accumulate_allreduce_grads_in_fp32", in_fp32))
            config = jobs.run_config(
                dataclasses.replace(layout, extra=extra),
                data={"global_batch_size": len(ROWS)},
                optimizer={"clip_grad": 0.0},
                training={"bf16": True},
            )
            engine, facts = jobs.load_engine(config, checkpoint, groups)
            order = RowOrder(len(ROWS), len(ROWS), len(ROWS), 1, layout.dp)
            batches = [
                jobs.batch_of([ROWS[row] for row in ids], config, facts.vocabulary, ids).to(groups.device)
                for ids in order.rows_of_step(0, groups.coordinates.dp).tolist()
            ]
            targets = sum(len(sample) - 1 for row in ROWS for sample in row)
            result = engine.step.train(batches, engine.optimizer, targets=targets, lr=0.0, stop=lambda: False)
            parameters = [parameter for model in engine.models for parameter in model.parameters()]
            results.append({
                "loss": result.losses.objective,
                "norm": result.gradient_norm,
                "dtypes": {parameter.main_grad.dtype for parameter in parameters},
                "gradients": [
                    jobs._whole_gradient(parameter, engine.optimizer, groups).float()
                    for parameter in parameters
                ],
            })  # fmt: skip
    return results


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 1, 2, extra=OVERLAP), Layout(2, 2, sp=True)], ids=str)
def test_gradients_in_the_weights_dtype(layout: Layout, tiny_model: Any) -> None:
    for exact, rounded in run_ranks(layout.ranks, both_dtypes, layout, tiny_model.release):
        assert (exact["dtypes"], rounded["dtypes"]) == ({torch.float32}, {torch.bfloat16})
        assert rounded["loss"] == exact["loss"]
        assert rounded["norm"] == pytest.approx(exact["norm"], rel=BF16_STEP)
        for gradient, expected in zip(rounded["gradients"], exact["gradients"], strict=True):
            assert not torch.equal(gradient, expected)
            assert (gradient - expected).norm() <= 2 * BF16_STEP * expected.norm()


def deterministic_train(environment: Any, store: Any, config: Any) -> dict[str, Any]:
    code = jobs.train(environment, store, config)["code"]
    return {
        "code": code,
        "on": torch.are_deterministic_algorithms_enabled(),
        "environment": {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")},
    }


def test_deterministic_runs_are_the_same_bits(tiny_model: Any, tmp_path: Path) -> None:
    rows = tiny.write_store(tmp_path / "rows", ROWS)
    layout = Layout(2, 1, 2, sp=True, extra=OVERLAP)
    for name in ("first", "second"):
        config = jobs.run_config(
            layout,
            data={"train_data_path": (str(rows),)},
            training={"deterministic_mode": True},
            checkpoint={"save": str(tmp_path / name), "pretrained_checkpoint": str(tiny_model.root)},
        )
        for result in run_ranks(layout.ranks, deterministic_train, config):
            assert result == {
                "code": 0,
                "on": True,
                "environment": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"},
            }
    first, second = ([line["loss"] for line in train_lines(tmp_path / name)] for name in ("first", "second"))
    assert first == second and len(first) == 2
    first_tensors, second_tensors = (
        tensors(tmp_path / name / "iter_0000002") for name in ("first", "second")
    )
    assert all(torch.equal(first_tensors[key], second_tensors[key]) for key in first_tensors)
