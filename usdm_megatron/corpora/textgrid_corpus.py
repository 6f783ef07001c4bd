"""The original's tree: units in `NAME_unit.txt`, words in the tier `words` of `NAME.TextGrid`.

The two lie under roots of their own (stage 1 writes beside the audio, the Montreal Forced Aligner into
`…-textgrid`) at the same relative path, which is the utterance's id. `NAME.txt` is what was aligned; its
words are in the TextGrid, so it is not read, as in stage 2.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from usdm_megatron.corpora.alignment import UNITS_MISSING, Rejected, Utterance, Word
from usdm_megatron.corpora.speech_corpora import MALFORMED_UNITS, is_unicode, parse_units
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.samples import Rejection

TEXTGRID_MISSING = "textgrid_missing"
MALFORMED_TEXTGRID = "malformed_textgrid"

UNIT_SUFFIX = "_unit.txt"
TEXTGRID_SUFFIX = ".TextGrid"
PART_UTTERANCES = 1000
_WORD_TIER = "words"
_LONGEST_UNIT_LINE = 64 << 20  # two weeks of speech
# praatio (6.2) takes quadratic time over the length of an element and over the number of tiers.
_LARGEST_TEXTGRID = 4 << 20  # an hour of speech, words and phones
_LARGEST_ELEMENT = 4 << 10
_MOST_TIERS = 100
_ELEMENT = re.compile(rb"(?:item|intervals|points) ?\[")
_TIER = re.compile(rb'"(?:Interval|Text)Tier"')
_BYTE_ORDER_MARKS = b"\xff\xfe\xef\xbb\xbf"
_SHORTFALL_S = 0.02  # what a tier's last interval may leave of it: one unit


@dataclass(frozen=True)
class TextGridCorpus:
    """Every utterance that has units or a TextGrid, in the order of their names."""

    unit_root: Path
    textgrid_root: Path

    def __post_init__(self) -> None:
        problems = [
            f"{root}: no such directory; {holds}"
            for root, holds in (
                (self.unit_root, f"it holds NAME{UNIT_SUFFIX} files at any depth"),
                (self.textgrid_root, f"it holds NAME{TEXTGRID_SUFFIX} files at the same relative paths"),
            )
            if not root.is_dir()
        ]
        if problems:
            raise DataError(*problems)

    def files(self) -> list[tuple[str, Path]]:
        return [
            (f"{label}/{name}{suffix}", path)
            for label, root, suffix in (
                ("units", self.unit_root, UNIT_SUFFIX),
                ("textgrids", self.textgrid_root, TEXTGRID_SUFFIX),
            )
            for name in sorted(_names_under(root, suffix))
            if (path := root / f"{name}{suffix}").is_file()  # a link may lead nowhere
        ]

    def parts(self) -> list[tuple[str, ...]]:
        with_units = _names_under(self.unit_root, UNIT_SUFFIX)
        with_words = _names_under(self.textgrid_root, TEXTGRID_SUFFIX)
        if not with_units & with_words:
            raise DataError(
                f"{len(with_units):,} NAME{UNIT_SUFFIX} under {self.unit_root} and {len(with_words):,} "
                f"NAME{TEXTGRID_SUFFIX} under {self.textgrid_root}, none of the same relative path and NAME; "
                "give the two roots under which paths are equal (corpus/dev-clean, corpus/dev-clean-textgrid)"
            )
        names = sorted(with_units | with_words)
        return [tuple(names[at : at + PART_UTTERANCES]) for at in range(0, len(names), PART_UTTERANCES)]

    def read(self, part: Sequence[str]) -> Iterator[Utterance | Rejection]:
        for name in part:
            try:
                units = read_units(self.unit_root / f"{name}{UNIT_SUFFIX}")
                tier = read_word_tier(self.textgrid_root / f"{name}{TEXTGRID_SUFFIX}")
                yield Utterance(name, units, tier.words, tier.end_s)
            except Rejected as rejected:
                yield Rejection(name, rejected.reason, rejected.detail)


@dataclass(frozen=True)
class WordTier:
    """Words and silences of a recording, and where the last one ends."""

    words: tuple[Word, ...]
    end_s: float


def read_units(path: Path) -> np.ndarray:
    """Unit numbers, int32, of the first line up to a tab, as stage 2 reads them."""
    line = _read(path, _LONGEST_UNIT_LINE, UNITS_MISSING, MALFORMED_UNITS).split(b"\n", 1)[0]
    return parse_units(line.split(b"\t", 1)[0].decode("ascii", "replace"))


def read_word_tier(path: Path) -> WordTier:
    """The tier `words` of a TextGrid, long or short; raises `Rejected` for anything else, in bounded time."""
    from praatio import textgrid

    content = _read(path, _LARGEST_TEXTGRID, TEXTGRID_MISSING, MALFORMED_TEXTGRID)
    _check_form(content)
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=True, reportingMode="silence")
    except Exception as error:  # praatio raises what its string handling runs into
        raise Rejected(MALFORMED_TEXTGRID, f"{type(error).__name__}: {error!s:.100}") from error
    tier = grid.getTier(_WORD_TIER) if _WORD_TIER in grid.tierNames else None
    if not isinstance(tier, textgrid.IntervalTier):
        names = ", ".join(map(str, grid.tierNames))
        raise Rejected(MALFORMED_TEXTGRID, f"no interval tier {_WORD_TIER!r}, only {names or 'none'}"[:100])
    words = tuple(Word(entry.label, entry.start, entry.end) for entry in tier.entries)
    end_s = words[-1].end_s if words else 0.0
    if not tier.maxTimestamp - end_s <= _SHORTFALL_S:  # praatio takes a file that was cut between intervals
        raise Rejected(
            MALFORMED_TEXTGRID, f"intervals end at {end_s} s, the tier at {tier.maxTimestamp} s: cut short"
        )
    return WordTier(words, end_s)


def _check_form(content: bytes) -> None:
    """Refuse what praatio would be busy with for hours, and JSON, which it would read as well."""
    content = content.lstrip(_BYTE_ORDER_MARKS).replace(b"\0", b"")  # UTF-16 as if it were ASCII
    if not content.startswith(b"File type"):
        raise Rejected(MALFORMED_TEXTGRID, "does not begin as a TextGrid: File type")
    if (tiers := len(_TIER.findall(content))) > _MOST_TIERS:
        raise Rejected(MALFORMED_TEXTGRID, f"{tiers} tiers, at most {_MOST_TIERS}")
    if b"ooTextFile short" in content or b"item [" not in content:
        return  # the short form has no elements
    longest = max(map(len, _ELEMENT.split(content)))
    if longest > _LARGEST_ELEMENT:
        raise Rejected(MALFORMED_TEXTGRID, f"an element of {longest} bytes, at most {_LARGEST_ELEMENT}")


def _read(path: Path, most_bytes: int, if_missing: str, if_too_large: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise Rejected(if_missing, f"no {path.name}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > most_bytes:
        raise Rejected(if_too_large, f"{path.name} is larger than {most_bytes >> 20} MiB")
    return content


def _names_under(root: Path, suffix: str) -> set[str]:
    """Relative POSIX paths, without `suffix`, of the files that end with it; links are followed once."""
    names: set[str] = set()
    seen: set[tuple[int, int]] = set()
    for directory, subdirectories, files in os.walk(root, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            subdirectories.clear()  # a link back
            continue
        seen.add((status.st_dev, status.st_ino))
        subdirectories.sort()  # which of two ways to a directory is taken depends on nothing else
        relative = Path(directory).relative_to(root)
        names.update(
            (relative / file[: -len(suffix)]).as_posix()
            for file in files
            if file.endswith(suffix) and len(file) > len(suffix)
        )
    if nameless := sorted(name for name in names if not is_unicode(name)):
        raise DataError(
            f"{root}: {nameless[0]!r} is not named in UTF-8; rename it, names become utterance ids"
        )
    return names
