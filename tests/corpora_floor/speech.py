"""Aligned utterances and the files that corpora keep them in, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
LEXICON = ["the", "a", "river", "stone", "in", "winter", "summer's", "I'll", "remarkably", "yellow", "and"]


def make_records(
    count: int, seed: int = 0, words: tuple[int, int] = (5, 60), units: int = 10_000
) -> list[Record]:
    """Manifest records with silences left out; 10 to 30 words are one segment, 60 words two or three."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        now = int(rng.integers(0, 30))
        spoken = []
        for _ in range(int(rng.integers(words[0], words[1] + 1))):
            end = now + int(rng.integers(5, 60))
            spoken.append({"text": str(rng.choice(LEXICON)), "start": now / 100, "end": end / 100})
            now = end + int(rng.integers(0, 40)) * int(rng.random() < 0.3)
        records.append(
            {
                "id": f"speaker{number % 3}/utt_{number}",
                "units": rng.integers(0, units, now // 2 + 1).tolist(),
                "words": spoken,
                "duration": (now + 2) / 100,
            }
        )
    return records


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """A record a line; bytes are written as they are."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_tree(root: Path, records: Sequence[Record], style: str = "long_textgrid") -> tuple[Path, Path]:
    """The original's tree as praatio writes it, with a second tier; returns the two roots."""
    from praatio import textgrid

    roots = root / "dev-clean", root / "dev-clean-textgrid"
    for record in records:
        units, grid_path = (base / record["id"] for base in roots)
        units.parent.mkdir(parents=True, exist_ok=True)
        grid_path.parent.mkdir(parents=True, exist_ok=True)
        units.with_name(f"{units.name}_unit.txt").write_text(" ".join(map(str, record["units"])))
        units.with_name(f"{units.name}.txt").write_text(" ".join(word["text"] for word in record["words"]))
        entries = [(word["start"], word["end"], word["text"]) for word in record["words"]]
        grid = textgrid.Textgrid(0, record["duration"])
        phones = [(0, record["duration"] / 2, "AH1"), (record["duration"] / 2, record["duration"], "T")]
        for name, tier in (("words", entries), ("phones", phones)):
            grid.addTier(textgrid.IntervalTier(name, tier, 0, record["duration"]))
        grid.save(f"{grid_path}.TextGrid", style, includeBlankSpaces=True)
    return roots
