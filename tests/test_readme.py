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
    assert {c[1] for c in typed} == {'train', 'compare', 'find-lr', 'evaluate', 'report', 'predict', 'export', 'sweep',
                                     'models', 'recipes', 'summary', 'bench'}
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

def cells(line): return [c.strip() for c in line.strip().strip('|').split('|')]

def table(head):
    "The rows of the README's table whose head begins so, as dicts"
    lines = (ROOT/'README.md').read_text().splitlines()
    start = next(i for i, l in enumerate(lines) if l.startswith(f'| {head} |'))
    rows = [l for l in lines[start + 2:start + 60] if l]
    end = next((i for i, l in enumerate(lines[start + 2:]) if not l.startswith('|')), None)
    return [dict(zip(cells(lines[start]), cells(l))) for l in rows[:end]]

def test_accuracies_of_nets_come_from_their_runs():
    "What a net's row says of a recipe is the mean of its own runs of that recipe, with their number and epochs"
    study, curves = (pd.read_csv(ROOT/f'results/norms/{n}.csv') for n in ('results', 'curves'))
    nets = table('net')
    assert {r['net'].strip('`') for r in nets} == set(list_models())
    for r in nets:
        net = r['net'].strip('`')
        for head in (k for k in r if 'batch norm' in k):
            recipe = 'speedrun' if net == 'speednet' and 'speedrun' in head else re.match('`(\\w+)`', head)[1]
            of = [t[(t.model == net) & (t.norm == 'bn') & (t.recipe == recipe)] for t in (study, curves)]
            if r[head] == '-': continue
            runs, last = of[0], of[1][of[1].epoch == of[1].epoch.max()]
            assert f'(n = {len(runs)}, {runs.epochs.iloc[0]} epochs)' in r[head], (net, recipe)
            expected = [f'{100 * runs.test_accuracy.mean():.2f}']
            if runs.views.iloc[0] != 'none': expected.append(f'{100 * last.accuracy.mean():.2f}') # and without
            assert re.findall(r'([\d.]+) %', r[head]) == expected, (net, recipe)

def test_runs_of_the_main_job_come_from_their_folders():
    folders = [f.parent for f in ROOT.glob('results/*/metrics.json')]
    runs = [json.loads((f/'metrics.json').read_text()) for f in folders]
    rows = table('data')
    assert len(rows) == len(runs)
    for r in rows:
        [m] = [m for m in runs if (m['data'], str(m['epochs']), str(m['seed'])) == (r['data'], r['epochs'], r['seed'])]
        assert r['net'] == f'{m["model"]} {m["norm"]}' and r['precision'] == m['precision']
        assert (r['train accuracy'], r['test accuracy']) == (f'{m["train_accuracy"]:.2%}', f'{m["test_accuracy"]:.2%}')
        assert (r['LRMIN'], r['LRMAX']) == (f'{m["lr_min"]:.1e}', f'{m["lr_max"]:.1e}')

def test_ratios_come_from_benchmarks():
    "Every row of the table of speed is one of `benchmarks/`, as a whole"
    known = [r for f in ROOT.glob('benchmarks/*.json') for r in json.loads(f.read_text())['rows']]
    shown = {'x': lambda v: f'{v:.2f} x', 'us': lambda v: f'{v:.0f} µs', 'share': lambda v: f'{v:.1%}',
             's': lambda v: f'{v:.1f} s'}
    def row(r):
        f = shown[r['unit']]
        return f(r['ratio']), f'{f(r["low"])} to {f(r["high"])}'
    wholes = {row(r) for r in known if r['ratio'] is not None}
    for r in table('what'): assert (r['median'], r['lowest and highest round']) in wholes, r
