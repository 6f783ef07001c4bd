"""Trainable rows of new token ids over a frozen embedding: what PEFT calls `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor


class NewRows(torch.nn.Module):
    """The rows of `ids` that this rank's shard of a vocabulary-parallel weight holds; they may be none.

    Gradient and optimizer state exist for these rows alone. `first_id` is the shard's first row,
    `is_copy` says that another pipeline stage holds the same rows (tied embeddings).
    """

    def __init__(self, base: Tensor, first_id: int, ids: range, *, is_copy: bool = False) -> None:
        super().__init__()
        shard = range(first_id, first_id + base.size(0))
        self._own = range(max(ids.start, shard.start), max(ids.start, shard.start, min(ids.stop, shard.stop)))
        self._ids = ids
        self._first_id = first_id
        self._is_copy = is_copy
        self.register_parameter("weight", None)
        if self._own:
            self.weight = torch.nn.Parameter(base.new_zeros(len(self._own), base.size(1)))
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
            self.weight.shared = is_copy  # type: ignore[attr-defined]  # the norm counts the original

    def forward(self, base: Tensor) -> Tensor:
        """`base` with the trained rows in their place.

        It asks for a gradient on every rank, whether or not a row is its own: core's collectives in
        the backward pass differ for a frozen weight, and tensor parallel ranks must agree on them.
        """
        if self.weight is None:
            return base.detach().requires_grad_(torch.is_grad_enabled())
        start, stop = self._own.start - self._first_id, self._own.stop - self._first_id
        return torch.cat((base[:start], self.weight, base[stop:]))

    @torch.no_grad()
    def start(self, base: Tensor) -> None:
        """Take the rows that the base has: after it was loaded, before any training."""
        if self.weight is not None:
            self.weight.copy_(base[self._own.start - self._first_id : self._own.stop - self._first_id])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One tensor `[ids, h]` in uneven parts: shards of the vocabulary do not end where new ids begin."""
        assert not sharded_offsets
        if self.weight is None:
            return {}
        replica = (int(self._is_copy), 0, (metadata or {})["dp_cp_group"].rank())
        key = f"{prefix}weight"
        rows, hidden = self.weight.shape
        return {
            key: ShardedTensor(
                key,
                self.weight,
                self.weight.dtype,
                local_shape=(rows, hidden),
                global_shape=(len(self._ids), hidden),
                global_offset=(self._own.start - self._ids.start, 0),
                axis_fragmentations=None,
                replica_id=replica,
            )
        }


def sum_tied_rows(models: Sequence[Any], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients of new rows that the first and the last stage share.

    To be called where `finalize_model_grads` is, after it: core does this for a tied weight that trains
    itself. `models` are the bare chunks, `group` is core's embedding group; without tied embeddings, or
    with one stage, nothing happens.
    """
    if group is None or group.size() == 1 or dist.get_rank() not in dist.get_process_group_ranks(group):
        return
    for model in models:
        rows = getattr(model, "new_embedding_rows", None)
        if rows is not None and rows.weight is not None and model.share_embeddings_and_output_weights:
            dist.all_reduce(rows.weight.main_grad, group=group)
