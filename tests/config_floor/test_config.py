"""`RunConfig`: valid from birth, to YAML and back, and the layers that it is merged from."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.cli import pretrain, sft
from usdm_megatron.cli.pretrain import parse
from usdm_megatron.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from usdm_megatron.config_file import (
    dump_config,
    layered_defaults,
    load_config,
    read_config_file,
    section_types,
)
from usdm_megatron.errors import ConfigError
from usdm_megatron.lora_spec import TARGETS
from usdm_megatron.recipes import RecipeName, Task, recipe_fields, task_fields

DIFFERENCES = {
    ("training", "train_sample_boundaries"): {"usdm": True, "corrected": False},
    ("training", "loss_reduction"): {"usdm": "micro-batch-mean", "corrected": "token-mean"},
    ("optimizer", "clip_grad"): {"usdm": 0.0, "corrected": 1.0},
    ("optimizer", "decay_norms"): {"usdm": True, "corrected": False},
    ("lora", "train_new_embeddings"): {"usdm": False, "corrected": True},
}
RECIPES: tuple[RecipeName, ...] = typing.get_args(RecipeName)
TASKS: tuple[Task, ...] = typing.get_args(Task)

# --- dump → load → equal, over every field


COUNT = st.integers(1, 10**9)
SHARE = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(0, 1e300)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip)

BLENDS = st.dictionaries(
    st.from_regex("[A-Za-z]{1,8}", fullmatch=True), st.floats(1e-300, 1e300), min_size=1, max_size=4
).map(lambda stores: tuple(word for prefix, weight in stores.items() for word in (str(weight), prefix)))


def sections() -> dict[str, st.SearchStrategy[Any]]:
    """A strategy for every section; fields not named here take what their type allows."""
    rules: dict[type, dict[str, st.SearchStrategy[Any]]] = {
        ModelConfig: {},
        ParallelConfig: {
            "tensor_model_parallel_size": st.sampled_from([2, 4, 8]),
            "pipeline_model_parallel_size": st.sampled_from([3, 4]),
            "pipeline_model_parallel_layout": st.none(),
            "recompute_modules": st.lists(
                st.sampled_from(["core_attn", "mlp", "layernorm"]), min_size=1, max_size=3
            ).map(tuple),
            "overlap_grad_reduce": st.just(True),
            "distributed_timeout_minutes": st.floats(1e-3, 1e6),
        },
        DataConfig: {
            "train_data_path": st.none() | st.tuples(TEXT) | BLENDS,
            "seq_length": st.integers(1, 2000).map(lambda n: 8 * n),
        },
        OptimizerConfig: {
            "lr": st.floats(1e-3, 1e300),
            "min_lr": st.floats(0, 1e-3),
            "lr_warmup_fraction": st.none() | SHARE,
            "lr_warmup_iters": st.none(),
            "adam_beta1": SHARE,
            "adam_beta2": SHARE,
            "use_precision_aware_optimizer": st.just(True),
            "optimizer_offload_fraction": st.floats(0, 1, exclude_min=True),
        },
        TrainingConfig: {
            "train_samples": st.none(),
            "num_train_epochs": st.none(),
            "seed": st.integers(),
            "bf16": st.just(True),
        },
        LoraConfig: {
            "alpha": st.floats(1e-3, 1e3),
            "dropout": SHARE,
            "target_modules": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple),
        },
        CheckpointConfig: {},
        LoggingConfig: {},
    }
    return {
        name: st.builds(
            cls,
            **{
                field: rules[cls][field] if field in rules[cls] else of_type(hint)
                for field, hint in typing.get_type_hints(cls).items()
            },
        )
        for name, cls in section_types().items()
    }


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(arguments)
    if arguments:
        return st.one_of(*map(of_type, arguments))
    return {int: COUNT, float: POSITIVE, bool: st.booleans(), str: TEXT, type(None): st.none()}[hint]


RUN_CONFIGS = st.builds(RunConfig, task=st.sampled_from(TASKS), recipe=st.sampled_from(RECIPES), **sections())


@settings(max_examples=100, deadline=None)
@given(RUN_CONFIGS)
def test_a_dumped_config_loads_as_itself(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert dump_config(load_config(path)) == path.read_text(encoding="utf-8")


@settings(max_examples=10, deadline=None)  # tyro takes a tenth of a second
@given(RUN_CONFIGS)
def test_a_dumped_config_resolves_to_itself(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    command = {"pretrain": pretrain, "sft": sft}[config.task]
    assert command.parse(["--config", str(path)])[1] == config


def test_a_dump_names_every_field() -> None:
    tree = yaml.safe_load(dump_config(RunConfig()))
    assert list(tree) == [field.name for field in dataclasses.fields(RunConfig)]
    for name, cls in section_types().items():
        assert list(tree[name]) == [field.name for field in dataclasses.fields(cls)]


# --- recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_differ_in_the_named_fields(recipe: RecipeName) -> None:
    _, config = parse(["--recipe", recipe])
    assert config.recipe == recipe
    assert value_of(config) == {key: values[recipe] for key, values in DIFFERENCES.items()}
    _, other = parse(["--recipe", next(name for name in RECIPES if name != recipe)])
    changed = {
        (section, field.name)
        for section, cls in section_types().items()
        for field in dataclasses.fields(cls)
        if getattr(getattr(config, section), field.name) != getattr(getattr(other, section), field.name)
    }
    assert changed == set(DIFFERENCES)


def test_fine_tuning_leaves_the_new_rows_to_pretraining() -> None:
    """Under both recipes, and when a file changes its recipe; a flag trains them."""
    configs = {recipe: sft.parse(["--recipe", recipe])[1] for recipe in RECIPES}
    key = ("lora", "train_new_embeddings")
    for recipe, config in configs.items():
        others = {name: values[recipe] for name, values in DIFFERENCES.items() if name != key}
        assert value_of(config) == {**others, key: False}
    assert sft.parse(["--lora", "--train-new-embeddings"])[1].lora.train_new_embeddings


def value_of(config: RunConfig) -> dict[tuple[str, str], Any]:
    return {(section, field): getattr(getattr(config, section), field) for section, field in DIFFERENCES}


def test_corrected_is_the_default_everywhere() -> None:
    assert parse([])[1].recipe == RunConfig().recipe == "corrected"
    assert parse([])[1] == parse(["--recipe", "corrected"])[1]
    assert value_of(RunConfig()) == {key: values["corrected"] for key, values in DIFFERENCES.items()}


OVERRIDES = [
    ("usdm", ("--no-train-sample-boundaries",), ("training", "train_sample_boundaries"), False),
    ("usdm", ("--loss-reduction", "token-mean"), ("training", "loss_reduction"), "token-mean"),
    ("usdm", ("--clip-grad", "0.5"), ("optimizer", "clip_grad"), 0.5),
    ("usdm", ("--no-decay-norms",), ("optimizer", "decay_norms"), False),
    ("corrected", ("--train-sample-boundaries",), ("training", "train_sample_boundaries"), True),
    (
        "corrected",
        ("--loss-reduction", "micro-batch-mean"),
        ("training", "loss_reduction"),
        "micro-batch-mean",
    ),
    ("corrected", ("--clip-grad", "0"), ("optimizer", "clip_grad"), 0.0),
    ("corrected", ("--decay-norms",), ("optimizer", "decay_norms"), True),
]


@pytest.mark.parametrize(("recipe", "flags", "field", "value"), OVERRIDES, ids=lambda value: str(value))
def test_each_difference_can_be_overridden_alone(
    recipe: RecipeName, flags: tuple[str, ...], field: tuple[str, str], value: Any
) -> None:
    _, config = parse(["--recipe", recipe, *flags])
    assert value_of(config) == {**{key: values[recipe] for key, values in DIFFERENCES.items()}, field: value}


# --- command line > file > recipe > default


def test_layers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "recipe: usdm\noptimizer: {clip_grad: 0.25, lr: 2e-5, adam_eps: 1}\ndata: {seq_length: 64}\n"
    )
    _, config = parse(["--config", str(path), "--seq-length", "128"])
    assert config.recipe == "usdm"
    assert config.data.seq_length == 128  # command line over file
    assert config.optimizer.clip_grad == 0.25  # file over recipe
    assert config.optimizer.decay_norms is True  # recipe over default
    assert config.optimizer.weight_decay == 0.01  # default
    assert config.optimizer.lr == 2e-5  # YAML 1.1 reads 2e-5 as a string
    assert config.optimizer.adam_eps == 1.0 and isinstance(config.optimizer.adam_eps, float)


def test_recipe_on_the_command_line_over_a_resolved_file(tmp_path: Path) -> None:
    """What the file's recipe decided gives way; what its user decided stays."""
    path = tmp_path / "run.yaml"
    _, resolved = parse(["--recipe", "usdm", "--clip-grad", "0.5", "--lr", "0.01"])
    path.write_text(dump_config(resolved))
    _, config = parse(["--config", str(path), "--recipe", "corrected"])
    assert config.recipe == "corrected"
    assert value_of(config) == {
        **{key: values["corrected"] for key, values in DIFFERENCES.items()},
        ("optimizer", "clip_grad"): 0.5,
    }
    assert config.optimizer.lr == 0.01


def test_a_file_without_a_recipe_lies_above_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {clip_grad: 1.0}\n")
    assert parse(["--config", str(path), "--recipe", "usdm"])[1].optimizer.clip_grad == 1.0


def test_machine_defaults_lie_below_the_file() -> None:
    _, machine = layered_defaults(None, {}, training={"bf16": True})
    assert machine["training"].bf16 is True
    _, chosen = layered_defaults(None, {"training": {"bf16": False}}, training={"bf16": True})
    assert chosen["training"].bf16 is False


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == RunConfig()
    assert read_config_file(tmp_path / "empty.yaml") == {}


# --- tasks


def test_a_task_decides_defaults_below_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {micro_batch_size: 3}\n")
    _, config = sft.parse(["--config", str(path), "--no-shuffle"])
    assert (config.task, config.data.micro_batch_size, config.data.shuffle) == ("sft", 3, False)
    assert config.data.row_padding == "step"
    assert load_config(path).task == "pretrain"  # as every file that was written before there were two


def test_a_file_of_another_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(dump_config(RunConfig()))
    with pytest.raises(
        ConfigError, match="task is pretrain and this is usdm-megatron sft; run usdm-megatron"
    ):
        sft.parse(["--config", str(path)])
    path.write_text("task: pre-train\n")
    with pytest.raises(ConfigError, match="task: is 'pre-train'; expected pretrain, sft"):
        sft.parse(["--config", str(path)])


# --- spelling


SPELLINGS = [
    ["--tensor-model-parallel-size", "2", "--train-data-path", "a"],
    ["--tensor_model_parallel_size", "2", "--train_data_path", "a"],
    ["--tensor_model-parallel_size=2", "--data-path", "a"],
    ["--tensor-model-parallel-size=2", "--data_path=a"],
]


@pytest.mark.parametrize("arguments", SPELLINGS, ids=" ".join)
def test_kebab_and_snake_spelling(arguments: list[str]) -> None:
    _, config = parse(arguments)
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.data.train_data_path == ("a",)


def test_values_of_two_types() -> None:
    assert parse(["--eval-interval", "epoch"])[1].training.eval_interval == "epoch"
    assert parse(["--eval-interval", "7"])[1].training.eval_interval == 7
    assert parse(["--ckpt-step", "best"])[1].checkpoint.ckpt_step == "best"
    assert parse(["--ckpt-step", "20"])[1].checkpoint.ckpt_step == 20
    modules = parse(["--recompute-modules", "core_attn", "mlp"])[1].parallel.recompute_modules
    assert modules == ("core_attn", "mlp")


# --- valid from birth


def changed(section: str, **fields: Any) -> dict[str, Any]:
    return {section: section_types()[section](**fields)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        changed("parallel", tensor_model_parallel_size=0),
        "parallel: tensor_model_parallel_size is 0; it must be at",
    ),
    (changed("parallel", pipeline_model_parallel_size=-1), "pipeline_model_parallel_size is -1"),
    (
        changed("parallel", recompute_modules=("moe",)),
        "recompute module moe is not one of core_attn, mlp, layernorm",
    ),
    (
        changed("parallel", recompute_granularity="selective", recompute_modules=()),
        "selective without modules recomputes nothing; name some with --recompute-modules",
    ),
    (
        changed("parallel", overlap_param_gather=True),
        "--overlap-param-gather needs --overlap-grad-reduce; set both",
    ),
    (
        changed("parallel", distributed_timeout_minutes=0),
        "distributed_timeout_minutes is 0; it must be positive",
    ),
    (
        changed("parallel", decoder_first_pipeline_num_layers=2),
        "the layers of pipeline stages are given and there is one stage; set --pipeline-model-parallel-size",
    ),
    (
        changed("parallel", accumulate_allreduce_grads_in_fp32=False),
        "and they are fp32; drop it or set --bf16",
    ),
    (changed("optimizer", use_precision_aware_optimizer=True), "and they are fp32; drop it or set --bf16"),
    (changed("optimizer", optimizer_cpu_offload=True), "would leave the masters on the GPU; add --use-prec"),
    (
        changed("optimizer", optimizer_offload_fraction=0.0),
        "optimizer_offload_fraction is 0.0; it must be in (0",
    ),
    (changed("parallel", distributed_timeout_minutes=math.inf), "is inf; it must be a finite number"),
    (changed("data", seq_length=0), "data: seq_length is 0"),
    (changed("optimizer", weight_decay=-1e-5), "optimizer: weight_decay is -1e-05; it must not be negative"),
    (changed("optimizer", lr=math.nan), "optimizer: lr is nan; it must be a finite number"),
    (changed("optimizer", min_lr=1.0), "optimizer: min_lr 1.0 is above lr 2e-05; lower it"),
    (changed("optimizer", adam_beta1=1.0), "adam_beta1 is 1.0; it must be in [0, 1)"),
    (changed("optimizer", lr_warmup_fraction=-0.1), "lr_warmup_fraction is -0.1"),
    (changed("optimizer", lr_warmup_iters=-1), "lr_warmup_iters is -1; it must not be negative"),
    (changed("optimizer", lr_decay_iters=0), "lr_decay_iters is 0; it must be at least 1"),
    (
        changed("optimizer", lr_warmup_fraction=0.1, lr_warmup_iters=3),
        "both lr_warmup_fraction and lr_warmup_iters",
    ),
    (changed("training", train_iters=0), "training: train_iters is 0"),
    (
        changed("training", train_samples=1, num_train_epochs=1),
        "train_samples and num_train_epochs are given together",
    ),
    (changed("training", eval_interval=0), "eval_interval is 0"),
    (changed("checkpoint", save_interval=0), "save_interval is 0"),
    (changed("checkpoint", save_total_limit=0), "save_total_limit is 0"),
    (changed("logging", log_interval=0), "log_interval is 0"),
]


@pytest.mark.parametrize(("sections_", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(sections_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig(**sections_)
    assert len(error.value.problems) == 1
    assert message in str(error.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig(
            data=DataConfig(seq_length=0, micro_batch_size=0),
            optimizer=OptimizerConfig(lr=-1.0, min_lr=0.0),
            logging=LoggingConfig(log_interval=0, wandb_project=""),
        )
    assert [problem.split(" is ")[0] for problem in error.value.problems] == [
        "data: seq_length",
        "data: micro_batch_size",
        "optimizer: lr",
        "optimizer: min_lr 0.0",
        "logging: log_interval",
        "logging: wandb_project",
    ]


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().data.seq_length = 1  # type: ignore[misc]  # frozen


def test_tables_of_defaults_name_existing_fields() -> None:
    recipes = (recipe_fields(recipe, task) for recipe in RECIPES for task in TASKS)
    for table in (*recipes, *map(task_fields, TASKS)):
        for section, fields in table.items():
            assert set(fields) <= {field.name for field in dataclasses.fields(section_types()[section])}
