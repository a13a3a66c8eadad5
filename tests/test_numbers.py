"Every number that is said of a run, a study or a sweep, worked out a second time in another way."
import json, re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from fastcifar.data.load import load_data
from fastcifar.data.images import stratified_holdout
from fastcifar.interpret.interpretation import CifarInterpretation, plot_curves
from fastcifar.interpret.corruptions import robustness
from fastcifar.study.statistics import paired_differences, plot_differences, plot_study_curves, study_answer, study_summary

VALID = 100

def predicted(model, images, mean, std, tta='flip'):
    "Logits of uint8 images, without anything of the library but the net"
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad(): return (model(x) + model(x.flip(3))) / 2 if tta == 'flip' else model(x)

def measured(logits, y):
    "Accuracy and cross-entropy"
    y = torch.as_tensor(np.array(y)).long()
    return float((logits.argmax(1) == y).double().mean()), float(F.cross_entropy(logits.double(), y))

def wilson(right, n, level=.95):
    "Wilson's interval from its formula"
    z, p = stats.norm.ppf((1 + level) / 2), right / n
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [(p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]

@pytest.fixture(scope='module')
def splits():
    data = load_data('digits')
    kept, held = stratified_holdout(data.y['train'], VALID)
    return dict(train=(data.x['train'][kept], data.y['train'][kept]),
        valid=(data.x['train'][held], data.y['train'][held]), test=(data.x['test'], data.y['test']))

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A short training with held-out images and test-time views, which change what the digits, no mirror images, are taken for"
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    out = tmp_path_factory.mktemp('numbers')/'run'
    c = configure('fast', 'normnet31k', data='digits', epochs=3, bs=64, valid=VALID, tta='flip', precision='fp32',
        label_smoothing=.1)
    said = []
    m = train_run(c, out, threads=1, device='cpu', bars=False, say=said.append)
    return SimpleNamespace(out=out, m=m, said=said)

def test_metrics_of_a_run(run, splits):
    "Test, training and held-out images, all with the views of the recipe, after the last epoch"
    from fastcifar.models.zoo import load_model
    model, m = load_model(run.out), run.m
    def of(split, tta='flip'):
        x, y = splits[split]
        return measured(predicted(model, x, model.note['mean'], model.note['std'], tta), y)
    for name, split in (('test', 'test'), ('train', 'train'),
        ('valid', 'valid')): assert m[f'{name}_accuracy'] == pytest.approx(of(split)[0], abs=1e-9), name
    for name in ('test', 'train'): assert m[f'{name}_loss'] == pytest.approx(of(name)[1], abs=1e-4), name
    assert (m['tta'], m['train_tta'], m['test_images'], m['valid_images']) == ('flip', 'flip', 300, VALID)
    assert m['wrong'] == 300 - round(300 * m['test_accuracy']) == len(pd.read_csv(run.out/'wrong_predictions.csv'))
    history = pd.read_csv(run.out/'history.csv')
    assert history.accuracy.iloc[-1] == pytest.approx(of('valid', 'none')[0], abs=1e-6) # while training: one view
    different = {m['test_accuracy'], m['valid_accuracy'], m['train_accuracy'], *history.accuracy, of('test', 'none')[0]}
    assert len(different) == 4 + len(history), 'the test can tell them apart'
    assert f'test accuracy {m["test_accuracy"]:.2%}' in run.said[-1] and 'test-time views: flip' in run.said[-1]

def test_page_of_a_run(run):
    "The interval is one of 95%, and what has views says so"
    page = re.sub(r'\s+', ' ', (run.out/'report.html').read_text())
    right = 300 - run.m['wrong']
    low, high = wilson(right, 300)
    assert f'{100 * low:.2f} to {100 * high:.2f}%' in page and 'test-time views: flip' in page
    assert f'{run.m["train_accuracy"]:.2%} (test-time views: flip)' in page
    for line in pd.read_csv(run.out/'class_accuracy.csv').itertuples():
        assert (line.low, line.high) == pytest.approx(wilson(line.right,
            line.images)) and line.accuracy == line.right / line.images

def test_evaluation_and_robustness_of_a_run(run, main, monkeypatch, tmp_path):
    "The same views for clean and corrupted images: a corruption that does nothing costs nothing, in our own and in published files"
    monkeypatch.setattr('fastcifar.interpret.corruptions.corrupt', lambda images, *_: images.copy())
    res = json.loads(main('evaluate', run.out, '--device', 'cpu', '--robustness', 60, '--json')[1])
    assert res['test_accuracy'] == run.m['test_accuracy'] and res['tta'] == 'flip'
    (right, tta), = {(r['right'], r['tta']) for r in res['robustness']}
    assert tta == 'flip' and all((r['low'], r['high']) == pytest.approx(wilson(right, 60)) for r in res['robustness'])
    data = load_data('digits')
    (tmp_path/'c').mkdir()
    np.save(tmp_path/'c/labels.npy', np.tile(data.y['test'], 5))
    for name in ('fog', 'spatter'): np.save(tmp_path/f'c/{name}.npy', np.concatenate([data.x['test']] * 5))
    code, out, err = main('evaluate', run.out, '--device', 'cpu', '--corruptions', tmp_path/'c', '--json')
    assert code == 0 and {r['right'] for r in json.loads(out)['robustness']} == {300 - run.m['wrong']}
    assert f'mean corruption error of {tmp_path/"c"}: {1 - run.m["test_accuracy"]:.2%}' in err
    code, out, err = main('evaluate', run.out, '--device', 'cpu', '--corruptions', tmp_path, '--json')
    assert code == 2 and err.count('\n') == 1 and 'holds no corruptions' in err

def test_exported_card(run, tmp_path):
    from fastcifar.share.export import export_run
    export_run(run.out, tmp_path/'e', onnx=False)
    low, high = wilson(300 - run.m['wrong'], 300)
    card = (tmp_path/'e/README.md').read_text()
    assert f'| {run.m["test_accuracy"]:.2%} | {low:.2%} to {high:.2%} |' in card and 'test-time views: flip' in card

def test_formats_are_compared_on_all_classes(tree, main):
    "Files come sorted by class"
    from fastcifar.share.export import _test_images
    assert main('train', '--data', tree, '--model', 'normnet31k', '--epochs', 1, '--bs', 20, '--lr-max', '1e-3',
        '--no-pictures', '--out', 'r')[0] == 0
    data, images = load_data(tree), _test_images('r', None, 6)
    labels = [int(data.y['test'][(np.asarray(data.x['test']) == im).all((1, 2, 3))][0]) for im in images]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert len(_test_images('r', None, 50)) == 24 + 26

def test_sweep(tmp_path, monkeypatch):
    "Trials are judged on the held-out images, with the views of the recipe, and the best is what is written"
    import fastcifar.study.sweep as sweep
    from fastcifar.data.load import Arrays
    from fastcifar.data.images import ImageData
    digits, nets = load_data('digits'), []
    few = Arrays({k: v[:n] for (k, v), n in zip(digits.x.items(), (300, 100))},
        {k: v[:n] for (k, v), n in zip(digits.y.items(), (300, 100))}, digits.classes)
    data = ImageData(few, 'digits', policy=digits.policy)
    monkeypatch.setattr(sweep, 'load_data', lambda *_: data)
    def fit(learn, *args, fit=sweep.fit_recipe, **kwargs):
        fit(learn, *args, **kwargs)
        nets.append((learn.model.eval(), learn.dls.stats))
    monkeypatch.setattr(sweep, 'fit_recipe', fit)
    s = sweep.Sweep(tmp_path/'s', 'normnet31k', 'digits', tune=('lr_max',), valid=100, epochs=2, bs=16, tta='flip',
        precision='fp32')
    r = s.run(3, threads=1, device='cpu', bars=False, say=lambda _: None)
    t = pd.read_csv(tmp_path/'s/trials.csv')
    held = stratified_holdout(data.y['train'], 100)[1]
    def of(x, y, tta='flip'): return [measured(predicted(net, x, *map(list, norm), tta), y)[0] for net,
        norm in nets]
    mine = of(data.x['train'][held], data.y['train'][held])
    assert t.valid_accuracy.tolist() == pytest.approx(mine, abs=1e-9)
    others = of(data.x['test'], data.y['test']), of(data.x['train'][held], data.y['train'][held], 'none')
    assert len(set(mine)) == 3 and mine not in others, 'the test can tell them apart'
    best = t.loc[t.valid_accuracy.idxmax()]
    assert (r['found']['valid_accuracy'], r['settings']['lr_max']) == pytest.approx((best.valid_accuracy, best.lr_max))
    assert (r['found']['tta'], r['found']['valid_images']) == ('flip', 100)

def test_sweep_that_judged_without_views_is_not_gone_on_with(tmp_path):
    from fastcifar.basics import FastcifarError, read_json, write_json
    from fastcifar.study.sweep import Sweep
    digits = load_data('digits')
    for tta, refused in (('none', False), ('flip', True)):
        s = Sweep(tmp_path/tta, 'normnet31k', 'digits', valid=VALID, tta=tta)
        (tmp_path/tta).mkdir()
        s._settle(digits)
        old = read_json(tmp_path/tta/'sweep.json')
        del old['judged_with_views'] # as older versions wrote it
        write_json(tmp_path/tta/'sweep.json', old)
        if not refused: s._settle(digits)
        else:
            with pytest.raises(FastcifarError, match="judged_with_views='none', not 'flip'"): s._settle(digits)

def interpretation(p, right):
    "Predictions of two classes with these probabilities, right or wrong"
    preds = torch.tensor([[v, 1 - v] for v in p])
    targs = torch.tensor([0 if r else 1 for r in right])
    learn = SimpleNamespace(dls=SimpleNamespace(vocab=['a', 'b']))
    dl = SimpleNamespace(vocab=['a', 'b'])
    interp = CifarInterpretation.__new__(CifarInterpretation)
    interp.__dict__.update(learn=learn, dl=dl, preds=preds, targs=targs, decoded=preds.argmax(1), vocab=['a', 'b'],
        losses=-preds.gather(1, targs[:, None]).log().squeeze(1), tta='none')
    return interp

def test_calibration_error():
    "Too sure in one bin and not sure enough in another do not cancel out"
    i = interpretation([.6] * 10 + [.9] * 10,
        [True] * 9 + [False] + [True] * 6 + [False] * 4) # 60% sure and 90% right, and the other way round
    assert i.ece(10) == pytest.approx(.3, abs=1e-6)
    t = i.calibration(10)
    assert t.confidence.tolist() == pytest.approx([.6, .9]) and t.accuracy.tolist() == [.9,
        .6] and t.images.tolist() == [10, 10]
    assert t.low.tolist() == pytest.approx([wilson(9, 10)[0],
        wilson(6, 10)[0]]) and t.high.tolist() == pytest.approx([wilson(9, 10)[1], wilson(6, 10)[1]])

def lines(ax): return {l.get_label(): np.asarray(l.get_ydata()).tolist() for l in ax.get_lines()}

def test_curves_have_their_labels():
    h = pd.DataFrame(dict(epoch=[1, 2], train_loss=[2., 1.], valid_loss=[3., 4.], train_accuracy=[.1, .2],
        accuracy=[.3, .4]))
    loss, accuracy = plot_curves(h, 'validation').axes
    while_training = 'train (while training, augmented)'
    assert lines(loss) == {while_training: [2, 1], 'validation': [3, 4]} and loss.get_ylabel() == 'loss'
    assert lines(accuracy) == {while_training: pytest.approx([10, 20]),
        'validation': pytest.approx([30, 40])} and accuracy.get_ylabel() == 'accuracy (%)'
    c = pd.DataFrame([dict(model='m', norm=n, recipe='r', bs=8, seed=s, epoch=e, accuracy=a + .01 * s + .1 * e) for n,
        a in (('bn', .5), ('gn', .2)) for s in (0, 1) for e in (1, 2)])
    ax = plot_study_curves(c, 'validation').axes[0]
    assert lines(ax) == {'bn (n = 2)': pytest.approx([60.5, 70.5]),
        'gn (n = 2)': pytest.approx([30.5, 40.5])} and ax.get_ylabel() == 'validation accuracy (%)'
    assert not [t for t in ax.get_xticks() if t % 1], 'whole epochs'
    plt.close('all')

def results(**accuracies):
    "Runs of some norms, a list of accuracies in percent each, by seed; None where a seed is missing"
    return pd.DataFrame([dict(model='m', norm=k, recipe='r', bs=8, seed=s, status='finished',
        test_accuracy=v / 100) for k, vs in accuracies.items() for s, v in enumerate(vs) if v is not None])

def test_a_cell_counts_what_failed_and_how_soon_it_learned():
    "Medians of the epochs to each accuracy, over finished runs alone"
    t = results(a=[70., 71., 72., 60., 61.]).assign(epochs_to_60=[3, 5, 4, 1, 1], epochs_to_70=[9, 7, 8, 1, 1])
    t.loc[[3, 4], 'status'] = 'failed'
    s = study_summary(t).iloc[0]
    assert (s.n, s.failed, s.epochs_to_60, s.epochs_to_70) == (3, 2, 4, 8) and s['mean'] == pytest.approx(71)

def test_a_group_is_compared_by_its_own_differences():
    "What holds for one net is not said of another"
    first = results(a=[80., 81., 82., 80.5], b=[60., 61.2, 62.1, 60.4])
    second = results(a=[50., 51., 52., 50.], b=[50., 51., 52., 50.]).assign(model='other')
    answer = study_answer(pd.concat([first, second], ignore_index=True))
    lines = {l.split(',')[0]: l for l in answer if 'n = 4' in l}
    assert 'a > b' in lines['m'] and 'a > b' not in lines['other'] and 'no difference' in lines['other']

def test_differences_against_scipy():
    a, b = [70.1, 71.2, 72.4, 70.9], [69.5, 70.1, 71.9, 69.0]
    d, = paired_differences(results(a=a, b=b)).to_dict('records')
    theirs = stats.ttest_rel(a, b)
    low, high = theirs.confidence_interval(.95)
    assert (d['p'], d['p_holm'], d['low'], d['high'], d['difference']) == pytest.approx((theirs.pvalue, theirs.pvalue,
        low, high, np.mean(a) - np.mean(b)))
    s = study_summary(results(a=a)).iloc[0]
    assert (s.low, s.high) == pytest.approx(stats.t.interval(.95, 3, np.mean(a), stats.sem(a))) and (s['mean'],
        s.sd) == pytest.approx((np.mean(a), np.std(a, ddof=1)))

def test_intervals_stay_within_what_is_possible():
    "Three runs, one of them much worse: Student's interval alone would go on to 109%"
    t = study_summary(results(a=[99.5, 98.9, 91.2], b=[0.4, 0.2, 6.]))
    assert t.high.iloc[0] == 100 and t.low.iloc[1] == 0 and 80 < t.low.iloc[0] < 91 and 6 < t.high.iloc[1] < 20
    d = paired_differences(results(a=[100., 100., 60.], b=[0., 0., 0.])).iloc[0]
    assert d.high == 100 and -100 <= d.low < 86

def test_answer_goes_by_corrected_p_values():
    "A difference that stands alone, but not among three pairs"
    r = results(a=[70.0, 71.0, 72.0, 73.0], b=[69.5, 70.1, 71.8, 72.5], c=[69.0, 71.8, 71.0, 73.5])
    d = paired_differences(r)
    best = d.loc[d.p.idxmin()]
    assert best.p < .05 < best.p_holm and study_answer(r)[0].endswith('no difference is supported by these runs')
    assert 'ranking: a > b' in study_answer(r[r.norm != 'c'])[0], 'of two, it stands'
    fig = plot_differences(d).axes[0]
    assert all(l.get_markerfacecolor() == 'white' for l in fig.get_lines() if l.get_marker() == 'o')
    plt.close('all')

def test_answer_says_what_the_table_says():
    "Each pair by the seeds that both have, whatever a third value lacks"
    bn, gn = [90.1, 90.4, 89.8, 90.2, 90.0, 90.3], [88.0, 88.5, 87.8, 88.1, 88.0, 88.2]
    for ln in ([89.0, 89.9], [None] * 6 + [89.0, 89.1], [None, 88.1, 87.7, 88.0]):
        r = results(bn=bn, gn=gn, ln=ln)
        d, said = paired_differences(r), study_answer(r)[0]
        claims = {(a, b): float(size) for a, b, size in re.findall(r'(\w+) > (\w+) by ([\d.]+) points', said)}
        table = {(t.a, t.b) if t.difference > 0 else (t.b,
            t.a): abs(t.difference) for t in d.itertuples() if t.p_holm < .05}
        assert table and claims == pytest.approx(table, abs=.005), said
        assert ('bn', 'gn') in claims and f'bn {np.mean(bn):.2f}% (n = 6)' in said and f'(n = {np.count_nonzero([v is not None for v in ln])})' in said
        two = [f'{a} and {b}' for a, b, n in (('bn', 'ln', sum(v is not None for v in ln[:6])), ('gn', 'ln',
            sum(v is not None for v in ln[:6]))) if n < 2]
        assert all(pair in said for pair in two)

def test_answer_says_what_else_differs():
    r = pd.concat([results(a=[70, 71], b=[69, 70]).assign(recipe=k, bs=b, epochs=e, tta=v, data='digits') for k, b, e,
        v in (('fast', 128, 10, 'none'), ('reference', 512, 50., 'flip'))])
    said = study_answer(r, 'recipe')
    assert said[2:] == [f'm, {k}: the runs compared differ in {what} as well' for k in 'ab' for what in ('tta (flip, none)', 'epochs (10, 50)', 'batch size (128, 512)')]
    assert not any('as well' in line for line in study_answer(r, 'norm'))

def test_page_of_a_study(tmp_path):
    "It says over what p-values are corrected, and with which views accuracy was measured"
    from fastcifar.runs.report import write_study_report
    r = results(a=[70., 71.], b=[69., 70.5]).assign(tta='flip', folder=None)
    page = write_study_report(tmp_path, r, study_summary(r).reset_index(), paired_differences(r), study_answer(r),
        {}).read_text()
    assert 'over all pairs of a factor, and of that factor alone' in page and 'test-time views: flip' in page

def test_tables_name_the_views(run, tmp_path):
    from fastcifar.study.tables import collect_runs
    assert collect_runs([run.out])[['tta', 'train_tta']].values.tolist() == [['flip', 'flip']]
    m = json.loads((run.out/'metrics.json').read_text())
    del m['train_tta'] # a run of an older version, whose training images were seen once
    for f in ('config.json', 'history.csv'): (tmp_path/f).write_text((run.out/f).read_text())
    (tmp_path/'metrics.json').write_text(json.dumps(m))
    assert collect_runs([tmp_path])[['tta', 'train_tta']].values.tolist() == [['flip', 'none']]
