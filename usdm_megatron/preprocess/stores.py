"""Rows or samples → token stores: what `tools/preprocess_data.py` does, as functions.

Rows keep their order: blocks are read by workers and written here. Samples go through parts on disk
(`parts_plan.py`), because packing needs all lengths first. `--shard` makes parts of either, for `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from usdm_megatron.data.file_writing import check_free_space
from usdm_megatron.data.token_index import MOST_IDS, MOST_ROW_TOKENS
from usdm_megatron.data.token_store import StoreSummary
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.errors import ConfigError, DataError
from usdm_megatron.preprocess.executors import Executor, SerialExecutor
from usdm_megatron.preprocess.merge import (
    MergeResult,
    finished_result,
    merge_parts,
    published_result,
    refuse_existing,
    store_prefix,
)
from usdm_megatron.preprocess.part_files import StaleParts
from usdm_megatron.preprocess.parts_plan import (
    IdRule,
    Input,
    MergeOptions,
    PartsPlan,
    Shard,
    StorePlan,
    parts_directory,
)
from usdm_megatron.preprocess.plan_agreement import EditedInput, discard_parts, holds_no_part
from usdm_megatron.preprocess.row_parts import RowCutter
from usdm_megatron.preprocess.row_sources import PackedTextSource, open_cache
from usdm_megatron.preprocess.rows import RowSource
from usdm_megatron.preprocess.sample_parts import ROWS_WITHOUT_BOS, Progress, make_parts
from usdm_megatron.preprocess.samples import SampleSource
from usdm_megatron.preprocess.source_hashes import SourceHasher
from usdm_megatron.tokenizer.identity import tokenizer_sha256, tokenizer_size
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

_LEAST_OUTPUT_SHARE = (
    1 / 16
)  # of input that holds ids: at least 2 bytes of 8 a token, and half of it in doubt


@dataclass(frozen=True)
class StoreOptions:
    """What every kind of input has in common; `seq_length` is the longest row allowed, in tokens."""

    seq_length: int = 8192
    vocabulary: Vocabulary = USDM_VOCABULARY
    tokenizer: Path | None = None  # directory; its size is compared with the vocabulary, its hash recorded
    overwrite: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.seq_length <= MOST_ROW_TOKENS:
            problems.append(
                f"--seq-length is {self.seq_length}, the least is 1 and the most {MOST_ROW_TOKENS} (int32)"
            )
        if self.vocabulary.size > MOST_IDS:
            problems.append(
                f"the vocabulary has {self.vocabulary.size} ids, the most is {MOST_IDS} (int32); "
                "pass a smaller --text-vocab-size, or the tokenizer that made the ids"
            )
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True)
class WorkOptions:
    """Who does the work, and how much of it; nothing here changes the result."""

    executor: Executor = field(default_factory=SerialExecutor)
    shard: Shard | None = None  # make its parts and stop
    keep_parts: bool = False
    progress: Progress = lambda done, of: None


@dataclass(frozen=True)
class SampleOptions:
    """What becomes of samples; `source` is what the store records of how they were made."""

    merge: MergeOptions = MergeOptions()
    source: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_sha256: str | None = None
    id_rule: IdRule = "any"
    input_holds_ids: bool = True  # so that its size says how much space is needed


def preprocess_cache(
    path: Path, output_prefix: str, options: StoreOptions, work: WorkOptions = WorkOptions()
) -> MergeResult | None:
    """Turn a dataset on disk into stores.

    A `DatasetDict` gives `{output_prefix}_{split}` for each split, a single `Dataset` `output_prefix`.
    All stores appear together at the end, or none does.
    """
    return write_rows("cache", open_cache(path), output_prefix, options, work)


def preprocess_packed(
    paths: Sequence[Path], output_prefix: str, options: StoreOptions, work: WorkOptions = WorkOptions()
) -> MergeResult | None:
    """Turn `part*.txt` files (a row of ids a line, read in natural order) into the store `output_prefix`."""
    return write_rows("packed", {"": PackedTextSource(paths)}, output_prefix, options, work)


def write_rows(
    command: str,
    sources: Mapping[str, RowSource],
    output_prefix: str,
    options: StoreOptions,
    work: WorkOptions = WorkOptions(),
) -> MergeResult | None:
    """Write one store a source, by split, rows in order; None where only a shard's parts were made.

    `DataError` if any input is bad; no store is left then.
    """
    inputs = {name: Input.of(source) for name, source in sources.items()}
    plan = _plan(command, inputs, options, checked_tokenizer_hash(options))
    _check_input_space(output_prefix, plan, copies=1)
    if work.shard is not None:
        return _through_parts(inputs, plan, output_prefix, options, work)
    summaries = {}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                TokenStoreWriter(
                    store_prefix(output_prefix, name),
                    plan.vocabulary,
                    row_capacity=plan.seq_length,
                    overwrite=options.overwrite,
                )
            )
            for name in inputs
        }
        for name, given in inputs.items():
            summaries[store_prefix(output_prefix, name)] = _write_in_order(
                given, sources[name], writers[name], plan, work
            )
    return MergeResult(summaries, {}, None)


def _write_in_order(
    given: Input, source: RowSource, writer: TokenStoreWriter, plan: PartsPlan, work: WorkOptions
) -> StoreSummary:
    rows_without_bos = 0
    executor = SerialExecutor() if source.is_memory else work.executor
    blocks = executor.map(RowCutter(source, plan.vocabulary), given.parts)
    with SourceHasher(given.files) as hasher, closing(blocks):
        for done, block in enumerate(blocks, 1):
            writer.append(block.tokens, block.sample_lengths, block.samples_per_row, block.place)
            rows_without_bos += block.rows_without_bos
            work.progress(done, len(given.parts))
        return writer.finish(
            tokenizer_sha256=plan.tokenizer_sha256,
            sources=hasher.result(),
            options=plan.store_options,
            notices={ROWS_WITHOUT_BOS: rows_without_bos} if rows_without_bos else {},
        )


def write_samples(
    command: str,
    sources: Mapping[str, SampleSource],
    output_prefix: str,
    options: StoreOptions,
    samples: SampleOptions,
    work: WorkOptions = WorkOptions(),
) -> MergeResult | None:
    """Make the samples of every source, pack them and write the stores, by split.

    `{output_prefix}_train` and `_test` with `samples.merge.split`, which needs a single source. None where
    only a shard's parts were made: `merge_parts` finishes them. A killed run is continued by the same call.
    """
    if samples.merge.split is not None and len(sources) > 1:
        raise ConfigError(f"--split: the input has splits of its own ({', '.join(sources)}); leave it out")
    inputs = {name: Input.of(source) for name, source in sources.items()}
    tokenizer_hash = samples.tokenizer_sha256 or checked_tokenizer_hash(options)
    plan = replace(
        _plan(command, inputs, options, tokenizer_hash),
        options=dict(samples.source),
        merge=samples.merge,
        id_rule=samples.id_rule,
    )
    if samples.input_holds_ids:
        _check_input_space(output_prefix, plan, copies=2)  # parts and store
    return _through_parts(inputs, plan, output_prefix, options, work)


def _plan(
    command: str, inputs: Mapping[str, Input], options: StoreOptions, tokenizer_hash: str | None
) -> PartsPlan:
    return PartsPlan(
        command=command,
        stores={name: StorePlan.of(given) for name, given in inputs.items()},
        seq_length=options.seq_length,
        vocabulary=options.vocabulary,
        tokenizer_sha256=tokenizer_hash,
    )


def _through_parts(
    inputs: Mapping[str, Input],
    plan: PartsPlan,
    output_prefix: str,
    options: StoreOptions,
    work: WorkOptions,
) -> MergeResult | None:
    if published_result(output_prefix, plan) is None:
        if (
            work.shard is not None
            and not options.overwrite
            and (done := finished_result(output_prefix, plan))
        ):
            return done  # merged already; a task that its cluster starts again
        refuse_existing(output_prefix, plan, options.overwrite)
        _make_parts(inputs, plan, parts_directory(output_prefix), options, work)
    if work.shard is not None:
        return None
    return merge_parts(output_prefix, work.executor, overwrite=options.overwrite, keep_parts=work.keep_parts)


def _make_parts(
    inputs: Mapping[str, Input],
    plan: PartsPlan,
    directory: Path,
    options: StoreOptions,
    work: WorkOptions,
) -> None:
    """`make_parts`, in place of stale ones that are of no use, or that the user gives up by --overwrite."""

    def make() -> None:
        make_parts(inputs, plan, directory, work.executor, work.shard or Shard(), work.progress)

    try:
        make()
    except StaleParts as stale:
        # A shard cannot tell the parts of an old run from those that the other shards are making now.
        useless = options.overwrite or isinstance(stale, EditedInput) or holds_no_part(directory)
        if work.shard is not None or not useless:
            raise
        discard_parts(directory)
        make()


def _check_input_space(output_prefix: str, plan: PartsPlan, copies: int) -> None:
    input_bytes = sum(store.bytes for store in plan.stores.values())
    needed_bytes = int(input_bytes * _LEAST_OUTPUT_SHARE) * copies
    check_free_space(Path(output_prefix).parent, needed_bytes, f"preprocessing {input_bytes:,} bytes")


def checked_tokenizer_hash(options: StoreOptions) -> str | None:
    """The hash of `options.tokenizer`, whose size must be the vocabulary's; None where there is none."""
    if options.tokenizer is None:
        return None
    size = tokenizer_size(options.tokenizer)
    if size != options.vocabulary.size:
        raise DataError(
            f"{options.tokenizer}: the tokenizer has {size} ids, the vocabulary {options.vocabulary.size}; "
            "pass the tokenizer that the rows were made with (an extended one: the directory that "
            "convert_hf_checkpoint.py wrote) and leave out --vocab and --text-vocab-size, which it "
            "knows; for a plain one: --vocab text"
        )
    return tokenizer_sha256(options.tokenizer)
