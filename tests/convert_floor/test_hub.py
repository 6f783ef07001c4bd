"""A hub that refuses, is not there, or holds no safetensors: one line each, with its own remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from usdm_megatron.convert.hub import locate
from usdm_megatron.errors import ConversionError

SMALL_FILES = ["README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"]
SHARDED = [
    *SMALL_FILES,
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]


class Hub:
    """Stands in for the two calls that `locate` makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, snapshot: Path) -> None:
        self.files: list[str] | Exception = SHARDED
        self.snapshot: Path | Exception = snapshot
        self.downloads: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self._model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)

    def _model_info(self, repository: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        assert 0 < timeout <= 30
        if isinstance(self.files, Exception):
            raise self.files
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def _download(self, repository: str, **options: Any) -> str:
        self.downloads.append({"repository": repository, **options})
        if isinstance(self.snapshot, Exception):
            raise self.snapshot
        return str(self.snapshot)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.chdir(tmp_path)
    return Hub(monkeypatch, tmp_path)


def refused(revision: str | None = None) -> str:
    with pytest.raises(ConversionError) as error:
        locate("org/model", revision, None)
    text = str(error.value)
    assert text.startswith("--hf-path org/model ") and "\n" not in text
    return text


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """A real one; its response belongs to whichever HTTP library huggingface_hub has."""
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    return kind("403 Client Error.\n\nand a page of text", response=response)


def test_directories_are_themselves(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert locate("org/model", None, None) == Path("org/model")  # what is here comes first
    assert not hub.downloads
    with pytest.raises(ConversionError, match="--hf-revision goes with a hub id"):
        locate("org/model", "main", None)


@pytest.mark.parametrize(
    "path", ["nowhere", "/a/b", "a/b/c", "../b", "a\0b/c", "~nobody-here/x", "x" * 5_000]
)
def test_what_is_neither_a_directory_nor_a_hub_id(hub: Hub, path: str) -> None:
    with pytest.raises(ConversionError, match="does not exist"):
        locate(path, None, None)
    assert not hub.downloads


def test_only_what_a_conversion_reads_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    listed = [
        *SHARDED, "integrity.json", "consolidated.safetensors", "consolidated.00.pth", "params.json",
        "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "onnx/model.safetensors",
        "original/model-1.safetensors", "modeling_custom.py", "flax_model.msgpack",
    ]  # fmt: skip
    hub.files = listed
    assert locate("org/model", "v1", tmp_path / "cache") == tmp_path
    (download,) = hub.downloads
    patterns = download.pop("allow_patterns")
    assert download == {"repository": "org/model", "revision": "v1", "cache_dir": tmp_path / "cache"}
    wanted = set(filter_repo_objects(listed, allow_patterns=patterns))
    assert wanted == {*SHARDED, "integrity.json"} - {"README.md"}


@pytest.mark.parametrize(
    "pickles", [["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"], []]
)
def test_a_repository_without_safetensors_is_refused_before_a_download(hub: Hub, pickles: list[str]) -> None:
    hub.files = [*SMALL_FILES, *pickles]
    text = refused()
    assert "neither model.safetensors nor model.safetensors.index.json" in text and "--hf-revision" in text
    assert ("pytorch_model-00001-of-00001.bin, a pickle" in text) == bool(pickles)
    assert not hub.downloads


@pytest.mark.parametrize(
    "failure", [ConnectionError("no route"), errors.OfflineModeIsEnabled("offline"), TimeoutError()]
)
def test_a_listing_that_fails_leaves_it_to_the_cache(hub: Hub, tmp_path: Path, failure: Exception) -> None:
    hub.files = failure
    assert locate("org/model", None, None) == tmp_path


def test_gated_missing_and_unknown_revision(hub: Hub) -> None:
    hub.files = hub.snapshot = http_error(errors.GatedRepoError)
    text = refused()
    assert (
        "is gated: accept its conditions at https://" in text
        and "/org/model" in text
        and "hf auth login" in text
    )
    hub.files = hub.snapshot = http_error(errors.RepositoryNotFoundError)
    text = refused()
    assert "neither a directory here nor a model on the hub" in text and "private" in text
    hub.files = hub.snapshot = http_error(errors.RevisionNotFoundError)
    assert "has no revision v7; https://" in refused("v7")
    assert "has no revision main" in refused()


def test_offline_by_choice_and_by_fate(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = ConnectionError()
    hub.snapshot = errors.LocalEntryNotFoundError("Got: ConnectError\nmore")
    assert (
        "is no directory here nor in the cache, and the hub cannot be reached; run `hf download org/model`"
        in refused()
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it, or run `hf download org/model`" in refused()
    hub.snapshot = errors.OfflineModeIsEnabled("offline")
    assert "HF_HUB_OFFLINE is set; unset it" in refused()
    if hasattr(errors, "IncompleteSnapshotError"):
        hub.snapshot = errors.IncompleteSnapshotError("2 file(s) are missing", snapshot_path="x")
        assert "is only partly in the cache" in refused()


def test_anything_else_is_one_line_with_its_own_words(hub: Hub) -> None:
    hub.snapshot = OSError(28, "No space left on device\nand more")
    assert (
        "the hub did not give it: OSError: [Errno 28] No space left on device; run `hf download" in refused()
    )
    hub.snapshot = http_error(errors.HfHubHTTPError)
    assert "HfHubHTTPError: 403 Client Error.; run" in refused()
    hub.snapshot = ValueError()
    assert "did not give it: ValueError: ; run" in refused()


def test_the_real_library_with_an_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConversionError, match="org/model is no directory here nor in the cache, and HF_HUB_OFFLINE is set"
    ):
        locate("org/model", None, tmp_path / "cache")


def test_the_real_library_with_a_full_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--org--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert locate("org/model", None, tmp_path / "cache") == repository.resolve() / "snapshots" / commit
