"""`python -m usdm_megatron.demo.build --output-dir DIR`: writes DIR/model and DIR/corpus, offline."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from usdm_megatron.demo.corpus import write_demo_corpus
from usdm_megatron.demo.model import write_demo_model
from usdm_megatron.demo.settings import DEMO, DemoSettings

MODEL = "model"
CORPUS = "corpus"


def build_demo(output_dir: Path, settings: DemoSettings = DEMO) -> None:
    """Write the demo's Hugging Face model and its corpus below `output_dir`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    started_at = time.perf_counter()
    model = write_demo_model(output_dir / MODEL, settings)
    corpus = write_demo_corpus(output_dir / CORPUS, settings)
    elapsed_s = time.perf_counter() - started_at
    print(f"{model}: Mistral, {settings.layers} layers of {settings.hidden_size}, random weights")
    print(f"{corpus}: {settings.utterances:,} utterances, {settings.dialogs:,} dialogs ({elapsed_s:.1f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's model and corpus.")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="directory to write model/ and corpus/ to"
    )
    build_demo(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
