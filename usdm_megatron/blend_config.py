"""`--train-data-path`: the prefix of a token store, or a blend of several by weight (`0.7 A 0.3 B`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from os.path import normpath

_NAME = "data: train_data_path"


@dataclass(frozen=True)
class WeightedStore:
    """A store of `--train-data-path`: its prefix, and its weight exactly as written."""

    prefix: str
    weight: Fraction


def parse_blend(words: Sequence[str]) -> tuple[WeightedStore, ...]:
    """The stores in order, one of weight 1 where no weights are given; `words` have no `blend_problems`."""
    if len(words) == 1:
        return (WeightedStore(words[0], Fraction(1)),)
    pairs = zip(words[1::2], words[::2], strict=True)
    return tuple(WeightedStore(prefix, Fraction(Decimal(weight))) for prefix, weight in pairs)


def blend_problems(words: Sequence[str]) -> list[str]:
    """What keeps `words` from being `PREFIX`, or `WEIGHT PREFIX WEIGHT PREFIX …`."""
    if not words or not all(map(str.strip, words)):
        return [f"{_NAME} is empty; give a value or drop --train-data-path"]
    if len(words) == 1:
        inner = words[0].split()
        if len(inner) > 2 and not blend_problems(inner):
            return [f"{_NAME} {words[0]!r} is one word; give a blend as separate words, in YAML as a list"]
        return []
    if len(words) % 2:
        return [f"{_NAME} has {len(words)} words; a blend is pairs of weight and prefix, as in 0.7 A 0.3 B"]
    problems = [
        f"{_NAME}: the weight of {prefix} is {weight!r}; it must be a positive number, as in 0.7 A 0.3 B"
        for weight, prefix in zip(words[::2], words[1::2], strict=True)
        if not _is_weight(weight)
    ]
    times = Counter(map(normpath, words[1::2]))
    return problems + [
        f"{_NAME} names {prefix} {count} times; name it once, with the sum of its weights"
        for prefix, count in times.items()
        if count > 1
    ]


def _is_weight(word: str) -> bool:
    try:
        return 0 < float(word) < math.inf  # false for nan
    except ValueError:
        return False
