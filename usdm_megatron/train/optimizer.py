"""Core's DDP and distributed optimizer, with what core 0.16.1 leaves undone for torch's Adam.

- Adam's state exists from the start, so that a checkpoint can be saved and loaded at any step.
- Every parameter has a `step` tensor of its own after a resume: core's loading gives all the same
  one, which Adam then increments once per parameter (`distrib_optimizer.py:864`).
- States are cut out of a buffer's by their places without the padding between its buckets: core saves
  shifted ones where there is some (its "issue #504", `distrib_optimizer.py:1505`).
- fp32 masters are reloaded after weights were (`reload_masters`): else the first update undoes the load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import DistributedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, param_is_not_shared
from torch import Tensor

from usdm_megatron.config import OptimizerConfig as AdamConfig
from usdm_megatron.config import ParallelConfig
from usdm_megatron.model.lora.new_rows import NewRows
from usdm_megatron.runtime.process_groups import ProcessGroups
from usdm_megatron.train.adam_states import states_of

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def wrap_chunks(
    chunks: list[Any], parallel: ParallelConfig, groups: ProcessGroups
) -> list[DistributedDataParallel]:
    """Each chunk inside core's DDP, bf16 chunks inside `Float16Module` first."""
    _give_new_rows_their_own_bucket(chunks)
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.accumulate_allreduce_grads_in_fp32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 else chunk
        ddp = DistributedDataParallel(
            config,
            ddp_config,
            module,
            # later chunks start their backward pass first: nothing to overlap with in their buckets
            disable_bucketing=index > 0,
            pg_collection=groups.collection,
        )
        wrapped.append(ddp)
    if parallel.overlap_grad_reduce:
        no_sync = [ddp.no_sync for ddp in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _give_new_rows_their_own_bucket(chunks: list[Any]) -> None:
    """Tensor parallel ranks hold different numbers of new rows, or none (`NewRows`).

    Replicas divide a bucket evenly, so behind such rows the same weight would be divided otherwise on each
    tensor parallel rank, and core sums the gradients of weights that ranks share after that division,
    part by part. `shared_embedding` is core's own mark for this; it means nothing else
    (`param_and_grad_buffer.py:700`).
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, NewRows) and module.weight is not None:
            module.weight.shared_embedding = True  # type: ignore[attr-defined]


class AdamW:
    """AdamW over this rank's shard of the model; one object for update, clipping and checkpoint state."""

    def __init__(
        self, chunks: list[DistributedDataParallel], config: AdamConfig, groups: ProcessGroups, *, bf16: bool
    ) -> None:
        self._config = config
        self._chunks = chunks
        overrides = {} if config.decay_norms else {_one_dimensional(): {"wd_mult": 0.0}}
        chained = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=True,
                use_precision_aware_optimizer=config.use_precision_aware_optimizer,
                store_param_remainders=False,  # whole masters: loadable by any other optimizer
                optimizer_cpu_offload=config.optimizer_cpu_offload,
                optimizer_offload_fraction=config.optimizer_offload_fraction,
                overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
            ),
            chunks,
            config_overrides=overrides,  # None would mean core's own rule
            use_gloo_process_groups=False,
            pg_collection=None,
        )
        (self._sharded,) = chained.chained_optimizers
        assert isinstance(self._sharded, DistributedOptimizer)
        self._states = states_of(self._sharded)
        for group in self._sharded.param_groups:
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
            if isinstance(self._sharded.optimizer, torch.optim.AdamW):
                group["fused"] = True
        self._states.create()

    def zero_grad(self) -> None:
        self._sharded.zero_grad()

    @torch.no_grad()
    def collect_gradients(self) -> Tensor:
        """Take the reduced gradients; returns this rank's part of the squared norm, a scalar.

        Summed over all ranks it is the squared norm of the model's gradient: what tensor parallel
        ranks share is counted on the first.
        """
        self._sharded.prepare_grads()
        grads = self._sharded.get_main_grads_for_grad_norm()
        if not grads:
            return torch.zeros((), device=torch.cuda.current_device())
        return torch.stack(torch._foreach_norm(grads)).square().sum()

    @torch.no_grad()
    def update(self, lr: float, gradient_norm: float) -> None:
        """One AdamW update at `lr`, gradients clipped to the configured norm first."""
        limit = self._config.clip_grad
        if limit > 0 and gradient_norm > limit:
            torch._foreach_mul_(self._states.gradients(), limit / (gradient_norm + _CLIP_EPSILON))
        for group in self._sharded.param_groups:
            group["lr"] = lr
        self._sharded.step_with_ready_grads()

    def finish_update(self) -> None:
        """Wait for weights that an overlapped gather still owes this rank: before a checkpoint reads them."""
        for chunk in self._chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def reload_masters(self) -> None:
        """Take the fp32 masters from the model: after loading weights without optimizer state."""
        self._states.reload_masters()

    def sharded_state(self, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """Masters and moments in the shapes of the model's parameters, loadable at any layout."""
        with _unpadded_places(self._sharded.buffers):
            param_state = self._sharded.sharded_param_state_fully_reshardable(
                model_state, is_loading=loading, metadata={}
            )
        return {"param_state": param_state}

    def load_state(self, state: dict[str, Any], steps: int) -> None:
        """Put loaded masters and moments in place, as after `steps` updates."""
        states = self._sharded.optimizer.state
        for entry in states.values():
            entry.pop("step", None)  # core copies every entry by name and has no "step" to copy
        self._sharded.load_parameter_state_from_fully_reshardable(state["param_state"])
        self._states.set_steps(steps)

    def state_bytes(self) -> int:
        """Bytes of masters and moments on this rank."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._states.tensors())

    def own_state_bytes(self) -> int:
        """Bytes of masters and moments, each on one rank; their sum is what one process would have.

        Without fp32 masters, which are the weights themselves, and without step counts.
        """
        weights = {_memory(parameter) for chunk in self._chunks for parameter in chunk.parameters()}
        tp_group = getattr(self._sharded, "tp_group", None)
        return sum(
            tensor.numel() * tensor.element_size()
            for parameter, tensors in self._states.by_parameter()
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, tp_group)
            for tensor in tensors
            if tensor.dim() > 0 and _memory(tensor) not in weights
        )

    def owned_part(self, parameter: Tensor) -> range:
        """Which elements of `parameter`, flattened, this replica updates; it may be none of them."""
        if parameter not in self._sharded.model_param_gbuf_map:
            return range(0)
        own = self._sharded._get_model_param_range_map(parameter)["param"]
        return range(own.start, own.end)


def _memory(tensor: Tensor) -> int:
    """Two tensors with the same number are views of the same memory."""
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _unpadded_places(buffers: list[Any]) -> Iterator[None]:
    """Inside, a buffer's `param_index_map` says where parameters are without gaps between buckets."""
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        starts = list(accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        gaps = [bucket.offset - start for bucket, start in zip(buffer.buckets, starts, strict=False)]
        buffer.param_index_map = {
            parameter: (start - gaps[index], end - gaps[index], index)
            for parameter, (start, end, index) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def _one_dimensional() -> ParamKey:
    return ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=lambda param: param.dim() == 1))
