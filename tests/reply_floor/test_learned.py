"""A model that transformers and PyTorch trained on a store's dialogs repeats them, by its exported files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tests.reply_floor.conftest import VOCABULARY, WriteStore, one_exchange
from tests.tiny import write_hf_model
from usdm_megatron.cli import main
from usdm_megatron.corpora.dialog import DialogSample, DialogTemplate
from usdm_megatron.tokenizer.files import TOKENIZER_FILES

DIALOGS = [
    ("Where is the river?", "behind the forest", [1, 2, 3], [4, 5, 6, 7]),
    ("good morning", "hello there, how are you", [8, 9], [10, 10, 11, 12, 13]),
    ("what's this", "a yellow bridge", [14, 14, 15], [15, 16]),
]
STEPS = 60


def learn_by_heart(path: Path, samples: list[DialogSample]) -> None:
    """Masked cross entropy, a sample at a time, by a loop that knows nothing of this package."""
    from transformers import MistralForCausalLM

    model = MistralForCausalLM.from_pretrained(path)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        for sample in samples:
            tokens = torch.from_numpy(sample.tokens).long()[None]
            labels = tokens.masked_fill(torch.from_numpy(sample.loss_mask)[None] == 0, -100)
            loss = model(input_ids=tokens, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(path)


def test_trained_dialogs_have_no_errors(
    model_path: Path, template: DialogTemplate, write_store: WriteStore, tmp_path: Path
) -> None:
    samples = [template.sample(one_exchange(*dialog)) for dialog in DIALOGS]
    path = write_hf_model(
        tmp_path / "learned",
        vocab_size=VOCABULARY.size,
        num_hidden_layers=2,
        sliding_window=None,
        initializer_range=0.1,
    )
    for name in TOKENIZER_FILES:
        if (model_path / name).is_file():
            shutil.copyfile(model_path / name, path / name)
    learn_by_heart(path, samples)
    store, out = write_store(samples), tmp_path / "out.json"
    arguments = ["--model", str(path), "--eval", store.prefix, "--batch-size", "3", "--json", str(out)]
    assert main(["reply", *arguments]) == 0
    record = json.loads(out.read_text())
    for name in ("transcript", "text", "units"):
        assert record[name]["edits"] == 0 < record[name]["reference"]
    assert record["unfinished"] == 0
    said = [(one["transcript"], one["text"], one["units"]) for one in record["replies"]]
    assert said == [(user.lower(), agent, spoken) for user, agent, _, spoken in DIALOGS]
