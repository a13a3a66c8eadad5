"""Write the official order of CIFAR-10 for the package, and print its content hash.

python tools/cifar10_order.py FOLDER, which holds the official batches, binary or python."""
import io, sys
from pathlib import Path

import numpy as np

from fastcifar.data.formats import read_images
from fastcifar.basics import write_atomic
from fastcifar.data.images import content_hash, image_digests

FILE = Path(__file__).resolve().parents[1]/'fastcifar/templates/cifar10_order.npz'

def places(digests):
    "For each image its rank in the order of the hashes"
    rank = np.empty(len(digests), np.uint16)
    rank[np.argsort(digests, kind='stable')] = np.arange(len(digests), dtype=np.uint16)
    return rank

if __name__ == '__main__':
    arrays, f = read_images(sys.argv[1]), io.BytesIO()
    digests = image_digests(arrays)
    np.savez(f, **{s: places(d) for s, d in digests.items()})
    print(write_atomic(FILE, lambda tmp: Path(tmp).write_bytes(f.getvalue())), content_hash(arrays, digests))
