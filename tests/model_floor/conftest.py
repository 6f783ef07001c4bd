"""Tiny models and their checkpoints for the LoRA tests."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny
from tests.model_floor.lora_jobs import STRADDLING


class LoraModels(NamedTuple):
    """One model under two vocabularies, and one with tied embeddings."""

    hf: Path
    release: Path
    straddling: Path
    tied_hf: Path
    tied: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> LoraModels:
    directory = tmp_path_factory.mktemp("lora")
    hf = tiny.write_hf_model(directory / "hf")
    tied = tiny.write_hf_model(directory / "tied_hf", tie_word_embeddings=True)
    return LoraModels(
        hf,
        tiny.write_checkpoint(hf, directory / "checkpoint") / "release",
        tiny.write_checkpoint(hf, directory / "straddling", STRADDLING) / "release",
        tied,
        tiny.write_checkpoint(tied, directory / "tied", STRADDLING) / "release",
    )
