"""Parts → stores: duplicates out, utterances into splits, samples into rows; then the parts may go."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.data.file_writing import check_free_space, reported, write_atomically
from usdm_megatron.data.token_store import SourceFile, StorePaths, StoreSummary, TokenStore, token_dtype
from usdm_megatron.data.token_store_writer import TokenStoreWriter, refuse_foreign_json
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.executors import Executor
from usdm_megatron.preprocess.merged_samples import MergedSamples, Rejected, in_test_split, strict_error
from usdm_megatron.preprocess.packing import Packing, pack
from usdm_megatron.preprocess.part_files import Part, PartFiles, open_part
from usdm_megatron.preprocess.parts_plan import (
    PLAN_NAME,
    PUBLISHED_NAME,
    MergeOptions,
    PartsPlan,
    parts_directory,
)
from usdm_megatron.preprocess.plan_agreement import read_source, remove_parts, sources_path
from usdm_megatron.preprocess.report import report_path, write_report

_NAMED_PARTS = 10
_NAMED_FILES = 5
_INDEX_BYTES_PER_SAMPLE = 12


@dataclass(frozen=True)
class MergeResult:
    """The stores by prefix, and what did not come into them."""

    summaries: dict[str, StoreSummary]
    rejected: dict[str, int]  # by reason
    report: Path | None  # None: whole rows, of which none is ever rejected
    was_done: bool = False  # an earlier run wrote the stores


def merge_parts(
    output_prefix: str, executor: Executor, *, overwrite: bool = False, keep_parts: bool = False
) -> MergeResult:
    """Write the stores of `{output_prefix}.parts`, all together at the end or none, and remove the parts.

    Raises `DataError` if parts are missing (named), damaged or empty, or a store is there already.
    """
    directory = parts_directory(output_prefix)
    if not (directory / PLAN_NAME).exists() and (done := finished_result(output_prefix)):
        return done  # a task that its cluster starts again
    plan = PartsPlan.read(directory)
    result = published_result(output_prefix, plan)
    if result is None:
        parts = _whole_parts(plan, directory, executor)
        result = _publish(output_prefix, plan, parts, overwrite or was_publishing(output_prefix))
    if not keep_parts:
        remove_parts(directory)
    return result


def was_publishing(output_prefix: str) -> bool:
    """Whether a run was killed while it gave several stores their names: what is there of them is its own."""
    return _published_record(parts_directory(output_prefix)).get("stage") == "publishing"


def refuse_existing(output_prefix: str, plan: PartsPlan, overwrite: bool) -> None:
    """Say now, not after hours of work, that a store, a report or a file of another kind is there already."""
    prefixes = [store_prefix(output_prefix, name) for name in plan.store_names]
    if overwrite or was_publishing(output_prefix):
        for prefix in prefixes:
            refuse_foreign_json(prefix)
        return
    report = report_path(output_prefix, plan)
    existing = [prefix for prefix in prefixes if StorePaths.of(prefix).json.exists()]
    reports = [str(report)] if report is not None and report.exists() else []
    if existing or reports:
        raise exists_already(existing or reports)


def exists_already(what: Sequence[str]) -> DataError:
    return DataError(
        f"{', '.join(what)} exists already; pass --overwrite to replace it or choose another --output-prefix"
    )


def store_prefix(output_prefix: str, name: str) -> str:
    return f"{output_prefix}_{name}" if name else output_prefix


def published_result(output_prefix: str, plan: PartsPlan) -> MergeResult | None:
    """What a run of this plan published that was killed, or told, before it removed the parts."""
    record = _published_record(parts_directory(output_prefix))
    if record.get("stage") != "published" or record.get("plan") != plan.id:
        return None
    summaries = {}
    for name, identity in record["stores"].items():
        prefix = store_prefix(output_prefix, name)
        try:
            opened = TokenStore.open(prefix)
        except DataError:
            return None  # removed since
        if opened.identity != identity:
            return None
        summaries[prefix] = opened.summary
    return MergeResult(summaries, dict(record["rejected"]), report_path(output_prefix, plan))


def finished_result(output_prefix: str, plan: PartsPlan | None = None) -> MergeResult | None:
    """The stores of a run of `plan` (None: of any) whose parts are gone; None unless all are there."""
    identities = _recorded_identities(output_prefix) if plan is None else [plan.identity]
    for identity in identities:
        prefixes = [store_prefix(output_prefix, name) for name in identity["stores"]]
        summaries = {prefix: summary for prefix in prefixes if (summary := _summary(prefix)) is not None}
        if len(summaries) == len(prefixes) and all(
            summary.options.get("plan") == identity for summary in summaries.values()
        ):
            return MergeResult(summaries, {}, None, was_done=True)
    return None


def _recorded_identities(output_prefix: str) -> Iterator[dict[str, Any]]:
    """Of the stores `{output_prefix}` and `{output_prefix}_*`: a name may be any split's."""
    path = Path(output_prefix)
    splits = sorted(path.parent.glob(f"{glob.escape(path.name)}_*.json"))
    for prefix in (path, *(split.with_suffix("") for split in splits)):
        summary = _summary(prefix)
        identity = None if summary is None else summary.options.get("plan")
        if isinstance(identity, dict) and identity.get("stores"):
            yield identity


def _summary(prefix: str | Path) -> StoreSummary | None:
    try:
        return TokenStore.open(prefix).summary
    except DataError:
        return None


# --- what is there


def _whole_parts(plan: PartsPlan, directory: Path, executor: Executor) -> dict[str, list[Part]]:
    """Every part by store; reads all bytes, in the workers."""
    found = [open_part(PartFiles(directory, number), plan.id) for number in range(plan.parts)]
    absent = [PartFiles(directory, number).bin.name for number, part in enumerate(found) if part is None]
    absent += [path.name for path in _source_paths(plan, directory) if not path.is_file()]
    if absent:
        raise _not_whole(directory, absent, "missing")
    with closing(executor.map(_IsWhole(directory, plan.id), range(plan.parts))) as answers:
        damaged = [PartFiles(directory, number).bin.name for number, whole in enumerate(answers) if not whole]
    if damaged:
        raise _not_whole(directory, damaged, "damaged")
    whole = iter([part for part in found if part is not None])
    return {name: [next(whole) for _ in range(store.parts)] for name, store in plan.stores.items()}


def _source_paths(plan: PartsPlan, directory: Path) -> list[Path]:
    count = sum(len(store.file_groups()) for store in plan.stores.values())
    return [sources_path(directory, number) for number in range(count)]


def _not_whole(directory: Path, names: Sequence[str], what: str) -> DataError:
    more = f" and {len(names) - _NAMED_PARTS} more" if len(names) > _NAMED_PARTS else ""
    return DataError(
        f"{directory}: {', '.join(names[:_NAMED_PARTS])}{more} {what}; run the command that makes the parts "
        "again (with every --shard i/n, or with none): it makes only what is missing or damaged"
    )


@dataclass(frozen=True)
class _IsWhole:
    directory: Path
    plan_id: str

    def __call__(self, number: int) -> bool:
        part = open_part(PartFiles(self.directory, number), self.plan_id)
        return part is not None and part.is_whole()


# --- what is to be written


@dataclass(frozen=True)
class _Store:
    """A store that is decided on but not written."""

    name: str  # split, '' for the only one
    origin: str  # whose parts it is made of: another name where samples are split
    samples: int
    tokens: int
    append_to: Callable[[TokenStoreWriter], None]
    with_loss_mask: bool = False


def _row_store(name: str, parts: Sequence[Part]) -> _Store:
    def append_to(writer: TokenStoreWriter) -> None:
        for part in parts:
            found = part.arrays
            writer.append(found["tokens"], found["sample_lengths"], found["samples_per_row"])

    samples = sum(len(part.arrays["sample_lengths"]) for part in parts)
    return _Store(name, name, samples, sum(len(part.arrays["tokens"]) for part in parts), append_to)


def _sample_stores(
    name: str,
    parts: list[Part],
    plan: PartsPlan,
    options: MergeOptions,
    rejected: Rejected,
    sources: Sequence[SourceFile],
) -> list[_Store]:
    samples = MergedSamples.of(parts)
    kept = samples.without_duplicates(plan.id_rule, rejected)
    if options.strict and rejected.listed:
        raise strict_error(rejected.listed, rejected.by_reason.total())
    if not len(kept):
        raise _no_sample(sources, rejected)
    chosen = {name: kept}
    if options.split is not None:
        is_test = in_test_split(samples.utterances[kept], options.split[1], options.seed)
        chosen = dict(zip(plan.store_names, (kept[~is_test], kept[is_test]), strict=True))
    return [
        _Store(
            split,
            name,
            len(indices),
            int(samples.lengths[indices].sum(dtype=np.int64)),
            _packer(samples, indices, plan.seq_length, options),
            samples.have_loss_mask,
        )
        for split, indices in chosen.items()
    ]


def _no_sample(sources: Sequence[SourceFile], rejected: Rejected) -> DataError:
    more = f" and {len(sources) - _NAMED_FILES} more" if len(sources) > _NAMED_FILES else ""
    remedy = "mend what was rejected" if rejected.listed else "write it again"
    return DataError(
        f"{', '.join(source.name for source in sources[:_NAMED_FILES])}{more}: gives no sample, and an empty "
        f"store cannot be trained on; {remedy}",
        *rejected.named(),
    )


def _packer(
    samples: MergedSamples, indices: np.ndarray, seq_length: int, options: MergeOptions
) -> Callable[[TokenStoreWriter], None]:
    def append_to(writer: TokenStoreWriter) -> None:
        lengths, groups = samples.lengths[indices], samples.groups[indices]
        packing = pack(lengths, seq_length, method=options.packing, groups=groups, seed=options.seed)
        samples.append_rows(writer, Packing(indices[packing.order], packing.row_starts))

    return append_to


# --- writing


def _publish(
    output_prefix: str, plan: PartsPlan, parts: dict[str, list[Part]], overwrite: bool
) -> MergeResult:
    report = report_path(output_prefix, plan)
    if report is not None and report.exists() and not overwrite:
        raise exists_already([str(report)])
    rejected = Rejected()
    sources = _sources(plan, parts_directory(output_prefix))
    stores: list[_Store] = []
    for name, some in parts.items():
        if plan.merge is None:
            stores.append(_row_store(name, some))
        else:
            rejected.add_parts(some)
            stores += _sample_stores(name, some, plan, plan.merge, rejected, sources[name])
    _check_space(output_prefix, plan, stores)
    summaries = _write(output_prefix, plan, parts, stores, overwrite, rejected, sources)
    if report is not None:
        write_report(report, plan, summaries, rejected)
    _record_stage(output_prefix, plan, "published", summaries, rejected)
    return MergeResult(
        {store_prefix(output_prefix, name): summary for name, summary in summaries.items()},
        dict(rejected.by_reason),
        report,
    )


def _write(
    output_prefix: str,
    plan: PartsPlan,
    parts: dict[str, list[Part]],
    stores: list[_Store],
    overwrite: bool,
    rejected: Rejected,
    sources: Mapping[str, list[SourceFile]],
) -> dict[str, StoreSummary]:
    """Write all stores, then publish them; their summaries by name."""
    summaries = {}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                TokenStoreWriter(
                    store_prefix(output_prefix, store.name),
                    plan.vocabulary,
                    row_capacity=plan.seq_length,
                    overwrite=overwrite,
                    with_loss_mask=store.with_loss_mask,
                )
            )
            for store in stores
        ]
        for store, writer in zip(stores, writers, strict=True):
            store.append_to(writer)
            summaries[store.name] = writer.finish(
                tokenizer_sha256=plan.tokenizer_sha256,
                sources=sources[store.origin],
                options=plan.store_options,
                notices=total_counts(part.facts["notices"] for part in parts[store.origin]),
            )
        _record_stage(output_prefix, plan, "publishing", summaries, rejected)
    return summaries


def total_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts by name, names in the order in which they first come."""
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return dict(total)


def _sources(plan: PartsPlan, directory: Path) -> dict[str, list[SourceFile]]:
    paths = iter(_source_paths(plan, directory))
    return {
        name: [read_source(next(paths), plan.id) for _ in store.file_groups()]
        for name, store in plan.stores.items()
    }


def _check_space(output_prefix: str, plan: PartsPlan, stores: Sequence[_Store]) -> None:
    token_bytes = token_dtype(plan.vocabulary).itemsize
    needed = sum(
        store.tokens * (token_bytes + store.with_loss_mask)
        + store.samples * _INDEX_BYTES_PER_SAMPLE * (1 + store.with_loss_mask)
        for store in stores
    )
    check_free_space(parts_directory(output_prefix).parent, needed, "the store")


# --- what a killed run left


def _record_stage(
    output_prefix: str, plan: PartsPlan, stage: str, summaries: Mapping[str, StoreSummary], rejected: Rejected
) -> None:
    record = {
        "stage": stage,
        "plan": plan.id,
        "stores": {name: summary.identity for name, summary in summaries.items()},
        "rejected": dict(rejected.by_reason),
    }
    path = parts_directory(output_prefix) / PUBLISHED_NAME
    with reported(path):
        write_atomically(path, json.dumps(record).encode())


def _published_record(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / PUBLISHED_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
