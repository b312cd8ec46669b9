#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install kvserve and everything in its lock into a virtual environment.
#   PYTHON=python3.12 VENV=.venv DEVICE=cpu|gpu scripts/install.sh
set -euo pipefail

PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} DEVICE=${DEVICE:-cpu}
LOCK=requirements/$DEVICE.lock

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
  echo "kvserve needs Python 3.11 to 3.13; set PYTHON=python3.12, say" >&2
  exit 2
}
# Triton compiles at every start, and includes a header that distributions package apart.
# On CPUs only who asks for it (-O2) has anything compiled with it, and is told then.
header=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ "$DEVICE" = cpu ] || [ -e "$header" ] || {
  echo "kvserve needs $header (Triton): install python3-dev, or what has it" >&2
  exit 2
}
command -v c++ g++ clang++ >/dev/null || {
  echo "kvserve needs a C++ compiler: install g++" >&2
  [ "$DEVICE" = cpu ] || exit 2
  echo "without one this CPU decodes up to half as fast" >&2
}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { PIP_RETRIES=${PIP_RETRIES:-1} "$VENV/bin/python" -m pip "$@"; }
pip install -q uv
uv() { "$VENV/bin/uv" pip "$@" -p "$VENV/bin/python"; }

if [ "$DEVICE" = cpu ]; then
  # The CPU build of torch is on no ordinary index. pip may be configured to find it
  # (uv does not read that configuration); otherwise uv knows PyTorch's own index.
  torch=$(grep -E '^torch==' "$LOCK")
  pip install -q --no-deps "$torch" 2>/dev/null ||
    uv install -q --no-deps --torch-backend cpu "${torch%+cpu}"
fi
uv install --no-deps -r "$LOCK" -e .
# An earlier build's list of policies would hide the one just installed.
rm -rf kvserve.egg-info
# What a first start would do, done at once: bytecode and kernels beside the model.
unset PYTHONDONTWRITEBYTECODE
"$VENV/bin/python" -c '
import vllm.entrypoints.launchers.cli_args, vllm.v1.engine.core, vllm.v1.worker.cpu_worker
from kvserve.kernels.native import library
library()' >/dev/null 2>&1 &
"$VENV/bin/python" -c 'from kvserve.models import embedded_model; embedded_model()'
wait
