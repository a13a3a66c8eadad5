"One image set in every form in which CIFAR comes, official pickles with the bytes of Python 2"
import io, tarfile, zipfile
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()

def py2_text(s):
    "A `str` of Python 2 in protocol 2: SHORT_BINSTRING, or BINSTRING where it is long"
    s = s.encode() if isinstance(s, str) else bytes(s)
    return b'U' + bytes([len(s)]) + s if len(s) < 256 else b'T' + len(s).to_bytes(4, 'little') + s

def py2_int(i): return b'K' + bytes([i]) if i < 256 else b'M' + i.to_bytes(2, 'little')

def py2_list(items, write): return b'](' + b''.join(map(write, items)) + b'e'

def py2_array(x, kind='u1', order='|', fortran=False):
    "As NumPy under Python 2 wrote it: `(1, shape, dtype, fortran, bytes)`, the dtype with its state"
    dtype = b'cnumpy\ndtype\n' + py2_text(kind) + b'K\0K\1\x87R'
    dtype += b'(K\3' + py2_text(order) + b'NNN' + b'J\xff\xff\xff\xff' * 2 + b'K\0tb'
    start = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85' + py2_text('b') + b'\x87R'
    shape, data = b''.join(map(py2_int, x.shape)) + b'\x86', py2_text(x.tobytes('F' if fortran else 'C'))
    state = shape + dtype + (b'\x88' if fortran else b'\x89') + data
    return start + b'(K\1' + state + b'tb'

def py2_dict(d): return b'\x80\2}(' + b''.join(py2_text(k) + v for k, v in d.items()) + b'u.'

def py2_batch(x, label, names, **labels):
    "An official batch: `x` (N, 32, 32, 3) and lists of labels"
    rows = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), -1)
    labels = {k: py2_list(v, py2_int) for k, v in labels.items()}
    names = py2_list(names, py2_text)
    return py2_dict(dict(batch_label=py2_text(label), **labels, data=py2_array(rows), filenames=names))

def records(x, *labels):
    "The binary form: label bytes, then red, green and blue of each image"
    rows = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), -1)
    return np.concatenate([*(np.array(l, np.uint8)[:, None] for l in labels), rows], 1).tobytes()

def batches10(x, y):
    "The six batches of CIFAR-10: name -> (images, labels)"
    n = len(y['test'])
    part = [slice(i * n, (i + 1) * n) for i in range(5)]
    train = {f'data_batch_{i}': (x['train'][p], y['train'][p].tolist()) for i, p in enumerate(part, 1)}
    return train | {'test_batch': (x['test'], y['test'].tolist())}

def binary10(x, y):
    files = {f'{n}.bin': records(b, l) for n, (b, l) in batches10(x, y).items()}
    files['batches.meta.txt'] = '\n'.join([*NAMES, '', '']).encode()
    return {f'cifar-10-batches-bin/{n}': b for n, b in files.items()}

def python10(x, y):
    files = {n: py2_batch(b, n, [f'{i}.png' for i in range(len(l))], labels=l) for n, (b, l) in batches10(x, y).items()}
    cases, names = py2_int(len(y['test'])), py2_list(NAMES, py2_text)
    files['batches.meta'] = py2_dict(dict(num_cases_per_batch=cases, label_names=names, num_vis=py2_int(3072)))
    return {f'cifar-10-batches-py/{n}': b for n, b in files.items()}

def pngs(x, y, classes, seed=0):
    "A tree of PNG files whose names say nothing of their order"
    files, rng = {}, np.random.default_rng(seed)
    for s in ('train', 'test'):
        for name, i in enumerate(rng.permutation(len(y[s]))):
            f = io.BytesIO()
            Image.fromarray(x[s][i]).save(f, 'PNG', compress_level=int(rng.integers(10)))
            files[f'{s}/{classes[y[s][i]]}/{name:05}.png'] = f.getvalue()
    return files

def as_folder(folder, files):
    for n, b in files.items():
        (Path(folder)/n).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder)/n).write_bytes(b)
    return Path(folder)

def as_tar(path, files, kind='gz'):
    with tarfile.open(path, f'w:{kind}') as t:
        for n, b in files.items():
            i = tarfile.TarInfo(n)
            i.size = len(b)
            t.addfile(i, io.BytesIO(b))
    return Path(path)

def as_zip(path, files):
    with zipfile.ZipFile(path, 'w') as z:
        for n, b in files.items(): z.writestr(n, b)
    return Path(path)

def small10(n=2, seed=0):
    "(x, y) of a set in the manner of CIFAR-10: 5 x 10n training and 10n test images"
    rng = np.random.default_rng(seed)
    y = {s: rng.permutation(np.repeat(np.arange(10), k * n)) for s, k in (('train', 5), ('test', 1))}
    def images(y):
        return rng.integers(0, 80, (len(y), 32, 32, 3), dtype=np.uint8) + (17 * y).astype(np.uint8)[:, None, None, None]
    x = {s: images(v) for s, v in y.items()}
    return x, y
