"""Which id means what (`docs/from-usdm.md`, "Token ids")."""

from __future__ import annotations

import pytest

from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind, Vocabulary


def test_usdm_ids() -> None:
    vocabulary = USDM_VOCABULARY
    assert (vocabulary.bos_id, vocabulary.eos_id) == (1, 2)
    assert (vocabulary.continue_id, vocabulary.correspond_id) == (32000, 32001)
    assert vocabulary.first_unit_id == 32002
    assert vocabulary.pad_id == 42002
    assert vocabulary.size == 42003
    assert vocabulary.padded_size == 42496


def test_added_tokens_in_id_order() -> None:
    tokens = USDM_VOCABULARY.added_tokens()
    assert len(tokens) == 10_003
    by_id = dict(enumerate(tokens, start=32000))
    assert by_id[32000] == "<|continue|>"
    assert by_id[32001] == "<|correspond|>"
    assert by_id[32002] == "<|unit0|>"
    assert by_id[32002 + 9999] == "<|unit9999|>"
    assert by_id[42002] == "<pad>"


def test_kind_of_every_id() -> None:
    kinds = USDM_VOCABULARY.kind_of_id()
    assert len(kinds) == 42003

    def expected(token: int) -> TargetKind:
        named = {
            1: TargetKind.BOS,
            2: TargetKind.EOS,
            32000: TargetKind.CONTINUE,
            32001: TargetKind.CORRESPOND,
        }
        return named.get(token, TargetKind.UNIT if 32002 <= token <= 42001 else TargetKind.TEXT)

    assert [TargetKind(kind) for kind in kinds] == [expected(token) for token in range(42003)]
    assert [kind.label for kind in TargetKind] == ["text", "unit", "continue", "correspond", "eos", "bos"]


def test_text_vocabulary() -> None:
    plain = Vocabulary(text_size=32_000, unit_count=0)
    assert not plain.has_speech
    assert (plain.size, plain.padded_size, plain.pad_id) == (32_000, 32_256, plain.eos_id)
    assert plain.added_tokens() == []
    assert set(plain.kind_of_id().tolist()) == {TargetKind.TEXT, TargetKind.EOS, TargetKind.BOS}
    for name in ("continue_id", "correspond_id", "first_unit_id"):
        with pytest.raises(ValueError, match="no speech tokens"):
            getattr(plain, name)


@pytest.mark.parametrize(
    ("size", "padded"), [(511, 512), (512, 512), (513, 1024), (42_003, 42_496), (32_768, 32_768)]
)
def test_padded_size(size: int, padded: int) -> None:
    assert Vocabulary(text_size=size, unit_count=0).padded_size == padded


def test_to_and_from_dict() -> None:
    vocabulary = Vocabulary(text_size=300, unit_count=100, bos_id=5, eos_id=6)
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    with pytest.raises(KeyError):
        Vocabulary.from_dict({"text_size": 1})
