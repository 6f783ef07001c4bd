"""Commands whose input holds token ids: `cache`, `packed`, `samples`, `sft`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from usdm_megatron.cli.preprocess_flags import IdFlags, SampleFlags, parse_split
from usdm_megatron.errors import ConfigError
from usdm_megatron.preprocess.merge import MergeResult
from usdm_megatron.preprocess.packing import PackingMethod
from usdm_megatron.preprocess.parts_plan import MergeOptions
from usdm_megatron.preprocess.rows import RowSource
from usdm_megatron.preprocess.stores import SampleOptions, preprocess_cache, preprocess_packed, write_samples


@dataclass(frozen=True, kw_only=True)
class _RepackFlags(IdFlags):
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
        given = {
            "packing": self.packing,
            "seed": self.seed,
            "split": self.split,
            "strict": self.strict or None,
        }
        names = [f"--{name}" for name, value in given.items() if value is not None]
        if names and not self.repack:
            raise ConfigError(f"{', '.join(names)}: rows are taken as they are; add --repack to pack anew")

    def repacked(self, command: str, rows: Mapping[str, RowSource]) -> MergeResult | None:
        from usdm_megatron.preprocess.sample_files import RepackSource

        sources = {
            name: RepackSource(source, self.vocabulary, self.seq_length) for name, source in rows.items()
        }
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
        from usdm_megatron.preprocess.row_sources import open_cache

        if self.repack:
            return self.repacked("cache", open_cache(self.input))
        return preprocess_cache(self.input, self.output_prefix, self.options(), self.work())


@dataclass(frozen=True, kw_only=True)
class PackedFlags(_RepackFlags):
    """Stage 3: text files, one packed row of ids a line; read in natural order."""

    input: tuple[Path, ...]
    """The files, e.g. part*.txt."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.preprocess.row_sources import PackedTextSource

        if self.repack:
            return self.repacked("packed", {"": PackedTextSource(self.input)})
        return preprocess_packed(self.input, self.output_prefix, self.options(), self.work())


@dataclass(frozen=True, kw_only=True)
class SamplesFlags(SampleFlags, IdFlags):
    """Stage 2: data_epoch*.txt, a sample of ids a line, with their .json of lengths; packed here."""

    input: tuple[Path, ...]
    """The files, e.g. data_epoch*.txt."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.preprocess.sample_files import SampleFilesSource

        source = SampleFilesSource(self.input, self.vocabulary, self.seq_length)
        samples = SampleOptions(self.merge_options())
        return write_samples(
            "samples", {"": source}, self.output_prefix, self.options(), samples, self.work()
        )


@dataclass(frozen=True, kw_only=True)
class SftFlags(SampleFlags, IdFlags):
    """Fine-tuning lines of the original, `ids|labels`."""

    input: tuple[Path, ...]
    """The files, e.g. train.txt."""
    packing: PackingMethod = "none"
    """none: a sample a row, as the original; best-fit: many times fewer rows (a batch counts rows)."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.preprocess.sft_lines import SftLinesSource

        source = SftLinesSource(self.input, self.vocabulary, self.seq_length)
        samples = SampleOptions(self.merge_options())
        return write_samples("sft", {"": source}, self.output_prefix, self.options(), samples, self.work())
