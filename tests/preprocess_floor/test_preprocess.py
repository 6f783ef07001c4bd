"""The preprocessor as a user calls it, tokenizers, and `inspect store`."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import xxhash

from usdm_megatron.cli import inspect_store as inspect_cli
from usdm_megatron.cli import preprocess as preprocess_cli
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.data.token_store import SourceFile, StorePaths, TokenStore
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.errors import ConfigError, DataError
from usdm_megatron.preprocess import row_sources
from usdm_megatron.preprocess.executors import ProcessExecutor, SerialExecutor
from usdm_megatron.preprocess.stores import (
    ROWS_WITHOUT_BOS,
    StoreOptions,
    WorkOptions,
    preprocess_cache,
    preprocess_packed,
)
from usdm_megatron.tokenizer.files import extend_tokenizer
from usdm_megatron.tokenizer.identity import tokenizer_sha256, tokenizer_size
from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind, Vocabulary

REPOSITORY = Path(__file__).parents[2]
ROWS = [[1, 300, 32_005, 2, 1, 32_000, 2], [1, 32_001, 42_001, 2], [77, 2, 1, 2]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    splits = {
        "train": datasets.Dataset.from_dict({"input_ids": ROWS}),
        "test": datasets.Dataset.from_dict({"input_ids": ROWS[:1]}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    (tmp_path / "part10.txt").write_text(" ".join(map(str, ROWS[2])))
    (tmp_path / "part2.txt").write_text("\n".join(" ".join(map(str, row)) for row in ROWS[:2]))
    return [tmp_path / "part10.txt", tmp_path / "part2.txt"]


def run(*arguments: object) -> int:
    return run_guarded(preprocess_cli.main, [str(argument) for argument in arguments])


def stores_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix in (".bin", ".idx", ".json", ".tmp")}


def files(directory: Path, prefix: str) -> list[bytes]:
    return [path.read_bytes() for path in StorePaths.of(directory / prefix)]


def test_both_inputs_give_the_same_store(tmp_path: Path, cache: Path, parts: list[Path]) -> None:
    from_cache = preprocess_cache(cache, str(tmp_path / "C"), StoreOptions(seq_length=10)).summaries
    from_text = preprocess_packed(parts, str(tmp_path / "T"), StoreOptions(seq_length=10)).summaries
    assert sorted(from_cache) == [str(tmp_path / "C_test"), str(tmp_path / "C_train")]
    train, text = TokenStore.open(tmp_path / "C_train"), TokenStore.open(tmp_path / "T")
    assert train.identity == text.identity
    assert [text.row(n).tokens.tolist() for n in range(text.rows)] == ROWS
    assert [text.row(n).sample_lengths.tolist() for n in range(3)] == [[4, 3], [4], [2, 2]]
    assert TokenStore.open(tmp_path / "C_test").rows == 1
    assert text.summary == from_text[str(tmp_path / "T")]
    assert text.summary.notices == {ROWS_WITHOUT_BOS: 1}
    options = dict(text.summary.options)
    assert options.pop("plan")["stores"] == [""]
    assert options == {"command": "packed", "seq_length": 10}
    assert text.summary.vocabulary == USDM_VOCABULARY
    assert [(source.name, source.hash) for source in text.summary.sources] == [
        (path.name, f"xxh128:{xxhash.xxh3_128(path.read_bytes()).hexdigest()}") for path in reversed(parts)
    ]
    assert text.summary.fill == 15 / 30


def test_stores_whose_sources_have_another_hash(tmp_path: Path, parts: list[Path]) -> None:
    preprocess_packed(parts, str(tmp_path / "P"), StoreOptions(seq_length=10))
    record = json.loads((tmp_path / "P.json").read_text())
    record["sources"] = [{"name": "x", "bytes": 5, "sha256": "ab"}]
    (tmp_path / "P.json").write_text(json.dumps(record))
    assert TokenStore.open(tmp_path / "P").summary.sources == (SourceFile("x", 5, "sha256:ab"),)


def test_many_parts_from_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than places in the memory that workers share with the parent."""
    monkeypatch.setattr(row_sources, "TEXT_BLOCK_BYTES", 1000)
    rng = np.random.default_rng(0)
    rows = [[1, *rng.integers(3, 42_003, length), 2] for length in rng.integers(1, 60, 500)]
    (tmp_path / "part0.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    for name, executor in {"one": SerialExecutor(), "two": ProcessExecutor(2)}.items():
        work = WorkOptions(executor)
        preprocess_packed([tmp_path / "part0.txt"], str(tmp_path / name), StoreOptions(seq_length=99), work)
    store = TokenStore.open(tmp_path / "two")
    assert [store.row(number).tokens.tolist() for number in range(store.rows)] == rows
    assert files(tmp_path, "one") == files(tmp_path, "two")


def test_a_single_dataset_gives_one_store(tmp_path: Path, cache: Path) -> None:
    preprocess_cache(cache / "train", str(tmp_path / "S"), StoreOptions())
    assert TokenStore.open(tmp_path / "S").rows == 3


def test_many_blocks_equal_plain_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 42_003, rng.integers(1, 60)).tolist() for _ in range(3000)]
    (tmp_path / "p.txt").write_text("\n".join(" ".join(map(str, row)) for row in rows))
    preprocess_packed([tmp_path / "p.txt"], str(tmp_path / "P"), StoreOptions())
    store = TokenStore.open(tmp_path / "P")
    assert [store.row(n).tokens.tolist() for n in range(store.rows)] == rows
    assert store.summary.largest_id == max(map(max, rows))
    assert store.longest_row == max(map(len, rows))


# --- the command line


def test_the_commands_of_the_architecture(
    tmp_path: Path, cache: Path, parts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cache", "--input", cache, "--output-prefix", tmp_path / "out" / "P") == 0
    assert stores_in(tmp_path / "out") == {
        f"P_{split}.{suffix}" for split in ("train", "test") for suffix in ("bin", "idx", "json")
    }
    printed = capsys.readouterr().out
    assert "P_train: 3 rows, 5 samples, 15 tokens, 0.1% full, longest row 7, largest id 42,001" in printed
    assert "notice: rows_without_leading_bos: 1" in printed
    # snake spelling, several files after one --input
    assert run("packed", "--input", *parts, "--output_prefix", tmp_path / "Q", "--seq_length", 7) == 0
    assert TokenStore.open(tmp_path / "Q").summary.row_capacity == 7
    assert run("packed", "--input", parts[0], "--output-prefix", tmp_path / "Q") == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err
    assert run("packed", "--input", parts[0], "--output-prefix", tmp_path / "Q", "--overwrite") == 0
    assert TokenStore.open(tmp_path / "Q").rows == 1


def test_the_tool_runs_from_a_checkout_without_torch(tmp_path: Path, cache: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py")]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    print('exit', ended.code, 'torch' in sys.modules, 'megatron' in sys.modules)"
    )
    arguments = ["cache", "--input", str(cache), "--output-prefix", str(tmp_path / "P")]
    ended = subprocess.run(
        [command[0], "-c", code, command[1], *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "exit 0 False False", ended.stderr
    ended = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["cache", "--input", "x", "--output-prefix", "y", "--shards", "3"],
        ["cache", "--output-prefix", "y"],
        ["packed", "--input", "x"],
        ["paked", "--input", "x", "--output-prefix", "y"],
        [],
    ],
)
def test_unknown_or_missing_flags_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-length", "6"], "row 0 (.*part2.txt line 1) holds 7 tokens, more than --seq-length 6"),
        (["--seq-length", "0"], "--seq-length is 0, the least is 1"),
        (["--vocab", "text"], "row 0 (.*part2.txt line 1) holds id 32005, outside the vocabulary of 32000"),
        (["--text-vocab-size", "31990"], "row 1 (.*part2.txt line 2) holds id 42001, outside .* 41993"),
        (["--text-vocab-size", "2"], "--text-vocab-size is 2, the least is 3"),
        (["--tokenizer", "/nowhere"], "/nowhere: neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    tmp_path: Path, parts: list[Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    import re

    assert run("packed", "--input", *parts, "--output-prefix", tmp_path / "P", *arguments) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message.replace('(', '[(]').replace(')', '[)]')}.*\n", printed), printed
    assert stores_in(tmp_path) == set()


def test_a_bad_test_split_publishes_no_train_split(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    splits = {
        "train": datasets.Dataset.from_dict({"input_ids": ROWS}),
        "test": datasets.Dataset.from_dict({"input_ids": [[1, 2], [1, 42_003]]}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "cache")
    with pytest.raises(DataError, match=r"P_test: row 1 \(.*cache test row 1\) holds id 42003"):
        preprocess_cache(tmp_path / "cache", str(tmp_path / "P"), StoreOptions())
    assert stores_in(tmp_path) == set()


def test_other_vocabularies(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("1 99999 2\n")
    assert (
        run("packed", "--input", tmp_path / "p.txt", "--output-prefix", tmp_path / "P",
            "--vocab", "text", "--text-vocab-size", 100_000)
        == 0
    )  # fmt: skip
    store = TokenStore.open(tmp_path / "P")
    assert store.summary.vocabulary == Vocabulary(text_size=100_000, unit_count=0)
    assert store.row(0).tokens.dtype == np.int32
    assert store.row(0).tokens.tolist() == [1, 99_999, 2]


@pytest.mark.parametrize("command", ["packed", "cache", "samples", "sft", "speech-text", "dialog", "merge"])
def test_a_file_in_place_of_the_output_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "c.jsonl").write_text("{}")
    flags = {"merge": [], "speech-text": ["--tokenizer", "T", "--manifest", "absent"]}
    default = ["--input", "absent", *(["--tokenizer", "T"] if command == "dialog" else [])]
    for prefix in ("c.jsonl/y", "c.jsonl/y/z"):
        assert run(command, *flags.get(command, default), "--output-prefix", tmp_path / prefix) == 2
        errors = capsys.readouterr().err.splitlines()  # nothing is said of the input: it was not read
        assert len(errors) == 1 and f"but {tmp_path / 'c.jsonl'} is a file; the prefix is" in errors[0]


# --- tokenizers


def write_fast_tokenizer(directory: Path, text: int, added: int) -> Path:
    directory.mkdir()
    record = {
        "model": {"type": "BPE", "vocab": {f"t{n}": n for n in range(text)}},
        "added_tokens": [{"id": text + n, "content": f"a{n}"} for n in range(added)],
    }
    (directory / "tokenizer.json").write_text(json.dumps(record))
    return directory


def mistral_model() -> Path:
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def test_a_tokenizer_of_the_right_size_is_recorded(tmp_path: Path, parts: list[Path]) -> None:
    tokenizer = write_fast_tokenizer(tmp_path / "tokenizer", 32_000, 10_003)
    preprocess_packed(parts, str(tmp_path / "P"), StoreOptions(tokenizer=tokenizer))
    expected = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert TokenStore.open(tmp_path / "P").summary.tokenizer_sha256 == expected == tokenizer_sha256(tokenizer)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    tokenizer = write_fast_tokenizer(tmp_path / "tokenizer", 32_000, 0)
    with pytest.raises(DataError, match="the tokenizer has 32000 ids, the vocabulary 42003; pass the"):
        preprocess_packed(parts, str(tmp_path / "P"), StoreOptions(tokenizer=tokenizer))
    assert not (tmp_path / "P.bin").exists()


@pytest.mark.parametrize("command", ["packed", "cache", "samples", "sft"])
def test_the_vocabulary_is_the_tokenizers(tmp_path: Path, command: str) -> None:
    vocabulary = Vocabulary(unit_count=100, extra_tokens=("<a>", "<b>"))
    extend_tokenizer(write_mistral_tokenizer(tmp_path / "plain"), tmp_path / "T", vocabulary, 10)
    row = [1, 300, vocabulary.pad_id - 1, 2]
    ids = " ".join(map(str, row))
    (tmp_path / "in.txt").write_text(f"{ids}|{ids}" if command == "sft" else ids)
    (tmp_path / "in.json").write_text("[4]")
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [row]}), tmp_path / "in.parquet")
    file = tmp_path / ("in.parquet" if command == "cache" else "in.txt")
    arguments = [command, "--input", file, "--output-prefix", tmp_path / "P", "--tokenizer", tmp_path / "T"]
    assert run(*arguments, "--text-vocab-size", 32_000) == 2  # 42,003 ids: the flags come first
    assert run(*arguments) == 0
    summary = TokenStore.open(tmp_path / "P").summary
    assert summary.vocabulary == vocabulary
    assert summary.tokenizer_sha256 == tokenizer_sha256(tmp_path / "T")


def test_sentencepiece_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(mistral_model().read_bytes())
    assert tokenizer_size(tmp_path) == 32_000
    assert tokenizer_sha256(tmp_path) == hashlib.sha256(mistral_model().read_bytes()).hexdigest()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 42_002}))
    assert tokenizer_size(tmp_path) == 42_003
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"42010": {}}}))
    assert tokenizer_size(tmp_path) == 42_011
    write_fast_tokenizer(tmp_path / "fast", 50, 2)
    (tmp_path / "fast" / "tokenizer.model").write_bytes(b"ignored beside tokenizer.json")
    assert tokenizer_size(tmp_path / "fast") == 52


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": {}}}'),
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer.model", b"not a model"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: cannot be read as a tokenizer"):
        tokenizer_size(tmp_path)


def test_unigram_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}))
    assert tokenizer_size(tmp_path) == 2


def test_options_are_valid_from_birth() -> None:
    with pytest.raises(ConfigError, match="--seq-length is -5"):
        StoreOptions(seq_length=-5)


# --- inspect store


def test_inspect_counts_tokens_by_kind(
    tmp_path: Path, parts: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from usdm_megatron.data import inspect_store

    preprocess_packed(parts, str(tmp_path / "P"), StoreOptions(seq_length=8))
    store = TokenStore.open(tmp_path / "P")
    monkeypatch.setattr(store, "token_chunks", lambda: TokenStore.token_chunks(store, 4))
    report = inspect_store.count_tokens(store)
    assert report.tokens_by_kind == {
        TargetKind.TEXT: 2,
        TargetKind.UNIT: 2,
        TargetKind.CONTINUE: 1,
        TargetKind.CORRESPOND: 1,
        TargetKind.EOS: 5,
        TargetKind.BOS: 4,
    }
    assert report.largest_id == 42_001
    assert run_guarded(inspect_cli.main, [str(tmp_path / "P"), "--verify"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "rows 3 samples 5 (1.7 a row) tokens 15 longest row 7 of 8 fill 62.5% largest id 42,001 of 42,003",
        "text 2 13.3% unit 2 13.3% continue 1 6.7% correspond 1 6.7% eos 5 33.3% bos 4 26.7%",
        "notice rows_without_leading_bos: 1",
        "every byte matches its checksum",
    ):
        assert expected in printed


def test_inspect_of_a_damaged_store(
    tmp_path: Path, parts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(inspect_cli.main, [str(tmp_path / "P")]) == 2
    assert "no token store" in capsys.readouterr().err
    preprocess_packed(parts, str(tmp_path / "P"), StoreOptions())
    content = bytearray((tmp_path / "P.bin").read_bytes())
    content[2:4] = b"\xff\xff"
    (tmp_path / "P.bin").write_bytes(content)
    assert run_guarded(inspect_cli.main, [str(tmp_path / "P")]) == 2
    assert "P.bin: holds ids outside its vocabulary of 42003" in capsys.readouterr().err
    assert run_guarded(inspect_cli.main, [str(tmp_path / "P"), "--verify"]) == 2
    printed = capsys.readouterr()
    assert "sha256 is" in printed.err
    assert printed.out == ""
