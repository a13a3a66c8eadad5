"What a sweep tries, counts, keeps and draws, with trials that train nothing."
import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import fastcifar.study.sweep as sweep
from fastcifar.basics import FastcifarError
from fastcifar.runs.recipes import create_recipe
from fastcifar.study.sweep import STRENGTHS, TUNABLE, Sweep, plot_sweep, suggest_settings

optuna = pytest.importorskip('optuna')

class Trial:
    "Takes one end of every range, and keeps what was asked"
    def __init__(self, end): self.end, self.asked = end, {}
    def suggest_float(self, name, low, high, log=False):
        self.asked[name] = (low, high, log)
        return (low, high)[self.end]
    def suggest_categorical(self, name, choices):
        self.asked[name] = tuple(choices)
        return choices[-self.end]

@pytest.mark.parametrize('end', [0, 1])
def test_what_is_searched(end):
    "Rates over a factor of 64, decays in steps of a rate, on scales that fit"
    r, trial = create_recipe('fast', 'normnet48k'), Trial(end)
    s = suggest_settings(trial, r)
    assert trial.asked == dict(lr_max=(.02 / 8, .02 * 8, True), decay=(1e-6, 1e-2, True),
        label_smoothing=(0, .3, False), policy=STRENGTHS)
    assert s == dict(lr_max=(.0025, .16)[end], wd=pytest.approx((1e-6 / .0025, 1e-2 / .16)[end]),
        label_smoothing=(0, .3)[end], policy=('none', 'crop_flip_cutout')[end])
    assert suggest_settings(Trial(end), r, ('wd',)) == dict(wd=pytest.approx((1e-6, 1e-2)[end] / .02))
    for k in ('lr_max', 'label_smoothing', 'policy'): assert suggest_settings(Trial(end), r, (k,)) == {k: s[k]}
    assert TUNABLE == ('lr_max', 'wd', 'label_smoothing', 'policy') and STRENGTHS[0] == 'none'

@pytest.mark.parametrize('settings, says', [
    (dict(tune=()), 'there is nothing to tune'), (dict(tune=('lr_min',)), 'lr_min'),
    (dict(valid=0), 'needs held-out images'), (dict(valid=None), 'needs held-out images'),
    (dict(valid=-3), 'needs held-out images'),
    (dict(recipe='one_cycle'), 'the recipe one_cycle has no learning rate of its own'),
    (dict(wd=.1), 'wd is given, and searched: leave it out, or search --tune lr_max,label_smoothing,policy'),
    (dict(wd=.1, tune=('wd',)), 'wd is given, and searched: leave it out, or search --tune others')])
def test_sweeps_that_are_refused(tmp_path, settings, says):
    with pytest.raises(FastcifarError, match=says): Sweep(tmp_path/'s', 'normnet31k', 'digits', **settings)
    assert not (tmp_path/'s').exists()

def test_where_a_sweep_starts(tmp_path):
    s = Sweep(tmp_path, 'normnet31k', 'digits', valid=1, recipe='one_cycle', lr_max=.5, decay='l2', tta='flip')
    assert (s.base.lr_max, s.base.decay, s.base.valid, s.base.tta, s.base.data) == (.5, 'l2', 1, 'flip', 'digits')
    assert s.tune == TUNABLE and Sweep(tmp_path, 'normnet31k').base.valid == 5000

def test_a_sweep_is_known_again(tmp_path):
    "In whatever order its settings are named; not from a file that is none"
    data = SimpleNamespace(source='images', known_as='images'.__eq__)
    Sweep(tmp_path, 'normnet31k', 'digits', tune=('lr_max', 'wd'), valid=100)._settle(data)
    Sweep(tmp_path, 'normnet31k', 'digits', tune=('wd', 'lr_max'), valid=100)._settle(data)
    for other in ('[]', '{"model": "groupnet"}'):
        (tmp_path/'sweep.json').write_text(other)
        with pytest.raises(FastcifarError, match='holds a sweep of another configuration'):
            Sweep(tmp_path, 'normnet31k', 'digits', tune=('lr_max', 'wd'), valid=100)._settle(data)

@pytest.fixture
def quick(monkeypatch):
    "Trials that give what the function `answers` says of their number"
    made = SimpleNamespace(seen=[], answers=lambda n: .5)
    def attempt(self, study, trial, c, data, device, request):
        made.seen.append(c)
        answer = made.answers(trial.number)
        if isinstance(answer, str):
            study.tell(trial, state=getattr(optuna.trial.TrialState, answer))
            if answer == 'FAIL': raise KeyboardInterrupt
        else:
            for epoch in range(trial.number % 3): trial.report(answer, epoch + 1)
            study.tell(trial, answer)
        return 'done'
    monkeypatch.setattr(Sweep, '_try', attempt)
    yield made
    plt.close('all')

def small(folder, **more):
    return Sweep(folder, 'normnet31k', 'digits', **{**dict(tune=('lr_max', 'policy'), valid=100, epochs=2), **more})

def test_best_trial_is_written(tmp_path, quick):
    "With its settings, and what they were found with"
    quick.answers = {0: .5, 1: .7, 2: 'PRUNED', 3: .6}.get
    said, s = [], small(tmp_path, tta='flip', seed=3)
    r = s.run(4, device='cpu', bars=False, say=said.append)
    t = pd.read_csv(tmp_path/'trials.csv')
    assert t.columns.tolist() == ['trial', 'state', 'valid_accuracy', 'epochs', 'lr_max', 'policy']
    assert t.trial.tolist() == [0, 1, 2, 3] and t.state.tolist() == ['complete', 'complete', 'pruned', 'complete']
    assert t.valid_accuracy.fillna(-1).tolist() == [.5, .7, -1, .6] and t.epochs.tolist() == [0, 1, 0, 0]
    assert json.loads((tmp_path/'recipe.json').read_text()) == json.loads(json.dumps(r))
    found, best = r['found'], quick.seen[1]
    assert len(found.pop('data_sha256')) and found == dict(trials=4, complete=3, valid_accuracy=.7, valid_images=100,
        tta='flip', data='digits', epochs=2, seed=3)
    assert (r['recipe'], r['model'], r['norm']) == ('fast', 'normnet31k', 'bn')
    assert all(r['settings'][k] == getattr(best, k) for k in ('policy', 'lr_max', 'lr_min', 'bs'))
    assert (tmp_path/'sweep.png').is_file() and len(said) == 5
    assert said[0].startswith('4 trials, 0 done; digits, 100 training images held out, test-time views: flip')
    assert said[2] == f'2/4 lr_max {best.lr_max:.3g}, policy {best.policy}: done'

def test_trials_are_counted_with_those_that_are_done(tmp_path, quick):
    "What was broken off does not count; another start suggests something else"
    quick.answers = lambda n: 'FAIL' if n == 2 else .5 + n / 100
    with pytest.raises(KeyboardInterrupt): small(tmp_path).run(4, device='cpu', bars=False, say=lambda _: None)
    said = []
    r = small(tmp_path).run(4, device='cpu', bars=False, say=said.append)
    assert said[0].startswith('4 trials, 2 done') and [s.split()[0] for s in said[1:]] == ['3/4', '4/4']
    assert len({c.lr_max for c in quick.seen}) == 5 and r['found']['trials'] == 5 and r['found']['complete'] == 4
    assert small(tmp_path).run(3, device='cpu', bars=False, say=said.append)['found'] == r['found']
    assert said[-1].startswith('3 trials, 3 done') and len(quick.seen) == 5
    for other, says in ((dict(epochs=3), 'epochs=2, not 3'), (dict(tune=('lr_max',)), 'tune=')):
        with pytest.raises(FastcifarError, match=f'a sweep of another configuration .{says}'):
            small(tmp_path, **other).run(4, device='cpu', bars=False, say=said.append)

def test_a_sweep_without_a_finished_trial_has_no_recipe(tmp_path, quick):
    quick.answers = lambda n: 'PRUNED'
    assert small(tmp_path).run(2, device='cpu', bars=False, say=lambda _: None) == {}
    assert (tmp_path/'trials.csv').is_file() and not (tmp_path/'recipe.json').exists()
    with pytest.raises(FastcifarError, match='0 trials: give at least 1'): small(tmp_path).run(0)

def test_twenty_trials_unless_said_otherwise(tmp_path, quick, capfd, monkeypatch):
    "With a bar in a terminal"
    monkeypatch.setattr(sweep, 'save_plot', lambda *_: None)
    small(tmp_path).run(device='cpu', say=lambda _: None)
    assert len(quick.seen) == 20 and 'trial/s' not in capfd.readouterr().err
    small(tmp_path).run(21, device='cpu', bars=True, say=lambda _: None)
    assert 'trial' in capfd.readouterr().err

@pytest.mark.parametrize('epochs, wait', [(2, 1), (7, 1), (8, 2), (24, 6)])
def test_when_a_trial_may_be_given_up(tmp_path, epochs, wait):
    "After a quarter of its epochs, once five are there to compare with"
    pruner = small(tmp_path, epochs=epochs)._storage().pruner
    assert (pruner._n_startup_trials, pruner._n_warmup_steps) == (5, wait)

def test_what_holds_a_sweep(tmp_path):
    f = tmp_path/'sweep.json'
    for content, ours in ((None, False), ('x', False), ('[]', False), ('{"model": 1, "recipe": 2}', False),
        ('["model", "recipe", "tune"]', False), ('{"model": 1, "recipe": 2, "tune": 3, "x": 4}', True)):
        if content: f.write_text(content)
        assert sweep._is_sweep(tmp_path) == ours

def test_picture_of_a_sweep():
    "A panel for each setting, the best trial ringed; rates on a logarithmic axis"
    t = pd.DataFrame(dict(trial=range(4), state=['complete', 'complete', 'pruned', 'complete'],
        valid_accuracy=[.5, .7, np.nan, .6], epochs=2, lr_max=[.1, .2, .3, .4], decay=[1e-6, 1e-5, 1e-4, 1e-3],
        label_smoothing=[0, .1, .2, .3], policy=['none', 'flip', 'none', 'flip']))
    axs = plot_sweep(t).axes
    assert [a.get_xscale() for a in axs] == ['log', 'log', 'linear', 'linear']
    assert [a.get_xlabel() for a in axs] == ['lr max', 'weight decay x learning rate', 'label smoothing', 'policy']
    assert [a.get_ylabel() for a in axs] == ['validation accuracy (%)', '', '', '']
    for a, k in zip(axs[:3], ('lr_max', 'decay', 'label_smoothing')):
        points, best = (c.get_offsets() for c in a.collections)
        done = t[t.state == 'complete']
        wanted = np.sort([done[k], 100 * done.valid_accuracy]).T
        assert np.sort(np.asarray(points), axis=0) == pytest.approx(wanted)
        assert best.tolist() == [pytest.approx([t[k][1], 70])]
    plt.close('all')
