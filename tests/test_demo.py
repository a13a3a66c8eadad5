"`fastcifar demo`: a page on this machine that takes images and nothing else."
import os, re, socket, subprocess, sys, time

import numpy as np
import pytest
from PIL import Image

from fastcifar.share.predict import predict_files

# reports every connection and look-up of the server
WATCHED = '''
import sys
PLACE = {"socket.connect": 1, "socket.getaddrinfo": 0} # which argument says where to
sys.addaudithook(lambda e, a: print("CALL", e, a[PLACE[e]], file=sys.stderr, flush=True) if e in PLACE else None)
from fastcifar.cli import main
sys.exit(main(sys.argv[1:]))
'''

@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "The address of the page of a short run on the digits, and what the server has said"
    pytest.importorskip('gradio', reason='the demo extra is not installed')
    import matplotlib; matplotlib.use('agg')
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    d = tmp_path_factory.mktemp('demo')
    c = configure(model='normnet31k', data='digits', epochs=1, bs=64, lr_max=1e-2)
    train_run(c, d/'run', threads=1, bars=False, say=lambda s: None)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    said = d/'said.txt'
    command = [sys.executable, '-c', WATCHED, 'demo', str(d/'run'), '--port', str(port)]
    env = {**os.environ, 'GRADIO_TEMP_DIR': str(d/'tmp')}
    with open(said, 'w') as f: server = subprocess.Popen(command, stdout=f, stderr=f, env=env)
    deadline = time.time() + 120
    while 'open http' not in said.read_text() and server.poll() is None and time.time() < deadline: time.sleep(.2)
    assert 'open http' in said.read_text(), said.read_text()
    yield f'http://127.0.0.1:{port}/', said, server
    server.terminate()
    server.wait(20)

def upload(page, path):
    page.wait_for_selector('input[type=file]', state='attached')
    page.set_input_files('input[type=file]', str(path))

def test_a_real_upload(demo, visit, tmp_path):
    x = np.zeros((90, 120, 3), np.uint8)
    x[20:70, 55:65] = 255
    Image.fromarray(x).save(tmp_path/'one.jpg')
    page = visit(demo[0])
    upload(page, tmp_path/'one.jpg')
    page.locator('.pixels img').nth(1).wait_for()
    shown = [int(s) for s in re.findall(r'(\d+)%', page.inner_text('body'))]
    (told,) = predict_files(demo[1].parent/'run', [tmp_path/'one.jpg'], top=5)
    assert len(shown) == 5 and all(abs(s - 100 * p) <= 1 for s, (_, p) in zip(shown, told['top']))
    assert page.evaluate('[...document.querySelectorAll(".pixels img")].map(i => i.naturalWidth)') == [32, 32]
    assert not [f for f in page.faults if 'Method not implemented' not in f] # which Gradio's own code says

@pytest.mark.parametrize('name,data,said', [
    ('a.png', b'<html><script>alert(1)</script>', 'cannot be read as an image'),
    ('big.png', b'\x89PNG\r\n\x1a\n' + bytes(6 * 2**20), 'aximum'),
    ('bomb.png', None, 'pixels')])
def test_refused_uploads(demo, visit, tmp_path, name, data, said):
    f = tmp_path/name
    if data is None: Image.new('1', (20_000, 20_000)).save(f)
    else: f.write_bytes(data)
    page = visit(demo[0])
    upload(page, f)
    page.get_by_text(re.compile(said)).first.wait_for(timeout=15_000)
    assert page.locator('.pixels img').count() == 0

def test_mistakes_by_pair(demo, visit):
    page = visit(demo[0])
    page.get_by_role('tab', name='Mistakes').click()
    told = page.locator('text=test images are classified wrongly').inner_text()
    count = int(re.search(r'([\d,]+) of 300 test images', told).group(1))
    page.wait_for_function(f'document.querySelectorAll(".pixels button img").length == {min(count, 48)}')
    page.get_by_label('Actual class').click()
    option = page.get_by_role('option').nth(1)
    a, b, n = re.match(r'.*?(\d) -> (\d)\s+\((\d+)\)', option.inner_text(), re.S).groups()
    option.click()
    page.wait_for_function(f'document.querySelectorAll(".pixels button img").length == {n}')
    assert f'{a} -> {b} (' in page.locator('.pixels').last.inner_text()

def test_the_page_reads_on_a_phone(demo, visit):
    page = visit(demo[0], 390, True)
    page.wait_for_selector('input[type=file]', state='attached')
    assert page.evaluate('document.documentElement.scrollWidth') <= 390

def test_listens_to_this_machine_alone_and_calls_nobody(demo):
    import psutil
    url, said, server = demo
    listening = {c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == 'LISTEN'}
    assert listening == {'127.0.0.1'}
    calls = set(re.findall(r'^CALL .*$', said.read_text(), re.M))
    assert calls and all('127.0.0.1' in c or 'localhost' in c for c in calls), calls

def test_mistakes_of_people(demo, main, tmp_path):
    port = demo[0].rstrip('/').rsplit(':', 1)[1]
    code, out, err = main('demo', 'sepnet178k', '--port', port)
    assert code == 2 and len(err.splitlines()) == 1 and 'choose another --port' in err
    code, out, err = main('demo', tmp_path)
    assert code == 2 and len(err.splitlines()) == 1

def test_without_the_extra(monkeypatch, main):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    code, out, err = main('demo', 'sepnet178k')
    assert code == 2 and err.strip().endswith("the demo needs gradio: pip install 'fastcifar[demo]'")
