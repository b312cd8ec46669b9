#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a machine runs that receives the working tree and some parts of the bundle a call:
#   bash scripts/gpu/driver.sh [run.py's options] [STAGE...]
# Parts that came before stay in $KVSERVE_GPU_HOME; what is found goes to $OUT.
set -u
home=${KVSERVE_GPU_HOME:-/tmp/kvserve-gpu}
out=${OUT:-gpu-results}
mkdir -p "$home/parts" "$home/out" "$out"
cp .gpu/manifest.json "$home/parts/" || exit 2
for part in .gpu/part-*; do
  if [ -f "$part" ]; then mv "$part" "$home/parts/"; fi
done
trap 'tar -C "$home/out" -czf "$out/logs.tgz" .' EXIT
set -o pipefail
python3 scripts/gpu/run.py --bundle "$home/parts" --home "$home" --out "$home/out" "$@" |
  tee "$out/lines.jsonl"
