"""`tools/preprocess_data.py` and `usdm-megatron preprocess`: the commands of the preprocessor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from usdm_megatron.cli.preprocess_corpora import DialogFlags, SpeechTextFlags
from usdm_megatron.cli.preprocess_flags import WorkFlags
from usdm_megatron.cli.preprocess_ids import CacheFlags, PackedFlags, SamplesFlags, SftFlags
from usdm_megatron.data.token_store import StoreSummary
from usdm_megatron.preprocess.merge import MergeResult, merge_parts
from usdm_megatron.preprocess.merged_samples import LISTED_REJECTIONS
from usdm_megatron.preprocess.parts_plan import check_output_prefix, parts_directory


@dataclass(frozen=True, kw_only=True)
class MergeFlags(WorkFlags):
    """The last step after --shard i/n: PREFIX.parts → stores, with the options that the parts record."""

    def run(self) -> MergeResult | None:
        return merge_parts(
            self.output_prefix, self.open_executor(), overwrite=self.overwrite, keep_parts=self.keep_parts
        )


Command = (
    Annotated[CacheFlags, tyro.conf.subcommand("cache")]
    | Annotated[PackedFlags, tyro.conf.subcommand("packed")]
    | Annotated[SamplesFlags, tyro.conf.subcommand("samples")]
    | Annotated[SpeechTextFlags, tyro.conf.subcommand("speech-text")]
    | Annotated[DialogFlags, tyro.conf.subcommand("dialog")]
    | Annotated[SftFlags, tyro.conf.subcommand("sft")]
    | Annotated[MergeFlags, tyro.conf.subcommand("merge")]
)


def main(argv: Sequence[str]) -> int | None:
    """Parse `argv`, write the stores, print one line a store."""
    command = tyro.cli(
        Command,
        args=list(argv),
        prog="preprocess_data.py",
        description="Write packed token stores (Megatron .bin/.idx and a .json).",
    )
    check_output_prefix(command.output_prefix)
    result = command.run()
    if result is None:
        print(f"{parts_directory(command.output_prefix)}: this shard is done; `merge` joins them all")
        return None
    if result.was_done:
        print(f"{command.output_prefix}: already done")
    for prefix, summary in result.summaries.items():
        print(describe(prefix, summary))
    if result.rejected:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in result.rejected.items())
        total = sum(result.rejected.values())
        listed = "them" if total <= LISTED_REJECTIONS else f"the first {LISTED_REJECTIONS:,}"
        print(f"rejected: {total:,} ({counts}); {result.report} lists {listed}")
    return None


def describe(prefix: str, summary: StoreSummary) -> str:
    """One line about a store, and one for each notice."""
    lines = [
        f"{prefix}: {summary.rows:,} rows, {summary.samples:,} samples, {summary.tokens:,} tokens, "
        f"{summary.fill:.1%} full, longest row {summary.longest_row:,}, largest id {summary.largest_id:,}"
    ]
    if summary.loss_mask is not None:
        lines += [
            f"  targets: {summary.loss_mask.targets:,} ({summary.loss_mask.targets / summary.tokens:.1%})"
        ]
    lines += [f"  notice: {name}: {count:,}" for name, count in summary.notices.items()]
    return "\n".join(lines)
