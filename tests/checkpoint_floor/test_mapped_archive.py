"""What is mapped is what torch reads, for anything that `torch.save` writes; the file never changes."""

from __future__ import annotations

import io
import mmap
import os
import platform
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron import file_reading
from usdm_megatron.checkpoint import mapped_archive
from usdm_megatron.checkpoint.mapped_archive import map_tensor
from usdm_megatron.file_reading import map_privately

TYPES = [getattr(torch, name) for name in mapped_archive._TYPES.values()]


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def written(path: Path, archive: bytes, before: int = 0) -> tuple[Path, int, int]:
    """`archive` between other bytes, as in a `.distcp` file: what `map_tensor` takes."""
    path.write_bytes(b"\xa5" * before + archive + b"\x5a" * 99)
    return path, before, len(archive)


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    before=st.integers(0, 9000),
    data=st.data(),
)
def test_what_is_mapped_is_what_torch_reads(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: list[int],
    before: int,
    data: st.DataObject,
) -> None:
    """With any strides, at any place in the file, aligned or not."""
    order = data.draw(st.permutations(range(len(shape))))
    values = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randn(shape) * 50
    tensor = values.to(dtype).permute(order)
    archive = saved(tensor)
    place = written(tmp_path_factory.mktemp("archive") / "a.distcp", archive, before)
    mapped, read = map_tensor(*place), torch.load(io.BytesIO(archive), weights_only=True)
    assert mapped.dtype == dtype and mapped.stride() == read.stride()
    assert mapped.shape == tensor.shape and torch.equal(mapped, tensor)


def test_a_part_of_a_storage_keeps_its_place(tmp_path: Path) -> None:
    part = torch.arange(24.0).reshape(4, 6)[1:3, 2:5]  # torch.save writes all 24 values
    mapped = map_tensor(*written(tmp_path / "a", saved(part)))
    assert mapped.storage_offset() == 8 and torch.equal(mapped, part)


def test_values_are_those_of_the_file_and_not_a_copy(tmp_path: Path) -> None:
    """Until somebody writes to them: that stays here."""
    place = written(tmp_path / "a", saved(torch.arange(4096.0)), before=64)
    content = place[0].read_bytes()
    mapped = map_tensor(*place)
    position = content.index(torch.arange(4096.0).numpy().tobytes())
    with place[0].open("r+b") as file:
        file.seek(position)
        file.write(torch.tensor([7.0]).numpy().tobytes())
    assert mapped[0] == 7
    mapped[1:] = -1
    assert place[0].read_bytes()[position + 4 :] == content[position + 4 :]


def test_of_a_large_archive_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(mmap.mmap):
        read_bytes = 0

        def read(self, *arguments: Any) -> bytes:
            content = super().read(*arguments)
            self.read_bytes += len(content)
            return content

        def __getitem__(self, place: Any) -> Any:
            content = super().__getitem__(place)
            self.read_bytes += len(content)
            return content

    monkeypatch.setattr(mmap, "mmap", Counted)
    mapped: list[Counted] = []
    monkeypatch.setattr(
        mapped_archive, "map_privately", lambda *where: mapped.append(map_privately(*where)) or mapped[-1]
    )
    tensor = torch.randn(1 << 20)
    assert torch.equal(map_tensor(*written(tmp_path / "a", saved(tensor))), tensor)
    assert 0 < mapped[0].read_bytes < 20_000


@pytest.fixture(params=["maps ahead", "reads ahead"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.14, and other systems, cannot map ahead."""
    if request.param == "reads ahead":
        monkeypatch.setattr(file_reading, "_populate", lambda mapping: False)


def test_linux_maps_ahead(tmp_path: Path) -> None:
    """Since 5.14; falling back everywhere would be right, and slow."""
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    with (tmp_path / "a").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    kernel = [int(part) for part in re.findall(r"\d+", platform.release())[:2]]
    assert file_reading._populate(mapping) == (sys.platform == "linux" and kernel >= [5, 14])


@pytest.mark.usefixtures("_either_way")
def test_a_mapping_holds_the_bytes_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = os.urandom((3 << 20) + 5)
    path.write_bytes(content)
    for begin, size in ((0, len(content)), (100, 7), (mmap.ALLOCATIONGRANULARITY + 1, 2 << 20)):
        mapping = map_privately(path, begin, size)
        assert mapping.read() == content[begin : begin + size]


@pytest.mark.usefixtures("_either_way")
def test_a_page_that_the_disk_cannot_give_is_an_error_and_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a bad sector, or a file that got shorter: touching the page would end the process."""
    path = tmp_path / "a"
    path.write_bytes(bytes(3 << 20))
    real = mmap.mmap

    def shortened(*arguments: Any, **options: Any) -> mmap.mmap:
        mapping = real(*arguments, **options)
        os.truncate(path, 2 << 20)
        return mapping

    monkeypatch.setattr(mmap, "mmap", shortened)
    with pytest.raises(OSError, match="became shorter") as refused:
        map_privately(path, 100, (3 << 20) - 100)
    assert refused.value.filename == str(path)


def test_another_byte_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path / "a", saved(torch.arange(3.0)))
    monkeypatch.setattr(sys, "byteorder", {"little": "big", "big": "little"}[sys.byteorder])
    with pytest.raises(ValueError, match="byte order"):
        map_tensor(*place)


def compressed(archive: bytes) -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as files,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for file in files.infolist():
            target.writestr(file.filename, files.read(file))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("archive", "match"),
    [
        (saved({"a": torch.ones(2)}), "holds a dict and no tensor"),
        (saved(3), "holds a int and no tensor"),
        (compressed(saved(torch.ones(2))), "compressed, which torch does not write"),
        (saved(torch.ones(2, dtype=torch.complex64).conj()), "conjugated"),
        (saved(torch.nn.Parameter(torch.ones(2))), "refers to torch._utils._rebuild_parameter"),
        (saved(print), "refers to builtins.print|refers to __builtin__.print"),
        (saved(torch.ones(2))[:-30], "not a zip file"),
        (b"not a zip archive, but long enough to look", "not a zip file"),
    ],
)
def test_other_archives_are_refused(tmp_path: Path, archive: bytes, match: str) -> None:
    with pytest.raises(Exception, match=match):
        map_tensor(*written(tmp_path / "a", archive))


def test_a_file_that_is_too_short_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    path, offset, length = written(tmp_path / "a", saved(torch.ones(9000)))
    with path.open("r+b") as file:
        file.truncate(length - 1)
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        map_tensor(path, offset, length)
