"""The demo's own corpus and model, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from usdm_megatron.demo.corpus import write_demo_corpus
from usdm_megatron.demo.model import write_demo_model


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_corpus(tmp_path_factory.mktemp("demo") / "corpus")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("demo") / "model")
