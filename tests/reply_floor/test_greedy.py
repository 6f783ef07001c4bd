"""Greedy decoding against transformers' own `generate` with its bad words, one prompt at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.reply_floor.conftest import VOCABULARY
from usdm_megatron.reply.greedy import GreedyDecoder
from usdm_megatron.reply.inference import StepRule

# as the original builds them, for a vocabulary of fewer units: (first banned, behind the last, stop)
ORIGINAL_STEPS = {
    "transcript": (32_000, VOCABULARY.size, 13),
    "text": (32_002, VOCABULARY.size, 32_001),
    "units": (0, 32_002, 28_705),
}
STEPS = pytest.mark.parametrize("step", ORIGINAL_STEPS)


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Shorter and longer than the model's window of 8, in no order."""
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCABULARY.size - 1, length).astype(np.int32) for length in (5, 31, 9, 17, 1)]


def generate(model: Any, prompt: np.ndarray, rule: StepRule, new_tokens: int) -> list[int]:
    """Of transformers, with the stop token where it came."""
    tokens = torch.from_numpy(prompt.astype(np.int64))[None]
    written = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        bad_words_ids=[[token] for token in rule.banned if token != rule.stop_id],
        eos_token_id=rule.stop_id,
        pad_token_id=VOCABULARY.pad_id,
        max_new_tokens=new_tokens,
    )
    return written[0, len(prompt) :].tolist()


def rule_of(step: str) -> StepRule:
    first, behind, stop = ORIGINAL_STEPS[step]
    return StepRule(range(first, behind), stop)


@STEPS
def test_a_batch_equals_generate_prompt_by_prompt(model: Any, prompts: list[np.ndarray], step: str) -> None:
    rule = rule_of(step)
    found = GreedyDecoder(lambda: model, 512, max_new_tokens=24)(prompts, rule)
    for prompt, continuation in zip(prompts, found, strict=True):
        written = continuation.ids.tolist() + [rule.stop_id] * continuation.stopped
        assert written == generate(model, prompt, rule, 24)
        assert not set(written) & (set(rule.banned) - {rule.stop_id})


@STEPS
def test_rows_stop_at_different_steps(model: Any, prompts: list[np.ndarray], step: str) -> None:
    """The stop is a token that the model does write: row 0's fourth, and maybe others'."""
    decode = GreedyDecoder(lambda: model, 512, max_new_tokens=12)
    banned = rule_of(step).banned
    stop = int(decode(prompts[:1], StepRule(banned, VOCABULARY.eos_id))[0].ids[3])
    found = decode(prompts, StepRule(banned, stop))
    assert found[0].stopped and len(found[0].ids) <= 3
    assert len({len(one.ids) for one in found}) > 1
    for prompt, continuation in zip(prompts, found, strict=True):
        expected = generate(model, prompt, StepRule(banned, stop), 12)
        assert [*continuation.ids.tolist(), *[stop] * continuation.stopped] == expected
        assert continuation.stopped == (expected[-1] == stop)


def test_the_stop_is_never_banned(prompts: list[np.ndarray]) -> None:
    """Logits that like banned tokens best, and the stop best of what is left."""
    liked = torch.arange(VOCABULARY.size, 0, -1, dtype=torch.float32)

    class Model:
        device = torch.device("cpu")
        config = type("Config", (), {"vocab_size": VOCABULARY.size})

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            cache = type("Cache", (), {"batch_select_indices": lambda self, kept: None})()
            logits = liked.expand(len(input_ids), 1, -1)
            return type("Output", (), {"logits": logits, "past_key_values": cache})()

    for continuation in GreedyDecoder(Model, 512)(prompts, rule_of("units")):
        assert continuation.stopped and len(continuation.ids) == 0


def test_every_row_ends_where_the_context_does(model: Any, prompts: list[np.ndarray]) -> None:
    found = GreedyDecoder(lambda: model, context_tokens=20)(prompts, rule_of("text"))
    assert [len(prompt) + len(one.ids) for prompt, one in zip(prompts, found, strict=True)] == [
        20, 31, 20, 20, 20,
    ]  # fmt: skip
    assert not any(one.stopped for one in found)
    alone = [GreedyDecoder(lambda: model, context_tokens=20)([one], rule_of("text"))[0] for one in prompts]
    assert [one.ids.tolist() for one in alone] == [one.ids.tolist() for one in found]


def test_nothing_is_loaded_before_it_is_needed() -> None:
    def load() -> Any:
        raise AssertionError("loaded")

    assert GreedyDecoder(load, 512)([], rule_of("units")) == []
