"Tests and notebooks keep what they decode in a place of their own, not in the user's cache."
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))

def left_in_the_cache(command, home):
    "What a command leaves in the cache of a user whose home folder is empty"
    env = {k: v for k, v in os.environ.items() if k not in ('FASTCIFAR_CACHE', 'XDG_CACHE_HOME', 'PYTEST_ADDOPTS')}
    env |= dict(HOME=str(home), USERPROFILE=str(home), PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return sorted(p.name for p in home.glob('.cache/fastcifar/*'))

def test_a_command_uses_the_cache_of_the_user(tree, tmp_path):
    "Or the tests below would see nothing"
    left = left_in_the_cache(['-c', f'from fastcifar.data.load import load_data; load_data({str(tree)!r})'], tmp_path)
    assert len(left) == 2 # a set and its lock

def test_the_fixtures_leave_the_cache_of_the_user_alone(tmp_path):
    "A folder of the session in this process and in one of its own"
    test = tmp_path/'tests/test_sets.py'
    test.parent.mkdir()
    (test.parent/'conftest.py').write_text((ROOT/'tests/conftest.py').read_text())
    test.write_text("""
import pytest
from fastcifar.data.load import load_data

@pytest.fixture(scope='module')
def data(tree): return load_data(tree)

def test_here(data, tree): assert len(load_data(tree).y['train']) == len(data.y['train'])

def test_there(cli, tree):
    done = cli('train', '--data', tree, '--model', 'normnet31k', '--bs', 100)
    assert done.returncode == 2 and 'larger than the training split' in done.stderr
""")
    (tmp_path/'home').mkdir()
    assert left_in_the_cache(['-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(test)], tmp_path/'home') == []

def test_a_notebook_leaves_the_cache_of_the_user_alone(tmp_path):
    "The one that decodes a folder of images"
    script = Path(sys.executable).with_name('nbdev_test')
    if not script.exists(): pytest.skip('nbdev is not installed')
    assert left_in_the_cache([str(script), '--path', 'nbs/data/09_load.ipynb'], tmp_path) == []

def test_notebooks_put_the_cache_back():
    "They share a process in `make test`, which gives all of them a cache folder of their own"
    for p in NOTEBOOKS:
        source = '\n'.join(''.join(c['source']) for c in json.loads(p.read_text(encoding='utf8'))['cells'])
        assert not re.search(r"(del os\.environ\[|environ\.pop\()'FASTCIFAR_CACHE'", source), p
    line = next(l for l in (ROOT/'Makefile').read_text().splitlines() if '/nbdev_test' in l)
    assert re.search(r'cache=\$\$\(mktemp -d\); FASTCIFAR_CACHE=\$\$cache .*nbdev_test', line)
