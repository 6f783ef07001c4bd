"""Where `--hf-path` is: a directory of this machine, or a model of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from usdm_megatron.convert.hf_source import INDEX_FILE, SINGLE_FILE
from usdm_megatron.errors import ConversionError
from usdm_megatron.tokenizer.files import TOKENIZER_FILES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a conversion reads, and no more: some repositories hold the weights a second time
# (`consolidated.safetensors`), and offline the hub's cache must hold every file that is asked for.
_WANTED_FILES = [
    "config.json",
    "generation_config.json",
    "integrity.json",
    INDEX_FILE,
    SINGLE_FILE,
    "model-*.safetensors",
    *TOKENIZER_FILES,
]
_LISTING_TIMEOUT_S = 10.0


def locate(hf_path: str, revision: str | None, cache_dir: Path | None) -> Path:
    """The local directory of `--hf-path`: itself, or the snapshot of a hub repository.

    Raises `ConversionError` when there is no such directory and the hub does not give one; a
    repository without safetensors is refused before anything is downloaded.
    """
    try:
        local = Path(hf_path).expanduser()
        is_here = local.exists()
    except (OSError, RuntimeError, ValueError):  # no such user, too long, a zero byte
        is_here = False
    if is_here:
        if revision is not None:
            raise ConversionError(f"--hf-revision goes with a hub id; {hf_path} is a directory here")
        if cache_dir is not None:
            raise ConversionError(f"--hf-cache-dir goes with a hub id; {hf_path} is a directory here")
        return local
    if not _HUB_ID.fullmatch(hf_path):
        raise ConversionError(f"--hf-path {hf_path} does not exist")
    _refuse_without_safetensors(hf_path, revision)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hf_path, revision=revision, cache_dir=cache_dir, allow_patterns=_WANTED_FILES)
        )
    except Exception as error:  # the hub's own, its HTTP library's and the file system's have no common base
        raise ConversionError(f"--hf-path {hf_path} {_reason(error, hf_path, revision)}") from error


def _refuse_without_safetensors(repository: str, revision: str | None) -> None:
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(repository, revision=revision, timeout=_LISTING_TIMEOUT_S).siblings
    except Exception:  # the download says what is wrong, or does with what is in the cache
        return
    names = {sibling.rfilename for sibling in siblings or ()}
    if names and not names & {SINGLE_FILE, INDEX_FILE}:
        pickled = sorted(name for name in names if name.endswith(".bin"))
        holds = f"holds {pickled[0]}, a pickle, which can run code when opened, and" if pickled else "holds"
        raise ConversionError(
            f"--hf-path {repository} {holds} neither {SINGLE_FILE} nor {INDEX_FILE}; choose a --hf-revision "
            "with safetensors, or save_pretrained() it with transformers where you trust it"
        )


def _reason(error: Exception, repository: str, revision: str | None) -> str:
    """What went wrong and what helps, on one line."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    download = (
        f"`hf download {repository}` where there is a connection, and name the directory that it prints"
    )
    if isinstance(error, errors.GatedRepoError):  # is a RepositoryNotFoundError, too
        return f"is gated: accept its conditions at {page}, then `hf auth login` with a token of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision or 'main'}; {page}/tree/main lists its branches and tags"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "is neither a directory here nor a model on the hub that your account can see; check the "
            "spelling, and `hf auth login` for a private one"
        )
    if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):  # since huggingface_hub 1.x
        return f"is only partly in the cache, and the hub cannot be reached; run {download}"
    if isinstance(error, errors.OfflineModeIsEnabled) or (
        isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return (
            f"is no directory here nor in the cache, and HF_HUB_OFFLINE is set; unset it, or run {download}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"is no directory here nor in the cache, and the hub cannot be reached; run {download}"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return (
        f"is no directory here, and the hub did not give it: {type(error).__name__}: {first_line}; "
        f"run {download}"
    )
