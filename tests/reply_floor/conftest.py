"""A tiny speech model with Mistral's tokenizer, and dialogs for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import write_hf_model
from usdm_megatron.corpora.dialog import DialogSample, DialogTemplate, Exchange, Turn, exchanges
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.reply.inference import Continuation, Replier, StepRule
from usdm_megatron.reply.model_directory import ModelDirectory, open_model_directory
from usdm_megatron.tokenizer.files import extend_tokenizer
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(
    unit_count=20
)  # 32,023 ids; those of text, control tokens and units are the real ones
CONTEXT_TOKENS = 200
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "dialog_golden.json").read_text())


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with random weights. Read only."""
    root = tmp_path_factory.mktemp("reply")
    path = write_hf_model(
        root / "hf",
        vocab_size=VOCABULARY.size,
        num_hidden_layers=2,
        architectures=["MistralForCausalLM"],
    )
    extend_tokenizer(write_mistral_tokenizer(root / "plain"), path, VOCABULARY, CONTEXT_TOKENS)
    return path


@pytest.fixture(scope="session")
def directory(model_path: Path) -> ModelDirectory:
    return open_model_directory(model_path)


@pytest.fixture(scope="session")
def model(directory: ModelDirectory) -> Any:
    from usdm_megatron.reply.greedy import load_model

    return load_model(directory)


@pytest.fixture(scope="session")
def template(directory: ModelDirectory) -> DialogTemplate:
    return DialogTemplate(directory.encoder.encode, VOCABULARY)


def one_exchange(user: str, agent: str, heard: Sequence[int], spoken: Sequence[int]) -> list[Exchange]:
    units = (np.array(numbers, dtype=np.int32) for numbers in (heard, spoken))
    return exchanges([Turn(who, text, next(units)) for who, text in (("a", user), ("b", agent))], 0)


WriteStore = Callable[..., TokenStore]


@pytest.fixture
def write_store(tmp_path: Path, directory: ModelDirectory) -> WriteStore:
    """`write_store(samples, samples_per_row, …)` writes, opens and returns an SFT store."""

    def write(
        samples: Sequence[DialogSample],
        samples_per_row: Sequence[int] | None = None,
        *,
        vocabulary: Vocabulary = VOCABULARY,
        tokenizer_sha256: str | None = directory.tokenizer_sha256,
        with_loss_mask: bool = True,
    ) -> TokenStore:
        prefix = tmp_path / "store"
        with TokenStoreWriter(
            prefix, vocabulary, row_capacity=10_000, with_loss_mask=with_loss_mask, overwrite=True
        ) as writer:
            writer.append(
                np.concatenate([sample.tokens for sample in samples]),
                np.array([len(sample.tokens) for sample in samples]),
                np.array([1] * len(samples) if samples_per_row is None else samples_per_row),
                loss_mask=np.concatenate([sample.loss_mask for sample in samples])
                if with_loss_mask
                else None,
            )
            writer.finish(tokenizer_sha256=tokenizer_sha256)
        return TokenStore.open(prefix)

    return write


class ScriptedDecoder:
    """Continues a prompt as the one script that begins with it does, up to the stop token."""

    def __init__(self, scripts: Sequence[np.ndarray]) -> None:
        self.scripts = [script.tolist() for script in scripts]
        self.calls: list[tuple[list[list[int]], StepRule]] = []

    def __call__(self, prompts: Sequence[np.ndarray], rule: StepRule) -> list[Continuation]:
        self.calls.append(([prompt.tolist() for prompt in prompts], rule))
        return [self._continue(prompt.tolist(), rule) for prompt in prompts]

    def _continue(self, prompt: list[int], rule: StepRule) -> Continuation:
        (rest,) = {tuple(script[len(prompt) :]) for script in self.scripts if script[: len(prompt)] == prompt}
        ids = rest[: rest.index(rule.stop_id)]
        assert not set(ids) & (set(rule.banned) - {rule.stop_id})
        return Continuation(np.array(ids, dtype=np.int32), stopped=True)


@pytest.fixture
def scripted(directory: ModelDirectory) -> Callable[[Sequence[DialogSample]], Replier]:
    """`scripted(samples)`: a replier that says what these samples say."""
    return lambda samples: Replier(directory, ScriptedDecoder([sample.tokens for sample in samples]))
