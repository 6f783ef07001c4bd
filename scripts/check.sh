#!/usr/bin/env bash
# The static checks, and the tests that start no ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

run() {
    printf '== %s\n' "$*"
    "$PYTHON" -m "$@"
}
run ruff format --check .
run ruff check .
run mypy
printf '== lint-imports\n'
"$(dirname "$PYTHON")/lint-imports" --no-cache
run bandit -q -c pyproject.toml -r usdm_megatron tools
# Quick tests: the folders that start no ranks. scripts/test.sh runs all of them.
run pytest -q -m "not exhaustive and not gpu" tests/data_floor tests/demo_floor tests/docs
