#!/bin/sh
# Measures the GPU path on a machine with PyTorch: see benchmarks/README.md, "GPU".
#   benchmarks/gpu.sh [--models sd15,sdxl] [--parts PART,...] [--small] [--out FOLDER]
#                     [--wheels FOLDER] [--server-wheels FOLDER] [--budget SECONDS]
# Packages that are missing are installed from folders of wheels, without an index, into build/gpu/;
# benchmarks/gpu/wheels.sh collects them.
set -eu
start=$(date +%s)
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
budget=540
wheels=
server_wheels=
site=$root/build/gpu/site
server_site=$root/build/gpu/server-site

# What this script itself takes; the rest is the command's.
count=$#
while [ "$count" -gt 0 ]; do
  argument=$1
  shift
  count=$((count - 1))
  case $argument in
    --wheels | --server-wheels | --budget)
      if [ "$count" -eq 0 ]; then
        echo "gpu.sh: $argument needs a value" >&2
        exit 2
      fi
      case $argument in
        --wheels) wheels=$1 ;;
        --server-wheels) server_wheels=$1 ;;
        --budget) budget=$1 ;;
      esac
      shift
      count=$((count - 1))
      ;;
    --wheels=*) wheels=${argument#*=} ;;
    --server-wheels=*) server_wheels=${argument#*=} ;;
    --budget=*) budget=${argument#*=} ;;
    *) set -- "$@" "$argument" ;;
  esac
done
case $budget in
  '' | *[!0-9]*)
    echo "gpu.sh: --budget: '$budget' is not a whole number of seconds" >&2
    exit 2
    ;;
esac

# The sources first: a wheel of darkroom is there for its version alone.
PYTHONPATH=$root/client:$root/export:$root/model_repository/stable_diffusion/1
PYTHONPATH=$PYTHONPATH:$root/model_repository/shared:$root:$site
export PYTHONPATH PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The machine's own PyTorch and what else it has stay as they are: the wheels go into a folder apart.
install() {
  if ! ls "$2"/*.whl >/dev/null 2>&1; then
    echo "gpu.sh: $2: no wheels" >&2
    exit 1
  fi
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --disable-pip-version-check --target "$1" "$2"/*.whl
}
if [ -n "$wheels" ]; then
  install "$site" "$wheels"
  # tritonclient refuses older versions of these than it was made with.
  if ! "$python" -c 'import tritonclient.grpc' 2>/dev/null; then
    install "$site" "$wheels/if-needed"
  fi
fi
if [ -n "$server_wheels" ]; then install "$server_site" "$server_wheels"; fi

cd "$root"
budget=$((budget - $(date +%s) + start))
exec "$python" -m benchmarks.gpu --budget "$budget" "$@"
