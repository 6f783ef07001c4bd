"""Merged = base + adapter = what peft loads = what comes back, for any adapter and layout of saving."""

from __future__ import annotations

import filecmp
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.convert_floor.adapter_checkpoints import (
    all_tensors,
    assert_same_bits,
    peft_model,
    write_adapter,
)
from tests.training import reference
from usdm_megatron.checkpoint.adapter_facts import read_adapter_facts
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.checkpoint.tensor_reader import TensorReader
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.options import ExportOptions, ImportOptions
from usdm_megatron.convert.peft_export import export_adapter
from usdm_megatron.convert.peft_import import import_adapter
from usdm_megatron.lora_spec import TARGETS, LoraSpec

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
            hf = tiny.write_hf_model(
                work / "hf", tie_word_embeddings=tied, num_hidden_layers=2, torch_dtype=dtype
            )
            made[tied, dtype] = Base(hf, tiny.write_checkpoint(hf, work / "checkpoint") / "release")
    return made


specs = st.builds(
    LoraSpec,
    r=st.integers(1, 9),
    alpha=st.sampled_from([0.3, 1.0, 5.0, 16.0]),
    dropout=st.sampled_from([0.0, 0.1]),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1).map(frozenset),
    train_new_embeddings=st.booleans(),
)


@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=specs, tied=st.booleans())
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
        warnings.simplefilter("error")  # a key that is missing or unknown to peft is a warning there
        loaded = peft_model(base.hf, work / "peft")
    loaded.save_pretrained(work / "by peft")
    assert_same_bits(all_tensors(work / "peft"), all_tensors(work / "by peft"))
    with torch.no_grad():
        by_peft = reference.sample_logits(loaded, ROW)
        by_merged = reference.sample_logits(reference.load_model(work / "merged"), ROW)
        by_base = reference.sample_logits(reference.load_model(base.hf), ROW)
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
    from usdm_megatron.model.lora.names import is_adapter_key

    reader = TensorReader(directory)
    return {key: reader.read(key) for key in reader.tensors if is_adapter_key(key)}
