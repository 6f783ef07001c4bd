"""The `parallel` section of a run's configuration: how model, batch and memory are divided among ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from usdm_megatron.config_checks import below_one
from usdm_megatron.errors import ConfigError
from usdm_megatron.layout import RankOrder
from usdm_megatron.pipeline_stages import layout_chunks, wrong_chunk_count

RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are divided among ranks."""

    tensor_model_parallel_size: int = 1
    """tensor parallel ranks"""
    pipeline_model_parallel_size: int = 1
    """pipeline stages"""
    num_virtual_stages_per_pipeline_rank: int = 1
    """model chunks a rank holds (interleaved pipeline)"""
    decoder_first_pipeline_num_layers: int | None = None
    """layers of the first pipeline stage (as many as the others unless given)"""
    decoder_last_pipeline_num_layers: int | None = None
    """layers of the last pipeline stage (as many as the others unless given)"""
    pipeline_model_parallel_layout: str | None = None
    """what every pipeline chunk holds, along the model, such as "Et*3|t*4|t*4|t*3L": E embedding, t layer,
    L output and loss"""
    use_tp_pp_dp_mapping: bool = False
    """pipeline stages on neighbouring ranks and replicas furthest apart, instead of the other way round"""
    sequence_parallel: bool = False
    """shard norms and residuals along the sequence over tensor parallel ranks"""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """activation recompute: none, selected modules, or whole layers"""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """modules that selective recompute covers: core_attn, mlp, layernorm"""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """which layers full recompute covers"""
    recompute_num_layers: int = 1
    """layers in a recomputed group (uniform) or recomputed layers a chunk (block)"""
    accumulate_allreduce_grads_in_fp32: bool = True
    """sum gradients over micro-batches and replicas in fp32; off: in the dtype of the weights"""
    overlap_grad_reduce: bool = False
    """reduce gradients while the backward pass runs"""
    overlap_param_gather: bool = False
    """gather parameters while the forward pass runs"""
    overlap_p2p_communication: bool = True
    """overlap pipeline sends with compute (interleaved pipeline only)"""
    distributed_timeout_minutes: float = 10.0
    """after this many minutes a stuck collective ends the run"""

    @property
    def rank_order(self) -> RankOrder:
        """Which axis' ranks lie closest together, in megatron-core's words."""
        return "tp-cp-ep-pp-dp" if self.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"

    @property
    def has_even_stages(self) -> bool:
        """Whether all pipeline chunks hold the same number of layers because nobody asked for another."""
        return (
            self.decoder_first_pipeline_num_layers is None
            and self.decoder_last_pipeline_num_layers is None
            and self.pipeline_model_parallel_layout is None
        )

    def problems(self) -> list[str]:
        counts = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "num_virtual_stages_per_pipeline_rank": self.num_virtual_stages_per_pipeline_rank,
            "recompute_num_layers": self.recompute_num_layers,
            "decoder_first_pipeline_num_layers": self.decoder_first_pipeline_num_layers,
            "decoder_last_pipeline_num_layers": self.decoder_last_pipeline_num_layers,
        }
        problems = below_one(
            "parallel", **{name: count for name, count in counts.items() if count is not None}
        )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            problems.append(
                "parallel: --sequence-parallel shards over tensor parallel ranks and there is one; "
                "drop it or set --tensor-model-parallel-size 2 or more"
            )
        problems += self._pipeline_problems()
        unknown = sorted(set(self.recompute_modules) - set(RECOMPUTE_MODULES))
        if unknown:
            problems.append(
                f"parallel: recompute module {', '.join(unknown)} is not one of core_attn, mlp, layernorm"
            )
        if self.recompute_granularity == "selective" and not self.recompute_modules:
            problems.append(
                "parallel: --recompute-granularity selective without modules recomputes nothing; name some "
                "with --recompute-modules, or drop it"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            problems.append("parallel: --overlap-param-gather needs --overlap-grad-reduce; set both")
        if self.distributed_timeout_minutes <= 0:
            problems.append(
                f"parallel: distributed_timeout_minutes is {self.distributed_timeout_minutes}; it "
                "must be positive"
            )
        return problems

    def _pipeline_problems(self) -> list[str]:
        """What no model could do; what this one cannot, `stage_layers` says."""
        pp, vpp = self.pipeline_model_parallel_size, self.num_virtual_stages_per_pipeline_rank
        problems = []
        if vpp > 1 and pp == 1:
            problems.append(
                "parallel: virtual stages need a pipeline; set --pipeline-model-parallel-size 2 or more"
            )
        elif vpp > 1 and pp == 2 and not self.overlap_p2p_communication:
            # megatron-core 0.16.1 crosses the messages of the two neighbours, silently
            problems.append(
                "parallel: an interleaved pipeline of 2 stages gives a wrong loss without "
                "overlapped p2p; "
                "drop --no-overlap-p2p-communication"
            )
        if self.has_even_stages:
            return problems
        if pp == 1:
            problems.append(
                "parallel: the layers of pipeline stages are given and there is one stage; set "
                "--pipeline-model-parallel-size 2 or more, or drop them"
            )
        text = self.pipeline_model_parallel_layout
        if text is None or not text.strip():
            return problems
        if self.decoder_first_pipeline_num_layers or self.decoder_last_pipeline_num_layers:
            problems.append(
                "parallel: --pipeline-model-parallel-layout says what every stage holds; drop "
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers beside it"
            )
        try:
            chunks = layout_chunks(text)
        except ConfigError as error:
            return [*problems, *error.problems]
        if pp > 1 and vpp >= 1 and len(chunks) != pp * vpp:
            problems.append(wrong_chunk_count(text, len(chunks), pp, vpp))
        return problems
