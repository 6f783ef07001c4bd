"""The example row of `inspect store`: samples and runs, text by the store's own tokenizer, nothing unsafe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from usdm_megatron.cli import main
from usdm_megatron.corpora.dialog import DialogTemplate, Turn, exchanges
from usdm_megatron.data.example_row import TextDecoder, read_example
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.errors import DataError
from usdm_megatron.tokenizer.files import extend_tokenizer
from usdm_megatron.tokenizer.text_encoder import TextEncoder, extended_tokenizer
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

V = Vocabulary(text_size=20, unit_count=7)
BOS, EOS, C, R, U = V.bos_id, V.eos_id, V.continue_id, V.correspond_id, V.first_unit_id
ROWS = [[[BOS, 5, EOS]], [[BOS, 5, R, U, EOS], [BOS, 5, R, U, C, 5, 5, EOS]]]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain tokenizer of Mistral-7B-v0.1."""
    return write_mistral_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def dialog_store(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Two dialogs of one exchange, a row each, with the loss mask of the template."""
    template = DialogTemplate(TextEncoder(tokenizer_dir).encode, USDM_VOCABULARY)
    prefix = tmp_path_factory.mktemp("dialogs") / "D"
    with TokenStoreWriter(prefix, USDM_VOCABULARY, row_capacity=200, with_loss_mask=True) as writer:
        for text in ("How are you?", "Well\x1b[31m"):
            turns = [Turn("A", text, np.arange(30)), Turn("B", "i'm fine", np.array([7, 8]))]
            sample = template.sample(exchanges(turns, 0))
            one = np.array([1])
            writer.append(sample.tokens, np.array([len(sample.tokens)]), one, loss_mask=sample.loss_mask)
        writer.finish(tokenizer_sha256=extended_tokenizer(tokenizer_dir).sha256)
    return TokenStore.open(prefix)


def inspect(*arguments: object) -> int:
    return main(["inspect", "store", *map(str, arguments)])


def test_an_example_without_tokenizer(write_store: Callable[..., TokenStore]) -> None:
    example = read_example(write_store(ROWS), 1)
    assert [sample.length for sample in example.samples] == [5, 8]
    runs = [(run.kind, run.numbers) for run in example.samples[1].runs]
    assert runs == [
        ("bos", (BOS,)),
        ("text", (5,)),
        ("correspond", (R,)),
        ("unit", (0,)),
        ("continue", (C,)),
        ("text", (5, 5)),
        ("eos", (EOS,)),
    ]
    assert {run.text for sample in example.samples for run in sample.runs} == {None}
    with pytest.raises(DataError, match=r"--row is 2; .* has the rows 0 to 1"):
        read_example(write_store(ROWS, "other"), 2)


def test_a_dialog_reads_as_its_template(dialog_store: TokenStore, tokenizer_dir: Path) -> None:
    decoder = TextDecoder(tokenizer_dir, dialog_store.summary)
    (sample,) = read_example(dialog_store, 0, decoder).samples
    loss_mask = dialog_store.row(0).loss_mask
    assert loss_mask is not None and sample.targets == int(loss_mask.sum())
    runs = [(run.kind, run.is_target, run.text or run.numbers) for run in sample.runs]
    instruction = runs.pop(1)
    text = instruction[2]
    assert isinstance(text, str)
    assert text.startswith("Below is a conversation") and text.endswith("### User\n")
    assert runs == [
        ("bos", False, (1,)),
        ("unit", False, tuple(range(30))),
        ("correspond", False, (32_001,)),
        ("text", True, "how are you?\n"),
        ("text", False, "### Agent\n"),
        ("text", True, "i'm fine"),
        ("correspond", True, (32_001,)),
        ("unit", True, (7, 8)),
        ("text", True, "▁"),
        ("text", False, "\n"),
        ("eos", False, (2,)),
    ]


@pytest.mark.parametrize("form", ["plain", "extended", "sentencepiece"])
def test_every_form_of_the_tokenizer_decodes(
    dialog_store: TokenStore, tokenizer_dir: Path, tmp_path: Path, form: str
) -> None:
    directory = tokenizer_dir
    if form == "extended":
        directory = tmp_path / "extended"
        extend_tokenizer(tokenizer_dir, directory, USDM_VOCABULARY, model_max_length=1)
    elif form == "sentencepiece":
        directory = tmp_path
        (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    decoder = TextDecoder(directory, dialog_store.summary)
    assert decoder.decode(TextEncoder(tokenizer_dir).encode("naïve 梦 words").tolist()) == "naïve 梦 words"


def test_another_tokenizer_is_refused(
    dialog_store: TokenStore, write_store: Callable[..., TokenStore], tokenizer_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has 32000 ids, the store's vocabulary 30, of which 20 are text"):
        TextDecoder(tokenizer_dir, write_store(ROWS).summary)  # by its size: the store records no hash
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="is not the tokenizer that the store was made with"):
        TextDecoder(tmp_path, dialog_store.summary)
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        TextDecoder(tmp_path / "nothing", dialog_store.summary)


# --- as it is printed


def test_a_row_is_shown_whole_when_asked_for(
    write_store: Callable[..., TokenStore], capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store([[[BOS, 5, EOS]] * 5, [[BOS, *([5] * 20), EOS]]])
    assert inspect(store.prefix) == 0
    printed = capsys.readouterr().out
    assert "sample 2: 3 tokens" in printed and "sample 3" not in printed
    assert "… 2 more samples: --row 0 shows them" in printed
    assert inspect(store.prefix, "--row", 0) == 0
    assert "sample 4: 3 tokens" in capsys.readouterr().out
    assert inspect(store.prefix, "--row", 1) == 0
    assert f"      text           20  {'5 ' * 14}…\n" in capsys.readouterr().out
    assert inspect(store.prefix, "--row", 2) == 2
    assert inspect(store.prefix, "--row", -1) == 2
    assert "--row is -1" in capsys.readouterr().err


def test_text_cannot_drive_the_terminal(
    dialog_store: TokenStore, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(dialog_store.prefix, "--row", 1, "--tokenizer", tokenizer_dir) == 0
    printed = capsys.readouterr().out
    assert r"'well\x1b[31m\n'" in printed and "\x1b" not in printed
    assert "    * text" in printed and "      unit           30  0 1 2 3 4 5 6 7 8 9 10 11 12 13 …" in printed
