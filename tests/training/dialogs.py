"""Dialogs as the original's fine-tuning lines have them: ids, and labels that are -100 where no loss is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests import tiny
from usdm_megatron.vocab import Vocabulary

IGNORED = -100


@dataclass(frozen=True)
class Dialog:
    """`labels` are not shifted: the id at its own position, or -100."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def mask(self) -> list[int]:
        return [int(label != IGNORED) for label in self.labels]

    @property
    def targets(self) -> int:
        return sum(self.mask)


def random_dialogs(count: int, seed: int = 0, longest: int = 60) -> list[Dialog]:
    """A bos, an untrained head, runs with and without loss, an untrained tail of two tokens.

    Most tokens follow one cycle of three, so that a model soon predicts some of each kind.
    """
    rng = np.random.default_rng(seed)
    cycle = (7, tiny.VOCABULARY.correspond_id, tiny.VOCABULARY.first_unit_id + 5)
    dialogs = []
    for _ in range(count):
        ids = rng.integers(3, tiny.VOCABULARY.size - 1, size=int(rng.integers(8, longest + 1)))
        ids = np.where(rng.random(len(ids)) < 0.7, np.resize(cycle, len(ids)), ids)
        ids[0], ids[-1] = tiny.VOCABULARY.bos_id, tiny.VOCABULARY.eos_id
        trained = np.repeat(rng.random(len(ids)) < 0.5, 3)[: len(ids)]
        trained[:3], trained[3], trained[-2:] = False, True, False
        labels = np.where(trained, ids, IGNORED)
        dialogs.append(Dialog(tuple(ids.tolist()), tuple(labels.tolist())))
    return dialogs


def write_lines(path: Path, dialogs: Sequence[Dialog]) -> Path:
    """The original's `train.txt`."""
    lines = (" ".join(map(str, dialog.ids)) + "|" + " ".join(map(str, dialog.labels)) for dialog in dialogs)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_rows(
    prefix: Path, rows: Sequence[Sequence[Dialog]], vocabulary: Vocabulary = tiny.VOCABULARY
) -> Path:
    """A store of these rows, with its loss mask; returns the prefix."""
    from usdm_megatron.data.token_store_writer import TokenStoreWriter

    dialogs = [dialog for row in rows for dialog in row]
    capacity = max(sum(len(dialog.ids) for dialog in row) for row in rows)
    with TokenStoreWriter(prefix, vocabulary, row_capacity=capacity, with_loss_mask=True) as writer:
        writer.append(
            np.concatenate([dialog.ids for dialog in dialogs]),
            np.array([len(dialog.ids) for dialog in dialogs]),
            np.array([len(row) for row in rows]),
            loss_mask=np.concatenate([dialog.mask for dialog in dialogs]).astype(np.uint8),
        )
        writer.finish()
    return prefix
