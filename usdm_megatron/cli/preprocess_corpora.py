"""Commands whose input holds text and speech units: `speech-text`, `dialog`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_megatron.cli.preprocess_flags import SampleFlags, StoreFlags
from usdm_megatron.errors import ConfigError
from usdm_megatron.preprocess.merge import MergeResult
from usdm_megatron.preprocess.packing import PackingMethod
from usdm_megatron.preprocess.samples import SampleSource
from usdm_megatron.preprocess.stores import SampleOptions, StoreOptions, write_samples

if TYPE_CHECKING:
    from usdm_megatron.corpora.dialog_corpora import DialogCorpus
    from usdm_megatron.corpora.speech_corpora import Corpus
    from usdm_megatron.tokenizer.text_encoder import ExtendedTokenizer


@dataclass(frozen=True, kw_only=True)
class _CorpusFlags(SampleFlags, StoreFlags):
    tokenizer: Path
    """Directory of a tokenizer, extended by USDM's tokens or plain (then extended in memory)."""

    def write(
        self,
        command: str,
        source: SampleSource,
        tokenizer: ExtendedTokenizer,
        recorded: Mapping[str, Any],
    ) -> MergeResult | None:
        options = StoreOptions(self.seq_length, tokenizer.vocabulary, overwrite=self.overwrite)
        samples = SampleOptions(
            self.merge_options(), recorded, tokenizer.sha256, id_rule="once", input_holds_ids=False
        )
        return write_samples(command, {"": source}, self.output_prefix, options, samples, self.work())


@dataclass(frozen=True, kw_only=True)
class SpeechTextFlags(_CorpusFlags):
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
            raise ConfigError(
                "speech-text: pass either --manifest FILE … or both --unit-root and --textgrid-root"
            )

    def run(self) -> MergeResult | None:
        from usdm_megatron.corpora.speech_text import SpeechTextSource
        from usdm_megatron.tokenizer.text_encoder import TextEncoder, extended_tokenizer

        tokenizer = extended_tokenizer(self.tokenizer)
        source = SpeechTextSource(
            self._corpus(),
            TextEncoder(self.tokenizer),
            tokenizer.vocabulary,
            epochs=self.epochs,
            seed=self.seed,
            seq_length=self.seq_length,
            units_per_second=self.units_per_second,
        )
        recorded = {"epochs": self.epochs, "units_per_second": self.units_per_second}
        return self.write("speech-text", source, tokenizer, recorded)

    def _corpus(self) -> Corpus:
        from usdm_megatron.corpora.speech_corpora import ManifestCorpus
        from usdm_megatron.corpora.textgrid_corpus import TextGridCorpus

        if self.unit_root is not None and self.textgrid_root is not None:
            return TextGridCorpus(self.unit_root, self.textgrid_root)
        return ManifestCorpus(self.manifest)


@dataclass(frozen=True, kw_only=True)
class DialogFlags(_CorpusFlags):
    """Spoken dialogs → fine-tuning samples with their loss mask."""

    input: tuple[Path, ...]
    """JSONL files: turns with speaker, text and units; or DailyTalk's folder."""
    metadata: Path | None = None
    """Of DailyTalk: the list of its turns, metadata.json in the folder unless given."""
    packing: PackingMethod = "none"
    """none: a sample a row, as the original; best-fit: many times fewer rows (a batch counts rows)."""
    multi_turn: bool = False
    """As many exchanges of a dialog as fit are one sample, instead of one exchange."""

    def run(self) -> MergeResult | None:
        from usdm_megatron.corpora.dialog_corpora import DialogSource
        from usdm_megatron.tokenizer.text_encoder import TextEncoder, extended_tokenizer

        tokenizer = extended_tokenizer(self.tokenizer)
        source = DialogSource(
            self._corpus(),
            TextEncoder(self.tokenizer),
            tokenizer.vocabulary,
            self.seq_length,
            self.multi_turn,
        )
        return self.write("dialog", source, tokenizer, {"multi_turn": self.multi_turn})

    def _corpus(self) -> DialogCorpus:
        from usdm_megatron.corpora.dialog_corpora import DailyTalkDialogs, JsonDialogs

        if len(self.input) == 1 and self.input[0].is_dir():
            return DailyTalkDialogs(self.input[0], self.metadata)
        if self.metadata is not None:
            raise ConfigError("--metadata goes with DailyTalk's folder: pass that folder alone as --input")
        return JsonDialogs(self.input)
