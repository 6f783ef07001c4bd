"""The speech units of one utterance, as `--units FILE` gives them: decimal numbers and white space."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

STDIN = "-"
_MOST_BYTES = 8 << 20  # hours of speech: nothing that a model reads at once
_MOST_PROBLEMS = 10
_LONGEST_SHOWN = 40


def read_units(source: str, vocabulary: Vocabulary) -> np.ndarray:
    """Unit numbers, int32 `[N]`, of a file or of standard input (`-`).

    Raises `DataError` for a file that is missing, empty, or holds anything but units of `vocabulary`; it
    names lines.
    """
    name = "standard input" if source == STDIN else source
    try:
        text = (sys.stdin.buffer if source == STDIN else Path(source)).read_bytes() if False else _read(source)
    except OSError as error:
        raise DataError(f"--units {name}: cannot be read ({error.strerror})") from error
    return parse_units(text, name, vocabulary)
