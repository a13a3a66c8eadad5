"The public snippet, fastai's own features, and the wheel."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

def test_snippet(tmp_path, monkeypatch):
    "The snippet of the documentation, with the digits, smaller batches and fewer steps"
    monkeypatch.chdir(tmp_path)
    ns = {}
    exec("""
from fastcifar.all import *
data  = load_data('digits')
dls   = data.dataloaders(bs=64)
model = create_model('custom_resnet')
learn = cifar_learner(dls, model)
lrs   = learn.lr_range(num_it=40)
learn.fit_one_cycle(2, **one_cycle(lrs, epochs=2, peak_epoch=1))
rates = list(learn.recorder.lrs)                  # a prediction starts the recorder afresh
ClassificationInterpretation.from_learner(learn).plot_top_losses(10)
""", ns)
    rates, lrs = ns['rates'], ns['lrs']
    assert len(rates) == 2 * 24
    assert rates[0] == pytest.approx(lrs.lr_min) and max(rates) == pytest.approx(lrs.lr_max) and rates[-1] < 2 * lrs.lr_min + .01 * lrs.lr_max

@pytest.fixture(scope='module')
def learn():
    from torch import nn
    from fastcifar.all import cifar_learner, load_data, seed_everything
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))
    learn = cifar_learner(load_data('digits').dataloaders(bs=128, device='cpu'), net)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    return learn

def test_plain_learner_methods(learn, tmp_path):
    "predict, get_preds, validate, show_results, tta, lr_find, export: what fastai users do"
    from fastai.learner import load_learner
    data = learn.dls.data
    with learn.no_bar(), learn.no_logging():
        name, idx, probs = learn.predict(data.x['test'][0])
        assert name == learn.dls.vocab[int(idx)] and abs(float(probs.sum()) - 1) < 1e-4
        preds, targs = learn.get_preds()
        assert preds.shape == (300, 10) and (targs.numpy() == data.y['test']).all()
        assert learn.validate()[1] == pytest.approx(float((preds.argmax(1) == targs).float().mean()))
        learn.show_results(max_n=4)
        assert learn.tta(n=2)[0].shape == (300, 10)
        assert learn.lr_find(show_plot=False, num_it=20).valley > 0
        learn.path = tmp_path
        learn.export('e.pkl')
        again = load_learner(tmp_path/'e.pkl')
        with again.no_bar(): assert again.predict(data.x['test'][0])[0] == name

def test_callbacks_of_fastai_run(learn):
    from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[MixUp(), GradientClip(1.), GradientAccumulation(256), EarlyStoppingCallback()])
    assert len(learn.recorder.values) == 1

def test_wheel_runs_outside_the_checkout(tmp_path):
    "The wheel alone: installed without the checkout on the path, it lists its models and trains"
    pytest.importorskip('build', reason='the dev extra is not installed')
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path/'dist', ROOT], check=True, capture_output=True)
    wheel, = (tmp_path/'dist').glob('*.whl')
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', tmp_path/'site', wheel], check=True)
    code = 'import fastcifar, sys; from fastcifar.cli import main; print(fastcifar.__file__); sys.exit(main(sys.argv[1:]))'
    done = subprocess.run([sys.executable, '-c', code, 'train', '--data', 'digits', '--epochs', '1', '--bs', '256', '--lr-max', '1e-3', '--out', 'r'], cwd=tmp_path, capture_output=True,
                          text=True, env=dict(os.environ, PYTHONPATH=str(tmp_path/'site')))
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path/'site') in done.stdout and (tmp_path/'r/metrics.json').exists()
