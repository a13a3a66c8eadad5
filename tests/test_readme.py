"What the README tells people to type works."
import json, re, shlex, shutil
from pathlib import Path

import pandas as pd

from fastcifar.models.zoo import list_models

ROOT = Path(__file__).resolve().parents[1]

def commands():
    "The lines of the README's shell blocks"
    blocks = re.findall(r'^```sh\n(.*?)^```', (ROOT/'README.md').read_text(), re.M | re.S)
    return [shlex.split(l, comments=True) for b in blocks for l in b.splitlines() if l.strip()]

def test_first_two_commands_are_make():
    assert commands()[:2] == [['make', 'demo'], ['make', 'test']]
    assert re.search(r'^make test$', (ROOT/'.ci/run').read_text(), re.M)
    assert {'demo', 'test', 'test-latest'} <= set(re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(), re.M))

def test_fastcifar_commands(main, tmp_path):
    shutil.copytree(ROOT/'nbs/images', tmp_path/'nbs/images')
    typed = [c for c in commands() if c[0] == 'fastcifar']
    assert {c[1] for c in typed} == {'train', 'compare', 'find-lr', 'evaluate', 'report', 'predict', 'export', 'sweep', 'models', 'recipes', 'summary', 'bench'}
    for c in typed:
        code, out, err = main(*c[1:])
        assert code == 0 and out, (c, err)

def test_demo(main):
    "The command of `make demo`: at least 97 % of the held-out digits"
    line = re.search(r'fastcifar (train .*)$', (ROOT/'Makefile').read_text().split('\ndemo:')[1], re.M).group(1)
    code, out, err = main(*shlex.split(line), '--json')
    assert code == 0, err
    m = json.loads(out)
    assert m['data'] == 'digits' and m['test_images'] == 300 and m['test_accuracy'] >= 0.97
    assert 'run folder: runs/demo' in err

def test_accuracies_come_from_result_files():
    "Every percentage in the README's tables stands in a committed result file"
    known = {f'{json.loads(f.read_text())[k]:.2%}' for f in ROOT.glob('results/*/metrics.json') for k in ('test_accuracy', 'train_accuracy')}
    for f in ROOT.glob('benchmarks/*.json'): known |= {f'{r[k]:.1%}' for r in json.loads(f.read_text())['rows'] if r['unit'] == 'share' for k in ('ratio', 'low', 'high', 'must', 'goal') if r[k] is not None}
    rows = [l for l in (ROOT/'README.md').read_text().splitlines() if l.startswith('|') and '%' in l]
    assert rows and all(p in known for l in rows for p in re.findall(r'[\d.]+%', l))
    study, curves = (pd.read_csv(ROOT/f'results/norms/{n}.csv') for n in ('results', 'curves'))
    last = curves[curves.epoch == curves.groupby(['model', 'norm', 'recipe']).epoch.transform('max')] # without test-time views
    means = {f'{100 * a:.2f}' for t, k in ((study, 'test_accuracy'), (last, 'accuracy')) for a in t.groupby(['model', 'norm', 'recipe'])[k].mean()}
    nets = [l for l in (ROOT/'README.md').read_text().splitlines() if l.startswith('| `')]
    assert len(nets) == len(list_models()) and all(p in means for l in nets for p in re.findall(r'([\d.]+) %', l))
