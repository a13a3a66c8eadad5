#!/usr/bin/env bash
# slot.sh SECONDS PART ...: in the repository's root on the CUDA machine: install the wheels of .gpu once, unpack what images have come, run slot.py
set -u; begun=$SECONDS; seconds=$1; shift
export OUT=${OUT:-$PWD/.gpu/out} NO_ALBUMENTATIONS_UPDATE=1 MPLBACKEND=agg PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export FASTCIFAR_CACHE=/tmp/slot/cache TORCHINDUCTOR_CACHE_DIR=/tmp/slot/inductor TRITON_CACHE_DIR=/tmp/slot/triton PYTHONPATH=/tmp/slot/site:$PWD
mkdir -p "$OUT" /tmp/slot
if [ -d .gpu/whl ] && [ ! -d /tmp/slot/site ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/slot/site .gpu/whl/*.whl || echo 'the wheels could not be installed'
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv | tee "$OUT/gpu.txt"
for unpack in .gpu/*unpack*.py; do # brings images in a form of its own into /tmp/slot/cifar-10-batches-bin
  [ -f "$unpack" ] && python3 "$unpack" /tmp/slot .gpu/*.zip | tee -a "$OUT/data.txt"
done
[ -f /tmp/slot/cifar-10-batches-bin/test_batch.bin ] && [ -f /tmp/slot/cifar-10-batches-bin/data_batch_5.bin ] && export FASTCIFAR_DATA=/tmp/slot/cifar-10-batches-bin
for script in .gpu/airbench*.py; do [ -f "$script" ] && export AIRBENCH=$PWD/$script; done
python3 tools/gpu_slot/slot.py "$@" --seconds $((seconds - SECONDS + begun))
