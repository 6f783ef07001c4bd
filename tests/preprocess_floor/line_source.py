"""A `SampleSource` of one text file, small enough to be checked by eye: `id epoch length`, or `id bad`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.samples import Rejection, SampleBlock, utterance_hash
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=20, unit_count=7)


@dataclass(frozen=True)
class LineSource:
    path: Path
    lines_per_part: int = 3
    with_mask: bool = False

    def files(self) -> list[tuple[str, Path]]:
        return [(self.path.name, self.path)]

    def parts(self) -> list[int]:
        return list(range(0, len(self.path.read_text().splitlines()), self.lines_per_part))

    def make(self, part: int) -> SampleBlock:
        lines = self.path.read_text().splitlines()[part : part + self.lines_per_part]
        if "broken" in lines:
            raise DataError(f"{self.path} line {part + lines.index('broken') + 1}: broken")
        good = [line.split() for line in lines if not line.endswith("bad")]
        tokens = [sample_tokens(name, int(epoch), int(length)) for name, epoch, length in good]
        flat = np.array(sum(tokens, []), dtype=np.int32)
        return SampleBlock(
            tokens=flat,
            lengths=np.array(list(map(len, tokens)), dtype=np.int64),
            utterances=np.array([utterance_hash(name) for name, _, _ in good], dtype=np.uint64),
            groups=np.array([int(epoch) for _, epoch, _ in good], dtype=np.int32),
            loss_mask=(flat % 2).astype(np.uint8) if self.with_mask else None,
            rejections=tuple(
                Rejection(line.split()[0], "bad", "says so") for line in lines if line.endswith("bad")
            ),
            notices={"odd_lengths": odd} if (odd := sum(len(one) % 2 for one in tokens)) else {},
        )


def sample_tokens(name: str, epoch: int, length: int) -> list[int]:
    """bos, ids that belong to the name and epoch alone, eos."""
    digest = hashlib.blake2b(f"{name} {epoch}".encode(), digest_size=64).digest()
    body = [3 + byte % (VOCABULARY.size - 4) for byte in (digest * length)[: length - 2]]
    return [VOCABULARY.bos_id, *body, VOCABULARY.eos_id]
