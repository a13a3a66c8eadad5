"What the smaller parts give, value by value, where the whole would hide a mistake in one of them."
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fastcifar.averages import EMA, Views, average_views
from fastcifar.basics import FastcifarError
from fastcifar.robust import plot_corruptions, plot_robustness
from fastcifar.schedule import lr_range, one_cycle, plot_range, read_range
from fastcifar.statistics import plot_study_curves, study_answer

@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')

# -- the range test

def read_by_hand(rates, losses):
    "LRMIN and LRMAX as the notebook describes them, with loops"
    n = len(losses)
    bell = [[math.exp(-((i - j) / 2.5)**2 / 2) for j in range(n)] for i in range(n)]
    s = [sum(w * l for w, l in zip(row, losses)) / sum(row) for row in bell]
    first = max(n // 10, 3)
    start, end = sum(s[:first]) / first, n
    for i in range(n):
        gained = start - min(s[:i + 1])
        if gained > .1 * (start - min(s)) and s[i] - min(s[:i + 1]) > gained / 2:
            end = i
            break
    low = max(min(range(end), key=lambda i: s[i]), 1)
    steep = max(range(low), key=lambda i: s[i] - s[i + 1])
    high = [i for i in range(steep + 1) if s[i] >= start - .02 * (start - s[low])]
    lr_min = rates[high[-1]] if high else rates[0]
    return min(max(lr_min, rates[steep] / 1000), rates[steep] / 2), rates[steep]

@pytest.mark.parametrize('n', [12, 35, 60, 100, 200])
def test_range_by_hand(n):
    "Noisy curves that fall, rise again, and fall once more"
    rng = np.random.default_rng(n)
    rates = np.geomspace(1e-6, 1, n)
    for _ in range(12):
        at, height = np.sort(rng.integers(0, n, 5)), [2.3, 2.3 - rng.uniform(0, .2), rng.uniform(.8, 1.8),
            rng.uniform(1, 2.6), rng.uniform(.5, 3)]
        losses = np.interp(np.arange(n), at, height) + rng.normal(0, .03, n)
        r = read_range(rates, losses)
        assert (r.lr_min, r.lr_max) == pytest.approx(read_by_hand(rates, losses))
        assert r.rates == pytest.approx(rates) and r.losses == pytest.approx(losses)

def test_range_stays_within_three_decades():
    rates = np.geomspace(1e-8, 1, 160)
    slow = read_range(rates, np.interp(np.arange(160), [0, 30, 120, 130, 159], [2.3, 2.2, 2.0, 1., 1.1]))
    assert slow.lr_min == pytest.approx(slow.lr_max / 1000)
    sudden = read_range(np.linspace(.5, .6, 60), np.repeat([2.3, 1.], 30))
    assert sudden.lr_min == pytest.approx(sudden.lr_max / 2)

def test_losses_below_zero_that_do_not_fall():
    with pytest.raises(FastcifarError, match='does not fall'): read_range(np.geomspace(1e-6, 1, 50), np.full(50, -1.))
    assert read_range(np.geomspace(1e-6, 1, 50), -np.arange(50.)).lr_max > 1e-6
    rates = np.geomspace(1e-6, 1, 10)
    assert len(read_range(rates, np.linspace(2, 1, 10)).losses) == 10, 'ten are enough'

def test_picture_of_a_range():
    rates = np.geomspace(1e-6, 1, 100)
    r = read_range(rates, np.interp(np.arange(100), [0, 40, 60, 99], [2.3, 2.2, 1.2, 3.]))
    raw, smoothed, lo, hi = plot_range(r).axes[0].get_lines()
    assert raw.get_xdata() == pytest.approx(rates) and raw.get_ydata() == pytest.approx(r.losses)
    assert smoothed.get_xdata() == pytest.approx(rates) and np.ptp(smoothed.get_ydata()) < np.ptp(r.losses)
    for mark, rate, name in ((lo, r.lr_min, 'LRMIN'), (hi, r.lr_max, 'LRMAX')):
        i = np.abs(rates - rate).argmin()
        assert mark.get_xdata() == pytest.approx([rate]) and mark.get_label() == f'{name} {rate:.2e}'
        assert mark.get_ydata() == pytest.approx([smoothed.get_ydata()[i]], abs=.05)

def test_one_cycle():
    "Starts and ends at LRMIN, and decays a thousandth at the peak"
    assert one_cycle((1e-4, 1e-2)) == pytest.approx(dict(lr_max=.01, div=100, div_final=100, pct_start=5 / 24, wd=.1))
    assert one_cycle((2e-3, 2e-3), 8, 2, wd=0.) == dict(lr_max=2e-3, div=1, div_final=1, pct_start=.25, wd=0)
    for lrs, more in (((0, 1), {}), ((-1, 1), {}), ((.1, .2), dict(peak_epoch=0)), ((.1, .2), dict(peak_epoch=24))):
        with pytest.raises(FastcifarError): one_cycle(lrs, **more)

def test_range_test_leaves_a_learner_alone():
    from fastcifar.data import load_data
    from fastcifar.loaders import CifarDataLoaders # with this import an ImageData has its dataloaders
    from fastcifar.train import cifar_learner
    dls = load_data('digits').dataloaders(bs=64, device='cpu')
    learn = cifar_learner(dls, nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3072, 10)), precision='fp32')
    for training in (False, True):
        learn.model.train(training)
        with learn.no_bar(): r = learn.lr_range(end_lr=.1, num_it=50, show_plot=False)
        assert r.rates[0] == pytest.approx(1e-6) and len(r.rates) == len(r.losses) <= 50 and max(r.rates) <= .1
        assert all(m.training == training for m in learn.model.modules()) and not plt.get_fignums()
    with learn.no_bar(): learn.lr_range(num_it=30)
    assert len(plt.get_fignums()) == 1

# -- averages of weights and of answers

class Holds(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.norm.weight.data[:] = v

def averaged(values, ema=None, decay=.9):
    "An average that has seen these weights"
    ema = ema or EMA(decay)
    net = Holds(values[0])
    ema.learn = SimpleNamespace(model=net, training=True)
    ema.before_train()
    for v in values[1:]:
        net.norm.weight.data[:] = v
        ema.after_batch()
    return ema

def test_an_average_goes_on_from_a_checkpoint():
    "With as many steps behind it as it had: the first ones count more"
    whole, half = averaged([1., 2., 3., 4., 5.]), averaged([1., 2., 3.])
    tensors, note = half.checkpoint()
    assert tensors.keys() == {f'norm.{k}' for k in ('weight', 'bias', 'running_mean', 'running_var')} and note == {'n': 2}
    assert tensors['norm.weight'].item() == pytest.approx(1 * 2/11 * 3/12 + 2 * 9/11 * 3/12 + 3 * 9/12)
    other = averaged([3.])
    other.restore({k: v.clone() for k, v in tensors.items()}, note)
    for v in (4., 5.):
        other.learn.model.norm.weight.data[:] = v
        other.after_batch()
    assert other.n == 4 and other.average['norm.weight'].item() == pytest.approx(whole.average['norm.weight'].item())
    assert EMA().checkpoint() == ({}, {'n': 0}), 'before the first batch there is nothing to keep'

def test_an_average_ends_in_the_net():
    "Counters of batches, which cannot be averaged, are no part of it"
    ema = averaged([1., 2., 3.])
    tensors, _ = ema.checkpoint()
    net = Holds(7.)
    net.norm.num_batches_tracked += 5
    ema.learn.model = net
    ema.conclude(tensors)
    assert net.norm.weight.item() == pytest.approx(tensors['norm.weight'].item()) and net.norm.num_batches_tracked == 5

def test_no_views():
    def net(x): return x.sum((2, 3))
    x, said = torch.rand(4, 3, 6, 6), torch.rand(4, 3).half()
    assert torch.equal(average_views(net, x, 'none'), net(x))
    assert torch.equal(average_views(net, x, 'none', said), said.float())
    assert torch.allclose(average_views(lambda x: x[:, :, 0, 0], x, pred=said), (said.float() + x[:, :, 0, -1]) / 2)

def test_views_are_seen_in_the_number_format_of_the_net():
    from fastcifar.train import NumberFormat
    assert Views.order < NumberFormat.order

# -- pictures of many runs

def curves(recipes):
    return pd.DataFrame([dict(model='m', norm='bn', recipe=r, bs=8, seed=s, epoch=e, accuracy=.1 * e + .02 * s)
        for r in recipes for s in range(3) for e in (1, 2)])

def test_panels_of_study_curves():
    "A band from the lowest to the highest seed; places without a panel stay empty"
    axs = plot_study_curves(curves('abcd')).axes
    assert [a.axison for a in axs] == [True] * 4 + [False] * 2 and [a.get_title() for a in axs[:4]] == [f'm, {r}, batch 8'
        for r in 'abcd']
    band = axs[0].collections[0].get_paths()[0].vertices
    for epoch in (1, 2): assert np.unique(band[band[:, 0] == epoch, 1]) == pytest.approx([10 * epoch, 10 * epoch + 4])
    assert axs[0].get_lines()[0].get_ydata() == pytest.approx([12, 22])
    assert len(plot_study_curves(curves('ab')).axes) == 2

def test_pairs_with_one_seed_in_common_are_named():
    runs = [('bn', s, .9 + .01 * s) for s in range(3)] + [('gn', s, .8 + .01 * s + .001 * s**2) for s in range(3)] + [('ln', 0, .85)]
    r = pd.DataFrame([dict(model='m', norm=n, recipe='r', bs=8, seed=s, status='finished', test_accuracy=a) for n, s, a in runs])
    said = study_answer(r)[0]
    assert said.endswith('; fewer than two seeds in common: bn and ln, gn and ln') and 'bn > gn by' in said
    assert 'fewer than' not in study_answer(r[r.norm != 'ln'])[0]

# -- corrupted images

def test_picture_of_robustness():
    "Lines in the order of the table, with the intervals on the right side"
    t = pd.DataFrame([dict(corruption=k, severity=s, images=100, accuracy=a - s / 10, low=a - s / 10 - .05,
        high=a - s / 10 + .02) for k, a in (('noise', .9), ('blur', .8)) for s in (0, 1, 2)])
    ax = plot_robustness(t).axes[0]
    assert [x.get_label() for x in ax.containers] == ['noise', 'blur'] and ax.get_ylabel() == 'accuracy (%), 100 images'
    for bars, a in zip(ax.containers, (.9, .8)):
        line, _, (segments,) = bars
        assert line.get_ydata() == pytest.approx([100 * (a - s / 10) for s in (0, 1, 2)])
        assert np.array([s[:, 1] for s in segments.get_segments()]) == pytest.approx(np.array([[100 * (a - s / 10) - 5,
            100 * (a - s / 10) + 2] for s in (0, 1, 2)]))
        assert line.get_xdata() == pytest.approx([0, 1, 2], abs=.2)
    assert not set(ax.containers[0][0].get_xdata()) & set(ax.containers[1][0].get_xdata()), 'beside each other'
    assert ax.get_xticks().tolist() == [0, 1, 2]

def test_picture_of_corruptions():
    axs = plot_corruptions(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).axes
    assert [a.get_title() for a in axs[:6]] == ['clean', *(f'severity {s}' for s in range(1, 6))]
