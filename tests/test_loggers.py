"TensorBoard and Weights & Biases, switched on by one flag."
import sys, time

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

ARGS = ('train', '--data', 'digits', '--model', 'normnet31k', '--epochs', 2, '--bs', 128, '--lr-max', '1e-2',
        '--threads', 1)

def test_logs_hold_the_history_and_change_nothing(main, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard', reason='the loggers extra is not installed')
    pytest.importorskip('wandb', reason='the loggers extra is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.delenv('WANDB_MODE', raising=False)
    assert main(*ARGS, '--out', tmp_path/'plain')[0] == 0
    code, out, err = main(*ARGS, '--log', 'tensorboard,wandb', '--out', tmp_path/'logged')
    assert code == 0, err
    assert 'checkpoints do not keep' not in out + err
    a, b = (load_file(tmp_path/n/'model.safetensors') for n in ('plain', 'logged'))
    assert all((a[k] == b[k]).all() for k in a)
    h = pd.read_csv(tmp_path/'logged/history.csv')
    events = EventAccumulator(str(tmp_path/'logged/tensorboard'))
    events.Reload()
    assert [s.value for s in events.Scalars('accuracy')] == pytest.approx(h.accuracy.tolist())
    assert [s.value for s in events.Scalars('valid_loss')] == pytest.approx(h.valid_loss.tolist())
    steps = list(range(1, 2 * 12 + 1)) # fastai writes the last step of an epoch again for each batch of the validation
    for name in ('train_loss', 'lr_0'): assert sorted({s.step for s in events.Scalars(name)}) == steps
    assert max(s.value for s in events.Scalars('lr_0')) == pytest.approx(1e-2, rel=.1)
    (kept,) = (tmp_path/'logged/wandb').glob('offline-run-*/*.wandb')
    until = time.monotonic() + 30 # wandb's own process writes, and on a busy machine it ends after ours goes on
    while kept.stat().st_size <= 1000 and time.monotonic() < until: time.sleep(.1)
    assert kept.stat().st_size > 1000

def test_unknown_and_missing_loggers(main, tmp_path, monkeypatch):
    code, out, err = main(*ARGS, '--log', 'tensorbord', '--out', tmp_path/'a')
    assert code == 2 and "did you mean 'tensorboard'?" in err and len(err.splitlines()) == 1
    assert not (tmp_path/'a').exists()
    monkeypatch.setitem(sys.modules, 'wandb', None)
    code, out, err = main(*ARGS, '--log', 'wandb', '--out', tmp_path/'b')
    assert code == 2 and "--log wandb needs wandb: pip install 'fastcifar[loggers]'" in err
