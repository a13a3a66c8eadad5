"Sources: hostile, broken, simultaneous, real."
import io, os, pickle, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from fastcifar.data.archive import members
from fastcifar.data.formats import read_images, read_pickle
from fastcifar.basics import FastcifarError
from fastcifar.data.load import load_data
from fastcifar.data.images import stratified_holdout

REAL = os.environ.get('FASTCIFAR_DATA')

@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_stratified_holdout(counts, data):
    y = np.repeat(np.arange(len(counts)), counts)
    n = data.draw(st.integers(len(counts), max(len(counts), len(y) - len(counts))))
    if n > len(y) - len(counts): return
    keep, out = stratified_holdout(y, n)
    assert len(out) == n and sorted([*keep, *out]) == list(range(len(y)))
    share, taken = n * np.array(counts) / len(y), np.bincount(y[out], minlength=len(counts))
    if (share >= 1).all() and (share <= np.array(counts) - 1).all(): assert (np.abs(taken - share) < 1).all()

@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_no_pickle(data):
    try: read_pickle(data, 'batch')
    except FastcifarError: pass

@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_pickles(at, byte):
    good = bytearray(pickle.dumps({b'data': np.arange(3072, dtype=np.uint8).reshape(1, 3072), b'labels': [1]}, 2))
    good[at % len(good)] = byte
    try: read_pickle(bytes(good), 'batch')
    except FastcifarError: pass

HOSTILE = {
    'system': b"cos\nsystem\n(S'touch /tmp/fastcifar-pwned'\ntR.",
    'eval': b"c__builtin__\neval\n(S'1'\ntR.",
    'huge memo index': b'\x80\x02}r\xff\xff\xff\x7f.',
    'huge array': pickle.dumps(np.zeros(1), 2).replace(b'K\x01\x85', b'J\xff\xff\xff\x7f\x85'),
    'object array': pickle.dumps(np.array([{}], dtype=object), 2)}

@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickles(name):
    try: got = read_pickle(HOSTILE[name], 'batch')
    except FastcifarError as e: assert '\n' not in str(e)
    else: assert name == 'huge memo index' and got == {} # harmless here: the memo is a dict
    assert not os.path.exists('/tmp/fastcifar-pwned')

def test_zip_with_a_link_and_a_path_outside(tmp_path):
    for name, mode in (('../evil.png', 0), ('train/cat/link', 0o120777 << 16)):
        with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
            i = zipfile.ZipInfo(name)
            i.external_attr = mode
            z.writestr(i, b'/etc/passwd')
        with pytest.raises(FastcifarError, match='outside the archive|link'): list(members(tmp_path/'a.zip'))

def test_bombs_are_refused_before_they_unpack(tmp_path):
    f = io.BytesIO()
    Image.new('1', (20_000, 20_000)).save(f, 'PNG') # 400 megapixels in some kB
    with tarfile.open(tmp_path/'bomb.tgz', 'w:gz') as t:
        i = tarfile.TarInfo('train/cat/1.png')
        i.size = f.tell(); f.seek(0)
        t.addfile(i, f)
    with pytest.raises(FastcifarError, match='1.png cannot be read.*Bomb'):
        read_images(tmp_path/'bomb.tgz', convert=True)
    with zipfile.ZipFile(tmp_path/'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('train/cat/1.png', bytes(300 * 2**20))
    with pytest.raises(FastcifarError, match='bytes'): read_images(tmp_path/'bomb.zip')

def test_truncated_archives(tmp_path, tree):
    whole = shutil.make_archive(str(tmp_path/'squares'), 'gztar', tree)
    data = open(whole, 'rb').read()
    assert load_data(whole).classes == ['blue', 'green', 'red']
    for cut in (0, 10, len(data) // 2, len(data) - 9):
        (tmp_path/'cut.tgz').write_bytes(data[:cut])
        with pytest.raises(FastcifarError): load_data(tmp_path/'cut.tgz')

def test_folder_tar_and_zip_give_the_same(tmp_path, tree):
    a = load_data(tree)
    for kind in ('gztar', 'tar', 'zip'):
        b = load_data(shutil.make_archive(str(tmp_path/kind), kind, tree))
        assert b.classes == a.classes
        for s in ('train', 'test'): assert (b.x[s] == a.x[s]).all() and (b.y[s] == a.y[s]).all()

def test_folder_with_a_device_or_a_loop(tmp_path, tree):
    shutil.copytree(tree, tmp_path/'t')
    os.mkfifo(tmp_path/'t/train/red/pipe.png')
    with pytest.raises(FastcifarError, match='pipe.png is not a regular file'): load_data(tmp_path/'t')
    (tmp_path/'t/train/red/pipe.png').unlink()
    (tmp_path/'t/train/red/null.png').symlink_to('/dev/null')
    with pytest.raises(FastcifarError, match='null.png is not a regular file'): load_data(tmp_path/'t')
    (tmp_path/'t/train/red/null.png').unlink()
    (tmp_path/'t/train/red/again').symlink_to(tmp_path/'t')
    with pytest.raises(FastcifarError, match='again is a link to a folder'): load_data(tmp_path/'t')

def test_two_processes_start_together(tmp_path, tree):
    load = f'from fastcifar.data.load import load_data; d = load_data({str(tree)!r})'
    code = f'{load}; print(int(d.x["train"].astype(int).sum()))'
    ps = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {p.communicate(timeout=120)[0] for p in ps}
    assert len(sums) == 1 and all(p.returncode == 0 for p in ps)
    left = [p.name for p in Path(os.environ['FASTCIFAR_CACHE']).iterdir() if p.suffix != '.lock']
    assert len(left) == 1

def test_an_unwritable_cache(monkeypatch, tree):
    monkeypatch.setenv('FASTCIFAR_CACHE', '/dev/null/cache')
    with pytest.raises(FastcifarError, match='FASTCIFAR_CACHE'): load_data(tree)

@pytest.mark.skipif(not REAL, reason='FASTCIFAR_DATA names no CIFAR-10 archive')
def test_the_real_images(monkeypatch, tmp_path):
    d = load_data(REAL)
    assert d.counts().values.tolist() == [[5000, 1000]] * 10
    assert d.classes == 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    assert np.abs(np.array(d.mean) - (.4914, .4822, .4465)).max() < .001
    assert np.abs(np.array(d.std) - (.2470, .2435, .2616)).max() < .003 # JPEG coding takes a little contrast away
