"""What ranks do in the LoRA tests, and PEFT's side of each comparison."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.tiny import VOCABULARY, WINDOW
from tests.training import jobs, reference
from tests.training.jobs import Layout, Row
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import CoreAttention
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.model.lora.names import adapter_entries, entry_shape
from usdm_megatron.vocab import Vocabulary

SEED = 11
MICRO_BATCH, SEQ_LENGTH = 2, 56
R, ALPHA = 3, 5.0
# VOCABULARY's new ids all lie on the second of two ranks; these begin on the first: uneven parts
STRADDLING = Vocabulary(text_size=200, unit_count=200)
assert STRADDLING.size == VOCABULARY.size
LENGTHS = [(WINDOW - 1, 1, WINDOW, WINDOW + 1, 3 * WINDOW, 2), (20, 30), (50,), (3, 9, 8, 7)]


def make_row(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[VOCABULARY.bos_id, *rng.integers(2, VOCABULARY.size, n - 1).tolist()] for n in lengths]


ROWS = [make_row(seed, lengths) for seed, lengths in enumerate(LENGTHS)]


def spec(*targets: str, new: bool = False) -> LoraSpec:
    return LoraSpec(r=R, alpha=ALPHA, targets=frozenset(targets), train_new_embeddings=new)


FULL = (("recompute_granularity", "full"),)
CORE = (("recompute_granularity", "selective"),)
MLP = (*CORE, ("recompute_modules", ("core_attn", "mlp")))
MLP_ALONE = (*CORE, ("recompute_modules", ("mlp",)))
BLOCK = (*FULL, ("recompute_method", "block"), ("recompute_num_layers", 2))
UNIFORM = (
    *FULL,
    ("recompute_method", "uniform"),
    ("recompute_num_layers", 3),
)  # a whole group a stage of two
RECOMPUTES = [(), CORE, MLP, MLP_ALONE, FULL, BLOCK, UNIFORM]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to build at a layout that is open already; `extra` are fields of `ParallelConfig`."""

    lora: LoraSpec
    extra: tuple[tuple[str, Any], ...] = ()
    factors: str = "random"  # or "initial": as built
    backend: CoreAttention = "torch"
    bf16: bool = False


@dataclasses.dataclass
class Shard:
    """A rank's part of an adapter's tensor."""

    tensor: Tensor
    axis: int | None
    tp_rank: int


@dataclasses.dataclass
class Outcome:
    """One step (or more) of one case on one rank; losses and logits where the last stage has them."""

    losses: list[float]
    norm: float
    gradients: dict[str, Shard]
    values: dict[str, Shard]
    logits: list[Tensor]


class Built:
    """Model, optimizer and step of a case, its base loaded, on this rank."""

    def __init__(self, layout: Layout, case: Case, checkpoint: Path, groups: Any) -> None:
        from usdm_megatron.checkpoint.facts import read_facts
        from usdm_megatron.checkpoint.store import load_sharded
        from usdm_megatron.log import quiet_upstream
        from usdm_megatron.model.architecture import build_transformer_config
        from usdm_megatron.model.build import build_model_chunks, weight_dtype
        from usdm_megatron.model.lora.state import base_part, load_base
        from usdm_megatron.model.packed_sequence import RopeTable
        from usdm_megatron.runtime.process_groups import seed_rank
        from usdm_megatron.train.optimizer import AdamW, wrap_chunks
        from usdm_megatron.train.step import PipelineStep

        quiet_upstream()
        self.layout, self.case, self.groups = layout, case, groups
        self.facts = read_facts(checkpoint)
        self.config = jobs.run_config(
            dataclasses.replace(layout, extra=(*layout.extra, *case.extra)),
            data={"seq_length": SEQ_LENGTH, "micro_batch_size": MICRO_BATCH},
            optimizer={"clip_grad": 0.0, "weight_decay": 0.1, "decay_norms": True},
        )
        seed_rank(SEED, groups.coordinates)
        model, vocabulary = self.facts.architecture, self.facts.vocabulary
        self.dtype = weight_dtype(case.bf16)
        core_config = build_transformer_config(model, self.config.parallel, dtype=self.dtype)
        self.models = build_model_chunks(
            core_config, model, vocabulary, groups, case.backend, lora=case.lora, seed=SEED
        )
        wrapped = wrap_chunks(self.models, self.config.parallel, groups)
        self.rope = RopeTable(model.head_dim, model.rope_theta, SEQ_LENGTH, groups.device)
        self.step = PipelineStep(
            wrapped, groups, self.rope, vocabulary, dtype=self.dtype, loss_reduction="token-mean"
        )
        self.optimizer = AdamW(wrapped, self.config.optimizer, groups, bf16=case.bf16)
        states = {f"chunk_{i}": base_part(chunk.sharded_state_dict()) for i, chunk in enumerate(self.models)}
        loaded = load_sharded(checkpoint, {"model": states}, strict="requested", cast=case.bf16)
        for index, chunk in enumerate(self.models):
            load_base(chunk, loaded["model"][f"chunk_{index}"])
        if case.factors == "random":
            self._set_random_factors()
        self.optimizer.reload_masters()

    def tensors(self) -> list[Any]:
        from usdm_megatron.model.lora.state import adapter_state

        return [tensor for chunk in self.models for tensor in adapter_state(chunk)]

    def shards(self, of: Any) -> dict[str, Shard]:
        """Shards by PEFT's name of `of(parameter)`; a tied copy on the last stage does not count twice."""
        found: dict[str, Shard] = {}
        for item in self.tensors():
            shard = Shard(
                of(item.parameter).detach().clone(), item.entry.sharded_axis, self.groups.coordinates.tp
            )
            found[item.peft_name] = shard
        return found

    def _set_random_factors(self) -> None:
        with torch.no_grad():
            for item in self.tensors():
                if item.entry.per_layer:
                    whole = random_factor(item.peft_name, item.entry, self.facts.architecture, self.case.lora)
                    axis, tp = item.entry.sharded_axis, self.layout.tp
                    own = whole if axis is None else whole.chunk(tp, dim=axis)[self.groups.coordinates.tp]
                    item.parameter.copy_(own)


def random_factor(name: str, entry: Any, model: HFArchitecture, lora: LoraSpec) -> Tensor:
    """A whole A or B that depends on its PEFT name alone; neither is zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.1 * torch.randn(entry_shape(entry, model, lora.r), generator=generator)


def train(
    environment: Any,
    store: Any,
    layout: Layout,
    checkpoint: Path,
    cases: Sequence[Case],
    rows: Sequence[Row],
    lrs: Sequence[float] = (1e-2,),
) -> list[Outcome]:
    """Logits of the first micro-batch, then one update for each of `lrs` on the same global batch."""
    with jobs.opened(environment, store, layout) as groups:
        return [_train_case(Built(layout, case, checkpoint, groups), rows, lrs) for case in cases]


def _train_case(built: Built, rows: Sequence[Row], lrs: Sequence[float]) -> Outcome:
    from usdm_megatron.data.order import RowOrder
    from usdm_megatron.model.logits import packed_logits

    layout, vocabulary = built.layout, built.facts.vocabulary
    order = RowOrder(len(rows), len(rows), len(rows), MICRO_BATCH, layout.dp)
    ids = order.rows_of_step(0, built.groups.coordinates.dp).tolist()
    batches = [
        jobs.batch_of([rows[row] for row in some], built.config, vocabulary, some).to(built.groups.device)
        for some in ids
    ]
    for model in built.models:
        model.eval()
    logits = (
        []
        if layout.vpp > 1
        else packed_logits(built.models, built.rope, batches[:1], vocabulary, built.dtype)
    )
    for model in built.models:
        model.train()
    frozen = [(p, p.clone()) for model in built.models for p in model.parameters() if not p.requires_grad]
    trained = [(item, item.parameter.detach().clone()) for item in built.tensors()]
    targets = sum(sum(map(len, row)) - len(row) for row in rows)
    losses = []
    for lr in lrs:
        result = built.step.train(batches, built.optimizer, targets=targets, lr=lr, stop=lambda: False)
        losses.append(result.losses.objective)
    gradients = built.shards(lambda p: jobs._whole_gradient(p, built.optimizer, built.groups))
    built.optimizer.finish_update()
    assert all(lrs) and not any(torch.equal(item.parameter, before) for item, before in trained)
    _check_frozen(built, frozen)
    return Outcome(losses, result.gradient_norm, gradients, built.shards(lambda p: p), logits)


def _check_frozen(built: Built, frozen: list[tuple[Tensor, Tensor]]) -> None:
    """The base has no gradient, no buffer, no optimizer state, and not one bit of it moved in an update."""
    trained = {id(item.parameter) for item in built.tensors()}
    everything = sum(1 for model in built.models for _ in model.parameters())
    assert frozen and trained and len(frozen) + len(trained) == everything
    for parameter, before in frozen:
        assert parameter.grad is None and not hasattr(parameter, "main_grad")
        assert torch.equal(parameter, before)
    buffers = built.optimizer._sharded.buffers
    assert {id(p) for buffer in buffers for p in buffer.param_index_map} == trained


def peft_model(hf: Path, lora: LoraSpec, vocabulary: Vocabulary, *, tied: bool = False) -> Any:
    """transformers' model with PEFT's adapters, in fp32; A and B as `random_factor` gives them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    ids = list(range(vocabulary.text_size, vocabulary.size))
    where = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model = get_peft_model(
        reference.load_model(hf),
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=sorted(lora.targets),
            trainable_token_indices=dict.fromkeys(where, ids) if lora.train_new_embeddings else None,
        ),
    ).eval()
    architecture = HFArchitecture.from_hf_config(AutoConfig.from_pretrained(hf).to_dict())
    parameters = peft_parameters(model)
    entries = adapter_entries(lora.targets, architecture, train_new_embeddings=lora.train_new_embeddings)
    names = {entry.peft_name(layer): entry for entry in entries for layer in entry.layers(architecture)}
    assert names.keys() == parameters.keys()
    with torch.no_grad():
        for name, entry in names.items():
            if entry.per_layer:
                parameters[name].copy_(random_factor(name, entry, architecture, lora))
    return model


def peft_parameters(model: Any) -> dict[str, Tensor]:
    """What trains, by the names of `adapter_model.safetensors`."""
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assemble(outcomes: Sequence[dict[str, Shard]]) -> dict[str, Tensor]:
    """Whole tensors from the shards of all ranks; copies on several ranks must be equal to the bit."""
    by_name: dict[str, dict[int, Shard]] = {}
    for shards in outcomes:
        for name, shard in shards.items():
            known = by_name.setdefault(name, {}).setdefault(shard.tp_rank, shard)
            assert torch.equal(known.tensor, shard.tensor), f"{name}: stages or replicas differ"
    whole = {}
    for name, shards in by_name.items():
        ordered = [shards[rank] for rank in sorted(shards)]
        if ordered[0].axis is None:
            assert all(torch.equal(ordered[0].tensor, shard.tensor) for shard in ordered), (
                f"{name}: ranks differ"
            )
            whole[name] = ordered[0].tensor
        else:
            whole[name] = torch.cat([shard.tensor for shard in ordered], dim=ordered[0].axis)
    return whole
