"The range test: what it reads off curves, made-up and real, what it says if it cannot, and what measures it."
import importlib.util, json, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fastcifar.basics import rng_state, seed_everything
from fastcifar.data.load import load_data
from fastcifar.runs.recipes import USUAL_RATES, create_recipe, list_models, recipes_of
from fastcifar.runs.fit import fit_recipe, recipe_learner
from fastcifar.runs.config import build_model, configure
from fastcifar.train.optim import OPTIMIZERS
from fastcifar.train.schedule import LRRange, plot_range, read_range

ROOT = Path(__file__).resolve().parents[1]
RATES = np.geomspace(1e-6, 1, 100)
T = np.log10(RATES)

def fall(middle, depth=1.5, start=2.3):
    "Flat, falling about 10**middle, and exploding a decade and a half later"
    return start - depth / (1 + np.exp(-6 * (T - middle))) + np.exp(12 * (T - middle - 1.4))

def noise(seed, size): return np.random.default_rng(seed).normal(0, size, len(RATES))

curves = dict(middle=st.floats(-4, -1.4), depth=st.floats(.8, 2.1), seed=st.integers(0, 2**32 - 1))

@settings(max_examples=60, deadline=None, database=None)
@given(**curves, size=st.floats(0, .2))
def test_noise_hardly_moves_the_rates(middle, depth, seed, size):
    clean = read_range(RATES, fall(middle, depth))
    assert clean.certain and 10**middle < clean.lr_max < RATES[fall(middle, depth).argmin()]
    r = read_range(RATES, fall(middle, depth) + noise(seed, size))
    assert r.certain and 1/3 < r.lr_max / clean.lr_max < 3 and 0 < r.lr_min <= r.lr_max / 2

@settings(max_examples=60, deadline=None, database=None)
@given(**curves, at=st.integers(0, 14), height=st.floats(.3, 1.5))
def test_a_wiggle_at_the_left_end_does_not_win(middle, depth, seed, at, height):
    losses = fall(middle, depth) + noise(seed, .02)
    losses[at:at + 2] += height, -height
    r = read_range(RATES, losses, default=1.)
    assert 10**middle < r.lr_max < 10**(middle + 1.4) if r.certain else r.lr_max == .1 # or it is said to be noise

@settings(max_examples=60, deadline=None, database=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0, 1), start=st.floats(.1, 10), rise=st.floats(0, 5))
def test_what_does_not_fall_is_uncertain(seed, size, start, rise):
    r = read_range(RATES, start * (1 + .2 * noise(seed, size)) + rise * RATES, default=.003)
    assert not r.certain and (r.lr_min, r.lr_max) == (.003 / 50, .003) and len(r.losses) == 100
    assert 'uncertain' in repr(r) and '0.003 is a usual rate' in r.note and '\n' not in r.note
    short = read_range(RATES[:60], np.full(60, start), default=.05)
    assert short.lr_max == pytest.approx(RATES[59] / 10) # higher ones were not tried

def test_every_optimizer_has_a_usual_rate(): assert set(USUAL_RATES) == set(OPTIMIZERS)

def test_an_uncertain_curve_is_drawn_too():
    for r in (read_range(RATES, fall(-2)), read_range(RATES, np.full(100, 2.3), default=.01)):
        fig = plot_range(r)
        shown = [l.get_label() for l in fig.axes[0].lines]
        assert any(f'LRMIN {r.lr_min:.2e}' in s for s in shown) and any(f'LRMAX {r.lr_max:.2e}' in s for s in shown)
        assert ('uncertain' in fig.axes[0].get_title()) == (not r.certain)

def test_files_of_older_versions_are_read():
    old = LRRange(**json.loads('{"lr_min": 1e-5, "lr_max": 1e-3, "rates": [1e-6], "losses": [2.3]}'))
    assert old.certain and old[:2] == (1e-5, 1e-3)

def test_usual_rates_are_those_of_the_recipes():
    peaks = {}
    for m in list_models():
        for recipe in recipes_of(m):
            r = create_recipe(recipe, m)
            if r.lr_max is not None: peaks.setdefault(r.optimizer, []).append(r.lr_max)
    assert set(peaks) == set(USUAL_RATES)
    for k, v in peaks.items(): assert min(v) <= USUAL_RATES[k] <= max(v), k

# --- real curves

def learner(**kwargs):
    data, c = load_data('digits'), configure('one_cycle', data='digits', precision='fp32', **kwargs)
    seed_everything(c.seed)
    dls = data.dataloaders(bs=c.bs, policy=c.policy, seed=c.seed, device='cpu')
    return recipe_learner(dls, build_model(c, 10), c), c

def found(learn, **kwargs):
    with learn.no_bar(), learn.no_logging(): return learn.lr_range(show_plot=False, **kwargs)

@pytest.mark.parametrize('bs', (4, 8))
def test_small_batches_train(bs):
    learn, c = learner(model='normnet31k', bs=bs, epochs=1)
    with warnings.catch_warnings(action='ignore'): r = found(learn)
    assert 1e-3 < r.lr_max < 3e-2
    with learn.no_bar(), learn.no_logging():
        fit_recipe(learn, c, r[:2])
        assert float(learn.validate()[1]) > .8

def test_a_net_that_falls_late_has_a_second_pass():
    learn, _ = learner(model='groupnet', norm='gn', bs=32)
    r = found(learn)
    assert r.certain and 2e-3 < r.lr_max < 5e-2
    assert len(r.rates) > 200, 'the second pass, which has three times the steps'

def test_an_uncertain_test_says_so_and_leaves_no_trace():
    learn, _ = learner(model='normnet31k', bs=8, optimizer='sgd')
    orders = []
    draw = learn.dls.train.get_idxs
    learn.dls.train.get_idxs = lambda: orders.append(draw()) or orders[-1]
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    def state(): return rng_state(), learn.dls.train.epoch
    before = state()
    with pytest.warns(UserWarning, match='uncertain: the loss falls by .* is a usual rate instead'):
        r = found(learn, num_it=20, end_lr=1e-4)
    assert len(r.rates) == 60 and r.lr_max == r.rates[-1] / 10 # of the second pass; nothing higher was tried
    with pytest.warns(UserWarning, match='uncertain'): r = found(learn, num_it=20, end_lr=1e-4, default=3e-6)
    assert r.lr_max == 3e-6
    assert [list(o) for o in orders[:2]] == [list(o) for o in orders[2:]] and list(orders[0]) != list(orders[1])
    assert state() == before and all(v.equal(learn.model.state_dict()[k]) for k, v in weights.items())
    assert learn.lr == USUAL_RATES['sgd']

# --- every image as one class

def test_train_warns_of_one_class(main, tree, tmp_path, monkeypatch):
    from fastcifar.runs import reopen, run
    def stuck(c, n_out):
        net = build_model(c, n_out)
        net.register_forward_hook(lambda net, x, y: y + 100 * torch.nn.functional.one_hot(torch.tensor(1), n_out))
        return net
    for room in (run, reopen): monkeypatch.setattr(room, 'build_model', stuck)
    said = 'all 24 images are predicted as one class, green'
    common = '--data', tree, '--model', 'normnet31k', '--epochs', 1, '--bs', 20, '--out', 'stuck'
    code, out, err = main('train', *common, '--lr-max', '1e-9')
    assert code == 0 and sum(said in l for l in out.splitlines()) == 1, err
    assert said in json.loads((tmp_path/'stuck/metrics.json').read_text())['one_class']
    assert said in (tmp_path/'stuck/report.html').read_text()
    code, out, _ = main('evaluate', 'stuck', '--json')
    assert code == 0 and said in json.loads(out)['one_class']

# --- tools/rates.py

@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('rates_tool', ROOT/'tools/rates.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_measuring_goes_on_where_it_was(tool, tmp_path, capsys):
    def measured(*more):
        common = ('digits', '--out', str(tmp_path), '--models', 'normnet31k', '--norms', 'bn', '--optimizers', 'adam',
                  '--images', '100', '--tests', '60', '--epochs', '1', '--bs', '50', *more)
        tool.measure(tool.parser().parse_args(common))
        return [pd.read_csv(tmp_path/f'digits_{t}.csv') for t in ('found', 'trained')]
    found, trained = measured('--seeds', '1')
    assert len(found) == 1 and trained.number.is_unique
    assert set(tool.number(found.lr_max[0]) + np.array(tool.GRID)) <= set(trained.number)
    assert trained.accuracy.between(0, 100).all()
    half = trained.drop(index=[0, 3])
    half.to_csv(tmp_path/'digits_trained.csv', index=False)
    again = measured('--seeds', '1')
    by_rate = [t.sort_values('number', ignore_index=True) for t in (again[1], trained)]
    assert again[0].equals(found) and by_rate[0].equals(by_rate[1])
    assert set(measured('--seeds', '2')[0].seed) == {0, 1}
    tool.table(tool.parser().parse_args(['digits', '--out', str(tmp_path), '--table']))
    assert 'cells within a point, of 1' in capsys.readouterr().out

def test_shortfalls_of_rules(tool):
    cell = dict(model='m', norm='bn', optimizer='adam')
    rates = dict(lr_max=1e-2, valley=1e-3, slide=np.nan, steep=1e-2, minimum=.1)
    found = pd.DataFrame([cell | rates | dict(seed=s, certain=True) for s in (0, 1)])
    got = {-18: (80, 90), -15: (85, 85), -12: (90, 92), -9: (95, 89), -6: (10, 10)}
    trained = pd.DataFrame([cell | dict(seed=s, number=n, accuracy=a[s]) for n, a in got.items() for s in (0, 1)])
    cells, one = tool.shortfalls(found, trained)
    best = 92 # the mean at 10**(-9/6)
    means = dict(ours=91, valley=85, slide=0, steep=91, minimum=10)
    assert cells.iloc[0].to_dict() == {k: best - v for k, v in means.items()}
    assert one.ours.tolist() == [5, 0] and one.slide.tolist() == [95, 92]

def test_fastai_is_asked_on_its_own_curve(tool):
    from fastai.callback import schedule as rules
    learn, _ = learner(model='normnet31k', bs=32)
    r = found(learn)
    lrs, losses = (torch.tensor(list(v))[10:-5] for v in (learn.recorder.lrs, learn.recorder.losses))
    said = tool.fastai_rates(r.rates, r.losses)
    for k in ('valley', 'steep'): assert said[k] == pytest.approx(getattr(rules, k)(lrs, losses, 100)[0])
