"Speed: what the benchmarks print, the recipe for impatient people, and ways to make batches."
import json

import pytest
import torch

def test_bench_prints_rows(main, tmp_path):
    code, out, err = main('bench', 'step', '--json', '--out', 'b.json')
    assert code == 0, err
    r = json.loads(out)
    assert r == json.loads((tmp_path/'b.json').read_text())
    assert {'rows', 'machine', 'versions', 'commit'} <= set(r) and r['versions']['torch']
    rows = {x['name']: x for x in r['rows']}
    assert set(rows) == {'step/overhead_us', 'step/fastai_overhead_us'}
    for x in rows.values(): assert x['low'] <= x['ratio'] <= x['high'] and x['unit'] == 'us'
    assert rows['step/overhead_us']['theirs'] > 0 and rows['step/overhead_us']['must'] == 80

def test_bench_speaks_to_people(main):
    code, out, _ = main('bench', 'step')
    assert code == 0 and 'step/overhead_us' in out and 'cores' in out

@pytest.mark.parametrize('args, says', [
    (['spedrun'], "did you mean 'speedrun'"),
    (['speedrun', '--device', 'cuda'], 'leave --device and --airbench out'),
    (['speedrun', '--airbench', 'x.py'], 'leave --device and --airbench out'),
    (['data', '--device', 'foo'], "no device 'foo' here"),
    (['data', '--rounds', '0'], 'at least 1'),
    (['data', '--results', 'r.csv'], 'leave it out'),
    (['speedrun', '--device', 'cpu', '--results', 'none.csv'], 'cannot read none.csv')])
def test_bench_refuses(main, args, says):
    if torch.cuda.is_available() and 'airbench' in says: pytest.skip('there is a GPU')
    code, out, err = main('bench', *args)
    assert code == 2 and says in err and err.count('\n') == 1 and not out

def test_the_speedrun_is_judged_by_whole_trainings(main, tmp_path, monkeypatch):
    import fastcifar.bench.cpu as bench
    def whole(name, recipe, k): return lambda: recipe.epochs * (1 if name == 'speednet' else 4)
    monkeypatch.setattr(bench, '_whole', whole)
    monkeypatch.setattr(bench, '_script_whole', whole)
    runs = [('speednet', 'speedrun', 8, .90), ('speednet', 'speedrun', 12, .92),
            ('custom_resnet', 'reference', 24, .89), ('custom_resnet', 'fast', 24, .91),
            ('custom_resnet', 'one_cycle', 24, .99)]
    rows = ['model,norm,recipe,epochs,data,test_accuracy',
            *(f'{m},bn,{r},{e},cifar10,{a + s:.4f}' for m, r, e, a in runs for s in (0, .001, .002)),
            'custom_resnet,ln,reference,24,cifar10,0.99']
    def measured(kept=None):
        "The rows of the benchmark with these results, or without any"
        args = ('bench', 'speedrun', '--device', 'cpu', '--rounds', 1, '--json')
        if kept:
            (tmp_path/'r.csv').write_text('\n'.join(kept))
            args += '--results', 'r.csv'
        code, out, err = main(*args)
        assert code == 0, err
        *rivals, script, sizes = json.loads(out)['rows']
        assert (script['name'], script['ratio'], script['met']) == ('cpu/speedrun_vs_script', 1, 'must')
        assert (sizes['name'], sizes['ratio']) == ('cpu/speedrun_sizes', 1)
        return rivals

    assert [(r['name'], r['ratio'], r['met']) for r in measured(rows)] == [
        ('cpu/speedrun_vs_custom_resnet', 8 / 96, 'goal'), ('cpu/speedrun_vs_custom_resnet_fast', 12 / 96, 'goal')]
    assert [r['met'] for r in measured([r for r in rows if '12' not in r])] == ['goal', 'missed']
    for row in measured([r for r in rows if not r.endswith(('10', '20'))]): # one run of each
        assert row['met'] is None and 'nothing is judged' in row['note']
    row, = measured()
    assert row['met'] is None and 'not compared' in row['note']

def test_speedrun_trains_and_continues(main, tree):
    "At toy scale: the views are in the evaluation and in predictions, and the finished run is known again"
    args = ('train', '--data', tree, '--model', 'speednet', '--recipe', 'speedrun', '--epochs', 4, '--bs', 20,
            '--out', 'r')
    code, out, err = main(*args, '--json')
    assert code == 0, err
    m, c = json.loads(out), json.load(open('r/config.json'))
    assert m['tta'] == 'crops' and m['test_accuracy'] > 0.5
    assert c['tfms'] == 'batch' and c['freeze'] == [['whiten.bias', 3]]
    assert 'test-time views' in err and 'batch transforms' in err
    assert main(*args)[0] == 0
    assert main('predict', '--from', 'r', tree/'test/red/00.png')[0] == 0
    assert abs(json.loads(main('evaluate', 'r', '--json')[1])['test_accuracy'] - m['test_accuracy']) < 1e-9
    code, _, err = main('train', '--data', tree, '--recipe', 'speedrun')
    assert code == 2 and 'made for speednet, not for custom_resnet' in err

SHORT = ('train', '--model', 'normnet31k', '--epochs', 1, '--bs', 20, '--lr-max', '1e-3')

def test_paths(main, tree):
    "Both ways to make batches train; a run of one is not continued by the other"
    args = (*SHORT, '--data', tree)
    for tfms in ('item', 'batch'):
        code, out, err = main(*args, '--tfms', tfms, '--out', tfms)
        assert code == 0 and f'{tfms} transforms' in out, err
    code, _, err = main(*args, '--tfms', 'item', '--out', 'batch')
    assert code == 2 and "tfms='batch', not 'item'" in err
    code, _, err = main('train', '--data', tree, '--tfms', 'bach')
    assert code == 2 and "did you mean 'batch'" in err

def test_runs_from_before_the_batch_path(main, tree):
    "A run folder whose configuration names no path was made by the item path, and is known again"
    args = (*SHORT, '--data', tree, '--out', 'old')
    assert main(*args, '--tfms', 'item')[0] == 0
    from pathlib import Path
    f = Path('old/config.json')
    c = json.loads(f.read_text())
    for k in ('tfms', 'tta', 'ema', 'freeze'): c.pop(k)
    f.write_text(json.dumps(c))
    code, out, err = main(*args)
    assert code == 0 and 'is finished' in out, err
    assert main('evaluate', 'old')[0] == 0
    Path('old/metrics.json').unlink()
    assert main(*args)[0] == 0 and Path('old/metrics.json').exists()

COMPILED = ('train', '--model', 'normnet31k', '--epochs', 1, '--bs', 30, '--lr-max', '1e-3', '--compile',
            '--no-pictures')

def test_compiled_training(main, tree, monkeypatch):
    "The net that trains is the compiled one; refused in one line where there is no compiler"
    import torch
    from fastcifar.basics import FastcifarError
    from fastcifar.device import compile_net
    try: compile_net(torch.nn.Linear(2, 2), 'cpu')
    except FastcifarError as e: pytest.skip(str(e))
    calls = []
    real = torch.compile
    def counted(f, *a, **kw):
        program = real(f, *a, backend='eager', **kw) # quick, and as strict about what can be compiled
        return lambda *x, **k: calls.append(1) or program(*x, **k)
    monkeypatch.setattr(torch, 'compile', counted)
    code, out, err = main(*COMPILED, '--data', tree)
    assert code == 0 and 'test accuracy' in out and len(calls) > 2, err # the trial, and a call each batch

def test_a_machine_without_a_compiler(main, tree, monkeypatch):
    import torch
    def refuse(*a, **kw): raise RuntimeError('no C++ compiler is here')
    monkeypatch.setattr(torch, 'compile', refuse)
    code, out, err = main(*COMPILED, '--data', tree)
    assert code == 2 and 'install a C++ compiler' in err and err.count('\n') == 1
