"""Hold a checkpoint against its Hugging Face model: logits on one packed row, at a chosen layout.

Their side: transformers' own model, fp32, each sample alone. Our side: the training model, fp32, all
samples packed into one row, on tp x pp real ranks. When they differ, both run once more, and the hidden
states say in which layer it begins. The two models are never in memory together.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_megatron.architecture import HFArchitecture, identity_differences, model_identity
from usdm_megatron.checkpoint.facts import CheckpointFacts, read_facts
from usdm_megatron.checkpoint.ranks import on_rank_zero
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.convert.checkpoint_weights import open_weights
from usdm_megatron.convert.hf_source import HFSource, check_tensors, open_source
from usdm_megatron.convert.hub import locate
from usdm_megatron.convert.name_table import architecture_table
from usdm_megatron.convert.options import VerifyOptions
from usdm_megatron.convert.verification_row import VerificationRow, build_verification_row
from usdm_megatron.errors import EXIT_DONE, ConfigError, ConversionError
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.runtime.ranks import RankEnvironment

if TYPE_CHECKING:
    import torch

    from usdm_megatron.convert.layer_differences import LayerDifferences
    from usdm_megatron.convert.verify_sides import OurSide

_TIMEOUT = timedelta(minutes=30)
_SEED = 42


@dataclass(frozen=True)
class LogitsComparison:
    """The outcome: largest absolute difference over `tokens` positions and `columns` vocabulary ids.

    `tolerance` is a part of the largest logit, because fp32 rounds each by a part of the numbers it sums.
    """

    max_abs_difference: float
    max_abs_logit: float  # transformers'
    worst_sample: int  # index of the sample that holds the largest difference
    samples: tuple[int, ...]  # lengths
    tokens: int
    columns: int
    source_is_extended: bool
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    tolerance: float
    layers: LayerDifferences | None = None  # only when the logits differ

    @property
    def allowed_difference(self) -> float:
        return self.tolerance * max(1.0, self.max_abs_logit)

    @property
    def passed(self) -> bool:
        return math.isfinite(self.max_abs_difference) and self.max_abs_difference <= self.allowed_difference


def run_verify_logits(options: VerifyOptions, environment: RankEnvironment) -> int:
    """Compare on this rank's part of the layout; rank 0 prints the outcome.

    Raises `ConversionError` when the difference exceeds `--tolerance`.
    """
    comparison = compare_logits(options, environment)
    if environment.rank == 0:
        print(describe(comparison), flush=True)
    return EXIT_DONE


def compare_logits(options: VerifyOptions, environment: RankEnvironment) -> LogitsComparison:
    """The comparison, on every rank; written to `--json` whatever it says.

    Raises `ConversionError` on all ranks when the logits differ, naming the first layer that does.
    """
    from usdm_megatron.convert.verify_sides import OurSide
    from usdm_megatron.runtime.process_groups import open_process_groups

    _check_json_path(options.json)
    layout = ParallelLayout(
        environment.world_size, options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    )
    if layout.dp != 1:
        raise ConfigError(f"verify runs on tp x pp = {layout.tp * layout.pp} ranks, not {layout.world_size}")
    with open_process_groups(layout, environment, timeout=_TIMEOUT) as groups:
        directory = on_rank_zero(f"verifying {options.load}", lambda: _whole_model(options))
        facts = read_facts(directory)
        found_source = on_rank_zero(f"finding {options.hf_path}", lambda: _whole_source(options, facts))
        source, columns = found_source.directory, _common_columns(found_source, facts)
        whole = build_verification_row(facts.vocabulary, facts.architecture.sliding_window, _SEED)
        row = _shortened(_below(whole, columns), options.sequence_length)
        ours = OurSide(facts, groups, options.core_attention)
        logits = ours.logits(row)
        found = on_rank_zero("comparing logits", lambda: _compare(options, source, facts, row, logits))
        comparison = found.comparison
        if not comparison.passed:
            comparison = replace(
                comparison, layers=_compare_layers(options, source, row, found, ours, logits)
            )
        if options.json is not None:  # while all wait: a launcher stops rank 0 as soon as another one ends
            path = options.json
            on_rank_zero(f"writing {path}", lambda: path.write_text(_as_json(comparison), encoding="utf-8"))
    if not comparison.passed:
        raise ConversionError(*_differences(options, found, comparison))
    return comparison


def _check_json_path(path: Path | None) -> None:
    """Before the comparison, which may take an hour."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ConversionError(f"--json {path}: there is no directory {path.absolute().parent}")
    if path.is_dir():
        raise ConversionError(f"--json {path} is a directory; name the file to write")


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
        f"max |Δ| = {c.max_abs_difference:.3g}, at most {_allowed(c)}: equal"
    )


def _allowed(c: LogitsComparison) -> str:
    return (
        f"{c.allowed_difference:.3g} (tolerance {c.tolerance:g} of the largest logit, {c.max_abs_logit:.3g})"
        if c.max_abs_logit > 1
        else f"{c.allowed_difference:.3g} (tolerance; no logit exceeds 1)"
    )


def _differences(options: VerifyOptions, found: _Findings, comparison: LogitsComparison) -> tuple[str, str]:
    c = comparison
    assert c.layers is not None
    return (
        f"verify: max |Δ| of the logits is {c.max_abs_difference:.3g}, above {_allowed(c)}; "
        f"the largest is in sample {c.worst_sample} of {c.samples[c.worst_sample]} tokens (per sample: "
        f"{', '.join(f'{value:.3g}' for value in found.by_sample)}). {options.load} does not compute what "
        f"{options.hf_path} computes",
        c.layers.describe(),
    )


def _as_json(comparison: LogitsComparison) -> str:
    record = {
        "passed": comparison.passed,
        "allowed_difference": comparison.allowed_difference,
        **asdict(comparison),
    }
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)  # JSON knows no NaN
    return json.dumps(finite, indent=1) + "\n"


@dataclass(frozen=True)
class _Findings:
    """The comparison, and what the search for the layer goes by."""

    comparison: LogitsComparison
    by_sample: tuple[float, ...]
    positions: tuple[int, ...]  # in the worst sample


def _compare(
    options: VerifyOptions,
    source: Path,
    facts: CheckpointFacts,
    row: VerificationRow,
    ours: torch.Tensor | None,
) -> _Findings:
    from usdm_megatron.convert.layer_differences import chosen_positions
    from usdm_megatron.convert.verify_sides import load_reference, reference_logits

    assert ours is not None
    model = load_reference(source)
    columns = min(model.config.vocab_size, facts.vocabulary.size)
    by_token, largest = [], 0.0
    for sample in range(len(row.sample_lengths)):
        here = _place_of(row, sample)
        theirs = reference_logits(model, row.tokens[here])
        largest = max(largest, theirs.abs().max().item())
        by_token.append((theirs - ours[here, :columns].to(theirs.device)).abs().amax(-1))
    differences = tuple(difference.max().item() for difference in by_token)
    worst = max(range(len(differences)), key=lambda index: _nan_is_worst(differences[index]))
    comparison = LogitsComparison(
        max_abs_difference=differences[worst],
        max_abs_logit=largest,
        worst_sample=worst,
        samples=row.sample_lengths,
        tokens=len(row.tokens),
        columns=columns,
        source_is_extended=columns == facts.vocabulary.size,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        tolerance=options.tolerance,
    )
    return _Findings(comparison, differences, tuple(chosen_positions(by_token[worst])))


def _compare_layers(
    options: VerifyOptions,
    source: Path,
    row: VerificationRow,
    found: _Findings,
    ours: OurSide,
    logits: torch.Tensor | None,
) -> LayerDifferences:
    """Run both sides once more and compare the worst sample's hidden states; the outcome is on every rank."""
    from usdm_megatron.convert.layer_differences import compare_states
    from usdm_megatron.convert.verify_sides import load_reference, reference_states

    sample, columns = found.comparison.worst_sample, found.comparison.columns
    here = _place_of(row, sample)
    in_row = [here.start + position for position in found.positions]
    states = ours.states(row, in_row)

    def compare() -> LayerDifferences:
        assert logits is not None
        theirs = reference_states(load_reference(source), row.tokens[here], found.positions)
        theirs[-1] = theirs[-1][:, :columns]
        return compare_states(
            [*states, logits[in_row, :columns]], theirs, sample=sample, tolerance=options.tolerance
        )

    return on_rank_zero("comparing layers", compare)


def _place_of(row: VerificationRow, sample: int) -> slice:
    start = sum(row.sample_lengths[:sample])
    return slice(start, start + row.sample_lengths[sample])


def _whole_model(options: VerifyOptions) -> Path:
    """The checkpoint directory, its bytes, names and shapes checked."""
    directory = resolve_checkpoint(options.load, options.ckpt_step, fallback=False).path
    open_weights(directory)
    return directory


def _whole_source(options: VerifyOptions, facts: CheckpointFacts) -> HFSource:
    """The model, checked: transformers would invent what is missing, and follow any index."""
    source = open_source(locate(options.hf_path, options.hf_revision, options.hf_cache_dir))
    _common_columns(source, facts)  # first: of another model every tensor would be wrong
    check_tensors(source, architecture_table(source.config), HFArchitecture.from_hf_config(source.config))
    return source


def _common_columns(source: HFSource, facts: CheckpointFacts) -> int:
    """Rows of the vocabulary that both have: without the new tokens when the source is not extended.

    Raises `ConversionError` when the configs describe different models: no layer is to blame then.
    """
    ours, theirs = model_identity(facts.hf_config), model_identity(source.config)
    columns = theirs["vocab_size"]
    if columns < ours["vocab_size"]:
        theirs["vocab_size"] = ours["vocab_size"]
    if differences := identity_differences(ours, theirs):
        raise ConversionError(
            *(
                f"not the same model (checkpoint != {source.directory}): {difference}"
                for difference in differences
            )
        )
    return columns


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
