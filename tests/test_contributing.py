"What CONTRIBUTING.md says about adding a net and a policy is done here as it stands there, in a copy."
import json, os, re, shutil, subprocess, sys, textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = 'conftest.py', 'test_models.py', 'test_recipes.py', 'net_vectors.json', 'net_tables.json'

def blocks(heading):
    "The Python blocks of a section of the page"
    page = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    section = re.search(rf'^## {heading}\n(.*?)(?=^## |\Z)', page, re.M | re.S)[1]
    return [textwrap.dedent(b) for b in re.findall(r'^ *```python\n(.*?)^ *```', section, re.M | re.S)]

def cell(source): return dict(cell_type='code', id='0', metadata={}, outputs=[], execution_count=None, source=source)

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The library and some tests, with the net and the policy of the page added"
    nb_export = pytest.importorskip('nbdev.export', reason='the dev extra is not installed').nb_export
    here = tmp_path_factory.mktemp('copy')
    shutil.copytree(ROOT/'fastcifar', here/'fastcifar', ignore=shutil.ignore_patterns('__pycache__'))
    (here/'tests').mkdir()
    for name in NEEDED: shutil.copy(ROOT/'tests'/name, here/'tests')
    net = next(b for b in blocks('How to add a net') if b.startswith('#| export'))
    notebook = dict(cells=[cell('#| default_exp models.tinynet'), cell(net)], metadata={}, nbformat=4, nbformat_minor=5)
    (here/'10_tinynet.ipynb').write_text(json.dumps(notebook), encoding='utf-8')
    line, = blocks('How to add a policy')
    policies = json.loads((ROOT/'nbs/data/00_policies.ipynb').read_text(encoding='utf-8'))
    at, = [c for c in policies['cells'] if 'POLICIES = {' in ''.join(c['source'])]
    at['source'] = ''.join(at['source']).replace('POLICIES = {\n', f'POLICIES = {{\n{line}', 1)
    (here/'00_policies.ipynb').write_text(json.dumps(policies), encoding='utf-8')
    for name in ('10_tinynet', '00_policies'): nb_export(here/f'{name}.ipynb', lib_path=here/'fastcifar')
    return here

def fresh(copy, *args):
    "A process that knows only the copy, and what it printed"
    env = {**os.environ, 'PYTHONPATH': str(copy)}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

KNOWN = '''
import contextlib, io, re, sys
from pathlib import Path
import fastcifar
from fastcifar.all import *
from fastcifar.cli import main
assert Path(fastcifar.__file__).parent == Path('fastcifar').resolve()
net = create_model('tinynet', norm='gn')
assert type(net).__name__ == 'TinyNet' and count_parameters(net) <= 2000
assert 'tinynet' in list_models() and model_table().loc['tinynet', 'what'].startswith('Two convolutions')
assert {'tinynet'} < set(recipe_table('fast')) and recipe_table('reference').tinynet.policy == 'flip'
assert create_recipe('reference', 'tinynet').decay == 'l2'
assert recipes_of('tinynet') == ['one_cycle', 'reference', 'fast']
assert 'gentle_flip' in list_policies()
out = io.StringIO()
with contextlib.redirect_stdout(out):
    for args in (['models'], ['recipes', 'tinynet']): assert main(args) == 0
assert re.search('^ *tinynet +[0-9,]+ +-$', out.getvalue(), re.M) and 'tinynet: Two convolutions' in out.getvalue()
assert re.search('^--policy +- +flip +small_crop_flip', out.getvalue(), re.M)
for tfms in ('item', 'batch'):
    quick = dict(data=sys.argv[1], epochs=1, bs=20, tfms=tfms, precision='fp32')
    c = configure('fast', 'tinynet', policy='gentle_flip', **quick)
    run = train_run(c, f'run_{tfms}', threads=1, bars=False, pictures=False, say=lambda s: None)
    kept = run_config(f'run_{tfms}')
    assert (kept.model, kept.policy) == ('tinynet', 'gentle_flip') and load_run(f'run_{tfms}').model is not None
'''

def test_a_net_and_a_policy_of_the_page(copy, tree):
    "They can be made, configured and trained, and the tables know them"
    fresh(copy, '-c', KNOWN, tree)

def test_tests_over_all_nets_find_it(copy):
    said = fresh(copy, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/test_models.py', 'tests/test_recipes.py',
                 '-k', 'tinynet')
    assert int(re.search(r'(\d+) passed', said)[1]) >= 15, said

def test_a_net_of_a_notebook(tree, tmp_path):
    "The block of the page as it stands, then one epoch"
    mine, = [b for b in blocks('How to add a net') if 'mynet' in b]
    more = '''
import dataclasses, sys
from fastcifar.models.zoo import load_model
c = dataclasses.replace(config, data=sys.argv[1], epochs=1, bs=20, precision='fp32')
run = train_run(c, 'run', threads=1, bars=False, pictures=False, say=lambda s: None)
assert run_config('run').model == 'mynet' and load_model('run').config['name'] == 'mynet'
'''
    (tmp_path/'mine.py').write_text(mine + more, encoding='utf-8')
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, 'mine.py', str(tree)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
