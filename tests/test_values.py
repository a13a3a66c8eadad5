"What the smaller parts give, value by value, where the whole would hide a mistake in one of them."
import contextlib, copy, math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn

from fastcifar.train.callbacks import CheckOutputs, EMA, FreezeParts
from fastcifar.train.tta import TTA, tta_logits
from fastcifar.basics import FastcifarError
from fastcifar.data.load import Arrays
from fastcifar.data.images import ImageData
from fastcifar.interpret.interpretation import CifarInterpretation, check_plot, plot_schedule, save_plot
from fastcifar.interpret.corruptions import corrupt, plot_corruptions, plot_robustness, read_corruptions
from fastcifar.train.schedule import RangeTest, lr_range, one_cycle, plot_range, read_range
from fastcifar.study.statistics import plot_study_curves, study_answer

@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')

# -- the range test

def read_by_hand(rates, losses):
    "LRMIN and LRMAX as the notebook describes them, with loops; None where the fall is too small to tell"
    n = len(losses)
    width = max(2.5, .15 * (n - 1) / math.log10(rates[-1] / rates[0]))
    bell = [[math.exp(-((i - j) / width)**2 / 2) for j in range(n)] for i in range(n)]
    s = [sum(w * l for w, l in zip(row, losses)) / sum(row) for row in bell]
    kept = 1 / math.sqrt(2 * math.sqrt(math.pi) * width)
    def noise(x): return math.sqrt(sum((b - a)**2 for a, b in zip(x, x[1:])) / (len(x) - 1) / 2)
    flat = list(losses[:max(n // 5, 3)])
    start, end = sum(flat) / len(flat), n
    enough = max((start - min(s)) / 10, 4 * kept * noise(flat))
    for i in range(n):
        gained = start - min(s[:i + 1])
        if gained > enough and s[i] - min(s[:i + 1]) > gained / 2:
            end = i
            break
    low = min(range(end), key=lambda i: s[i])
    fall = start - s[low]
    half = max([i for i in range(low + 1) if s[i] > start - fall / 2], default=0)
    rest = noise(list(losses[half:low + 1])) if low - half > 5 else 0
    most = kept * max(noise(flat), rest)
    if fall <= max(8 * most, abs(start) / 10): return None
    high = math.sqrt(rates[half] * rates[low])
    first = max([i for i in range(half + 1) if s[i] >= start - max(.02 * fall, most)], default=0)
    return min(max(rates[first], high / 1000), high / 2), high

@pytest.mark.parametrize('n', [12, 35, 60, 100, 200])
def test_range_by_hand(n):
    "Noisy curves that fall, rise again, and fall once more"
    rng, certain = np.random.default_rng(n), 0
    rates = np.geomspace(1e-6, 1, n)
    for _ in range(12):
        at, height = np.sort(rng.integers(0, n, 5)), [2.3, 2.3 - rng.uniform(0, .2), rng.uniform(.8, 1.8),
            rng.uniform(1, 2.6), rng.uniform(.5, 3)]
        losses = np.interp(np.arange(n), at, height) + rng.normal(0, .03, n)
        r, expected = read_range(rates, losses, default=3e-3), read_by_hand(rates, losses)
        assert r.certain == (expected is not None)
        assert (r.lr_min, r.lr_max) == pytest.approx(expected or (3e-3 / 50, 3e-3))
        assert r.rates == pytest.approx(rates) and r.losses == pytest.approx(losses)
        certain += r.certain
    assert certain >= 6

def test_range_stays_within_three_decades():
    rates = np.geomspace(1e-8, 1, 160)
    slow = read_range(rates, np.interp(np.arange(160), [0, 30, 120, 130, 159], [2.3, 2.2, 2.0, 1., 1.1]))
    assert slow.lr_max / 1000 <= slow.lr_min <= slow.lr_max / 2
    sudden = read_range(np.linspace(.5, .6, 60), np.repeat([2.3, 1.], 30))
    assert sudden.lr_min == pytest.approx(sudden.lr_max / 2)

def test_losses_below_zero():
    assert not read_range(np.geomspace(1e-6, 1, 50), np.full(50, -1.)).certain
    assert read_range(np.geomspace(1e-6, 1, 50), -np.arange(50.)).certain
    rates = np.geomspace(1e-6, 1, 10)
    assert len(read_range(rates, np.linspace(2, 1, 10)).losses) == 10, 'ten are enough'

def test_a_range_test_ends_with_the_first_loss_that_is_none():
    "Whatever comes after it is of no use"
    from fastcifar.train.learner import cifar_learner
    class Breaks(nn.Linear):
        steps = 0
        def forward(self, x):
            self.steps += self.training
            return super().forward(x.flatten(1)) * (math.nan if self.steps > 12 else 1.)
    learn = cifar_learner(coloured(64).dataloaders(bs=16, device='cpu'), Breaks(3072, 4), precision='fp32')
    test = RangeTest(1e-6, 1., 100)
    with learn.no_bar(), learn.no_logging(): learn.fit(30, cbs=test)
    assert len(test.rates) == len(test.raw) == 13 and math.isnan(test.raw[-1]) and np.isfinite(test.raw[:-1]).all()

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

def test_range_test_leaves_a_learner_alone(monkeypatch):
    from fastcifar.train import schedule
    from fastcifar.train.learner import cifar_learner
    drawn, plot = [], schedule.plot_range
    monkeypatch.setattr(schedule, 'plot_range', lambda r: drawn.append(plot(r)))
    learn = cifar_learner(coloured(64).dataloaders(bs=16, device='cpu'),
        nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3072, 4)), precision='fp32')
    for training in (False, True):
        learn.model.train(training)
        with learn.no_bar(): r = learn.lr_range(end_lr=.1, num_it=50, show_plot=False)
        assert r.rates[0] == pytest.approx(1e-6) and len(r.rates) == len(r.losses) <= 50 and max(r.rates) <= .1
        assert all(m.training == training for m in learn.model.modules()) and not plt.get_fignums()
    assert not drawn
    with learn.no_bar(): learn.lr_range(num_it=30)
    assert len(drawn) == 1 and not plt.get_fignums() # without windows none stays open

# -- averages of weights and of answers

class Holds(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.norm.weight.data[:] = v
        self.register_buffer('steps', torch.tensor(4))

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
    state = half.state_dict()
    names = [f'norm.{k}' for k in ('weight', 'bias', 'running_mean', 'running_var')]
    assert state.keys() == {'n', *(f'average.{k}' for k in names)} and state['n'] == 2
    assert state['average.norm.weight'].item() == pytest.approx(1 * 2/11 * 3/12 + 2 * 9/11 * 3/12 + 3 * 9/12)
    old = {k.removeprefix('average.'): v for k, v in state.items()} # as version 0.1 wrote it
    for kept in (state, old):
        other = averaged([3.])
        other.load_state_dict(copy.deepcopy(kept))
        for v in (4., 5.):
            other.learn.model.norm.weight.data[:] = v
            other.after_batch()
        assert other.n == 4
        assert other.average['norm.weight'].item() == pytest.approx(whole.average['norm.weight'].item())
    assert EMA().state_dict() == {'n': 0}, 'before the first batch there is nothing to keep'

def test_an_average_ends_in_the_net():
    "Counters, which cannot be averaged, are no part of it"
    ema = averaged([1., 2., 3.])
    state = ema.state_dict()
    net = Holds(7.)
    net.norm.num_batches_tracked += 5
    net.steps += 3
    ema.learn.model = net
    ema.conclude(state)
    assert net.norm.weight.item() == pytest.approx(state['average.norm.weight'].item())
    assert net.norm.num_batches_tracked == 5 and net.steps == 7

def test_an_average_is_in_the_net_after_a_fit():
    "Also after one that ended while it was validated, when net and average have changed places"
    for interrupted in (False, True):
        ema = averaged([1., 2., 3.])
        expected = ema.average['norm.weight'].item()
        if interrupted: ema.before_validate()
        ema.after_fit()
        net = ema.learn.model
        assert net.norm.weight.item() == pytest.approx(expected) and net.steps == 4 and ema.average is None

def test_parts_are_frozen_from_their_epoch_on():
    "Those of the pattern alone; after the fit they can be trained again"
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    freeze = FreezeParts([('0.bias', 2)])
    freeze.learn = SimpleNamespace(model=net, epoch=0)
    def trained(): return [n for n, p in net.named_parameters() if p.requires_grad]
    for epoch, frozen in ((0, []), (1, []), (2, ['0.bias']), (3, ['0.bias'])):
        freeze.learn.epoch = epoch
        freeze.before_train()
        assert sorted({'0.weight', '0.bias', '1.weight', '1.bias'} - set(trained())) == frozen
    freeze.after_fit()
    assert len(trained()) == 4

def test_outputs_are_counted_where_classes_are_told_apart():
    dls = SimpleNamespace(c=3)
    for loss, n in ((nn.CrossEntropyLoss(), 3), (nn.functional.cross_entropy, 3), (nn.MSELoss(), None)):
        check = CheckOutputs()
        check.learn = SimpleNamespace(dls=dls, loss_func=loss)
        check.before_fit()
        assert check.n == n
        check.learn.pred = torch.zeros(2, 4)
        with pytest.raises(FastcifarError, match='gives 4 outputs') if n else contextlib.nullcontext(): check.after_pred()

def test_an_image_that_is_not_corrupted_is_a_copy():
    "What is done to the result is not done to the data"
    images = np.zeros((2, 32, 32, 3), np.uint8)
    corrupt(images, 'noise', 0)[:] = 9
    corrupt(images[:0], 'noise', 3)
    assert not images.any()

def test_a_range_test_leaves_the_shuffles_of_fastai():
    from fastcifar.train.learner import cifar_learner
    items = [(torch.randn(3, 32, 32), i % 2) for i in range(32)]
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items, bs=8), device='cpu')
    learn = cifar_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), precision='fp32', metrics=None)
    before = dls.train.rng.getstate()
    with learn.no_bar(): learn.lr_range(num_it=12, show_plot=False)
    assert dls.train.rng.getstate() == before

def test_no_views():
    def net(x): return x.sum((2, 3))
    x, said = torch.rand(4, 3, 6, 6), torch.rand(4, 3).half()
    assert torch.equal(tta_logits(net, x, 'none'), net(x))
    assert torch.equal(tta_logits(net, x, 'none', said), said.float())
    assert torch.allclose(tta_logits(lambda x: x[:, :, 0, 0], x, pred=said), (said.float() + x[:, :, 0, -1]) / 2)

def test_views_are_seen_in_the_number_format_of_the_net():
    from fastcifar.train.precision import Autocast
    assert TTA.order < Autocast.order

# -- pictures of many runs

def curves(recipes):
    return pd.DataFrame([dict(model='m', norm='bn', recipe=r, bs=8, seed=s, epoch=e, accuracy=.1 * e + .02 * s)
        for r in recipes for s in range(3) for e in (1, 2)])

def test_picture_of_a_schedule():
    "Over the epochs, a panel for each"
    fig = plot_schedule(dict(lr=lambda pos: pos, mom=lambda pos: 1 - pos), epochs=4)
    (lr,), (mom,) = (ax.lines for ax in fig.axes)
    assert lr.get_xdata()[-1] == pytest.approx(4, abs=.01) and lr.get_ydata()[-1] == pytest.approx(1, abs=.01)
    assert mom.get_ydata()[0] == 1 and fig.axes[0].get_xlabel() == 'epoch'

def test_panels_of_study_curves():
    "A band from the lowest to the highest seed; places without a panel stay empty"
    axs = plot_study_curves(curves('abcd')).axes
    assert [a.axison for a in axs] == [True] * 4 + [False] * 2
    assert [a.get_title() for a in axs[:4]] == [f'm, {r}, batch 8' for r in 'abcd']
    band = axs[0].collections[0].get_paths()[0].vertices
    for epoch in (1, 2): assert np.unique(band[band[:, 0] == epoch, 1]) == pytest.approx([10 * epoch, 10 * epoch + 4])
    assert axs[0].get_lines()[0].get_ydata() == pytest.approx([12, 22])
    assert len(plot_study_curves(curves('ab')).axes) == 2

def test_pairs_with_one_seed_in_common_are_named():
    runs = [('bn', 0, .9), ('bn', 1, .91), ('bn', 2, .92), ('gn', 0, .8), ('gn', 1, .811), ('gn', 2, .824),
        ('ln', 0, .85)]
    r = pd.DataFrame([dict(model='m', norm=n, recipe='r', bs=8, seed=s, status='finished', test_accuracy=a)
        for n, s, a in runs])
    said = study_answer(r)[0]
    assert said.endswith('; fewer than two seeds in common: bn and ln, gn and ln') and 'bn > gn by' in said
    assert 'fewer than' not in study_answer(r[r.norm != 'ln'])[0]

def test_a_ranking_over_unequal_seeds():
    "With the size of each step, if all are supported"
    runs = [(n, s, a + .001 * s % .003) for n, a, k in (('bn', .9, 6), ('gn', .8, 6), ('ln', .7, 5)) for s in range(k)]
    r = pd.DataFrame([dict(model='m', norm=n, recipe='r', bs=8, seed=s, status='finished',
        test_accuracy=a + .0001 * s * (n == 'gn'))
        for n, s, a in runs])
    assert '; ranking: bn > gn by ' in study_answer(r)[0].replace(': ranking', '; ranking').replace('), ranking',
        '; ranking')
    assert 'points (n = 6), gn > ln by ' in study_answer(r)[0] and 'supported' not in study_answer(r)[0]

def test_runs_that_are_not_as_they_should_be_are_named():
    "Those that failed, and those of which something is missing; nothing is said of the others"
    r = pd.DataFrame([dict(model='m', norm='bn', recipe='r', bs=8, seed=s, status=status, reason=why, test_accuracy=.9)
        for s, (status, why) in enumerate([('finished', ''), ('finished', 'no curve'), ('failed', 'NaN'),
            ('missing', '')])])
    assert study_answer(r)[1:] == ['failed: m bn r 8 seed 2: NaN', 'incomplete: m bn r 8 seed 1: no curve']
    r.loc[0, 'reason'] = None # as a table of a file has it
    assert len(study_answer(r)) == 3 and len(study_answer(r.drop(columns='reason')[r.status == 'finished'])) == 1

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
    shown = [a.images[0].get_array() for a in axs]
    assert [np.array_equal(x, shown[0]) for x in shown[:7]] == [True, *[False] * 5, True], 'the clean one begins a line'

def test_picture_of_an_accuracy_of_nothing():
    "Rounding may leave the lower end a hair above the accuracy"
    t = pd.DataFrame([dict(corruption='noise', severity=1, images=10, accuracy=0., low=1e-18, high=.2)])
    assert plot_robustness(t).axes[0].containers[0][0].get_ydata() == [0]

def test_published_corruptions_are_whole_numbers(tmp_path):
    for kind, said in ((np.float32, 'holds float32 of shape'), (np.uint8, None)):
        np.save(tmp_path/'labels.npy', np.zeros(10, np.uint8))
        np.save(tmp_path/'fog.npy', np.zeros((10, 32, 32, 3), kind))
        if said is None: assert read_corruptions(tmp_path)[1]['fog'].shape == (5, 2, 32, 32, 3)
        else:
            with pytest.raises(FastcifarError, match=said): read_corruptions(tmp_path)

# -- what a net gets right and wrong

def coloured(n_train=24, n_test=12, classes='abcd'):
    "Images of noise, with labels in turn; the higher the label, the brighter"
    rng, k, x, y = np.random.default_rng(0), len(classes), {}, {}
    for s, n in (('train', n_train), ('test', n_test)):
        y[s] = np.arange(n) % k
        x[s] = (rng.integers(0, 100, (n, 32, 32, 3)) + 150 // k * y[s][:, None, None, None]).astype(np.uint8)
    return ImageData(Arrays(x, y, list(classes)), 'coloured')

class Net(nn.Module):
    def __init__(self, n_out=4):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, n_out)
    def forward(self, x): return self.last(self.second(self.first(x).relu()).relu().mean((2, 3)))

@pytest.fixture(scope='module')
def learn():
    from fastcifar.train.learner import cifar_learner
    torch.manual_seed(0)
    return cifar_learner(coloured().dataloaders(bs=8, device='cpu'), Net(), precision='fp32')

@pytest.fixture
def interp(learn):
    "Of 12 images with labels 0, 1, 2, 3, 0, ... nine are right, and the surest is wrong"
    targs = torch.arange(12) % 4
    preds = torch.full((12, 4), .1)
    preds[torch.arange(12), targs] = .7
    for i, said, p in ((1, 0, .94), (6, 3, .6), (11, 0, .5)):
        preds[i] = (1 - p) / 3
        preds[i, said] = p
    return CifarInterpretation(learn, learn.dls.evaluation(1), -preds[torch.arange(12), targs].log(), preds, targs)

def test_wrong_predictions(interp):
    t = interp.wrong()
    assert t.image.tolist() == [1, 6, 11] and t.probability.tolist() == pytest.approx([.94, .6, .5])
    assert t.truth.tolist() == ['b', 'c', 'd'] and t.prediction.tolist() == ['a', 'd', 'a']
    assert interp.top_losses_table(2).image.tolist() == [1, 6] and len(interp.top_losses_table(5)) == 5
    assert t.log_probability.tolist() == pytest.approx(np.log([.94, .6, .5]).tolist(), abs=1e-6)
    assert (interp.accuracy, interp.loss) == pytest.approx((.75, -np.log([.7] * 9 + [.02, .4 / 3, .5 / 3]).mean()))

def test_confusions(interp):
    cm = np.diag([3, 2, 2, 2])
    cm[1, 0] = cm[2, 3] = cm[3, 0] = 1
    assert (interp.confusion_matrix() == cm).all()
    t = interp.class_accuracy()
    assert t.index.tolist() == list('abcd') and t.images.tolist() == [3] * 4 and t.right.tolist() == [3, 2, 2, 2]

def test_believable_predictions(interp):
    "The surest is wrong; of the ten surest, nine agree, which is just enough"
    assert interp.sure_enough() == pytest.approx(.7)
    interp.preds[0, 0] = .6 # two are as sure as each other, and one of these is wrong: both count, or none
    assert interp.sure_enough() == np.inf

def test_label_errors_of_classes_that_are_there(learn):
    "A class without images takes its share of the probabilities with it"
    from cleanlab.filter import find_label_issues
    rng = np.random.default_rng(3)
    p = rng.dirichlet([.3] * 4, 200)
    p[:, 3] *= rng.uniform(0, 3, 200)
    p /= p.sum(1, keepdims=True)
    labels = np.array([rng.choice(3, p=row[:3] / row[:3].sum()) for row in p])
    labels[:20] = (labels[:20] + 1) % 3
    preds, targs = torch.tensor(p, dtype=torch.float32), torch.tensor(labels)
    i = CifarInterpretation(learn, learn.dls.evaluation(1), -preds[torch.arange(200), targs].log(), preds, targs)
    i.sure_enough = lambda: .5
    known = preds.double().numpy()[:, :3]
    issues = find_label_issues(labels, known / known.sum(1, keepdims=True), return_indices_ranked_by='self_confidence')
    wanted = [k for k in issues if p[k].max() >= .5]
    t = i.label_errors()
    assert t.image.tolist() == wanted and 3 < len(wanted) < len(issues)
    assert t.label_probability.tolist() == pytest.approx(p[wanted, labels[wanted]].tolist(), abs=1e-6)

@pytest.mark.parametrize('n', [1, 2])
def test_labels_of_one_class_cannot_be_doubted(learn, n):
    "Two classes can be mistaken for each other"
    p = np.tile([.97, .01, .01, .01], (40, 1))
    p[20:] = p[20:, [1, 0, 2, 3]]
    targs = torch.tensor([0] * 20 + [1] * 20) if n == 2 else torch.zeros(40, dtype=int)
    if n == 2: targs[0] = 1 # the mistake
    preds = torch.tensor(p, dtype=torch.float32)
    i = CifarInterpretation(learn, learn.dls.evaluation(1), torch.zeros(40), preds, targs)
    assert list(i._suspects()) == ([0] if n == 2 else [])

def test_interpretation_of_loaders_of_fastai():
    "All images of the split, in order, though training leaves some out"
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from torch.utils.data import TensorDataset
    from fastai.data.load import DataLoader
    x, y = torch.rand(10, 3, 32, 32), torch.arange(10) % 4
    images = TensorDataset(x, y)
    images.vocab = list('abcd')
    dls = DataLoaders(*[DataLoader(images, bs=4, shuffle=True, drop_last=True) for _ in range(2)])
    learn = Learner(dls, Net(), loss_func=nn.CrossEntropyLoss(reduction='none'))
    with learn.no_bar(), learn.no_logging(): interp = CifarInterpretation.from_learner(learn, 0)
    assert interp.targs.tolist() == y.tolist() and interp.tta == 'none'

def test_where_a_net_looks(interp):
    "For the class that was predicted, or for another one; in the deepest map, or in another one"
    from fastcifar.interpret.gradcam import grad_cam
    x = interp.learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)[[1, 6]]
    for classes, layer in ((None, None), ([2, 1], 'first')):
        theirs = grad_cam(interp.learn.model, x, [0, 3] if classes is None else classes, layer or 'second').numpy()
        assert interp.grad_cam([1, 6], layer, classes) == pytest.approx(theirs, abs=1e-5)

def pictures(fig): return [i.get_array() for i in fig.axes[0].images]

def test_pictures_of_predictions(interp):
    "Each image once, as it is; of wrong ones the surest first"
    x = np.asarray(interp.learn.dls.data.x['test'])
    for fig, idxs in ((interp.plot_wrong(2), [1, 6]), (interp.plot_wrong(cols=2), [1, 6, 11]),
        (interp.plot_predictions(50, cols=5), range(12))):
        assert all(map(np.array_equal, pictures(fig), x[list(idxs)])) and len(pictures(fig)) == len(idxs)
    fig = interp.plot_wrong()
    assert [t.get_text() for t in fig.axes[0].texts if t.get_text()] == [
        'b -> a (94%)', 'c -> d (60%)', 'd -> a (50%)']
    assert {t.get_color() for t in fig.axes[0].texts if t.get_text()} == {'tab:red'}
    assert '(3 of 12)' in fig.get_suptitle()
    ax = interp.plot_wrong(cols=2).axes[0]
    (a, b, low, high), second, below = [i.get_extent() for i in ax.images] # two in a line
    assert b - a == pytest.approx(1) == high - low and second[0] > b and (*second[2:], *below[:2]) == (low, high, a, b)
    assert below[3] < low and ax.get_xlim()[0] <= a and second[1] <= ax.get_xlim()[1], 'none covers another'
    assert ax.get_ylim()[0] <= below[2] and high < max(t.get_position()[1] for t in ax.texts) <= ax.get_ylim()[1] + .3
    few = pictures(interp.plot_predictions(5, seed=1))
    assert len(few) == 5 and any(not np.array_equal(a, b) for a, b in zip(few, pictures(interp.plot_predictions(5))))

def test_pictures_of_where_a_net_looks(interp):
    "Images above maps of the actual and of the predicted class, for each layer"
    one = interp.plot_grad_cam(interp.wrong(), n=2)
    assert len(pictures(one)) == 6 and [t.get_text() for t in one.axes[0].texts][-2:] == ['actual', 'predicted']
    several = interp.plot_grad_cam(interp.wrong(), n=2, layer=['first', 'second'])
    by_name = interp.plot_grad_cam(interp.wrong(), n=2, layer='second')
    assert len(pictures(several)) == 10 and len(pictures(by_name)) == 6
    for a, b in zip(pictures(one), pictures(by_name)): assert np.array_equal(a, b)
    assert all(map(np.array_equal, pictures(several)[6:], pictures(one)[2:]))
    assert not np.array_equal(pictures(one)[2], pictures(one)[4]), 'two classes, two maps'
    assert len(pictures(interp.plot_grad_cam(n=3))) == 9

def test_picture_of_class_accuracy(interp, monkeypatch):
    "The first class on top, with the intervals on the right side"
    t = interp.class_accuracy()
    ax = interp.plot_class_accuracy().axes[0]
    assert [l.get_text() for l in ax.get_yticklabels()] == list('dcba')
    assert [b.get_width() for b in ax.patches] == pytest.approx((100 * t.accuracy[::-1]).tolist())
    ends = np.array([s[:, 0] for s in ax.containers[-1].errorbar.lines[2][0].get_segments()])
    assert ends == pytest.approx(100 * t[['low', 'high']][::-1].to_numpy())
    assert [x.get_text() for x in ax.texts] == ['66.7', '66.7', '66.7', '100.0']
    monkeypatch.setattr(interp, 'class_accuracy', lambda: t.assign(high=t.accuracy - 1e-15)) # rounded
    interp.plot_class_accuracy()

def test_picture_of_calibration(interp, monkeypatch):
    "On the diagonal a net is as sure as it is right"
    t = interp.calibration(10)
    assert t.low_end.tolist() == pytest.approx([.5, .6, .9]) and t.images.tolist() == [1, 10, 1]
    top, ax = interp.plot_calibration(10).axes
    assert [(b.get_x(), b.get_height(), b.get_width()) for b in top.patches] == [(pytest.approx(a), n,
        pytest.approx(.1))
        for a, n in zip(t.low_end, t.images)]
    assert [l.get_xydata().tolist() for l in ax.get_lines()][0] == [[0, 0], [1, 1]]
    line, _, (segments,) = ax.containers[0]
    assert line.get_xdata() == pytest.approx(t.confidence) and line.get_ydata() == pytest.approx(t.accuracy)
    assert np.array([s[:, 1] for s in segments.get_segments()]) == pytest.approx(t[['low', 'high']].to_numpy())
    assert top.get_title() == f'expected calibration error {100 * interp.ece(10):.1f} points'
    monkeypatch.setattr(interp, 'calibration', lambda bins: t.assign(high=t.accuracy - 1e-15))
    interp.plot_calibration()

def test_a_sure_prediction_is_in_the_last_bin(interp):
    interp.preds[0] = torch.tensor([1., 0, 0, 0])
    t = interp.calibration(4)
    assert t.low_end.iloc[-1] == .75 and t.images.iloc[-1] == 2 and t.accuracy.iloc[-1] == .5

def test_picture_of_confusions(interp):
    "Numbers, or shares of each actual class, in cells whose labels have room"
    ax = interp.plot_confusion_matrix() or plt.gcf().axes[0]
    assert sorted(t.get_text() for t in ax.texts) == sorted(map(str, interp.confusion_matrix().ravel()))
    assert plt.gcf().get_size_inches().tolist() == [6, 6] and ax.get_ylabel() == 'Actual'
    interp.plot_confusion_matrix(normalize=True, plot_txt=True)
    assert sorted({t.get_text() for t in plt.gcf().axes[0].texts}) == ['0.00', '0.33', '0.67', '1.00']
    interp.plot_confusion_matrix(plot_txt=False)
    assert not plt.gcf().axes[0].texts

def test_a_picture_is_the_one_that_was_returned(tmp_path):
    "Or else the current one; afterwards all are closed that were opened"
    def size(path): return plt.imread(path).shape[:2][::-1]
    def two():
        fig = plt.figure(figsize=(2, 1), layout='constrained')
        plt.figure(figsize=(4, 3), layout='constrained')
        return fig
    before = plt.figure()
    assert save_plot(two, tmp_path/'a.png') and size(tmp_path/'a.png') == (220, 110)
    assert save_plot(lambda: two() and None, tmp_path/'b.png') and size(tmp_path/'b.png') == (440, 330)
    assert plt.get_fignums() == [before.number]
    said = []
    assert not save_plot(lambda: 1 / 0, tmp_path/'c.png', said.append) and len(said) == 1 and 'c.png' in said[0]

def test_pictures_are_of_a_kind_that_can_be_drawn(tmp_path):
    for name in ('a.png', 'a.SVG', 'a.pdf', 'a.jpg'): assert check_plot(tmp_path/name) == tmp_path/name
    for name in ('a.txt', 'png', 'a.png.'):
        with pytest.raises(FastcifarError,
            match='give a name that ends in .png, .svg, .pdf, .jpg'): check_plot(tmp_path/name)

def test_one_image_of_none_and_of_all(interp):
    assert interp.images([]).shape == (0, 32, 32, 3)
    x = np.asarray(interp.learn.dls.data.x['test'])
    assert np.array_equal(interp.images([3, 1]), x[[3, 1]]) and interp.images(torch.tensor([2])).dtype == np.uint8
    inputs, preds, targs, decoded, losses = interp[[5, 1]]
    assert len(inputs) == 2 and targs.tolist() == [1, 1] and decoded.tolist() == [1, 0]
    assert losses.tolist() == pytest.approx([-math.log(.7), -math.log(.02)], abs=1e-5)
    assert preds[1, 0].item() == pytest.approx(.94)
    assert len(interp[4][0]) == 1
