"""Word error rate of the transcript and unit error rate of the reply, over an SFT store."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.reply.error_rate import ErrorCount, total, unit_errors, word_errors
from usdm_megatron.reply.inference import Replier, Reply
from usdm_megatron.reply.model_directory import ModelDirectory
from usdm_megatron.reply.references import ReferenceExchange, check_store, reference_exchanges


@dataclass(frozen=True)
class ScoredReply:
    """What was said, what should have been said, and what lies between them."""

    reference: ReferenceExchange
    reply: Reply

    @property
    def transcript(self) -> ErrorCount:
        """In words."""
        return word_errors(self.reference.transcript, self.reply.transcript)

    @property
    def text(self) -> ErrorCount:
        """Of the reply, in words."""
        return word_errors(self.reference.text, self.reply.text)

    @property
    def units(self) -> ErrorCount:
        """Of the reply."""
        return unit_errors(self.reference.units, self.reply.units)

    def to_record(self) -> dict[str, Any]:
        wanted, said = self.reference, self.reply
        return {
            "row": wanted.row,
            "sample": wanted.sample,
            "transcript": said.transcript,
            "reference_transcript": wanted.transcript,
            "text": said.text,
            "reference_text": wanted.text,
            "units": said.units.tolist(),
            "reference_units": wanted.units.tolist(),
            "unfinished": list(said.unfinished),
        }


@dataclass(frozen=True)
class Evaluation:
    """The error counts of a store's exchanges, and each of them in the store's order."""

    transcript: ErrorCount
    text: ErrorCount
    units: ErrorCount
    replies: tuple[ScoredReply, ...]

    @property
    def unfinished(self) -> int:
        """Replies of which a step ran out of tokens before its stop."""
        return sum(bool(scored.reply.unfinished) for scored in self.replies)

    def to_json(self) -> str:
        """Rates, their counts, and every reply with its reference."""
        record: dict[str, Any] = {
            "exchanges": len(self.replies),
            "transcript_word_error_rate": self.transcript.rate,
            "text_word_error_rate": self.text.rate,
            "unit_error_rate": self.units.rate,
        }
        for name in ("transcript", "text", "units"):
            count: ErrorCount = getattr(self, name)
            record[name] = {"edits": count.edits, "reference": count.reference}
        record["unfinished"] = self.unfinished
        record["replies"] = [scored.to_record() for scored in self.replies]
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def evaluate(
    replier: Replier,
    store: TokenStore,
    *,
    batch_size: int,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Reply to the first `limit` dialogs of `store` (None: all), `batch_size` exchanges at a time.

    The reply is to the model's own transcript, and is spoken from its own text, as in use; only the
    turns before an exchange are the store's. `on_progress` gets the exchanges done, and all.
    Raises `DataError` for a store that does not belong to the model or holds no dialogs.
    """
    check_store(store, replier.directory)
    references = list(reference_exchanges(store, replier, limit))
    _check_room(references, store, replier.directory)
    # of similar lengths, so that little is padded; the longest first: if memory is short, it shows at once
    order = sorted(range(len(references)), key=lambda number: -len(references[number].heard))
    scored: dict[int, ScoredReply] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        replies = replier.reply([references[number].heard for number in batch])
        scored |= {
            number: ScoredReply(references[number], reply)
            for number, reply in zip(batch, replies, strict=True)
        }
        if on_progress:
            on_progress(len(scored), len(references))
    replies_in_order = tuple(scored[number] for number in range(len(references)))
    return Evaluation(
        transcript=total(each.transcript for each in replies_in_order),
        text=total(each.text for each in replies_in_order),
        units=total(each.units for each in replies_in_order),
        replies=replies_in_order,
    )


def _check_room(
    references: Sequence[ReferenceExchange], store: TokenStore, directory: ModelDirectory
) -> None:
    longest = max(references, key=lambda one: len(one.heard))
    if len(longest.heard) >= directory.context_tokens:
        raise DataError(
            f"{store.prefix} row {longest.row}, sample {longest.sample}: {len(longest.heard):,} tokens up to "
            f"the user's units, and {directory.path} reads {directory.context_tokens:,} at once; preprocess "
            "with a smaller --seq-length"
        )
