"""The demo's own model, corpus and stores, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from usdm_megatron.cli.preprocess import main as preprocess
from usdm_megatron.demo.corpus import DIALOGS, UTTERANCES, write_demo_corpus
from usdm_megatron.demo.model import write_demo_model
from usdm_megatron.demo.settings import DEMO


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_corpus(tmp_path_factory.mktemp("demo") / "corpus")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_model(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="session")
def stores_directory(
    corpus_directory: Path, model_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`data_train`, `data_test`, `dialogs_train`, `dialogs_test`, as the example script makes them."""
    directory = tmp_path_factory.mktemp("stores")
    common = ["--tokenizer", str(model_directory), "--seq-length", str(DEMO.seq_length)]
    common += ["--split", f"{1 - DEMO.heldout_share},{DEMO.heldout_share}", "--workers", "1"]
    manifest = ["--manifest", str(corpus_directory / UTTERANCES), "--epochs", str(DEMO.epochs)]
    preprocess(["speech-text", *manifest, *common, "--output-prefix", str(directory / "data")])
    dialogs = ["--input", str(corpus_directory / DIALOGS)]
    preprocess(["dialog", *dialogs, *common, "--output-prefix", str(directory / "dialogs")])
    return directory
