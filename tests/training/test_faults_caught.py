"""Tests that the fault injection (`scripts/mutate.py`) found missing.

- `--recipe corrected` equals plain PyTorch, evaluation too: the global-token mean as the loop counts its
  targets, clipping that bites, norms without weight decay, and the losses by kind of target.
- An interleaved pipeline whose sends are too large to be gone at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.ranks import run_ranks
from tests.training import jobs, reference
from tests.training.jobs import Layout
from tests.training.test_model_parity import hf_tensors

GLOBAL_BATCH, SEQ_LENGTH, LR, DECAY, CLIP = 4, 64, 1e-3, 0.5, 0.3
ROWS = tiny.random_rows(15, SEQ_LENGTH, seed=8)  # four steps, the last one short
VALID_ROWS = tiny.random_rows(5, SEQ_LENGTH, seed=9)
STEPS = 4
Row = list[list[int]]


def losses_by_kind(model: Any, rows: list[Row]) -> dict[str, tuple[torch.Tensor, int]]:
    """Sum and number of target losses of these rows, by kind; nothing is trained across samples."""
    text = tiny.VOCABULARY.text_size
    special = {1: "bos", 2: "eos", text: "continue", text + 1: "correspond"}
    found: dict[str, list[torch.Tensor]] = {}
    for sample in (sample for row in rows for sample in row):
        logits = model(torch.tensor([sample])).logits[0]
        for target, loss in zip(
            sample[1:], F.cross_entropy(logits[:-1], torch.tensor(sample[1:]), reduction="none"), strict=True
        ):
            kind = special.get(target, "unit" if text + 2 <= target < tiny.VOCABULARY.size - 1 else "text")
            found.setdefault(kind, []).append(loss)
    return {kind: (torch.stack(values).sum(), len(values)) for kind, values in found.items()}


def mean_of(losses: dict[str, tuple[torch.Tensor, int]]) -> torch.Tensor:
    return sum(total for total, _ in losses.values()) / sum(count for _, count in losses.values())


def fields_of(losses: dict[str, tuple[torch.Tensor, int]]) -> dict[str, float]:
    """The metrics of these losses, by the names of `metrics.jsonl`."""
    by_kind = {f"loss_{kind}": (total / count).item() for kind, (total, count) in losses.items()}
    return {"loss": mean_of(losses).item(), "tokens": sum(n for _, n in losses.values()), **by_kind}


@pytest.fixture(scope="module")
def expected(tiny_model: Any) -> dict[str, Any]:
    """Fields of every step and of the evaluation, and every weight before and after."""
    model = reference.load_model(tiny_model.hf)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for step in range(STEPS):
        losses = losses_by_kind(model, ROWS[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH])
        optimizer.zero_grad()
        mean_of(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        assert norm > 2 * CLIP, "the clipping would be untested"
        optimizer.step()
        steps.append({**fields_of(losses), "grad_norm": norm})
    with torch.no_grad():
        evaluation = fields_of(losses_by_kind(model, VALID_ROWS))
    weights = {name: (before[name], parameter.detach()) for name, parameter in model.named_parameters()}
    return {"steps": steps, "evaluation": evaluation, "weights": weights}


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 1, 2, sp=True)], ids=str)
def test_corrected_training_equals_plain_pytorch(
    layout: Layout, expected: dict[str, Any], tiny_model: Any, tmp_path: Path
) -> None:
    config = jobs.run_config(
        layout,
        data={
            "train_data_path": str(tiny.write_store(tmp_path / "train", ROWS)),
            "valid_data_path": str(tiny.write_store(tmp_path / "valid", VALID_ROWS)),
            "seq_length": SEQ_LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 2,
        },
        optimizer={
            "lr": LR,
            "lr_decay_style": "constant",
            "lr_warmup_iters": 0,
            "weight_decay": DECAY,
            "clip_grad": CLIP,
        },
        checkpoint={"save": str(tmp_path / "run"), "pretrained_checkpoint": str(tiny_model.root)},
    )
    results = run_ranks(layout.ranks, jobs.train, config)
    assert [result["code"] for result in results] == [0] * layout.ranks
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    (evaluated,) = (line for line in lines if line["kind"] == "eval")
    for line, fields in zip([*trained, evaluated], [*expected["steps"], expected["evaluation"]], strict=True):
        assert {name: line[name] for name in fields} == pytest.approx(fields, rel=1e-5)
    assert evaluated["rows"] == len(VALID_ROWS)
    weights = hf_tensors(tmp_path / "run" / f"iter_{STEPS:07d}")
    for name, (before, after) in expected["weights"].items():
        error = (weights[name] - after).norm() / (after - before).norm()
        assert error <= 1e-3, name


def gradients_in_reused_memory(environment: Any, store: Any, *args: Any) -> dict[str, float]:
    """`jobs.gradients` where what core frees is overwritten at once, as it may be at any time."""
    from megatron.core.pipeline_parallel import schedules

    free = schedules.deallocate_output_tensor

    def overwrite_and_free(out: Any, deallocate_pipeline_outputs: bool = False) -> None:
        if out is not None and deallocate_pipeline_outputs:
            out.data.fill_(torch.nan)
        free(out, deallocate_pipeline_outputs)

    schedules.deallocate_output_tensor = overwrite_and_free  # this rank's own process
    return jobs.gradients(environment, store, *args)


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(1, 2, vpp=2)], ids=str)
def test_outputs_are_not_freed_while_they_are_sent(layout: Layout, tmp_path: Path) -> None:
    """512 KiB a send: gloo still reads them when the schedule goes on. Tiny ones would hide it."""
    seq_length = 1024
    hf = tiny.write_hf_model(
        tmp_path / "hf", hidden_size=128, num_hidden_layers=4, max_position_embeddings=seq_length
    )
    root = tiny.write_checkpoint(hf, tmp_path / "checkpoint")
    rows = tiny.random_rows(4, 64, seed=10)
    rows = [[sample * 16 for sample in row] for row in rows]
    model = reference.load_model(hf)
    with torch.no_grad():
        sums = [reference.row_loss(model, row, train_boundaries=False) for row in rows]
    options = {
        "data": {"seq_length": seq_length, "global_batch_size": len(rows)},
        "optimizer": {"clip_grad": 0.0},
    }
    results = run_ranks(
        layout.ranks, gradients_in_reused_memory, layout, root / "release", tmp_path / "run", rows, options
    )
    loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
    for result in results:
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
