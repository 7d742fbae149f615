#!/usr/bin/env bash
# The image's lock files, infra/docker/locks/*.txt, from pyproject.toml and the LAVIS pins: every
# package by exact version and hash, for CPython 3.11 on x86_64 Linux. Pins that still fit stay;
# `lock.sh --upgrade` takes the newest of everything.
#
#   UV               the uv to run (.venv/bin/uv)
#   TORCH            the torch to lock, from the Makefile
#   TORCH_CPU_INDEX  where CPU builds of torch are (https://download.pytorch.org/whl/cpu), or a mirror
set -euo pipefail
cd "$(dirname "$0")/../.."

UV=${UV:-.venv/bin/uv}
: "${TORCH:?is set by \`make lock\`}"
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
LOCKS=infra/docker/locks
export UV_CUSTOM_COMPILE_COMMAND="make lock"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$LOCKS"

# resolve OUTPUT INPUT...: the pins already in OUTPUT stay where they fit.
resolve() {
  "$UV" pip compile --quiet --no-config --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --output-file "$@" >/dev/null
}

# lock NAME INPUT...: the same with hashes, in $LOCKS.
lock() { resolve "$LOCKS/$1.txt" --generate-hashes "${@:2}"; }

# One resolution of everything, so that torch's locks and the main one agree.
echo "$TORCH" >"$work/torch.in"
echo "$TORCH+cpu" >"$work/torch-cpu.in"
printf '%s\n' 'setuptools<81' wheel >"$work/builds.in"
echo uv >"$work/uv.in"
everything=(pyproject.toml "$work/torch.in" --extra gcs --extra mlflow --extra serve --extra tuning \
  --extra wandb)
cat "$LOCKS"/{main,torch,torch-cuda}.txt >"$work/all.txt" 2>/dev/null || true
resolve "$work/all.txt" "$@" "${everything[@]}"
resolve "$work/torch.txt" --no-annotate --no-header -c "$work/all.txt" "$work/torch.in"

# torch, and what only its CUDA build needs, apart from what both builds need
BUILD='^(torch|triton|(nvidia|cuda)-.*)$'
sed -i 's/==.*//' "$work/torch.txt"
mapfile -t build < <(sed -E "/$BUILD/!d; s/^/--no-emit-package=/" "$work/torch.txt")
mapfile -t shared < <(sed -E "/$BUILD/d; s/^/--no-emit-package=/" "$work/torch.txt")

for name in main torch torch-cuda; do cp "$work/all.txt" "$LOCKS/$name.txt"; done
lock main "${build[@]}" "${shared[@]}" "${everything[@]}"
lock torch --no-annotate "${build[@]}" "$work/torch.in"
lock torch-cuda --no-annotate "${shared[@]}" "$work/torch.in"
lock torch-cpu --no-annotate --no-deps --default-index "$TORCH_CPU_INDEX" "$work/torch-cpu.in"
lock lavis --no-annotate --no-deps "$@" "$work/builds.in" \
  pipeline/curation/captioning/lavis-requirements.txt
lock uv --no-annotate "$@" "$work/uv.in"
grep -c == "$LOCKS"/*.txt
