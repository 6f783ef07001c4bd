"""Process groups, opened from a `ParallelLayout` in one place, and the seeds of a rank."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from usdm_megatron.errors import ConfigError
from usdm_megatron.layout import ParallelLayout, RankCoordinates
from usdm_megatron.runtime.cpu import enter_cpu_redirect
from usdm_megatron.runtime.ranks import LOOPBACK, RankEnvironment

_STRAGGLERS_S = 0.02


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's place in the layout and the groups it talks to.

    `collection` is core's `ProcessGroupCollection`; tp, pp and dp are its groups of those axes.
    """

    layout: ParallelLayout
    coordinates: RankCoordinates
    rank: int
    device: torch.device
    collection: Any

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def is_first_stage(self) -> bool:
        return self.coordinates.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.pp == self.layout.pp - 1


@contextmanager
def open_process_groups(
    layout: ParallelLayout,
    environment: RankEnvironment,
    *,
    timeout: timedelta,
    store: dist.Store | None = None,
) -> Iterator[ProcessGroups]:
    """Join the world and open the groups of `layout`; close them at the end.

    NCCL on CUDA, gloo on CPU. A stuck collective raises after `timeout`. `store` replaces the
    TCP store at `master_addr:master_port` (tests meet at a file).
    """
    device = _pick_device(environment.local_rank)
    _join_world(environment, device, timeout, store)
    try:
        with divide_world(layout, environment.rank, device, timeout=timeout) as groups:
            yield groups
    finally:
        leave_world()


def leave_world() -> None:
    """Destroy the process groups, a moment after their last collective.

    A thread of gloo's still holds that one's tensors and needs the GIL to drop them; torch 2.6 waits for
    the thread without releasing it, for ever (pytorch#154976).
    """
    time.sleep(_STRAGGLERS_S)
    dist.destroy_process_group()


@contextmanager
def divide_world(
    layout: ParallelLayout, rank: int, device: torch.device, *, timeout: timedelta
) -> Iterator[ProcessGroups]:
    """The groups of `layout` in a world that was joined; closed at the end."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
            order=layout.order,
            create_gloo_process_groups=False,
        )
        yield ProcessGroups(
            layout=layout,
            coordinates=layout.coordinates(rank),
            rank=rank,
            device=device,
            collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    finally:
        parallel_state.destroy_model_parallel()


def seed_rank(seed: int, coordinates: RankCoordinates) -> None:
    """Seed every generator of this rank as Megatron does, plus the data parallel rank.

    Megatron adds 100 x pipeline rank; tensor parallel ranks differ inside core's tracker. The data
    parallel rank makes dropout differ between replicas; weights are loaded, never drawn here.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    rank_seed = seed + 100 * coordinates.pp + 10_000 * coordinates.dp
    random.seed(rank_seed)
    np.random.seed(rank_seed % 2**32)
    torch.manual_seed(rank_seed)
    model_parallel_cuda_manual_seed(rank_seed, force_reset_rng=True)


def _pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        enter_cpu_redirect()
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    if devices > 1 and local_rank >= devices:  # one visible device a rank is how some schedulers bind them
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine shows {devices}; "
            f"start at most {devices} ranks here"
        )
    torch.cuda.set_device(local_rank % devices)
    return torch.device("cuda", torch.cuda.current_device())


def _join_world(
    environment: RankEnvironment, device: torch.device, timeout: timedelta, store: dist.Store | None
) -> None:
    if store is None and environment.world_size == 1:
        store = dist.HashStore()  # a run of one meets nobody
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    if store is None:
        # env:// knows whether torchrun's agent already listens; under Slurm nobody has named the rank yet
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(environment.rank), str(environment.world_size)
    named = store is not None  # env:// reads both itself
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
        rank=environment.rank if named else -1,
        world_size=environment.world_size if named else -1,
    )
