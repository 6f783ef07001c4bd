"""The two models that `verify` runs in fp32: ours on tp x pp ranks, transformers' own on rank 0.

Each is loaded for one run and gone after it: two models of full size never lie in memory together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.facts import CheckpointFacts
from usdm_megatron.checkpoint.store import load_sharded
from usdm_megatron.config import CoreAttention, ParallelConfig
from usdm_megatron.convert.name_table import architecture_table
from usdm_megatron.convert.verification_row import VerificationRow
from usdm_megatron.data.batch import PackedBatch, build_packed_batch
from usdm_megatron.data.token_store import PackedRow
from usdm_megatron.errors import ConfigError, ConversionError
from usdm_megatron.file_reading import read_json_object
from usdm_megatron.model.architecture import build_transformer_config, layout_problems
from usdm_megatron.model.attention import resolve_backend
from usdm_megatron.model.build import PackedGPTModel, build_model_chunks
from usdm_megatron.model.logits import kept_states, packed_logits, stage_modules
from usdm_megatron.model.packed_sequence import RopeTable
from usdm_megatron.runtime.process_groups import ProcessGroups


@dataclass(frozen=True)
class OurSide:
    """The training model with a checkpoint's weights; its methods are called on every rank."""

    facts: CheckpointFacts
    groups: ProcessGroups
    core_attention: CoreAttention

    def logits(self, row: VerificationRow) -> Tensor | None:
        """`[tokens, vocabulary]` of the packed row, on rank 0."""
        logits = self._run(self._load(), row)
        shape = (len(row.tokens), self.facts.vocabulary.size)
        return _bring_to_rank_zero(logits, shape, self.groups.layout.pp - 1, self.groups)

    def states(self, row: VerificationRow, positions: Sequence[int]) -> list[Tensor]:
        """`[positions, hidden]` at these positions of the row, by depth (`stage_modules`), on rank 0."""
        model = self._load()
        with kept_states(stage_modules(model), torch.tensor(positions, device=self.groups.device)) as states:
            self._run(model, row)
        del model
        layers, pp = self.facts.architecture.layers, self.groups.layout.pp
        shape = (len(positions), self.facts.architecture.hidden)
        arrived = []
        for depth in range(layers + 2):
            stage = min(max(depth - 1, 0) // (layers // pp), pp - 1)
            arrived.append(_bring_to_rank_zero(states.pop(depth, None), shape, stage, self.groups))
        return [state for state in arrived if state is not None] if self.groups.rank == 0 else []

    def _load(self) -> PackedGPTModel:
        """This rank's stage."""
        architecture, vocabulary = self.facts.architecture, self.facts.vocabulary
        parallel = ParallelConfig(
            tensor_model_parallel_size=self.groups.layout.tp,
            pipeline_model_parallel_size=self.groups.layout.pp,
        )
        problems = layout_problems(architecture, vocabulary.padded_size, parallel)
        if problems:
            raise ConfigError(*problems)
        core_config = build_transformer_config(architecture, parallel, dtype=torch.float32)
        backend = resolve_backend(self.core_attention, torch.float32)
        (model,) = build_model_chunks(core_config, architecture, vocabulary, self.groups, backend)
        state = {"model": model.sharded_state_dict()}
        loaded = load_sharded(self.facts.directory, state, strict="requested", cast=True)
        model.load_state_dict(loaded["model"])
        return model.eval()

    def _run(self, model: PackedGPTModel, row: VerificationRow) -> Tensor | None:
        """`[tokens, vocabulary]` of the packed row, on the last stage."""
        architecture = self.facts.architecture
        batch = self._batch(row).to(self.groups.device)
        rope = RopeTable(architecture.head_dim, architecture.rope_theta, batch.max_seqlen, self.groups.device)
        logits = packed_logits([model], rope, [batch], self.facts.vocabulary, torch.float32)
        return logits[0] if logits else None

    def _batch(self, row: VerificationRow) -> PackedBatch:
        packed = PackedRow(np.array(row.tokens), np.array(row.sample_lengths, dtype=np.int32))
        return build_packed_batch(
            [packed],
            [0],
            seq_length=len(row.tokens),
            vocabulary=self.facts.vocabulary,
            train_sample_boundaries=False,
            cross_sample_attention="masked",
        )


def load_reference(hf_path: Path) -> Any:
    """transformers' own model: the class that the table names, from safetensors, never remote code."""
    import transformers

    config = read_json_object(hf_path / "config.json")
    transformers.utils.logging.disable_progress_bar()
    model_class = getattr(transformers, architecture_table(config).export_as)
    overrides: dict[str, Any] = {}
    if transformers.__version__.startswith("4."):  # knows no rope_parameters, would take 10,000
        overrides["rope_theta"] = HFArchitecture.from_hf_config(config).rope_theta
    try:
        model = model_class.from_pretrained(hf_path, use_safetensors=True, **overrides)  # nosec B615 - local
    except Exception as error:  # transformers raises what it likes on odd files
        raise ConversionError(f"{hf_path}: transformers cannot load the model: {error}") from error
    return model.to(torch.float32).eval()


@torch.no_grad()
def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """`[tokens, vocabulary]` of one sample alone."""
    logits: Tensor = model(torch.tensor(tokens)[None]).logits[0]
    return logits


def reference_states(model: Any, tokens: Sequence[int], positions: Sequence[int]) -> list[Tensor]:
    """`[positions, hidden]` by depth, as ours, and `[positions, vocabulary]` of the logits."""
    decoder = model.model
    modules = dict(enumerate([decoder.embed_tokens, *decoder.layers, decoder.norm]))
    with kept_states(modules, torch.tensor(positions)) as states:
        logits = reference_logits(model, tokens)
    return [*(states[depth] for depth in modules), logits[list(positions)]]


def _bring_to_rank_zero(
    tensor: Tensor | None, shape: tuple[int, int], stage: int, groups: ProcessGroups
) -> Tensor | None:
    """The tensor of this shape that the ranks of a stage hold, from its first one."""
    source = stage * groups.layout.tp
    if source == 0:
        return tensor if groups.rank == 0 else None
    if groups.rank == source:
        assert tensor is not None
        dist.send(tensor.contiguous(), dst=0)
    if groups.rank != 0:
        return None
    received = torch.empty(shape, device=groups.device)
    dist.recv(received, src=source)
    return received
