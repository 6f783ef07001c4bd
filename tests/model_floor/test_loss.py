"""The loss over a padded, tensor-parallel vocabulary against `F.cross_entropy` over the true columns."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks
from usdm_megatron.model import loss as loss_module
from usdm_megatron.model.loss import LossRecord, packed_cross_entropy
from usdm_megatron.vocab import TargetKind

TOKENS, PADDED = 37, 24
# true columns of 24: none of rank 1's, all of them, some of them, one of them
SIZES = [12, 24, 17, 13, 5]


def inputs(
    size: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits whose padding would own the softmax, labels that hit both ends, weights of the losses."""
    generator = torch.Generator().manual_seed(size)
    logits = scale * torch.randn(TOKENS, PADDED, generator=generator)
    logits[:, size:] = 1e4
    labels = torch.randint(0, size, (TOKENS,), generator=generator)
    labels[:2] = torch.tensor([0, size - 1])
    weights = torch.randn(TOKENS, generator=generator)
    weights[3] = 0  # a masked token
    return logits.to(dtype), labels, weights


def cross_entropy(
    rank: int, ranks: int, size: int, dtype: torch.dtype, scale: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's loss and gradient; vocabulary columns are divided evenly among the ranks."""
    import torch.distributed as dist

    loss_module._CHUNK_ELEMENTS = chunk  # several chunks, the last one short
    logits, labels, weights = inputs(size, dtype, scale)
    own = logits.chunk(ranks, dim=1)[rank].clone().requires_grad_()
    loss = packed_cross_entropy(
        own.clone(), labels, vocabulary_size=size, tp_rank=rank, group=dist.group.WORLD
    )
    (loss * weights).sum().backward()
    assert own.grad is not None
    return loss.detach(), own.grad


def all_sizes_job(environment: Any, store: Any, cases: list[Any]) -> list[Any]:
    import torch.distributed as dist

    from usdm_megatron.runtime.process_groups import leave_world

    rank, ranks = environment.rank, environment.world_size
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    found = [cross_entropy(rank, ranks, *case) for case in cases]
    leave_world()
    return found


CASES = [
    *((size, torch.float32, 3.0, chunk) for size in SIZES for chunk in (100, 1 << 24)),
    (17, torch.float32, 3e3, 100),  # logits far apart: a softmax without its maximum would overflow
    *((size, torch.bfloat16, 3.0, 100) for size in (12, 17)),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_cross_entropy_is_torchs_over_the_true_columns(ranks: int) -> None:
    by_rank = run_ranks(ranks, all_sizes_job, CASES)
    for case, *results in zip(CASES, *by_rank, strict=True):
        size, dtype, scale, _ = case
        logits, labels, weights = inputs(size, dtype, scale)
        reference = logits.double()[:, :size].requires_grad_()
        expected = F.cross_entropy(reference, labels, reduction="none")
        (expected * weights).sum().backward()
        assert reference.grad is not None
        gradient = torch.cat([gradient for _, gradient in results], dim=1)
        assert gradient.dtype == dtype
        for loss, _ in results:  # the same on every rank, fp32 whatever the logits
            assert loss.dtype == torch.float32
            torch.testing.assert_close(
                loss.double(), expected.detach(), rtol=1e-6, atol=1e-5 if scale < 1e3 else 1e-3
            )
        rtol, atol = (
            (0, 2e-6) if dtype == torch.float32 else (2**-8, 1e-6)
        )  # bf16: one rounding of the result
        torch.testing.assert_close(gradient[:, :size].double(), reference.grad, rtol=rtol, atol=atol)
        assert torch.count_nonzero(gradient[:, size:]) == 0, "padding got a gradient"


def test_loss_record_by_kind() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(200, generator=generator)
    mask = torch.rand(200, generator=generator) < 0.7
    kinds = torch.randint(0, 5, (200,), generator=generator).to(torch.uint8)  # no bos among them
    record = LossRecord.of_tokens(loss, mask, kinds)
    for kind in TargetKind:
        members = [float(x) for x, m, k in zip(loss, mask, kinds, strict=True) if m and k == kind]
        assert record.counts_K[kind] == len(members)
        assert record.sums_K[kind].item() == pytest.approx(sum(members), rel=1e-12)
    assert record.counts_K[TargetKind.BOS] == 0
    total = record + record + LossRecord.zero(torch.device("cpu"))
    assert torch.equal(total.counts_K, 2 * record.counts_K)
    assert torch.equal(total.sums_K, 2 * record.sums_K)


def test_loss_record_of_an_empty_row() -> None:
    record = LossRecord.of_tokens(
        torch.rand(8), torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.uint8)
    )
    assert record.sums_K.tolist() == record.counts_K.tolist() == [0.0] * len(TargetKind)
