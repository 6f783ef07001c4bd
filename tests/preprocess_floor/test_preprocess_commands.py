"""Every command of the preprocessor gives the same bytes however the work is divided, or interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.corpora_floor.speech import make_records, write_jsonl
from usdm_megatron.cli import preprocess as preprocess_cli
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.preprocess import executors
from usdm_megatron.vocab import USDM_VOCABULARY

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
SEQ_LENGTH = 400


def run(*arguments: object) -> int:
    return run_guarded(preprocess_cli.main, [str(argument) for argument in arguments])


def sample_lines(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    vocabulary = USDM_VOCABULARY
    return [
        " ".join(map(str, [vocabulary.bos_id, *rng.integers(3, vocabulary.pad_id, rng.integers(5, 180)), 2]))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input of every command, several files each: a file is at least one part."""
    import datasets
    import mistral_common

    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("corpora")
    for epoch in range(4):
        lines = sample_lines(30, epoch)
        (root / f"data_epoch{epoch}.txt").write_text("\n".join(lines) + "\n")
        (root / f"data_epoch{epoch}.json").write_text(json.dumps([len(line.split()) for line in lines]))
        rows = [f"{one} {other}" for one, other in zip(lines[::2], lines[1::2], strict=True)]
        (root / f"part{epoch}.txt").write_text("\n".join(rows) + "\n")
        ids = [line.split() for line in lines]
        labels = [["-100"] * 3 + line[3:] for line in ids]
        both = [f"{' '.join(one)}|{' '.join(other)}" for one, other in zip(ids, labels, strict=True)]
        (root / f"sft{epoch}.txt").write_text("\n".join(both) + "\n")
        records = make_records(20, seed=epoch, words=(5, 10))
        for record in records:
            record["id"] = f"{epoch} {record['id']}"
        write_jsonl(root / f"manifest{epoch}.jsonl", [*records, records[0]])  # one id comes twice
        dialogs = [{"id": f"{epoch} {n}", "turns": turns(records[n : n + 4])} for n in range(0, 16, 2)]
        write_jsonl(root / f"dialogs{epoch}.jsonl", dialogs)
    splits = {
        name: datasets.Dataset.from_dict({"input_ids": [list(map(int, row.split())) for row in rows]})
        for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(root / "cache")
    (root / "tokenizer").mkdir()
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (root / "tokenizer" / "tokenizer.model").write_bytes(model.read_bytes())
    return root


def turns(records: list[dict]) -> list[dict]:
    return [
        {
            "speaker": str(number % 2),
            "text": " ".join(word["text"] for word in record["words"]),
            "units": record["units"][:40],
        }
        for number, record in enumerate(records)
    ]


def command(corpora: Path, name: str) -> list[str]:
    """The command line without --output-prefix."""
    files = {
        stem: [str(corpora / f"{stem}{epoch}{suffix}") for epoch in range(4)]
        for stem, suffix in (
            ("part", ".txt"),
            ("data_epoch", ".txt"),
            ("sft", ".txt"),
            ("manifest", ".jsonl"),
            ("dialogs", ".jsonl"),
        )
    }
    tokenizer = ["--tokenizer", str(corpora / "tokenizer")]
    lines = {
        "packed": ["packed", "--input", *files["part"]],
        "packed repack": ["packed", "--repack", "--split", "0.9,0.1", "--input", *files["part"]],
        "cache": ["cache", "--input", str(corpora / "cache")],
        "cache repack": ["cache", "--repack", "--input", str(corpora / "cache")],
        "samples": ["samples", "--split", "0.8,0.2", "--input", *files["data_epoch"]],
        "sft": ["sft", "--packing", "best-fit", "--input", *files["sft"]],
        "speech-text": ["speech-text", *tokenizer, "--epochs", "2", "--manifest", *files["manifest"]],
        "dialog": ["dialog", *tokenizer, "--input", *files["dialogs"]],
    }
    return [*lines[name], "--seq-length", str(2000 if name in ("speech-text", "dialog") else SEQ_LENGTH)]


COMMANDS = ["packed", "packed repack", "cache", "cache repack", "samples", "sft", "speech-text", "dialog"]


def outputs(directory: Path, name: str = "P") -> dict[str, bytes]:
    """Every file that is left beside the input."""
    return {
        path.name.replace(name, "P"): path.read_bytes()
        for path in directory.glob(f"{name}*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def reference(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What one process writes in one go."""
    known: dict[str, dict[str, bytes]] = {}

    def of(name: str) -> dict[str, bytes]:
        if name not in known:
            out = tmp_path_factory.mktemp("reference")
            assert run(*command(corpora, name), "--output-prefix", out / "P", "--workers", 1) == 0
            known[name] = outputs(out)
            assert {path.name for path in out.iterdir()} == set(known[name])  # no parts, no temporaries
        return known[name]

    return of


@pytest.mark.parametrize("name", COMMANDS)
def test_stores_are_whole(
    corpora: Path, reference: Callable[[str], dict[str, bytes]], name: str, tmp_path: Path
) -> None:
    for file, content in reference(name).items():
        (tmp_path / file).write_bytes(content)
    prefixes = {
        "packed": ["P"], "sft": ["P"], "speech-text": ["P"], "dialog": ["P"],
    }.get(name, ["P_train", "P_test"])  # fmt: skip
    for prefix in prefixes:
        store = TokenStore.open(tmp_path / prefix)
        store.verify()
        assert store.summary.tokenizer_sha256 is not None or name not in ("speech-text", "dialog")
        assert (store.row_targets() is not None) == (name in ("sft", "dialog"))
    assert {file for file in reference(name) if file.endswith(".json")} == {
        *(f"{prefix}.json" for prefix in prefixes),
        *([] if name in ("packed", "cache") else ["P_report.json"]),
    }


@pytest.mark.parametrize(("name", "workers"), [(name, workers) for name in COMMANDS for workers in (2, 4)])
def test_workers(
    corpora: Path, reference: Callable[[str], dict[str, bytes]], name: str, workers: int, tmp_path: Path
) -> None:
    assert run(*command(corpora, name), "--output-prefix", tmp_path / "P", "--workers", workers) == 0
    assert outputs(tmp_path) == reference(name)


@pytest.mark.parametrize(
    ("name", "order"), [(name, order) for name in COMMANDS for order in ([2, 0, 1], [0])]
)
def test_shards(
    corpora: Path,
    reference: Callable[[str], dict[str, bytes]],
    name: str,
    order: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*command(corpora, name), "--output-prefix", tmp_path / "P", "--workers", 1]
    for shard in order:
        assert run(*arguments, "--shard", f"{shard}/{len(order)}") == 0
        assert "P.parts: this shard is done; `merge` joins them all" in capsys.readouterr().out
        assert {path.name for path in tmp_path.iterdir()} == {"P.parts"}
    assert run("merge", "--output-prefix", tmp_path / "P", "--workers", 1) == 0
    assert outputs(tmp_path) == reference(name)
    assert not (tmp_path / "P.parts").exists()
    for again in ([*arguments, "--shard", f"0/{len(order)}"], ["merge", "--output-prefix", tmp_path / "P"]):
        assert run(*again) == 0
        assert "P: already done\n" in capsys.readouterr().out
    assert outputs(tmp_path) == reference(name)
    assert not (tmp_path / "P.parts").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with executors._ray_session(executors._import_ray(), 2):
        yield


@pytest.mark.parametrize("name", COMMANDS)
def test_ray(
    corpora: Path, reference: Callable[[str], dict[str, bytes]], name: str, tmp_path: Path, cluster: None
) -> None:
    assert run(*command(corpora, name), "--output-prefix", tmp_path / "P", "--executor", "ray") == 0
    assert outputs(tmp_path) == reference(name)


def test_the_place_of_the_output_does_not_matter(
    corpora: Path, reference: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    assert run(*command(corpora, "samples"), "--output-prefix", tmp_path / "a" / "Q", "--workers", 1) == 0
    assert outputs(tmp_path / "a", "Q") == reference("samples")


# --- interrupted


def start(arguments: list[str], prefix: Path, workers: int) -> subprocess.Popen[bytes]:
    line = [sys.executable, str(TOOL), *arguments, "--output-prefix", str(prefix), "--workers", str(workers)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize("name", ["packed", "samples"])
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_command_leaves_no_store_and_goes_on(
    corpora: Path, reference: Callable[[str], dict[str, bytes]], name: str, seed: int, tmp_path: Path
) -> None:
    """Killed after a random number of file events (or done before), again and again, then left alone."""
    draw = random.Random(seed)
    wanted = reference(name)
    for _ in range(3):
        process = start(command(corpora, name), tmp_path / "P", workers=1 + seed % 2)
        deadline = time.monotonic() + 30
        events_left = draw.randint(1, 12)
        seen: set[str] = set()
        while process.poll() is None and events_left > 0 and time.monotonic() < deadline:
            now = {str(path) for path in tmp_path.rglob("*")}
            events_left -= len(now ^ seen) > 0
            seen = now
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = outputs(tmp_path)
        whole = {file for file in found if file.endswith(".json") and not file.endswith("_report.json")}
        for file in whole:  # a store that is there is whole
            TokenStore.open(tmp_path / file.removesuffix(".json")).verify()
    process = start(command(corpora, name), tmp_path / "P", workers=2)
    _, errors = process.communicate(timeout=60)
    done_before = (
        process.returncode == 2 and b"exists already" in errors and set(outputs(tmp_path)) == set(wanted)
    )
    assert process.returncode == 0 or done_before, errors
    assert outputs(tmp_path) == wanted


STAGES = ["part-00002.json", "sources-00000.json", "P.parts/published 0", "P_train.bin", "P_test.idx",
          "P_test.json", "P_train.json", "P_report.json", "P.parts/published 1", "unlink"]  # fmt: skip

KILLED = """
import os, signal, sys
from pathlib import Path
stage = sys.argv.pop(1)
name, _, skip = stage.partition(" ")
skip = int(skip or 0)
replace, unlink = os.replace, Path.unlink
def killing_replace(source, target):
    global skip
    if str(target).endswith(name):
        skip -= 1
        if skip < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
def killing_unlink(self, **options):
    if stage == "unlink" and "part-00001" in self.name and (self.parent / "published").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    unlink(self, **options)
os.replace, Path.unlink = killing_replace, killing_unlink
from usdm_megatron.cli.preprocess import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_stage(
    corpora: Path, reference: Callable[[str], dict[str, bytes]], stage: str, tmp_path: Path
) -> None:
    arguments = [*command(corpora, "samples"), "--output-prefix", str(tmp_path / "P"), "--workers", "1"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, stage, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "P.parts").exists()
    assert run(*arguments) == 0
    assert outputs(tmp_path) == reference("samples")
    assert not (tmp_path / "P.parts").exists()


def test_ctrl_c_ends_the_workers_and_leaves_no_store(
    corpora: Path, reference: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    arguments = [*command(corpora, "samples"), "--output-prefix", str(tmp_path / "P"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == b"parts begun\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)  # until no worker holds the pipe
    assert (process.returncode, errors) == (130, b"interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"P.parts"}
    assert run(*arguments) == 0
    assert outputs(tmp_path) == reference("samples")


SLOW = """
import sys, time
from usdm_megatron.cli import preprocess
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.cli.preprocess_flags import StoreFlags
from usdm_megatron.preprocess.stores import WorkOptions
def work(flags):
    def progress(done, of):
        print("parts begun", flush=True)
        time.sleep(60)
    return WorkOptions(flags.open_executor(), None, False, progress)
StoreFlags.work = work
if __name__ == "__main__":
    sys.exit(run_guarded(preprocess.main, sys.argv[1:]))
"""


# --- what the user is told


def test_what_was_rejected_is_said(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*command(corpora, "speech-text"), "--output-prefix", tmp_path / "P"]
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "P_report.json").read_text())
    assert (
        report["rejected"]["by_reason"]["duplicate_id"] == 4
    )  # one id of each of 4 files, not once an epoch
    assert [one["where"] for one in report["listed"]] == [f"{file} speaker0/utt_0" for file in range(4)]
    assert f"rejected: {report['rejected']['total']} (" in printed
    assert "duplicate_id 4" in printed and "P_report.json lists them" in printed
    assert run(*arguments, "--overwrite", "--strict") == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in errors)
    assert errors[-1] == "error: --strict allows no rejection: mend the input, or leave the flag out"
    TokenStore.open(tmp_path / "P").verify()  # the old one stays


def test_targets_are_said(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command(corpora, "sft"), "--output-prefix", tmp_path / "P") == 0
    store = TokenStore.open(tmp_path / "P")
    assert store.summary.loss_mask is not None
    assert store.summary.loss_mask.targets == store.tokens - 3 * store.summary.samples
    assert f"  targets: {store.summary.loss_mask.targets:,} (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["packed", "--input", "x", "--seed", "3"], "--seed: rows are taken as they are; add --repack"),
        (["packed", "--input", "x", "--strict", "--packing", "none"], "--packing, --strict: rows are taken"),
        (["samples", "--input", "x", "--split", "0.9"], "--split is '0.9'; it takes the shares"),
        (["samples", "--input", "x", "--split", "0.9,0.2"], "--split is 0.9,0.2; it takes the shares"),
        (["samples", "--input", "x", "--workers", "0"], "--workers is 0, the least is 1"),
        (["samples", "--input", "x", "--workers", "1000000000000"], "the least is 1 and the most 4096"),
        (["samples", "--input", "x", "--shard", "3"], "--shard is '3'; it takes i/n"),
        (["samples", "--input", "x", "--shard", "3/3"], "--shard is 3/3; of n shards"),
        (["speech-text", "--tokenizer", "x"], "pass either --manifest FILE … or both --unit-root"),
        (["speech-text", "--tokenizer", "x", "--unit-root", "y"], "pass either --manifest FILE"),
        (
            ["dialog", "--tokenizer", "T", "--input", "x", "--metadata", "y"],
            "--metadata goes with DailyTalk's",
        ),
        (["merge"], "P.parts: no parts here; make them first"),
    ],
)
def test_flags_that_do_not_go_together(
    corpora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("1 5 2\n")
    given = [str(corpora / "tokenizer") if argument == "T" else argument for argument in arguments]
    assert run(*given, "--output-prefix", "P") == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"x"}
