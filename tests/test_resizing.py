"Small images first: which size an epoch has, which nets take it, and that nothing else about a training changes."
import contextlib, dataclasses, io, json, math, os, re, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from fastcifar.basics import FastcifarError, seed_everything
from fastcifar.cli import _show_recipes
from fastcifar.data.images import ImageData
from fastcifar.data.load import Arrays
from fastcifar.models.zoo import create_model, list_models
from fastcifar.runs.config import build_model, configure, upgrade_config
from fastcifar.runs.fit import fit_recipe, recipe_learner
from fastcifar.runs.fused import fused_learner
from fastcifar.runs.recipes import create_recipe
from fastcifar.runs.settings import Config, Recipe
from fastcifar.train.callbacks import ProgressiveResizing, check_sizes

ROOT = Path(__file__).resolve().parents[1]

def size(sizes, epoch, epochs, cbs=()):
    cb = ProgressiveResizing(sizes)
    cb.learn = SimpleNamespace(epoch=epoch, n_epoch=epochs, cbs=cbs)
    return cb.size

@given(st.lists(st.integers(16, 32), min_size=1, max_size=9, unique=True), st.integers(1, 60))
def test_each_size_has_an_equal_part(sizes, epochs):
    "In order, each in as many epochs as any other or one more or less; only the first is in a range test"
    if len(sizes) > epochs:
        with pytest.raises(FastcifarError, match='at most one an epoch'): Recipe(epochs, sizes=sizes).checked()
        return
    Recipe(epochs, sizes=sizes).checked()
    seen = [size(sizes, e, epochs) for e in range(epochs)]
    assert list(dict.fromkeys(seen)) == sizes and len(set(Counter(seen).values())) <= 2
    assert max(Counter(seen).values()) - min(Counter(seen).values()) <= 1
    for i, s in enumerate(sizes): assert seen.index(s) == math.ceil(i * epochs / len(sizes))
    assert {size(sizes, e, epochs, [LRFinder()]) for e in range(epochs)} == {sizes[0]}

def test_eight_epochs_in_three_sizes():
    assert [size((24, 28, 32), e, 8) for e in range(8)] == [24, 24, 24, 28, 28, 28, 32, 32]
    assert [size((24, 24, 32), e, 6) for e in range(6)] == [24, 24, 24, 24, 32, 32]

SMALLEST = dict(normnet31k=20, normnet41k=22, normnet48k=20, sepnet178k=17) # 16 for the others

@pytest.mark.parametrize('name', list_models())
def test_sizes_of_every_net(name):
    "Each net trains at 24 and 28, and on down to the size where its maps vanish; none with a norm that is bound to one"
    least = SMALLEST.get(name, 16)
    net = create_model(name)
    check_sizes(net, range(least, 33))
    if least > 16:
        with pytest.raises(FastcifarError, match=f'cannot be trained on images of {least - 1}x{least - 1} .*choose'):
            check_sizes(net, (least - 1, 32))
    net.train()(torch.randn(4, 3, 24, 24)).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    with pytest.raises(FastcifarError, match='images of 28x28'):
        build_model(configure('one_cycle', name, norm='ln_chw', sizes=(28, 32)), 10)
    build_model(configure('one_cycle', name, norm='ln_chw', sizes=(32,)), 10)

@pytest.mark.parametrize('name, kind', [('custom_resnet', 'amax'), ('speednet', 'amax'), ('sepnet178k', 'mean')])
@pytest.mark.parametrize('side', [24, 28, 32])
def test_a_pool_takes_the_whole_map(name, kind, side):
    "Of whatever size, without what would lie beyond its edge"
    net, seen = create_model(name).eval(), []
    pool = net.pool if name == 'custom_resnet' else net.pool[0]
    pool.register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    with torch.no_grad(): net(torch.randn(2, 3, side, side))
    (x, y), = seen
    assert y.shape[2:] == (1, 1) and torch.allclose(y[..., 0, 0], getattr(x, kind)((2, 3)), atol=1e-6)

# -- what the net sees

def noise(n=40, test=8):
    x = {s: np.random.default_rng(i).integers(0, 256, (k, 32, 32, 3), dtype=np.uint8)
         for i, (s, k) in enumerate((('train', n), ('test', test)))}
    return ImageData(Arrays(x, {s: np.arange(len(v)) % 10 for s, v in x.items()}, list('abcdefghij')), 'noise')

class Seen(Callback):
    "The batches as the net gets them"
    order = 20
    def before_fit(self): self.trained, self.validated = [], []
    def before_batch(self): (self.trained if self.training else self.validated).append(self.x.clone())

def trained(sizes, tfms='batch', epochs=2, precision='fp32', channels_last=False, data=None, seeds=1, net='groupnet'):
    c = configure('fast', net, sizes=sizes, epochs=epochs, bs=10, policy='none', tfms=tfms, precision=precision)
    data = data or noise()
    if seeds > 1:
        learn = fused_learner(data, [dataclasses.replace(c, seed=s) for s in range(seeds)], 'cpu')
    else:
        seed_everything(0)
        dls = data.dataloaders(bs=c.bs, policy=c.policy, device='cpu', tfms=tfms)
        learn = recipe_learner(dls, build_model(c, 10), c, precision=precision, channels_last=channels_last)
    seen = Seen()
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, c, cbs=[seen])
    return learn, seen

@pytest.mark.parametrize('tfms', ['item', 'batch'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_whole_batches_are_resized(tfms, channels_last):
    "After normalization, in the memory format of the batch; the same images in the same order as without sizes"
    small, full = (trained(s, tfms, channels_last=channels_last)[1] for s in ((24, 32), ()))
    assert [len(s.trained) for s in (small, full)] == [8, 8]
    for i, (x, y) in enumerate(zip(small.trained, full.trained)):
        want = F.interpolate(y, (24, 24), mode='bilinear', align_corners=False, antialias=False) if i < 4 else y
        assert torch.equal(x, want)
        form = torch.channels_last if channels_last else torch.contiguous_format
        assert x.is_contiguous(memory_format=form)
    assert all(torch.equal(x, y) and x.shape[-1] == 32 for x, y in zip(small.validated, full.validated, strict=True))

def apart(a, b): return max(float((a[k] - b[k]).norm() / a[k].norm()) for k in a if a[k].ndim > 1)

def test_both_ways_to_make_batches_train_alike():
    "To the rounding of normalization, which differs without sizes as well"
    a, b = (trained((24, 28, 32), tfms, epochs=3)[0].model.state_dict() for tfms in ('item', 'batch'))
    c = trained((), epochs=3)[0].model.state_dict()
    assert apart(a, b) < 1e-4 and apart(a, c) > 1e-2

def test_a_size_of_its_own_is_no_change():
    a, b = (trained(s)[0].model.state_dict() for s in ((32, 32), ()))
    for k in a: assert torch.equal(a[k], b[k]), k

def test_short_numbers():
    "Images stay in float32, and are resized before the net computes in bfloat16"
    learn, seen = trained((16, 32), precision='bf16')
    assert {x.dtype for x in seen.trained} == {torch.float32} and seen.trained[0].shape[-1] == 16
    assert math.isfinite(learn.recorder.values[-1][0])

def test_seeds_in_one_pass():
    "Each as alone, to rounding"
    wide, seen = trained((16, 32), seeds=2)
    assert seen.trained[0].shape == (10, 6, 16, 16) and seen.trained[-1].shape == (10, 6, 32, 32)
    alone = trained((16, 32))[0].model.state_dict()
    assert apart(alone, wide.model.unfuse()[0].state_dict()) < .05

def test_a_net_that_fails_is_left_as_it_was():
    net = create_model('normnet31k').train()
    with pytest.raises(FastcifarError): check_sizes(net, (16,))
    assert net.training and all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())

def test_more_sizes_than_epochs_of_a_fit():
    c = configure('fast', 'groupnet', sizes=(16, 24, 32), bs=10)
    learn = recipe_learner(noise().dataloaders(bs=2, policy='none', device='cpu'), build_model(c, 10), c)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(FastcifarError, match=r'3 sizes of images \(16, 24, 32\) for 2 epochs'): learn.fit(2, 1e-2)
        r = learn.lr_range(show_plot=False, num_it=20) # two epochs
    assert 0 < r.lr_max

# -- runs, as a person makes them

def command(*args): return [sys.executable, '-m', 'fastcifar', *map(str, args)]

TRAIN = ('train --data digits --model normnet31k --norm gn --precision fp32 --epochs 3 --bs 64 --lr-max 1e-2 '
         '--threads 1 --device cpu --no-pictures --sizes 20,24,32 --checkpoint-every 3').split()

def test_killed_and_continued(tmp_path):
    "In the middle of the second epoch: the same weights, to the last bit"
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    subprocess.run(command(*TRAIN, '--out', whole), check=True, capture_output=True, timeout=300)
    p = subprocess.Popen(command(*TRAIN, '--out', killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and not list(killed.glob('checkpoints/epoch_0001_batch*.safetensors')): time.sleep(.02)
    assert p.poll() is None
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    again = subprocess.run(command(*TRAIN, '--out', killed), check=True, capture_output=True, text=True, timeout=300)
    assert 'continuing after ' in again.stdout
    a, b = (load_file(d/'model.safetensors') for d in (whole, killed))
    for k in a: assert torch.equal(a[k], b[k]), k
    h, g = (pd.read_csv(d/'history.csv').drop(columns='seconds') for d in (whole, killed))
    assert h.equals(g)
    assert json.loads((whole/'config.json').read_text())['sizes'] == [20, 24, 32]

def test_two_processes(tmp_path):
    args = ['-m', 'fastcifar', *TRAIN, '--dropout', '0', '--out', tmp_path/'two']
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    done = subprocess.run([*map(str, (*launch, *args))], capture_output=True, text=True, timeout=400, cwd=ROOT,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    one = subprocess.run(command(*TRAIN, '--dropout', 0, '--out', tmp_path/'one'), capture_output=True, timeout=300)
    assert one.returncode == 0
    h, g = (pd.read_csv(tmp_path/n/'history.csv') for n in ('one', 'two'))
    np.testing.assert_allclose(h.train_loss, g.train_loss, atol=.15)

LINES = {
    '--sizes 24,x': "'24,x' is not a list of whole numbers",
    '--sizes 12,32': r'sizes is \[12, 32\]: give whole numbers from 16 to 32',
    '--sizes 24,28,32 --epochs 2': 'sizes has 3 sizes for 2 epochs: give at most one an epoch',
    '--sizes 24,32 --norm ln_chw': r'NormNet31k cannot be trained on images of 24x24 \(.*leave that out of sizes',
    '--sizes 16,32': 'NormNet31k cannot be trained on images of 16x16'}

@pytest.mark.parametrize('args', LINES)
def test_one_line_says_what_is_wrong(args, main, tmp_path):
    "And no run folder is begun"
    code, said, err = main('train', '--data', 'digits', '--model', 'normnet31k', *args.split(), '--out', tmp_path/'run')
    assert code == 2 and not said and err.count('\n') == 1
    assert re.search(LINES[args], err), err
    assert not (tmp_path/'run').exists()

def test_a_range_test_says_its_size(main, tmp_path):
    args = 'find-lr --data digits --model normnet31k --bs 16 --sizes 20,32'.split()
    code, said, err = main(*args, '--plot', tmp_path/'a.png')
    assert code == 0 and said.startswith('images of 20x20, the first size of the training\ndigits') and 'LRMIN' in said, err

def test_where_it_is_shown(main):
    code, said, _ = main('recipes', 'groupnet', '--json')
    assert code == 0 and json.loads(said)['fast']['sizes'] == []
    recipes = {name: dataclasses.asdict(create_recipe('fast', 'groupnet')) | dict(sizes=sizes)
               for name, sizes in (('reference', ()), ('fast', (24, 28, 32)))}
    said = io.StringIO()
    with contextlib.redirect_stdout(said): _show_recipes(recipes, 'groupnet')
    rows = [line.split() for line in said.getvalue().splitlines()]
    assert ['--sizes', '-', '24,28,32'] in rows

def test_runs_from_before_have_none():
    saved = dataclasses.asdict(Config())
    del saved['sizes']
    assert upgrade_config(saved)['sizes'] == []
