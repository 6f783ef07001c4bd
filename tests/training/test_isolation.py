"""Packed samples do not see each other: not in logits, not in gradients, at any stage or window edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import VOCABULARY, WINDOW
from tests.training import jobs, reference
from tests.training.jobs import Layout
from tests.training.test_model_parity import hf_tensors, make_row

LENGTHS = (WINDOW - 1, 3 * WINDOW, WINDOW, WINDOW + 1, 1, 5)
LAYOUTS = [Layout(), Layout(2, sp=True), Layout(1, 3)]


def with_sample_changed(row: list[list[int]], index: int) -> list[list[int]]:
    """Every token but the bos replaced by another one."""
    changed = [row[index][0], *(2 + (token + 99) % (VOCABULARY.size - 2) for token in row[index][1:])]
    assert all(a != b for a, b in zip(changed[1:], row[index][1:], strict=True))
    return [*row[:index], changed, *row[index + 1 :]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_changing_a_sample_changes_no_other_logit(layout: Layout, tiny_model: Any) -> None:
    row = make_row(5, LENGTHS)
    variants = [row, *(with_sample_changed(row, index) for index in range(len(row)) if len(row[index]) > 1)]
    results = run_ranks(layout.ranks, jobs.logits, layout, tiny_model.release, [[v] for v in variants], {})[
        -1
    ]
    base, *changed = results
    assert len(changed) == len(LENGTHS) - 1
    for variant, logits in zip(variants[1:], changed, strict=True):
        start = 0
        for before, after in zip(row, variant, strict=True):
            part = slice(start, start + len(before))
            same = torch.equal(base[part], logits[part])
            assert same == (before == after), f"sample of {len(before)} tokens"
            start += len(before)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sample_adds_no_gradient_through_its_neighbours(
    layout: Layout, tiny_model: Any, tmp_path: Path
) -> None:
    """With the loss on samples 1 and 3 alone, no gradient depends on what samples 0, 2 and 5 hold."""
    row = make_row(6, LENGTHS)
    other = row
    for index in (0, 2, 5):
        other = with_sample_changed(other, index)
    options = {"data": {"seq_length": 56}, "optimizer": {"clip_grad": 0.0}}
    gradients = []
    for name, content in (("a", row), ("b", other)):
        run_ranks(
            layout.ranks,
            jobs.gradients,
            layout,
            tiny_model.release,
            tmp_path / name,
            [content],
            options,
            (1, 3),
        )
        gradients.append(hf_tensors(tmp_path / name / "iter_0000001"))
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name
    carrying = {token for index in (1, 3) for token in row[index]}
    silent = {token for index in (0, 2, 5) for token in row[index] + other[index]} - carrying
    assert silent
    assert not gradients[0]["model.embed_tokens.weight"][sorted(silent)].any()


def test_allowed_interference_is_one_causal_row(tiny_model: Any) -> None:
    """`--cross-sample-attention allowed`: the packed row is one sequence, positions running on."""
    row = make_row(7, LENGTHS)
    (ours,) = run_ranks(
        1, jobs.logits, Layout(), tiny_model.release, [[row]], {"cross_sample_attention": "allowed"}
    )[0]
    whole = [token for sample in row for token in sample]
    with torch.no_grad():
        expected = reference.sample_logits(reference.load_model(tiny_model.hf), [whole])
    torch.testing.assert_close(ours[: len(whole)], expected, rtol=0, atol=1e-5)
