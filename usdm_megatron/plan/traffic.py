"""What a rank sends in a step, by kind: bytes, link, and how much of it computation hides."""

from __future__ import annotations

from dataclasses import dataclass

from usdm_megatron.plan.communication import Link, data_parallel, pipeline_hop, tensor_parallel
from usdm_megatron.plan.step_time import Planned, StepTime, collectives_of_layer, most_layers, most_parameters


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of the busiest rank; times are None where a rate is unknown."""

    kind: str
    what: str
    bytes: float
    link: Link
    busy_s: float | None
    exposed_s: float | None

    @property
    def hides(self) -> str:
        """yes, in part, no; none where nothing is sent, unknown without rates."""
        if self.link.place == "none":
            return "none"
        if self.busy_s is None or self.exposed_s is None:
            return "unknown"
        share = self.exposed_s / self.busy_s
        return "yes" if share < 0.1 else "no" if share > 0.9 else "in part"


def traffic(planned: Planned, step: StepTime | None) -> tuple[Traffic, ...]:
    """Every kind of communication in one step of the busiest rank."""
    model, layout, parallel = planned.model, planned.layout, planned.parallel
    common = (layout, planned.hardware)
    collective = tensor_parallel(model, *common, planned.tokens, planned.element)
    count = planned.micro_batches * most_layers(planned) * collectives_of_layer(parallel)
    hop = pipeline_hop(model, parallel, *common, planned.tokens, planned.element)
    hops = 2 * planned.micro_batches * layout.vpp if layout.pp > 1 else 0
    data = data_parallel(most_parameters(planned), parallel, *common, planned.element)
    gradients = "fp32" if parallel.accumulate_allreduce_grads_in_fp32 or not planned.bf16 else "bf16"
    weights = "bf16" if planned.bf16 else "fp32"
    tensor = "all-gather and reduce-scatter" if parallel.sequence_parallel else "all-reduce"
    sends = f"{hops} sends of {hop.bytes / 2**20:.0f} MiB"
    replicas = "data parallel"
    kinds = [
        ("tensor parallel", f"{tensor} of activations", count * collective.sent_bytes, collective.link),
        ("pipeline", sends, hops * hop.bytes, hop.link),
        (f"{replicas}, gradients", f"reduce-scatter in {gradients}", data.gradient_bytes, data.link),
        (f"{replicas}, weights", f"all-gather in {weights}", data.weight_bytes, data.link),
    ]
    if step is None:
        return tuple(Traffic(*kind, None, None) for kind in kinds)
    sending = hops * hop.seconds
    times = (
        (step.tensor_busy, step.tensor_exposed),
        # without overlap a step also waits for what the stages before send first: not this rank's to hide
        (sending, min(sending, step.pipeline)),
        (data.reduce_s, step.reduce),
        (data.gather_s, step.gather),
    )
    return tuple(Traffic(*kind, *time) for kind, time in zip(kinds, times, strict=True))
