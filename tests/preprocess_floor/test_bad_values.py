"""Numbers, names and limits that no preprocessing can use: one message each, exit code 2, no traceback."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpora_floor.speech import make_records, write_jsonl
from usdm_megatron.cli import preprocess as preprocess_cli
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.preprocess import merged_samples

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
SPEECH = ["speech-text", "--tokenizer", "T", "--manifest", "m.jsonl"]


def run(*arguments: object) -> int:
    return run_guarded(preprocess_cli.main, [str(argument) for argument in arguments])


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Input of several commands, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("ids.txt").write_text("1 4000000000 2\n")
    Path("sft.txt").write_text("1 4000000000 2|-100 4000000000 2\n")
    write_jsonl(Path("m.jsonl"), make_records(5))
    write_mistral_tokenizer(tmp_path / "T")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("packed --input ids.txt --text-vocab-size 5000000000", "5000010003 ids, the most is 2147483648"),
        ("sft --input sft.txt --text-vocab-size 5000000000", "5000010003 ids, the most is 2147483648"),
        ("packed --repack --input ids.txt --text-vocab-size 2147483648", "the most is 2147483648 "),
        ("packed --input ids.txt --seq-length 9000000000000000000", "--seq-length is .* most 2147483647"),
        ("speech-text --tokenizer T --manifest m.jsonl --epochs 2000000000", "--epochs is .* most 65536"),
        ("speech-text --tokenizer T --manifest m.jsonl --epochs 99999999999999", "--epochs is .* most 65536"),
        ("packed --input ids.txt --workers 1000000000000", "--workers is .* most 4096"),
    ],
)
def test_numbers_too_large(
    corpora: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    """Ids would wrap around in the store, lists would fill the memory."""
    before = set(corpora.iterdir())
    assert run(*command.split(), "--output-prefix", "P") == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert set(corpora.iterdir()) == before


def test_ids_up_to_the_bound_are_stored(corpora: Path) -> None:
    Path("ids.txt").write_text("1 2147483644 2\n")
    assert run("packed", "--input", "ids.txt", "--text-vocab-size", 2147473645, "--output-prefix", "P") == 0
    assert Path("P.bin").read_bytes()[4:8] == (2147483644).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", "--output-prefix is '', which begins no file name; the prefix is a directory and the"),
        ("sub/", "--output-prefix is 'sub/', which begins no file name"),
        (".", "--output-prefix is '.', which begins no file name"),
        ("sub/..", "begins no file name"),
        ("x" * 260, "--output-prefix ends with a name of 260 bytes, the most is 200"),
        ("sub/" + "ä" * 101, "--output-prefix ends with a name of 202 bytes"),
        ("x" * 260 + "/P", "File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["packed --input ids.txt", "merge"])
def test_prefixes_that_name_nothing(
    corpora: Path, capsys: pytest.CaptureFixture[str], command: str, prefix: str, message: str
) -> None:
    before = set(corpora.iterdir())
    assert run(*command.split(), "--output-prefix", prefix) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert set(corpora.iterdir()) == before


def test_the_longest_name_that_is_allowed(corpora: Path) -> None:
    assert run(*SPEECH, "--split", "0.8,0.2", "--output-prefix", "x" * 200) == 0
    assert Path("x" * 200 + "_train.bin").exists()


@pytest.mark.parametrize(
    ("command", "most_bytes"),
    [
        ("packed --workers 2 --input ids.txt --vocab text --text-vocab-size 2147483648", 1 << 20),
        ("sft --workers 2 --input sft.txt --vocab text --text-vocab-size 2147483648", 1 << 20),
        ("speech-text --workers 1 --tokenizer T --manifest m.jsonl", 1000),  # the tokenizer's copy
    ],
)
def test_a_limit_of_file_sizes(corpora: Path, command: str, most_bytes: int) -> None:
    ended = subprocess.run(
        [sys.executable, str(TOOL), *command.split(), "--output-prefix", "P"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(r"error: .*File too large.*\(ulimit -f\)\n", ended.stderr)


def test_the_lengths_of_stage_2_are_not_replaced(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data_epoch0.txt").write_text("1 5 2\n")
    Path("data_epoch0.json").write_text("[3]")
    arguments = ["samples", "--input", "data_epoch0.txt", "--output-prefix", "data_epoch0"]
    assert run(*arguments, "--overwrite") == 2
    assert "data_epoch0.json: there is no data_epoch0.bin to it" in capsys.readouterr().err
    assert json.loads(Path("data_epoch0.json").read_text()) == [3]


def test_a_list_that_was_cut_says_so(
    corpora: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_records(6)
    write_jsonl(Path("m.jsonl"), [*records[:3], *({**record, "words": []} for record in records[3:])])
    for module in (merged_samples, preprocess_cli):
        monkeypatch.setattr(module, "LISTED_REJECTIONS", 2)
    assert run(*SPEECH, "--output-prefix", "P") == 0
    assert "P_report.json lists the first 2\n" in capsys.readouterr().out
    report = json.loads(Path("P_report.json").read_text())
    assert (len(report["listed"]), report["not_listed"]) == (2, 1)


def test_blank_lines_alone(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.jsonl").write_text("\n\n")
    assert run(*SPEECH, "--output-prefix", "P") == 2
    assert "m.jsonl: gives no sample, and an empty store cannot be trained" in capsys.readouterr().err
