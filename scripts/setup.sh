#!/usr/bin/env bash
# Sets up what is missing, once, and says what it does.
#
#   source scripts/setup.sh [demo|dev]     afterwards $PYTHON is the interpreter to use
#   bash   scripts/setup.sh [demo|dev]     only sets up
#
# demo: what training and the demo need; dev (default): the tests and the static checks too.
# An active environment (virtualenv, conda, a container's python) that has torch is used as it is,
# its torch is not replaced. Otherwise .venv is made in the repository.
#
# TORCH_SPEC       what pip installs as torch             (default torch==2.13.0)
# TORCH_INDEX_URL  an extra package index for torch       (default without an NVIDIA GPU: PyTorch's CPU builds)
# USDM_SKIP_SETUP  1: install nothing, use the active python as it is (machines without a network)
# USDM_PYTHON      the interpreter that .venv is made from (default: the first of python3, python3.13 … 3.10)

_usdm_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_usdm_cpu_index="https://download.pytorch.org/whl/cpu"

_usdm_say() { printf 'set-up: %s\n' "$*" >&2; }

# usable INTERPRETER: Python >= 3.10, < 3.14
_usdm_usable() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

# has_torch INTERPRETER: torch >= 2.6 is installed (found by its metadata: importing it takes seconds)
_usdm_has_torch() {
    "$1" - >/dev/null 2>&1 <<'PY'
import importlib.metadata, re, sys
version = importlib.metadata.version("torch")
sys.exit(tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 6))
PY
}

# writable INTERPRETER: pip may install there (not a distribution's own python, not another user's)
_usdm_writable() {
    "$1" - >/dev/null 2>&1 <<'PY'
import os, pathlib, sys, sysconfig
in_environment = sys.prefix != sys.base_prefix
managed = pathlib.Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists() and not in_environment
sys.exit(managed or not os.access(sysconfig.get_path("purelib"), os.W_OK))
PY
}

_usdm_has_gpu() {
    [ -e /proc/driver/nvidia/version ] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1
}

# Prints the interpreter that .venv is made from.
_usdm_base_python() {
    local candidate
    for candidate in ${USDM_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if _usdm_usable "$candidate" && "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    _usdm_say "no Python >= 3.10 and < 3.14 with the modules venv and ensurepip was found" \
        "(on Debian and Ubuntu: apt install python3-venv); name one by USDM_PYTHON=…"
    return 1
}

# make_venv BASE [--system-site-packages]
_usdm_make_venv() {
    _usdm_say "making .venv with $("$1" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
    "$1" -m venv --clear "${@:2}" "$_usdm_root/.venv"
}

# Sets PYTHON: the active environment if it has torch, else .venv, made if it is missing or broken.
_usdm_choose_environment() {
    local active venv_python="$_usdm_root/.venv/bin/python"
    for active in python python3; do
        if _usdm_usable "$active" && _usdm_has_torch "$active"; then
            PYTHON="$("$active" -c 'import sys; print(sys.executable)')"
            [ "$PYTHON" = "$venv_python" ] && return 0
            if _usdm_writable "$active"; then
                _usdm_say "using the active environment, which has torch: $PYTHON"
                return 0
            fi
            if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
                _usdm_say "$PYTHON has torch but cannot be installed into: .venv will sit on top of it"
                _usdm_make_venv "$PYTHON" --system-site-packages || return 1
            fi
            PYTHON="$venv_python"
            return 0
        fi
    done
    if ! { _usdm_usable "$venv_python" && "$venv_python" -m pip --version; } >/dev/null 2>&1; then
        local base
        base="$(_usdm_base_python)" || return 1
        _usdm_make_venv "$base" || return 1
    fi
    PYTHON="$venv_python"
}

# pip, quiet but not silent: one line per large download and per package that is built.
_usdm_pip() {
    local log status=0 line
    log="$(mktemp)"
    (
        set -o pipefail # the loop's status says nothing of pip's
        "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 | tee "$log" |
            while IFS= read -r line; do
                case "$line" in
                    *Downloading*" MB)" | *"Building wheel for"*"): started" | "Installing collected packages"*)
                        printf '  %.110s\n' "${line#"${line%%[![:space:]]*}"}" >&2 ;;
                esac
            done
    ) || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 30 "$log" >&2
        _usdm_say "pip failed with code $status; its whole output is in $log"
        return "$status"
    fi
    rm -f "$log"
}

_usdm_install_torch() {
    local spec="${TORCH_SPEC:-torch==2.13.0}" index="${TORCH_INDEX_URL:-}" options=()
    if [ -n "$index" ] || ! _usdm_has_gpu; then
        # An *extra* index: a local version such as 2.13.0+cpu outranks 2.13.0, so the CPU build is taken
        # wherever it is offered; where the index cannot be reached it costs these seconds and no more.
        options=(--extra-index-url "${index:-$_usdm_cpu_index}" --timeout 10 --retries 1)
    fi
    if _usdm_has_gpu; then
        _usdm_say "installing $spec for the NVIDIA GPU"
    else
        _usdm_say "installing $spec, the CPU build (no NVIDIA GPU here)"
    fi
    _usdm_pip "${options[@]}" "$spec"
}

# What the stamp of a finished set-up says; another setup.py, checkout or set of extras differs.
_usdm_stamp_text() {
    "$PYTHON" - "$_usdm_root" "$1" <<'PY'
import hashlib, importlib.metadata, pathlib, sys
root, extra = sys.argv[1:]
print(hashlib.sha256(pathlib.Path(root, "setup.py").read_bytes()).hexdigest(), root, extra, end=" ")
print(importlib.metadata.version("torch"))
PY
}

_usdm_setup() {
    local extra="${1:-dev}" stamp constraints started=$SECONDS wanted
    case "$extra" in demo | dev) ;; *) _usdm_say "unknown set '$extra'; demo or dev"; return 2 ;; esac
    if [ "${USDM_SKIP_SETUP:-0}" = 1 ]; then
        PYTHON="$(python -c 'import sys; print(sys.executable)')" || return 1
        _usdm_say "skipped; using $PYTHON"
        return 0
    fi
    _usdm_choose_environment || return 1
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.usdm_megatron_setup"
    for wanted in "$extra" dev; do # dev holds everything that demo does
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(_usdm_stamp_text "$wanted" 2>/dev/null)" ]; then
            return 0
        fi
    done
    _usdm_has_torch "$PYTHON" || _usdm_install_torch || return 1
    constraints="$(mktemp)"
    "$PYTHON" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$constraints"
    _usdm_say "installing usdm_megatron and what it needs (torch stays as it is: $(cat "$constraints"))"
    _usdm_pip --constraint "$constraints" --editable "${_usdm_root}[$extra]" || return 1
    rm -f "$constraints"
    _usdm_stamp_text "$extra" >"$stamp"
    _usdm_say "done in $((SECONDS - started)) s"
}

_usdm_setup "$@" || { _usdm_status=$?; return "$_usdm_status" 2>/dev/null || exit "$_usdm_status"; }
export PYTHON
PATH="$(dirname "$PYTHON"):$PATH"
export PATH
