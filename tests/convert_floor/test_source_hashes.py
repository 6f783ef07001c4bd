"""Recorded hashes are found where this package, the hub's cache and its downloads keep them, and checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import _local_folder

from usdm_megatron.checkpoint.integrity import write_integrity
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions
from usdm_megatron.convert.source_hashes import ExpectedHash, WeightHasher, expected_hashes
from usdm_megatron.errors import ConversionError

FILES = {
    "config.json": b'{"a": 1}\n',
    "empty.json": b"",
    "model-1.safetensors": bytes(range(256)) * 9_000,  # more than two blocks
    "model-2.safetensors": b"\0" * 77,
}
SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
WEIGHTS = [name for name in FILES if name.endswith(".safetensors")]


def git_hash(content: bytes) -> str:
    if shutil.which("git") is None:
        pytest.skip("git is the oracle here")
    command = ["git", "hash-object", "--stdin"]
    return subprocess.run(command, input=content, capture_output=True, check=True).stdout.decode().strip()


def etags() -> dict[str, str]:
    """What the hub says: sha256 of large files, git's hash of small ones."""
    return {name: SHA256[name] if name in WEIGHTS else git_hash(FILES[name]) for name in FILES}


def write_plain(root: Path) -> Path:
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    return root


def write_exported(root: Path) -> Path:
    write_integrity(write_plain(root))
    return root


def write_hub_cache(root: Path) -> Path:
    snapshot = root / "models--a--b" / "snapshots" / ("c0ffee" * 6 + "abcd")
    snapshot.mkdir(parents=True)
    (root / "models--a--b" / "blobs").mkdir()
    for name, etag in etags().items():
        (root / "models--a--b" / "blobs" / etag).write_bytes(FILES[name])
        (snapshot / name).symlink_to(f"../../blobs/{etag}")
    return snapshot


def write_local_download(root: Path) -> Path:
    write_plain(root)
    for name, etag in etags().items():
        _local_folder.write_download_metadata(root, name, commit_hash="c0ffee" * 6 + "abcd", etag=etag)
    return root


KEPT = [write_exported, write_hub_cache, write_local_download]
Writer = Callable[[Path], Path]


def hashes_of(directory: Path) -> dict[str, str]:
    with WeightHasher(directory, list(FILES)) as hasher:
        return hasher.result()


@pytest.mark.parametrize("write", [write_plain, *KEPT])
def test_good_files_give_their_sha256(tmp_path: Path, write: Writer) -> None:
    directory = write(tmp_path)
    found = hashes_of(directory)
    assert found == SHA256 and list(found) == list(FILES)
    assert set(expected_hashes(directory)) == (set() if write is write_plain else set(FILES))


@pytest.mark.parametrize("write", KEPT)
def test_every_file_that_differs_is_named(tmp_path: Path, write: Writer) -> None:
    directory = write(tmp_path)
    for name in ("config.json", "model-1.safetensors"):
        status = (directory / name).stat()
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)
        os.utime(directory / name, (status.st_atime, status.st_mtime))  # rot changes no time
    (directory / "model-2.safetensors").unlink()
    with pytest.raises(ConversionError) as error:
        hashes_of(directory)
    where = "integrity.json" if write is write_exported else "the hub"
    config, first, second = error.value.problems
    assert config.startswith(f"{directory / 'config.json'} differs from what {where} recorded (")
    assert first.startswith(
        f"{directory / 'model-1.safetensors'} differs from what {where} recorded (sha256 "
    )
    assert f"recorded {SHA256['model-1.safetensors'][:12]}…); download or copy it again" in first
    assert second == f"{directory / 'model-2.safetensors'} cannot be read: No such file or directory"


def test_which_hash_is_expected(tmp_path: Path) -> None:
    expected = expected_hashes(write_hub_cache(tmp_path))
    assert expected["config.json"] == ExpectedHash("git-sha1", git_hash(FILES["config.json"]), "the hub")
    assert expected["model-2.safetensors"].algorithm == "sha256"


def test_a_download_record_is_void_when_the_hub_would_say_so(tmp_path: Path) -> None:
    directory = write_local_download(tmp_path)
    recorded_at = _local_folder.read_download_metadata(directory, "config.json").timestamp
    for later_s in (-100, 0.5, 2, 100):
        os.utime(directory / "config.json", (recorded_at, recorded_at + later_s))
        theirs = _local_folder.read_download_metadata(directory, "config.json")
        assert ("config.json" in expected_hashes(directory)) == (theirs is not None) == (later_s < 1)


@pytest.mark.parametrize(
    "content", ["", "one line", "a\nb\nc\n", "c0ffee\n" + "0" * 64 + "\nsoon\n", "\n\n\n\n", "\xff" * 9_000]
)
def test_a_download_record_that_is_noise_says_nothing(tmp_path: Path, content: str) -> None:
    directory = write_local_download(tmp_path)
    record = directory / ".cache" / "huggingface" / "download" / "config.json.metadata"
    record.write_text(content, encoding="latin-1")
    assert set(expected_hashes(directory)) == set(FILES) - {"config.json"}
    record.write_text(
        "c0ffee\n" + "0" * 32 + f"\n{time.time()}\n"
    )  # another server's etag, no hash that we know
    assert "config.json" not in expected_hashes(directory)
    assert hashes_of(directory) == SHA256


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"algorithm": "md5", "files": {}}', '{"algorithm": "sha256", "files": {"a": 1}}',
     '{"algorithm": "sha256", "files": {"a": "00"}}', '{"algorithm": "sha256", "files": []}'],
)  # fmt: skip
def test_a_damaged_integrity_file_is_named(tmp_path: Path, content: str) -> None:
    (write_plain(tmp_path) / "integrity.json").write_text(content)
    with pytest.raises(ConversionError, match="integrity.json (is damaged|cannot be read|must hold)"):
        WeightHasher(tmp_path, list(FILES))
    (tmp_path / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": SHA256}))
    assert hashes_of(tmp_path) == SHA256


# ── the thread ──


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    counts: list[int] = []
    with WeightHasher(write_plain(tmp_path), [*FILES, *FILES], counts.append) as hasher:
        hasher.result()
    assert sum(counts) == sum(map(len, FILES.values())) and max(counts) <= 1 << 20


def test_leaving_early_cancels(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    begun = threading.Event()
    with WeightHasher(tmp_path, ["large"], lambda _: begun.set()) as hasher:
        assert begun.wait(60)
    with pytest.raises(RuntimeError, match="cancelled"):
        hasher.result()
    assert not any(thread.name == "weight-hasher" for thread in threading.enumerate())


def test_what_the_callback_raises_comes_back(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise ZeroDivisionError("mine")

    hasher = WeightHasher(write_plain(tmp_path), list(FILES), fail)
    with hasher, pytest.raises(ZeroDivisionError, match="mine"):
        hasher.result()


@pytest.mark.parametrize("change", ["altered", "absent"])
def test_an_import_reads_what_the_record_of_the_source_names(
    tmp_path: Path, small_model: Callable[..., Path], change: str
) -> None:
    checkpoint, exported = tmp_path / "ck", tmp_path / "hf"
    run_import(ImportOptions(hf_path=str(small_model()), save=checkpoint))
    run_export(ExportOptions(load=checkpoint, hf_path=exported, max_shard_size="10KB"))
    index = exported / "model.safetensors.index.json"
    if change == "altered":
        index.write_text(index.read_text() + "\n")
    else:
        (exported / "generation_config.json").unlink()
    (exported / "README.md").unlink()  # which a download for a conversion leaves out, too
    changed = {
        "altered": "index.json differs from what integrity.json",
        "absent": "generation_config.json is missing",
    }
    with pytest.raises(ConversionError, match=changed[change]):
        run_import(ImportOptions(hf_path=str(exported), save=tmp_path / "again"))


def test_a_flipped_byte_explains_its_nan(tmp_path: Path, small_model: Callable[..., Path]) -> None:
    run_import(ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck"))
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf"))
    content = bytearray((tmp_path / "hf" / "model.safetensors").read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # a NaN in the last tensor
    (tmp_path / "hf" / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match="differs from what integrity.json recorded"):
        run_import(ImportOptions(hf_path=str(tmp_path / "hf"), save=tmp_path / "again"))
