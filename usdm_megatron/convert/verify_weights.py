"""`verify --mode weights`: every tensor of a Hugging Face model against a checkpoint, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from usdm_megatron.architecture import HFArchitecture, identity_differences, model_identity
from usdm_megatron.checkpoint.background_verification import verified_meanwhile
from usdm_megatron.checkpoint.resolve import name_checkpoint
from usdm_megatron.convert.checkpoint_weights import CheckpointWeights, open_weights
from usdm_megatron.convert.hf_source import HFSource, check_tensors, open_source
from usdm_megatron.convert.hub import locate
from usdm_megatron.convert.name_table import architecture_table
from usdm_megatron.convert.options import VerifyOptions
from usdm_megatron.convert.progress import byte_display, byte_progress
from usdm_megatron.errors import ConversionError


@dataclass(frozen=True)
class WeightComparison:
    """Both sides were equal; `compared_ids` is less than `ids` against an unextended source."""

    checkpoint: Path
    tensors: int
    compared_ids: int
    ids: int

    def describe(self) -> str:
        lines = f"{self.checkpoint}: {self.tensors} tensors, every value equal"
        if self.compared_ids < self.ids:
            lines += f"\nthe source is not extended: only its {self.compared_ids:,} rows were compared"
        return lines


def compare_weights(options: VerifyOptions) -> WeightComparison:
    """Compare every tensor, in the checkpoint's type; one in memory at a time.

    Raises `ConversionError` naming each tensor that differs, and by how much; `CheckpointError` for damage.
    """
    checkpoint = name_checkpoint(options.load, options.ckpt_step)
    checkpoint.verify_facts(byte_progress)
    weights = open_weights(checkpoint.path)
    source = open_source(locate(options.hf_path, options.hf_revision, options.hf_cache_dir))
    source_model = HFArchitecture.from_hf_config(source.config)
    check_tensors(source, architecture_table(source.config), source_model)
    _check_same_model(weights, source, source_model)
    problems: list[str] = []
    count = 0
    with (
        byte_display() as progress,
        verified_meanwhile(checkpoint, progress) as stop_if_damaged,
        progress("comparing", weights.size_bytes) as on_bytes,
    ):
        for name, ours in weights.in_order():
            theirs = source.read(name).to(ours.dtype)
            problems += _difference(name, theirs, ours[: theirs.shape[0]])
            on_bytes(ours.nbytes)
            stop_if_damaged()
            count += 1
    if problems:
        raise ConversionError(*problems)
    return WeightComparison(checkpoint.path, count, source_model.vocab_size, weights.model.vocab_size)


def _check_same_model(weights: CheckpointWeights, source: HFSource, source_model: HFArchitecture) -> None:
    ours, theirs = model_identity(weights.facts.hf_config), model_identity(source.config)
    if (
        source_model.vocab_size == weights.facts.vocabulary.text_size
    ):  # not extended yet: rows below are compared
        theirs["vocab_size"] = ours["vocab_size"]
    if differences := identity_differences(ours, theirs):
        raise ConversionError(
            *(
                f"not the same model (checkpoint != {source.directory}): {difference}"
                for difference in differences
            )
        )


def _difference(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> list[str]:
    # by bytes, so that NaN equals NaN and 0 differs from -0
    if torch.equal(theirs.contiguous().view(torch.uint8), ours.contiguous().view(torch.uint8)):
        return []
    wrong = int((theirs != ours).sum())
    largest = float((theirs.float() - ours.float()).abs().max())
    return [f"{name}: {wrong:,} of {ours.numel():,} values differ, by at most {largest:.3g}"]
