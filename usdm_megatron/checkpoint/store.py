"""torch_dist checkpoints on disk, as megatron-core 0.16.1 reads and writes them.

    common.pt            what is not sharded (rank 0); torch.load(weights_only=True) reads it
    metadata.json        core's four keys, by which it recognises the format
    .metadata            which tensor, or part of one, lies where (`tensor_reader.py`)
    __{rank}_{n}.distcp  the tensors (`distcp_writer.py`)

Core's stock save strategy fails or crawls on CPU (it forks writers, pins memory and asks for
the CUDA device: `strategies/filesystem_async.py:230`), so writing is `torch.distributed.checkpoint.save`
with core's planner; everything else is core's. What torch would unpickle without a look (`.metadata`,
sharded objects) is looked at first (`metadata_file.py`, `TensorReader.check_objects`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from usdm_megatron.checkpoint.commit import commit_checkpoint
from usdm_megatron.checkpoint.common_file import (
    BACKEND,
    BACKEND_VERSION,
    namespace_allowed,
    write_common,
    write_format,
)
from usdm_megatron.checkpoint.distcp_writer import DistcpWriter, torch_failures
from usdm_megatron.checkpoint.integrity import files_below
from usdm_megatron.checkpoint.ranks import on_every_rank, on_rank_zero
from usdm_megatron.checkpoint.resolve import CheckpointName
from usdm_megatron.checkpoint.tensor_reader import StoredTensor, TensorReader
from usdm_megatron.errors import CheckpointError
from usdm_megatron.runtime.process_groups import leave_world

if TYPE_CHECKING:
    import torch

ShardedStateDict = dict[str, Any]  # core's: nested, with ShardedTensor / ShardedObject leaves
# Transformer Engine's fp8 scales; empty objects everywhere else. Which modules have one depends on
# the layer spec, so a checkpoint written on CPU lacks some that a TE model asks for, and vice versa.
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class SavedCheckpoint:
    """What `save_checkpoint` wrote."""

    path: Path
    size_bytes: int


def save_checkpoint(
    root: Path,
    name: CheckpointName,
    sharded_state_dict: ShardedStateDict,
    common: dict[str, Any],
    extra_files: Callable[[Path], None] | None = None,
    *,
    replace: bool = False,
) -> SavedCheckpoint:
    """Write one checkpoint by the commit protocol; collective over all ranks.

    `sharded_state_dict` has the model under `model`, the optimizer under `optimizer`, …; `common`
    is written by rank 0 as it is there, and so is whatever `extra_files(directory)` writes.
    Replicated tensors are divided over the ranks that hold them. `replace` permits an existing
    checkpoint of that name to go. Raises `CheckpointError` on all ranks when it fails on any.
    """
    path = commit_checkpoint(
        root,
        name,
        lambda directory: _write_torch_dist(directory, {**common, **sharded_state_dict}, extra_files),
        replace=replace,
    )
    size = on_rank_zero(
        f"measuring {path}", lambda: sum((path / file).stat().st_size for file in files_below(path))
    )
    return SavedCheckpoint(path, size)


def load_sharded(
    directory: Path,
    sharded_state_dict: ShardedStateDict,
    *,
    strict: Literal["all", "requested"] = "all",
    cast: bool = False,
) -> dict[str, Any]:
    """Load what `sharded_state_dict` asks for, at any layout; collective over all ranks.

    Returns it with tensors and objects in place of the sharded ones, merged with the contents
    of `common.pt`. `strict="all"`: the checkpoint must hold nothing that no rank asks for;
    `"requested"`: it may (weights only, from a run). `cast=False`: types must be equal too.
    Raises `CheckpointError` on all ranks, naming each tensor that is missing, superfluous, or
    of another shape or type, before anything is read.
    """
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    reader = on_every_rank_local(f"reading {directory}", lambda: TensorReader(directory))
    on_rank_zero(f"checking the objects of {directory}", reader.check_objects)
    stored, objects = reader.tensors, reader.objects
    sharded_state_dict = _without_absent_extra_state(sharded_state_dict, objects)
    # Applying the factories splits tensors (gate and up), so compare what core will ask for.
    requested = _sharded_leaves(load_preprocess(sharded_state_dict)[0])
    asked = on_every_rank(
        f"reading {directory}", lambda: _check_fit(directory, requested, stored, objects, cast)
    )
    if strict == "all":
        there = {*stored, *(name.split("/shard_")[0] for name in objects)}
        extra = sorted(key for key in there.difference(*asked) if not key.endswith(_EXTRA_STATE))
        if extra:
            raise CheckpointError(
                *(f"{directory} holds {key}, which this model or optimizer does not have" for key in extra)
            )
    return on_every_rank_local(f"loading {directory}", lambda: _load(directory, sharded_state_dict))


def load_full_tensors(
    directory: Path, keys: Iterable[str], layer: int | None = None
) -> dict[str, torch.Tensor]:
    """Whole tensors by their key, or one layer of them (`TensorReader.read`); all in memory at once."""
    reader = TensorReader(directory)
    return {key: reader.read(key, layer) for key in keys}


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Shape and type of every tensor in a checkpoint, by key; reads no tensor data."""
    return TensorReader(directory).tensors


@contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of one rank for as long as it takes, unless one is open already.

    Core's checkpoint functions ask for one. No port is opened.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        leave_world()


def on_every_rank_local(what: str, action: Callable[[], Any]) -> Any:
    """As `on_every_rank`, without sending results around: every rank gets its own."""
    result: list[Any] = []
    on_every_rank(what, lambda: result.append(action()))
    return result[0]


def _load(directory: Path, sharded_state_dict: ShardedStateDict) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    with torch_failures(), namespace_allowed():
        return dist_checkpointing.load(
            sharded_state_dict,
            str(directory),
            sharded_strategy=TorchDistLoadShardedStrategy(),
            validate_access_integrity=False,  # a matter of saving; checked there
        )


def _write_torch_dist(
    directory: Path, state: dict[str, Any], extra_files: Callable[[Path], None] | None
) -> dict[str, str]:
    """`dist_checkpointing.save`, stage by stage; returns the sha256 of the files that this rank wrote.

    Core's own function lets rank 0 alone raise (validation, `common.pt`), and leaves the others
    waiting in the next collective.
    """
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.validation import (
        determine_global_metadata,
        validate_sharding_integrity,
    )

    sharded, common = on_every_rank_local(
        "collecting the shards", lambda: save_preprocess(state, validate_access_integrity=False)
    )
    _, global_metadata = determine_global_metadata(sharded)
    on_rank_zero("checking the shards", lambda: validate_sharding_integrity(global_metadata))
    on_rank_zero(f"writing {directory}", lambda: _write_small_files(directory, common, extra_files))
    writer = DistcpWriter(directory)
    FullyParallelSaveStrategyWrapper(_strategy(writer)).save(sharded, directory)
    return writer.hashes


def _write_small_files(
    directory: Path, common: dict[str, Any], extra_files: Callable[[Path], None] | None
) -> None:
    write_common(directory, common)
    write_format(directory)
    if extra_files is not None:
        extra_files(directory)


def _strategy(writer: DistcpWriter) -> Any:
    """A core save strategy over `torch.distributed.checkpoint.save`: same layout, no child processes."""
    import torch.distributed.checkpoint as dcp
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

    class TorchDistSave(SaveShardedStrategy):
        can_handle_sharded_objects = True

        def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path | str) -> None:
            by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict, keep_only_main_replica=True
            )
            with torch_failures():
                dcp.save(
                    mcore_to_pyt_state_dict(by_key),
                    storage_writer=writer,
                    planner=MCoreSavePlanner(flatten_state_dict=False),
                )

    return TorchDistSave(BACKEND, BACKEND_VERSION)


def _check_fit(
    directory: Path, requested: list[Any], stored: dict[str, StoredTensor], objects: set[str], cast: bool
) -> set[str]:
    """The keys that this rank asks for; raises on what the checkpoint lacks or has in another form."""
    from megatron.core.dist_checkpointing import ShardedTensor

    problems: dict[str, None] = {}  # in order, each once
    for leaf in requested:
        if not isinstance(leaf, ShardedTensor):
            if leaf.unique_key not in objects:
                problems[f"{directory} does not hold {leaf.unique_key}"] = None
            continue
        there = stored.get(leaf.key)
        if there is None:
            problems[f"{directory} does not hold {leaf.key}"] = None
        elif there.shape != tuple(leaf.global_shape):
            problems[
                f"{directory}: {leaf.key} has shape {list(there.shape)}, expected {list(leaf.global_shape)}"
            ] = None
        elif there.dtype != leaf.dtype and not cast:
            problems[f"{directory}: {leaf.key} is {there.dtype}, expected {leaf.dtype}"] = None
    if problems:
        raise CheckpointError(*problems)
    return {leaf.key for leaf in requested}


def _without_absent_extra_state(sharded_state_dict: ShardedStateDict, objects: set[str]) -> ShardedStateDict:
    """A copy in which every `_extra_state` that the checkpoint lacks is None already."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    def replace(leaf: Any) -> Any:
        absent = (
            isinstance(leaf, ShardedObject)
            and leaf.key.endswith(_EXTRA_STATE)
            and leaf.unique_key not in objects
        )
        return LocalNonpersistentObject(None) if absent else leaf

    return dict_list_map_outplace(replace, sharded_state_dict)


def _sharded_leaves(sharded_state_dict: ShardedStateDict) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    return [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedBase)]
