"""What ranks send each other, over which links, and how long a link is busy with it.

Bytes are those that one rank sends: a ring of n ranks passes (n-1)/n of a tensor in an all-gather or a
reduce-scatter, twice that in an all-reduce. A group inside a node has NVLink; one that crosses nodes has
the network interfaces of its members in a node, which it shares with no other group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from usdm_megatron.layout import Axis, ParallelLayout, RankCoordinates
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.plan.hardware import Hardware, Rate
from usdm_megatron.plan.model_shape import ModelShape

Place = Literal["none", "node", "network"]


@dataclass(frozen=True)
class Link:
    """The way between the ranks of a group."""

    place: Place
    members_in_node: int
    node: Rate
    network: Rate

    @property
    def rate_fields(self) -> tuple[str, ...]:
        """Fields of `Hardware` that must be known."""
        return {"none": (), "node": ("node_gb_per_s",), "network": ("network_gb_per_s",)}[self.place]

    def seconds(self, sent_bytes: float, payload_bytes: float) -> float:
        """Time to send `sent_bytes` of collectives over tensors of `payload_bytes`."""
        return 0.0 if self.place == "none" else sent_bytes / self.bytes_per_s(payload_bytes)

    def bytes_per_s(self, payload_bytes: float) -> float:
        """Bus bandwidth of one rank; of a network, of all interfaces that the group has in a node."""
        if self.place == "node":
            return 1e9 * self.node.at(payload_bytes)
        network = self.network.at(payload_bytes) * self.members_in_node
        return 1e9 * (min(network, self.node.at(payload_bytes)) if self.node.known else network)


def link_between(layout: ParallelLayout, hardware: Hardware, axis: Axis) -> Link:
    """The link of the groups along `axis`: ranks of a node are numbered one after another."""
    size, per_node = {"tp": layout.tp, "dp": layout.dp, "pp": layout.pp}[axis], hardware.gpus_per_node
    ranks = _first_group(layout, axis, size, per_node)
    here = sum(rank < per_node for rank in ranks)
    place: Place = "none" if size == 1 else "node" if here == size else "network"
    return Link(place, here, hardware.node_gb_per_s, hardware.network_gb_per_s)


def _first_group(layout: ParallelLayout, axis: Axis, size: int, per_node: int) -> list[int]:
    """The first ranks of rank 0's group, as many as tell whether it leaves the node."""
    stride = (
        layout.rank_of(RankCoordinates(**{**dict.fromkeys(("tp", "dp", "pp"), 0), axis: 1}))
        if size > 1
        else 1
    )
    return [index * stride for index in range(min(size, per_node + 1))]


@dataclass(frozen=True)
class Hop:
    """What a pipeline stage hands to the next one for one micro-batch, and how long that takes."""

    bytes: float
    link: Link

    @property
    def seconds(self) -> float:
        return self.link.seconds(self.bytes, self.bytes)


def pipeline_hop(
    model: ModelShape,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    hardware: Hardware,
    tokens: int,
    element: int,
) -> Hop:
    """Activations between two stages; sequence parallel ranks send a slice each, others the whole."""
    shared = layout.tp if parallel.sequence_parallel else 1
    size = element * tokens * model.architecture.hidden / shared
    link = link_between(layout, hardware, "pp")
    if link.place == "network":  # a message between two ranks has one interface
        link = Link("network", 1, Rate(), link.network)
    return Hop(size, link)


@dataclass(frozen=True)
class TensorParallel:
    """One collective of a layer over `[tokens, hidden]`; sequence parallel or not decides how many."""

    payload_bytes: float
    sent_bytes: float  # of an all-gather or a reduce-scatter
    link: Link

    @property
    def seconds(self) -> float:
        return self.link.seconds(self.sent_bytes, self.payload_bytes)


def tensor_parallel(
    model: ModelShape, layout: ParallelLayout, hardware: Hardware, tokens: int, element: int
) -> TensorParallel:
    """The all-gather (or reduce-scatter) of one micro-batch's activations."""
    payload = float(element * tokens * model.architecture.hidden)
    return TensorParallel(
        payload, payload * (layout.tp - 1) / layout.tp, link_between(layout, hardware, "tp")
    )


@dataclass(frozen=True)
class DataParallel:
    """A step's gradients and weights between replicas, of the rank that holds the most parameters."""

    gradient_bytes: float  # reduce-scatter, sent
    weight_bytes: float  # all-gather, sent
    bucket_share: float  # of all parameters, in the last bucket: nothing is left to hide it
    link: Link

    @property
    def reduce_s(self) -> float:
        return self.link.seconds(self.gradient_bytes, _BUCKET_PAYLOAD)

    @property
    def gather_s(self) -> float:
        return self.link.seconds(self.weight_bytes, _BUCKET_PAYLOAD)


_BUCKET_PAYLOAD = 128.0 * 2**20


def data_parallel(
    parameters: float, parallel: ParallelConfig, layout: ParallelLayout, hardware: Hardware, element: int
) -> DataParallel:
    """Reduce-scatter and all-gather of `parameters` over the replicas.

    Buckets are core's: max(40 M, 1 M x replicas) parameters (`distributed_data_parallel.py`).
    """
    share = (layout.dp - 1) / layout.dp
    gradient = 4 if parallel.accumulate_allreduce_grads_in_fp32 else element
    return DataParallel(
        gradient_bytes=share * gradient * parameters,
        weight_bytes=share * element * parameters,
        bucket_share=min(1.0, max(40e6, 1e6 * layout.dp) / parameters),
        link=link_between(layout, hardware, "dp"),
    )
