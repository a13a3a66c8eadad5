#!/bin/sh
# run.sh ARGS OF PYTHON: in the repository's root, on a CUDA GPU that is not there (see README.md).
# The first call builds two small libraries, for which it needs g++ and the headers in the nvidia packages that torch brings.
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-.venv/bin/python}
export STANDIN=${STANDIN:-${TMPDIR:-/tmp}/fastcifar-standin-$(id -u)}
if [ ! -f "$STANDIN/libfakecudart.so" ]; then
  headers=$("$python" -c 'import nvidia, pathlib; print(next(d/"cu13/include" for d in map(pathlib.Path, nvidia.__path__) if (d/"cu13/include").is_dir()))' 2>/dev/null)
  command -v g++ >/dev/null || { echo 'the stand-in for a GPU is skipped: it needs g++'; exit 77; }
  [ -n "$headers" ] || { echo 'the stand-in for a GPU is skipped: this torch brings no CUDA 13 headers'; exit 77; }
  mkdir -p "$STANDIN"
  g++ -O1 -w -shared -fPIC -I"$here/inc" -I"$headers" -o "$STANDIN/libfakecudart.so" "$here/fakecudart.cpp" || exit 1
  gcc -O1 -w -shared -fPIC -o "$STANDIN/libcuda.so.1" "$here/fakecuda.c" || exit 1
  ln -sf libcuda.so.1 "$STANDIN/libcuda.so"
fi
export LD_LIBRARY_PATH="$STANDIN" LD_PRELOAD="$STANDIN/libfakecudart.so" TRITON_LIBCUDA_PATH="$STANDIN"
export PYTHONPATH="$here:$PWD" PYTHONDONTWRITEBYTECODE=1 NO_ALBUMENTATIONS_UPDATE=1 MPLBACKEND=agg OMP_NUM_THREADS=1
exec "$python" "$@"
