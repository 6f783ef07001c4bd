"""Core's schedules over chunks of one weight, each call noted (module level, for forked ranks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.training.jobs import TIMEOUT
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import ParallelConfig


class _Chunk(torch.nn.Module):
    """Multiplies what it receives by one weight; the last one's output is a scalar loss."""

    def __init__(self, config: Any, is_first: bool, is_last: bool) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(torch.ones(()))
        self._is_first, self._is_last = is_first, is_last
        self._received: Any = None

    def set_input_tensor(self, received: Any) -> None:
        self._received = received[0] if isinstance(received, list) else received

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        output = (own if self._is_first else self._received) * self.weight
        return output.sum() if self._is_last else output


def record_orders(
    environment: Any, store: Any, steps: Sequence[tuple[int, int]]
) -> list[list[tuple[str, int, int]]]:
    """(kind, chunk, micro-batch) of every call on this rank, for each (vpp, micro-batches); pp = ranks."""
    return [
        _record(environment, torch.distributed.PrefixStore(f"step_{index}", store), vpp, micro_batches)
        for index, (vpp, micro_batches) in enumerate(steps)
    ]


def _record(environment: Any, store: Any, vpp: int, micro_batches: int) -> list[tuple[str, int, int]]:
    from megatron.core.pipeline_parallel import schedules

    from usdm_megatron.layout import ParallelLayout
    from usdm_megatron.model.architecture import build_transformer_config
    from usdm_megatron.runtime.process_groups import open_process_groups

    pp = environment.world_size
    layout = ParallelLayout(pp, 1, pp, vpp)
    parallel = ParallelConfig(pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=vpp)
    model = HFArchitecture(
        hidden=4, layers=pp * vpp, heads=1, kv_heads=1, head_dim=4, ffn=4, vocab_size=8, max_positions=8,
        sliding_window=None,
    )  # fmt: skip
    calls: list[tuple[str, int, int]] = []
    of_output: dict[int, tuple[int, int]] = {}
    outputs = []  # kept, so that their addresses stay theirs
    forward, backward = schedules.forward_step, schedules.backward_step

    def noted_forward(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        chunk = chunks.index(args[2])
        calls.append(("forward", chunk, kwargs["current_microbatch"]))
        output = _only(result[0])
        outputs.append(output)
        of_output[id(output)] = calls[-1][1:]
        return result

    def noted_backward(input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(("backward", *of_output[id(_only(output_tensor))]))
        return backward(input_tensor, output_tensor, *args, **kwargs)

    with open_process_groups(layout, environment, timeout=TIMEOUT, store=store) as groups:
        config = build_transformer_config(model, parallel, dtype=torch.float32)
        chunks = [
            _Chunk(config, groups.is_first_stage and chunk == 0, groups.is_last_stage and chunk == vpp - 1)
            for chunk in range(vpp)
        ]

        def forward_step(iterator: Any, chunk: Any) -> Any:
            return chunk(next(iterator)), lambda loss: (loss, {})

        iterators = [iter(torch.ones(micro_batches, 2, 1, 4)) for _ in chunks]
        schedules.forward_step, schedules.backward_step = noted_forward, noted_backward
        try:
            schedules.get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if vpp > 1 else iterators[0],
                model=chunks if vpp > 1 else chunks[0],
                num_microbatches=micro_batches,
                seq_length=2,
                micro_batch_size=1,
                forward_only=False,
            )
        finally:
            schedules.forward_step, schedules.backward_step = forward, backward
    return calls


def _only(tensor: Any) -> torch.Tensor:
    return tensor[0] if isinstance(tensor, list) else tensor
