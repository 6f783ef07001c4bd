"""The original's tree is read through praatio; damaged files are rejections, in bounded time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.corpora_floor.speech import make_records, write_tree
from usdm_megatron.corpora import textgrid_corpus
from usdm_megatron.corpora.alignment import Rejected, Utterance, Word, align
from usdm_megatron.corpora.textgrid_corpus import TextGridCorpus, read_units, read_word_tier
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.samples import Rejection

RECORDS = make_records(9, words=(5, 12))
STYLES = ["long_textgrid", "short_textgrid"]


def read_all(corpus: TextGridCorpus) -> list[Utterance | Rejection]:
    return [found for part in corpus.parts() for found in corpus.read(part)]


def spoken(words: tuple[Word, ...]) -> list[tuple[str, float, float]]:
    return [(word.text, word.start_s, word.end_s) for word in words if word.text]


@pytest.mark.parametrize("style", STYLES)
def test_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    monkeypatch.setattr(textgrid_corpus, "PART_UTTERANCES", 4)
    corpus = TextGridCorpus(*write_tree(tmp_path, RECORDS, style))
    assert [len(part) for part in corpus.parts()] == [4, 4, 1]
    found = read_all(corpus)
    expected = sorted(RECORDS, key=lambda record: record["id"])
    assert [one.id for one in found if isinstance(one, Utterance)] == [record["id"] for record in expected]
    for one, record in zip(found, expected, strict=True):
        assert isinstance(one, Utterance)
        assert one.units.tolist() == record["units"]
        assert spoken(one.words) == [(word["text"], word["start"], word["end"]) for word in record["words"]]
        assert (one.words[-1].end_s, one.duration_s) == (record["duration"], record["duration"])
        words = [Word(word["text"], word["start"], word["end"]) for word in record["words"]]
        of_manifest = align(words, len(one.units), duration_s=record["duration"])
        assert align(one.words, len(one.units), duration_s=one.duration_s) == of_manifest


def test_files_are_named_relative_to_their_roots(tmp_path: Path) -> None:
    corpus = TextGridCorpus(*write_tree(tmp_path, RECORDS[:1]))
    assert [(name, path.is_file()) for name, path in corpus.files()] == [
        ("units/speaker0/utt_0_unit.txt", True),
        ("textgrids/speaker0/utt_0.TextGrid", True),
    ]


def test_a_missing_partner_is_a_rejection(tmp_path: Path) -> None:
    units, grids = write_tree(tmp_path, RECORDS[:4])
    (units / "speaker1" / "utt_1_unit.txt").unlink()
    (grids / "speaker2" / "utt_2.TextGrid").unlink()
    (units / "speaker0" / "utt_0.txt").unlink()  # the transcript is not needed
    found = read_all(TextGridCorpus(units, grids))
    assert [one for one in found if isinstance(one, Rejection)] == [
        Rejection("speaker1/utt_1", "units_missing", "no utt_1_unit.txt"),
        Rejection("speaker2/utt_2", "textgrid_missing", "no utt_2.TextGrid"),
    ]
    assert len(found) == 4


def test_roots_that_do_not_belong_together(tmp_path: Path) -> None:
    units, grids = write_tree(tmp_path, RECORDS[:3])
    with pytest.raises(DataError, match="none of the same relative path and NAME"):
        TextGridCorpus(units, grids / "speaker0").parts()
    with pytest.raises(DataError) as caught:
        TextGridCorpus(tmp_path / "no", tmp_path / "none")
    assert len(caught.value.problems) == 2


def test_linked_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    units, grids = write_tree(tmp_path, RECORDS[:3])
    (units / "speaker1").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", units / "speaker1")
    os.symlink(units, units / "speaker0" / "back")
    assert [type(found) for found in read_all(TextGridCorpus(units, grids))] == [Utterance] * 3


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    units, grids = write_tree(tmp_path, RECORDS[:1])
    Path(os.fsdecode(os.fsencode(units) + b"/\xff_unit.txt")).write_text("1 2 3")
    with pytest.raises(DataError, match="is not named in UTF-8"):
        TextGridCorpus(units, grids).parts()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"1 2 3\n4 5\n", None),
        (b"1 2 3\tand more\n", None),
        (b"1 2 3", None),
        (b"", "units_missing"),
        (b"\n1 2 3", "units_missing"),
        (b"1 2 x", "malformed_units"),
        (b"1 2 \xff", "malformed_units"),
    ],
)
def test_units_are_the_first_line_up_to_a_tab(tmp_path: Path, content: bytes, reason: str | None) -> None:
    (tmp_path / "n_unit.txt").write_bytes(content)
    if reason is None:
        assert read_units(tmp_path / "n_unit.txt").tolist() == [1, 2, 3]
    else:
        with pytest.raises(Rejected, match=reason):
            read_units(tmp_path / "n_unit.txt")


def test_links_that_lead_nowhere_are_missing_files(tmp_path: Path) -> None:
    units, grids = write_tree(tmp_path, RECORDS[:3])
    for path in (units / "speaker0/utt_0_unit.txt", grids / "speaker1/utt_1.TextGrid"):
        path.unlink()
        path.symlink_to(tmp_path / "gone")
    corpus = TextGridCorpus(units, grids)
    assert all(path.is_file() for _, path in corpus.files()) and len(corpus.files()) == 4
    assert [one.reason for one in read_all(corpus) if isinstance(one, Rejection)] == [
        "units_missing",
        "textgrid_missing",
    ]


# ── damaged TextGrids ──


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A TextGrid of either style."""
    paths = {}
    for style in STYLES:
        _, root = write_tree(tmp_path_factory.mktemp(style), RECORDS[:1], style)
        paths[style] = root / "speaker0" / "utt_0.TextGrid"
    return paths


def test_other_encodings(grids: dict[str, Path], tmp_path: Path) -> None:
    text = grids["long_textgrid"].read_text()
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "n.TextGrid").write_text(text, encoding=encoding)
        assert read_word_tier(tmp_path / "n.TextGrid") == read_word_tier(grids["long_textgrid"])


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda text: text.replace('"words"', '"speaker - words"'), "no interval tier 'words', only speaker"),
        (lambda text: "", "does not begin as a TextGrid"),
        (lambda text: "[" * 100_000, "does not begin as a TextGrid"),
        (lambda text: '{"start": 0, "end": 1, "tiers": {}}', "does not begin as a TextGrid"),
        (lambda text: text.replace('"IntervalTier"', '"TextTier"'), ""),
        (lambda text: text.replace("xmax = ", "xmax = -"), ""),
        (lambda text: text[: text.index("intervals [3]")], "cut short"),
        (lambda text: text + " " * (4 << 20), "larger than 4 MiB"),
    ],
)
def test_what_is_no_word_tier(grids: dict[str, Path], tmp_path: Path, change: object, detail: str) -> None:
    path = tmp_path / "n.TextGrid"
    path.write_text(change(grids["long_textgrid"].read_text()))  # type: ignore[operator]  # a parameter
    with pytest.raises(Rejected) as caught:
        read_word_tier(path)
    assert caught.value.reason == "malformed_textgrid"
    assert detail in caught.value.detail and len(caught.value.detail) < 200


HOSTILE = {
    "an element of": 'text = "' * 200_000,
    "tiers, at most": 'text = "a"\n'
    + "".join(
        f'item [{n}]:\nclass = "IntervalTier"\nname = "t{n}"\nxmin = 0\nxmax = 1\n' for n in range(20_000)
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("detail", HOSTILE)
def test_hostile_text_takes_no_quadratic_time(
    grids: dict[str, Path], tmp_path: Path, detail: str, encoding: str
) -> None:
    """praatio alone takes two seconds for 64 KiB of the first, and hours for 4 MiB."""
    text = grids["long_textgrid"].read_text()
    path = tmp_path / "n.TextGrid"
    path.write_text(text[: text.index("text = ")] + HOSTILE[detail], encoding=encoding)
    started_at = time.perf_counter()
    with pytest.raises(Rejected, match=detail):
        read_word_tier(path)
    assert time.perf_counter() - started_at < 2


@settings(deadline=2000, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("style", STYLES)
def test_fuzzed_bytes_are_rejected_or_read(
    grids: dict[str, Path], tmp_path: Path, style: str, data: st.DataObject
) -> None:
    content = bytearray(grids[style].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.sampled_from([0, 0, 1, 7, 400]))
        put = data.draw(
            st.binary(max_size=4)
            | st.sampled_from([b'"', b"\n", b"intervals [", b'text = "', b"-1", b"nan", b"9" * 50])
        )
        content[at : at + cut] = put * data.draw(st.sampled_from([1, 1, 1, 300]))
    path = tmp_path / "n.TextGrid"
    path.write_bytes(content)
    try:
        tier = read_word_tier(path)
        align(tier.words, max(1, round(min(tier.end_s, 1e4) * 50)), duration_s=tier.end_s)
    except Rejected as rejected:
        assert rejected.reason
    else:
        assert tier.words
