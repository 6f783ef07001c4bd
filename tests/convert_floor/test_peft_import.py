"""What peft itself saved comes in to the bit; what is not computed here is refused by field and value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.convert_floor.adapter_checkpoints import all_tensors, assert_same_bits
from tests.convert_floor.conftest import edit_json
from tests.tiny import VOCABULARY
from tests.training import reference
from usdm_megatron.checkpoint.adapter_facts import AdapterFacts, read_adapter_facts
from usdm_megatron.checkpoint.facts import read_facts
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.cli.convert import main
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.convert.options import ExportOptions, ImportOptions
from usdm_megatron.convert.peft_config import peft_config, spec_of
from usdm_megatron.convert.peft_export import export_adapter
from usdm_megatron.convert.peft_import import dry_run, import_adapter
from usdm_megatron.errors import CheckpointError, ConversionError
from usdm_megatron.lora_spec import TARGETS, LoraSpec
from usdm_megatron.vocab import Vocabulary

NEW_IDS = list(range(VOCABULARY.text_size, VOCABULARY.size))
TEXT_ONLY = Vocabulary(text_size=403, unit_count=0)


def save_by_peft(hf: Path, directory: Path, **options: Any) -> Path:
    """A PEFT directory of `options` with every factor random, as `save_pretrained` writes it."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **options}
    model = get_peft_model(reference.load_model(hf), LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_hf_model(tmp_path_factory.mktemp("hf") / "hf", num_hidden_layers=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, hf: Path) -> Path:
    return tiny.write_checkpoint(hf, tmp_path_factory.mktemp("base")) / "release"


@pytest.fixture
def source(hf: Path, tmp_path: Path) -> Path:
    return save_by_peft(hf, tmp_path / "source")


def test_what_peft_saved(hf: Path, base: Path, tmp_path: Path) -> None:
    source = save_by_peft(
        hf,
        tmp_path / "source",
        lora_dropout=0.1,
        target_modules="all-linear",
        init_lora_weights="gaussian",
        trainable_token_indices={"embed_tokens": NEW_IDS, "lm_head": NEW_IDS},
    )
    summary = import_adapter(ImportOptions(adapter=source, load=base, save=tmp_path / "ck"))
    assert (summary.new_rows, summary.weight_type) == (len(NEW_IDS), "fp32")
    assert summary.source_tensors == 2 * 7 * 2 + 2
    checkpoint = resolve_checkpoint(tmp_path / "ck", fallback=False).path
    assert checkpoint == tmp_path / "ck/release"
    spec = LoraSpec(r=3, alpha=5, dropout=0.1, targets=frozenset(TARGETS), train_new_embeddings=True)
    assert read_adapter_facts(checkpoint) == AdapterFacts.over(base, spec)
    facts = read_facts(checkpoint)
    assert (facts.kind, facts.vocabulary) == ("converted", VOCABULARY)
    assert facts.provenance["adapter"]["source"] == "source"
    assert set(facts.provenance["adapter"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "peft", adapter_only=True))
    assert_same_bits(all_tensors(tmp_path / "peft"), all_tensors(source))


def test_some_layers_alone(hf: Path, base: Path, tmp_path: Path) -> None:
    """A whole path as a target is taken for the projection; the layers that lack it are named."""
    source = save_by_peft(hf, tmp_path / "source", target_modules=["model.layers.1.self_attn.q_proj"])
    problems = refuse(source, base, "layers.0.self_attn.q_proj.lora_A.weight is missing")
    assert len(problems) == 2


def test_type(source: Path, base: Path, tmp_path: Path) -> None:
    import_adapter(ImportOptions(adapter=source, load=base, save=tmp_path / "ck", dtype="bf16"))
    export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "peft", adapter_only=True))
    rounded = {name: tensor.bfloat16() for name, tensor in all_tensors(source).items()}
    assert_same_bits(all_tensors(tmp_path / "peft"), rounded)


def test_command_line(source: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["import", "--adapter", str(source), "--load", str(base), "--save", str(tmp_path / "ck")]
    assert run_guarded(main, [*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "layers.1.mlp.down_proj.lora_B.weight [32, 3] → decoder.layers.mlp.linear_fc2.adapters.down" in out
    assert not (tmp_path / "ck").exists()
    assert run_guarded(main, arguments) == 0
    assert "8 tensors mapped, 2 layers, 403 ids, fp32" in capsys.readouterr().out
    assert run_guarded(main, arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_guarded(main, [*arguments, "--overwrite"]) == 0


# ── the configuration ──


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 64),
    alpha=st.floats(0.01, 100) | st.integers(1, 64),
    dropout=st.floats(0, 0.9),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1),
    new_rows=st.booleans(),
    tied=st.booleans(),
)
def test_peft_reads_what_we_write(
    r: int, alpha: float, dropout: float, targets: set[str], new_rows: bool, tied: bool
) -> None:
    from peft import LoraConfig

    spec = LoraSpec(r, alpha, dropout, frozenset(targets), new_rows)
    written = json.loads(json.dumps(peft_config(spec, VOCABULARY, tied=tied, base_model="a/b")))
    assert spec_of(written, Path("c"), VOCABULARY, tied=tied) == spec
    theirs = LoraConfig(**{key: value for key, value in written.items() if key != "peft_type"})
    assert theirs.lora_alpha / theirs.r == spec.scale
    assert (theirs.target_modules, theirs.bias) == (targets, "none")
    # and all that it would itself write says the same
    by_peft = json.loads(json.dumps({**theirs.to_dict(), "target_modules": sorted(targets)}))
    assert spec_of(by_peft, Path("c"), VOCABULARY, tied=tied) == spec


PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj"],
}


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("peft_type", "IA3", "peft_type = 'IA3' is not computed here; it must be LORA"),
        ("peft_type", None, "peft_type is missing"),
        ("task_type", "SEQ_CLS", "task_type = 'SEQ_CLS' is not computed here; it must be CAUSAL_LM"),
        ("bias", "all", "bias = 'all' is not computed here; it must be none"),
        ("use_dora", True, "use_dora = True is not computed here, it must be off; merge this adapter"),
        ("use_rslora", True, "use_rslora = True"),
        ("use_qalora", True, "use_qalora = True"),
        ("lora_bias", True, "lora_bias = True"),
        ("fan_in_fan_out", True, "fan_in_fan_out = True"),
        ("modules_to_save", ["lm_head"], "modules_to_save = ['lm_head']"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern = {'q_proj': 2}"),
        ("alpha_pattern", {"q_proj": 2}, "alpha_pattern = {'q_proj': 2}"),
        ("layers_to_transform", 0, "layers_to_transform = 0"),
        ("layers_to_transform", [1], "layers_to_transform = [1]"),
        ("layer_replication", [[0, 2]], "layer_replication = [[0, 2]]"),
        ("exclude_modules", ["x"], "exclude_modules = ['x']"),
        ("target_parameters", ["x"], "target_parameters = ['x']"),
        ("of_a_later_peft", 1, "of_a_later_peft = 1 is not computed here"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights = 'pissa_niter_4' is not computed here"),
        ("init_lora_weights", 1, "init_lora_weights = 1 is not computed here"),
        ("r", 0, "lora: r is 0"),
        ("r", "4", "r is '4'; it must be a number"),
        ("r", True, "r is True; it must be a number"),
        ("r", 2.5, "lora: r is 2.5"),
        ("r", 10**400, "it must be a number of at most 1.8e+308"),
        ("lora_alpha", 10**400, "it must be a number of at most 1.8e+308"),
        ("lora_dropout", -(10**400), "it must be a number of at most 1.8e+308"),
        ("lora_alpha", None, "lora_alpha is None; it must be a number"),
        ("lora_alpha", float("nan"), "lora: alpha is nan"),
        ("lora_dropout", 1, "lora: dropout is 1.0"),
        ("target_modules", ["qproj"], "target module 'qproj' is unknown; did you mean q_proj?"),
        ("target_modules", ["embed_tokens"], "target module 'embed_tokens' is unknown"),
        ("target_modules", [], "no target modules"),
        ("target_modules", "all-linear", "target_modules is 'all-linear'; it must be a list of names, not a"),
        ("target_modules", r".*\.q_proj", "it must be a list of names, not a pattern"),
        ("target_modules", r".*\.q_proj", "or merge this adapter with peft, and import the model"),
        ("target_modules", ["mlp.q_proj"], "names 'mlp.q_proj', which is no module of this model; give one"),
        ("target_modules", ["q_proj", "foo.down_proj"], "names 'foo.down_proj', which is no module"),
        ("target_modules", ["layers.x.mlp.up_proj"], "names 'layers.x.mlp.up_proj', which is no module"),
        ("target_modules", None, "target_modules is None"),
        ("target_modules", [3], "target_modules is [3]"),
        ("trainable_token_indices", [1, 2], "trainable_token_indices = [1, 2] is not computed here"),
        ("trainable_token_indices", NEW_IDS, "for embed_tokens and lm_head each the ids that speech added, "),
        ("trainable_token_indices", {"embed_tokens": NEW_IDS, "lm_head": [300]}, "ids that speech added"),
    ],
)  # fmt: skip
def test_what_is_not_computed(field: str, value: Any, problem: str) -> None:
    with pytest.raises(ConversionError) as refused:
        spec_of({**PLAIN, field: value}, Path("adapter_config.json"), VOCABULARY, tied=False)
    (said,) = refused.value.problems
    assert said.startswith("adapter_config.json: ") and problem in said


def test_a_target_may_be_the_end_of_a_path() -> None:
    names = ["self_attn.q_proj", "model.layers.1.self_attn.v_proj", "0.mlp.up_proj", "down_proj"]
    spec = spec_of({**PLAIN, "target_modules": names}, Path("c"), VOCABULARY, tied=False)
    assert spec.targets == {"q_proj", "v_proj", "up_proj", "down_proj"}


def test_all_problems_at_once() -> None:
    fields = {"use_dora": True, "bias": "all", "r": None, "target_modules": None}
    with pytest.raises(ConversionError) as refused:
        spec_of({**PLAIN, **fields}, Path("c"), VOCABULARY, tied=False)
    assert len(refused.value.problems) == len(fields)


def test_trained_ids_by_vocabulary_and_tying() -> None:
    def spec(indices: Any, vocabulary: Vocabulary = VOCABULARY, *, tied: bool = False) -> LoraSpec:
        return spec_of({**PLAIN, "trainable_token_indices": indices}, Path("c"), vocabulary, tied=tied)

    for indices in (NEW_IDS, {"embed_tokens": NEW_IDS}, {"embed_tokens": NEW_IDS, "lm_head": NEW_IDS}):
        assert spec(indices, tied=True).train_new_embeddings
    both = {"model.embed_tokens": NEW_IDS, "lm_head": NEW_IDS}
    assert spec(both).train_new_embeddings and not spec(None).train_new_embeddings
    for indices in ({"lm_head": NEW_IDS}, NEW_IDS[:-1], {"embed_tokens": NEW_IDS, "lm_head": [300]}, "x", 3):
        with pytest.raises(ConversionError, match="for embed_tokens the ids that speech added, 300 to 402"):
            spec(indices, tied=True)
    with pytest.raises(ConversionError, match="the base has no ids that speech added"):
        spec({"embed_tokens": [], "lm_head": []}, TEXT_ONLY)


# ── the directory ──


def refuse(source: Path, base: Path, match: str, **options: Any) -> list[str]:
    """Import must fail with `match`, and nothing may be left at the destination."""
    save = source.parent / "refused"
    with pytest.raises((ConversionError, CheckpointError), match=match) as caught:
        import_adapter(ImportOptions(adapter=source, load=base, save=save, **options))
    assert not save.exists()
    return list(caught.value.problems)


def rewrite(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})


Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def test_files_that_are_missing(source: Path, base: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", base, "--adapter .*nowhere is not a directory")
    weights = source / "adapter_model.safetensors"
    weights.rename(tmp_path / "away")
    refuse(source, base, "adapter_model.safetensors is missing")
    (source / "adapter_model.bin").write_bytes(b"a pickle")
    refuse(source, base, "adapter_model.bin and no adapter_model.safetensors; .bin files are pickles")
    (source / "adapter_config.json").unlink()
    refuse(source, base, "adapter_config.json is missing")


def test_tensors_that_do_not_fit(source: Path, base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_A}x"] = tensors.pop(Q_A)
        tensors[Q_A.replace("layers.1", "layers.2")] = torch.zeros(3, 32)
        tensors[Q_A.replace("layers.1", "layers.0")] = torch.zeros(4, 32)
        tensors[Q_A.replace("layers.1", "layers.0").replace("_A", "_B")] = torch.zeros(
            64, 3, dtype=torch.int32
        )

    rewrite(source, change)
    problems = refuse(source, base, "is missing")
    for problem in (
        f"tensor {Q_A} is missing",
        f"tensor {Q_A}x is none of a LoRA adapter with these targets over this base",
        "layers.2.self_attn.q_proj.lora_A.weight is none of a LoRA adapter",
        "layers.0.self_attn.q_proj.lora_A.weight has shape [4, 32], expected [3, 32]",
        "layers.0.self_attn.q_proj.lora_B.weight is of type I32",
    ):
        assert sum(problem in said for said in problems) == 1, problem
    assert len(problems) == 5


def test_adapter_for_another_base(source: Path, tmp_path: Path) -> None:
    """By its shapes; by its weights where the adapter is our own export: `test_peft_base.py`."""
    other = tiny.write_hf_model(tmp_path / "other", hidden_size=24, num_hidden_layers=2)
    base = tiny.write_checkpoint(other, tmp_path / "other ck")
    refuse(source, base, r"lora_A.weight has shape \[3, 32\], expected \[3, 24\] by adapter_config.json and")


def test_a_rank_that_no_change_has(source: Path, base: Path) -> None:
    edit_json(source / "adapter_config.json", r=10**300)
    refuse(source, base, r"adapter_config.json: r is 1000.* above 32, their smaller side; merge this adapter")


@pytest.mark.parametrize("saved", [["model.embed_tokens.weight"], ["lm_head.weight"]])
def test_embeddings_that_peft_saved(source: Path, base: Path, saved: list[str]) -> None:
    names = {f"base_model.model.{name}": torch.zeros(403, 32) for name in saved}
    rewrite(source, lambda tensors: tensors.update(names))
    (problem,) = refuse(source, base, "is a whole embedding")
    assert "merge this adapter with peft (merge_and_unload), and import the model" in problem


def test_values_and_types(source: Path, base: Path) -> None:
    def one_is_nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_A][0, :2] = float("nan")

    rewrite(source, one_is_nan)
    refuse(source, base, "q_proj.lora_A.weight has 2 values that are NaN or infinite")
    rewrite(source, lambda tensors: tensors.update({Q_A: tensors[Q_A].bfloat16()}))
    refuse(source, base, r"different types \(BF16, F32\); say --dtype")


def test_hashes_of_our_own_exports_are_checked(source: Path, base: Path, tmp_path: Path) -> None:
    import_adapter(ImportOptions(adapter=source, load=base, save=tmp_path / "ck"))
    exported = tmp_path / "peft"
    export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=exported, adapter_only=True))
    edit_json(exported / "adapter_config.json", lora_alpha=80)
    refuse(exported, base, "adapter_config.json differs from what integrity.json recorded")


def test_what_says_which_base_it_is_for(
    source: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our exports do; peft's own come in all the same, and it is said that nobody knows."""
    import_adapter(ImportOptions(adapter=source, load=base, save=tmp_path / "ck"))
    assert "does not say which weights it was trained over" in capsys.readouterr().err
    ours = tmp_path / "peft"
    export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=ours, adapter_only=True))
    import_adapter(ImportOptions(adapter=ours, load=base, save=tmp_path / "again"))
    assert capsys.readouterr().err == ""
    (ours / "integrity.json").unlink()
    for content in ('{"base": 1}', "{}", '{"base": {"sha256": 3}}', "["):
        (ours / "usdm_megatron.json").write_text(content)
        refuse(ours, base, "usdm_megatron.json")


def test_the_base_must_be_whole(source: Path, base: Path, tmp_path: Path) -> None:
    refuse(source, tmp_path / "nowhere", "nowhere is not a directory")
    import_adapter(ImportOptions(adapter=source, load=base, save=tmp_path / "ck"))
    refuse(source, tmp_path / "ck", "release is an adapter, and an adapter's base is a whole model")


def test_flags(tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(ConversionError) as caught:
            ImportOptions(save=tmp_path, **options)
        return str(caught.value)

    assert refused() == "--hf-path is missing; name a model, or an --adapter"
    assert refused(hf_path="a/b", load=tmp_path) == "--load goes with --adapter"
    assert refused(adapter=tmp_path) == "--adapter needs --load: the checkpoint of the model that it adapts"
    said = refused(adapter=tmp_path, load=tmp_path, hf_path="a/b", extend_vocab="usdm", hf_revision="main")
    assert said.splitlines() == [
        f"--adapter does not go with {flag}" for flag in ("--hf-path", "--extend-vocab", "--hf-revision")
    ]


def test_dry_run_checks_everything(source: Path, base: Path, tmp_path: Path) -> None:
    assert "nothing was written" in dry_run(
        ImportOptions(adapter=source, load=base, save=tmp_path / "ck", dry_run=True)
    )
    edit_json(source / "adapter_config.json", use_dora=True)
    with pytest.raises(ConversionError, match="use_dora"):
        dry_run(ImportOptions(adapter=source, load=base, save=tmp_path / "ck", dry_run=True))
