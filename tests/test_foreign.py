"Text, folders and requests of others: shown, not obeyed."
import gc, hmac, http.client, json, os, shutil
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from PIL import Image

from fastcifar.basics import harmless

@given(st.text())
def test_nothing_of_a_text_steers_a_terminal(text):
    shown = harmless(text)
    assert not any(c < ' ' and c not in '\n\t' or '\x7f' <= c <= '\x9f' or c in '\u202e\u2066\u200f' for c in shown)
    assert harmless(shown) == shown and (shown == text or '\\' in shown)

@pytest.fixture(scope='module')
def squares(tree, tmp_path_factory):
    "The squares under names that somebody chose with care, and a finished run on them"
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    root = tmp_path_factory.mktemp('foreign')/'x](javascript:alert(1)) <img src=x onerror=alert(2)>'
    root.mkdir()
    for split in ('train', 'test'):
        odd = '# Heading', '[me](javascript:alert(1))', '<script>alert(1)<|script>'
        for old, new in zip(('blue', 'green', 'red'), odd):
            shutil.copytree(tree/split/old, root/split/new)
    out = root.parent/'run'
    train_run(configure('fast', 'normnet31k', data=str(root), epochs=1, bs=20), out, say=lambda *_: None)
    return root, out

def test_a_model_card_shows_names_as_they_are(squares, tmp_path):
    from fastcifar.share.export import export_run
    export_run(squares[1], tmp_path/'e', onnx=False)
    card = (tmp_path/'e/README.md').read_text()
    body = card.split('---', 2)[2]
    html = pytest.importorskip('markdown').markdown(body)
    for odd in ('<script', '<img', '<a ', 'javascript:alert(1)"'): assert odd not in html
    ours = '## How good it is', '## How it was trained', '## How to use it', '## What it is not for'
    assert [l for l in body.splitlines() if l.startswith('#')] == [body.strip().splitlines()[0], *ours]
    assert 'github.com' not in card and 'git+' not in card # it names no place that may not be there

def test_the_page_of_a_run_runs_nothing(squares):
    page = (squares[1]/'report.html').read_text()
    assert '<script>alert' not in page and '<img src=x' not in page and 'href="javascript' not in page

def test_escapes_do_not_reach_the_terminal(main, tmp_path):
    name = 'a\x1b]0;owned\x07\x1b[2J.png'
    Image.new('RGB', (32, 32)).save(tmp_path/'a.png'), os.rename(tmp_path/'a.png', tmp_path/name)
    code, said, err = main('predict', '--from', 'groupnet', name)
    assert code == 0 and '\x1b' not in said + err and r'\x1b]0;owned\x07' in said
    (tmp_path/'b\x1b[31m.png').write_bytes(b'no picture')
    code, said, err = main('predict', '--from', 'groupnet', 'b\x1b[31m.png', name)
    assert code == 1 and '\x1b' not in said + err and r'b\x1b[31m.png' in err
    code, said, err = main('train', '--data', 'no\x1b[2Jwhere')
    assert code == 2 and '\x1b' not in err

def test_one_bad_picture_does_not_stop_the_others(main, tmp_path):
    from fastcifar.share.predict import predict_files
    for i in range(3): Image.new('RGB', (40, 40), (80 * i, 0, 0)).save(tmp_path/f'{i}.png')
    (tmp_path/'1.png').write_bytes(b'broken')
    code, said, err = main('predict', '--from', 'groupnet', '.')
    assert code == 1 and [l.split(':')[0] for l in said.splitlines()] == ['0.png', '2.png']
    assert '1.png' in err and err.count('\n') == 1
    code, said, err = main('predict', '--from', 'groupnet', '--json', '.')
    rows = json.loads(said)
    assert code == 1
    assert [('error' in r, r['file']) for r in rows] == [(False, '0.png'), (True, '1.png'), (False, '2.png')]
    alone = predict_files('groupnet', [tmp_path/'2.png'])[0]
    assert rows[2]['prediction'] == alone['prediction']
    assert rows[2]['probability'] == pytest.approx(alone['probability'], abs=1e-6)
    assert main('predict', '--from', 'groupnet', '1.png')[0] == 2 # nothing was answered

def test_a_run_folder_from_elsewhere_sends_nobody_to_a_local_path(main, squares, monkeypatch, tmp_path):
    from fastcifar.runs import reopen
    root, out = squares
    assert main('evaluate', out)[0] == 0 # our own
    shutil.copytree(out, tmp_path/'foreign')
    for noted in (str(root), f'{"0" * 64}\n{root}', f'none\n{root}'):
        (tmp_path/'foreign/.data').write_text(noted)
        code, _, err = main('evaluate', 'foreign')
        assert code == 2 and '--data' in err and err.count('\n') == 1, err
    (tmp_path/'foreign/.data').unlink()
    config = json.loads((tmp_path/'foreign/config.json').read_text())
    (tmp_path/'foreign/config.json').write_text(json.dumps({**config, 'data': str(root)}))
    monkeypatch.setattr(reopen, 'load_data', lambda *a: pytest.fail('it was looked for'))
    assert main('evaluate', 'foreign')[0] == 2
    monkeypatch.undo()
    shutil.copytree(out, tmp_path/'again')
    assert main('evaluate', tmp_path/'again', '--data', root)[0] == 0

def test_a_key_that_is_not_whole_seals_nothing(tmp_path, monkeypatch):
    "One that a killed process left empty, and one that others may read"
    from fastcifar.runs import folder
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
    file = tmp_path/'fastcifar/key'
    file.parent.mkdir()
    for content in (b'', b'half'):
        file.write_bytes(content)
        seal = folder._seal('/data')
        assert len(file.read_bytes()) == 64 and file.stat().st_mode & 0o777 == 0o600
        assert seal != hmac.new(content, b'/data', 'sha256').hexdigest()
        assert seal == folder._seal('/data') != folder._seal('/other')

def test_values_of_a_foreign_run_are_text_in_its_card(squares, tmp_path):
    from fastcifar.share.export import export_run
    shutil.copytree(squares[1], tmp_path/'r')
    m = json.loads((tmp_path/'r/metrics.json').read_text())
    for k in ('recipe', 'precision', 'seed'): m[k] = f'{k}` <b>x</b>\n# {k}'
    (tmp_path/'r/metrics.json').write_text(json.dumps(m))
    export_run(tmp_path/'r', tmp_path/'e', onnx=False, data=None)
    body = (tmp_path/'e/README.md').read_text().split('---', 2)[2]
    assert '<b>' not in pytest.importorskip('markdown').markdown(body)
    assert not [l for l in body.splitlines() if l.startswith('# ')][1:]

def test_a_name_with_a_line_of_its_own(main, tmp_path):
    Image.new('RGB', (32, 32)).save(tmp_path/'a.png'), os.rename(tmp_path/'a.png', tmp_path/'a.png: cat 99%\nb.png')
    code, said, _ = main('predict', '--from', 'groupnet', 'a.png: cat 99%\nb.png')
    assert code == 0 and said.count('\n') == 1 and '\\nb.png: ' in said

def test_the_demo_answers_to_its_own_names_and_keeps_no_uploads(tmp_path):
    pytest.importorskip('gradio')
    from gradio_client import Client, handle_file
    from fastcifar.share.demo import serve_demo
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    app, url = serve_demo('groupnet', port=port, block=False, say=lambda *_: None)
    try:
        def status(host):
            c = http.client.HTTPConnection('127.0.0.1', port)
            c.request('GET', '/config', headers=dict(Host=host))
            return c.getresponse().status
        hosts = f'127.0.0.1:{port}', f'localhost:{port}', 'evil.example', f'evil.example:{port}'
        assert [status(h) for h in hosts] == [200, 200, 400, 400]
        Image.new('RGB', (32, 32), (1, 2, 3)).save(tmp_path/'private.png')
        Client(url, verbose=False).predict(handle_file(tmp_path/'private.png'), api_name='/classify')
        uploads = Path(os.environ['GRADIO_TEMP_DIR'])
        assert uploads.is_dir() and not [p for p in uploads.rglob('*private*') if p.is_file()]
    finally: app.close()

def test_the_folder_for_uploads_goes_with_the_page(monkeypatch):
    import fastcifar.share.demo as demo
    class Page: pass
    monkeypatch.setenv('GRADIO_TEMP_DIR', '') # so that it is as before afterwards
    monkeypatch.setattr(demo, 'demo_app', lambda *_: Page())
    monkeypatch.setattr(demo, '_launch', lambda *_: 'http://127.0.0.1')
    page, _ = demo.serve_demo('groupnet', block=False, say=lambda *_: None)
    uploads = Path(os.environ['GRADIO_TEMP_DIR'])
    (uploads/'private.png').touch()
    del page
    gc.collect()
    assert not uploads.exists()
