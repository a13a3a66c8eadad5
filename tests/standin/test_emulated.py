"On an emulated GPU: batches, nets, optimizers and runs give what a CPU gives; recorded steps, what single ones give."
import contextlib, os

import numpy as np
import pytest
import torch

if 'STANDIN' not in os.environ:
    pytest.skip('runs on the stand-in for a GPU alone: make test-standin', allow_module_level=True)

from fastcifar.all import (L1, Arrays, Callback, CrossEntropy, ImageData, MixUp, Stopped, configure, create_model,
                           create_recipe, fit_recipe, list_models, recipe_learner, seed_everything, train_run)
from fastcifar.data.policies import POLICIES
from fastcifar.runs.fused import fused_learner

def noise(n=16 * 7 + 5, test=16):
    rng = np.random.default_rng(0)
    def images(n): return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    y = dict(train=np.arange(n) % 10, test=np.arange(test) % 10)
    return ImageData(Arrays(dict(train=images(n), test=images(test)), y, [str(i) for i in range(10)]), 'noise')

def quietly(learn):
    s = contextlib.ExitStack()
    s.enter_context(learn.no_bar())
    s.enter_context(learn.no_logging())
    return s

@pytest.mark.parametrize('policy', list(POLICIES))
def test_batches_are_those_of_the_cpu(policy):
    here, there = ([*noise().dataloaders(bs=32, policy=policy, seed=1, device=d).train] for d in ('cpu', 'cuda'))
    assert len(here) == len(there) == 4
    for (x, y), (u, v) in zip(here, there):
        assert u.is_cuda and torch.equal(y, v.cpu()) and u.stride() == x.stride()
        assert float((x - u.cpu()).abs().max()) < 1e-5

def trained(name, recipe, capture=True, precision='fp32', epochs=2, bs=16, cbs=(), net={}, **kw):
    seed_everything(0)
    r = create_recipe(recipe, name, bs=bs, epochs=epochs, **(dict(lr_max=1e-3) if recipe == 'one_cycle' else {}), **kw)
    dls = noise().dataloaders(bs=bs, policy=r.policy, device='cuda')
    model = create_model(name, **(r.model_args or {}), **net)
    learn = recipe_learner(dls, model, r, precision=precision, capture=capture)
    with quietly(learn): fit_recipe(learn, r, cbs=[*cbs])
    return learn

ADAM = dict(optimizer='adam', lr_max=1e-3)
CASES = [('groupnet', 'fast', ADAM), ('groupnet', 'fast', dict(ADAM, wd=.1, decay='l2', l1=1e-4, ema=.9)),
         ('groupnet', 'fast', dict(optimizer='sgd', wd=.1, lr_max=1e-3)),
         ('groupnet', 'fast', dict(lr_max=1e-4, wd=.1)),
         ('normnet31k', 'one_cycle', dict(net=dict(dropout=0.))),
         ('groupnet', 'fast', dict(ADAM, epochs=3, freeze=(('*bias', 1),))),
         ('groupnet', 'fast', dict(ADAM, sizes=(24, 32)))]

@pytest.mark.parametrize('name, recipe, kw', CASES)
def test_a_recorded_step_is_the_step(name, recipe, kw):
    "To rounding: the same losses and weights, whatever the schedule, decay, frozen parts or a smaller last batch"
    ours, theirs = (trained(name, recipe, capture, **kw) for capture in (True, False))
    assert ours.step_graph.recordings and ours.step_graph.refusal is None and theirs.step_graph is None
    a, b = (torch.stack([l.cpu() for l in learn.recorder.losses]) for learn in (ours, theirs))
    assert len(a) == 8 * kw.get('epochs', 2) and torch.allclose(a, b, atol=3e-4), (a - b).abs().max()
    for (k, v), w in zip(ours.model.state_dict().items(), theirs.model.state_dict().values()):
        v, w = v.cpu().float(), w.cpu().float()
        assert (v - w).abs().max() <= .03 * w.abs().max() + 1e-5, k
    assert [s['step'] for s in ours.opt.state.values()] == [s['step'] for s in theirs.opt.state.values()]

def test_frozen_and_trained_again():
    learn = trained('groupnet', 'fast', epochs=3, freeze=(('*bias', 1),), **ADAM)
    frozen = {id(p) for n, p in learn.model.named_parameters() if n.endswith('bias')}
    biases = [s['step'] for p, s in learn.opt.state.items() if id(p) in frozen]
    weights = [s['step'] for p, s in learn.opt.state.items() if p.ndim == 4]
    assert {*biases} == {8} and {*weights} == {24}

@pytest.mark.parametrize('what', ['callback', 'hook', 'layer', 'deterministic', 'fp16'])
def test_what_cannot_be_recorded_is_left_to_fastai(what):
    seed_everything(0)
    r = create_recipe('fast', 'groupnet', bs=16, epochs=1, **ADAM)
    net = create_model('groupnet')
    seen = []
    if what == 'hook': next(net.modules()).register_forward_hook(lambda *a: seen.append(1))
    if what == 'layer':
        class Mine(torch.nn.Module):
            def forward(self, x): seen.append(1); return x
        net = torch.nn.Sequential(net, Mine())
    dls = noise().dataloaders(bs=16, policy=r.policy, device='cuda')
    learn = recipe_learner(dls, net, r, precision='fp16' if what == 'fp16' else 'fp32')
    from fastcifar.device import deterministic_only
    with quietly(learn), deterministic_only('cuda') if what == 'deterministic' else contextlib.nullcontext():
        fit_recipe(learn, r, cbs=[MixUp()] if what == 'callback' else [])
    assert learn.step_graph.refusal and not learn.step_graph.recordings
    if what in ('hook', 'layer'): assert len(seen) == 8 + 1 # steps and one batch of the test split

def pair(change, epochs=1, images=128, **kw):
    "Two learners, with recorded steps and without, after one fit, `change` and another; all batches are full"
    res = []
    for capture in (True, False):
        seed_everything(0)
        r = create_recipe('fast', 'groupnet', bs=16, epochs=1, **{**ADAM, **kw})
        dls = noise(images).dataloaders(bs=16, policy=r.policy, device='cuda')
        learn = recipe_learner(dls, create_model('groupnet'), r, precision='fp32', capture=capture)
        with quietly(learn):
            fit_recipe(learn, r)
            cbs = change(learn) or []
            learn.fit(epochs, 1e-3, cbs=cbs)
        res.append(learn)
    return res

def same(ours, theirs):
    "Weights and the optimizer's running means are the same to rounding: a sign that flips near 0 moves a bias or two"
    def mean(t): return float(t.cpu().float().abs().mean())
    def apart(vs, ws): return [(mean(v - w), mean(w)) for v, w in zip(vs, ws)]
    def states(l): return [v for s in l.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    weights = apart(ours.model.state_dict().values(), theirs.model.state_dict().values())
    means = apart(states(ours), states(theirs))
    return all(d <= 2e-4 + .002 * w for d, w in weights) and sum(d for d, _ in means) <= .05 * sum(w for _, w in means)

def batchnorms(learn): return [m for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]

class InBetween(Callback):
    "Something that a user changes in the middle of an epoch"
    def __init__(self, f): self.f = f
    def before_batch(self):
        if self.training and self.iter == 5: self.f(self.learn)

def smoothed(learn): learn.loss_func = CrossEntropy(label_smoothing=.9)
def other_momentum(learn):
    for m in batchnorms(learn): m.momentum = .9
def still(learn):
    for m in batchnorms(learn): m.eval()
def more_gradient(learn):
    for p in learn.model.parameters():
        if p.requires_grad: p.grad = torch.ones_like(p)
CHANGES = dict(clear=lambda learn: learn.opt.clear_state(), new=lambda learn: setattr(learn, 'opt', None),
               smoothed=smoothed,
               momentum=other_momentum, l1=lambda learn: [L1(1e-2)], unchanged=lambda learn: None,
               still=lambda learn: [InBetween(still)], cleared=lambda learn: [InBetween(lambda l: l.opt.clear_state())],
               gradient=lambda learn: [InBetween(more_gradient)])

@pytest.mark.parametrize('change', list(CHANGES))
def test_what_changes_is_recorded_anew(change):
    "Between fits, and by a callback within an epoch: settings, optimizer, gradients that are there already"
    ours, theirs = pair(CHANGES[change])
    assert ours.step_graph.recordings >= 2 and same(ours, theirs)

def test_parts_that_were_frozen_train_again():
    ours, theirs = pair(lambda learn: None, freeze=(('*bias', 0),))
    assert same(ours, theirs)

def test_a_range_test_leaves_no_recording():
    ours, theirs = pair(lambda learn: learn.lr_find(show_plot=False, num_it=12) and None)
    assert same(ours, theirs)

def test_predictions_that_are_kept_stay():
    class Keep(Callback):
        capturable, kept = True, ()
        def after_batch(self):
            if self.training: self.kept = [*self.kept, self.pred.detach()]
    keep = Keep()
    pair(lambda learn: [keep] if learn.step_graph else [])
    assert len(keep.kept) == 8 and not torch.equal(keep.kept[-1].cpu(), keep.kept[-2].cpu())

@pytest.mark.parametrize('name', list_models())
def test_every_net_is_trained_and_recorded(name):
    learn = trained(name, 'speedrun' if name == 'speednet' else 'fast', precision='bf16', epochs=1, bs=24)
    assert learn.step_graph.recordings
    assert all(torch.isfinite(p.cpu()).all() for p in learn.model.parameters())

def test_nets_in_one_pass_are_recorded_where_they_have_no_dropout():
    for dropout, recorded in ((0., True), (.1, False)):
        configs = [configure('fast', 'normnet31k', seed=s, bs=16, epochs=1, dropout=dropout) for s in range(3)]
        learn = fused_learner(noise(), configs, torch.device('cuda'))
        with quietly(learn): fit_recipe(learn, configs[0])
        assert bool(learn.step_graph.recordings) == recorded and torch.isfinite(learn.each_net.history).all()

def stop_after(n):
    from fastai.callback.core import Callback
    class Stop(Callback):
        order, stateless = 90, True
        def after_batch(self):
            if self.training and self.learn.train_iter == n: raise Stopped('enough', 2)
    return Stop()

@pytest.mark.parametrize('precision, deterministic', [('fp32', True), ('bf16', True), ('fp16', True), ('fp32', False)])
def test_continues(precision, deterministic, tree, tmp_path, monkeypatch):
    "Bit-equal where it is deterministic; where steps are recorded, to rounding: a continued one begins with others"
    import fastcifar.runs.run as runs
    from safetensors.numpy import load_file
    c = configure('fast', 'groupnet', data=str(tree), epochs=2, bs=10, precision=precision, ema=.9, lr_max=1e-4,
                  optimizer='adam')
    a = dict(device='cuda', deterministic=deterministic, pictures=False, say=lambda s: None)
    train_run(c, tmp_path/'whole', **a)
    with monkeypatch.context() as m:
        m.setattr(runs, '_loggers', lambda *a: contextlib.nullcontext([stop_after(9)]))
        with pytest.raises(Stopped): train_run(c, tmp_path/'parts', checkpoint_every=2, **a)
    train_run(c, tmp_path/'parts', **a)
    u, v = (load_file(tmp_path/f'{name}/model.safetensors') for name in ('whole', 'parts'))
    same = np.array_equal if deterministic else lambda x, y: np.allclose(x, y, rtol=.02, atol=1e-4)
    assert u.keys() == v.keys() and all(same(u[k], v[k]) for k in u)
