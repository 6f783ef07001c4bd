"""What `usdm-megatron inspect store` says: one report, as lines for a person and as a record for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from usdm_megatron.data.example_row import ExampleRow, TextDecoder, describe_example, read_example
from usdm_megatron.data.grammar import GrammarReport, check_grammar
from usdm_megatron.data.store_statistics import Lengths, StoreStatistics, count_tokens
from usdm_megatron.data.token_store import StoreSummary, TokenStore

_BAR = 40  # characters of the longest bar
_SAMPLES_SHOWN = 3  # of an example row that was not asked for


@dataclass(frozen=True)
class StoreReport:
    """Everything that was found out about a store; `grammar` None: not checked."""

    prefix: str
    identity: str
    summary: StoreSummary
    statistics: StoreStatistics
    example: ExampleRow
    verified: bool
    grammar: GrammarReport | None

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON; enums by their labels."""
        statistics = self.statistics
        summary = asdict(self.summary)
        summary["vocabulary"] = self.summary.vocabulary.to_dict()
        return {
            "prefix": self.prefix,
            "identity": self.identity,
            "fill": self.summary.fill,
            **summary,
            **asdict(statistics),
            "tokens_by_kind": _by_label(statistics.tokens_by_kind),
            "targets_by_kind": statistics.targets_by_kind and _by_label(statistics.targets_by_kind),
            "samples_by_pattern": _by_label(statistics.samples_by_pattern),
            "example_row": asdict(self.example),
            "verified": self.verified,
            "grammar": self.grammar and _grammar_record(self.grammar),
        }


def inspect_store(
    store: TokenStore,
    *,
    row_id: int = 0,
    decoder: TextDecoder | None = None,
    verify: bool = False,
    grammar: bool = False,
    listed: int = 10,
) -> StoreReport:
    """Count the tokens of `store`, after `verify` if asked to, and check their grammar if asked to.

    `row_id` is the example row, `listed` bounds the offences that are described. Raises `DataError` for
    damage, and for a row outside the store; offences against the grammar are only reported.
    """
    if verify:
        store.verify()
    return StoreReport(
        prefix=store.prefix,
        identity=store.identity,
        summary=store.summary,
        example=read_example(store, row_id, decoder),
        statistics=count_tokens(store),
        verified=verify,
        grammar=check_grammar(store, listed=listed) if grammar else None,
    )


def describe(report: StoreReport, *, whole_row: bool = False) -> list[str]:
    """Lines for a person; `whole_row` shows every sample of the example row."""
    lines = [report.prefix, *_describe_summary(report)]
    lines += _describe_counts(report)
    lines += _describe_lengths("sample lengths", report.statistics.sample_lengths)
    lines += _describe_lengths("row lengths", report.statistics.row_lengths)
    lines += describe_example(report.example, None if whole_row else _SAMPLES_SHOWN)
    if report.grammar:
        lines += _describe_grammar(report.grammar)
    if report.verified:
        lines.append("  verified     every byte matches its checksum, every id is in the vocabulary")
    return lines


def _describe_summary(report: StoreReport) -> list[str]:
    summary, statistics = report.summary, report.statistics
    vocabulary = summary.vocabulary
    in_use = f"{statistics.text_ids_in_use:,} text ids"
    if vocabulary.has_speech:
        in_use += f", {statistics.units_in_use:,} of {vocabulary.unit_count:,} units"
    lines = [
        f"  rows         {summary.rows:,}",
        f"  samples      {summary.samples:,} ({summary.samples / summary.rows:.1f} a row)",
        f"  tokens       {summary.tokens:,}",
        f"  longest row  {summary.longest_row:,} of {summary.row_capacity:,}",
        f"  fill         {summary.fill:.1%}",
        f"  largest id   {statistics.largest_id:,} of {vocabulary.size:,}",
        f"  in use       {in_use}",
        f"  tokenizer    {summary.tokenizer_sha256 or 'not recorded'}",
        f"  identity     {report.identity}",
    ]
    if summary.loss_mask:
        share = summary.loss_mask.targets / summary.tokens
        lines.append(f"  targets      {summary.loss_mask.targets:,} ({share:.1%} of the tokens)")
        if statistics.rows_without_target:
            lines.append(f"  no target    in {statistics.rows_without_target:,} rows")
    lines += [f"  notice       {notice}: {count:,}" for notice, count in summary.notices.items()]
    return lines


def _describe_counts(report: StoreReport) -> list[str]:
    statistics, summary = report.statistics, report.summary
    lines = ["  tokens by kind"]
    for kind, count in statistics.tokens_by_kind.items():
        line = f"    {kind.label:<12} {count:>15,}  {count / summary.tokens:6.1%}"
        if statistics.targets_by_kind is not None:
            line += f"  {statistics.targets_by_kind[kind]:>15,} targets"
        lines.append(line)
    lines.append("  samples by pattern")
    for pattern, count in statistics.samples_by_pattern.items():
        if count:
            lines.append(f"    {pattern.value:<24} {count:>15,}  {count / summary.samples:6.1%}")
    return lines


def _describe_lengths(title: str, lengths: Lengths) -> list[str]:
    lines = [
        f"  {title}: shortest {lengths.shortest:,}, median {lengths.median:,.0f}, mean {lengths.mean:,.1f}, "
        f"90 % {lengths.percentile_90:,.0f}, 99 % {lengths.percentile_99:,.0f}, longest {lengths.longest:,}"
    ]
    filled = [number for number, count in enumerate(lengths.counts) if count]
    most = max(lengths.counts)
    for number in range(filled[0], filled[-1] + 1):
        span = f"{lengths.edges[number]:,} to {lengths.edges[number + 1] - 1:,}"
        bar = "#" * -(-_BAR * lengths.counts[number] // most)
        lines.append(f"    {span:>20} {lengths.counts[number]:>15,}  {bar}".rstrip())
    return lines


def _describe_grammar(grammar: GrammarReport) -> list[str]:
    if not grammar.offences:
        return [f"  grammar      every sample keeps all {len(grammar.count_by_rule)} rules"]
    lines = [
        f"  grammar      {grammar.offences:,} offences in {grammar.offending_samples:,} samples of "
        f"{grammar.offending_rows:,} rows"
    ]
    for rule, count in grammar.count_by_rule.items():
        if count:
            lines.append(f"    {rule.label:<16} {count:>11,}  {rule.value}")
    for offence in grammar.first:
        lines.append(
            f"    row {offence.row}, sample {offence.sample}, token {offence.position}: "
            f"{offence.rule.label}: {offence.around}"
        )
    if unlisted := grammar.offences - len(grammar.first):
        lines.append(f"    … {unlisted:,} more")
    return lines


def _grammar_record(grammar: GrammarReport) -> dict[str, Any]:
    return {
        "offences": grammar.offences,
        **asdict(grammar),
        "count_by_rule": _by_label(grammar.count_by_rule),
        "first": [{**asdict(offence), "rule": offence.rule.label} for offence in grammar.first],
    }


def _by_label(counts: Mapping[Any, int]) -> dict[str, int]:
    return {key.label: count for key, count in counts.items()}
