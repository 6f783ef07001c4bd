"""Flags that several commands of the preprocessor share."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from usdm_megatron.errors import ConfigError
from usdm_megatron.preprocess.executors import Executor, ExecutorKind, open_executor
from usdm_megatron.preprocess.packing import PackingMethod
from usdm_megatron.preprocess.parts_plan import MergeOptions, Shard
from usdm_megatron.preprocess.sample_parts import Progress
from usdm_megatron.preprocess.stores import StoreOptions, WorkOptions
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

_PROGRESS_INTERVAL_S = 10.0


@dataclass(frozen=True, kw_only=True)
class WorkFlags:
    output_prefix: str
    """Prefix of the files to write: PREFIX.bin, PREFIX.idx, PREFIX.json."""
    workers: int | None = None
    """Processes; all cores of this machine unless given. The result does not depend on it."""
    executor: ExecutorKind = "processes"
    """processes: of this machine; ray: tasks of the cluster at RAY_ADDRESS, else of a local one."""
    overwrite: bool = False
    """Replace an existing store."""
    keep_parts: bool = False
    """Leave PREFIX.parts, what was made before packing."""

    def open_executor(self) -> Executor:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return open_executor(self.executor, cores if self.workers is None else self.workers)


@dataclass(frozen=True, kw_only=True)
class StoreFlags(WorkFlags):
    seq_length: int = 8192
    """Longest row allowed, in tokens."""
    shard: str | None = None
    """i/n: make the parts of shard i of n (0 to n-1) and stop; when all are there, `merge` finishes."""

    def work(self) -> WorkOptions:
        shard = None if self.shard is None else Shard.parse(self.shard)
        return WorkOptions(self.open_executor(), shard, self.keep_parts, _progress_printer())


@dataclass(frozen=True, kw_only=True)
class IdFlags(StoreFlags):
    """Input that holds ids already."""

    tokenizer: Path | None = None
    """Directory of the tokenizer that made the ids: gives the vocabulary; its hash is recorded."""
    vocab: Literal["usdm", "text"] | None = None
    """usdm: text, speech units and control tokens (default); text: the text vocabulary alone."""
    text_vocab_size: int | None = None
    """Ids of the text vocabulary (default: Mistral's 32,000)."""

    def __post_init__(self) -> None:
        least = max(USDM_VOCABULARY.bos_id, USDM_VOCABULARY.eos_id) + 1
        if self.text_vocab_size is not None and self.text_vocab_size < least:
            raise ConfigError(
                f"--text-vocab-size is {self.text_vocab_size}, the least is {least}: bos and eos are text ids"
            )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the flags say, else the vocabulary of the tokenizer, else USDM's."""
        if self.tokenizer is not None and self.vocab is None and self.text_vocab_size is None:
            from usdm_megatron.tokenizer.text_encoder import extended_tokenizer

            return extended_tokenizer(self.tokenizer).vocabulary
        return Vocabulary(
            text_size=self.text_vocab_size or USDM_VOCABULARY.text_size,
            unit_count=0 if self.vocab == "text" else USDM_VOCABULARY.unit_count,
        )

    def options(self) -> StoreOptions:
        return StoreOptions(self.seq_length, self.vocabulary, self.tokenizer, self.overwrite)


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """What becomes of samples."""

    packing: PackingMethod = "best-fit"
    """best-fit: fullest; next-fit: as the original; none: a sample a row."""
    split: str | None = None
    """Shares of utterances in PREFIX_train and PREFIX_test, as 0.99,0.01; one store unless given."""
    seed: int = 42
    """Of everything drawn: boundaries and modalities, the split, the order of samples and rows."""
    strict: bool = False
    """Rejected samples are errors, instead of counted, listed in PREFIX_report.json and left out."""

    def merge_options(self) -> MergeOptions:
        return MergeOptions(self.packing, parse_split(self.split), self.seed, self.strict)


def parse_split(text: str | None) -> tuple[float, float] | None:
    """`0.99,0.01` as shares of (train, test); whether they are sensible, `MergeOptions` says."""
    if text is None:
        return None
    try:
        train, test = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--split is {text!r}; it takes the shares of train and test: 0.99,0.01") from None
    return train, test


def _progress_printer() -> Progress:
    """Says every few seconds how far the work is; nothing where it is short."""
    printed_at = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= _PROGRESS_INTERVAL_S:
            printed_at = time.monotonic()
            print(f"part {done:,} of {of:,}", file=sys.stderr)

    return progress
