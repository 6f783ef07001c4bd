"""`--train-data-path`: one store or a weighted blend, on the command line, in a file, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from usdm_megatron.blend_config import WeightedStore
from usdm_megatron.cli.pretrain import parse
from usdm_megatron.config import DataConfig, RunConfig
from usdm_megatron.config_file import dump_config, load_config, read_config_file
from usdm_megatron.errors import ConfigError

BLEND = (WeightedStore("a", Fraction(7, 10)), WeightedStore("b", Fraction(3, 10)))


@pytest.mark.parametrize("flag", ["--train-data-path", "--data-path", "--train_data_path"])
def test_a_blend_on_the_command_line(flag: str) -> None:
    data = parse([flag, "0.7", "a", "0.3", "b", "--seq-length", "64"])[1].data
    assert (data.train_data_path, data.train_stores, data.seq_length) == (("0.7", "a", "0.3", "b"), BLEND, 64)


@pytest.mark.parametrize("value", ["[0.7, a, 0.3, b]", "['0.7', a, '0.3', b]", "[7.0e-1, a, .3, b]"])
def test_a_blend_in_a_file(value: str, tmp_path: Path) -> None:
    """YAML reads weights as numbers; the shortest decimal that gives the same number is what was written."""
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{train_data_path: {value}}}\n")
    config = load_config(path)
    assert config.data.train_stores == BLEND
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("value", ["my data/a", "['my data/a']"])
def test_one_store_in_a_file(value: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{train_data_path: {value}}}\n")
    data = load_config(path).data
    assert data.train_data_path == ("my data/a",)
    assert data.train_stores == (WeightedStore("my data/a", Fraction(1)),)


def test_no_store_is_no_store() -> None:
    assert DataConfig().train_data_path is None
    assert DataConfig().train_stores == ()


@pytest.mark.parametrize("value", ["3", "[true, a]", "{a: 0.7}", "[[0.7, a]]"])
def test_other_types_are_no_blend(value: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{train_data_path: {value}}}\n")
    with pytest.raises(ConfigError, match="data.train_data_path: is .*; expected list or null"):
        read_config_file(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("",), "is empty; give a value or drop --train-data-path"),
        ((), "is empty; give a value or drop"),
        (("0.7", "A", "0.3", " "), "is empty"),
        (("0.7", "A", "B"), "has 3 words; a blend is pairs of weight and prefix, as in 0.7 A 0.3 B"),
        *(
            (("1", "A", weight, "B"), f": the weight of B is {weight!r}; it must be a positive number")
            for weight in ("0", "-0.3", "nan", "inf", "1e999", "C", "1/3", "0x10")
        ),
        (
            ("1", "dir/A", "2", "B", "3", "dir//./A"),
            "names dir/A 2 times; name it once, with the sum of its weights",
        ),
        (
            ("0.7 A 0.3 B",),
            "'0.7 A 0.3 B' is one word; give a blend as separate words, in YAML as a list",
        ),
    ],
    ids=str,
)
def test_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig(data=DataConfig(train_data_path=words))
    (problem,) = error.value.problems
    assert problem.startswith("data: train_data_path") and message in problem
