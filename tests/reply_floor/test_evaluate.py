"""Error rates over a store, with a script instead of a model; and stores that cannot be evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.reply_floor.conftest import VOCABULARY, ScriptedDecoder, WriteStore, one_exchange
from usdm_megatron.corpora.dialog import DialogSample, DialogTemplate
from usdm_megatron.errors import DataError
from usdm_megatron.reply.error_rate import ErrorCount
from usdm_megatron.reply.evaluate import evaluate
from usdm_megatron.reply.inference import Replier
from usdm_megatron.reply.model_directory import ModelDirectory
from usdm_megatron.reply.references import reference_exchanges
from usdm_megatron.vocab import Vocabulary

Scripted = Callable[[list[DialogSample]], Replier]
DIALOGS = [
    ("where is the river", "behind the forest", [1, 2, 3], [4, 5, 6, 7]),
    ("good morning", "hello there", [8, 9], [10, 11, 12, 13]),
    ("what's this?", "a yellow bridge", [14] * 9, [15, 16]),
]


@pytest.fixture
def samples(template: DialogTemplate) -> list[DialogSample]:
    return [template.sample(one_exchange(*dialog)) for dialog in DIALOGS]


@pytest.mark.parametrize("samples_per_row", [[1, 1, 1], [2, 1], [3]])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_perfect_model(
    samples: list[DialogSample],
    scripted: Scripted,
    write_store: WriteStore,
    samples_per_row: list[int],
    batch_size: int,
) -> None:
    progress: list[tuple[int, int]] = []
    evaluation = evaluate(
        scripted(samples),
        write_store(samples, samples_per_row),
        batch_size=batch_size,
        on_progress=lambda done, of: progress.append((done, of)),
    )
    assert evaluation.transcript == ErrorCount(0, 8)
    assert evaluation.text == ErrorCount(0, 8)
    assert evaluation.units == ErrorCount(0, 10)
    assert evaluation.unfinished == 0
    said = [(one.reply.transcript, one.reply.text, one.reply.units.tolist()) for one in evaluation.replies]
    assert said == [(user, agent, spoken) for user, agent, _, spoken in DIALOGS]
    assert progress[-1] == (3, 3)


def test_known_mistakes(
    template: DialogTemplate, samples: list[DialogSample], scripted: Scripted, write_store: WriteStore
) -> None:
    """One word substituted, one left out and one unit too many, in different dialogs."""
    mistaken = [
        ("where is a river", "behind the forest", [1, 2, 3], [4, 5, 6, 7]),
        ("good morning", "hello", [8, 9], [10, 11, 12, 13]),
        ("what's this?", "a yellow bridge", [14] * 9, [15, 15, 16]),
    ]
    scripts = [template.sample(one_exchange(*dialog)) for dialog in mistaken]
    evaluation = evaluate(scripted(scripts), write_store(samples), batch_size=2)
    assert evaluation.transcript == ErrorCount(1, 8)
    assert evaluation.text == ErrorCount(1, 8)
    assert evaluation.units == ErrorCount(1, 10)
    record = json.loads(evaluation.to_json())
    assert record["transcript_word_error_rate"] == record["text_word_error_rate"] == 1 / 8
    assert (record["unit_error_rate"], record["exchanges"], record["unfinished"]) == (0.1, 3, 0)
    assert record["units"] == {"edits": 1, "reference": 10}
    assert record["replies"][2]["units"] == [15, 15, 16]
    assert record["replies"][2]["reference_units"] == [15, 16]


def test_the_reply_is_to_what_was_heard(
    template: DialogTemplate, samples: list[DialogSample], scripted: Scripted, write_store: WriteStore
) -> None:
    """A wrong transcript, not the store's, is in the prompt of the steps behind it."""
    script = template.sample(one_exchange("where is the silver", *DIALOGS[0][1:]))
    decoder = ScriptedDecoder([script.tokens])
    replier = Replier(scripted(samples).directory, decoder)
    evaluate(replier, write_store(samples), batch_size=1, limit=1)
    heard = replier.prompts.for_transcript(np.array(DIALOGS[0][2], dtype=np.int32))
    assert decoder.calls[1][0] == [replier.prompts.for_text(heard, "where is the silver").tolist()]


@pytest.mark.parametrize("samples_per_row", [[1, 1, 1], [2, 1], [1, 2], [3]])
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_limit_counts_dialogs(
    samples: list[DialogSample],
    scripted: Scripted,
    write_store: WriteStore,
    samples_per_row: list[int],
    limit: int,
) -> None:
    store = write_store(samples, samples_per_row)
    evaluation = evaluate(scripted(samples), store, batch_size=8, limit=limit)
    places = [(row, sample) for row, count in enumerate(samples_per_row) for sample in range(count)]
    assert [(one.reference.row, one.reference.sample) for one in evaluation.replies] == places[:limit]


def test_every_exchange_of_a_longer_dialog(
    template: DialogTemplate, scripted: Scripted, write_store: WriteStore
) -> None:
    """The turns before an exchange stand in its prompt, as in the store."""
    run = [one_exchange(*dialog)[0] for dialog in DIALOGS]
    sample = template.sample(run)
    evaluation = evaluate(scripted([sample]), write_store([sample]), batch_size=8, limit=1)
    assert [one.reply.text for one in evaluation.replies] == [agent for _, agent, _, _ in DIALOGS]
    assert (evaluation.transcript.rate, evaluation.text.rate, evaluation.units.rate) == (0, 0, 0)
    for number, scored in enumerate(evaluation.replies):
        heard = scored.reference.heard.tolist()
        assert heard == sample.tokens[: len(heard)].tolist()
        assert heard.count(VOCABULARY.correspond_id) == 2 * number + 1


# --- bad input


def test_store_without_mask_and_of_another_tokenizer(
    samples: list[DialogSample], scripted: Scripted, write_store: WriteStore
) -> None:
    store = write_store(samples, with_loss_mask=False, tokenizer_sha256="0" * 64)
    with pytest.raises(DataError) as caught:
        evaluate(scripted(samples), store, batch_size=8)
    first, second = caught.value.problems
    assert "has no loss mask" in first and "another tokenizer (sha256 000000000000…)" in second


def test_store_of_another_vocabulary(
    samples: list[DialogSample], scripted: Scripted, write_store: WriteStore
) -> None:
    store = write_store(samples, vocabulary=Vocabulary(unit_count=21))
    with pytest.raises(DataError, match="'unit_count': 21.*preprocess for this model"):
        evaluate(scripted(samples), store, batch_size=8)


def test_a_store_without_a_tokenizer_hash_is_taken(
    samples: list[DialogSample], scripted: Scripted, write_store: WriteStore
) -> None:
    store = write_store(samples, tokenizer_sha256=None)
    assert len(evaluate(scripted(samples), store, batch_size=8).replies) == 3


def test_a_dialog_longer_than_the_context(
    template: DialogTemplate, samples: list[DialogSample], scripted: Scripted, write_store: WriteStore
) -> None:
    longer = template.sample(one_exchange("hello", "hi", [1] * 160, [1]))
    with pytest.raises(DataError, match="store row 1, sample 0: 205 tokens .* reads 200 at once"):
        evaluate(scripted([]), write_store([samples[0], longer]), batch_size=1)


def all_targets(sample: DialogSample) -> DialogSample:
    mask = np.ones_like(sample.loss_mask)
    mask[0] = 0
    return replace(sample, loss_mask=mask)


def without(sample: DialogSample, wanted: int, by: int) -> DialogSample:
    """The last token `wanted` becomes `by`."""
    tokens = sample.tokens.copy()
    tokens[np.flatnonzero(tokens == wanted)[-1]] = by
    return replace(sample, tokens=tokens)


def one_later(sample: DialogSample) -> DialogSample:
    return replace(sample, loss_mask=np.roll(sample.loss_mask, 1))


def without_units(sample: DialogSample) -> DialogSample:
    spoken = np.flatnonzero((sample.tokens >= VOCABULARY.first_unit_id) & (sample.loss_mask == 1))
    return replace(
        sample, tokens=np.delete(sample.tokens, spoken), loss_mask=np.delete(sample.loss_mask, spoken)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (all_targets, "1 runs of targets, where an exchange has two"),
        (lambda one: without(one, VOCABULARY.correspond_id, 5), "has 0 <|correspond|>, not 1"),
        (one_later, "follows no <|correspond|>"),
        (without_units, "an empty text, or no units, from token 48"),
    ],
)
def test_samples_that_are_no_dialogs(
    samples: list[DialogSample],
    scripted: Scripted,
    write_store: WriteStore,
    directory: ModelDirectory,
    change: Callable[[DialogSample], DialogSample],
    says: str,
) -> None:
    store = write_store([samples[0], change(samples[0])], [2])
    replier = scripted(samples)
    assert len(list(reference_exchanges(store, replier, limit=1))) == 1
    with pytest.raises(DataError) as caught:
        list(reference_exchanges(store, replier))
    (problem,) = caught.value.problems
    assert says in problem and "store row 0, sample 1: " in problem
