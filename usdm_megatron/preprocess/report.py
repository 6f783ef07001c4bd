"""`P_report.json`: the stores that a run wrote, by which options, and what was rejected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from usdm_megatron.data.file_writing import remove_leftovers, reported, write_atomically
from usdm_megatron.data.token_store import StoreSummary
from usdm_megatron.preprocess.merged_samples import Rejected
from usdm_megatron.preprocess.parts_plan import PartsPlan


def report_path(output_prefix: str, plan: PartsPlan) -> Path | None:
    """None: whole rows, of which none is ever rejected."""
    return None if plan.merge is None else Path(f"{output_prefix}_report.json")


def write_report(
    path: Path, plan: PartsPlan, summaries: Mapping[str, StoreSummary], rejected: Rejected
) -> None:
    with reported(path):
        remove_leftovers(path.parent, {path.name})
        write_atomically(path, _report_json(plan, summaries, rejected))


def _report_json(plan: PartsPlan, summaries: Mapping[str, StoreSummary], rejected: Rejected) -> bytes:
    total = rejected.by_reason.total()
    record = {
        "options": plan.store_options,
        "stores": {
            name: {
                "rows": summary.rows,
                "samples": summary.samples,
                "tokens": summary.tokens,
                "fill": summary.fill,
            }
            for name, summary in summaries.items()
        },
        "rejected": {"total": total, "by_reason": dict(rejected.by_reason)},
        "listed": [asdict(one) for one in rejected.listed],  # the first LISTED_REJECTIONS
        "not_listed": total - len(rejected.listed),
    }
    return json.dumps(record, indent=1).encode() + b"\n"
