"""A run's checkpoints: model, optimizer and random state to disk and back, at any layout.

A LoRA run's hold its adapter and the adapter's optimizer alone; the base is loaded from where it lies.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usdm_megatron.checkpoint.commit import rotate, write_best
from usdm_megatron.checkpoint.facts import CheckpointFacts, copy_facts, megatron_common, read_facts
from usdm_megatron.checkpoint.ranks import on_rank_zero
from usdm_megatron.checkpoint.resolve import directory_name
from usdm_megatron.checkpoint.store import SavedCheckpoint, load_sharded, save_checkpoint, stored_tensors
from usdm_megatron.config import RunConfig
from usdm_megatron.config_file import dump_config
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.model.lora.state import adapter_part, base_part, load_adapter, load_base
from usdm_megatron.runtime.process_groups import ProcessGroups, seed_rank
from usdm_megatron.runtime.random_state import get_random_state, set_random_state
from usdm_megatron.train.lora_start import LoraStart
from usdm_megatron.train.optimizer import AdamW
from usdm_megatron.train.start import RUN_CONFIG_FILE, StartPoint, TrainState

_RANDOM_STATE = "random_state"


class RunCheckpoints:
    """Saves and loads what a run needs to go on; `chunks` are the bare models, not their wrappers."""

    def __init__(
        self,
        config: RunConfig,
        facts: CheckpointFacts,
        chunks: list[Any],
        optimizer: AdamW,
        groups: ProcessGroups,
        lora: LoraStart | None,
    ) -> None:
        self._lora = lora
        self._config = config
        self._facts = facts
        self._chunks = chunks
        self._optimizer = optimizer
        self._groups = groups

    def save(self, state: TrainState) -> tuple[SavedCheckpoint, float]:
        """Save after `state.step` steps, rotate old ones; returns what was written and its seconds."""
        started_at = time.perf_counter()
        root = Path(self._config.checkpoint.save or "")
        self._optimizer.finish_update()
        model = self._model_state()
        tensors = {
            "model": model,
            "optimizer": self._optimizer.sharded_state(model, loading=False),
            _RANDOM_STATE: self._random_state_shard(),
        }
        dtype = "bf16" if self._config.training.bf16 else "fp32"
        common = megatron_common(self._facts.hf_config, self._facts.vocabulary, state.step, dtype)
        saved = save_checkpoint(
            root,
            state.step,
            tensors,
            common,
            lambda directory: self._write_facts(directory, state),
            replace=True,  # what an abandoned attempt left under this step is moved aside
        )
        on_rank_zero(f"rotating {root}", lambda: self._rotate(root, state))
        if self._groups.rank == 0:
            # later saves copy the facts from here: where the run started may be rotated away
            self._facts = read_facts(saved.path)
        return saved, time.perf_counter() - started_at

    def load(self, start: StartPoint) -> None:
        """Continue a run exactly, or take weights alone."""
        if self._lora is not None:
            self._load_base(self._lora.base)
        if start.state is not None:
            self._load_run(start.directory, start.state)
            return
        if self._lora is None or self._lora.has_adapter:
            self._load_weights(start.directory)
        self._optimizer.reload_masters()

    def _load_base(self, directory: Path) -> None:
        state = {name: base_part(chunk) for name, chunk in self._sharded_chunks().items()}
        loaded = load_sharded(directory, {"model": state}, strict="requested", cast=True)
        for index, chunk in enumerate(self._chunks):
            load_base(chunk, loaded["model"][f"chunk_{index}"])

    def _load_weights(self, directory: Path) -> None:
        loaded = load_sharded(directory, {"model": self._model_state()}, strict="requested", cast=True)
        self._take_model(loaded["model"])

    def _load_run(self, directory: Path, state: TrainState) -> None:
        model = self._model_state()
        loaded = load_sharded(
            directory,
            {
                "model": model,
                "optimizer": self._optimizer.sharded_state(model, loading=True),
                _RANDOM_STATE: _whole_random_state(directory),
            },
        )
        self._take_model(loaded["model"])
        self._optimizer.load_state(loaded["optimizer"], state.step)
        states = loaded[_RANDOM_STATE]
        same_device = states.size(1) == get_random_state().numel()
        if ParallelLayout(**state.layout) == self._groups.layout and same_device:
            set_random_state(states[self._groups.rank])
        else:  # at another layout, or on another kind of device, they mean nothing
            self._seed_anew(state.step)

    def _seed_anew(self, step: int) -> None:
        """Dropout from the seed and the step: from the seed alone it would repeat the run's first steps."""
        (seed,) = np.random.SeedSequence([self._config.training.seed, step]).generate_state(1).tolist()
        seed_rank(seed, self._groups.coordinates)

    def _sharded_chunks(self) -> dict[str, Any]:
        return {f"chunk_{index}": chunk.sharded_state_dict() for index, chunk in enumerate(self._chunks)}

    def _model_state(self) -> dict[str, Any]:
        """What this run's checkpoints hold of the model."""
        chunks = self._sharded_chunks()
        return chunks if self._lora is None else {name: adapter_part(chunk) for name, chunk in chunks.items()}

    def _take_model(self, loaded: dict[str, Any]) -> None:
        for index, chunk in enumerate(self._chunks):
            if self._lora is None:
                chunk.load_state_dict(loaded[f"chunk_{index}"], strict=True)
            else:
                load_adapter(chunk, loaded[f"chunk_{index}"])

    def _random_state_shard(self) -> Any:
        from megatron.core.dist_checkpointing import ShardedTensor

        own = get_random_state().unsqueeze(0)
        return ShardedTensor.from_rank_offsets(
            _RANDOM_STATE, own, (0, self._groups.rank, self._groups.layout.world_size)
        )

    def _write_facts(self, directory: Path, state: TrainState) -> None:
        copy_facts(self._facts, directory)
        if self._lora is not None:
            self._lora.facts.write(directory)
        (directory / RUN_CONFIG_FILE).write_text(dump_config(self._config), encoding="utf-8")
        state.write(directory)

    def _rotate(self, root: Path, state: TrainState) -> None:
        # --load elsewhere --save here: the best so far may lie elsewhere
        if state.best_step is not None and (root / directory_name(state.best_step)).is_dir():
            write_best(root, state.best_step)
        rotate(root, self._config.checkpoint.save_total_limit)


def layout_record(layout: ParallelLayout) -> dict[str, Any]:
    """A layout as `train_state.json` keeps it."""
    return asdict(layout)


def _whole_random_state(directory: Path) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    stored = stored_tensors(directory)[_RANDOM_STATE]
    empty: Tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    return ShardedTensor.from_rank_offsets(_RANDOM_STATE, empty)
