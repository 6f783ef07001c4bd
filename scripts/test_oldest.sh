#!/usr/bin/env bash
# The tests with the oldest torch and transformers that setup.py allows, in an environment of their own.
#
# That is .venv-oldest; all else in it is new. This torch comes with CUDA, some gigabytes.
#
#   bash scripts/test_oldest.sh [--full] [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ -x .venv-oldest/bin/python ] || python3 -m venv .venv-oldest
source .venv-oldest/bin/activate
export PIP_CONSTRAINT="$PWD/scripts/oldest.txt"
pip install --quiet torch
exec bash scripts/test.sh "$@"
