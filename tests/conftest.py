import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Tests never touch the user's cache, nor read the data set the user has chosen"
    monkeypatch.setenv('FASTCIFAR_CACHE', str(tmp_path_factory.mktemp('cache')))
    monkeypatch.delenv('FASTCIFAR_DATA', raising=False)

@pytest.fixture(scope='session')
def tree(tmp_path_factory):
    "A folder of coloured squares: 3 classes, 20 training and 8 test images each; quick to train on and easy to tell apart"
    root, rng = tmp_path_factory.mktemp('squares'), np.random.default_rng(0)
    for split, n in (('train', 20), ('test', 8)):
        for k, name in enumerate(('blue', 'green', 'red')):
            (root/split/name).mkdir(parents=True)
            for i in range(n):
                x = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                x[8:24, 8:24, 2 - k] += 150
                Image.fromarray(x).save(root/split/name/f'{i:02}.png')
    return root

@pytest.fixture
def cli(tmp_path):
    "Runs `fastcifar ARGS` in a process of its own"
    def run(*args, env=None, cwd=tmp_path, timeout=300):
        return subprocess.run([sys.executable, '-m', 'fastcifar', *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})})
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
