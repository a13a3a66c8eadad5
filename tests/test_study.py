"A study as a person runs it: killed, continued, with a run that fails, with a folder that holds another one."
import json, os, shutil, signal, subprocess, sys, time

import pandas as pd
import psutil
import pytest
from safetensors.numpy import load_file

QUICK = ('--models', 'normnet31k', '--norms', 'bn,gn', '--seeds', 2, '--epochs', 2, '--bs', '20', '--no-pictures')

def _ends_itself(name, parent):
    "What a run is to a pool; one of them kills its process, as the system does when memory is short"
    if name == 'ends' and os.getpid() != parent: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(.2)
    return f'{name} is done'

def compare(tree, out, *more): return ['compare', '--data', tree, *QUICK, '--out', out, *more]

@pytest.fixture(scope='module')
def study(tree, tmp_path_factory):
    "A study that was killed after its first finished run and continued"
    out = tmp_path_factory.mktemp('studies')/'study'
    cmd = [sys.executable, '-m', 'fastcifar', *map(str, compare(tree, out))]
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 240
    while not list(out.glob('runs/*/metrics.json')):
        assert p.poll() is None and time.monotonic() < end, p.stderr.read()[-2000:]
        time.sleep(.05)
    family = psutil.Process(p.pid).children(recursive=True)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    gone, alive = psutil.wait_procs(family, timeout=15)
    kept = {f: f.stat().st_mtime_ns for f in out.glob('runs/*/metrics.json')}
    done = subprocess.run([*cmd, '--json'], capture_output=True, text=True, timeout=300)
    return out, kept, alive, done

def test_killed_study_leaves_nobody_behind(study): assert study[2] == []

def test_killed_study_continues(study):
    out, kept, _, done = study
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept and all(f.stat().st_mtime_ns == t for f, t in kept.items())
    r = pd.read_csv(out/'results.csv')
    assert r.status.tolist() == ['finished'] * 4
    assert sorted(r.seed) == [0, 0, 1, 1] and sorted(set(r.norm)) == ['bn', 'gn']
    assert f'{len(kept)} finished' in done.stderr

def test_answer(study):
    out, _, _, done = study
    res = json.loads(done.stdout)
    r = pd.DataFrame(res['runs'])
    for row in res['summary']:
        own = 100 * r[r.norm == row['norm']].test_accuracy
        assert row['n'] == 2 and row['low'] <= row['mean'] <= row['high']
        assert abs(row['mean'] - own.mean()) < 1e-9 and abs(row['sd'] - own.std()) < 1e-9
    (d,) = res['differences']
    wide = 100 * r.pivot(index='seed', columns='norm', values='test_accuracy')
    assert abs(d['difference'] - (wide.bn - wide.gn).mean()) < 1e-9 and d['n'] == 2
    *before, answer = res['answer']
    assert 'n = 2' in answer and all('at chance' in line for line in before)
    made = 'study.json results.csv curves.csv summary.csv differences.csv answer.txt curves.png differences.png'
    assert set(made.split()) <= {f.name for f in out.iterdir()}
    assert len(pd.read_csv(out/'curves.csv')) == 8

def test_finished_study_says_so(study, main, tree):
    out = study[0]
    before = {f: f.stat().st_mtime_ns for f in out.glob('runs/*/*')}
    code, said, _ = main(*compare(tree, out))
    assert code == 0 and '4 runs, 4 finished' in said and 'tables and plots' in said
    assert before == {f: f.stat().st_mtime_ns for f in out.glob('runs/*/*')}

@pytest.mark.parametrize('change', [('--epochs', 3), ('--norms', 'bn'), ('--models', 'normnet48k'), ('--seeds', 1)])
def test_another_study_is_refused(study, main, tree, change):
    code, _, err = main(*compare(tree, study[0], *change))
    assert code == 2 and 'another configuration' in err and err.count('\n') == 1

def test_failed_run_does_not_stop_the_rest(main, tree):
    grid = '--models normnet31k --norms bn --seeds 1 --epochs 1 --bs 20,64 --jobs 1 --out s'
    code, said, _ = main('compare', '--data', tree, *grid.split())
    assert code == 1 and 'failed: a batch of 64 is larger' in said and said.count('failed: normnet31k') == 1
    r = pd.read_csv('s/results.csv')
    assert r.status.tolist() == ['finished', 'failed'] and 'larger than the training split' in r.reason[1]

def test_process_that_the_system_ends():
    "Each time, or once: the others are finished, and only the culprit is blamed"
    from fastcifar.study.pool import _on_pool
    said = []
    calls = {k: (k, os.getpid()) for k in ('ends', 'a', 'b', 'c')}
    back = dict(_on_pool(_ends_itself, calls, 2, said.append))
    assert {k: back[k] for k in 'abc'} == dict(a='a is done', b='b is done', c='c is done')
    assert 'the system ended' in back['ends']
    assert said and all('most likely for want of memory' in s for s in said)

def test_other_runs_in_the_folder_are_refused(study, tmp_path):
    "Finished runs of another configuration are not taken for those of this study"
    from fastcifar.basics import FastcifarError
    from fastcifar.runs.folder import data_source
    from fastcifar.study.study import Study
    c = json.loads((study[0]/'study.json').read_text())['runs']['normnet31k-bn-fast-bs20-seed0']
    shutil.copytree(study[0]/'runs/normnet31k-bn-fast-bs20-seed0', tmp_path/'s/runs/normnet31k-bn-fast-bs20-seed0')
    data = data_source(study[0]/'runs/normnet31k-bn-fast-bs20-seed0')
    with pytest.raises(FastcifarError, match='holds a run with epochs=2, not 1'):
        Study(tmp_path/'s', 'normnet31k', data, 'bn', seeds=1, batch_sizes=c['bs'], epochs=1).run(bars=False)

def test_study_of_an_older_version_continues(study, tmp_path):
    "Settings that did not exist when it was begun are as they were then"
    from fastcifar.data.load import load_data
    from fastcifar.runs.folder import data_source
    from fastcifar.study.study import Study
    shutil.copytree(study[0], tmp_path/'s')
    saved = json.loads((tmp_path/'s/study.json').read_text())
    data = data_source(study[0]/'runs/normnet31k-bn-fast-bs20-seed0')
    for c in saved['runs'].values():
        del c['tta'], c['model_args'], c['tfms']
        c['data'] = load_data(data).order # the hash that it kept
    (tmp_path/'s/study.json').write_text(json.dumps(saved))
    said = []
    s = Study(tmp_path/'s', 'normnet31k', data, ('bn', 'gn'), seeds=2, batch_sizes=20, epochs=2)
    s.run(bars=False, say=said.append)
    assert '4 runs, 4 finished' in said[0]

def test_same_run_in_and_out_of_a_study(study, main, tree):
    "A run of a study is the run that `train` makes: same numbers"
    saved = pd.read_json(study[0]/'study.json').runs['normnet31k-gn-fast-bs20-seed1']
    rates = ('--lr-max', saved['lr_max'], '--lr-min', saved['lr_min'])
    words = '--model normnet31k --norm gn --recipe fast --epochs 2 --bs 20 --seed 1 --threads 1 --out r --json'
    m = json.loads(main('train', '--data', tree, *words.split(), *rates)[1])
    r = pd.read_csv(study[0]/'results.csv').set_index(['norm', 'seed']).loc[('gn', 1)]
    assert m['train_accuracy'] == r.train_accuracy
    a, b = (load_file(f'{d}/model.safetensors') for d in ('r', study[0]/'runs/normnet31k-gn-fast-bs20-seed1'))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)

BAD = {
    'unknown norm': (['--norms', 'bn,gm'], "did you mean 'gn'"),
    'unknown model': (['--models', 'normnet32k'], "did you mean 'normnet31k'"),
    'unknown recipe': (['--recipes', 'refrence'], "did you mean 'reference'"),
    'groups': (['--groups', '7'], '7 groups does not fit'),
    'twice': (['--norms', 'bn,bn'], 'the same run twice'),
    'none': (['--norms', ','], 'at least one'),
    'batch sizes': (['--bs', 'big'], 'not a list of whole numbers'),
    'batch size': (['--bs', '0'], 'at least 1'),
    'device': (['--device', 'xyz'], "no device 'xyz'"),
    'argument': (['--model-args', 'shared=true'], 'no argument of normnet31k'),
    'arguments': (['--model-args', 'mended'], 'mended=true'),
    'own option': (['--model-args', 'norm="gn"'], 'which a training sets by itself'),
    'no group norm': (['--norms', 'bn', '--groups', '4'], 'groups are for group norm'),
    'seeds': (['--seeds', '0'], 'at least 1'),
    'data': (['--data', 'cifra10'], "did you mean 'cifar10'"),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(name, main, tree, tmp_path):
    args, says = BAD[name]
    code, _, err = main(*compare(tree, 'bad', *args))
    assert code == 2 and says in err and err.count('\n') == 1
    assert not (tmp_path/'bad').exists()

def test_summary(main, tmp_path):
    t = json.loads(main('summary', 'sepnet178k', '--json', '--graph', 'g.svg', '--field', 'f.png')[1])
    assert sum(r['parameters'] for r in t) == 178_178
    assert (tmp_path/'g.svg').read_text().count('<path') > 20 and (tmp_path/'f.png').stat().st_size > 5000
    code, said, _ = main('summary', 'normnet31k')
    assert code == 0 and '31,216 parameters' in said and 'AvgPool 4x4' in said
    said = 'fastcifar: group norm with 3 groups does not fit 16 channels: choose a number that divides 16\n'
    assert main('summary', 'normnet31k', '--norm', 'gn', '--groups', 3)[::2] == (2, said)
    assert main('summary', 'normnet31k', '--size', 4)[0] == 2
    assert main('summary', 'normnet31k', '--graph', 'g.doc')[0] == 2

def test_recipes(main):
    r = json.loads(main('recipes', 'normnet48k', '--json')[1])
    assert set(r) == {'one_cycle', 'reference', 'fast'}
    assert r['reference']['lr_max'] == 0.04 and r['reference']['step_epochs'] == 6

def test_reference_recipe_trains(main, tree):
    words = '--model normnet48k --norm gn --recipe reference --epochs 1 --bs 20 --out r --json'
    m = json.loads(main('train', '--data', tree, *words.split())[1])
    c = json.loads(open('r/config.json').read())
    assert m['recipe'] == 'reference' and m['norm'] == 'gn' and c['schedule'] == 'steps'
    assert c['policy'] == 'rare_flip' and c['stats'][1] == [0.2471, 0.2435, 0.2616]

def test_stopped_study(tree, tmp_path, main):
    "Ctrl-C, which every process of a terminal gets: no run counts as failed, and the same command goes on"
    cmd = [sys.executable, '-m', 'fastcifar', *map(str, compare(tree, tmp_path/'study', '--jobs', 2))]
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 240
    while not list((tmp_path/'study').glob('runs/*/checkpoints/*')): assert p.poll() is None and time.monotonic() < end
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    stopped = [l for l in err.splitlines() if l.startswith('fastcifar: stopped')]
    assert p.returncode == 130 and len(stopped) == 1 and 'the same command continues' in err, err
    assert not list((tmp_path/'study').glob('runs/*/failure.txt'))
    code, said, _ = main(*compare(tree, tmp_path/'study'))
    assert code == 0 and set(pd.read_csv(tmp_path/'study/results.csv').status) == {'finished'}

OWN_NET = """
import sys
from torch import nn
from fastcifar.models.registry import register_model
from fastcifar.study.study import Study

@register_model('mine')
class Mine(nn.Sequential):
    def __init__(self, n_out=10, norm='bn'):
        super().__init__(nn.Conv2d(3, n_out, 3), nn.BatchNorm2d(n_out), nn.AdaptiveAvgPool2d(1), nn.Flatten())

if __name__ == '__main__':
    s = Study('s', 'mine', sys.argv[1], ('bn',), ('one_cycle',), 2, 20, epochs=1, lr_max=.01)
    print(*s.run(jobs=2, bars=False, pictures=False, say=lambda *_: None).status)
"""

def test_a_net_of_a_script_is_known_in_the_processes_of_a_study(tree, tmp_path):
    (tmp_path/'own.py').write_text(OWN_NET)
    done = subprocess.run([sys.executable, 'own.py', tree], capture_output=True, text=True, timeout=200, cwd=tmp_path,
                          env=os.environ | {'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)})
    assert done.stdout.split() == ['finished', 'finished'], done.stdout + done.stderr
