"""Samples that come as ids: compared with the vocabulary, over-long ones rejected, recognised by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.samples import Rejection, SampleBlock
from usdm_megatron.vocab import Vocabulary

OVER_LONG = "over_long"
SAMPLES_WITHOUT_BOS = "samples_without_leading_bos"


def checked_ids(
    ids: np.ndarray, lengths: np.ndarray, place: Callable[[int], str], vocabulary: Vocabulary
) -> np.ndarray:
    """`ids` `[T]` as int32.

    Raises a `DataError` for one outside the vocabulary; `place(row)` names the row, of `lengths` `[n]` ids.
    """
    if len(ids) and (int(ids.max()) >= vocabulary.size or int(ids.min()) < 0):
        at = int(np.argmax((ids < 0) | (ids >= vocabulary.size)))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise DataError(
            f"{place(row)}: holds id {int(ids[at])}, outside the vocabulary of {vocabulary.size} ids "
            f"(0 to {vocabulary.size - 1}); it was made with another tokenizer: check --vocab and "
            "--text-vocab-size"
        )
    return ids.astype(np.int32)


def fitting_samples(block: SampleBlock, seq_length: int, place: Callable[[int], str]) -> SampleBlock:
    """`block` without the samples longer than `seq_length`, which become rejections at `place(sample)`."""
    fits = block.lengths <= seq_length
    if fits.all():
        return block
    too_long = tuple(
        Rejection(place(int(at)), OVER_LONG, f"{block.lengths[at]} tokens, --seq-length {seq_length}")
        for at in np.flatnonzero(~fits)
    )
    of_token = np.repeat(fits, block.lengths)
    heard = block.occurrences
    return replace(
        block,
        tokens=block.tokens[of_token],
        lengths=block.lengths[fits],
        utterances=block.utterances[fits],
        groups=block.groups[fits],
        loss_mask=None if block.loss_mask is None else block.loss_mask[of_token],
        rejections=block.rejections + too_long,
        occurrences=heard and replace(heard, of_sample=heard.of_sample[fits]),
    )


def content_hashes(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64 `[n]`, a number for each sample's ids: equal samples are one utterance to a validation split."""
    data = memoryview(tokens.astype("<i4", copy=False).tobytes())
    ends = np.cumsum(lengths) * 4
    digests = b"".join(
        hashlib.blake2b(data[end - 4 * length : end], digest_size=8).digest()
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    )
    return np.frombuffer(digests, dtype="<u8")


def count_without_bos(tokens: np.ndarray, lengths: np.ndarray, bos_id: int) -> dict[str, int]:
    """A notice of how many samples do not begin with bos; empty when all do."""
    without = int(np.count_nonzero(tokens[np.cumsum(lengths) - lengths] != bos_id))
    return {SAMPLES_WITHOUT_BOS: without} if without else {}
