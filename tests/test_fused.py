"Several seeds in one pass, as a person runs them: the same folders, killed and continued, and one that fails."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

SETTINGS = ('--data digits --models groupnet --norms gn --seeds 2 --epochs 2 --bs 128 --precision fp32 '
            '--no-pictures --jobs 1').split()

def apart(a, b): return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-3))

def command(out, *more):
    return [sys.executable, '-m', 'fastcifar', *map(str, ('compare', *SETTINGS, '--out', out, *more))]

@pytest.fixture(scope='module')
def studies(tmp_path_factory):
    "A study in one pass, the same one killed in the middle and continued, and the same one run by run"
    out = tmp_path_factory.mktemp('fused')
    for name, more in (('whole', ('--fused', 2)), ('alone', ())):
        subprocess.run(command(out/name, *more), check=True, capture_output=True, timeout=300)
    cmd = command(out/'killed', '--fused', 2)
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 200
    while not list(out.glob('killed/fused/*/checkpoints/epoch_0001.safetensors')):
        assert p.poll() is None and time.monotonic() < end, p.stderr.read()[-2000:]
        time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    finished = list(out.glob('killed/runs/*/metrics.json'))
    done = subprocess.run([*cmd, '--json'], capture_output=True, text=True, timeout=300)
    return out, finished, done

def runs(study): return sorted((study/'runs').iterdir())

def test_a_killed_pass_continues_exactly(studies):
    out, finished, done = studies
    assert done.returncode == 0 and not finished, done.stderr[-2000:]
    assert 'continuing' in (runs(out/'killed')[0]/'log.txt').read_text() and not (out/'killed/fused').exists()
    for a, b in zip(runs(out/'whole'), runs(out/'killed'), strict=True):
        x, y = (load_file(d/'model.safetensors') for d in (a, b))
        assert all(torch.equal(x[k], y[k]) for k in x), a.name
        h, g = (pd.read_csv(d/'history.csv').drop(columns='seconds') for d in (a, b))
        assert h.equals(g)

def test_each_seed_is_trained_as_alone(studies):
    out = studies[0]
    for a, b in zip(runs(out/'whole'), runs(out/'alone'), strict=True):
        assert {f.name for f in a.iterdir()} - {'log.txt'} == {f.name for f in b.iterdir()} - {'checkpoints', 'log.txt'}
        assert json.loads((a/'config.json').read_text()) == json.loads((b/'config.json').read_text())
        h, g = (pd.read_csv(d/'history.csv') for d in (a, b))
        assert list(h) == list(g)
        assert (h.train_loss - g.train_loss).abs().max() < .02 and (h.accuracy - g.accuracy).abs().max() < .05
        x, y = (load_file(d/'model.safetensors') for d in (a, b))
        # roundings grow from step to step, but stay far below what tells two seeds apart
        assert max(apart(x[k], y[k]) for k in x if x[k].ndim > 1) < .2
    x, y = (load_file(d/'model.safetensors') for d in runs(out/'whole')[:2])
    first = 'features.0.conv.weight'
    assert apart(x[first], y[first]) > .5
    r = pd.read_csv(out/'whole/results.csv')
    assert (r.status == 'finished').all() and r.test_accuracy.nunique() > 1

def test_finished_runs_stay_and_seeds_join(studies, main):
    out = studies[0]/'whole'
    before = {f: f.stat().st_mtime_ns for f in out.glob('runs/*/*')}
    code, said, err = main('compare', *SETTINGS, '--seeds', 4, '--fused', 3, '--out', out)
    assert code == 0, err
    assert '4 runs, 2 finished' in said and '2/2' in said
    assert pd.read_csv(out/'results.csv').status.tolist() == ['finished'] * 4
    assert before == {f: f.stat().st_mtime_ns for f in before}

def test_a_pass_that_fails_says_which_run_does(main):
    "A learning rate at which every net explodes: each run has its own reason"
    wild = '--seeds 2 --epochs 1 --optimizer sgd --lr-max 900 --lr-min 900 --fused 2 --out s'
    code, said, _ = main('compare', *SETTINGS, *wild.split())
    assert code == 1 and said.count('failed: groupnet') == 2 and 'NaN or infinite' in said
    assert pd.read_csv('s/results.csv').status.tolist() == ['failed', 'failed']

def test_one_rate_for_all(main):
    code, _, err = main('compare', *SETTINGS, '--recipes', 'one_cycle', '--fused', 2, '--out', 's')
    assert code == 2 and 'give lr_max (--lr-max)' in err and err.count('\n') == 1

def test_a_pass_of_another_process_is_left_alone(main):
    "Its checkpoints stay when this process cannot have the folder; the runs are then trained one by one"
    from fastcifar.study.study import Study
    Study('s', 'groupnet', 'digits', 'gn', seeds=2, batch_sizes=128, epochs=1, precision='fp32')._settle()
    work = Path('s/fused/groupnet-gn-fast-bs128-seeds0_1')
    (work/'checkpoints').mkdir(parents=True)
    (work/'checkpoints/kept').write_text('theirs')
    with FileLock(work/'.lock'): code, _, err = main('compare', *SETTINGS, '--epochs', 1, '--fused', 2, '--out', 's')
    assert code == 0, err
    assert (work/'checkpoints/kept').read_text() == 'theirs'
    assert pd.read_csv('s/results.csv').status.tolist() == ['finished', 'finished']
    assert 'another process is working in' in next(Path('s/runs').glob('*seed0/log.txt')).read_text()
