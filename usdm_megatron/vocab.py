"""The one place that knows which token id means what.

USDM extends a text vocabulary by two control tokens, the speech units and a
pad token, in this order (naver-ai/usdm, `docs/from-usdm.md`):

    0 .. text_size-1         text (Mistral: 32,000)
    text_size                <|continue|>
    text_size + 1            <|correspond|>
    text_size + 2 + i        <|unit{i}|>, i in 0 .. unit_count-1
    text_size + 2 + units    <pad>
    behind it                extra tokens of the user's, if any: no id of USDM's ever moves
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PADDING_MULTIPLE = 512  # one padded size whatever the tensor parallel size, up to 512 / 128
CONTINUE_TOKEN = "<|continue|>"
CORRESPOND_TOKEN = "<|correspond|>"
PAD_TOKEN = "<pad>"


def unit_token(unit: int) -> str:
    """The token string of speech unit `unit`."""
    return f"<|unit{unit}|>"


class TargetKind(enum.IntEnum):
    """The kinds of target that losses are reported by."""

    TEXT = 0
    UNIT = 1
    CONTINUE = 2
    CORRESPOND = 3
    EOS = 4
    BOS = 5

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Vocabulary:
    """Sizes and special ids of a (possibly speech-extended) vocabulary.

    `unit_count` 0 means a plain text vocabulary without control tokens and pad.
    """

    text_size: int = 32_000
    unit_count: int = 10_000
    bos_id: int = 1
    eos_id: int = 2
    extra_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, token_id in (("bos_id", self.bos_id), ("eos_id", self.eos_id)):
            if not 0 <= token_id < self.size:
                raise ValueError(f"{name} = {token_id} must be an id, from 0 to {self.size - 1}")
        if not self.extra_tokens:
            return
        if not self.has_speech:
            raise ValueError("extra tokens follow the speech units; there are none")
        if "" in self.extra_tokens or len(set(self.added_tokens())) < len(self.added_tokens()):
            raise ValueError(f"extra tokens {list(self.extra_tokens)}: one is empty or there already")

    @property
    def has_speech(self) -> bool:
        return self.unit_count > 0

    @property
    def continue_id(self) -> int:
        return self._speech_id(0)

    @property
    def correspond_id(self) -> int:
        return self._speech_id(1)

    @property
    def first_unit_id(self) -> int:
        return self._speech_id(2)

    @property
    def pad_id(self) -> int:
        """`<pad>`; a text vocabulary without one pads with eos (padding carries no loss)."""
        return self._speech_id(2) + self.unit_count if self.has_speech else self.eos_id

    @property
    def size(self) -> int:
        """Number of ids, as in the Hugging Face config (Mistral + USDM: 42,003)."""
        return self.text_size + (3 + self.unit_count + len(self.extra_tokens) if self.has_speech else 0)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and output layers inside megatron (42,003 → 42,496)."""
        return -(-self.size // PADDING_MULTIPLE) * PADDING_MULTIPLE

    def added_tokens(self) -> list[str]:
        """Token strings added to the text vocabulary, in id order."""
        if not self.has_speech:
            return []
        units = [unit_token(i) for i in range(self.unit_count)]
        return [CONTINUE_TOKEN, CORRESPOND_TOKEN, *units, PAD_TOKEN, *self.extra_tokens]

    def kind_of_id(self) -> np.ndarray:
        """`TargetKind` of every id, uint8 `[size]`; `<pad>`, `<unk>` and extra tokens count as text."""
        kinds = np.full(self.size, TargetKind.TEXT, dtype=np.uint8)
        kinds[self.bos_id] = TargetKind.BOS
        kinds[self.eos_id] = TargetKind.EOS
        if self.has_speech:
            kinds[self.continue_id] = TargetKind.CONTINUE
            kinds[self.correspond_id] = TargetKind.CORRESPOND
            kinds[self.first_unit_id : self.first_unit_id + self.unit_count] = TargetKind.UNIT
        return kinds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `extra_tokens` only where there are any."""
        record = asdict(self)
        extra = record.pop("extra_tokens")
        return {**record, "extra_tokens": list(extra)} if extra else record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Vocabulary:
        """Inverse of `to_dict`; raises `KeyError`, `TypeError` or `ValueError` on anything else."""
        sizes = {name: int(record[name]) for name in ("text_size", "unit_count", "bos_id", "eos_id")}
        return cls(**sizes, extra_tokens=tuple(str(token) for token in record.get("extra_tokens", ())))

    def _speech_id(self, offset: int) -> int:
        if not self.has_speech:
            raise ValueError("a text vocabulary has no speech tokens")
        return self.text_size + offset


USDM_VOCABULARY = Vocabulary()
