"Every setting of every recipe, what is refused, and what a setting does to a training."
import dataclasses, json, math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from fastcifar.basics import FastcifarError
from fastcifar.models.zoo import list_models
from fastcifar.train.callbacks import L1
from fastcifar.runs.settings import RECIPES, Recipe, list_recipes
from fastcifar.runs.fit import fit_recipe, recipe_learner, recipe_rates
from fastcifar.runs.recipes import (USUAL_RATES, create_recipe, override_recipe, read_recipe, recipe_table, recipes_of,
    write_recipe)

PLAIN = dict(epochs=24, bs=512, policy=None, sizes=(), optimizer='adam', schedule='one_cycle', lr_max=None, lr_min=None,
    lr_end=None, peak=5 / 24, anneal='cos', step_epochs=1, gamma=.1, mom=.9, mom_cycle=(.95, .85, .95), sqr_mom=.99,
    eps=1e-5, update_norm=0, bias_lr_mult=1, ns_steps=5, unit_filters=False, wd=None, decay='decoupled', decay_all=False,
        l1=0, label_smoothing=0,
    dropout=None, freeze=(), ema=0, tta='none', stats=None, model_args=None)
IMAGES, PIXELS = ((.4914, .4822, .4465), (.2023, .1994, .2010)), ((.4914, .4822, .4465), (.2471, .2435, .2616))
TORCH = dict(decay='l2', decay_all=True)
SGD, ADAM = dict(TORCH, optimizer='sgd', wd=0), dict(TORCH, sqr_mom=.999, eps=1e-8)
CONSTANT = dict(SGD, epochs=20, bs=128, policy='crop_reflect_flip', schedule='constant', lr_max=.01, stats=IMAGES)
SEPNET = dict(SGD, epochs=25, bs=128, policy='shift_scale_rotate_black', schedule='constant', lr_max=.1,
    stats=((.4914, .4822, .4471), (.2469, .2433, .2615)))
SPEED = dict(epochs=8, bs=1000, policy='small_crop_altflip', optimizer='muon', lr_max=.02, lr_min=.02, lr_end=2e-5,
    peak=.01, anneal='linear', mom=.6, mom_cycle=None, update_norm=12, unit_filters=True, wd=0, label_smoothing=.2,
    freeze=(('whiten.bias', 3),), tta='crops')
FAST = dict(bs=128, policy='small_crop_flip', optimizer='muon', lr_max=.02, lr_min=8e-4, lr_end=2e-5, peak=.2,
    mom_cycle=None, wd=0, dropout=0)
SETTINGS = { # as their authors trained them, and as we do: what differs from the defaults
    'reference': dict(groupnet=CONSTANT, normnet41k=CONSTANT, sepnet178k=SEPNET, fastnet200k=SEPNET, speednet=SPEED,
        normnet31k=dict(SGD, epochs=15, policy='none', lr_max=.02, lr_min=8e-4, lr_end=8e-8, peak=.3, stats=IMAGES),
        normnet48k=dict(SGD, epochs=20, bs=128, policy='rare_flip', schedule='steps', lr_max=.04, step_epochs=6,
            stats=PIXELS),
        sepnet195k=dict(ADAM, epochs=50, policy='wide_shift_bright_hole', schedule='steps', lr_max=.01, step_epochs=15,
            wd=1e-4, stats=PIXELS),
        sepnet200k=dict(SGD, epochs=80, bs=256, policy='rare_shift_dropout', schedule='steps', lr_max=.2, step_epochs=5,
            gamma=.75, stats=PIXELS),
        custom_resnet=dict(ADAM, policy='small_crop_flip_cutout', lr_max=5.214e-4, lr_min=5.214e-6, lr_end=5.214e-8,
            anneal='linear', wd=.01, stats=((.4914, .4822, .4465), (.247, .243, .261)),
            model_args=dict(head_scale=1.))),
    'fast': {m: dict(FAST, epochs=e) for m, e in dict(normnet31k=15, normnet41k=20, normnet48k=20, groupnet=20,
        sepnet178k=25, sepnet195k=25, sepnet200k=25, fastnet200k=25).items()} | dict(speednet=SPEED,
        custom_resnet=dict(FAST, bs=512, policy='small_crop_flip_cutout', lr_max=4e-3, lr_min=1.6e-4, lr_end=4e-6,
            label_smoothing=.2, tta='crops')),
    'speedrun': dict(speednet=SPEED), 'one_cycle': {m: {} for m in list_models()}}

def same(a, b):
    "Floats that were computed may differ in their last digit"
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)): return math.isclose(a, b, rel_tol=1e-12)
    return a == b

def test_every_setting_of_every_recipe():
    assert list_recipes() == list(RECIPES) == ['one_cycle', 'reference', 'fast', 'speedrun']
    for name, nets in SETTINGS.items():
        for net, settings in nets.items():
            got = dataclasses.asdict(create_recipe(name, net))
            wrong = {k: (got[k], v) for k, v in (PLAIN | settings).items() if not same(got[k], v)}
            assert got.keys() == PLAIN.keys() and not wrong, (name, net, wrong)
    assert same(dataclasses.asdict(create_recipe()), PLAIN)

@pytest.mark.parametrize('net', list_models())
def test_every_recipe_of_every_net(net):
    "Whatever a net was registered with makes a recipe, and it has no other"
    own = recipes_of(net)
    assert own[0] == 'one_cycle' and set(own) <= set(RECIPES)
    for name in own: assert create_recipe(name, net).checked() == create_recipe(name, net)
    for name in set(RECIPES) - set(own):
        with pytest.raises(FastcifarError, match=f'recipe {name}.*: choose '): create_recipe(name, net)

def test_table_of_a_recipe():
    "What differs from the defaults for some net, for every net that has it"
    for name, known in SETTINGS.items():
        t = recipe_table(name)
        assert set(t.columns) == {m for m in list_models() if name in recipes_of(m)} >= set(known)
        nets = {m: dataclasses.asdict(create_recipe(name, m)) for m in t.columns}
        assert set(t.index) == {k for s in nets.values() for k, v in s.items() if not same(v, PLAIN[k])}
        for net, settings in nets.items(): assert all(same(t[net][k], settings[k]) for k in t.index)

def test_speedrun_is_for_one_net():
    assert [m for m in SETTINGS['one_cycle'] if 'speedrun' in recipes_of(m)] == ['speednet']

def test_text_of_a_recipe():
    assert repr(Recipe()) == 'Recipe()'
    assert repr(Recipe(bs=8, wd=.1, tta='flip')) == "Recipe(bs=8, wd=0.1, tta='flip')"

EDGES = { # setting -> values that are just allowed, and just not
    'epochs': ([1, 10**9 - 1], [0, -1, 10**9]), 'bs': ([1], [0]), 'step_epochs': ([1], [0]), 'ns_steps': ([1], [0]),
    'lr_max': ([1e-9, 999.], [0, -1., 1e3]), 'wd': ([0, 999.], [-1e-9, 1e3]), 'peak': ([0, .999], [-.1, 1]),
    'gamma': ([0, 999], [-1, 1e3]), 'mom': ([0, .99], [1, -.1]), 'sqr_mom': ([0, .99], [1, -.1]),
    'eps': ([0, .9], [1, -.1]), 'update_norm': ([0, 999], [1e3, -1]), 'bias_lr_mult': ([0, 999], [1e3, -1]),
    'l1': ([0, 999], [1e3, -1]),
    'label_smoothing': ([0, .9], [1, -.1]), 'dropout': ([0, .9], [1, -.1]), 'ema': ([0, .9], [1, -.1]),
    'mom_cycle': ([(0, 0, .99), [.1, .2, .3]], [(0, 0, 1), (0, 0), (0, 0, 0, 0), (0, 0, -.1), (0, 0, 'a')]),
    'stats': ([((-10, 0, 9.9), (1e-6, 1, 9.9))], [((0, 0, 0),), ((0, 0, 10), (1, 1, 1)), ((0, 0, -10.1), (1, 1, 1)),
        ((0, 0, 0), (1, 1, 0)), ((0, 0, 0), (1, 1, 10)), ((0, 0), (1, 1, 1)), ((0, 0, 0), (1, 1)), ((0, 0, 0), 1),
        ((0, 0, 0), (1, 1, 1), (1, 1, 1)), (1, (1, 1, 1))]),
    'freeze': ([(), [('a', 1)], (['a', 0], ('b', 2))], [('a', 1), [('a',)], [('a', 1, 2)], [(1, 1)], [('a', 'b')],
        ['ab']]), 'decay_all': ([True, False], [1, None]), 'unit_filters': ([True], [0]),
    'model_args': ([{}, None, dict(a=1)], [[], 'a']),
    'sizes': ([(), (16, 32), [24, 28, 32], (32,) * 24], [(15,), (33,), (24.,), ('24',), (True,), 24, None, (32,) * 25]),
    'policy': ([None, 'none', 'flip'], ['flop', 1]), 'optimizer': (['sgd', 'adam', 'muon'], ['sgdd', None]),
    'schedule': (['steps'], ['step', None]), 'anneal': (['cos', 'linear'], ['cosine']), 'decay': (['l2'], ['l1']),
    'tta': (['none', 'flip', 'crops'], ['crop', None])}

@pytest.mark.parametrize('name', EDGES)
def test_edges_of_settings(name):
    good, bad = EDGES[name]
    for v in good: assert getattr(Recipe(**{'lr_max': .1, name: v}).checked(), name) == v
    for v in bad + ([True, '1'] if isinstance(PLAIN[name], (int, float)) and PLAIN[name] is not False else []):
        with pytest.raises(FastcifarError, match=name): Recipe(**{name: v}).checked()
    for v in (None,) if isinstance(PLAIN[name], (int, float)) else ():
        with pytest.raises(FastcifarError, match=name): Recipe(**{name: v}).checked()

def test_rates_that_do_not_fit():
    for k in ('lr_min', 'lr_end'):
        for v in (0, -1, 1e3, True, 'a'):
            with pytest.raises(FastcifarError, match=k): create_recipe(lr_max=.1, **{k: v})
    with pytest.raises(FastcifarError, match='lr_min 0.2 is above lr_max 0.1'): create_recipe(lr_max=.1, lr_min=.2)
    with pytest.raises(FastcifarError, match='lr_min is given without lr_max'): create_recipe(lr_min=.2)
    assert create_recipe(lr_max=.1, lr_min=.1).lr_min == .1 and create_recipe(lr_max=.1, lr_end=.5).lr_end == .5

def test_what_goes_along():
    "The parts of a cycle with its peak, those that there are; the steps with the epochs"
    r = override_recipe(create_recipe('reference', 'sepnet178k'), lr_max=.2)
    assert (r.lr_max, r.lr_min, r.lr_end) == (.2, None, None)
    r = override_recipe(create_recipe('fast', 'normnet48k'), lr_max=.04, lr_end=1e-6)
    assert (r.lr_min, r.lr_end) == (pytest.approx(1.6e-3), 1e-6)
    r = override_recipe(create_recipe('fast', 'normnet48k', bs=64), epochs=7)
    assert (r.bs, r.epochs, r.step_epochs, r.lr_min) == (64, 7, 1, 8e-4), 'nothing has changed in the rates'
    assert override_recipe(create_recipe(), schedule='steps', epochs=7).step_epochs == 2
    assert create_recipe(lr_max=.1).lr_min is None and create_recipe(model_args=dict(a=1)).model_args == dict(a=1)
    theirs = create_recipe('reference', 'custom_resnet')
    assert override_recipe(theirs, model_args=dict(a=2, head_scale=3.)).model_args == dict(a=2, head_scale=3.)
    assert override_recipe(theirs, model_args=None).model_args is None
    with pytest.raises(FastcifarError, match='mom_cycle'): create_recipe(mom_cycl=None)
    with pytest.raises(FastcifarError, match='made for speednet, not'): create_recipe('speedrun', 'normnet48k')
    with pytest.raises(FastcifarError, match='normnet48k'): create_recipe('fast', 'normnet48')

def test_a_recipe_in_a_file(tmp_path):
    r, f = create_recipe('reference', 'custom_resnet', epochs=2), tmp_path/'mine.json'
    said = write_recipe(f, r, 'reference', 'custom_resnet', norm='gn', groups=None, found=dict(trials=3))
    saved = json.loads(f.read_text())
    assert saved == said and saved['found'] == dict(trials=3) and saved['settings']['epochs'] == 2
    assert saved['settings'].keys() == PLAIN.keys()
    read = read_recipe(f)
    assert read.pop('recipe') == 'reference' and read.pop('model') == 'custom_resnet' and read.pop('norm') == 'gn'
    assert 'groups' not in read and 'found' not in read
    assert same(dataclasses.asdict(create_recipe('reference', 'custom_resnet', **read)), dataclasses.asdict(r))
    old = dict(saved, groups=4, model_args=dict(a=1), settings=dict(bs=8)) # as older sweeps wrote them
    f.write_text(json.dumps(old))
    assert read_recipe(f) == {k: old[k] for k in ('recipe', 'model', 'norm', 'groups', 'model_args')} | dict(bs=8)
    for bad, said in (([], 'holds no recipe'), (dict(saved, settings=None), 'holds no recipe'), ({}, 'holds no recipe'),
        (dict(saved, settings=dict(bs=0)), f'{f}: bs is 0'), (dict(saved, settings=dict(b=8)), f"{f}: .*'b'"),
        (dict(saved, recipe='fst'), f'{f}: .*fst')):
        f.write_text(json.dumps(bad))
        with pytest.raises(FastcifarError, match=said): read_recipe(f)

def test_idle_settings_of_a_file(tmp_path):
    "A file holds all settings; one that lies idle and was changed is refused"
    f = tmp_path/'mine.json'
    write_recipe(f, create_recipe('reference', 'sepnet178k'), 'reference', 'sepnet178k')
    saved = json.loads(f.read_text())
    read = read_recipe(f)
    assert not {'gamma', 'lr_end', 'peak', 'update_norm', 'sqr_mom'} & set(read) and read['lr_max'] == .1
    for k, v in dict(gamma=.2, peak=.5, lr_end=1e-3, anneal='linear', update_norm=2., step_epochs=3).items():
        f.write_text(json.dumps(dict(saved, settings={**saved['settings'], k: v})))
        with pytest.raises(FastcifarError, match=f'{k} is '): read_recipe(f)
    f.write_text(json.dumps(dict(saved, settings={**saved['settings'], 'peak': 5 / 24 + 1e-12}))) # written by hand
    assert 'peak' not in read_recipe(f)

def at(f, *shares): return [f(s) for s in shares]

def test_rates_of_schedules():
    "Given rates come before those of the recipe"
    r = Recipe(10, lr_max=.5, lr_min=.1, peak=.2)
    cycle = recipe_rates(r)
    assert cycle.keys() == {'lr', 'mom'} and at(cycle['lr'], 0, .1, .2, .6, 1) == pytest.approx([.1, .3, .5, .3, .1])
    assert at(cycle['mom'], 0, .1, .2, .6, 1) == pytest.approx([.95, .9, .85, .9, .95])
    assert at(recipe_rates(Recipe(lr_max=.5))['lr'], 0, 5 / 24, 1) == pytest.approx([.01, .5, .01])
    assert at(recipe_rates(dataclasses.replace(r, lr_end=.01))['lr'], 0, .2, 1) == pytest.approx([.1, .5, .01])
    assert at(recipe_rates(r, (.2, .8))['lr'], 0, .2, 1) == pytest.approx([.2, .8, .2])
    flat = recipe_rates(dataclasses.replace(r, anneal='linear', mom_cycle=None))
    assert flat.keys() == {'lr'} and at(flat['lr'], .05, .4) == pytest.approx([.2, .4])
    constant = recipe_rates(dataclasses.replace(r, schedule='constant'))
    assert constant.keys() == {'lr'} and at(constant['lr'], 0, .3, 1) == [.5] * 3
    steps = recipe_rates(dataclasses.replace(r, schedule='steps', step_epochs=4, gamma=.5), (.1, .8))
    assert steps.keys() == {'lr'}
    assert at(steps['lr'], 0, .399, .4, .79, .8, 1) == pytest.approx([.8, .8, .4, .4, .2, .2])

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 4, bias=False)
    def forward(self, x): return self.last(self.norm(self.conv(x)).mean((2, 3)))

@pytest.fixture(scope='module')
def dls():
    from fastcifar.data.load import Arrays
    from fastcifar.data.images import ImageData
    x = {s: np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8) for s in ('train', 'test')}
    y = {s: np.arange(16) % 4 for s in x}
    return ImageData(Arrays(x, y, list('abcd')), 'noise').dataloaders(bs=8, device='cpu', policy='none')

def test_penalty_is_the_sum_of_all_parameters():
    "While it is trained, and beside the loss that is said"
    net, cb = Two(), L1(.25)
    for training in (True, False):
        cb.learn = SimpleNamespace(training=training, model=net, loss=torch.tensor(2.), loss_grad=torch.tensor(2.))
        cb.after_loss()
        more = .25 * sum(p.abs().sum().item() for p in net.parameters()) if training else 0
        assert cb.learn.loss_grad.item() == pytest.approx(2 + more) and cb.learn.loss == 2

def test_what_a_learner_has_of_a_recipe(dls):
    r = Recipe(lr_max=.3, wd=.02, mom=.8, sqr_mom=.7, eps=1e-3, decay_all=True, label_smoothing=.1, l1=.5, ema=.9,
        freeze=(('conv.*', 1),))
    learn = recipe_learner(dls, Two(), r, precision='fp32')
    learn.create_opt()
    h = learn.opt.hypers[-1]
    assert {k: h[k] for k in ('mom', 'sqr_mom', 'eps')} == dict(mom=.8, sqr_mom=.7, eps=1e-3)
    assert (learn.lr, learn.wd, learn.wd_bn_bias, learn.loss_func.label_smoothing) == (.3, .02, True, .1)
    assert learn.l1.weight == .5 and learn.ema.decay == .9 and learn.freeze_parts.parts == (('conv.*', 1),)
    plain = recipe_learner(dls, Two(), Recipe(), precision='fp32')
    assert (plain.lr, plain.wd, plain.wd_bn_bias, plain.loss_func.label_smoothing) == (USUAL_RATES['adam'], 0, False, 0)
    assert not {'l1', 'ema', 'freeze_parts'} & {cb.name for cb in plain.cbs}

class Rates(Callback):
    "The hyper-parameters of every step"
    order = 61 # after the scheduler
    def before_fit(self): self.seen, self.epochs = [], []
    def before_batch(self):
        if self.training: self.seen.append({k: self.opt.hypers[-1][k] for k in ('lr', 'mom', 'wd')})
    def before_epoch(self): self.epochs.append(self.epoch)

@pytest.mark.parametrize('wd, lrs, decay', [(None, None, 1e-3 / .2), (.3, None, .3), (0., None, 0),
    (None, (.1, .4), 1e-3 / .4)])
def test_training_by_a_recipe(dls, wd, lrs, decay):
    "Four batches in two epochs; a decay that is not given goes by the peak"
    r = Recipe(2, lr_max=.2, lr_min=.1, wd=wd, peak=.5)
    learn, seen = recipe_learner(dls, Two(), r, precision='fp32'), Rates()
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, lrs, cbs=[seen])
    rates = recipe_rates(r, lrs)
    assert [h['lr'] for h in seen.seen] == pytest.approx(at(rates['lr'], 0, .25, .5, .75))
    assert [h['mom'] for h in seen.seen] == pytest.approx(at(rates['mom'], 0, .25, .5, .75))
    assert [h['wd'] for h in seen.seen] == pytest.approx([decay] * 4) and seen.epochs == [0, 1]
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, lrs, 1, [seen])
    assert [h['lr'] for h in seen.seen] == pytest.approx(at(rates['lr'], .5, .75)) and seen.epochs[-1] == 1
