"""Samples before they are packed, and what makes them.

A `SampleSource` divides its input into parts that can be made anywhere, in any order, by any number of
workers: each is a pure function of the input, and carries the samples and the rejected utterances.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_NAME_CHARACTERS = 80  # a dialog without an id is known by its content


@dataclass(frozen=True)
class Rejection:
    """An utterance, dialog or line that gave no sample."""

    where: str  # utterance id, or file and line
    reason: str  # one of few words, by which rejections are counted: `fewer_than_3_words`
    detail: str = ""  # what was found, for the report


@dataclass(frozen=True)
class Occurrences:
    """Utterances (or dialogs) in the order in which a part of the input names them: m of them.

    The rejected ones too: of several with one id the first is read, whatever became of it.
    """

    ids: np.ndarray  # uint64 [m], `utterance_hash`
    names: tuple[str, ...]  # [m], the id as a message shows it
    is_rejected: np.ndarray  # bool [m]; has a `Rejection` of its own
    epochs: np.ndarray  # int32 [m], the first that the part draws of it
    of_sample: np.ndarray  # int32 [n], which one each sample of the block is of

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        is_rejected: Sequence[bool],
        of_sample: Sequence[int] | np.ndarray,
        first_epoch: int = 0,
    ) -> Occurrences:
        return cls(
            ids=np.array([utterance_hash(one) for one in ids], dtype=np.uint64),
            names=tuple(one if len(one) <= _NAME_CHARACTERS else f"{one[:_NAME_CHARACTERS]}…" for one in ids),
            is_rejected=np.array(is_rejected, dtype=np.bool_),
            epochs=np.full(len(ids), first_epoch, dtype=np.int32),
            of_sample=np.array(of_sample, dtype=np.int32),
        )


@dataclass(frozen=True)
class SampleBlock:
    """Consecutive samples, laid end to end: T tokens, n samples.

    `groups` says which samples may share a packed row: an utterance occurs at most once in a group
    (its epoch). `utterances` says what a validation split keeps together. `occurrences` is None where ids
    are made from the content: then an id may come as often as it likes.
    """

    tokens: np.ndarray  # int32 [T]
    lengths: np.ndarray  # int64 [n], each at least 1, summing to T
    utterances: np.ndarray  # uint64 [n], `utterance_hash` of the id
    groups: np.ndarray  # int32 [n], the epoch, counted from 0
    loss_mask: np.ndarray | None = None  # uint8 [T], 1 where the token is a target; None: all are
    rejections: tuple[Rejection, ...] = ()
    notices: dict[str, int] = field(default_factory=dict)  # counted oddities that were accepted
    occurrences: Occurrences | None = None


class SampleSource(Protocol):
    """Where samples come from. Pickled to workers: hold paths and options, open files in `make`."""

    def files(self) -> list[tuple[str, Path]]:
        """Every input file as (name relative to the input, path), for the store's record of its sources."""
        ...

    def parts(self) -> Sequence[Any]:
        """The parts, picklable, in order; they depend on the input and the options alone."""
        ...

    def make(self, part: Any) -> SampleBlock:
        """The samples of one part, in order. Bad input that is no single utterance's is a `DataError`."""
        ...


def utterance_hash(utterance_id: str) -> int:
    """A number for an utterance id that is the same on every machine (blake2b, 64 bits)."""
    return int.from_bytes(
        hashlib.blake2b(utterance_id.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )
