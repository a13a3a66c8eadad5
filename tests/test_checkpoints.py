"What a checkpoint holds, when one is written, which of them is taken, and what is refused."
import contextlib, copy, json, math, os, signal, threading, time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.data.core import DataLoaders
from safetensors.torch import save_file
from torch import nn

import fastcifar.train.checkpoint as state
from fastcifar.basics import FastcifarError
from fastcifar.data.load import Arrays
from fastcifar.data.images import ImageData
from fastcifar.train.checkpoint import Checkpoints, Stopped, StopRequest
from fastcifar.train.checkpoint import checkpoint_state, of_this_process, restore_parts
from fastcifar.train.learner import cifar_learner
from fastcifar.models.weights import load_tensors, save_tensors

@pytest.fixture(scope='module')
def data():
    x = {s: np.random.default_rng(i).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        for i, (s, n) in enumerate((('train', 20), ('test', 8)))}
    return ImageData(Arrays(x, {s: np.arange(len(v)) % 3 for s, v in x.items()}, list('abc')), 'noise')

def learner(data, **kwargs):
    "Five batches an epoch"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(.2), nn.Linear(196, 3))
    return cifar_learner(data.dataloaders(bs=4, policy='flip', device='cpu'), net, precision='fp32', **kwargs)

def fit(learn, n=2, start=0, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-2, start_epoch=start, **kwargs)
    return learn

def names(folder): return [f.stem for f in Checkpoints(folder).files()]

# -- what is written, and when

class Records(Callback):
    "Everything that a row of the history says, worked out by itself; and where a checkpoint was just written"
    order, stateless = 71, True
    def __init__(self, folder): self.folder, self.rows, self.files = folder, [], []
    def before_train(self): self.sums, self.began = [], time.perf_counter()
    def after_batch(self):
        if self.training:
            right = int((self.pred.argmax(1) == self.y).sum())
            self.sums.append((self.loss.item() * len(self.y), right, len(self.y)))
            self.files.append(names(self.folder)[:1])
    def after_epoch(self):
        loss, right, n = map(sum, zip(*self.sums))
        v = self.recorder.values[-1]
        self.rows.append(dict(epoch=self.epoch + 1, train_loss=loss / n, train_accuracy=right / n, valid_loss=v[1],
            accuracy=v[2], lr=self.opt.hypers[-1]['lr']))

def test_history(data, tmp_path):
    "Training numbers are means over images, seconds are those of the epoch"
    checkpoints, records = Checkpoints(tmp_path, say=None), Records(tmp_path)
    began = time.perf_counter()
    fit(learner(data), 3, cbs=[checkpoints, records])
    took, rows = time.perf_counter() - began, checkpoints.history
    columns = ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'accuracy', 'lr', 'seconds']
    assert [list(r) for r in rows] == [columns] * 3
    for row, mine in zip(rows, records.rows):
        assert {k: v for k, v in row.items() if k != 'seconds'} == pytest.approx(mine, rel=1e-5)
        assert 0 <= row['seconds'] <= took and row['seconds'] == round(row['seconds'], 2)
    assert load_tensors(tmp_path/'epoch_0003.safetensors')[1]['history'] == rows

@pytest.mark.parametrize('every, inside', [(None, []), (2, [2, 4]), (5, []), (4, [4])])
def test_when_checkpoints_are_written(data, tmp_path, every, inside):
    "After so many batches and after each epoch; the newest two stay"
    records = Records(tmp_path)
    fit(learner(data), 2, cbs=[Checkpoints(tmp_path, every, say=None), records])
    written = [[f'epoch_{e:04}_batch_{b:06}' for b in inside] + [f'epoch_{e + 1:04}'] for e in range(2)]
    flat = written[0] + written[1]
    assert names(tmp_path) == flat[-2:][::-1]
    seen = [f[0] for f in records.files if f]
    assert list(dict.fromkeys(seen)) == flat[:-1]
    if inside: assert records.files[inside[0] - 2] == [] and records.files[inside[0] - 1] == [flat[0]]
    kept = Checkpoints(tmp_path/'all', 2, keep=9, say=None)
    fit(learner(data), 2, cbs=kept)
    assert len(kept.files()) == 6
    for bad in (0, -1):
        with pytest.raises(FastcifarError, match='give at least 1'): Checkpoints(tmp_path, bad)

def test_a_checkpoint_says_where_it_stands(data, tmp_path):
    learn, checkpoints = learner(data), Checkpoints(tmp_path, 3, keep=9, say=None)
    fit(learn, 1, cbs=checkpoints)
    (_, whole), (tensors, half) = (load_tensors(tmp_path/f'epoch_000{n}.safetensors') for n in ('1', '0_batch_000003'))
    assert (whole['done'], whole['batch'], half['done'], half['batch']) == (1, 0, 0, 3)
    assert whole['sums'] == dict(loss=0, right=0, n=0, seconds=0) and half['sums']['n'] == 12
    assert 0 < half['sums']['loss'] < 12 * 5 and 0 <= half['sums']['right'] <= 12 and 0 <= half['sums']['seconds'] < 60
    assert (half['n_iter'], half['train_iter'], half['history'], half['epochs'][0]) == (5, 3, [], 0)
    assert half['pct_train'] == pytest.approx(.6) and half['device'] == 'cpu'
    assert half['threads'] == torch.get_num_threads()
    assert {'model', 'opt'} <= {k.split('.')[0] for k in tensors} <= {'model', 'grad', 'opt', 'recorder'}
    assert {k[6:] for k in tensors if k.startswith('model.')} == set(learn.model.state_dict())

def test_sums_of_several_processes(data, tmp_path, monkeypatch):
    "The first writes the sum of all, and what each has"
    other = dict(loss=2., right=3, n=4, seconds=1.)
    monkeypatch.setattr(state, 'all_gather', lambda v: [copy.deepcopy(v), dict(v, sums=other)])
    fit(learner(data), 1, cbs=Checkpoints(tmp_path, 3, keep=9, say=None))
    note = load_tensors(tmp_path/'epoch_0000_batch_000003.safetensors')[1]
    first, second = (r['sums'] for r in note['ranks'])
    assert second == other and first['n'] == 12
    for k in ('loss', 'right', 'n'): assert note['sums'][k] == first[k] + second[k]

@pytest.mark.parametrize('rank', [0, 1])
def test_sums_after_a_change_of_processes(monkeypatch, rank):
    "Each its own; or, where their number has changed, the first all of them"
    ranks = [dict(rng=f'rng {i}', sums=dict(loss=i + 1., right=i + 2, n=i + 3, seconds=i + 4.)) for i in range(2)]
    note = dict(ranks=ranks, sums=dict(loss=3., right=5, n=7, seconds=4.))
    monkeypatch.setattr(state, 'rank', lambda: rank)
    monkeypatch.setattr(state, 'world_size', lambda: 2)
    assert of_this_process(note) == ranks[rank]
    monkeypatch.setattr(state, 'world_size', lambda: 3)
    sums = note['sums'] if rank == 0 else dict(loss=0., right=0, n=0, seconds=4.)
    assert of_this_process(note) == dict(rng='rng 0', sums=sums)

def counted(pred, y, xb=None):
    "(images counted, right answers, is it a classification?) of one batch"
    c = Checkpoints('nowhere')
    c._right, c.learn = 0, SimpleNamespace(xb=xb or (torch.zeros(5, 3),), yb=() if y is None else (y,))
    n = c._count_right(pred, *c.learn.yb)
    return n, int(c._right), bool(c._classes)

def test_what_is_counted():
    "Classes of images, or of each of their pixels; not what has none"
    y = torch.tensor([0, 1, 2, 0, 1])
    pred = nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 2]), 3).float().requires_grad_()
    assert counted(pred, y) == (5, 3, True)
    assert counted(pred.expand(2, 5, 3), y.expand(2, 5)) == (10, 6, True)
    assert counted(pred, y.float()) == (5, 0, False) and counted(pred, y[:, None]) == (5, 0, False)
    assert counted(pred, torch.zeros(5, 3).long()) == (5, 0, False), 'a number for each class is no class'
    for args in ((pred,), y), (pred, [y]), (pred, None): assert counted(*args) == (5, 0, False)
    assert counted(pred, torch.zeros(4)) == (4, 0, False), 'targets count, not inputs'

def test_a_validation_that_is_called_off(data, tmp_path):
    class Off(Callback):
        order = -10
        def before_validate(self): raise CancelValidException
    c = Checkpoints(tmp_path, say=None)
    fit(learner(data, cbs=Off()), 2, cbs=c)
    assert [list(r) for r in c.history] == [['epoch', 'train_loss', 'train_accuracy', 'lr', 'seconds']] * 2

@pytest.mark.parametrize('order, rows', [(69, 2), (75, 2)])
def test_stopped_early_by_another_callback(data, tmp_path, order, rows):
    "The epoch that has ended counts, once, whoever comes first"
    class Enough(Callback):
        def after_epoch(self):
            if self.epoch == 1: raise CancelFitException
    stop, c = Enough(), Checkpoints(tmp_path, say=None)
    stop.order = order
    fit(learner(data), 5, cbs=[stop, c])
    assert len(c.history) == rows and names(tmp_path)[0] == f'epoch_{rows:04}'
    class Within(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1: raise CancelFitException
    c = Checkpoints(tmp_path/'within', say=None)
    fit(learner(data), 5, cbs=[Within(), c])
    assert len(c.history) == 1, 'half an epoch is none'

# -- continued

class Breaks(Callback):
    order = 72
    def __init__(self, at, do): self.at, self.do = at, do
    def after_batch(self):
        if self.training and self.train_iter == self.at: self.do()

def numbers(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}

@pytest.mark.parametrize('at', [2, 5, 8])
def test_continued_to_the_bit(data, tmp_path, at):
    "Also without the optimizer's state in memory; gradients, generators and positions are those of before"
    def fault(): raise ZeroDivisionError
    whole = Checkpoints(tmp_path/'whole', 2, say=None)
    want = numbers(fit(learner(data), 3, cbs=whole))
    broken = [Checkpoints(tmp_path/'b', 2, say=None), Breaks(at, fault)]
    with pytest.raises(ZeroDivisionError): fit(learner(data), 3, cbs=broken)
    learn, c, said = learner(data), Checkpoints(tmp_path/'b', 2), []
    c.say = said.append
    done = c.latest(learn)
    assert (done, c.batch) == {2: (0, 2), 5: (0, 4), 8: (1, 2)}[at] and not said
    fit(learn, 3, done, cbs=c)
    got = numbers(learn)
    assert all(torch.equal(v, got[k]) for k, v in want.items())
    def rows(c): return [{k: v for k, v in r.items() if k != 'seconds'} for r in c.history]
    assert rows(c) == rows(whole)

def test_seconds_go_on(data, tmp_path):
    "An epoch in two parts takes as long as both"
    def slow():
        time.sleep(.4)
        raise ZeroDivisionError
    broken = [Breaks(1, lambda: time.sleep(.5)), Checkpoints(tmp_path, 2, say=None), Breaks(3, slow)]
    with pytest.raises(ZeroDivisionError): fit(learner(data), 1, cbs=broken)
    learn, c = learner(data), Checkpoints(tmp_path, 2, say=None)
    fit(learn, 1, c.latest(learn), cbs=c)
    assert .5 <= c.history[0]['seconds'] < 30

def test_another_number_of_batches_is_refused(data, tmp_path):
    fit(learner(data), 1, cbs=Checkpoints(tmp_path, say=None))
    other = cifar_learner(data.dataloaders(bs=5, policy='flip', device='cpu'), learner(data).model, precision='fp32')
    c = Checkpoints(tmp_path, say=None)
    done = c.latest(other)
    with pytest.raises(FastcifarError, match='5 batches an epoch, now there are 4'): fit(other, 2, done, cbs=c)

def test_which_checkpoint_is_taken(data, tmp_path):
    "The newest whole one that is sealed; others are put aside with a word"
    fit(learner(data), 2, cbs=Checkpoints(tmp_path, 2, keep=9, say=None))
    (tmp_path/'epoch_9.txt').write_text('something else')
    (tmp_path/'epoch_0002_batch_000004.safetensors.tmp').write_text('')
    newest, before = Checkpoints(tmp_path).files()[:2]
    assert [newest.stem, before.stem] == ['epoch_0002', 'epoch_0001_batch_000004']
    tensors, note = load_tensors(newest)
    save_file(tensors, newest, {'format': 'pt', 'fastcifar': json.dumps(note)}) # whole, but nobody has sealed it
    said, learn = [], learner(data)
    c = Checkpoints(tmp_path, say=said.append)
    assert c.latest(learn) == 1 and c.batch == 4 and c.where == before
    assert len(said) == 1 and 'it has no checksum' in said[0] and said[0].endswith('; using the checkpoint before it')
    assert newest.with_name(f'{newest.name}.damaged').is_file() and c.files()[0] == before
    for f in c.files(): f.write_bytes(b'x')
    said.clear()
    assert Checkpoints(tmp_path, say=said.append).latest(learn) == 0
    assert said[-1].endswith('; no checkpoint is whole, so the training starts again') and len(said) == 5
    assert Checkpoints(tmp_path/'none', say=said.append).latest(learn) == 0 and len(said) == 5

def test_another_machine_is_told(data, tmp_path):
    fit(learner(data), 1, cbs=Checkpoints(tmp_path, say=None))
    tensors, note = load_tensors(tmp_path/'epoch_0001.safetensors')
    save_tensors(tmp_path/'epoch_0001.safetensors', tensors, dict(note, torch='1.0', threads=note['threads'] + 1))
    said = []
    assert Checkpoints(tmp_path, say=said.append).latest(learner(data)) == 1
    now = torch.get_num_threads()
    assert said == [f'the checkpoint was made with {k} {a}, now it is {b}: the result will differ in the last digits'
        for k, a, b in (('threads', now + 1, now), ('torch', '1.0', torch.__version__))]

GONE = object()
DAMAGES = [ # place in a note -> what stands there
    ('done', -1), ('done', True), ('done', 2**53), ('done', 2), ('batch', GONE), ('batch', 5), ('batch', 1.),
    ('threads', '1'), ('pct_train', 1), ('history', []), ('history', {}), ('history 0 lr', GONE),
    ('history 0 epoch', GONE),
    ('history 0 seconds', GONE), ('history 0 lr', [1]), ('history 0 accuracy', '1'), ('hypers 0 lr', '1'),
    ('hypers 0 lr', None), ('hypers 1 wd', None), ('hypers 0 wd', GONE), ('opt 0', 3), ('opt', None), ('epochs 0', '1'),
    ('loaders', {}), ('ranks', []), ('ranks', {}), ('ranks 0 sums n', GONE), ('ranks 0 sums m', 1),
    ('ranks 0 sums n', '1'), ('sums n', '1'), ('ranks 0 sums', {})]

def damaged(note, place, value):
    "A copy of a note with something else in a place"
    note = copy.deepcopy(note)
    *way, last = [int(k) if k.isdigit() else k for k in place.split()]
    at = note
    for k in way: at = at[k]
    if value is GONE: del at[last]
    else: at[last] = value
    return note

@pytest.fixture(scope='module')
def written(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('written')
    fit(learner(data), 1, cbs=Checkpoints(folder, say=None))
    tensors, note = load_tensors(folder/'epoch_0001.safetensors')
    two = [*note['hypers'], dict(note['hypers'][0])] # as of an optimizer with two groups of parameters
    return tensors, dict(note, hypers=two)

@pytest.mark.parametrize('place, value', DAMAGES)
def test_notes_of_another_shape_are_refused(data, written, tmp_path, place, value):
    tensors, note = written
    assert state._checked_note(note) is note and state._checked_note(damaged(note, 'batch', 4))
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        state._checked_note(damaged(note, place, value))
    save_tensors(tmp_path/'epoch_0001.safetensors', tensors, damaged(note, place, value))
    with pytest.raises(FastcifarError, match='is no checkpoint of this version and training'):
        Checkpoints(tmp_path, say=None).latest(learner(data))

# -- what callbacks keep

class Counts(Callback):
    "Numbers, texts and lists of them are kept"
    def __init__(self): self.n, self.words, self.fixed, self.net = 0, ['a'], (1, 2.), nn.Linear(1, 1)
    def after_batch(self):
        if self.training: self.n, self.words = self.n + 1, [*self.words, np.float32(self.n)]

def test_numbers_of_callbacks_are_kept(data, tmp_path):
    "Those that have changed since the fit began, wherever they are plain"
    c = Checkpoints(tmp_path, say=None)
    fit(learner(data, cbs=Counts()), 1, cbs=c)
    note = load_tensors(tmp_path/'epoch_0001.safetensors')[1]
    assert note['parts']['counts'] == dict(n=5, words=['a', 0., 1., 2., 3., 4.])
    learn = learner(data, cbs=Counts())
    c = Checkpoints(tmp_path, say=None)
    fit(learn, 2, c.latest(learn), cbs=c)
    assert learn.counts.n == 10 and len(learn.counts.words) == 11
    assert load_tensors(tmp_path/'epoch_0002.safetensors')[1]['parts']['counts']['n'] == 10

@pytest.mark.parametrize('kept, says', [(dict(n=3, fixed=[3]), None), (dict(learn=1), 'sets learn of counts'),
    (dict(net=1), 'sets net of counts'), (dict(n=dict(a=1)), 'sets n of counts'), (dict(fresh=1), None)])
def test_what_may_be_put_back(data, kept, says):
    "Plain things in the place of plain things; nothing else, whatever a file says"
    learn = learner(data, cbs=Counts())
    note = dict(parts=dict(counts=kept, nobody=dict(a=1)))
    with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext(): restore_parts(learn, {}, note)
    if not says: assert {k: getattr(learn.counts, k) for k in kept} == kept and learn.counts.learn is learn

def test_what_changes_and_cannot_be_kept(data, tmp_path):
    "Each callback is named once; what stays as it was is nothing to name"
    class Collects(Callback):
        def __init__(self): self.seen, self.same, self.plain, self.deep = [], nn.Linear(1, 1), 1, dict(a=[1])
        def after_batch(self): self.seen.append(self.pred.detach())
    class Swaps(Callback):
        def before_fit(self): self.t = torch.zeros(1)
        def before_epoch(self): self.t += 1 # in its place: the same tensor, another version
    said = []
    fit(learner(data, cbs=[Collects(), Swaps()]), 2, cbs=Checkpoints(tmp_path, 2, say=said.append))
    hint = 'give it state_dict() and load_state_dict()'
    assert said == [f'checkpoints do not keep seen of the callback Collects: {hint}',
                    f'checkpoints do not keep t of the callback Swaps: {hint}']

class Counting(Callback):
    name = 'counting'
    def before_fit(self): self.seen, self.n = torch.zeros(2, dtype=torch.int64), 0
    def after_batch(self):
        if self.training: self.seen, self.n = self.seen + torch.tensor([1, self.iter]), self.n + 1

class Torchs(Counting):
    "Keeps a tensor and a number, with torch's pair of methods"
    def state_dict(self): return dict(seen=self.seen, n=self.n)
    def load_state_dict(self, state): self.seen, self.n = state['seen'], state['n']

class Former(Counting):
    "The same, with the pair of version 0.1"
    def checkpoint(self): return dict(seen=self.seen), dict(n=self.n)
    def restore(self, tensors, note): self.seen, self.n = tensors['seen'], note['n']

@pytest.mark.parametrize('first, then', [(Torchs, Torchs), (Former, Former), (Former, Torchs)])
def test_callbacks_that_say_what_they_keep(data, tmp_path, first, then):
    fit(learner(data, cbs=first()), 1, cbs=Checkpoints(tmp_path, say=None))
    tensors, note = load_tensors(tmp_path/'epoch_0001.safetensors')
    assert note['parts']['counting'] == dict(n=5) and tensors['counting.seen'].tolist() == [5, 10]
    learn, c = learner(data, cbs=then()), Checkpoints(tmp_path, say=None)
    fit(learn, 2, c.latest(learn), cbs=c)
    assert learn.counting.n == 10 and learn.counting.seen.tolist() == [10, 20]

def test_marks_of_what_json_cannot_hold():
    "Equal while they are the same thing with the same things in it"
    for make, change in ((lambda: [object()], lambda v: v.append(1)), (lambda: {1: 2}, lambda v: v.update({2: 3})),
        (lambda: torch.zeros(2), lambda v: v.add_(1)), (lambda: deque([1]), lambda v: v.append(object())),
        (lambda: {1, 2}, lambda v: v.add(object()))):
        v = make()
        mark = state._Mark(v)
        assert mark == state._Mark(v) and mark != state._Mark(copy.copy(v)) and mark != v
        change(v)
        assert mark != state._Mark(v)
    v = object()
    assert state._Mark(v) == state._Mark(v) and state._Mark(v) != state._Mark(object())

def test_two_callbacks_of_a_name(data):
    learn = learner(data, cbs=[Counts(), Counts()])
    learn.cbs[-1].n = 7
    own, others = state._with_state(learn)
    assert {k: others[k].n for k in ('counts', 'counts-2')} == {'counts': 0, 'counts-2': 7} and 'counts-1' not in others
    assert 'checkpoints' not in state._with_state(learner(data, cbs=Checkpoints('x')))[1]

def test_tensors_of_a_name():
    "Those of another callback, whose name begins alike, are not taken"
    tensors = {'ema.w': 1, 'ema.b.c': 2, 'ema2.w': 3, 'emaw': 4, 'a.ema.w': 5}
    assert state._of('ema', tensors) == {'w': 1, 'b.c': 2}

def test_likeness_of_tensors():
    p = nn.Parameter(torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    t = state._like(torch.arange(96.).view(2, 3, 4, 4).half(), p)
    assert t.is_contiguous(memory_format=torch.channels_last) and t.dtype == torch.half and not t.requires_grad
    assert t.float().sum() == 4560
    with pytest.raises(ValueError, match=r'has shape \(3,\) instead of \(2, 3, 4, 4\)'): state._like(torch.zeros(3), p)

# -- asked to stop

def test_a_request_within_an_epoch(data, tmp_path):
    "Stops after the batch, with a checkpoint; after the last one the epoch ends first"
    for at, says, file in ((3, 'batch 3 of epoch 1', 'epoch_0000_batch_000003'), (5, 'epoch 1', 'epoch_0001'), (7,
        'batch 2 of epoch 2', 'epoch_0001_batch_000002')):
        request = StopRequest(lambda s: None)
        class Asks(Callback):
            order = 1
            def after_batch(self):
                if self.training and self.train_iter == at: request.number = signal.SIGTERM
        with pytest.raises(Stopped, match=f'stopped after {says}, with a checkpoint') as e:
            fit(learner(data), 3, cbs=[Asks(), Checkpoints(tmp_path/str(at), request=request, say=None)])
        assert e.value.exit_code == 128 + signal.SIGTERM and names(tmp_path/str(at))[0] == file

def test_a_request_with_loaders_of_torch(tmp_path):
    "They cannot begin in the middle of an epoch, so it ends first"
    request = StopRequest(lambda s: None)
    items = [(torch.randn(3, 8, 8), torch.tensor(i % 3)) for i in range(12)]
    dls = DataLoaders(*(torch.utils.data.DataLoader(items, 4) for _ in range(2)), device='cpu')
    def made():
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        return cifar_learner(dls, net, precision='fp32', metrics=None, loss_func=nn.CrossEntropyLoss())
    class Asks(Callback):
        def after_batch(self): request.number = signal.SIGINT
    with pytest.raises(Stopped, match='stopped after epoch 1'):
        fit(made(), 3, cbs=[Asks(), Checkpoints(tmp_path, request=request, say=None)])
    assert names(tmp_path) == ['epoch_0001']
    with pytest.raises(FastcifarError, match='cannot start within an epoch'): fit(made(), cbs=Checkpoints(tmp_path, 2))

def test_signals_are_noted_while_a_training_runs():
    said = []
    request = StopRequest(said.append)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with request as r:
        assert r is request and request.number is None
        signal.raise_signal(signal.SIGTERM)
        assert request.number == signal.SIGTERM and len(said) == 1 and 'once more: at once' in said[0]
        assert {n: signal.getsignal(n) for n in before} == before, 'the second one ends the program'
    assert {n: signal.getsignal(n) for n in before} == before
    def elsewhere():
        with StopRequest(said.append): assert {n: signal.getsignal(n) for n in before} == before
    t = threading.Thread(target=elsewhere)
    t.start(), t.join()

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_signals_in_a_worker(number, code, monkeypatch):
    "It goes on at a Ctrl-C, which reaches it too, and ends when it is told to"
    ended, said = [], []
    monkeypatch.setattr(os, '_exit', ended.append)
    request = StopRequest(said.append)
    request._pid += 1 # made in another process, as a worker's is
    request._note(number, None)
    assert ended == ([code] if code else []) and request.number is None and not said

def test_processes_agree_on_a_stop(monkeypatch):
    "At every tenth batch, on what any of them was asked"
    c = Checkpoints('nowhere', request=StopRequest(lambda s: None))
    assert not c._asked_to_stop() and not Checkpoints('nowhere')._asked_to_stop(10)
    told = []
    monkeypatch.setattr(state, 'world_size', lambda: 2)
    monkeypatch.setattr(state, 'all_gather', lambda v: told.append(v) or [v, 15])
    assert c._asked_to_stop(3) is None and not told
    assert c._asked_to_stop(20) == 15 == c.request.number and told == [0]
    monkeypatch.setattr(state, 'all_gather', lambda v: [0, 0])
    assert c._asked_to_stop(0) is None and c.request.number is None

def test_numbers_that_are_none(data, tmp_path):
    "Neither weights nor a validation loss"
    class Spoils(Callback):
        def __init__(self, at): self.at = at
        def before_validate(self):
            if self.at == 'weights': self.model[0].weight.data[0] = math.nan
    class Infinite(Callback):
        order = 60
        def after_loss(self):
            if not self.training: self.learn.loss = self.loss * math.inf
    with pytest.raises(FastcifarError, match='NaN or infinite after epoch 1, at learning rate 0.01: .*is kept'):
        fit(learner(data, cbs=Spoils('weights')), 2, cbs=Checkpoints(tmp_path, say=None))
    with pytest.raises(FastcifarError, match='validation loss is NaN or infinite after epoch 1'):
        fit(learner(data, cbs=Infinite()), 2, cbs=Checkpoints(tmp_path, say=None))
    assert not names(tmp_path)
