"""Tests that the fault injection (`scripts/mutate.py`) found missing.

- `--recipe corrected` equals plain PyTorch, evaluation too: the global-token mean as the loop counts its
  targets, clipping that bites, norms without weight decay, and the losses by kind of target.
- A checkpoint holds the last update, whenever replicas gather their parameters.
- An interleaved pipeline keeps its outputs until they are sent.
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
from tests.training.test_model_parity import OPTIONS as PARITY_OPTIONS
from tests.training.test_model_parity import ROWS as PARITY_ROWS
from tests.training.test_model_parity import hf_tensors, reference_gradients

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


def train_corrected(layout: Layout, tiny_model: Any, directory: Path, **data: str) -> Path:
    """The product's run of the same training; returns its directory."""
    config = jobs.run_config(
        layout,
        data={
            "train_data_path": (str(tiny.write_store(directory / "train", ROWS)),),
            "seq_length": SEQ_LENGTH,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 2,
            **data,
        },
        optimizer={
            "lr": LR,
            "lr_decay_style": "constant",
            "lr_warmup_iters": 0,
            "weight_decay": DECAY,
            "clip_grad": CLIP,
        },
        checkpoint={"save": str(directory / "run"), "pretrained_checkpoint": str(tiny_model.root)},
    )
    results = run_ranks(layout.ranks, jobs.train, config)
    assert [result["code"] for result in results] == [0] * layout.ranks
    return directory / "run"


def assert_trained(run: Path, expected: dict[str, Any]) -> None:
    weights = hf_tensors(run / f"iter_{STEPS:07d}")
    for name, (before, after) in expected["weights"].items():
        error = (weights[name] - after).norm() / (after - before).norm()
        assert error <= 1e-3, name


@pytest.mark.parametrize("layout", [Layout(), Layout(2, 1, 2, sp=True)], ids=str)
def test_corrected_training_equals_plain_pytorch(
    layout: Layout, expected: dict[str, Any], tiny_model: Any, tmp_path: Path
) -> None:
    valid = tiny.write_store(tmp_path / "valid", VALID_ROWS)
    run = train_corrected(layout, tiny_model, tmp_path, valid_data_path=str(valid))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    (evaluated,) = (line for line in lines if line["kind"] == "eval")
    for line, fields in zip([*trained, evaluated], [*expected["steps"], expected["evaluation"]], strict=True):
        assert {name: line[name] for name in fields} == pytest.approx(fields, rel=1e-5)
    assert evaluated["rows"] == len(VALID_ROWS)
    assert_trained(run, expected)


def test_a_checkpoint_holds_the_last_update_when_parameters_are_gathered_late(
    expected: dict[str, Any], tiny_model: Any, tmp_path: Path
) -> None:
    """Without an evaluation before the save, no forward pass has brought the other replicas' shards yet."""
    overlapped = Layout(1, 1, 2, extra=(("overlap_grad_reduce", True), ("overlap_param_gather", True)))
    assert_trained(train_corrected(overlapped, tiny_model, tmp_path), expected)


class RecordedSend:
    """A send that knows whether it was waited for."""

    def __init__(self, tensor: torch.Tensor, work: Any) -> None:
        self.address, self.work, self.pending = tensor.data_ptr(), work, True

    def wait(self) -> None:
        self.work.wait()
        self.pending = False


def gradients_and_early_frees(environment: Any, store: Any, *args: Any) -> tuple[float, int, int]:
    """Loss of `jobs.gradients`; how often core was done with an output still being sent, and freed it."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import schedules

    send, free = dist.isend, schedules.deallocate_output_tensor
    sends: list[RecordedSend] = []
    done_early = freed_early = 0

    def recorded_send(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        sends.append(RecordedSend(tensor, send(tensor, *args, **options)))
        return sends[-1]

    def recorded_free(out: Any, deallocate_pipeline_outputs: bool = False) -> None:
        nonlocal done_early, freed_early
        if out is not None and any(sent.pending and sent.address == out.data_ptr() for sent in sends):
            done_early += 1
            freed_early += deallocate_pipeline_outputs
        free(out, deallocate_pipeline_outputs)

    dist.isend, schedules.deallocate_output_tensor = recorded_send, recorded_free  # in this rank's process
    return jobs.gradients(environment, store, *args)["loss"], done_early, freed_early


def test_outputs_are_not_freed_while_they_are_sent(tiny_model: Any, tmp_path: Path) -> None:
    """By order, not by numbers: gloo has often sent these small outputs before their memory is used again.

    Sends overlap in the steady phase only, which needs more micro-batches than stages.
    """
    layout = Layout(1, 2, vpp=3)
    options = {**PARITY_OPTIONS, "data": {**PARITY_OPTIONS["data"], "micro_batch_size": 1}}
    arguments = (layout, tiny_model.release, tmp_path, PARITY_ROWS, options)
    results = run_ranks(layout.ranks, gradients_and_early_frees, *arguments)
    loss, _ = reference_gradients(tiny_model.hf, False)
    assert [result[0] for result in results] == pytest.approx([loss] * layout.ranks, rel=1e-6)
    assert sum(done_early for _, done_early, _ in results) > 0, "no send overlapped: nothing was checked"
    assert [freed_early for _, _, freed_early in results] == [0] * layout.ranks
