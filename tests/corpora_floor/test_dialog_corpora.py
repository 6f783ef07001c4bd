"""Dialogs from JSONL and DailyTalk's folder: samples, what is rejected and counted, what is an error."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.corpora import dialog_corpora
from usdm_megatron.corpora.dialog import DialogTemplate, Turn, exchanges
from usdm_megatron.corpora.dialog_corpora import DailyTalkDialogs, DialogSource, JsonDialogs
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess import text_lines
from usdm_megatron.preprocess.parts_plan import MergeOptions
from usdm_megatron.preprocess.samples import SampleBlock, utterance_hash
from usdm_megatron.preprocess.stores import SampleOptions, StoreOptions, write_samples
from usdm_megatron.tokenizer.text_encoder import TextEncoder
from usdm_megatron.vocab import Vocabulary

SMALL = Vocabulary(unit_count=20)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(write_mistral_tokenizer(tmp_path_factory.mktemp("mistral")))


def a_turn(
    speaker: Any = "a", text: Any = "Hello there", units: Any = (1, 2, 3), **more: Any
) -> dict[str, Any]:
    return {"speaker": speaker, "text": text, "units": list(units) if type(units) is tuple else units, **more}


def a_dialog(turns: int, name: str | None = None) -> dict[str, Any]:
    spoken = [a_turn(number % 2, f"Turn {number} of {name}", (number % 20, 7)) for number in range(turns)]
    return {"turns": spoken} if name is None else {"id": name, "turns": spoken}


@pytest.fixture
def open_lines(tmp_path: Path, encoder: TextEncoder) -> Callable[..., DialogSource]:
    def write(*dialogs: Any, **options: Any) -> DialogSource:
        path = tmp_path / "dialogs.jsonl"
        path.write_text("".join(json.dumps(dialog) + "\n" for dialog in dialogs))
        return DialogSource(JsonDialogs([path]), encoder, SMALL, **options)

    return write


def samples_of(blocks: list[SampleBlock]) -> list[tuple[list[int], list[int], int]]:
    found = []
    for block in blocks:
        assert block.loss_mask is not None
        assert len(block.tokens) == len(block.loss_mask) == block.lengths.sum()
        assert (block.tokens.dtype, block.loss_mask.dtype) == (np.int32, np.uint8)
        assert block.groups.tolist() == [0] * len(block.lengths)
        cuts = np.cumsum(block.lengths)[:-1]
        ids, masks = np.split(block.tokens, cuts), np.split(block.loss_mask, cuts)
        found += [
            (some.tolist(), mask.tolist(), int(utterance))
            for some, mask, utterance in zip(ids, masks, block.utterances, strict=bool(len(block.lengths)))
        ]
    return found


def make_all(source: DialogSource) -> list[SampleBlock]:
    return [source.make(part) for part in source.parts()]


def rejections_of(source: DialogSource) -> list[tuple[str, str, str]]:
    found = [rejection for block in make_all(source) for rejection in block.rejections]
    return [(rejection.where, rejection.reason, rejection.detail) for rejection in found]


# --- JSONL


@pytest.mark.parametrize("multi_turn", [False, True])
def test_samples_of_both_offsets_in_order(
    open_lines: Callable[..., DialogSource], encoder: TextEncoder, multi_turn: bool
) -> None:
    dialogs = [a_dialog(2, "two"), a_dialog(5, "five"), {**a_dialog(3), "id": 17}]
    template = DialogTemplate(encoder.encode, SMALL)
    expected = []
    for dialog in dialogs:
        turns = [
            Turn(str(turn["speaker"]), turn["text"], np.array(turn["units"])) for turn in dialog["turns"]
        ]
        whole = [exchanges(turns, 0), exchanges(turns, 1)]
        for run in filter(None, whole if multi_turn else [[one] for both in whole for one in both]):
            sample = template.sample(run)
            expected.append(
                (sample.tokens.tolist(), sample.loss_mask.tolist(), utterance_hash(str(dialog["id"])))
            )
    assert samples_of(make_all(open_lines(*dialogs, multi_turn=multi_turn))) == expected
    assert len(expected) == (1 + 2 + 2 if multi_turn else 1 + 4 + 2)


def test_parts_in_any_order_and_pickled_are_the_same(
    open_lines: Callable[..., DialogSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogs = [a_dialog(3, f"dialog {number}") for number in range(20)]
    whole = samples_of(make_all(open_lines(*dialogs)))
    monkeypatch.setattr(
        dialog_corpora, "line_parts", lambda p, h: text_lines.line_parts(p, h, part_bytes=500)
    )
    source = open_lines(*dialogs)
    parts = source.parts()
    assert len(parts) > 5
    source = pickle.loads(pickle.dumps(source))
    made = {
        number: source.make(pickle.loads(pickle.dumps(parts[number])))
        for number in reversed(range(len(parts)))
    }
    assert samples_of([made[number] for number in range(len(parts))]) == whole


def test_a_dialog_without_id_is_known_by_its_content(open_lines: Callable[..., DialogSource]) -> None:
    source = open_lines(a_dialog(3), a_dialog(4), a_dialog(3))
    utterances = [utterance for _, _, utterance in samples_of(make_all(source))]
    assert utterances[:2] == utterances[5:]
    assert len(set(utterances)) == 2


@pytest.mark.parametrize("part_bytes", [1 << 20, 1])  # neighbours in a part, and in two
def test_an_id_that_comes_again_is_known_by_its_place(
    open_lines: Callable[..., DialogSource], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part_bytes: int
) -> None:
    monkeypatch.setattr(
        dialog_corpora, "line_parts", lambda p, h: text_lines.line_parts(p, h, part_bytes=part_bytes)
    )
    other = {**a_dialog(2), "id": "x"}
    nameless = a_dialog(4)
    source = open_lines(a_dialog(3, "x"), other, nameless, nameless, a_dialog(1, "q"), a_dialog(2, "q"))
    options = StoreOptions(8192, SMALL)
    samples = SampleOptions(MergeOptions(packing="none"), id_rule="once", input_holds_ids=False)
    result = write_samples("dialog", {"": source}, str(tmp_path / "P"), options, samples)
    assert result is not None
    assert result.rejected == {"fewer_than_2_turns": 1, "duplicate_id": 3}
    assert TokenStore.open(tmp_path / "P").summary.samples == 2 + 3
    listed = json.loads((tmp_path / "P_report.json").read_text())["listed"]
    assert [one["where"] for one in listed[1:]] == ["x", json.dumps(nameless["turns"])[:80] + "…", "q"]


def test_white_space_units_as_text_and_other_fields(open_lines: Callable[..., DialogSource]) -> None:
    plain = open_lines({"id": 1, "turns": [a_turn("a"), a_turn("b")]})
    expected = samples_of(make_all(plain))
    same = {
        "id": "1",
        "turns": [
            a_turn("a", " Hello there\n", "1 2 3", emotion="joy"),
            a_turn("b", "\tHello there", "1  2\t3\n"),
        ],
        "topic": 5,
    }
    assert samples_of(make_all(open_lines(same))) == expected


@pytest.mark.parametrize(
    ("turns", "reason", "detail"),
    [
        ([a_turn("a")], "fewer_than_2_turns", "1 turns"),
        ([a_turn("a"), a_turn("a")], "speaker_twice_in_a_row", "speaker a, turns 0 and 1"),
        ([a_turn("a"), a_turn("b", "")], "text_missing", "turn 1"),
        ([a_turn("a"), a_turn("b", 5)], "malformed_text", "turn 1: 5"),
        ([a_turn("a"), a_turn("b", "\ud800")], "malformed_text", "turn 1"),
        ([a_turn("a"), a_turn(None)], "malformed_speaker", "turn 1: None"),
        ([a_turn("a"), a_turn("b", units=[])], "units_missing", "turn 1"),
        ([a_turn("a"), {"speaker": "b", "text": "hi"}], "units_missing", "turn 1"),
        ([a_turn("a"), a_turn("b", units=[1, 2.5])], "malformed_units", "turn 1"),
        ([a_turn("a"), a_turn("b", units="1 x")], "malformed_units", "turn 1"),
        (
            [a_turn("a"), a_turn("b", units=[3, 20])],
            "unit_out_of_range",
            "turn 1, unit 20: the vocabulary has 0 to 19",
        ),
        ([a_turn("a"), a_turn("b", units=[-1])], "unit_out_of_range", "turn 1"),
        ([a_turn("a"), a_turn("b", "Say <|unit5|>")], "special_token_in_text", "turn 1 spells <|unit5|>"),
        ([a_turn("a"), a_turn("b", "The </S> tag")], "special_token_in_text", "turn 1 spells </s>"),
    ],
)
def test_rejected_dialogs_leave_the_others(
    open_lines: Callable[..., DialogSource], turns: list[Any], reason: str, detail: str
) -> None:
    source = open_lines(a_dialog(2, "before"), {"turns": turns, "id": "it"}, a_dialog(2, "behind"))
    ((where, found_reason, found_detail),) = rejections_of(source)
    assert (where, found_reason) == ("it", reason)
    assert found_detail.startswith(detail)
    assert len(samples_of(make_all(source))) == 2


def test_a_rejected_dialog_without_id_is_named_by_its_line(open_lines: Callable[..., DialogSource]) -> None:
    source = open_lines(a_dialog(2), {"turns": [a_turn()]})
    ((where, *_),) = rejections_of(source)
    assert where.endswith("dialogs.jsonl line 2")


def test_over_long_exchanges(open_lines: Callable[..., DialogSource]) -> None:
    long = a_dialog(4, "long")
    long["turns"][2]["units"] = [1] * 50
    for multi_turn in (False, True):
        source = open_lines(long, seq_length=100, multi_turn=multi_turn)
        assert len(samples_of(make_all(source))) == 1
        assert [(where, reason) for where, reason, _ in rejections_of(source)] == [
            ("long, turns 2 to 3", "over_long"),
            ("long, turns 1 to 2", "over_long"),
        ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"turns": [', r"line 2: not JSON \(.*\); every line is a dialog, one object"),
        (b'{"turns": "\xff"}', r"line 2: byte 12 is not UTF-8; save the file as UTF-8"),
        (b"[1]", r"line 2: \[1\] is no dialog; it is an object with a list of turns"),
        (b'{"id": 1}', "is no dialog; it is an object with a list of turns"),
        (b'{"turns": [5]}', "line 2: turn 0 has no speaker and no text; a turn is an object with speaker"),
        (b'{"turns": [{"speaker": 1}]}', "line 2: turn 0 has no text"),
        (b'{"turns": [], "id": [1]}', r"line 2: id is \[1\]; it is a string or a number, or is left out"),
        (b'{"turns": [], "id": true}', "line 2: id is True"),
        (
            b'{"turns": [], "id": ""}',
            "line 2: id is ''; .*, or is left out where empty",
        ),
        (b"[" * 100_000, "line 2: not JSON"),
        (b'{"turns": [], "id": ' + b"9" * 5000 + b"}", "line 2: not JSON"),
    ],
)
def test_malformed_lines(tmp_path: Path, encoder: TextEncoder, line: bytes, message: str) -> None:
    good = json.dumps(a_dialog(2)).encode()
    (tmp_path / "d.jsonl").write_bytes(good + b"\n" + line + b"\n\n" + good)
    with pytest.raises(DataError, match=message):
        make_all(DialogSource(JsonDialogs([tmp_path / "d.jsonl"]), encoder, SMALL))


def test_problems_come_at_once_but_not_by_the_thousand(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "d.jsonl").write_text("{\n" * 3 + "5\n" * 50)
    with pytest.raises(DataError) as caught:
        make_all(DialogSource(JsonDialogs([tmp_path / "d.jsonl"]), encoder, SMALL))
    assert [problem.split(": ")[0].rsplit(" ", 1)[1] for problem in caught.value.problems] == [
        str(number) for number in range(1, 11)
    ]


def mutated(data: st.DataObject, valid: bytes) -> bytes:
    at = data.draw(st.integers(0, len(valid)))
    cut = data.draw(st.integers(0, 12))
    return valid[:at] + data.draw(st.binary(max_size=12)) + valid[at + cut :]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_give_samples_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, encoder: TextEncoder, data: st.DataObject
) -> None:
    valid = b"".join(json.dumps(a_dialog(3, name)).encode() + b"\n" for name in ("one", "two"))
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(mutated(data, valid))
    source = DialogSource(JsonDialogs([path]), encoder, SMALL)
    try:
        blocks = make_all(source)
    except DataError:
        return
    for tokens, mask, _ in samples_of(blocks):
        assert len(tokens) == len(mask)
        assert max(tokens) < SMALL.size


# --- DailyTalk


@pytest.fixture
def dailytalk(tmp_path: Path) -> Path:
    """Three dialogs of 2, 3 and 12 turns, laid out as the published folder."""
    metadata: dict[str, dict[str, Any]] = {}
    for dialog, turns in ((10, 3), (2, 2), (0, 12)):
        (tmp_path / "data" / str(dialog)).mkdir(parents=True)
        for turn in range(turns):
            metadata.setdefault(str(dialog), {})[str(turn)] = {
                "text": f" Turn {turn} of {dialog}. ",
                "speaker": turn % 2,
                "emotion": "no emotion",
            }
            stem = tmp_path / "data" / str(dialog) / f"{turn}_{turn % 2}_d{dialog}"
            stem.with_name(stem.name + "_unit.txt").write_text(f"{turn} {dialog % 20} 7\n")
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    return tmp_path


def as_json_lines(directory: Path, dialogs: list[tuple[int, int]]) -> Path:
    path = directory / "same.jsonl"
    lines = []
    for dialog, turns in dialogs:
        spoken = [a_turn(n % 2, f"Turn {n} of {dialog}.", (n, dialog % 20, 7)) for n in range(turns)]
        lines.append(json.dumps({"id": f"d{dialog}", "turns": spoken}))
    path.write_text("\n".join(lines))
    return path


def test_dailytalk_is_the_same_as_its_dialogs_in_json(
    dailytalk: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = as_json_lines(dailytalk, [(0, 12), (2, 2), (10, 3)])
    expected = samples_of(make_all(DialogSource(JsonDialogs([lines]), encoder, SMALL)))
    source = DialogSource(DailyTalkDialogs(dailytalk), encoder, SMALL)
    assert samples_of(make_all(source)) == expected
    monkeypatch.setattr(dialog_corpora, "DIALOGS_PER_PART", 2)
    assert len(source.parts()) == 2
    assert samples_of(make_all(pickle.loads(pickle.dumps(source)))) == expected
    names = [name for name, _ in source.files()]
    assert names[:3] == ["metadata.json", "data/0/0_0_d0_unit.txt", "data/0/1_1_d0_unit.txt"]
    assert len(names) == 18
    assert all(path.is_file() for _, path in source.files())


def test_the_official_lists_choose_dialogs(dailytalk: Path, encoder: TextEncoder) -> None:
    expected = samples_of(
        make_all(DialogSource(JsonDialogs([as_json_lines(dailytalk, [(2, 2), (10, 3)])]), encoder, SMALL))
    )
    listed = [(10, 2), (2, 1), (10, 0), (2, 0), (10, 1)]  # the official train list is shuffled
    lines = [f"{n}_{n % 2}_d{d}|{n % 2}|{{AH0 B}}|Turn {n} of {d}.|none" for d, n in listed]
    (dailytalk / "train.txt").write_text("\n".join(lines) + "\n")
    source = DialogSource(DailyTalkDialogs(dailytalk, dailytalk / "train.txt"), encoder, SMALL)
    assert samples_of(make_all(source)) == expected


def test_rejected_dialogs_of_dailytalk(dailytalk: Path, encoder: TextEncoder) -> None:
    (dailytalk / "data/2/1_1_d2_unit.txt").unlink()
    (dailytalk / "data/10/0_0_d10_unit.txt").write_bytes(b"5 \xff\n")
    metadata = json.loads((dailytalk / "metadata.json").read_text())
    del metadata["0"]["3"]
    (dailytalk / "metadata.json").write_text(json.dumps(metadata))
    source = DialogSource(DailyTalkDialogs(dailytalk), encoder, SMALL)
    found = rejections_of(source)
    assert [(where, reason) for where, reason, _ in found] == [
        ("d0", "turns_not_consecutive"),
        ("d2", "units_missing"),
        ("d10", "malformed_units"),
    ]
    assert "0, 1, 2, 4" in found[0][2]
    assert "data/2/1_1_d2_unit.txt: cannot be read (No such file" in found[1][2]
    assert samples_of(make_all(source)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.json", b"{", r"metadata.json: not JSON"),
        ("metadata.json", b"[" * 100_000, "metadata.json: not JSON"),
        ("metadata.json", b"[]", "must hold an object of dialogs, and each an object of turns"),
        ("metadata.json", b'{"0": []}', "must hold an object of dialogs"),
        ("metadata.json", b"{}", "names no turns"),
        ("metadata.json", b'{"0": {"0": 5}}', "dialog '0', turn '0' is 5; both are numbers, and a turn has"),
        ("metadata.json", b'{"0": {"0": {"text": "hi"}}}', "dialog '0', turn '0' is"),
        ("metadata.json", b'{"0": {"0": {"text": 1, "speaker": 0}}}', "dialog '0', turn '0' is"),
        ("metadata.json", b'{"0": {"../0": {"text": "", "speaker": 0}}}', "dialog '0', turn '../0' is"),
        ("metadata.json", b'{"0": {"0": {"text": "", "speaker": "/etc"}}}', "dialog '0', turn '0' is"),
        ("val.txt", b"0_0_d1|0|x|hi|none\n0_0_x|0|x|hi|none\n", "val.txt line 2: .* is no turn of DailyTalk"),
        ("val.txt", b"\xef\xbb\xbf0_0_d1|0|x|hi|none\n\n\nx", "val.txt line 4: "),
        ("val.txt", b"0_0_d1|\n", "val.txt line 1: "),
        ("val.txt", b"0_0_d1|\xff|a|b", "val.txt line 1: "),
        ("val.txt", b"\n", "names no turns"),
    ],
)
def test_malformed_metadata(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        DailyTalkDialogs(tmp_path, tmp_path / name).parts()


def test_a_folder_without_metadata(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata.json: no such file; DailyTalk's folder holds data/ and"):
        DailyTalkDialogs(tmp_path)
