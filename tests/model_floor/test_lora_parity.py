"""LoRA at every layout against PEFT on the Hugging Face model (fp32): logits, loss, gradients, updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model_floor import lora_jobs
from tests.model_floor.lora_jobs import (
    BLOCK,
    CORE,
    FULL,
    MLP,
    MLP_ALONE,
    ROWS,
    STRADDLING,
    UNIFORM,
    Case,
    spec,
)
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY
from tests.training import reference
from tests.training.jobs import Layout
from tests.training.test_backends import BACKENDS
from usdm_megatron.lora_spec import TARGETS

LOGITS_TOLERANCE = 1e-5  # max |Δ| / max |logit|; PEFT's own fp32 rounding is a fifth of it
GRADIENT_TOLERANCE = 1e-4  # max |Δ| / max |g| per tensor

ALL = spec(*TARGETS)
QV, GU, UD = spec("q_proj", "v_proj"), spec("gate_proj", "up_proj"), spec("up_proj", "down_proj")
KOG = spec("k_proj", "o_proj", "gate_proj")

PARITY = {
    Layout(): [Case(ALL), Case(QV, FULL), Case(GU, MLP_ALONE)],
    Layout(2): [Case(ALL), Case(KOG, UNIFORM), Case(UD, MLP)],
    Layout(2, sp=True): [Case(ALL, FULL), Case(QV), Case(KOG, CORE), Case(UD, MLP)],
    Layout(1, 2): [Case(UD, FULL), Case(ALL, CORE), Case(QV, BLOCK)],
    Layout(2, 2): [Case(ALL, MLP), Case(QV), Case(GU, FULL)],
    Layout(2, 2, sp=True): [Case(ALL), Case(UD, UNIFORM), Case(KOG, BLOCK)],
    Layout(1, 1, 2): [Case(ALL), Case(QV, FULL)],
    Layout(1, 2, vpp=3): [Case(ALL, FULL)],
}


def reference_step(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss over all rows and the gradient of everything that trains, by PEFT's names."""
    parts = [reference.row_loss(model, row, False) for row in ROWS]
    loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
    parameters = lora_jobs.peft_parameters(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, gradients, strict=True))


def assert_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, f"{name} has no gradient: the comparison would be empty"
        assert (ours[name] - gradient).abs().max() <= GRADIENT_TOLERANCE * scale, name


@pytest.mark.parametrize("layout", PARITY, ids=str)
def test_equals_peft(layout: Layout, models: Any) -> None:
    by_rank = run_ranks(layout.ranks, lora_jobs.train, layout, models.release, PARITY[layout], ROWS)
    for index, case in enumerate(PARITY[layout]):
        model = lora_jobs.peft_model(models.hf, case.lora, VOCABULARY)
        compare(model, layout, [outcomes[index] for outcomes in by_rank])


def compare(model: torch.nn.Module, layout: Layout, outcomes: list[lora_jobs.Outcome]) -> None:
    if layout.vpp == layout.dp == 1:
        (logits,) = outcomes[-1].logits
        for row, padded in zip(ROWS, logits.chunk(lora_jobs.MICRO_BATCH), strict=False):
            with torch.no_grad():
                expected = reference.sample_logits(model, row)
            scale = expected.abs().max()
            assert (padded[: len(expected)] - expected).abs().max() <= LOGITS_TOLERANCE * scale
    loss, gradients = reference_step(model)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    for outcome in outcomes:
        assert outcome.losses == [pytest.approx(loss, rel=1e-6)]
        assert outcome.norm == pytest.approx(norm, rel=1e-5)
    assert_gradients(lora_jobs.assemble([outcome.gradients for outcome in outcomes]), gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_attention_backend(backend: Any, models: Any) -> None:
    """In bf16, which te and flash ask for; the bound is that of `tests/training/test_backends.py`."""
    case = Case(ALL, backend=backend, bf16=True)
    ((outcome,),) = run_ranks(1, lora_jobs.train, Layout(), models.release, [case], ROWS)
    loss, exact = reference_step(lora_jobs.peft_model(models.hf, ALL, VOCABULARY))
    plain_loss, plain = reference_step(lora_jobs.peft_model(models.hf, ALL, VOCABULARY).bfloat16())
    assert abs(outcome.losses[0] - loss) <= 2 * abs(plain_loss - loss) + 1e-3 * loss
    ours = lora_jobs.assemble([outcome.gradients])
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        error, plain_error = ((one[name].cpu().float() - gradient).norm() for one in (ours, plain))
        assert error <= 2 * plain_error, (name, error, plain_error, gradient.norm())


NEW = spec("v_proj", new=True)
NEW_ROWS = [Layout(), Layout(2), Layout(2, sp=True), Layout(1, 2), Layout(2, 2, sp=True)]


@pytest.mark.parametrize("layout", NEW_ROWS, ids=str)
@pytest.mark.parametrize("which", ["one rank's", "straddling", "tied"])
def test_new_rows_equal_peft(which: str, layout: Layout, models: Any) -> None:
    tied = which == "tied"
    checkpoint = {"one rank's": models.release, "straddling": models.straddling, "tied": models.tied}[which]
    vocabulary = VOCABULARY if which == "one rank's" else STRADDLING
    cases = [Case(NEW), Case(NEW, FULL)]
    by_rank = run_ranks(layout.ranks, lora_jobs.train, layout, checkpoint, cases, ROWS)
    for index in range(len(cases)):
        model = lora_jobs.peft_model(models.tied_hf if tied else models.hf, NEW, vocabulary, tied=tied)
        compare(model, layout, [outcomes[index] for outcomes in by_rank])


OVERLAP = (("overlap_grad_reduce", True), ("overlap_param_gather", True))
# without new rows, only the adapters' own calls tell an overlapped gather that somebody waits
UPDATES = {
    Layout(): Case(spec(*TARGETS, new=True)),
    Layout(1, 1, 2): Case(ALL, OVERLAP),
    Layout(2, 2, sp=True): Case(spec(*TARGETS, new=True), OVERLAP),
}
LRS = (1e-2, 5e-3, 1e-2)


@pytest.mark.parametrize("layout", UPDATES, ids=str)
def test_updates_equal_peft(layout: Layout, models: Any) -> None:
    """AdamW on adapters and new rows, weight decay among it; gathers overlapped with the next step."""
    case = UPDATES[layout]
    by_rank = run_ranks(layout.ranks, lora_jobs.train, layout, models.straddling, [case], ROWS, LRS)
    model = lora_jobs.peft_model(models.hf, case.lora, STRADDLING)
    parameters = lora_jobs.peft_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for lr in LRS:
        loss, gradients = reference_step(model)
        losses.append(loss)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for (outcome,) in by_rank:
        assert outcome.losses == pytest.approx(losses, rel=1e-5)
    ours = lora_jobs.assemble([outcome.values for (outcome,) in by_rank])
    assert ours.keys() == parameters.keys()
    for name, value in parameters.items():
        moved = (value - before[name]).abs().max()
        assert moved > 0 and (ours[name] - value).abs().max() <= 1e-2 * moved, name
