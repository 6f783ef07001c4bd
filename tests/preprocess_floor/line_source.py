"""A `SampleSource` of one text file, small enough to be checked by eye: `id epoch length`, or `id bad`.

A line is an utterance of its own, whose epoch is the first drawn of it; `length+length` are two samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.samples import Occurrences, Rejection, SampleBlock, utterance_hash
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
        samples = [
            (number, name, int(epoch), int(length))
            for number, (name, epoch, *lengths) in enumerate(map(str.split, lines))
            if epoch != "bad"
            for length in lengths[0].split("+")
        ]
        tokens = [sample_tokens(name, epoch, length) for _, name, epoch, length in samples]
        flat = np.array(sum(tokens, []), dtype=np.int32)
        return SampleBlock(
            tokens=flat,
            lengths=np.array(list(map(len, tokens)), dtype=np.int64),
            utterances=np.array([utterance_hash(name) for _, name, _, _ in samples], dtype=np.uint64),
            groups=np.array([epoch for _, _, epoch, _ in samples], dtype=np.int32),
            loss_mask=(flat % 2).astype(np.uint8) if self.with_mask else None,
            rejections=tuple(
                Rejection(line.split()[0], "bad", "says so") for line in lines if line.endswith("bad")
            ),
            notices={"odd_lengths": odd} if (odd := sum(len(one) % 2 for one in tokens)) else {},
            occurrences=_occurrences(lines, [number for number, *_ in samples]),
        )


def _occurrences(lines: list[str], of_sample: list[int]) -> Occurrences:
    is_bad = [line.endswith("bad") for line in lines]
    found = Occurrences.of([line.split()[0] for line in lines], is_bad, of_sample)
    epochs = [0 if bad else int(line.split()[1]) for line, bad in zip(lines, is_bad, strict=True)]
    return replace(found, epochs=np.array(epochs, dtype=np.int32))


def sample_tokens(name: str, epoch: int, length: int) -> list[int]:
    """bos, ids that belong to the name and epoch alone, eos."""
    digest = hashlib.blake2b(f"{name} {epoch}".encode(), digest_size=64).digest()
    body = [3 + byte % (VOCABULARY.size - 4) for byte in (digest * length)[: length - 2]]
    return [VOCABULARY.bos_id, *body, VOCABULARY.eos_id]
