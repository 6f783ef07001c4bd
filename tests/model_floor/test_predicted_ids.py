"""`predicted_ids` against `torch.argmax` over the whole vocabulary: shards, padding, ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from usdm_megatron.model.loss import count_by_kind, predicted_ids
from usdm_megatron.vocab import TargetKind

PADDED = 24


def logits(dtype: torch.dtype) -> torch.Tensor:
    """Few distinct values, so most maxima are shared; padding columns hold the largest of all."""
    torch.manual_seed(0)
    return torch.randint(0, 4, (200, PADDED)).to(dtype)


def job(environment: Any, store: Any, size: int, dtype: torch.dtype) -> torch.Tensor:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=store, rank=environment.rank, world_size=environment.world_size)
    whole = logits(dtype)
    whole[:, size:] = 100
    shard = whole.chunk(environment.world_size, dim=1)[environment.rank].contiguous()
    return predicted_ids(shard, vocabulary_size=size, tp_rank=environment.rank, group=dist.group.WORLD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ranks", "size"), [(1, 24), (1, 19), (2, 19), (2, 12), (3, 13)])
def test_equals_argmax(ranks: int, size: int, dtype: torch.dtype) -> None:
    """At 2 ranks and 12 ids the second holds nothing but padding."""
    expected = logits(dtype)[:, :size].argmax(dim=-1)
    for found in run_ranks(ranks, job, size, dtype):
        assert torch.equal(found, expected)


def test_counts_by_kind() -> None:
    kinds = torch.tensor([0, 1, 1, 3, 0])
    mask = torch.tensor([True, True, False, True, True])
    counts = count_by_kind(mask, kinds)
    assert counts.tolist() == [2, 1, 0, 1, 0, 0] and len(counts) == len(TargetKind)
