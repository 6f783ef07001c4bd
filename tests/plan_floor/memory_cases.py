"""Runs whose memory is planned and measured, by the ranks that they need."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.training.jobs import Layout
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.plan.activations import CPU
from usdm_megatron.plan.memory import StageMemory, memory_by_stage
from usdm_megatron.plan.model_shape import ModelShape
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=300, unit_count=100)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to measure: seconds long, and with activations that outweigh the weights."""

    layout: Layout = Layout()
    seq_length: int = 1024
    micro_batch_size: int = 1
    micro_batches: int = 2
    bf16: bool = False
    layers: int = 4
    changes: tuple[tuple[str, Any], ...] = ()  # to the architecture

    @property
    def model(self) -> HFArchitecture:
        fields: dict[str, Any] = {
            "hidden": 64,
            "layers": self.layers,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "ffn": 224,
            "vocab_size": VOCABULARY.size,
            "max_positions": 8192,
            "sliding_window": None,
        }
        return HFArchitecture(**{**fields, **dict(self.changes)})


def plan(case: Case) -> tuple[StageMemory, ...]:
    layout = case.layout
    return memory_by_stage(
        ModelShape("tiny", case.model, VOCABULARY),
        layout.parallel,
        ParallelLayout(layout.ranks, layout.tp, layout.pp, layout.vpp),
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        micro_batches=case.micro_batches,
        bf16=case.bf16,
        kernels=CPU,
    )


FULL = ("recompute_granularity", "full")
SELECTIVE = ("recompute_granularity", "selective")
_BF16_GRADIENTS = ("accumulate_allreduce_grads_in_fp32", False)
_TWO = ("recompute_num_layers", 2)

ONE_RANK = [
    Case(),
    Case(bf16=True, micro_batch_size=2, changes=(("tied", True),)),
    Case(Layout(extra=(FULL, _TWO))),
    Case(Layout(extra=(FULL, _TWO, ("recompute_method", "block"), _BF16_GRADIENTS)), bf16=True),
    Case(Layout(extra=(SELECTIVE, ("recompute_modules", ("core_attn", "mlp"))))),
]
TWO_RANKS = [
    Case(Layout(tp=2), micro_batch_size=2),
    Case(Layout(tp=2, sp=True, extra=(SELECTIVE,)), bf16=True),
    Case(Layout(pp=2), micro_batches=3, changes=(("tied", True),)),
    Case(Layout(pp=2, vpp=2), micro_batches=4, layers=8),
    Case(Layout(pp=2, extra=(("decoder_first_pipeline_num_layers", 5),)), micro_batches=3, layers=6),
    Case(Layout(dp=2, extra=(("overlap_grad_reduce", True), ("overlap_param_gather", True))), bf16=True),
]
FOUR_RANKS = [
    Case(Layout(tp=2, pp=2, sp=True), micro_batches=3, layers=8),
    Case(Layout(pp=4), micro_batches=6, layers=8),
]
MORE = [
    Case(Layout(extra=(FULL,)), bf16=True, seq_length=2048, layers=8),
    Case(Layout(extra=(SELECTIVE, ("recompute_modules", ("mlp",)))), layers=8),
    Case(Layout(extra=(SELECTIVE,)), micro_batch_size=2),
    Case(seq_length=2048, bf16=True),
]
MORE_OF_FOUR = [
    Case(Layout(pp=2, vpp=3, dp=2), micro_batches=4, layers=12),
    Case(Layout(pp=4, vpp=2), micro_batches=8, layers=16),
    Case(Layout(tp=2, pp=2, sp=True, vpp=2, extra=(FULL,)), micro_batches=6, layers=16),
    Case(Layout(tp=4, sp=True), seq_length=4096, changes=(("kv_heads", 4),)),
]
