"Official data sets from a server that stalls, truncates, lies or lacks the file."
import functools, hashlib, http.server, io, tarfile, threading

import numpy as np
import pytest
from PIL import Image

import fastcifar.data.fetch as fetch
from fastcifar.basics import FastcifarError
from fastcifar.data.cache import cache_root
from fastcifar.data.load import load_data

NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()

def tar(entries):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w:gz') as t:
        for n, b in entries.items():
            i = tarfile.TarInfo(n)
            i.size = len(b)
            t.addfile(i, io.BytesIO(b))
    return f.getvalue()

def records(seed, n):
    rng = np.random.default_rng(seed)
    return b''.join(bytes([i % 10]) + rng.bytes(3072) for i in range(n))

@functools.cache
def binary(): # a hundredth of CIFAR-10 in its official form
    names = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
    return tar({f'cifar-10-batches-bin/{name}.bin': records(i, 100) for i, name in enumerate(names)})

@functools.cache
def tree(missing=0):
    f = io.BytesIO()
    Image.new('RGB', (32, 32), (9, 8, 7)).save(f, 'PNG')
    places = [f'{s}/{c}/{i}' for s, n in (('train', 50), ('test', 10)) for c in NAMES for i in range(n - missing)]
    return tar({f'cifar10/{place}.png': f.getvalue() for place in places})

@pytest.fixture
def server(monkeypatch):
    "Serves `files`; paths map to bytes or to a function of the handler"
    files = {}
    class H(http.server.BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self):
            b = files.get(self.path)
            if b is None: return self.send_error(404)
            if callable(b): return b(self)
            start = int(self.headers['Range'][6:-1]) if self.headers.get('Range') else 0
            self.send_response(206 if start else 200)
            if start: self.send_header('Content-Range', f'bytes {start}-{len(b) - 1}/{len(b)}')
            self.send_header('Content-Length', str(len(b) - start)); self.end_headers()
            self.wfile.write(b[start:])
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    base = f'http://127.0.0.1:{s.server_port}'
    sha = hashlib.sha256(binary()).hexdigest()
    a = fetch.ARCHIVES['cifar10']._replace(url=f'{base}/official', sha256=sha, counts=(50, 10), tree=f'{base}/tree')
    monkeypatch.setitem(fetch.ARCHIVES, 'cifar10', a)
    monkeypatch.setattr(fetch.time, 'sleep', lambda s: None)
    files['base'] = base
    yield files
    s.shutdown(); s.server_close()

def test_official_place(server):
    server['/official'] = binary()
    d = load_data('cifar10')
    assert (len(d.y['train']), len(d.y['test'])) == (500, 100) and d.classes == NAMES
    server.pop('/official')
    assert load_data('cifar10').x['train'].shape == (500, 32, 32, 3) # from the cache: the server has nothing any more

def test_mirror_after_a_lie(server, monkeypatch):
    server['/official'] = binary()[:-5] + b'liar!'
    server['/mirror/cifar-10-binary.tar.gz'] = binary()
    monkeypatch.setenv('FASTCIFAR_MIRRORS', f'{server["base"]}/nothing {server["base"]}/mirror/')
    assert len(load_data('cifar10').y['train']) == 500

def test_tree_as_last_resort(server):
    server['/tree'] = tree()
    d = load_data('cifar10')
    assert d.classes == NAMES and (d.x['train'] == [9, 8, 7]).all()

def test_tree_with_wrong_counts_is_refused(server):
    server['/tree'] = tree(missing=1)
    with pytest.raises(FastcifarError, match='does not hold 50 train images'): load_data('cifar10')

def test_nothing_to_be_had(server):
    said = 'could not be downloaded.*404.*FASTCIFAR_MIRRORS'
    with pytest.raises(FastcifarError, match=said) as e: load_data('cifar10')
    assert '\n' not in str(e.value)
    assert not [p for p in cache_root().rglob('*') if p.suffix in ('.gz', '.tgz')]

def test_interrupted_download_is_resumed(server):
    asked = []
    def half(h):
        start = int(h.headers['Range'][6:-1]) if h.headers.get('Range') else 0
        asked.append(start)
        b = binary()
        h.send_response(206 if start else 200)
        if start: h.send_header('Content-Range', f'bytes {start}-{len(b) - 1}/{len(b)}')
        h.send_header('Content-Length', str(len(b) - start)); h.end_headers()
        h.wfile.write(b[start:start + len(b) // 3 + 1])
    server['/official'] = half
    assert len(load_data('cifar10').y['train']) == 500
    assert asked[0] == 0 and 0 < asked[1] < asked[2]
