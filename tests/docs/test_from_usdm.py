"""`docs/from-usdm.md` covers the original's training page, and what it tells to write is accepted."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from usdm_megatron import cli
from usdm_megatron.cli import convert, preprocess
from usdm_megatron.config_file import section_types

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "tests/data/original_training_page.txt").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs/from-usdm.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "examples/pretrain_usdm.sh").read_text(encoding="utf-8")
SFT_EXAMPLE = (ROOT / "scripts/sft.sh").read_text(encoding="utf-8")
LORA = "with LoRA"
FLAG = re.compile(r"(?<![-\w])--?[A-Za-z][\w-]*")
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Row:
    """One line of a table: the original's cell and ours."""

    original: str
    here: str


def rows() -> list[Row]:
    found = []
    for line in GUIDE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and cells[0] not in ("original", "---"):
            found.append(Row(cells[0], cells[1]))
    return found


def commands_of_page() -> Iterator[str]:
    """The shell commands of the page's code blocks, continuation lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield " ".join(line.split())


def fragments() -> list[str]:
    """Everything in code quotes in the column `here`."""
    return sorted({fragment for row in rows() if row.here != LORA for fragment in CODE.findall(row.here)})


def whole_command(task: str) -> str:
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)]
    (command,) = (block for block in blocks if block.startswith(f"usdm-megatron {task}"))
    return command


def test_the_page_still_reads_as_expected() -> None:
    assert len(list(commands_of_page())) == 10  # 6 of the set-up, 4 launches


@pytest.mark.parametrize(
    "flag", sorted({flag for command in commands_of_page() for flag in FLAG.findall(command)})
)
def test_every_flag_of_the_page_has_a_row(flag: str) -> None:
    assert any(flag in FLAG.findall(row.original) for row in rows()), (
        f"{flag} has no row in docs/from-usdm.md"
    )


@pytest.mark.parametrize("start", sorted({" ".join(command.split()[:2]) for command in commands_of_page()}))
def test_every_command_of_the_page_has_a_row(start: str) -> None:
    assert any(start in row.original for row in rows()), f"`{start}` has no row in docs/from-usdm.md"


@pytest.mark.parametrize("script", sorted(set(re.findall(r"train_\w+\.py", PAGE))))
def test_every_script_of_the_page_has_a_row(script: str) -> None:
    assert any(script in row.original for row in rows())


@pytest.mark.parametrize(
    "statement",
    ["global batch size of 1,024", "SequentialTrainer", "RandomTrainer", "CustomMistralForCausalLM"]
    + ["option 1", "option 2", "option 3", "4.40.2", "Flash Attention 2", "512"],
)
def test_the_statements_of_the_page_have_rows(statement: str) -> None:
    assert any(statement in row.original for row in rows())


def test_no_row_is_about_a_flag_that_the_page_does_not_have() -> None:
    of_page = set(FLAG.findall(PAGE))
    for row in rows():
        assert set(FLAG.findall(row.original)) <= of_page, row.original


@pytest.mark.parametrize("fragment", fragments())
def test_what_the_guide_tells_to_write_is_accepted(fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = fragment.split()[0]
    if first.startswith("--"):
        print_config(f"usdm-megatron pretrain {fragment}", capsys)
    elif fragment.startswith("usdm-megatron pretrain"):
        print_config(fragment, capsys)
    elif fragment.startswith("python tools/convert_hf_checkpoint.py"):
        parse(convert.Command, fragment)
    elif fragment.startswith("python tools/preprocess_data.py"):
        parse(preprocess.Command, fragment)
    else:
        check_shell(fragment)


@pytest.mark.parametrize(
    ("task", "global_batch_size", "shuffle"), [("pretrain", 1024, False), ("sft", 2 * 4 * 8, True)]
)
def test_the_whole_command_resolves_to_the_original_hyperparameters(
    task: str, global_batch_size: int, shuffle: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(print_config(whole_command(task), capsys))
    assert (config["task"], config["recipe"]) == (task, "usdm")
    assert config["data"]["global_batch_size"] == global_batch_size
    assert config["data"]["seq_length"] == 8192
    assert config["data"]["shuffle"] == shuffle
    optimizer = config["optimizer"]
    assert (optimizer["lr"], optimizer["lr_decay_style"], optimizer["min_lr"]) == (2e-5, "cosine", 0)
    assert (optimizer["lr_warmup_fraction"], optimizer["weight_decay"], optimizer["clip_grad"]) == (
        0.03,
        0.01,
        0,
    )
    assert (optimizer["adam_beta1"], optimizer["adam_beta2"], optimizer["adam_eps"]) == (0.9, 0.95, 1e-8)
    assert optimizer["decay_norms"]
    assert config["training"]["bf16"]
    assert config["training"]["seed"] == 42
    assert config["training"]["loss_reduction"] == "micro-batch-mean"
    assert config["training"]["train_sample_boundaries"]


@pytest.mark.parametrize(
    ("task", "script"), [("pretrain", EXAMPLE), ("sft", SFT_EXAMPLE)], ids=["pretrain", "sft"]
)
def test_the_cluster_scripts_pass_what_the_guide_says(task: str, script: str) -> None:
    script = re.sub(r'"\$\{\w+:-(\w+)\}"', r"\1", script)  # a variable's default
    for flag, value in re.findall(r"(--[a-z][a-z0-9-]+) ([0-9][\w.-]*|cosine)(?=\s)", whole_command(task)):
        if flag not in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--clip-grad"):
            assert f"{flag} {value}" in script, f"the example of {task} lacks {flag} {value}"


def test_lora_rows_promise_nothing_that_is_not_there() -> None:
    promised = any(row.here == LORA for row in rows())
    assert promised == ("lora" not in section_types()), "these rows must name real flags once there are some"


def print_config(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    arguments = shlex.split(command)
    assert arguments[0] == "usdm-megatron"
    assert cli.main([*arguments[1:], "--print-config"]) == 0
    return capsys.readouterr().out


def parse(command_type: Any, command: str) -> None:
    tyro.cli(command_type, args=shlex.split(command)[2:])


def check_shell(fragment: str) -> None:
    """Variables, scripts and pip: the variable is read, the file is there, the extra exists."""
    words = shlex.split(fragment)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name = words.pop(0).partition("=")[0]
        readers = (
            EXAMPLE
            + (ROOT / "scripts/launch.sh").read_text(encoding="utf-8")
            + (ROOT / "scripts/setup.sh").read_text(encoding="utf-8")
        )
        assert re.search(rf"\$\{{{name}:-|{name} is not set", readers), f"no script reads {name}"
    if not words:
        return
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", fragment)
        assert all(f'"{extra}"' in (ROOT / "setup.py").read_text(encoding="utf-8") for extra in extras)
    elif words[0] == "bash":
        subprocess.run(["bash", "-n", words[1]], cwd=ROOT, check=True)
    else:
        assert words == ["source", ".venv/bin/activate"], f"what is `{fragment}`?"
