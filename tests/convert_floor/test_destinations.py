"""Where a conversion writes: what it removes, what stops it, and what is left when something does."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.convert_floor.conftest import write_hf_model
from usdm_megatron.checkpoint import commit
from usdm_megatron.checkpoint.commit import publish_directory, temporary_path
from usdm_megatron.checkpoint.distcp_writer import HashingStream
from usdm_megatron.checkpoint.threads import StoppedError, run_in_threads
from usdm_megatron.cli.convert import main
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions
from usdm_megatron.errors import ConversionError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_hf_checkpoint.py"


@pytest.fixture
def checkpoint(small_model: Callable[..., Path], tmp_path: Path) -> Path:
    run_import(ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck"))
    return tmp_path / "ck"


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 600 MB, a third of it in each of two tensors: seconds of work on any machine."""
    return write_hf_model(
        tmp_path_factory.mktemp("large") / "hf", hidden_size=256, vocab_size=200_000, num_hidden_layers=1
    )


@pytest.fixture(scope="module")
def large_checkpoint(large_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`large_model`, converted."""
    root = tmp_path_factory.mktemp("large checkpoint")
    run_import(ImportOptions(hf_path=str(large_model), save=root))
    return root


# ── what is there already ──


@pytest.mark.parametrize("name", ["hf", "h*", "hf[1]"])
def test_only_our_own_temporaries_of_that_very_name_go(checkpoint: Path, tmp_path: Path, name: str) -> None:
    work = tmp_path / "work"
    own = work / f"{name}.tmp-{'0a' * 16}"
    kept = [work / "hf.tmp-backup", work / "h1.tmp-mine", work / f"hf1.tmp-{'0' * 32}"]
    for path in (own, *kept):
        path.mkdir(parents=True)
        (path / "precious.txt").write_text("x")
    assert run_export(ExportOptions(load=checkpoint, hf_path=work / name)).removed == (own.name,)
    assert sorted(work.iterdir()) == sorted([*kept, work / name])


def test_an_import_leaves_the_temporaries_of_others_alone(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    others = tmp_path / "ck" / f"hf.tmp-{'0' * 32}"  # an export at work in the same directory
    others.mkdir(parents=True)
    assert run_import(ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck")).removed == ()
    assert others.is_dir()


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replaced_directory_is_never_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    final = tmp_path / "release"
    new = temporary_path(final)
    for path, text in ((final, "old"), (new, "new")):
        path.mkdir()
        (path / "a").write_text(text)
    if not exchanges:  # NFS, or no Linux: what is left is two renames
        monkeypatch.setattr(commit, "_exchange", lambda *_: False)
    elif sys.platform == "linux":
        monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("between two renames there is none"))
    publish_directory(new, final)
    assert (final / "a").read_text() == "new" and list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("target", ["link", "dangling", "missing/.."])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_destination_that_could_not_be_renamed_to_is_refused_first(
    checkpoint: Path, tmp_path: Path, target: str, overwrite: bool
) -> None:
    work = tmp_path / "work"
    (work / "real").mkdir(parents=True)
    (work / "link").symlink_to("real")
    (work / "dangling").symlink_to("nowhere")
    with pytest.raises(ConversionError, match="is a symbolic link|names no directory of its own"):
        run_export(ExportOptions(load=checkpoint, hf_path=work / target, overwrite=overwrite))
    assert sorted(path.name for path in work.iterdir()) == ["dangling", "link", "real"]


def test_a_link_in_the_place_of_the_checkpoint_is_refused(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "release").symlink_to("nowhere")
    with pytest.raises(ConversionError, match="release is a symbolic link"):
        run_import(ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck", overwrite=True))


def test_a_link_that_an_older_export_left_is_cleaned_up(checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / f"hf.tmp-{'0' * 32}"
    left.symlink_to(checkpoint)
    assert run_export(ExportOptions(load=checkpoint, hf_path=tmp_path / "hf")).removed == (left.name,)
    assert (checkpoint / "release").is_dir()


# ── a disk that is full ──


def run_tool(*arguments: str, most_bytes: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("most_kb", [20, 1])  # in the weights; in the tokenizer or the first small file
def test_a_full_disk_is_one_error_that_names_the_destination(
    plain_model: Path, extended: Path, tmp_path: Path, most_kb: int
) -> None:
    commands = (
        ["import", "--hf-path", str(plain_model), "--save", str(tmp_path / "ck")],
        ["export", "--load", str(extended), "--hf-path", str(tmp_path / "hf")],
    )
    for command in commands:
        done = run_tool(*command, most_bytes=most_kb << 10)
        (problem,) = done.stderr.splitlines()
        assert problem.startswith(f"error: {command[3]} {command[4]} cannot be written: File too large; free")
        assert done.returncode == 2 and list(tmp_path.iterdir()) == []


# ── stopped ──


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_conversion_soon_and_leave_nothing(
    large_model: Path, large_checkpoint: Path, tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    target, scratch = tmp_path / "out" / "target", tmp_path / "tmp"
    scratch.mkdir()
    arguments, at_work = {
        "import": (["--hf-path", large_model, "--save", target], "target/release.tmp-*/*.distcp"),
        "export": (["--load", large_checkpoint, "--hf-path", target], "target.tmp-*/*.safetensors"),
    }[command]
    process = subprocess.Popen(
        [sys.executable, str(TOOL), command, *map(str, arguments)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(target.parent.glob(at_work)):
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == code
    assert list(tmp_path.glob("out/*")) == [] and list(scratch.iterdir()) == []


def test_when_one_task_fails_the_others_give_up_at_their_next_block(tmp_path: Path) -> None:
    begun = threading.Event()
    written = []

    def write_for_ever(stopped: threading.Event) -> None:
        with HashingStream(tmp_path / "a", written.append, stopped) as stream:
            while True:
                stream.write(b"x")
                begun.set()
                time.sleep(0.001)

    def fail(stopped: threading.Event) -> None:
        begun.wait()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_in_threads([write_for_ever, fail], 2)
    assert sum(written) > 0


def test_ctrl_c_is_heard_while_tasks_run() -> None:
    given_up = []

    def wait(stopped: threading.Event) -> None:
        given_up.append(stopped.wait(60))

    def press(_: threading.Event) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_in_threads([wait, press], 2)
    assert given_up == [True]


def test_a_stopped_stream_writes_no_more(tmp_path: Path) -> None:
    stopped = threading.Event()
    with HashingStream(tmp_path / "a", stopped=stopped) as stream:
        stream.write(b"abc")
        stopped.set()
        with pytest.raises(StoppedError):
            stream.write(b"def")
        assert isinstance(stream.failure, StoppedError)
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_a_name_that_is_too_long_is_the_user_s_to_mend(
    small_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / ("n" * 300)
    assert run_guarded(main, ["import", "--hf-path", str(small_model()), "--save", str(save)]) == 2
    assert "File name too long" in capsys.readouterr().err
