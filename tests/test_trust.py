"Runs that the world interferes with, and the same run under other circumstances: the result is the same, bit for bit."
import contextlib, json, os, pickletools, re, shutil, signal, subprocess, sys, time, warnings, zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.numpy import load_file

from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Adam

from fastcifar.basics import FastcifarError
from fastcifar.data.load import load_data
from fastcifar.data.loaders import CifarDataLoaders
from fastcifar.models.zoo import create_model
from fastcifar.runs.recipes import create_recipe
from fastcifar.runs.fit import recipe_learner
from fastcifar.runs.config import configure
from fastcifar.runs.run import train_run
from fastcifar.train.learner import UnpicklingWarning, cifar_learner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
TRAIN = ('train', '--model', 'normnet31k', '--norm', 'gn', '--recipe', 'fast', '--epochs', 3, '--bs', 6,
         '--threads', 1, '--no-pictures')

def python(*args, **kwargs):
    "Run Python to its end"
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, **kwargs)

def begun(*args, **kwargs):
    "A process of the command line that goes on by itself"
    command = [sys.executable, '-m', 'fastcifar', *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)

def loaders(tree, **kwargs): return load_data(tree).dataloaders(bs=16, device='cpu', **kwargs)

def state(learn): return torch.cat([v.double().flatten() for v in learn.model.state_dict().values()])

def weights(out):
    w = load_file(Path(out)/'model.safetensors')
    return np.concatenate([w[k].ravel().astype(np.float64) for k in sorted(w)])

def history(out): return pd.read_csv(Path(out)/'history.csv').drop(columns='seconds')

def same(a, b): return (weights(a) == weights(b)).all() and history(a).equals(history(b))

# --- the same result, whatever happens

def test_killed_runs_end_as_if_nothing_had_been():
    code = (f'import sys; sys.path.insert(0, {str(ROOT/"tools")!r}); import soak; r = soak.kills(3, 7); print(r); '
            'sys.exit(not (r["bit_equal"] == 3 and not r["control_equal"]))')
    done = python('-c', code, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]

def fitted(tree, workers=0, first=None, bars=False):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    recipe = create_recipe('fast', 'normnet31k', epochs=2, bs=16, dropout=.1)
    dls = loaders(tree, policy='crop_flip_cutout', tfms='item', num_workers=workers)
    learn = recipe_learner(dls, create_model('normnet31k', n_out=3), recipe, precision='fp32')
    with contextlib.nullcontext() if bars else learn.no_bar(), learn.no_logging():
        if first: first(learn)
        learn.fit_one_cycle(2, 1e-2)
    return state(learn)

def test_workers_range_tests_and_bars_change_nothing(tree, tmp_path, monkeypatch):
    from fastcifar.data.loaders import ArrayDL
    monkeypatch.chdir(tmp_path)
    make = ArrayDL.create_batches
    def noted(self, samps):
        (tmp_path/f'{os.getpid()}.pid').touch()
        yield from make(self, samps)
    monkeypatch.setattr(ArrayDL, 'create_batches', noted)
    here = tmp_path/f'{os.getpid()}.pid'
    def makers():
        pids = list(tmp_path.glob('*.pid'))
        for f in pids: f.unlink()
        return pids
    plain = fitted(tree)
    assert makers() == [here]
    for workers in (1, 2, 4):
        assert fitted(tree, workers).equal(plain), workers
        pids = makers()
        assert len(pids) >= workers and here not in pids
    assert fitted(tree, bars=True).equal(plain)
    assert fitted(tree, first=lambda learn: learn.lr_range(num_it=12, show_plot=False, end_lr=.1)).equal(plain)
    assert fitted(tree, first=lambda learn: learn.lr_find(num_it=12, end_lr=.1, show_plot=False)).equal(plain)
    assert not fitted(tree, first=lambda learn: torch.rand(1)).equal(plain) # so dropout does depend on the generator

class PowerFailure(Callback):
    "After so many batches"
    order = 90
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter == self.at: raise RuntimeError('a power failure')

PARTS = { # fastai's own, with what they remember
    'Adam': dict(opt_func=Adam),
    'MixUp': dict(cbs=lambda: [MixUp(.4)]),
    'plateau': dict(cbs=lambda: [ReduceLROnPlateau(patience=0, factor=10, min_delta=9.)]),
    'two trackers': dict(cbs=lambda: [EarlyStoppingCallback(patience=3),
                                      EarlyStoppingCallback('accuracy', patience=2)]),
    'accumulation, fp16': dict(cbs=lambda: [GradientAccumulation(32)], precision='fp16')}

@pytest.mark.parametrize('name', PARTS)
def test_resume_with_parts_of_fastai(name, tree, tmp_path):
    from fastcifar.train.checkpoint import Checkpoints
    kw = dict(PARTS[name])
    cbs = kw.pop('cbs', list)
    def train(folder, at=None):
        torch.manual_seed(0)
        net = create_model('normnet31k', n_out=3, dropout=.1)
        learn = cifar_learner(loaders(tree), net, **{'precision': 'fp32', 'cbs': cbs(), **kw})
        ck = Checkpoints(folder, every=1, say=lambda s: None)
        failure = [PowerFailure(at)] if at else []
        done = ck.latest(learn)
        try:
            with learn.no_bar(), learn.no_logging(): learn.fit(4, 3e-3, cbs=[ck, *failure], start_epoch=done)
        except RuntimeError: return
        return state(learn), [dict(h, seconds=0) for h in ck.history], learn.recorder.lrs
    whole = train(tmp_path/'whole')
    for at in (4, 6, 13): train(tmp_path/'broken', at)
    again = train(tmp_path/'broken')
    assert whole[0].equal(again[0]) and whole[1:] == again[1:]

def test_what_checkpoints_cannot_keep_is_refused(tree, tmp_path):
    from fastai.optimizer import OptimWrapper, ranger
    from fastcifar.train.checkpoint import Checkpoints
    for opt in (ranger, lambda params, **kw: OptimWrapper(params, torch.optim.Adam, lr=1e-3)):
        learn = cifar_learner(loaders(tree), create_model('normnet31k', n_out=3), opt_func=opt)
        with learn.no_bar(), learn.no_logging(), pytest.raises(FastcifarError, match='do not keep the state of'):
            learn.fit(1, cbs=Checkpoints(tmp_path/'c'))

@pytest.fixture(scope='module')
def whole(tree, tmp_path_factory):
    "The run that nobody interferes with"
    out = tmp_path_factory.mktemp('whole')/'run'
    done = python('-m', 'fastcifar', *TRAIN, '--data', tree, '--out', out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_on_request(number, whole, cli, tree, tmp_path):
    "Ctrl-C in the middle: a checkpoint, a line on how to go on, and the exit code that a shell expects"
    out = tmp_path/'run'
    p = begun(*TRAIN, '--data', tree, '--out', out, '--checkpoint-every', 1)
    end = time.monotonic() + 120
    while not list(out.glob('checkpoints/epoch_*')):
        assert p.poll() is None and time.monotonic() < end, p.stderr.read()
        time.sleep(.005)
    p.send_signal(number)
    said, err = p.communicate(timeout=60)
    assert p.returncode == 128 + number and err.count('\n') == 1, err
    assert f'go on with: fastcifar train --resume {out}' in err, err
    assert 'after a checkpoint' in said and not (out/'metrics.json').exists()
    done = cli('train', '--resume', out, '--threads', 1, '--no-pictures')
    assert done.returncode == 0 and 'continuing after' in done.stdout and same(out, whole)

def test_ctrl_c_reaches_workers_too(tree, tmp_path, main):
    out = tmp_path/'run'
    more = ('--tfms', 'item', '--policy', 'crop_flip_cutout', '--workers', 2, '--checkpoint-every', 1, '--out', out)
    p = begun(*TRAIN, '--data', tree, *more, start_new_session=True)
    end, workers = time.monotonic() + 120, psutil.Process(p.pid).children
    while not (list(out.glob('checkpoints/epoch_*')) and len(workers()) == 2):
        assert p.poll() is None and time.monotonic() < end, p.stderr.read()
        time.sleep(.005)
    os.killpg(p.pid, signal.SIGINT)
    said, err = p.communicate(timeout=60)
    assert p.returncode == 130 and err.count('\n') == 1 and said.count('stopping at the end') == 1, said + err
    assert main(*TRAIN, '--data', tree, *more)[0] == 0

def interrupted(whole, tree, tmp_path, main, monkeypatch, after=4):
    "A run folder with checkpoints after some batches"
    from fastcifar.train.checkpoint import Checkpoints
    out, write, n = tmp_path/'run', Checkpoints._write, 0
    def stop(self, *args):
        nonlocal n
        write(self, *args)
        n += 1
        if n == after: raise FastcifarError('a power failure')
    monkeypatch.setattr(Checkpoints, '_write', stop)
    assert main(*TRAIN, '--data', tree, '--out', out, '--checkpoint-every', 1)[0] == 2
    monkeypatch.setattr(Checkpoints, '_write', write)
    return out

def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(whole, tree, tmp_path, main, monkeypatch):
    out = interrupted(whole, tree, tmp_path, main, monkeypatch)
    newest = max(out.glob('checkpoints/*'))
    data = bytearray(newest.read_bytes())
    data[-40] ^= 4 # a bit of a weight
    newest.write_bytes(data)
    code, said, _ = main('train', '--resume', out, '--threads', 1, '--no-pictures')
    assert f'{newest} is damaged: its checksum differs from what it holds; using the checkpoint before it' in said
    assert code == 0 and same(out, whole)

def test_other_threads_are_named(whole, tree, tmp_path, main, monkeypatch):
    out = interrupted(whole, tree, tmp_path, main, monkeypatch)
    code, said, _ = main('train', '--resume', out, '--threads', 2, '--no-pictures')
    assert code == 0 and 'threads 1, now it is 2: the result will differ' in said
    torch.set_num_threads(1)

def test_resume_takes_the_threads_of_the_run(whole, tree, tmp_path, main, monkeypatch):
    out = interrupted(whole, tree, tmp_path, main, monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try: code, said, _ = main('train', '--resume', out, '--no-pictures')
    finally: torch.set_num_threads(before)
    assert code == 0 and 'the result will differ' not in said and same(out, whole)
    assert json.loads((out/'environment.json').read_text())['threads'] == 1

def test_deterministic(whole, tree, tmp_path, main):
    from fastcifar.device import deterministic_only
    out = tmp_path/'run'
    assert main(*TRAIN, '--data', tree, '--out', out, '--deterministic')[0] == 0 and same(out, whole)
    assert json.loads((out/'environment.json').read_text())['deterministic'] is True
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(FastcifarError, match='mps has no deterministic mode'), deterministic_only('mps'): pass
    with pytest.raises(FastcifarError, match='leave out --deterministic'), deterministic_only('cpu'):
        raise RuntimeError('f does not have a deterministic implementation')

def test_checkpoints_need_a_whole_number(main, tree):
    code, _, err = main(*TRAIN, '--data', tree, '--checkpoint-every', 0)
    assert code == 2 and 'at least 1' in err

def test_a_clock_that_is_moved_back(whole, tree, tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, 'time', lambda: now - 86400 * (time.perf_counter() - int(time.perf_counter())))
    c = configure('fast', 'normnet31k', norm='gn', data=str(tree), epochs=3, bs=6)
    train_run(c, tmp_path/'run', threads=1, bars=False, pictures=False, say=lambda s: None)
    assert same(tmp_path/'run', whole) and (pd.read_csv(tmp_path/'run/history.csv').seconds >= 0).all()

# --- places that fail

LIMITED = '''
import resource, sys
from fastcifar.cli import main
import fastcifar.runs.run, fastcifar.interpret.interpretation
import fastcifar.train.checkpoint as state
write = state.Checkpoints._write
def limited(self, done, batch):
    full = 20_000, resource.RLIM_INFINITY # as good as a full disk, for this process
    if done == 2: resource.setrlimit(resource.RLIMIT_FSIZE, full)
    write(self, done, batch)
state.Checkpoints._write = limited
sys.exit(main(sys.argv[1:]))
'''

def test_a_full_disk(whole, cli, tree, tmp_path):
    out = tmp_path/'run'
    done = python('-c', LIMITED, *TRAIN, '--data', tree, '--out', out)
    err = done.stderr
    assert done.returncode == 2 and 'cannot write' in err and 'free space' in err and 'Traceback' not in err, err
    assert [f.name for f in out.glob('checkpoints/*')] == ['epoch_0001.safetensors']
    assert not list(out.glob('checkpoints/.*'))
    assert cli('train', '--resume', out, '--threads', 1, '--no-pictures').returncode == 0 and same(out, whole)

def test_a_folder_that_goes_away(tree, tmp_path, main, monkeypatch):
    "Root ignores modes of files: a file takes the place of the folder"
    import fastcifar.runs.run as runs
    out, old = tmp_path/'run', runs.RunHistory.write
    def write(self):
        old(self)
        shutil.rmtree(out/'checkpoints')
        (out/'checkpoints').write_text('')
    monkeypatch.setattr(runs.RunHistory, 'write', write)
    code, _, err = main(*TRAIN, '--data', tree, '--out', out)
    assert code == 2 and 'cannot write' in err and err.count('\n') == 1

def test_a_worker_that_dies(tree, tmp_path, main, monkeypatch):
    from fastcifar.data.loaders import ArrayDL
    from torch.utils.data import get_worker_info
    make = ArrayDL.create_batches
    def dying(self, samps):
        for i, b in enumerate(make(self, samps)):
            if get_worker_info() and i == 1: os.kill(os.getpid(), signal.SIGKILL)
            yield b
    monkeypatch.setattr(ArrayDL, 'create_batches', dying)
    more = '--tfms', 'item', '--policy', 'crop_flip_cutout', '--workers', 1
    code, _, err = main(*TRAIN, '--data', tree, '--out', tmp_path/'run', *more)
    assert code == 2 and 'a worker process died' in err and err.count('\n') == 1

def test_the_lock_goes_with_its_process(tree, tmp_path, main):
    "A killed run blocks nobody, even while its workers are still about; a living one does"
    out = tmp_path/'run'
    code = f'''
import os, sys, time
from pathlib import Path
from fastcifar.runs.folder import run_folder
with run_folder(Path({str(out)!r})):
    if os.fork() == 0: time.sleep(60); os._exit(0) # as a worker would
    print('locked', flush=True); time.sleep(60)
'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert p.stdout.readline() == 'locked\n'
        code, _, err = main(*TRAIN, '--data', tree, '--out', out)
        assert code == 2 and 'another process is working in' in err
        p.kill(); p.wait()
        assert main(*TRAIN, '--data', tree, '--out', out)[0] == 0
    finally: os.killpg(p.pid, signal.SIGKILL)

def test_nan_keeps_the_last_good_checkpoint(tree, tmp_path, main, monkeypatch):
    from fastcifar.train.loop import CrossEntropy
    call, n = CrossEntropy.__call__, 0
    def explode(self, inp, targ):
        nonlocal n
        n += torch.is_grad_enabled()
        return call(self, inp, targ) * (float('nan') if n == 12 else 1)
    monkeypatch.setattr(CrossEntropy, '__call__', explode)
    code, _, err = main(*TRAIN, '--data', tree, '--out', tmp_path/'run', '--checkpoint-every', 1)
    assert code == 2 and 'in epoch 2, batch 2, at learning rate' in err and err.count('\n') == 1
    assert max(f.name for f in (tmp_path/'run/checkpoints').iterdir()) == 'epoch_0001_batch_000001.safetensors'

# --- files that cannot run code

def pickled(path):
    "Is this a pickle, or a zip that holds one, whatever its name?"
    data = path.read_bytes()
    if data[:6] == b'\x93NUMPY': return b"'O'" in data[:128] or b"'|O'" in data[:128]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z: return any(_is_pickle(z.read(n)) for n in z.namelist())
    return _is_pickle(data)

def _is_pickle(data):
    try: return sum(1 for _ in pickletools.genops(data)) > 1
    except Exception: return False

def test_the_scan_for_pickles(tmp_path):
    torch.save({'a': torch.ones(2)}, tmp_path/'a.txt')
    np.save(tmp_path/'b', np.array([{}], dtype=object))
    (tmp_path/'d').write_bytes(b'# text that ends in a full stop.')
    (tmp_path/'c').write_bytes(b'\x80\x04]q\x00.')
    assert all(pickled(tmp_path/f) for f in ('a.txt', 'b.npy', 'c')) and not pickled(tmp_path/'d')

AUDITED = '''
import sys
found = []
sys.addaudithook(lambda event, args: found.append(args) if event == 'pickle.find_class' else None)
from fastcifar.cli import main
tree, image = sys.argv[1:]
quick = ['train', '--data', tree, '--model', 'normnet31k', '--recipe', 'fast', '--bs', '16', '--epochs', '2',
         '--checkpoint-every', '1', '--out', 'run']
from fastcifar.train.checkpoint import Checkpoints
write = Checkpoints._write
def stop(self, *args):
    write(self, *args)
    if args == (1, 2): raise KeyboardInterrupt
Checkpoints._write = stop
codes = [main(quick)]
Checkpoints._write = write
def predict(source): return main(['predict', '--from', source, image])
codes += [main(quick), predict('run'), main(['export', 'run']), predict('run-export'),
          predict('run-export/model.onnx'), main(['evaluate', 'run'])]
print(codes, found)
'''

def test_no_pickle_is_opened_or_left(tree, tmp_path):
    image = sorted((tree/'test').rglob('*.png'))[0]
    done = python('-c', AUDITED, tree, image, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == '[130, 0, 0, 0, 0, 0, 0] []', done.stdout[-2000:]
    files = [f for d in ('run', 'run-export') for f in (tmp_path/d).rglob('*') if f.is_file()]
    assert len(files) > 20 and not [f for f in files if pickled(f)]

def test_fastai_says_where_it_unpickles(tree, tmp_path):
    net, recipe = create_model('normnet31k', n_out=3), create_recipe('fast', 'normnet31k')
    learn = recipe_learner(loaders(tree), net, recipe)
    learn.path = tmp_path
    learn.create_opt()
    learn.save('net')
    with warnings.catch_warnings(action='error', category=UnpicklingWarning): learn.load('net')
    with pytest.warns(UnpicklingWarning, match='is unpickled, which can run code'):
        learn.load('net', weights_only=False) # what the test itself has just saved
    learn.export('all.pkl')
    from fastai.learner import load_learner
    with pytest.warns(UserWarning, match='insecure pickle'): load_learner(tmp_path/'all.pkl')

KINDS = 'images', 'pickles', 'archives', 'checkpoints', 'weights', 'run_folders', 'onnx', 'studies'

@pytest.mark.parametrize('kind', KINDS)
def test_hostile_files(kind):
    "The long form is `make soak`"
    code = (f'import sys; sys.path.insert(0, {str(ROOT/"tools")!r}); from hostile import try_kind; '
            f'r = try_kind({kind!r}, 60, 3); print(r); sys.exit("wrong" in r or r["inputs"] < 60)')
    done = python('-c', code, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]

# --- exports and predictions

def test_export_and_every_way_to_predict(whole, tree, cli, main, tmp_path):
    out, images = tmp_path/'shared', sorted((tree/'test').rglob('*.png'))
    c = json.loads(main('export', whole, '--out', out, '--pt2', '--json')[1])
    programs = 'model.safetensors', 'model.onnx', 'model.pt2'
    assert {f.name for f in out.iterdir()} == {'README.md', 'config.json', *programs}
    assert c['onnx']['max_difference'] <= 1e-4 and c['onnx']['images'] == 84
    assert c['metrics']['n'] == 1 and c['architecture']['norm'] == 'gn'
    card = (out/'README.md').read_text()
    assert f'{c["metrics"]["test_accuracy"]:.2%}' in card and 'blue, green, red' in card
    assert card.startswith('---\nlibrary_name: fastcifar')
    def answer(source): return json.loads(main('predict', '--json', '--trust', '--from', source, tree/'test')[1])
    answers = [answer(f) for f in (whole, out, *(out/p for p in programs))]
    for a in answers:
        assert [r['prediction'] for r in a] == [r['prediction'] for r in answers[0]] and len(a) == len(images) == 24
    assert max(abs(r['probability'] - s['probability']) for a in answers for r, s in zip(a, answers[0])) < 1e-4
    shutil.copyfile(images[0], out/'PICTURE.png')
    code = next(c for c in re.findall(r'(?:^    .*\n)+', card, re.M) if 'onnxruntime' in c) # as a reader would copy it
    with contextlib.chdir(out): exec(re.sub('^    ', '', code, flags=re.M), said := {})
    (out/'PICTURE.png').unlink()
    assert said['probabilities'].max() == pytest.approx(answers[0][0]['probability'], abs=1e-4)
    code, _, err = main('predict', '--from', out/'model.pt2', images[0])
    assert code == 2 and '--trust' in err
    code, _, err = main('export', whole, '--out', out)
    assert code == 2 and 'exists already' in err
    command = [sys.executable, '-m', 'fastcifar', 'predict', '--from', str(out), '-']
    piped = subprocess.run(command, input=images[0].read_bytes(), capture_output=True)
    assert piped.stdout.startswith(b'-: ' + answers[0][0]['prediction'].encode())

def test_export_without_onnx_installed(whole, tmp_path, main, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    code, _, err = main('export', whole, '--out', tmp_path/'x')
    assert code == 2 and "pip install 'fastcifar[onnx]'" in err and not list(tmp_path.iterdir())
    assert main('export', whole, '--out', tmp_path/'x', '--no-onnx')[0] == 0

def test_an_unfinished_run_is_not_exported(tmp_path, main, whole):
    shutil.copytree(whole, tmp_path/'run')
    (tmp_path/'run/metrics.json').unlink()
    code, _, err = main('export', tmp_path/'run')
    assert code == 2 and 'is not finished' in err
