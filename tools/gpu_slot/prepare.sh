#!/usr/bin/env bash
# prepare.sh WHEELS PART.zip ... [airbench94_muon.py]: in the repository's root, fills the ignored folder .gpu with what a CUDA machine without a
# package index needs beside the working tree. WHEELS is a folder of wheels, or - for none (a later call to a machine that has them). Images and
# airbench are copied as they are, so that large data can travel in several calls.
set -euo pipefail
wheels=$1; shift
rm -rf .gpu; mkdir -p .gpu
[ "$wheels" = - ] || cp -r "$wheels" .gpu/whl
for f in "$@"; do cp "$f" .gpu/; done
du -sh .gpu
