"""What an SFT store says should be understood and answered: its samples, taken apart by their loss mask.

Per exchange the template (`corpora/dialog.py`) has two runs of targets: the user's text with its line end,
and the agent's text, `<|correspond|>`, the agent's units and what stands before the last line end. All
before the first run is the prompt; of a dialog of several turns, so are the turns before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.reply.inference import Replier
from usdm_megatron.reply.model_directory import ModelDirectory

_PREPROCESS = "python tools/preprocess_data.py dialog"


@dataclass(frozen=True, slots=True)
class ReferenceExchange:
    """A first-step prompt (ids int32 `[T]`) and what belongs behind it; rows and samples count from 0."""

    row: int
    sample: int  # of the row
    heard: np.ndarray
    transcript: str
    text: str
    units: np.ndarray


def check_store(store: TokenStore, directory: ModelDirectory) -> None:
    """Raise `DataError` (all problems at once) for a store without targets, or of another vocabulary."""
    problems = []
    summary, prefix = store.summary, store.prefix
    if summary.loss_mask is None:
        problems.append(
            f"{prefix}: has no loss mask, so what is to be understood and answered cannot be told; --eval "
            f"takes a store that {_PREPROCESS} (or sft) wrote"
        )
    if summary.vocabulary != directory.vocabulary:
        problems.append(
            f"{prefix}: made for {summary.vocabulary.to_dict()}, {directory.path} has "
            f"{directory.vocabulary.to_dict()}; the same ids would mean "
            "other tokens: preprocess for this model"
        )
    if summary.tokenizer_sha256 not in (None, directory.tokenizer_sha256):
        problems.append(
            f"{prefix}: was made with another tokenizer (sha256 {str(summary.tokenizer_sha256)[:12]}…) than "
            f"{directory.path} has ({directory.tokenizer_sha256[:12]}…); preprocess with this one"
        )
    if problems:
        raise DataError(*problems)


def reference_exchanges(
    store: TokenStore, replier: Replier, limit: int | None = None
) -> Iterator[ReferenceExchange]:
    """The exchanges of the first `limit` dialogs (samples; None: all), in order; checked by `check_store`.

    Raises `DataError` that names the row for a sample that is no dialog of the template.
    """
    left = store.summary.samples if limit is None else limit
    for row_id in range(store.rows):
        row = store.row(row_id)
        assert row.loss_mask is not None
        ends = np.cumsum(row.sample_lengths)[:left]
        for sample, (end, length) in enumerate(zip(ends, row.sample_lengths, strict=False)):
            span = slice(end - length, end)
            try:
                yield from _exchanges(row.tokens[span], row.loss_mask[span], row_id, sample, replier)
            except _NoDialog as error:
                raise DataError(
                    f"{store.prefix} row {row_id}, sample {sample}: {error}; --eval takes dialogs in the "
                    f"template that {_PREPROCESS} writes"
                ) from None
        left -= len(ends)
        if left <= 0:
            return


class _NoDialog(Exception):
    """How a sample differs from the template."""


def _exchanges(
    tokens: np.ndarray, loss_mask: np.ndarray, row: int, sample: int, replier: Replier
) -> Iterator[ReferenceExchange]:
    vocabulary = replier.directory.vocabulary
    edges = np.flatnonzero(np.diff(loss_mask != 0, prepend=False, append=False))
    runs = [slice(begin, end) for begin, end in edges.reshape(-1, 2).tolist()]
    if not runs or len(runs) % 2:
        raise _NoDialog(f"{len(runs)} runs of targets, where an exchange has two")
    ids = tokens.astype(np.int32)
    for user, agent in zip(runs[::2], runs[1::2], strict=True):
        if ids[user.start - 1] != vocabulary.correspond_id:  # a first token is never a target
            raise _NoDialog(f"token {user.start}, the first of the transcript, follows no <|correspond|>")
        if ids[user.stop - 1] != replier.line_end_id:
            raise _NoDialog(f"the transcript, up to token {user.stop - 1}, ends with no line end")
        corresponds = np.flatnonzero(ids[agent] == vocabulary.correspond_id)
        if len(corresponds) != 1:
            raise _NoDialog(
                f"the reply, from token {agent.start}, has {len(corresponds)} <|correspond|>, not 1"
            )
        written, spoken = np.split(ids[agent], corresponds)
        transcript, text = replier.transcript_of(ids[user.start : user.stop - 1]), replier.text_of(written)
        units = replier.units_of(spoken)
        if not (transcript.strip() and text.strip() and len(units)):
            raise _NoDialog(f"an empty text, or no units, from token {user.start}: nothing to compare with")
        yield ReferenceExchange(row, sample, ids[: user.start], transcript, text, units)
