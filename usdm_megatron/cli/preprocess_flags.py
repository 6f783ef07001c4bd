"""The commands of the preprocessor: each one's flags, and what they ask for."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from usdm_megatron.data.executors import Executor, ExecutorKind, open_executor
from usdm_megatron.data.merge import MergeResult, merge_parts
from usdm_megatron.data.packing import PackingMethod
from usdm_megatron.data.parts_plan import IdRule, MergeOptions, Shard, parse_split
from usdm_megatron.data.preprocess import (
    SampleOptions,
    StoreOptions,
    WorkOptions,
    preprocess_cache,
    preprocess_packed,
    write_samples,
)
from usdm_megatron.data.rows import RowSource
from usdm_megatron.data.samples import SampleSource
from usdm_megatron.errors import ConfigError
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

_PROGRESS_INTERVAL_S = 10.0


@dataclass(frozen=True, kw_only=True)
class _WorkFlags:
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
class _StoreFlags(_WorkFlags):
    seq_length: int = 8192
    """Longest row allowed, in tokens."""
    shard: str | None = None
    """i/n: make the parts of shard i of n (0 to n-1) and stop; when all are there, `merge` finishes."""

    def work(self) -> WorkOptions:
        shard = None if self.shard is None else Shard.parse(self.shard)
        return WorkOptions(self.open_executor(), shard, self.keep_parts, _progress_printer())


@dataclass(frozen=True, kw_only=True)
class _IdFlags(_StoreFlags):
    """Input that holds ids already."""

    tokenizer: Path | None = None
    """Directory of the tokenizer that made the ids: its size is checked, its hash recorded."""
    vocab: Literal["usdm", "text"] = "usdm"
    """usdm: text, speech units and control tokens; text: the text vocabulary alone."""
    text_vocab_size: int = USDM_VOCABULARY.text_size
    """Ids of the text vocabulary (Mistral: 32,000)."""

    def __post_init__(self) -> None:
        least = max(USDM_VOCABULARY.bos_id, USDM_VOCABULARY.eos_id) + 1
        if self.text_vocab_size < least:
            raise ConfigError(
                f"--text-vocab-size is {self.text_vocab_size}, the least is {least}: bos and eos are text ids"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        units = USDM_VOCABULARY.unit_count if self.vocab == "usdm" else 0
        return Vocabulary(text_size=self.text_vocab_size, unit_count=units)

    def options(self) -> StoreOptions:
        return StoreOptions(self.seq_length, self.vocabulary, self.tokenizer, self.overwrite)


@dataclass(frozen=True, kw_only=True)
class _RepackFlags(_IdFlags):
    repack: bool = False
    """Cut the rows into samples again and pack these anew, in another order."""
    packing: PackingMethod | None = None
    """With --repack: best-fit (default), next-fit as the original, none: a sample a row."""
    seed: int | None = None
    """With --repack: of the order of samples and rows (default 42)."""
    split: str | None = None
    """With --repack: shares of samples in PREFIX_train and PREFIX_test, as 0.99,0.01."""
    strict: bool = False
    """With --repack: an over-long sample is an error instead of counted and left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"packing": self.packing, "seed": self.seed, "split": self.split, "strict": self.strict or None}
        names = [f"--{name}" for name, value in given.items() if value is not None]
        if names and not self.repack:
            raise ConfigError(f"{', '.join(names)}: rows are taken as they are; add --repack to pack anew")

    def repacked(self, command: str, rows: dict[str, RowSource]) -> MergeResult | None:
        from usdm_megatron.data.sample_files import RepackSource

        sources = {name: RepackSource(source, self.vocabulary, self.seq_length) for name, source in rows.items()}
        merge = MergeOptions(
            self.packing or "best-fit",
            parse_split(self.split),
            42 if self.seed is None else self.seed,
            self.strict,
        )
        return write_samples(
            command, sources, self.output_prefix, self.options(), SampleOptions(merge), self.work()
        )


@dataclass(frozen=True, kw_only=True)
class CacheFlags(_RepackFlags):
    """Stage 4: datasets saved to disk, or Parquet. A DatasetDict gives PREFIX_train and PREFIX_test."""

    input: Path
    """Directory that datasets.DatasetDict.save_to_disk wrote, or Parquet; column input_ids."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.data.sources import open_cache

        if self.repack:
            return self.repacked("cache", open_cache(self.input))
        return preprocess_cache(self.input, self.output_prefix, self.options(), self.work())


@dataclass(frozen=True, kw_only=True)
class PackedFlags(_RepackFlags):
    """Stage 3: text files, one packed row of ids a line; read in natural order."""

    input: tuple[Path, ...]
    """The files, e.g. part*.txt."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.data.sources import PackedTextSource

        if self.repack:
            return self.repacked("packed", {"": PackedTextSource(self.input)})
        return preprocess_packed(self.input, self.output_prefix, self.options(), self.work())


@dataclass(frozen=True, kw_only=True)
class _MergeFlags:
    """What becomes of samples."""

    split: str | None = None
    """Shares of utterances in PREFIX_train and PREFIX_test, as 0.99,0.01; one store unless given."""
    seed: int = 42
    """Of everything drawn: boundaries and modalities, the split, the order of samples and rows."""
    strict: bool = False
    """Rejected samples are errors instead of counted, listed in PREFIX_report.json and left out."""


@dataclass(frozen=True, kw_only=True)
class _SampleFlags(_MergeFlags):
    packing: PackingMethod = "best-fit"
    """best-fit: fullest; next-fit: as the original; none: a sample a row."""

    def merge_options(self) -> MergeOptions:
        return MergeOptions(self.packing, parse_split(self.split), self.seed, self.strict)


@dataclass(frozen=True, kw_only=True)
class _DialogueFlags(_MergeFlags):
    packing: PackingMethod = "none"
    """none: a dialog a row, as the original; best-fit: many times fewer rows, which a batch counts."""

    def merge_options(self) -> MergeOptions:
        return MergeOptions(self.packing, parse_split(self.split), self.seed, self.strict)


@dataclass(frozen=True, kw_only=True)
class SamplesFlags(_SampleFlags, _IdFlags):
    """Stage 2: data_epoch*.txt, a sample of ids a line, with their .json of lengths; packed here."""

    input: tuple[Path, ...]
    """The files, e.g. data_epoch*.txt."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.data.sample_files import SampleFilesSource

        source = SampleFilesSource(self.input, self.vocabulary, self.seq_length)
        samples = SampleOptions(self.merge_options())
        return write_samples("samples", {"": source}, self.output_prefix, self.options(), samples, self.work())


@dataclass(frozen=True, kw_only=True)
class SftFlags(_DialogueFlags, _IdFlags):
    """Fine-tuning lines of the original, `ids|labels`."""

    input: tuple[Path, ...]
    """The files, e.g. train.txt."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.data.sft_lines import SftLinesSource

        source = SftLinesSource(self.input, self.vocabulary, self.seq_length)
        samples = SampleOptions(self.merge_options())
        return write_samples("sft", {"": source}, self.output_prefix, self.options(), samples, self.work())


@dataclass(frozen=True, kw_only=True)
class _CorpusFlags(_StoreFlags):
    """Input that holds text and units."""

    tokenizer: Path
    """Directory of a tokenizer, extended by USDM's tokens or plain (then extended in memory)."""

    def write(
        self,
        command: str,
        source: SampleSource,
        found: ExtendedTokenizer,
        merge: MergeOptions,
        recorded: dict[str, object],
        id_rule: IdRule,
    ) -> MergeResult | None:
        samples = SampleOptions(merge, recorded, found.sha256, id_rule, input_holds_ids=False)
        options = StoreOptions(self.seq_length, found.vocabulary, overwrite=self.overwrite)
        return write_samples(command, {"": source}, self.output_prefix, options, samples, self.work())


@dataclass(frozen=True, kw_only=True)
class SpeechTextFlags(_SampleFlags, _CorpusFlags):
    """Stages 2 to 4 in one: aligned words and speech units, interleaved, packed."""

    manifest: tuple[Path, ...] = ()
    """JSONL or Parquet: id, units, words with text, start and end in seconds, perhaps duration."""
    unit_root: Path | None = None
    """Or the original's tree: where NAME_unit.txt lie,"""
    textgrid_root: Path | None = None
    """and where NAME.TextGrid lie at the same relative paths."""
    epochs: int = 1
    """Samples drawn of every utterance, each anew."""
    units_per_second: float = 50.0
    """Of the speech units."""

    def __post_init__(self) -> None:
        roots = (self.unit_root is not None, self.textgrid_root is not None)
        if roots[0] != roots[1] or roots[0] == bool(self.manifest):
            raise ConfigError("speech-text: pass either --manifest FILE … or both --unit-root and --textgrid-root")

    def run(self) -> MergeResult | None:
        from usdm_megatron.data.speech_corpora import Corpus, ManifestCorpus
        from usdm_megatron.data.speech_text import SpeechTextSource
        from usdm_megatron.data.text_encoder import TextEncoder, extended_tokenizer
        from usdm_megatron.data.textgrid_corpus import TextGridCorpus

        corpus: Corpus
        if self.unit_root is not None and self.textgrid_root is not None:
            corpus = TextGridCorpus(self.unit_root, self.textgrid_root)
        else:
            corpus = ManifestCorpus(self.manifest)
        found = extended_tokenizer(self.tokenizer)
        source = SpeechTextSource(
            corpus,
            TextEncoder(self.tokenizer),
            found.vocabulary,
            epochs=self.epochs,
            seed=self.seed,
            seq_length=self.seq_length,
            units_per_second=self.units_per_second,
        )
        recorded: dict[str, object] = {"epochs": self.epochs, "units_per_second": self.units_per_second}
        return self.write("speech-text", source, found, self.merge_options(), recorded, "once")


@dataclass(frozen=True, kw_only=True)
class DialogFlags(_DialogueFlags, _CorpusFlags):
    """Spoken dialogs → fine-tuning samples with their loss mask."""

    input: tuple[Path, ...]
    """JSONL: turns with speaker, text and units; or DailyTalk's folder."""
    multi_turn: bool = False
    """As many exchanges of a dialog as fit are one sample, instead of one exchange."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.data.dialog_corpora import DialogSource, open_dialogs
        from usdm_megatron.data.text_encoder import TextEncoder, extended_tokenizer

        corpus = open_dialogs(self.input)
        found = extended_tokenizer(self.tokenizer)
        source = DialogSource(
            corpus, TextEncoder(self.tokenizer), found.vocabulary, self.seq_length, self.multi_turn
        )
        recorded: dict[str, object] = {"multi_turn": self.multi_turn}
        return self.write("dialog", source, found, self.merge_options(), recorded, "together")


@dataclass(frozen=True, kw_only=True)
class MergeFlags(_WorkFlags):
    """The last step after --shard i/n: PREFIX.parts → stores, with the options that the parts record."""

    def run(self) -> MergeResult | None:
        return merge_parts(
            self.output_prefix, self.open_executor(), overwrite=self.overwrite, keep_parts=self.keep_parts
        )
