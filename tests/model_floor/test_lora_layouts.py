"""What must not depend on the layout: A's initial values, dropout's replay, checkpoints of the adapter."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model_floor import lora_jobs
from tests.model_floor.lora_jobs import BLOCK, FULL, MLP, ROWS, STRADDLING, Built, Case, spec
from tests.ranks import run_ranks
from tests.tiny import MODEL
from tests.training import jobs, reference
from tests.training.jobs import Layout
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.lora_spec import TARGETS, LoraSpec
from usdm_megatron.model.lora.names import adapter_entries, entry_of_peft, entry_shape

ARCHITECTURE = HFArchitecture.from_hf_config(MODEL)
ALL_AND_ROWS = spec(*TARGETS, new=True)


def initial_values(environment: Any, store: Any, layout: Layout, checkpoint: Path) -> dict[str, Any]:
    with jobs.opened(environment, store, layout) as groups:
        built = Built(layout, Case(ALL_AND_ROWS, factors="initial"), checkpoint, groups)
        return built.shards(lambda parameter: parameter)


def test_initial_values_at_any_layout(models: Any) -> None:
    layouts = [Layout(), Layout(2, sp=True), Layout(2, 2), Layout(1, 3), Layout(1, 2, vpp=3)]
    first, *others = (
        lora_jobs.assemble(run_ranks(layout.ranks, initial_values, layout, models.straddling))
        for layout in layouts
    )
    entries = adapter_entries(TARGETS, ARCHITECTURE, train_new_embeddings=True)
    assert first.keys() == {e.peft_name(layer) for e in entries for layer in e.layers(ARCHITECTURE)}
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], value) for name, value in first.items())
    distinct = set()
    for name, value in first.items():
        entry, _ = entry_of_peft(name)
        assert value.shape == entry_shape(entry, ARCHITECTURE, ALL_AND_ROWS.r, 203)
        if "lora_B" in name:
            assert torch.count_nonzero(value) == 0
        elif "lora_A" in name:
            bound = 1 / math.sqrt(value.size(1))  # of the whole input: PEFT's kaiming uniform, a = √5
            assert 0.9 * bound < value.abs().max() <= bound
            assert value.mean().abs() < 0.25 * bound
            distinct.add(value.flatten()[0].item())
    assert len(distinct) == len(TARGETS) * ARCHITECTURE.layers
    hf = reference.load_model(models.hf)
    rows = slice(STRADDLING.text_size, STRADDLING.size)
    for name, weight in (("model.embed_tokens", hf.model.embed_tokens), ("lm_head", hf.lm_head)):
        ours = first[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(ours, weight.weight[rows])


def dropped(
    environment: Any, store: Any, layout: Layout, checkpoint: Path, cases: list[Case], rows: Any
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Gradients of one step, and where every dropout of it, in order, put zeros."""
    from usdm_megatron.model.lora import adapter

    masks: list[Tensor] = []
    original = adapter.F.dropout

    def recorded(x: Tensor, p: float) -> Tensor:
        output = original(x, p)
        masks.append(output == 0)
        return output

    adapter.F = SimpleNamespace(**{**vars(adapter.F), "dropout": recorded})
    results = []
    for case in cases:
        masks.clear()
        (outcome,) = lora_jobs.train(environment, _next_store(store), layout, checkpoint, [case], rows)
        results.append((outcome.gradients, list(masks)))
    return results


_stores = itertools.count()


def _next_store(store: Any) -> Any:
    import torch.distributed as dist

    return dist.PrefixStore(f"case {next(_stores)}", store)


DROPOUT = LoraSpec(
    r=3, alpha=5.0, dropout=0.1, targets=frozenset({"q_proj", "v_proj", "o_proj", "down_proj"})
)
RECOMPUTED = {
    Layout(): [FULL, BLOCK, MLP],
    Layout(2): [FULL],
    Layout(2, sp=True): [FULL, MLP],
    Layout(2, 2): [BLOCK],
}


@pytest.mark.parametrize("layout", RECOMPUTED, ids=str)
def test_recompute_replays_dropout(layout: Layout, models: Any) -> None:
    """Gradients with recompute and without are the same; without dropout they are others."""
    no_dropout = LoraSpec(r=3, alpha=5.0, targets=DROPOUT.targets)
    cases = [Case(DROPOUT), Case(no_dropout), *(Case(DROPOUT, extra) for extra in RECOMPUTED[layout])]
    by_rank = run_ranks(layout.ranks, dropped, layout, models.release, cases, ROWS)
    plain, without, *recomputed = (
        lora_jobs.assemble([results[index][0] for results in by_rank]) for index in range(len(cases))
    )
    for name, gradient in plain.items():
        scale = gradient.abs().max()
        assert (without[name] - gradient).abs().max() > 1e-2 * scale, name
        for again in recomputed:
            assert (again[name] - gradient).abs().max() <= 1e-6 * scale, name


def masks_of(layout: Layout, models: Any, rows: Any = ROWS) -> list[list[Tensor]]:
    by_rank = run_ranks(layout.ranks, dropped, layout, models.release, [Case(DROPOUT)], rows)
    masks = [results[0][1] for results in by_rank]
    layers, targets, micro_batches = 6 // layout.pp, 4, len(rows) // layout.dp // lora_jobs.MICRO_BATCH
    assert [len(own) for own in masks] == [layers * targets * micro_batches] * layout.ranks
    rates = [mask.float().mean().item() for own in masks for mask in own]
    assert sum(rates) / len(rates) == pytest.approx(0.1, abs=5e-3)
    return masks


ROW_PARALLEL = [False, False, True, True]  # q, v, o, down: in the order of a layer


def test_dropout_over_tensor_parallel_ranks(models: Any) -> None:
    """The same input has the same mask on every rank; what ranks divide, features or tokens, has its own."""
    first, second = masks_of(Layout(2), models)
    for index, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(ours, theirs) is not ROW_PARALLEL[index % 4]
    first, second = masks_of(Layout(2, sp=True), models)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    for own in (first, second):
        assert not any(torch.equal(q, v) for q, v in zip(own[::4], own[1::4], strict=True))


def test_dropout_differs_between_replicas(models: Any) -> None:
    first, second = masks_of(Layout(1, 1, 2), models)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def save(environment: Any, store: Any, layout: Layout, checkpoint: Path, root: Path) -> dict[str, Any]:
    from usdm_megatron.checkpoint.store import save_checkpoint
    from usdm_megatron.model.lora.state import adapter_part

    with jobs.opened(environment, store, layout) as groups:
        built = Built(layout, Case(ALL_AND_ROWS), checkpoint, groups)
        with torch.no_grad():
            for item in built.tensors():
                if not item.entry.per_layer:
                    item.parameter.mul_(3)
        save_checkpoint(root, 7, {"model": adapter_parts(built, adapter_part)}, {"iteration": 7})
        return built.shards(lambda parameter: parameter)


def load(environment: Any, store: Any, layout: Layout, checkpoint: Path, directory: Path) -> dict[str, Any]:
    from usdm_megatron.checkpoint.store import load_sharded
    from usdm_megatron.model.lora.state import adapter_part, load_adapter

    with jobs.opened(environment, store, layout) as groups:
        built = Built(layout, Case(ALL_AND_ROWS, factors="initial"), checkpoint, groups)
        loaded = load_sharded(directory, {"model": adapter_parts(built, adapter_part)})
        for index, chunk in enumerate(built.models):
            load_adapter(chunk, loaded["model"][f"chunk_{index}"])
        return built.shards(lambda parameter: parameter)


def adapter_parts(built: Built, part: Any) -> dict[str, Any]:
    return {f"chunk_{index}": part(chunk.sharded_state_dict()) for index, chunk in enumerate(built.models)}


@pytest.mark.parametrize("which", ["straddling", "release", "tied"])
def test_checkpoint_of_the_adapter_at_any_layout(which: str, models: Any, tmp_path: Path) -> None:
    from usdm_megatron.checkpoint.store import load_full_tensors, single_process_group, stored_tensors

    base = getattr(models, which)
    layout = Layout(2, 2, sp=True)
    saved = lora_jobs.assemble(run_ranks(layout.ranks, save, layout, base, tmp_path))
    directory = tmp_path / "iter_0000007"
    for layout in (
        [Layout(), Layout(2)] if which == "release" else [Layout(), Layout(2, 3), Layout(1, 2, vpp=3)]
    ):
        loaded = lora_jobs.assemble(run_ranks(layout.ranks, load, layout, base, directory))
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    # nothing but the adapter, whole, under the names and in the shapes of the table
    new_ids = 103 if which == "release" else 203
    stored = {key: tensor.shape for key, tensor in stored_tensors(directory).items()}
    tied = which == "tied"
    model = HFArchitecture.from_hf_config({**MODEL, "tie_word_embeddings": tied})
    expected = {}
    with single_process_group():
        for entry in adapter_entries(TARGETS, model, train_new_embeddings=True):
            shape = entry_shape(entry, model, ALL_AND_ROWS.r, new_ids)
            expected[entry.core_key] = (model.layers, *shape) if entry.per_layer else shape
            for layer in entry.layers(model):
                whole = load_full_tensors(directory, [entry.core_key], layer)[entry.core_key]
                assert torch.equal(whole, saved[entry.peft_name(layer)])
    assert stored == expected
