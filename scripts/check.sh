#!/usr/bin/env bash
# The static checks and the quick tests; all of them run, and the failed ones are named at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

failed=()
run() {
    printf '== %s\n' "$*"
    "$@" || failed+=("$1${2:+ $2}")
}
bin="$(dirname "$PYTHON")"
run "$bin/ruff" format --check --quiet .
run "$bin/ruff" check --quiet .
run "$bin/mypy"
run "$bin/lint-imports" --no-cache
run "$bin/bandit" -q -c pyproject.toml -r usdm_megatron tools
# Quick tests: the folders that start no ranks. scripts/test.sh runs all of them.
run "$PYTHON" -m pytest -q -m "not exhaustive and not gpu" tests/data_floor tests/demo_floor tests/docs

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'check: failed: %s\n' "${failed[*]##*/}" >&2
    exit 1
fi
echo "check: all passed"
