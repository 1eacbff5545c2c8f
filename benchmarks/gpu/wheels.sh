#!/bin/sh
# Collects the wheels that `benchmarks/gpu.sh --wheels FOLDER` installs on a machine without an
# index: for Python 3.12 on Linux x86-64, what a machine with PyTorch, transformers, tokenizers,
# huggingface-hub, safetensors, accelerate, onnx, onnxscript, onnxruntime, grpcio, protobuf, pillow
# and numpy 2 lacks.
#   benchmarks/gpu/wheels.sh FOLDER            what measures in one process: FOLDER
#   benchmarks/gpu/wheels.sh --server FOLDER   the real tritonserver, and the numpy that it wants
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
python=${PYTHON:-python3}
is_server=0
if [ "${1:-}" = --server ]; then
  is_server=1
  shift
fi
if [ $# -ne 1 ]; then
  echo "usage: wheels.sh [--server] FOLDER" >&2
  exit 2
fi
folder=$1

download() {
  target=$1
  shift
  mkdir -p "$target"
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_35_x86_64 --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 --dest "$target" "$@"
}

if [ "$is_server" = 1 ]; then
  # numpy 1 in a folder of the server's own, see benchmarks/gpu.sh: the others keep theirs.
  download "$folder" nvidia-pytriton==0.7.0 numpy==1.26.4
else
  download "$folder" diffusers==0.42.1 importlib-metadata==8.7.0 zipp==3.23.0 python-rapidjson==1.21
  # The one for any platform is small: the other carries perf_analyzer.
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation py --abi none --platform any --dest "$folder" \
    tritonclient==2.73.0
  # Only for a machine whose own are too old for it.
  download "$folder/if-needed" grpcio==1.85.1 protobuf==6.33.6
  # For the version that an export writes down.
  "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" "$root"
fi
find "$folder" -name '*.whl' -exec du -ch {} +
