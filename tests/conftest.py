import os, shutil, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
PLACES = tempfile.TemporaryDirectory(prefix='fastcifar-tests-') # gone with the process
os.environ['XDG_CONFIG_HOME'] = f'{PLACES.name}/config' # where an account keeps the key of its run folders
os.environ['FASTCIFAR_CACHE'] = f'{PLACES.name}/cache' # of fixtures that are shared; each test has one of its own
ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Tests never touch the user's cache, nor read the data set the user has chosen"
    monkeypatch.setenv('FASTCIFAR_CACHE', str(tmp_path_factory.mktemp('cache')))
    monkeypatch.delenv('FASTCIFAR_DATA', raising=False)

@pytest.fixture(scope='session')
def tree(tmp_path_factory):
    "A folder of coloured squares, quick to learn: 3 classes, 20 training and 8 test images each"
    root, rng = tmp_path_factory.mktemp('squares'), np.random.default_rng(0)
    for split, n in (('train', 20), ('test', 8)):
        for k, name in enumerate(('blue', 'green', 'red')):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                x = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                x[8:24, 8:24, 2 - k] += 150
                Image.fromarray(x).save(root/split/name/f'{i:02}.png')
    return root

@pytest.fixture(scope='session')
def browser():
    "A headless Chromium, the system's own; skips without one, but fails where FASTCIFAR_BROWSER=1 demands one"
    try:
        from playwright.sync_api import sync_playwright
        installed = map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
        path = os.environ.get('CHROMIUM') or next(filter(None, installed), None)
        if not path: raise ImportError('there is no Chromium: apt install chromium, or name it in $CHROMIUM')
    except ImportError as e:
        if os.environ.get('FASTCIFAR_BROWSER') == '1': raise
        pytest.skip(f'browser tests need playwright and a Chromium ({e})')
    # without these the browser calls its makers
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync']
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=quiet)
        yield b
        b.close()

@pytest.fixture
def visit(browser):
    "Opens a page and gives it with what it did that it should not: errors in the console, and requests to elsewhere"
    pages = []
    def open_page(url, width=1280, dark=False):
        page = browser.new_page(viewport=dict(width=width, height=900), color_scheme='dark' if dark else 'light')
        pages.append(page)
        page.faults, here = [], url.split('#')[0].rsplit('/', 1)[0]
        page.on('console', lambda m: page.faults.append(f'{m.type}: {m.text}') if m.type in ('error', 'warning')
                else None)
        page.on('pageerror', lambda e: page.faults.append(str(e)))
        page.on('request', lambda r: None if r.url.startswith((here, 'data:', 'blob:'))
                else page.faults.append(f'request: {r.url}'))
        page.goto(url)
        return page
    yield open_page
    for page in pages: page.close()

@pytest.fixture
def cli(tmp_path):
    "Runs `fastcifar ARGS` in a process of its own"
    def run(*args, env=None, cwd=tmp_path, timeout=300):
        return subprocess.run([sys.executable, '-m', 'fastcifar', *map(str, args)], cwd=cwd, capture_output=True,
                              text=True, timeout=timeout, env={**os.environ, **(env or {})})
    return run

@pytest.fixture
def main(tmp_path, monkeypatch, capfd):
    "Runs `fastcifar ARGS` in this process, where fastai is imported already; gives exit code, stdout and stderr"
    from fastcifar.cli import main
    monkeypatch.chdir(tmp_path)
    def run(*args):
        capfd.readouterr()
        code = main([str(a) for a in args])
        return code, *capfd.readouterr()
    return run

def pytest_collection_modifyitems(items):
    "The longest test first, or one of two processes would wait for it at the end"
    items.sort(key=lambda i: i.name != 'test_demo')
