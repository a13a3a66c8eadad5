"What is written for others: an exported folder, its card, and the comparison of its formats."
import json, os, shutil, stat, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from fastcifar.share import export
from fastcifar.basics import FastcifarError, file_sha256
from fastcifar.share.export import compare_predictions, export_run, model_card

class Says:
    "A predictor with these answers"
    where = 'model.onnx'
    def __init__(self, p): self.p = np.array(p)
    def __call__(self, images): return self.p

@pytest.mark.parametrize('other, most, says', [
    ([[.6, .4], [.3, .7]], 1e-4, 0), ([[.60005, .39995], [.3, .7]], 1e-4, 5e-5),
    ([[.7, .3], [.3, .7]], 1e-4, 'up to 0.1 in'), ([[.7, .3], [.3, .7]], .2, .1),
    ([[.45, .55], [.3, .7]], .5, 'in 1 of 2 predictions'),
    ([[.4, .6], [.7, .3]], 1., 'in 2 of 2 predictions')])
def test_formats_have_to_agree(other, most, says):
    "In their probabilities, and in what they take an image for"
    args = Says([[.6, .4], [.3, .7]]), Says(other), np.zeros((2, 32, 32, 3), np.uint8), most
    if isinstance(says, str):
        with pytest.raises(FastcifarError, match=f'model.onnx differs .*{says}'): compare_predictions(*args)
    else: assert compare_predictions(*args) == pytest.approx(says)

def test_equal_classes_may_change_places():
    "Two classes that are as likely as each other: rounding decides, which nobody is to blame for"
    a, b, images = Says([[.5, .5]]), Says([[.49999, .50001]]), np.zeros((1, 32, 32, 3), np.uint8)
    assert compare_predictions(a, b, images) == pytest.approx(1e-5)
    with pytest.raises(FastcifarError, match='in 1 of 1 predictions'): compare_predictions(b, a, images, 1.)

def about(**more):
    "What config.json of an export has, as far as the card says it"
    metrics = dict(test_accuracy=.75, test_images=200, wrong=50, parameters=31_000, data='birds', data_sha256='a' * 64,
        recipe='fast', epochs=3, bs=64, precision='fp32', seed=5)
    env = dict(device_name='a CPU', versions=dict(torch='2.11', fastcifar='0.1'))
    return dict(architecture=dict(name='normnet31k', norm='bn'), classes=['auk', 'owl'], tta='flip', metrics=metrics,
        environment=env) | more

def test_a_card_says_what_was_measured():
    low, high = binomtest(150, 200).proportion_ci(method='wilson')
    card = model_card(about())
    assert f'| 75.00% | {low:.2%} to {high:.2%} | 5 | 1 |' in card and 'Classes: auk, owl.' in card
    assert f'The data was birds (SHA-256 `{"a" * 64}`)' in card and 'onnx' not in card and '31,000 parameters' in card
    assert 'tags: [image-classification, fastai, pytorch]' in card and 'test-time views: flip' in card
    named = about(metrics=about()['metrics'] | dict(data_sha256='the digits of scikit-learn'))
    assert 'The data was birds (the digits of scikit-learn)' in model_card(named)
    with_onnx = model_card(about(onnx=dict(opset=18, images=300, max_difference=2e-6)))
    assert 'pytorch, onnx]' in with_onnx and '(opset 18)' in with_onnx and 'differ by at most 2e-06' in with_onnx

@pytest.mark.parametrize('n', [20, 21])
def test_a_card_lists_up_to_twenty_classes(n):
    card = model_card(about(classes=[f'class{i}' for i in range(n)]))
    assert ('class19' in card) == (n == 20) and (f'{n} classes, listed in config.json' in card) == (n > 20)

@pytest.fixture(scope='module')
def run(tree, tmp_path_factory):
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    out = tmp_path_factory.mktemp('shared')/'run'
    train_run(configure('fast', 'normnet31k', data=str(tree), epochs=1, bs=20, tta='flip'), out, bars=False,
        pictures=False, threads=1, device='cpu', say=lambda _: None)
    return out

def test_a_folder_to_share(run):
    "Beside the run unless another place is given; what it holds, and how the files are sealed"
    c = export_run(run, onnx=False)
    out = run.with_name('run-export')
    assert json.loads((out/'config.json').read_text()) == json.loads(json.dumps(c))
    assert {p.name for p in out.iterdir()} == {'README.md', 'config.json', 'model.safetensors'} and 'onnx' not in c
    assert c['files'] == {'model.safetensors': file_sha256(out/'model.safetensors')}
    assert (out/'README.md').read_text() == model_card(c)
    m = json.loads((run/'metrics.json').read_text())
    assert {k: v for k, v in c['metrics'].items() if k != 'n'}.items() <= m.items() and c['metrics']['n'] == 1
    assert (c['tta'], c['classes'], c['architecture']['name']) == ('flip', ['blue', 'green', 'red'], 'normnet31k')
    assert c['training'] == json.loads((run/'config.json').read_text()) and len(c['mean']) == len(c['std']) == 3
    ours = (Path(run.parent)/'plain')
    ours.mkdir()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(ours.stat().st_mode), 'as any folder that is made'
    assert not [p for p in run.parent.iterdir() if p.name.startswith('.')]

def test_where_a_run_went_on(run, tmp_path):
    "Only what differs from where it was begun"
    copy = shutil.copytree(run, tmp_path/'run')
    env = json.loads((copy/'environment.json').read_text())
    first = env['starts'][0]
    ours, old = first['versions'], dict(first['versions'], torch='1.0')
    env['starts'] += [dict(first, epoch=1), dict(first, epoch=1, device_name='another CPU'),
        dict(first, batch=3, versions=old), dict(first, epoch=0, device_name='one that trained nothing of it')]
    (copy/'environment.json').write_text(json.dumps(env))
    c = export_run(copy, onnx=False)
    assert [list(w) for w in c['continued']] == [['another CPU', ours['torch'], ours['fastcifar']],
        [first['device_name'], '1.0', ours['fastcifar']]]
    card = (tmp_path/'run-export/README.md').read_text()
    assert card.count('It was continued on ') == 2 and 'continued on another CPU' in card

def test_what_a_killed_export_has_left_goes(run, tmp_path):
    "And nothing else that lies there"
    dead = subprocess.run([sys.executable, '-c', 'import os; print(os.getpid())'], capture_output=True, text=True)
    with export._exporting(tmp_path/'e') as tmp:
        name = tmp.name[:-12].replace(f'-{os.getpid()}-', f'-{dead.stdout.strip()}-')
        left, at_work = tmp.with_name(f'{name}0123abcd.tmp'), tmp.with_name(f'{tmp.name[:-12]}0123abcd.tmp')
        with pytest.raises(FastcifarError, match='another process is exporting'), export._exporting(tmp_path/'e'): pass
    assert not list(tmp_path.iterdir())
    others = [left.with_name(left.name.replace('0123abcd', n)) for n in ('0123abcx', '0123abcd1')]
    others.append(at_work)
    for f in (left, *others): f.mkdir(), (f/'x').write_text('')
    file, link = (left.with_name(left.name.replace('0123abcd', n)) for n in ('00000000', '11111111'))
    file.write_text('a file'), link.symlink_to(others[0])
    export_run(run, tmp_path/'e', onnx=False)
    assert set(tmp_path.iterdir()) == {tmp_path/'e', *others, file, link} and (others[0]/'x').is_file()

def test_a_folder_to_share_with_a_long_name(run, tmp_path):
    out = tmp_path/('x' * 250)
    export_run(run, out, onnx=False)
    assert (out/'model.safetensors').is_file() and [p.name for p in tmp_path.iterdir()] == [out.name]

def test_a_program_alone(run, tree, tmp_path):
    "Compared with the net as well, on images of the run, wherever they lie now"
    c = export_run(run, tmp_path/'new/e', onnx=False, pt2=True, data=str(tree))
    assert list(c['files']) == ['model.pt2', 'model.safetensors'] and 'onnx' not in c
    assert all(v == file_sha256(tmp_path/'new/e'/k) for k, v in c['files'].items())
    with pytest.raises(FastcifarError, match='for comparing formats'): export_run(run, tmp_path/'f', False,
        data=str(tree))

@pytest.mark.parametrize('missing', ['onnx', 'onnxscript'])
def test_what_onnx_needs_is_said(run, tmp_path, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(FastcifarError, match='writing ONNX') as e: export_run(run, tmp_path/'e')
    assert "fastcifar[onnx]" in str(e.value) and not list(tmp_path.iterdir())
