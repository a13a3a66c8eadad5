"`fastcifar demo`: a page on this machine that takes images and nothing else."
import io, json, os, re, socket, subprocess, sys, time

import numpy as np
import pytest
from PIL import Image

from fastcifar.share.predict import open_predictor, predict_files

# reports every connection and look-up of the server
WATCHED = '''
import sys
PLACE = {"socket.connect": 1, "socket.getaddrinfo": 0} # which argument says where to
sys.addaudithook(lambda e, a: print("CALL", e, a[PLACE[e]], file=sys.stderr, flush=True) if e in PLACE else None)
from fastcifar.cli import main
sys.exit(main(sys.argv[1:]))
'''

def free_port():
    "A port that nobody listens at"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

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
    port = free_port()
    said = d/'said.txt'
    command = [sys.executable, '-c', WATCHED, 'demo', str(d/'run'), '--port', str(port)]
    env = {**os.environ, 'GRADIO_TEMP_DIR': str(d/'tmp')}
    with open(said, 'w') as f: server = subprocess.Popen(command, stdout=f, stderr=f, env=env)
    deadline = time.time() + 240
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
    page.locator('.answer img').nth(1).wait_for()
    shown = [int(s) for s in re.findall(r'(?<![.\d])(\d+)%', page.inner_text('body'))]
    (told,) = predict_files(demo[1].parent/'run', [tmp_path/'one.jpg'], top=5)
    assert len(shown) == 5 and all(abs(s - 100 * p) <= 1 for s, (_, p) in zip(shown, told['top']))
    assert page.evaluate('[...document.querySelectorAll(".answer img")].map(i => i.naturalWidth)') == [32, 32]
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
    assert page.locator('.answer img').count() == 0

def answer(page):
    "The class that the page says, once it has answered"
    page.locator('.answer img').nth(1).wait_for()
    return page.locator('[data-testid=label-output-value], .output-class').first.inner_text().strip()

def test_the_place_for_a_file_stays(demo, visit, tmp_path):
    Image.new('RGB', (50, 50), 'gray').save(tmp_path/'one.png')
    page = visit(demo[0])
    for _ in range(2): # a second image needs no click on anything
        upload(page, tmp_path/'one.png')
        assert answer(page) in '0123456789'
        page.get_by_text('Drop File Here').wait_for()

def test_the_title_says_what_the_net_is(demo, visit):
    page, right = visit(demo[0]), json.loads((demo[1].parent/'run/metrics.json').read_text())['test_accuracy']
    assert page.locator('h1').inner_text() == f'normnet31k: {100 * right:.2f}% of 300 test images right'
    assert 'classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.' in page.inner_text('body')

def test_a_test_image_to_click(demo, visit):
    page = visit(demo[0])
    page.locator('.samples button').nth(9).wait_for()
    assert page.locator('.samples button').count() == 10
    page.locator('.samples button').nth(4).click()
    shown = page.locator('.samples img').nth(4), page.locator('.answer img').first
    assert answer(page) in '0123456789'
    assert len({png(page, i.get_attribute('src')) for i in shown}) == 1

def png(page, url):
    "The pixels of a picture of the page"
    return Image.open(io.BytesIO(page.request.get(url).body())).convert('RGB').tobytes()

def test_a_drawn_digit(demo, visit):
    "A stroke from top to bottom: the net has seen it in the middle, as high as the image, and told the same as Python"
    page = visit(demo[0])
    pad = page.locator('canvas')
    pad.wait_for()
    box = pad.bounding_box()
    page.mouse.move(box['x'] + 30, box['y'] + 40)
    page.mouse.down()
    page.mouse.move(box['x'] + 30, box['y'] + 200, steps=5)
    page.mouse.up()
    told = answer(page)
    seen = np.frombuffer(png(page, page.locator('.answer img').first.get_attribute('src')), np.uint8)
    seen = seen.reshape(32, 32, 3)
    assert seen[:, 12:20].mean() > 60 and seen[:, :8].max() < 30 and seen[:, 24:].max() < 30
    net = open_predictor(demo[1].parent/'run')
    assert told == net.classes[net(seen[None].copy()).argmax()]

@pytest.mark.parametrize('width', [390, 1280])
def test_no_label_lies_on_a_picture(demo, visit, width):
    page = visit(demo[0], width)
    page.locator('.samples button').nth(9).click()
    page.locator('.answer img').nth(1).wait_for()
    assert page.evaluate('''() => {
        const boxes = [...document.querySelectorAll('.pixels img')].map(i => i.getBoundingClientRect())
        const on = l => boxes.some(b => b.width && l.left < b.right && l.right > b.left && l.top < b.bottom - 2
                                        && l.bottom > b.top + 2)
        return [...document.querySelectorAll('.pixels :is(label, .caption-label)')].filter(
            l => l.offsetWidth && on(l.getBoundingClientRect())).map(l => l.innerText) }''') == []

def test_a_net_of_photographs_has_no_pad():
    pytest.importorskip('gradio', reason='the demo extra is not installed')
    from fastcifar.share.demo import demo_app
    kinds = [type(b).__name__ for b in demo_app('groupnet').blocks.values()]
    assert 'HTML' not in kinds and 'Gallery' not in kinds and 'File' in kinds

def test_a_page_that_does_not_answer_itself(monkeypatch, main):
    networking = pytest.importorskip('gradio', reason='the demo extra is not installed').networking
    monkeypatch.setattr(networking, 'url_ok', lambda url: False)
    code, out, err = main('demo', 'groupnet', '--port', free_port())
    assert code == 2 and len(err.splitlines()) == 1 and 'does not answer' in err

def test_mistakes_by_pair(demo, visit):
    page = visit(demo[0])
    page.get_by_role('tab', name='Mistakes').click()
    told = page.locator('text=test images are classified wrongly').inner_text()
    count = int(re.search(r'([\d,]+) of 300 test images', told).group(1))
    page.wait_for_function(f'document.querySelectorAll(".mistakes button img").length == {min(count, 48)}')
    page.get_by_label('Actual class').click()
    option = page.get_by_role('option').nth(1)
    a, b, n = re.match(r'.*?(\d) -> (\d)\s+\((\d+)\)', option.inner_text(), re.S).groups()
    option.click()
    page.wait_for_function(f'document.querySelectorAll(".mistakes button img").length == {n}')
    assert f'{a} -> {b} (' in page.locator('.mistakes').inner_text()

def test_the_page_reads_on_a_phone(demo, visit):
    page = visit(demo[0], 390, True)
    page.wait_for_selector('input[type=file]', state='attached')
    assert page.evaluate('document.documentElement.scrollWidth') <= 390

# what Gradio's own markup has: labels of empty places, and texts of pictures that repeat their captions
GRADIO = {'aria-prohibited-attr', 'image-redundant-alt'}

def faults(page):
    "What hinders somebody with a screen reader, a keyboard or weak eyes, by axe-core, or lies outside of the page"
    axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason='the dev extra is not installed').Axe()
    cut = page.evaluate("""() => [document.documentElement, ...document.querySelectorAll('.pixels .grid-wrap')]
        .filter(e => e.scrollWidth > e.clientWidth).map(e => e.className)""")
    return cut + [v['id'] for v in axe.run(page).response['violations'] if v['id'] not in GRADIO]

@pytest.mark.parametrize('width,dark', [(390, False), (1280, True)])
def test_accessible(demo, visit, width, dark):
    page = visit(demo[0], width, dark)
    page.locator('.samples button').nth(9).click()
    page.locator('.answer img').nth(1).wait_for()
    assert faults(page) == []
    page.get_by_role('tab', name='Mistakes').click()
    page.locator('.mistakes img').first.wait_for()
    assert faults(page) == []

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
