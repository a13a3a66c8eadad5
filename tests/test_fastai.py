"Every fastai method works: continued trainings with bars, nets of all forms, callbacks that stay what they are."
import os, signal, subprocess, sys, time, warnings
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.optimizer import Adam
from torch import nn
from torch.nn import functional as F

from fastcifar.train.tta import TTA
from fastcifar.basics import FastcifarError
from fastcifar.train.loop import LeanLearner
from fastcifar.train.checkpoint import Checkpoints
from fastcifar.device import PRECISIONS
from fastcifar.train.precision import Autocast
from fastcifar.train.learner import UnpicklingWarning, cifar_learner

Pair = namedtuple('Pair', 'a b')
FORMS = {'tensor': lambda t: t, 'tuple': lambda t: (t, t * 2), 'list': lambda t: [t, t * 2],
         'dict': lambda t: dict(a=t, b=t * 2), 'ordered': lambda t: OrderedDict(a=t, b=t * 2),
         'named': lambda t: Pair(t, t * 2), 'nested': lambda t: dict(a=(t, [t * 2]))}

def first(o):
    "The first tensor of any form"
    if isinstance(o, torch.Tensor): return o
    return first(o['a'] if isinstance(o, dict) else o.a if isinstance(o, Pair) else o[0])

def loaders(n=20, bs=8, x=lambda t: t, y=lambda t: t, **kwargs):
    "Loaders of torch; the last batch is a smaller one"
    g = torch.Generator().manual_seed(0)
    items = [(x(torch.randn(3, 8, 8, generator=g)), y(torch.tensor(i % 3))) for i in range(n)]
    return DataLoaders(*(torch.utils.data.DataLoader(items, bs, **kwargs) for _ in range(2)), device='cpu')

class Net(nn.Module):
    "Takes and gives what it is told to"
    def __init__(self, form='tensor', rows=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)
        self.form, self.rows, self.seen = FORMS[form], rows, set()
    def forward(self, x):
        self.form_in = type(x)
        h = self.conv(first(x))
        self.seen.add((h.dtype, first(x).is_contiguous(memory_format=torch.channels_last)))
        return self.form(self.out(h.flatten(1)).repeat_interleave(self.rows, 0))

class Loss:
    "Cross-entropy of the first tensor of each"
    def __init__(self): self.dtypes = set()
    def __call__(self, pred, y):
        self.dtypes.add(first(pred).dtype)
        return F.cross_entropy(first(pred), first(y))

def learner(dls=None, net=None, cls=None, precision='fp32', **kwargs):
    kwargs = dict(dict(loss_func=Loss(), metrics=None), **kwargs)
    if cls: return cls(dls or loaders(), net or Net(), **kwargs)
    return cifar_learner(dls or loaders(), net or Net(), precision=precision, **kwargs)

def fit(learn, n=1, bars=False, **kwargs):
    with learn.no_logging():
        if bars: learn.fit(n, 1e-2, **kwargs)
        else:
            with learn.no_bar(): learn.fit(n, 1e-2, **kwargs)
    return learn

# --- continued with bars

@pytest.mark.parametrize('make', [None, LeanLearner])
@pytest.mark.parametrize('own', [False, True])
@pytest.mark.parametrize('notebook', [False, True])
def test_a_fit_with_bars_starts_at_any_epoch(make, own, notebook, monkeypatch, capsys):
    if notebook:
        from fastprogress.fastprogress import NBMasterBar, NBProgressBar
        monkeypatch.setattr('fastai.callback.progress.master_bar', NBMasterBar)
        monkeypatch.setattr('fastai.callback.progress.progress_bar', NBProgressBar)
        monkeypatch.setattr('IPython.display.display', lambda *args, **kwargs: SimpleNamespace(update=lambda o: None))
    class Bar(ProgressCallback): pass
    learn = learner(cls=make, cbs=[Bar()] if own else [])
    learn.fit(3, 1e-2, start_epoch=2)
    assert len(learn.recorder.values) == 1 and len(learn.recorder.losses) == 3

@pytest.mark.parametrize('bars', [True, False])
def test_continued_from_python(bars, tmp_path):
    whole = fit(learner(), 3, bars, cbs=Checkpoints(tmp_path/'whole'))
    class CtrlC(Callback):
        order = 80
        def after_batch(self):
            if self.training and self.train_iter == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(learner(), 3, bars, cbs=[Checkpoints(tmp_path/'run'), CtrlC()])
    learn, ck = learner(), Checkpoints(tmp_path/'run')
    done = ck.latest(learn)
    assert done == 1
    fit(learn, 3, bars, cbs=ck, start_epoch=done)
    assert all(a.equal(b) for a, b in zip(whole.model.state_dict().values(), learn.model.state_dict().values()))
    assert len(learn.recorder.losses) == 9 and [r['epoch'] for r in ck.history] == [1, 2, 3]

def in_a_terminal(args, cwd, interrupt=None):
    "Exit code and what a terminal shows; Ctrl-C is typed as soon as `interrupt()` is true"
    pty, termios, fcntl = map(pytest.importorskip, ('pty', 'termios', 'fcntl')) # not on Windows
    def own_terminal(): fcntl.ioctl(0, termios.TIOCSCTTY, 0) # or Ctrl-C would reach nobody
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    p = subprocess.Popen(args, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, 'TERM': 'xterm'},
                         start_new_session=True, preexec_fn=own_terminal)
    os.close(theirs)
    os.set_blocking(ours, False)
    shown, end = b'', time.monotonic() + 240
    while time.monotonic() < end:
        try:
            more = os.read(ours, 65536)
            if not more: break
            shown += more
        except BlockingIOError: time.sleep(.01)
        except OSError: break # Linux' way to say that the other end is closed
        if interrupt and interrupt():
            os.write(ours, b'\x03')
            interrupt = None
    os.close(ours)
    return p.wait(60), shown.decode()

def test_ctrl_c_in_a_terminal_and_the_same_command_again(tree, tmp_path):
    args = [sys.executable, '-m', 'fastcifar', 'train', '--data', str(tree), '--model', 'normnet31k', '--epochs', '3',
            '--bs', '2', '--lr-max', '1e-3', '--no-pictures', '--out', 'r']
    code, shown = in_a_terminal(args, tmp_path, lambda: list(tmp_path.glob('r/checkpoints/epoch_0001*')))
    assert code == 128 + signal.SIGINT and 'go on with' in shown and 'Traceback' not in shown, shown[-2000:]
    code, shown = in_a_terminal(args, tmp_path)
    assert code == 0 and 'continuing after' in shown and 'Traceback' not in shown, shown[-2000:]
    assert (tmp_path/'r/metrics.json').exists()

# --- forms

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('form', FORMS)
def test_answers_of_every_form(form, precision, tmp_path):
    learn = fit(learner(net=Net(form), precision=precision), bars=True, cbs=Checkpoints(tmp_path))
    assert learn.loss_func.dtypes == {torch.float32} and {d for d, _ in learn.model.seen} == {PRECISIONS[precision]}
    plain = fit(learner(precision=precision))
    assert learn.recorder.losses[-1].equal(plain.recorder.losses[-1])
    assert learn.recorder.values[-1] == plain.recorder.values[-1]
    if form in ('tensor', 'tuple', 'list', 'named'):
        with learn.no_bar(): assert first(learn.get_preds(dl=learn.dls.valid)[0]).shape == (20, 3)

@pytest.mark.parametrize('form', FORMS)
def test_inputs_and_targets_of_every_form(form):
    plain = fit(learner(precision='bf16', channels_last=True))
    learn = fit(learner(loaders(x=FORMS[form], y=FORMS[form]), precision='bf16', channels_last=True))
    kind = list if form == 'tuple' else type(FORMS[form](torch.zeros(()))) # torch's loaders make lists of tuples
    assert learn.model.form_in is kind and learn.model.seen == {(torch.bfloat16, True)}
    assert learn.recorder.values[-1] == plain.recorder.values[-1] # batches of 8, 8 and 4, weighted as they are

def test_views_of_a_net_with_two_answers_are_refused():
    with pytest.raises(FastcifarError, match='leave out TTA'): fit(learner(net=Net('tuple'), cbs=TTA()))

def test_a_net_with_more_rows_than_labels(capsys):
    class Twice(Loss):
        def __call__(self, pred, y): return F.cross_entropy(pred, y.repeat_interleave(2))
    fit(learner(net=Net(rows=2), loss_func=Twice()), bars=True)

# --- what is recorded

@pytest.mark.parametrize('interrupted', [False, True])
def test_losses_are_tensors(interrupted):
    class Look(Callback):
        order = 60
        def after_batch(self):
            if not self.training: return
            seen.append(self.learn.smooth_loss)
            losses = self.recorder.losses
            assert all(type(v) is torch.Tensor for v in (seen[-1], *losses)) and losses[-1].equal(seen[-1].detach())
            if interrupted and self.train_iter == 5: raise KeyboardInterrupt
    seen, learn = [], learner(cls=LeanLearner, cbs=Look())
    try: fit(learn, 3)
    except KeyboardInterrupt: pass
    assert torch.stack(learn.recorder.losses).equal(torch.stack(seen)) and len(seen) == (5 if interrupted else 9)
    theirs = fit(learner(cls=Learner), 3).recorder.losses
    assert torch.allclose(torch.stack(theirs)[:len(seen)], torch.stack(seen), rtol=1e-5)
    learn.recorder.plot_loss(skip_start=0, with_valid=False)

# --- precision and memory format by fastai's methods

def ran_in(learn):
    learn.model.seen.clear()
    fit(learn)
    assert not torch.is_autocast_enabled('cpu') and not torch.is_autocast_enabled('cuda')
    return learn.model.seen.pop()

def test_fastais_precision_and_memory_format():
    learn = learner(precision='bf16', channels_last=True)
    assert ran_in(learn) == (torch.bfloat16, True)
    assert ran_in(learn.to_fp32()) == (torch.float32, True)
    assert ran_in(learn.to_bf16()) == (torch.bfloat16, True)
    assert ran_in(learn.to_fp16()) == (torch.float16, True) and len(learn._grab_cbs(Autocast)) == 1
    assert ran_in(learn.to_contiguous()) == (torch.float16, False) and learn.model.conv.weight.is_contiguous()
    learn.to_channelslast()
    assert ran_in(learn)[0] == torch.float16
    assert learn.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert ran_in(learn.to_contiguous(to_fp32=True)) == (torch.float32, False)

def test_number_format_steps_aside_for_fastais_callback():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch's: there is no CUDA
        same = dict(opt_func=Adam, wd=.01)
        learn = learner(precision='bf16', channels_last=False, **same)
        theirs = learner(cls=Learner, cbs=MixedPrecision(amp_mode='bf16'), **same)
        cb = MixedPrecision(amp_mode='bf16')
        fit(learn, cbs=cb), fit(theirs)
    assert all(a.equal(b) for a, b in zip(learn.model.state_dict().values(), theirs.model.state_dict().values()))
    assert cb not in learn.cbs and ran_in(learn)[0] == torch.bfloat16

# --- callbacks

@pytest.mark.parametrize('make', [Recorder, ProgressCallback])
def test_a_callback_stays_the_object_it_is(make, capsys):
    learn, cb = learner(), make()
    before = list(learn.cbs)
    learn.add_cb(cb)
    assert learn.cbs[-1] is cb and getattr(learn, cb.name) is cb
    learn.remove_cb(cb)
    with learn.added_cbs(cb): assert cb in learn.cbs
    assert list(learn.cbs) == before
    for _ in range(2): fit(learn, bars=True, cbs=make())
    assert list(learn.cbs) == before
    with learn.no_bar(): assert not learn._grab_cbs(ProgressCallback)
    assert set(learn.cbs) == set(before)

def test_a_recorder_of_ones_own(tmp_path):
    r, learn = Recorder(train_metrics=True), learner()
    fit(learn, 2, cbs=[r, Checkpoints(tmp_path)])
    assert len(r.losses) == 6 and len(r.values) == 2
    learn, r, ck = learner(), Recorder(train_metrics=True), Checkpoints(tmp_path)
    fit(learn, 3, cbs=[r, ck], start_epoch=ck.latest(learn))
    assert len(r.losses) == 9 and len(r.values) == 3 # a checkpoint holds it, too

def test_a_scheduler_keeps_its_class(tmp_path):
    class Watch(ParamScheduler): pass
    for kind in (ParamScheduler, Watch):
        theirs, ours = (kind(dict(lr=SchedCos(1e-2, 1e-4))) for _ in range(2))
        fit(learner(cls=Learner), 2, cbs=theirs)
        fit(learner(), 2, cbs=ours)
        assert type(ours) is kind and ours.hps == theirs.hps and len(ours.hps['lr']) == 6

@pytest.mark.parametrize('order', [-50, 49, 65])
def test_a_fit_that_is_cancelled_before_it_begins(order, tmp_path):
    class Cancel(Callback):
        def before_fit(self): raise CancelFitException
    cancel = Cancel()
    cancel.order = order
    learn = learner()
    fit(learn, cbs=[cancel, Checkpoints(tmp_path)])
    fit(learn)
    fit(learn, cbs=[cancel, Checkpoints(tmp_path)])
    assert not list(tmp_path.iterdir())

def seen_by(cls, make):
    "The events that callbacks note"
    noted = []
    fit(learner(cls=cls, cbs=make(noted)))
    return noted

def test_callbacks_that_override_call():
    def make(noted):
        class All(Callback):
            run_valid = False
            def __call__(self, name): noted.append(name); super().__call__(name)
            def after_step(self): noted.append(('step', self.iter))
        return All()
    assert seen_by(LeanLearner, make) == seen_by(Learner, make) and ('step', 2) in seen_by(LeanLearner, make)
    class Broken(Callback):
        def __call__(self, name):
            if name == 'after_pred': raise ValueError('no')
    with pytest.raises(ValueError, match='^no$'): fit(learner(cbs=Broken()))

def test_callbacks_come_and_go_in_the_middle():
    def make(noted):
        class Late(Callback):
            def before_batch(self): noted.append(('late', self.iter))
            def after_pred(self): noted.append(('late pred', self.iter))
        class Adds(Callback):
            order = -5
            def before_batch(self):
                if self.iter == 1 and self.training:
                    late.learn = self.learn
                    self.learn.cbs.append(late)
            def after_batch(self):
                if self.iter == 2 and self.training: self.learn.cbs.remove(late)
        late = Late()
        return Adds()
    assert seen_by(LeanLearner, make) == seen_by(Learner, make) and ('late pred', 1) in seen_by(LeanLearner, make)

def test_save_model_callback_trusts_its_own_file(tmp_path):
    learn = learner(path=tmp_path)
    with warnings.catch_warnings(action='error', category=UnpicklingWarning): fit(learn, cbs=SaveModelCallback())
    with pytest.warns(UnpicklingWarning): learn.load('model', weights_only=False)

def test_a_foreign_net_with_a_method_of_the_same_name():
    class Foreign(Net):
        prepared = False
        def init_whitening(self, a, b, c): raise RuntimeError('not for us')
    fit(learner(net=Foreign()))

# --- loaders of torch

def test_range_tests_on_loaders_of_torch(tmp_path):
    def weights(look):
        g = torch.Generator().manual_seed(1)
        learn = learner(loaders(40, 4, shuffle=True, generator=g), path=tmp_path)
        torch.manual_seed(2)
        with learn.no_bar(), learn.no_logging():
            if look == 'lr_find': assert learn.lr_find(show_plot=False, num_it=12).valley > 0
            if look == 'lr_range': learn.lr_range(num_it=30, show_plot=False, end_lr=.1)
        fit(learn)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert weights('lr_find').equal(weights(None)) and weights('lr_range').equal(weights(None))

def test_checkpoints_hold_the_order_of_loaders_of_torch(tmp_path):
    def trained(folder, epochs=3, stop=None):
        learn = learner(loaders(40, 4, shuffle=True, generator=torch.Generator().manual_seed(1)))
        ck = Checkpoints(folder)
        done = ck.latest(learn)
        class Stop(Callback):
            def before_epoch(self):
                if self.epoch == stop: raise KeyboardInterrupt
        try: fit(learn, epochs, cbs=[ck, Stop()], start_epoch=done)
        except KeyboardInterrupt: return
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    whole = trained(tmp_path/'whole')
    trained(tmp_path/'run', stop=2)
    assert trained(tmp_path/'run').equal(whole)
