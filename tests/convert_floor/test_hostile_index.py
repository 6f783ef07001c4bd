"""Index files that lie, point elsewhere or are noise, and weights that are not the architecture's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.convert_floor.conftest import edit_json
from tests.convert_floor.test_hostile_sources import DATA, A, B, Outcomes, bits, file_bytes, peak_bytes
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.convert.hf_source import HFSource, check_tensors, open_source
from usdm_megatron.convert.name_table import architecture_table
from usdm_megatron.errors import ConversionError


def write_sharded(directory: Path, weight_map: object, metadata: object = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "1.safetensors").write_bytes(file_bytes({"a": A}, DATA[:24]))
    (directory / "2.safetensors").write_bytes(file_bytes({"b": {**B, "data_offsets": [0, 8]}}, DATA[24:]))
    index = {"metadata": metadata, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_a_tensor_in_another_file_and_a_file_name_that_is_none(tmp_path: Path) -> None:
    swapped = write_sharded(tmp_path, {"a": "2.safetensors", "b": "1.safetensors"})
    with pytest.raises(ConversionError) as error:
        open_source(swapped)
    assert [problem.split("; ")[0] for problem in error.value.problems] == [
        f"{swapped / '2.safetensors'} does not hold tensor a",
        f"{swapped / '1.safetensors'} does not hold tensor b",
    ]
    write_sharded(tmp_path, {"a": 1, "b": None, "c": "x" * 5_000 + ".safetensors", "d": "e\0.safetensors"})
    with pytest.raises(ConversionError) as error:
        open_source(tmp_path)
    assert len(error.value.problems) == 4 and "tensor a is in 1; a file name is a string" in str(error.value)
    assert str(error.value).count("is missing") == 2


def test_links_of_a_hub_cache_are_followed_but_not_to_devices(tmp_path: Path) -> None:
    snapshot = write_sharded(tmp_path / "snapshots" / "c0ffee", {"a": "1.safetensors", "b": "2.safetensors"})
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(("1.safetensors", "2.safetensors", "config.json")):
        (snapshot / name).rename(tmp_path / "blobs" / f"{number:064x}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064x}")
    source = open_source(snapshot)
    assert source.weight_files == ("1.safetensors", "2.safetensors")
    assert source.read("b").view(torch.uint8).tolist() == list(DATA[24:])
    (tmp_path / "blobs" / f"{0:064x}").unlink()
    with pytest.raises(ConversionError, match="1.safetensors is missing"):
        open_source(snapshot)
    (snapshot / "1.safetensors").unlink()
    (snapshot / "1.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ConversionError, match="1.safetensors is missing"):
        open_source(snapshot)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FILE_NAMES = st.sampled_from(
    [
        "1.safetensors",
        "2.safetensors",
        "../1.safetensors",
        "/dev/zero",
        "",
        ".",
        "..",
        "1.bin",
        ".safetensors",
    ]
)


def check_index(directory: Path, outcomes: Outcomes) -> HFSource | None:
    """The right data, of the files that the index names, or a typed error that names the directory."""
    try:
        source = open_source(directory)
    except ConversionError as error:
        assert str(directory) in str(error)
        outcomes.refused += 1
        return None
    outcomes.accepted += 1
    for name, tensor in source.tensors.items():
        file, expected = {"a": ("1.safetensors", DATA[:24]), "b": ("2.safetensors", DATA[24:])}[name]
        assert tensor.file == file and bytes(bits(source.read(name)).tolist()) == expected
    return source


def test_fuzzed_indexes(tmp_path: Path) -> None:
    outcomes = Outcomes()
    right = {"a": "1.safetensors", "b": "2.safetensors"}
    partial = st.sets(st.sampled_from("ab"), min_size=1).map(lambda names: {n: right[n] for n in names})
    changes = st.dictionaries(st.sampled_from("ab") | st.text(max_size=3), FILE_NAMES | ANY_JSON, max_size=2)

    @settings(max_examples=300, deadline=None)
    @given(
        partial | st.builds(lambda known, change: {**known, **change}, partial, changes) | ANY_JSON, ANY_JSON
    )
    def fuzz(weight_map: object, metadata: object) -> None:
        source = check_index(write_sharded(tmp_path, weight_map, metadata), outcomes)
        assert source is None or (isinstance(weight_map, dict) and weight_map.keys() <= source.tensors.keys())

    fuzz()
    outcomes.check()


def test_fuzzed_index_bytes(tmp_path: Path) -> None:
    outcomes = Outcomes()
    index = write_sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}) / (
        "model.safetensors.index.json"
    )
    valid = index.read_bytes()

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        content = bytearray(valid)
        content[data.draw(st.integers(0, len(valid) - 1))] = data.draw(
            st.integers(0, 255) | st.just(ord(" "))
        )
        at = data.draw(st.integers(0, len(valid)))
        index.write_bytes(bytes(content) if data.draw(st.booleans()) else valid[:at] + b" " + valid[at:])
        check_index(tmp_path, outcomes)

    fuzz()
    outcomes.check()


# ── against the architecture ──


def checked(source: Path) -> None:
    opened = open_source(source)
    check_tensors(opened, architecture_table(opened.config), HFArchitecture.from_hf_config(opened.config))


def test_quantized_weights_and_absurd_layer_counts(small_model: Callable[..., Path]) -> None:
    source = small_model()
    checked(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(28, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        ConversionError, match="model.norm.weight is of type I8, not BF16, F16, F32, F64; a quan"
    ):
        checked(source)
    edit_json(source / "config.json", num_hidden_layers=10**12)
    assert peak_bytes(lambda: checked(source)) < 1 << 20


def test_a_tied_copy_of_another_shape_or_type_is_refused(small_model: Callable[..., Path]) -> None:
    source = small_model(tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for copy, good in ((embedding.clone(), True), (embedding[:-1].clone(), False), (embedding.half(), False)):
        save_file({**tensors, "lm_head.weight": copy}, source / "model.safetensors")
        if good:
            checked(source)
        else:
            with pytest.raises(ConversionError, match="lm_head.weight does not belong"):
                checked(source)
