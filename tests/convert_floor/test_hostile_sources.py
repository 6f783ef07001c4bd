"""Headers, index files and configs of strangers: right data or a typed error, in bounded memory."""

from __future__ import annotations

import gc
import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from usdm_megatron.convert.hf_source import READABLE_TYPES, HFSource, open_source
from usdm_megatron.errors import ConversionError

A = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
DATA = bytes(range(32))


def file_bytes(header: object, data: bytes = DATA) -> bytes:
    """A safetensors file with this header (an object for JSON, or the text itself)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def source_of(directory: Path, content: bytes) -> HFSource:
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(content)
    return open_source(directory)


def refused(directory: Path, content: bytes) -> str:
    with pytest.raises(ConversionError) as error:
        source_of(directory, content)
    assert all(str(directory / "model.safetensors") in problem for problem in error.value.problems[:1_000])
    return str(error.value)


# ── headers ──


def test_a_valid_file_is_read_as_upstream_reads_it(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {
        "a": torch.randn(7, 3).bfloat16(),
        "b": torch.randn(5).half(),
        "c": torch.randn(2, 1, 3),
        "d": torch.randn(9).double(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = source_of(tmp_path, (tmp_path / "model.safetensors").read_bytes())
    expected = load_file(tmp_path / "model.safetensors")
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name), tensor)
    places = [tensor.begin for tensor in source.tensors.values()]
    assert places == sorted(places)


def test_tensors_that_are_not_aligned_are_read_all_the_same(tmp_path: Path) -> None:
    header = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    values = torch.tensor([1.5, -2, 3e7])
    for padding in range(8):
        text = json.dumps(header).encode() + b" " * padding
        source = source_of(tmp_path, file_bytes(text, b"\x01" + values.numpy().tobytes()))
        read = source.read("a")
        assert torch.equal(read, values) and read.data_ptr() % 4 == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: expected at least 8 bytes, found 0"),
        (b"\x05\0\0", "truncated: expected at least 8 bytes, found 3"),
        (struct.pack("<Q", 2**40), "announce a header of 1,099,511,627,776 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "announce a header"),
        (struct.pack("<Q", 90) + b"{}", "truncated: expected at least 98 bytes for its header, found 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer.*git lfs pull"),
        (file_bytes({"a": A, "b": B}, DATA[:-1]), r"truncated: expected \d+ bytes, found \d+; download"),
        (file_bytes({"a": A, "b": B}, DATA + b"!"), "1 bytes behind the last tensor belong to none"),
        (file_bytes([]), "must be a JSON object"),
        (file_bytes(b""), "header is malformed"),
        (file_bytes(b"\xff\xfe{}"), "header is malformed"),
        (file_bytes(b' {"a":1}'), "does not begin with {"),
        (file_bytes(b"[" * 100_000), "header (is nested too deeply|is malformed)"),
        (file_bytes(b'{"a": NaN}'), "NaN is no JSON"),
        (file_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "header is malformed"),
        (file_bytes(b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}", DATA[:24]),
         "a described more than once"),
        (file_bytes(b'{"a":{"dtype":"U8","dtype":"I8","shape":[32],"data_offsets":[0,32]}}'),
         "dtype described more than once"),
        (file_bytes({"__metadata__": {"format": 1}, "a": A, "b": B}), "__metadata__ must be an object"),
        (file_bytes({"a": 7}), "tensor a: 7 must be an object of dtype, shape and data_offsets"),
        (file_bytes({"a": {**A, "more": 1}}), "tensor a: .* must be an object of dtype"),
        (file_bytes({"a": {**A, "dtype": "F33"}}), "dtype 'F33' is unknown; known are F4"),
        (file_bytes({"a": {**A, "dtype": ["F32"]}}), "dtype .* is unknown"),
        (file_bytes({"a": {**A, "shape": [3, -2]}}), r"shape \[3, -2\] must be a list"),
        (file_bytes({"a": {**A, "shape": [3, 2.0]}}), "must be a list"),
        (file_bytes({"a": {**A, "shape": [True, 6]}}), "must be a list"),
        (file_bytes({"a": {**A, "shape": [2**80]}}), "must be a list of at most 64 sizes below"),
        (file_bytes({"a": {**A, "shape": [2**62] * 4}}), "more elements than an address space"),
        (file_bytes({"a": {**A, "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}), "more elements than"),
        (file_bytes({"a": {**A, "shape": [1] * 65}}), "at most 64 sizes"),
        (file_bytes({"a": {**A, "shape": 6}}), "shape 6 must be a list"),
        (file_bytes({"a": {**A, "data_offsets": [24, 0]}}), "must be .begin, end. with 0 <= begin <= end"),
        (file_bytes({"a": {**A, "data_offsets": [-24, 0]}}), "must be .begin, end."),
        (file_bytes({"a": {**A, "data_offsets": [0, 2**80]}}), "must be .begin, end."),
        (file_bytes({"a": {**A, "data_offsets": [0]}}), "must be .begin, end."),
        (file_bytes({"a": {**A, "shape": [3, 3]}}), r"F32 \[3, 3\] takes 36 bytes, data_offsets hold 24"),
        (file_bytes({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}), "takes 1.5 bytes"),
        (file_bytes({"a": A, "b": {**B, "data_offsets": [20, 28]}}), "tensor b overlaps .* by 4"),
        (file_bytes({"a": A, "b": A}), "tensor b overlaps the one before it by 24 bytes"),
        (file_bytes({"b": B}), "24 bytes before tensor b belong to no tensor"),
    ],
)  # fmt: skip
def test_every_broken_header_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        source_of(tmp_path, content)
    refused(tmp_path, content)


def test_all_problems_of_all_shards_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = {
        "1.safetensors": file_bytes({"a": {**A, "dtype": "F33"}, "b": {**B, "shape": [5]}}),
        "2.safetensors": file_bytes({"c": A, "d": B})[:-5],
        "3.safetensors": file_bytes({"e": A, "f": B}),
        "4.safetensors": file_bytes({"f": A, "g": B}),
    }
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    index = {"weight_map": {name: name for name in shards}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError) as error:
        open_source(tmp_path)
    found = [problem.removeprefix(str(tmp_path)) for problem in error.value.problems]
    assert [problem.split(":")[0] for problem in found] == [
        "/1.safetensors",
        "/1.safetensors",
        "/2.safetensors",
        "",
    ]
    assert "F33" in found[0] and "tensor b: BF16 [5]" in found[1] and "truncated" in found[2]
    assert "tensor f is in 3.safetensors and in 4.safetensors" in found[3]


def test_a_message_stays_short_and_harmless(tmp_path: Path) -> None:
    name = "\x1b[31m\n\ud800" + "x" * 10_000
    text = refused(tmp_path, file_bytes({name: {**A, "dtype": "y" * 10_000}}))
    assert len(text) < 1_000 and text.isprintable()
    text.encode("utf-8")
    many = refused(tmp_path, file_bytes({f"t{i}": 1 for i in range(5_000)}))
    assert len(many.splitlines()) == 1_001 and "only the first 1,000 problems" in many


JUNK = st.integers(-3, 40) | st.sampled_from([2**31, 2**63, 2**80, None, True, 1.5, "24", [], {}, "F64"])
ITEM_BYTES = {"F32": 4, "BF16": 2, "U8": 1, "F64": 8}


class Outcomes:
    """Both must have happened, or the fuzzing proved nothing."""

    def __init__(self) -> None:
        self.accepted = self.refused = 0

    def check(self) -> None:
        assert min(self.accepted, self.refused) >= 10, (self.accepted, self.refused)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A valid header and its data, then up to two changes anywhere in it."""
    end = 0
    entries: list[tuple[str, dict[str, Any]]] = []
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
    header: dict[str, Any] = dict(draw(st.permutations(entries)))
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    for _ in range(draw(st.integers(0, 2)) if entries else 0):
        entry = draw(st.sampled_from(entries))[1]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        if isinstance(entry.get(field), list) and entry[field] and draw(st.booleans()):
            entry[field][draw(st.integers(0, len(entry[field]) - 1))] = draw(JUNK)
        else:
            entry[field] = draw(JUNK)
    return header, bytes(range(256))[:end] + bytes(max(0, end - 256))


def check_against_upstream(directory: Path, content: bytes, outcomes: Outcomes) -> None:
    """What we accept, upstream accepts and reads the same; else a typed error that names the file."""
    path = directory / "model.safetensors"
    try:
        source = source_of(directory, content)
    except ConversionError as error:
        assert str(path) in str(error)
        outcomes.refused += 1
        return
    outcomes.accepted += 1
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == source.tensors.keys()
        for name, tensor in source.tensors.items():
            upstream = file.get_tensor(name)
            assert tensor.shape == tuple(upstream.shape)
            if tensor.dtype in READABLE_TYPES:
                assert torch.equal(bits(source.read(name)), bits(upstream))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_fuzzed_headers(tmp_path: Path) -> None:
    outcomes = Outcomes()

    @settings(max_examples=300, deadline=None)
    @given(headers(), st.sampled_from([0, 0, 0, 1, -1]))
    def fuzz(header_and_data: tuple[dict[str, Any], bytes], extra: int) -> None:
        header, data = header_and_data
        data = data + b"!" if extra > 0 else data[: len(data) + extra]
        check_against_upstream(tmp_path, file_bytes(header, data), outcomes)

    fuzz()
    outcomes.check()


def test_fuzzed_bytes(tmp_path: Path) -> None:
    outcomes = Outcomes()
    valid = file_bytes({"a": A, "b": B})

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        content = bytearray(valid)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1) | st.sampled_from([10, 11, len(content) - 1]))
            content[at] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789{}[]",: cBFU')))
        if data.draw(st.integers(0, 4)) == 0:
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        check_against_upstream(tmp_path, bytes(content), outcomes)

    fuzz()
    outcomes.check()


# ── memory ──


def peak_bytes(action: Callable[[], object]) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(ConversionError):
            action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("announced", [2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_an_announced_header_is_not_allocated(tmp_path: Path, announced: int) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", announced))
        file.truncate(2**41)  # sparse: the file claims to be large, too
    (tmp_path / "config.json").write_text("{}")
    assert peak_bytes(lambda: open_source(tmp_path)) < 1 << 20


@pytest.mark.parametrize("unit", [b"[]", b"{}", b"1e1", b'{"a":1}', b'{"dtype":"U8","shape":[0]}'])
@pytest.mark.parametrize("keyed", [False, True])
def test_json_that_swells_stays_bounded(tmp_path: Path, unit: bytes, keyed: bool) -> None:
    size = 1 << 20  # the limit is sixteen times that
    if keyed:
        text = (
            b"{" + b",".join(b'"%x":%s' % (number, unit) for number in range(size // (len(unit) + 9))) + b"}"
        )
    else:
        text = b'{"x":[' + unit + (b"," + unit) * (size // (len(unit) + 1)) + b"]}"
    assert peak_bytes(lambda: source_of(tmp_path, file_bytes(text))) < 40 * size


def test_small_files_have_limits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}" + " " * (5 << 20))
    assert peak_bytes(lambda: open_source(tmp_path)) < 1 << 20
    with pytest.raises(ConversionError, match=r"config.json holds 5,242,882 bytes; .* at most 4,194,304"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConversionError, match="config.json cannot be read"):
        open_source(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConversionError, match="config.json is not a regular file"):
        open_source(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ConversionError, match="config.json is not a regular file"):
        open_source(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors.index.json").open("wb") as index:
        index.truncate(2**35)
    assert peak_bytes(lambda: open_source(tmp_path)) < 1 << 20


READ_EVERYTHING = """
import pathlib, sys
from usdm_megatron.convert.finite import non_finite_count
from usdm_megatron.convert.hf_source import READABLE_TYPES, open_source

def memory(kind):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(kind + ":")[1].split()[0]) << 10

source = open_source(pathlib.Path(sys.argv[1]))
non_finite_count(source.read("t0")[:1])  # what numpy allocates once
before = {kind: memory(kind) for kind in ("RssAnon", "RssFile")}
most = dict(before)
for name in source.tensors:
    assert non_finite_count(tensor := source.read(name)) == 0
    most = {kind: max(most[kind], memory(kind)) for kind in most}
    del tensor
print(most["RssAnon"] - before["RssAnon"], most["RssFile"] - before["RssFile"])
"""


def test_reading_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.ones(4 << 20) for number in range(6)}  # 16 MiB each
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    child = subprocess.run(
        [sys.executable, "-c", READ_EVERYTHING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    anonymous_bytes, mapped_bytes = map(int, child.stdout.split())
    assert anonymous_bytes < 4 << 20
    assert mapped_bytes < 24 << 20  # one tensor and a few pages of libraries, not six


def test_what_is_read_outlives_its_source_and_never_changes_the_file(tmp_path: Path) -> None:
    content = file_bytes({"a": A, "b": B})
    tensor = source_of(tmp_path, content).read("a")
    gc.collect()
    before = tensor.clone()
    assert torch.equal(tensor, before)
    tensor.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert torch.equal(open_source(tmp_path).read("a"), before)


def test_a_file_that_shrinks_or_vanishes_meanwhile(tmp_path: Path) -> None:
    source = source_of(tmp_path, file_bytes({"a": A, "b": B}))
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(ConversionError, match="model.safetensors changed while it was read"):
        source.read("b")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="model.safetensors changed while it was read"):
        source.read("b")
