"""One tiny model and its checkpoint for the whole folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny


class TinyModel(NamedTuple):
    """An HF directory and the checkpoint made of it (`root` with a tracker, `release` inside)."""

    hf: Path
    root: Path

    @property
    def release(self) -> Path:
        return self.root / "release"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("tiny")
    hf = tiny.write_hf_model(directory / "hf")
    return TinyModel(hf, tiny.write_checkpoint(hf, directory / "checkpoint"))
