"""Logits and gradients equal transformers' Mistral at every layout (fp32)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, WINDOW
from tests.training import jobs, reference
from tests.training.jobs import FULL, NEAR_STAGES, SELECTIVE, Layout, chunks
from usdm_megatron.convert.checkpoint_weights import open_weights

LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # max |Δ| / max |g| per tensor
LENGTHS = (WINDOW - 1, 1, WINDOW, WINDOW + 1, 3 * WINDOW, 2)


def make_row(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[VOCABULARY.bos_id, *rng.integers(2, VOCABULARY.size, n - 1).tolist()] for n in lengths]


LOGITS_LAYOUTS = [
    Layout(1, 1), Layout(2, 1), Layout(1, 2), Layout(2, 2), Layout(1, 3),
    Layout(2, 1, sp=True), Layout(2, 3, sp=True), Layout(1, 2, vpp=3),
]  # fmt: skip


@pytest.mark.parametrize("layout", LOGITS_LAYOUTS, ids=str)
def test_logits_equal_transformers(layout: Layout, tiny_model) -> None:
    row_sets = [[make_row(0), make_row(1)], [make_row(2), make_row(3)]] * (3 if layout.vpp > 1 else 1)
    results = run_ranks(layout.ranks, jobs.logits, layout, tiny_model.release, row_sets, {})
    ours = results[-1]
    assert [len(result) for result in results] == [0] * (layout.ranks - layout.tp) + [
        len(row_sets)
    ] * layout.tp
    model = reference.load_model(tiny_model.hf)
    for rows, logits in zip(row_sets, ours, strict=True):
        for row, padded in zip(rows, logits.chunk(2), strict=True):
            with torch.no_grad():
                expected = reference.sample_logits(model, row)
            assert expected.shape == (sum(LENGTHS), VOCABULARY.size)
            torch.testing.assert_close(padded[: len(expected)], expected, rtol=0, atol=LOGITS_TOLERANCE)


ROWS = [make_row(seed, lengths) for seed, lengths in enumerate([LENGTHS, (20, 30), (50,), (3, 9, 8, 7)])]
OPTIONS = {"data": {"seq_length": 56, "micro_batch_size": 2}, "optimizer": {"clip_grad": 0.0}}


@cache
def reference_gradients(hf: Path, train_boundaries: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = reference.load_model(hf)
    parts = [reference.row_loss(model, row, train_boundaries) for row in ROWS]
    loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


GRADIENT_LAYOUTS = [
    Layout(), Layout(2), Layout(1, 2), Layout(2, 2), Layout(1, 3), Layout(2, sp=True), Layout(2, 2, sp=True),
    Layout(1, 2, vpp=3),
    Layout(extra=FULL),
    Layout(2, 1, sp=True, extra=SELECTIVE),
    Layout(1, 2, extra=(*FULL, ("recompute_method", "block"), ("recompute_num_layers", 2))),
    Layout(2, 1, sp=True, extra=(*SELECTIVE, ("recompute_modules", ("core_attn", "mlp")))),
    # stages of other sizes, and where their ranks lie
    Layout(1, 4, extra=(("decoder_first_pipeline_num_layers", 1), ("decoder_last_pipeline_num_layers", 1))),
    Layout(1, 2, vpp=2, extra=chunks("Ett|t|t|ttL")),
    Layout(2, 2, vpp=2, sp=True, extra=(*chunks("E|ttt|ttt|L"), *FULL, ("recompute_num_layers", 3))),
    Layout(1, 2, 2, extra=(*NEAR_STAGES, *chunks("Et|t*5L"))),
]  # fmt: skip


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS, ids=str)
def test_gradients_equal_transformers(layout: Layout, tiny_model, tmp_path: Path) -> None:
    rows = ROWS * layout.dp  # twice the same rows: the same mean
    results = run_ranks(layout.ranks, jobs.gradients, layout, tiny_model.release, tmp_path, rows, OPTIONS)
    loss, expected = reference_gradients(tiny_model.hf, False)
    ours = hf_tensors(tmp_path / "iter_0000001")
    assert ours.keys() == expected.keys()
    for result in results:
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, f"{name} has no gradient: the comparison would be empty"
        assert (ours[name] - gradient).abs().max() <= GRADIENT_TOLERANCE * scale, name
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    assert results[0]["norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 2), Layout(2, 2, sp=True)], ids=str)
def test_gradients_of_tied_embeddings(layout: Layout, tmp_path: Path) -> None:
    """One weight at both ends of the pipeline: its gradient is the sum of both uses."""
    hf = tiny.write_hf_model(tmp_path / "tied", tie_word_embeddings=True)
    root = tiny.write_checkpoint(hf, tmp_path / "checkpoint")
    results = run_ranks(
        layout.ranks, jobs.gradients, layout, root / "release", tmp_path / "run", ROWS, OPTIONS
    )
    loss, expected = reference_gradients(hf, False)
    ours = hf_tensors(tmp_path / "run" / "iter_0000001")
    assert "lm_head.weight" not in expected and ours.keys() == expected.keys()
    assert results[0]["loss"] == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= GRADIENT_TOLERANCE * gradient.abs().max(), name


def hf_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by their Hugging Face names."""
    from usdm_megatron.checkpoint.store import single_process_group

    weights = open_weights(directory)
    with single_process_group():
        return {
            name: tensor
            for layer in (None, *range(weights.model.layers))
            for name, tensor in weights.of_layer(layer).items()
        }
