"One training on two processes (gloo, on this machine)."
import json, os, signal, subprocess, sys, textwrap, time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ['--data', 'digits', '--model', 'normnet31k', '--norm', 'gn', '--precision', 'fp32', '--epochs', '2',
            '--bs', '128', '--lr-max', '1e-2', '--threads', '1', '--device', 'cpu', '--no-pictures']

def torchrun(*args, n=2):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), *args]

def environment(**more): return {**os.environ, 'OMP_NUM_THREADS': '1', **more}

def run(cmd, **env):
    return subprocess.run(cmd, capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment(**env))

def train(*args): return ['-m', 'fastcifar', 'train', *args]

def weights(out): return load_file(out/'model.safetensors')

def history(out): return pd.read_csv(out/'history.csv').drop(columns='seconds')

@pytest.fixture(scope='module')
def alone_and_shared(tmp_path_factory):
    "The same training by one process and by two"
    d = tmp_path_factory.mktemp('parallel')
    args = train(*SETTINGS, '--dropout', '0', '--out')
    one, two = run([sys.executable, *args, str(d/'one')]), run(torchrun(*args, str(d/'two')))
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    return d/'one', d/'two', two.stdout

def test_two_processes_train_as_well_as_one(alone_and_shared):
    one, two, said = alone_and_shared
    ha, hb = history(one), history(two)
    # the last bits of the sums differ, and a step later the ties of max pooling: that is as another seed
    np.testing.assert_allclose(ha.train_loss, hb.train_loss, atol=.15)
    np.testing.assert_allclose(ha.accuracy, hb.accuracy, atol=.15)
    assert json.loads((two/'environment.json').read_text())['world_size'] == 2

def test_one_process_speaks_and_writes(alone_and_shared):
    one, two, said = alone_and_shared
    assert said.count('test accuracy') == said.count('evaluating') == 1 and '2 processes' in said
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}

def test_a_smooth_net_gets_the_same_weights(tmp_path):
    "Twelve steps, the last with 45 and 44 images: without ties and thresholds the sums differ in their last bits alone"
    script = tmp_path/'script.py'
    script.write_text(textwrap.dedent(f'''
        import os
        from fastcifar.all import *
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2), nn.GELU(),
                            nn.Flatten(), nn.Linear(784, 10))
        dls = load_data('digits').dataloaders(bs=128, device='cpu')
        learn = cifar_learner(dls, net, precision='fp32', opt_func=SGD)
        with learn.distrib_ctx(in_notebook=True, cpu=True), learn.no_bar(), learn.no_logging(): learn.fit(1, .2)
        name = os.environ.get('WORLD_SIZE', '1') + os.environ.get('RANK', '0') + '.pt'
        torch.save(learn.model.state_dict(), r'{tmp_path}' + '/' + name)
    '''))
    for cmd in ([sys.executable, str(script)], torchrun(str(script))):
        done = run(cmd)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path/f'{n}.pt') for n in ('10', '20', '21'))
    for k in one:
        assert (first[k] == second[k]).all()
        torch.testing.assert_close(one[k], first[k], rtol=1e-4, atol=1e-5)

def test_parts_are_disjoint_and_complete_in_every_epoch(tmp_path):
    script = tmp_path/'script.py'
    script.write_text(textwrap.dedent(f'''
        import json, os
        from fastcifar.all import *
        dls = load_data('digits').dataloaders(bs=128, seed=3, device='cpu')
        learn = cifar_learner(dls, create_model('normnet31k'), precision='fp32')
        seen, get = [], type(dls.train).get_idxs
        def logged(self):
            seen.append((self is dls.train, get(self)))
            return seen[-1][1]
        type(dls.train).get_idxs = logged
        with learn.distrib_ctx(), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
        values = [[float(v) for v in r] for r in learn.recorder.values]
        file = Path(r'{tmp_path}', f'rank{{os.environ["RANK"]}}.json')
        file.write_text(json.dumps(dict(seen=seen, values=values)))
    '''))
    done = run(torchrun(str(script)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count('that can be done on GPUs only') == 1, 'the first process says so of batch norm'
    a, b = (json.loads((tmp_path/f'rank{i}.json').read_text()) for i in (0, 1))
    assert [t for t, _ in a['seen']] == [t for t, _ in b['seen']] == [True, False] * 2
    epochs = []
    for (train, x), (_, y) in zip(a['seen'], b['seen']):
        assert not set(x) & set(y) and sorted(x + y) == list(range(1497 if train else 300))
        if train: epochs.append(x + y)
    assert epochs[0] != epochs[1]
    assert a['values'] == b['values'], 'losses and metrics are those of the whole set, on every process'

def test_a_net_gets_its_own_batch_norm_back(monkeypatch):
    "Synchronised batch norm stands in for it during a fit, with the same weights and averages"
    from fastcifar.train import distributed as parallel
    from fastcifar.all import cifar_learner, load_data, nn
    inner = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(nn.Conv2d(3, 8, 3), inner, nn.Flatten(), nn.Linear(7200, 10))
    learn = cifar_learner(load_data('digits').dataloaders(bs=128, device='cpu'), net)
    own, cb = net[1][0], parallel.DataParallelTraining(sync_bn=True)
    learn.add_cb(cb)
    with pytest.warns(UserWarning, match='that can be done on GPUs only'): cb._sync_norms()
    assert net[1][0] is own
    monkeypatch.setattr(parallel, '_why_not_synced', lambda model: None) # as on a GPU
    cb._sync_norms()
    synced = net[1][0]
    assert type(synced) is nn.SyncBatchNorm and learn.model is net
    assert synced.weight is own.weight and synced.running_mean is own.running_mean
    synced.num_batches_tracked.add_(3)
    net.eval()
    cb.after_fit()
    assert net[1][0] is own and not own.training and own.num_batches_tracked == 3

def test_resume_after_one_process_is_killed(tmp_path):
    # with random numbers of each process
    args = train(*SETTINGS, '--dropout', '.1', '--checkpoint-every', '4', '--recipe', 'fast', '--out')
    assert run(torchrun(*args, str(tmp_path/'whole'))).returncode == 0
    killed = torchrun(*args, str(tmp_path/'killed'))
    p = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    while p.poll() is None and not list((tmp_path/'killed/checkpoints').glob('*batch*.safetensors')): time.sleep(.05)
    victims = [c for c in psutil.Process(p.pid).children() if c.environ().get('RANK') == '1']
    victims[0].send_signal(signal.SIGKILL)
    assert p.wait(120) != 0
    assert not (tmp_path/'killed/metrics.json').exists()
    again = run(killed)
    assert again.returncode == 0 and 'continuing after' in again.stdout, again.stdout + again.stderr
    a, b = weights(tmp_path/'whole'), weights(tmp_path/'killed')
    assert all((a[k] == b[k]).all() for k in a)
    assert history(tmp_path/'whole').equals(history(tmp_path/'killed'))

def test_what_is_refused(tmp_path):
    def line(cmd, **env):
        done = run(cmd, **env)
        assert done.returncode != 0
        return done.stderr
    uneven = line(torchrun(*train(*SETTINGS, '--bs', '127', '--out', str(tmp_path/'a'))))
    assert 'cannot be shared evenly by 2 processes' in uneven
    assert 'only train runs on several processes' in line(torchrun('-m', 'fastcifar', 'evaluate', str(tmp_path)))
    err = line([sys.executable, *train(*SETTINGS, '--out', str(tmp_path/'b'))], ACCELERATE_MIXED_PRECISION='no')
    assert 'accelerate launch has started one process alone' in err and len(err.splitlines()) == 1
