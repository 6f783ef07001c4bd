"""Merged = base + adapter = what peft loads = what comes back, for any adapter and layout of saving."""

from __future__ import annotations

import filecmp
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.convert_floor.adapter_checkpoints import (
    all_tensors,
    assert_same_bits,
    peft_model,
    write_adapter,
)
from tests.model_floor.lora_jobs import MICRO_BATCH, ROWS, STRADDLING, Built, Case
from tests.ranks import run_ranks
from tests.training import jobs, reference
from tests.training.jobs import Layout
from usdm_megatron.checkpoint.adapter_facts import AdapterFacts, read_adapter_facts
from usdm_megatron.checkpoint.facts import copy_facts
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.checkpoint.tensor_reader import TensorReader
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.options import ExportOptions, ImportOptions
from usdm_megatron.convert.peft_export import export_adapter
from usdm_megatron.convert.peft_import import import_adapter
from usdm_megatron.lora_spec import TARGETS, LoraSpec
from usdm_megatron.model.lora.names import is_adapter_key

ROW = [[1, 7, 350, 20, 390, 2], [1, 301, *range(310, 330), 402]]


class Base(NamedTuple):
    hf: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, torch.dtype], Base]:
    """A small model by whether its embeddings are tied, and type."""
    made = {}
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            work = tmp_path_factory.mktemp("base")
            hf = tiny.write_hf_model(work / "hf", tie_word_embeddings=tied, num_hidden_layers=2)
            if dtype is not torch.float32:
                reference.load_model(hf).to(dtype).save_pretrained(hf)
            root = tiny.write_checkpoint(hf, work / "checkpoint", STRADDLING)
            made[tied, dtype] = Base(hf, root / "release")
    return made


specs = st.builds(
    LoraSpec,
    r=st.integers(1, 9),
    alpha=st.sampled_from([0.3, 1.0, 5.0, 16.0]),
    dropout=st.sampled_from([0.0, 0.1]),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1).map(frozenset),
    train_new_embeddings=st.booleans(),
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=specs, tied=st.booleans())
@example(spec=LoraSpec(1, 16.0, 0.0, frozenset(TARGETS), True), tied=True)
@example(spec=LoraSpec(1, 16.0, 0.0, frozenset(TARGETS), True), tied=False)
def test_any_adapter(
    bases: dict[Any, Base], tmp_path_factory: pytest.TempPathFactory, spec: LoraSpec, tied: bool
) -> None:
    base, work = bases[tied, torch.float32], tmp_path_factory.mktemp("adapter")
    checkpoint = write_adapter(work / "ck", base.checkpoint, spec)
    check_round_trip(base, checkpoint, work)


def check_round_trip(base: Base, checkpoint: Path, work: Path) -> Any:
    """Everything that one fp32 LoRA checkpoint becomes; returns peft's model."""
    export_adapter(ExportOptions(load=checkpoint, hf_path=work / "peft", adapter_only=True))
    run_export(ExportOptions(load=checkpoint, hf_path=work / "merged", merge_lora=True))
    import_adapter(ImportOptions(adapter=work / "peft", load=base.checkpoint, save=work / "again"))
    export_adapter(ExportOptions(load=work / "again", hf_path=work / "peft again", adapter_only=True))
    run_export(ExportOptions(load=work / "again", hf_path=work / "merged again", merge_lora=True))

    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # a key that is missing or unknown to peft is a warning there
        loaded = peft_model(base.hf, work / "peft")
    loaded.save_pretrained(work / "by peft")
    assert_same_bits(all_tensors(work / "peft"), all_tensors(work / "by peft"))
    # In fp64, so that what differs is the weights: with alpha 16 over rank 1 the adapter outweighs its base
    # four times, and peft's own fp32 forward pass is then 6e-6 away from the exact one.
    with torch.no_grad():
        by_peft, by_merged, by_base = (
            reference.sample_logits(model.double(), ROW)
            for model in (loaded, reference.load_model(work / "merged"), reference.load_model(base.hf))
        )
    scale = by_peft.abs().max()
    assert (by_merged - by_peft).abs().max() <= 1e-5 * scale
    assert (by_base - by_peft).abs().max() > 1e-3 * scale
    merged = {
        name: tensor
        for name, tensor in peft_model(base.hf, work / "peft").merge_and_unload().state_dict().items()
        if not (name == "lm_head.weight" and loaded.config.tie_word_embeddings)
    }
    assert_same_bits(all_tensors(work / "merged"), merged)

    before, after = (resolve_checkpoint(path, fallback=False).path for path in (checkpoint, work / "again"))
    assert read_adapter_facts(before) == read_adapter_facts(after)
    assert_same_bits(adapter_tensors(before), adapter_tensors(after))
    assert (work / "peft" / "adapter_config.json").read_text() == (
        work / "peft again" / "adapter_config.json"
    ).read_text()
    for name in ("peft", "merged"):
        for path in (work / name).glob("*.safetensors"):
            assert filecmp.cmp(path, work / f"{name} again" / path.name, shallow=False)
    return loaded


def adapter_tensors(directory: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(directory)
    return {key: reader.read(key) for key in reader.tensors if is_adapter_key(key)}


# ── saved by ranks, against our own model ──


def save_by_ranks(
    environment: Any, store: Any, layout: Layout, base: Path, root: Path, spec: LoraSpec
) -> list[torch.Tensor]:
    """Save a trained adapter as a run does; logits of one micro-batch with it, on the last stage."""
    from usdm_megatron.checkpoint.store import save_checkpoint
    from usdm_megatron.model.logits import packed_logits
    from usdm_megatron.model.lora.state import adapter_part

    with jobs.opened(environment, store, layout) as groups:
        built = Built(layout, Case(spec), base, groups)
        with torch.no_grad():
            for item in built.tensors():
                if not item.entry.per_layer:
                    item.parameter.mul_(3)
        (model,) = built.models

        def extra_files(directory: Path) -> None:
            AdapterFacts.over(base, spec).write(directory)
            copy_facts(built.facts, directory)

        state = {"model": adapter_part(model.sharded_state_dict())}
        save_checkpoint(root, 7, state, {"iteration": 7}, extra_files)
        model.eval()
        batch = jobs.batch_of(ROWS[:MICRO_BATCH], built.config, built.facts.vocabulary).to(groups.device)
        return packed_logits(built.models, built.rope, [batch], built.facts.vocabulary, torch.float32)


@pytest.mark.parametrize(
    ("layout", "tied", "spec"),
    [
        (Layout(), False, LoraSpec(r=5, alpha=3, targets=frozenset(TARGETS), train_new_embeddings=True)),
        (Layout(2), True, LoraSpec(r=2, alpha=7, targets=frozenset({"k_proj", "v_proj", "up_proj"}))),
        (Layout(1, 2), True, LoraSpec(r=1, alpha=1, targets=frozenset(TARGETS), train_new_embeddings=True)),
        (Layout(2, 2, sp=True), False, LoraSpec(targets=frozenset(TARGETS), train_new_embeddings=True)),
    ],
    ids=["1x1", "2x1", "1x2", "2x2-sp"],
)
def test_any_layout_of_saving(
    bases: dict[Any, Base], tmp_path: Path, layout: Layout, tied: bool, spec: LoraSpec
) -> None:
    base = bases[tied, torch.float32]
    by_rank = run_ranks(layout.ranks, save_by_ranks, layout, base.checkpoint, tmp_path / "run", spec)
    loaded = check_round_trip(base, tmp_path / "run", tmp_path)
    last = [logits[0] for logits in by_rank if logits]
    assert len(last) == layout.tp
    for logits in last:
        for row, padded in zip(ROWS, logits.chunk(MICRO_BATCH), strict=False):
            with torch.no_grad():
                expected = reference.sample_logits(loaded, row)
            assert (padded[: len(expected)] - expected).abs().max() <= 1e-5 * expected.abs().max()


# ── types ──


@pytest.mark.parametrize("adapter_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("new_rows", [False, True])
def test_bf16_base_is_rounded_once(
    bases: dict[Any, Base], tmp_path: Path, adapter_type: torch.dtype, new_rows: bool
) -> None:
    """To the bit what peft merges: it computes in fp32, too, with the adapter that it keeps in fp32."""
    base = bases[False, torch.bfloat16]
    spec = LoraSpec(r=4, alpha=3, targets=frozenset(TARGETS), train_new_embeddings=new_rows)
    write_adapter(tmp_path / "ck", base.checkpoint, spec, adapter_type)
    export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "peft", adapter_only=True))
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "peft").values()} == {adapter_type}
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "merged", merge_lora=True))
    by_peft = peft_model(base.hf, tmp_path / "peft", torch.bfloat16).merge_and_unload().state_dict()
    assert_same_bits(all_tensors(tmp_path / "merged"), by_peft)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # in fp32 nothing is rounded
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "exact", merge_lora=True, dtype="fp32"))
    exact = all_tensors(tmp_path / "exact")
    assert_same_bits({name: tensor.bfloat16() for name, tensor in exact.items()}, by_peft)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.equal(exact[name], exact[name].bfloat16().float())
