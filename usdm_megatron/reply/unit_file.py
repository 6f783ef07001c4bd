"""The speech units of one utterance, as `--units FILE` gives them: decimal numbers and white space."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

STDIN = "-"
_MOST_BYTES = 8 << 20  # hours of speech: more than any model reads at once
_MOST_PROBLEMS = 10
_MOST_DIGITS = 18  # of an int64
_MOST_SHOWN = 40  # characters of a word


def read_units(source: str, vocabulary: Vocabulary) -> np.ndarray:
    """Unit numbers, int32 `[N]`, of a file or of standard input (`-`).

    Raises `DataError` for one that is missing, empty or too large, and names the lines that hold
    anything but units of `vocabulary`.
    """
    name = "standard input" if source == STDIN else source
    try:
        if source == STDIN:
            if sys.stdin is None:  # what Python makes of a closed one
                raise DataError("--units -: standard input is closed; pipe the units in, or name a file")
            text = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"--units {name}: cannot be read ({error.strerror})") from error
    if len(text) > _MOST_BYTES:
        raise DataError(
            f"--units {name}: larger than {_MOST_BYTES >> 20} MiB; give the units of one utterance"
        )
    if problems := list(islice(_problems(text, name, vocabulary), _MOST_PROBLEMS)):
        raise DataError(*problems)
    if not text.strip():
        raise DataError(f"--units {name}: holds no units; give decimal numbers, separated by white space")
    return np.array(text.split(), dtype=np.int64).astype(np.int32)


def _problems(text: bytes, name: str, vocabulary: Vocabulary) -> Iterator[str]:
    for number, line in enumerate(text.split(b"\n"), start=1):
        for word in line.split():
            shown = word.decode("utf-8", "replace")[:_MOST_SHOWN]
            if not word.isdigit():
                yield f"--units {name} line {number}: {shown!r} is no unit; units are decimal numbers"
            elif len(word) > _MOST_DIGITS or int(word) >= vocabulary.unit_count:
                yield (
                    f"--units {name} line {number}: unit {shown} is out of range; the model has 0 to "
                    f"{vocabulary.unit_count - 1}"
                )
