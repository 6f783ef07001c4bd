"""Every combination of layout features, not a covering sample of them (`make test-full`)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training import jobs
from tests.training.jobs import FULL, NEAR_STAGES, OVERLAP, SELECTIVE, Layout, chunks
from tests.training.test_model_parity import GRADIENT_TOLERANCE, ROWS, hf_tensors, reference_gradients
from tests.training.test_resume import (  # noqa: F401  (fixtures)
    SAVED_AT,
    killed_after,
    losses,
    serial_run,
    stores,
    train,
)

pytestmark = pytest.mark.exhaustive

RECOMPUTES: list[Any] = [
    (),
    SELECTIVE,
    (*SELECTIVE, ("recompute_modules", ("mlp",))),
    (*SELECTIVE, ("recompute_modules", ("core_attn", "mlp"))),
    FULL,
    (*FULL, ("recompute_method", "block"), ("recompute_num_layers", 1)),
]
LAYOUTS = [
    Layout(tp, pp, dp, sp, vpp, extra)
    for tp, pp, dp, sp, vpp, extra in itertools.product(
        (1, 2), (1, 2, 3), (1, 2), (False, True), (1, 2), RECOMPUTES
    )
    if (not sp or tp > 1) and (vpp == 1 or pp == 3)
]
# the 6 layers in stages that are not alike, under every group order and overlap; and each depth of recompute
STAGES: list[tuple[int, int, Any]] = [
    (2, 1, (("decoder_first_pipeline_num_layers", 2),)),
    (2, 1, (("decoder_last_pipeline_num_layers", 5),)),
    (3, 1, (("decoder_first_pipeline_num_layers", 1), ("decoder_last_pipeline_num_layers", 2))),
    (3, 2, (("decoder_first_pipeline_num_layers", 2), ("decoder_last_pipeline_num_layers", 2))),
    (4, 1, chunks("Ett|t|t|ttL")),
    (4, 1, chunks("E|t*3|t*3|L")),
    (2, 2, chunks("Et|tt|t|ttL")),
    (2, 3, ()),
]
LAYOUTS += [
    Layout(tp, pp, dp, tp > 1, vpp, (*stages, *order, *overlap))
    for (pp, vpp, stages), tp, dp, order, overlap in itertools.product(
        STAGES, (1, 2), (1, 2), ((), NEAR_STAGES), ((), OVERLAP)
    )
    if tp * pp * dp <= 8
]
LAYOUTS += [
    Layout(1, pp, extra=(*FULL, ("recompute_method", method), ("recompute_num_layers", layers)))
    for pp, method, layers in itertools.product((1, 2), ("uniform", "block"), (2, 3, 6))
    if layers <= 6 // pp and (method == "block" or 6 // pp % layers == 0)
]


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_equal_transformers(
    layout: Layout, micro_batch: int, tiny_model: Any, tmp_path: Path
) -> None:
    # an interleaved pipeline needs a multiple of its stages; the same rows again: the same mean
    rows = ROWS * (layout.pp * layout.dp if layout.vpp > 1 else layout.dp)
    options = {"data": {"seq_length": 56, "micro_batch_size": micro_batch}, "optimizer": {"clip_grad": 0.0}}
    results = run_ranks(layout.ranks, jobs.gradients, layout, tiny_model.release, tmp_path, rows, options)
    loss, expected = reference_gradients(tiny_model.hf, False)
    assert results[0]["loss"] == pytest.approx(loss, rel=1e-6)
    ours = hf_tensors(tmp_path / "iter_0000001")
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= GRADIENT_TOLERANCE * gradient.abs().max(), name


PAIRS = list(
    itertools.permutations([Layout(), Layout(2, sp=True), Layout(1, 3), Layout(1, 1, 2), Layout(2, 2)], 2)
)


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_resume_from_any_layout_at_any_other(
    before: Layout,
    after: Layout,
    serial_run: Path,  # noqa: F811
    stores: Path,  # noqa: F811
    tiny_model: Any,
    tmp_path: Path,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(before, stores, tiny_model, first)
    killed_after(SAVED_AT, first, second)
    train(after, stores, tiny_model, second)
    expected = losses(serial_run)
    for (_, loss, _), (_, again, _) in zip(expected, losses(second), strict=True):
        assert again == pytest.approx(loss, rel=1e-5)
