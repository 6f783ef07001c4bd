"""Hold a checkpoint against its Hugging Face model: logits on one packed row, at a chosen layout.

Their side: transformers' own model, fp32, each sample alone. Our side: the training model, fp32, all
samples packed into one row, on tp x pp real ranks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.facts import CheckpointFacts, read_facts
from usdm_megatron.checkpoint.ranks import on_rank_zero
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.config import ParallelConfig
from usdm_megatron.convert.options import VerifyOptions
from usdm_megatron.convert.verification_row import VerificationRow, build_verification_row
from usdm_megatron.errors import EXIT_DONE, ConfigError, ConversionError
from usdm_megatron.file_reading import read_json_object
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.runtime.ranks import RankEnvironment

if TYPE_CHECKING:
    import torch

    from usdm_megatron.runtime.process_groups import ProcessGroups

_TIMEOUT = timedelta(minutes=30)
_SEED = 42


@dataclass(frozen=True)
class LogitsComparison:
    """The outcome: largest absolute difference over `tokens` positions and `columns` vocabulary ids."""

    max_abs_difference: float
    worst_sample: int  # index of the sample that holds the largest difference
    samples: tuple[int, ...]  # lengths
    tokens: int
    columns: int
    source_is_extended: bool
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_abs_difference <= self.tolerance  # False for NaN


def run_verify_logits(options: VerifyOptions, environment: RankEnvironment) -> int:
    """Compare on this rank's part of the layout; rank 0 prints and writes the outcome.

    Raises `ConversionError` when the difference exceeds `--tolerance`.
    """
    comparison = compare_logits(options, environment)
    if environment.rank != 0:
        return EXIT_DONE
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(comparison), indent=1) + "\n", encoding="utf-8")
    print(describe(comparison), flush=True)
    return EXIT_DONE


def compare_logits(options: VerifyOptions, environment: RankEnvironment) -> LogitsComparison:
    """The comparison, on every rank; raises on all ranks when it fails."""
    from usdm_megatron.runtime.process_groups import open_process_groups

    layout = ParallelLayout(
        environment.world_size, options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    )
    if layout.dp != 1:
        raise ConfigError(f"verify runs on tp x pp = {layout.tp * layout.pp} ranks, not {layout.world_size}")
    with open_process_groups(layout, environment, timeout=_TIMEOUT) as groups:
        resolved = on_rank_zero(
            f"verifying {options.load}",
            lambda: resolve_checkpoint(options.load, options.ckpt_step, fallback=False),
        )
        facts = read_facts(resolved.path)
        columns = min(_source_columns(options.hf_path), facts.vocabulary.size)
        whole = build_verification_row(facts.vocabulary, facts.architecture.sliding_window, _SEED)
        row = _shortened(_below(whole, columns), options.sequence_length)
        ours = _our_logits(options, facts, row, groups)
        return on_rank_zero("comparing logits", lambda: _compare(options, facts, row, ours))


def describe(comparison: LogitsComparison) -> str:
    """The outcome in a few lines."""
    c = comparison
    note = (
        ""
        if c.source_is_extended
        else f"\nthe source is not extended: only its {c.columns:,} columns were compared"
    )
    return (
        f"logits of {len(c.samples)} packed samples ({', '.join(map(str, c.samples))} tokens) at "
        f"tp={c.tensor_model_parallel_size} pp={c.pipeline_model_parallel_size}, fp32, "
        f"{c.columns:,} columns{note}\n"
        f"max |Δ| = {c.max_abs_difference:.3g} (tolerance {c.tolerance:g}): equal"
    )


def _our_logits(
    options: VerifyOptions, facts: CheckpointFacts, row: VerificationRow, groups: ProcessGroups
) -> torch.Tensor | None:
    """fp32 `[tokens, vocabulary]` on rank 0."""
    import torch

    from usdm_megatron.checkpoint.store import load_sharded
    from usdm_megatron.model.architecture import build_transformer_config, layout_problems
    from usdm_megatron.model.attention import resolve_backend
    from usdm_megatron.model.build import build_model_chunks
    from usdm_megatron.model.logits import packed_logits
    from usdm_megatron.model.packed_sequence import RopeTable

    architecture, vocabulary = facts.architecture, facts.vocabulary
    parallel = ParallelConfig(
        tensor_model_parallel_size=groups.layout.tp, pipeline_model_parallel_size=groups.layout.pp
    )
    problems = layout_problems(architecture, vocabulary.padded_size, parallel)
    if problems:
        raise ConfigError(*problems)
    core_config = build_transformer_config(architecture, parallel, dtype=torch.float32)
    (model,) = build_model_chunks(
        core_config, architecture, vocabulary, groups, resolve_backend(options.core_attention, torch.float32)
    )
    loaded = load_sharded(
        facts.directory, {"model": model.sharded_state_dict()}, strict="requested", cast=True
    )
    model.load_state_dict(loaded["model"])
    model.eval()
    batch = _batch(row, facts).to(groups.device)
    rope = RopeTable(architecture.head_dim, architecture.rope_theta, batch.max_seqlen, groups.device)
    logits = packed_logits([model], rope, [batch], vocabulary, torch.float32)
    return _bring_to_rank_zero(logits[0] if logits else None, len(row.tokens), vocabulary.size, groups)


def _batch(row: VerificationRow, facts: CheckpointFacts) -> Any:
    import numpy as np

    from usdm_megatron.data.batch import build_packed_batch
    from usdm_megatron.data.token_store import PackedRow

    packed = PackedRow(np.array(row.tokens), np.array(row.sample_lengths, dtype=np.int32))
    return build_packed_batch(
        [packed],
        [0],
        seq_length=len(row.tokens),
        vocabulary=facts.vocabulary,
        train_sample_boundaries=False,
        cross_sample_attention="masked",
    )


def _bring_to_rank_zero(
    logits: torch.Tensor | None, tokens: int, columns: int, groups: ProcessGroups
) -> torch.Tensor | None:
    import torch
    import torch.distributed as dist

    source = groups.layout.world_size - groups.layout.tp  # the last stage's first rank
    if source == 0:
        return logits
    if groups.rank == source:
        assert logits is not None
        dist.send(logits.contiguous(), dst=0)
    if groups.rank != 0:
        return None
    received = torch.empty((tokens, columns), device=groups.device)
    dist.recv(received, src=source)
    return received


def _compare(
    options: VerifyOptions, facts: CheckpointFacts, row: VerificationRow, ours: torch.Tensor | None
) -> LogitsComparison:
    import torch

    assert ours is not None
    model = load_reference(options.hf_path)
    columns = min(model.config.vocab_size, facts.vocabulary.size)
    differences, start = [], 0
    tokens = torch.tensor(row.tokens)
    for length in row.sample_lengths:
        sample = tokens[start : start + length]
        with torch.no_grad():
            theirs = model(sample[None]).logits[0]
        mine = ours[start : start + length, :columns].to(theirs.device)
        differences.append((theirs - mine).abs().max().item())
        start += length
    worst = max(range(len(differences)), key=lambda index: _nan_is_worst(differences[index]))
    comparison = LogitsComparison(
        max_abs_difference=differences[worst],
        worst_sample=worst,
        samples=row.sample_lengths,
        tokens=len(row.tokens),
        columns=columns,
        source_is_extended=columns == facts.vocabulary.size,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        tolerance=options.tolerance,
    )
    if not comparison.passed:
        raise ConversionError(
            f"verify: max |Δ| of the logits is {comparison.max_abs_difference:.3g}, above --tolerance "
            f"{options.tolerance:g}; the largest is in sample {worst} of {row.sample_lengths[worst]} tokens "
            f"(per sample: {', '.join(f'{value:.3g}' for value in differences)}). {options.load} "
            "does not compute "
            f"what {options.hf_path} computes"
        )
    return comparison


def load_reference(hf_path: Path) -> Any:
    """transformers' Mistral in fp32, from safetensors, never remote code."""
    import torch
    from transformers import MistralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = MistralForCausalLM.from_pretrained(hf_path, use_safetensors=True)  # nosec B615 - a local directory
    return model.to(torch.float32).eval()


def _source_columns(hf_path: Path) -> int:
    """Rows of the source's vocabulary: without the new tokens when it is not extended."""
    return HFArchitecture.from_hf_config(read_json_object(hf_path / "config.json")).vocab_size


def _below(row: VerificationRow, columns: int) -> VerificationRow:
    """Both sides see ids that both know: others would reach every later position through attention."""
    return VerificationRow(tuple(token % columns for token in row.tokens), row.sample_lengths)


def _shortened(row: VerificationRow, limit: int | None) -> VerificationRow:
    """Whole samples from the front, as many as `limit` tokens hold."""
    if limit is None or len(row.tokens) <= limit:
        return row
    lengths: list[int] = []
    for length in row.sample_lengths:
        if sum(lengths) + length > limit:
            break
        lengths.append(length)
    if not lengths:
        raise ConversionError(
            f"--sequence-length {limit} holds none of the samples {row.sample_lengths}; raise it"
        )
    return VerificationRow(row.tokens[: sum(lengths)], tuple(lengths))


def _nan_is_worst(value: float) -> float:
    return float("inf") if value != value else value
