"""Makes the parts of the work: any part by any worker on any machine, those that are there not again."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from usdm_megatron.data.file_writing import open_locked, remove_leftovers, reported, write_atomically
from usdm_megatron.data.loss_mask import without_first_tokens
from usdm_megatron.data.token_index import LENGTH_DTYPE
from usdm_megatron.data.token_store import token_dtype
from usdm_megatron.data.token_store_writer import check_rows
from usdm_megatron.preprocess.executors import Executor
from usdm_megatron.preprocess.merged_samples import LISTED_REJECTIONS, strict_error
from usdm_megatron.preprocess.part_files import PartFiles, open_part, write_part
from usdm_megatron.preprocess.parts_plan import Input, PartsPlan, Shard
from usdm_megatron.preprocess.plan_agreement import agree_on_plan, edited_input, read_source, sources_path
from usdm_megatron.preprocess.row_parts import RowCutter
from usdm_megatron.preprocess.rows import RowSource
from usdm_megatron.preprocess.samples import Occurrences, SampleBlock, SampleSource
from usdm_megatron.preprocess.source_hashes import hash_files

ROWS_WITHOUT_BOS = "rows_without_leading_bos"

Task = TypeVar("Task")
Progress = Callable[[int, int], None]  # (done, of how many)


def make_parts(
    inputs: Mapping[str, Input],
    plan: PartsPlan,
    directory: Path,
    executor: Executor,
    shard: Shard,
    progress: Progress,
) -> None:
    """Make the parts of `shard` that are not there and whole; `inputs` by store, as in the plan.

    Parts are pure functions of input and options: a killed run is continued by the same command. Raises
    `DataError` for bad input, `StaleParts` where parts of another plan or of changed input are there.
    """
    agree_on_plan(directory, plan, inputs)
    lock = directory / f"shard-{shard.index}-of-{shard.count}.lock"
    with reported(lock):
        lock_file = open_locked(lock, f"{directory}, shard {shard.index}/{shard.count}")
    with lock_file:
        hashing = _own(shard, _file_tasks(inputs, plan))
        making = _own(shard, _part_tasks(inputs))
        names = {path.name for task in making for path in task.paths(directory)}
        names |= {path.name for task in hashing for path in task.paths(directory)}
        remove_leftovers(directory, names)
        with contextlib.closing(executor.map(_FileHasher(plan.id, directory), hashing)) as hashed:
            for _ in hashed:
                pass
        maker = _PartMaker({store: given.source for store, given in inputs.items()}, plan, directory)
        with contextlib.closing(executor.map(maker, making)) as made:
            for done, _ in enumerate(made, 1):
                progress(done, len(making))


def _own(shard: Shard, tasks: Iterator[Task]) -> list[Task]:
    every = list(tasks)
    numbers = shard.numbers(len(every))
    return every[numbers.start : numbers.stop]


# --- parts


@dataclass(frozen=True)
class _PartTask:
    """Part `number` of the work is `part` of the source of `store`."""

    number: int
    store: str
    part: Any

    def paths(self, directory: Path) -> tuple[Path, ...]:
        files = PartFiles(directory, self.number)
        return files.bin, files.json


def _part_tasks(inputs: Mapping[str, Input]) -> Iterator[_PartTask]:
    parts = ((store, part) for store, given in inputs.items() for part in given.parts)
    return (_PartTask(number, store, part) for number, (store, part) in enumerate(parts))


@dataclass(frozen=True)
class _PartMaker:
    """Makes one part in a worker; one that is whole stays as it is."""

    sources: dict[str, SampleSource | RowSource]
    plan: PartsPlan
    directory: Path

    def __call__(self, task: _PartTask) -> None:
        files = PartFiles(self.directory, task.number)
        there = open_part(files, self.plan.id)
        if there is not None and there.is_whole():
            return
        source = self.sources[task.store]
        if self.plan.merge is None:
            content = _row_content(cast(RowSource, source), task.part, self.plan)
        else:
            content = _sample_content(cast(SampleSource, source).make(task.part), self.plan)
        write_part(files, self.plan.id, content.arrays, content.facts)


@dataclass(frozen=True)
class _Content:
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def _row_content(source: RowSource, part: Any, plan: PartsPlan) -> _Content:
    rows = RowCutter(source, plan.vocabulary)(part)
    check_rows(rows.tokens, rows.row_lengths(), rows.place, plan.vocabulary, plan.seq_length)
    arrays = {name: getattr(rows, name) for name in ("tokens", "sample_lengths", "samples_per_row")}
    notices = {ROWS_WITHOUT_BOS: rows.rows_without_bos} if rows.rows_without_bos else {}
    return _Content(arrays, {"notices": notices})


def _sample_content(block: SampleBlock, plan: PartsPlan) -> _Content:
    _check_block(block, plan)
    if plan.merge is not None and plan.merge.strict and block.rejections:
        raise strict_error(block.rejections, len(block.rejections))
    arrays = {
        "tokens": block.tokens.astype(token_dtype(plan.vocabulary)),
        "lengths": block.lengths.astype(LENGTH_DTYPE),
        "utterances": block.utterances.astype("<u8"),
        "groups": block.groups.astype("<i4"),
    }
    if block.loss_mask is not None:
        arrays["loss_mask"] = without_first_tokens(block.loss_mask, block.lengths)
    if block.occurrences is not None:
        arrays |= _occurrence_arrays(block.occurrences)
    facts = {
        "notices": dict(block.notices),
        "rejected": dict(Counter(rejection.reason for rejection in block.rejections)),
        "listed": [asdict(rejection) for rejection in block.rejections[:LISTED_REJECTIONS]],
    }
    return _Content(arrays, facts)


def _occurrence_arrays(heard: Occurrences) -> dict[str, np.ndarray]:
    names = [name.encode("utf-8", "surrogateescape") for name in heard.names]
    return {
        "occurrences": heard.of_sample.astype("<i4"),
        "ids": heard.ids.astype("<u8"),
        "id_epochs": heard.epochs.astype("<i4"),
        "is_rejected": heard.is_rejected.astype("|u1"),
        "names": np.frombuffer(b"".join(names), dtype="|u1"),
        "name_ends": np.cumsum([len(name) for name in names], dtype="<i8"),
    }


def _check_block(block: SampleBlock, plan: PartsPlan) -> None:
    """What a source promises; bad input it has named itself, so anything here is a bug of ours."""
    samples, tokens = len(block.lengths), len(block.tokens)
    if {samples} != {len(block.utterances), len(block.groups)} or int(block.lengths.sum()) != tokens:
        raise ValueError("lengths, utterances, groups and tokens of a block do not agree")
    if plan.id_rule == "once" and (block.occurrences is None or len(block.occurrences.of_sample) != samples):
        raise ValueError("a block whose ids come once says which utterance every sample is of")
    if block.loss_mask is not None and len(block.loss_mask) != tokens:
        raise ValueError("a loss mask has a value for every token")
    if samples and not 1 <= int(block.lengths.min()) <= int(block.lengths.max()) <= plan.seq_length:
        raise ValueError(f"a sample is empty or longer than {plan.seq_length} tokens")
    if tokens and not 0 <= int(block.tokens.min()) <= int(block.tokens.max()) < plan.vocabulary.size:
        raise ValueError(f"an id is outside the vocabulary of {plan.vocabulary.size}")


# --- input files


@dataclass(frozen=True)
class _FileTask:
    """Files that are hashed together, as record `number`."""

    number: int
    files: list[tuple[str, Path]]

    def paths(self, directory: Path) -> tuple[Path, ...]:
        return (sources_path(directory, self.number),)


def _file_tasks(inputs: Mapping[str, Input], plan: PartsPlan) -> Iterator[_FileTask]:
    number = 0
    for store, given in inputs.items():
        for group in plan.stores[store].file_groups():
            yield _FileTask(number, given.files[group.start : group.stop])
            number += 1


@dataclass(frozen=True)
class _FileHasher:
    """Hashes input files in a worker and compares them with what an earlier run recorded."""

    plan_id: str
    directory: Path

    def __call__(self, task: _FileTask) -> None:
        path = sources_path(self.directory, task.number)
        record = {"plan": self.plan_id, **asdict(hash_files(task.files))}
        if path.is_file():
            before = read_source(path, self.plan_id)
            if asdict(before) != {name: record[name] for name in asdict(before)}:
                raise edited_input(before.name, self.directory)
            return
        with reported(path):
            write_atomically(path, json.dumps(record, indent=1).encode())
