"""What is in a token store: the figures behind `usdm-megatron inspect store`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import TargetKind


@dataclass(frozen=True)
class StoreReport:
    """Figures counted from the tokens themselves."""

    tokens_by_kind: dict[TargetKind, int]
    largest_id: int


def count_tokens(store: TokenStore) -> StoreReport:
    """Count the tokens of every kind, one pass over the map in chunks of bounded size."""
    vocabulary = store.summary.vocabulary
    count_by_id = np.zeros(vocabulary.size, dtype=np.int64)
    for chunk in store.token_chunks():
        if int(chunk.max()) >= vocabulary.size or int(chunk.min()) < 0:
            raise DataError(
                f"{store.prefix}.bin: holds ids outside its vocabulary of {vocabulary.size}: the file "
                "changed since it was written; preprocess again or copy it again"
            )
        count_by_id += np.bincount(chunk, minlength=vocabulary.size)
    by_kind = np.bincount(vocabulary.kind_of_id(), weights=count_by_id, minlength=len(TargetKind))
    return StoreReport(
        tokens_by_kind={kind: int(by_kind[kind]) for kind in TargetKind},
        largest_id=int(np.flatnonzero(count_by_id)[-1]),
    )


def describe(store: TokenStore, report: StoreReport) -> list[str]:
    """Lines for a person."""
    summary = store.summary
    tokenizer = summary.tokenizer_sha256 or "not recorded"
    lines = [
        f"{store.prefix}",
        f"  rows         {summary.rows:,}",
        f"  samples      {summary.samples:,} ({summary.samples / summary.rows:.1f} a row)",
        f"  tokens       {summary.tokens:,}",
        f"  longest row  {summary.longest_row:,} of {summary.row_capacity:,}",
        f"  fill         {summary.fill:.1%}",
        f"  largest id   {report.largest_id:,} of {summary.vocabulary.size:,}",
        f"  tokenizer    {tokenizer}",
        f"  identity     {store.identity}",
        "  tokens by kind",
    ]
    for kind, count in report.tokens_by_kind.items():
        lines.append(f"    {kind.label:<12} {count:>15,}  {count / summary.tokens:6.1%}")
    for notice, count in summary.notices.items():
        lines.append(f"  notice       {notice}: {count:,}")
    return lines
