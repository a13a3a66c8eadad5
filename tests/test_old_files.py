"What version 0.1 has written still opens: runs, checkpoints, studies, sweeps, recipes."
import json, zipfile
from pathlib import Path

import pytest

from fastcifar.runs.config import configure
from fastcifar.runs.recipes import read_recipe
from fastcifar.runs.reopen import evaluate_run, report_run
from fastcifar.runs.run import train_run
from fastcifar.runs.folder import run_config
from fastcifar.study.study import Study
from fastcifar.study.sweep import Sweep

def quiet(*args): pass

@pytest.fixture
def old(tmp_path):
    "The files, and what they gave when they were made"
    zipfile.ZipFile(Path(__file__).parent/'made_by_0.1.zip').extractall(tmp_path)
    return tmp_path, json.loads((tmp_path/'expected.json').read_text())

def test_a_run_that_was_broken_off_goes_on(old):
    folder, expected = old
    c = run_config(folder/'begun')
    assert (c.update_norm, c.bias_lr_mult, c.tta) == (.5, .5, 'crops')
    metrics = train_run(c, folder/'begun', threads=1, device='cpu', bars=False, pictures=False, say=quiet)
    said = expected['continued']
    assert metrics['epochs'] == said['epochs']
    assert abs(metrics['test_accuracy'] - said['test_accuracy']) < .02
    assert abs(metrics['test_loss'] - said['test_loss']) < .02
    first = (folder/'begun/history.csv').read_text().splitlines()[1]
    assert first.startswith('1,2.2700207')

def test_a_study_keeps_its_runs(old):
    folder, expected = old
    run = folder/'study/runs/normnet31k-bn-fast-bs256-seed0'
    made = (run/'metrics.json').stat().st_mtime_ns
    s = Study(folder/'study', 'normnet31k', 'digits', ('bn',), ('fast',), 1, 256, epochs=1)
    r = s.run(bars=False, say=quiet)
    assert list(r.status) == ['finished'] and (run/'metrics.json').stat().st_mtime_ns == made
    assert abs(r.test_accuracy[0] - expected['study']['test_accuracy']) < 1e-6
    i = evaluate_run(run, device='cpu', bars=False)
    assert abs(i.loss - expected['study']['test_loss']) < 1e-3
    report_run(run, device='cpu', bars=False, say=quiet)
    assert 'normnet31k' in (run/'report.html').read_text()

def test_a_sweep_goes_on(old):
    pytest.importorskip('optuna', reason='the extra sweep is not installed')
    folder, _ = old
    s = Sweep(folder/'sweep', 'normnet31k', 'digits', 'fast', ['lr_max'], epochs=1, bs=256, valid=200)
    found = s.run(trials=1, device='cpu', bars=False, say=quiet)
    assert found['found']['trials'] == 1

@pytest.mark.parametrize('file', ['recipe.json', 'speedrun.json', 'sweep/recipe.json'])
def test_recipes_are_read(old, file):
    folder, _ = old
    saved, c = json.loads((folder/file).read_text()), configure(**read_recipe(folder/file))
    assert (c.recipe, c.model, c.lr_max) == (saved['recipe'], saved['model'], saved['settings']['lr_max'])
    assert c.update_norm == saved['settings']['spectral']
