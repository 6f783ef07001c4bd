"""Does text follow the speech before it? The same held-out text behind its own and behind another's units.

A model that ignores the units has the same loss on both; one that reads them is helped by the
right ones and misled by the wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.demo.settings import DEMO
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import TargetKind, Vocabulary


@dataclass(frozen=True)
class Pair:
    """What is said in a sample, twice: as ids of units `[N]` and of text `[T]`."""

    units: np.ndarray
    text: np.ndarray


@dataclass(frozen=True)
class SwapRows:
    """Samples `[bos] units <|correspond|> text [eos]`; `own[i]` and `other[i]` differ in the units only."""

    own: list[np.ndarray]
    other: list[np.ndarray]


@dataclass(frozen=True)
class SwapFigure:
    """Mean loss (nats) of the text tokens behind the right units and behind another utterance's."""

    own_loss: float
    other_loss: float

    @property
    def reduction(self) -> float:
        """The share by which the right units lower the loss."""
        return 1 - self.own_loss / self.other_loss


def read_pairs(store: TokenStore, most: int) -> list[Pair]:
    """The first `most` samples that say something in both modalities; no text comes twice (epochs do).

    `DataError` if there are fewer than two: nothing could be swapped.
    """
    kind_of_id = store.summary.vocabulary.kind_of_id()
    pairs: dict[bytes, Pair] = {}
    for sample in _samples(store):
        kinds = kind_of_id[sample]
        # One segment, as all utterances under 10 s have: both modalities then say all of it.
        if TargetKind.CORRESPOND in kinds and TargetKind.CONTINUE not in kinds:
            pair = Pair(units=sample[kinds == TargetKind.UNIT], text=sample[kinds == TargetKind.TEXT])
            pairs.setdefault(pair.text.tobytes(), pair)
        if len(pairs) == most:
            break
    if len(pairs) < 2:
        raise DataError(
            f"{store.prefix}: holds {len(pairs)} samples of units and their text, the swap figure needs two; "
            "hold out more utterances"
        )
    return list(pairs.values())


def swap_rows(pairs: list[Pair], vocabulary: Vocabulary) -> SwapRows:
    """Both row sets; every text gets the units of the next pair, so none keeps its own."""
    others = [*pairs[1:], pairs[0]]
    return SwapRows(
        own=[_row(pair.units, pair.text, vocabulary) for pair in pairs],
        other=[_row(other.units, pair.text, vocabulary) for pair, other in zip(pairs, others, strict=True)],
    )


def swap_figure(model_directory: Path, heldout_prefix: Path, most: int = DEMO.swap_utterances) -> SwapFigure:
    """The figure of an extended Hugging Face model on a held-out store, computed by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    store = TokenStore.open(heldout_prefix)
    vocabulary = store.summary.vocabulary
    rows = swap_rows(read_pairs(store, most), vocabulary)
    # a directory on this machine; older transformers load fp32, newer ones the type that was saved
    model = AutoModelForCausalLM.from_pretrained(model_directory)  # nosec B615 - nothing is downloaded
    model = model.float().eval()
    kinds = torch.from_numpy(vocabulary.kind_of_id())

    def text_loss(samples: list[np.ndarray]) -> float:
        loss_sum, targets = 0.0, 0
        for sample in samples:
            ids = torch.from_numpy(sample)[None]
            is_text = kinds[ids[0, 1:]] == int(TargetKind.TEXT)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1][is_text]
            loss_sum += torch.nn.functional.cross_entropy(logits, ids[0, 1:][is_text], reduction="sum").item()
            targets += int(is_text.sum())
        return loss_sum / targets

    return SwapFigure(own_loss=text_loss(rows.own), other_loss=text_loss(rows.other))


def _samples(store: TokenStore) -> Iterator[np.ndarray]:
    for row_id in range(store.rows):
        row = store.row(row_id)
        tokens = row.tokens.astype(np.int64)  # torch's type of ids
        yield from np.split(tokens, np.cumsum(row.sample_lengths)[:-1])


def _row(units: np.ndarray, text: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    return np.concatenate([[vocabulary.bos_id], units, [vocabulary.correspond_id], text, [vocabulary.eos_id]])
