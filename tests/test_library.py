"The public snippet, fastai's own features, and the wheel."
import importlib, json, os, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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

def test_plain_learner_methods(learn):
    "predict, get_preds, validate, show_results, tta, lr_find: what fastai users do"
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

OPENED = '''
import json, os, sys
from fastai.learner import load_learner
from fastcifar.basics import FastcifarError
from PIL import Image
assert not os.listdir(os.environ['FASTCIFAR_CACHE'])
for pickled in sys.argv[2:]:
    learn, image = load_learner(pickled), Image.open(sys.argv[1])
    with learn.no_bar():
        name, _, probs = learn.predict(image)
        both, _ = learn.get_preds(dl=learn.dls.test_dl([sys.argv[1], image], bs=2))
        try: learn.predict(0)
        except FastcifarError as e: said = str(e)
    print(json.dumps(dict(name=name, probs=[probs.tolist(), *both.tolist()], vocab=list(learn.dls.vocab), said=said,
                          here=[len(learn.dls.train_ds), len(learn.dls.data.x['train'])])))
assert not os.listdir(os.environ['FASTCIFAR_CACHE'])
'''

def test_an_export_holds_no_images_and_needs_none(learn, tree, tmp_path):
    "Opened by another process, with an empty cache and the images gone: from memory and from the cache, on both paths"
    from fastcifar.all import cifar_learner, load_data, nn
    image = Image.open(sorted((tree/'test').rglob('*.png'))[0]).resize((50, 40))
    image.save(tmp_path/'image.png')
    shutil.copytree(tree, tmp_path/'images')
    data, learners = load_data(tmp_path/'images'), [learn]
    for tfms in ('item', 'batch'):
        dls = data.dataloaders(bs=16, device='cpu', tfms=tfms, num_workers=2)
        learners.append(cifar_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))))
    files, expected = [], []
    for i, l in enumerate(learners):
        with l.no_bar(), l.no_logging():
            l.fit(1, 1e-3)
            expected.append(l.predict(image))
        l.path, images = tmp_path, [x for s in ('train', 'test') for x in l.dls.data.x[s]]
        l.export(f'{i}.pkl')
        files.append(tmp_path/f'{i}.pkl')
        pickled = files[-1].read_bytes()
        texts = (x.tobytes() for x in images) # protocol 2 writes bytes as the text of their Latin letters
        assert not any(t in pickled or t.decode('latin1').encode() in pickled for t in texts)
        weights = sum(p.numel() * p.element_size() for p in l.model.parameters())
        assert len(pickled) < weights + 150_000 < weights + sum(x.nbytes for x in images)
        assert len(l.dls.data.x['train']) == len(l.dls.train_ds) > 0, 'the learner itself keeps its data'
    shutil.rmtree(tmp_path/'images')
    shutil.rmtree(os.environ['FASTCIFAR_CACHE'])
    (tmp_path/'empty').mkdir()
    done = subprocess.run([sys.executable, '-c', OPENED, tmp_path/'image.png', *files], capture_output=True, text=True,
                          env=dict(os.environ, FASTCIFAR_CACHE=str(tmp_path/'empty')))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
    assert len(lines) == 3
    for got, (name, _, probs), l in zip(lines, expected, learners):
        assert got['name'] == name and got['vocab'] == list(l.dls.vocab) and got['here'] == [0, 0]
        for row in got['probs']: assert row == pytest.approx(probs.tolist(), abs=1e-5)
        assert 'there is no image 0' in got['said'] and 'give a file' in got['said']

def test_other_sizes_and_item_transforms(tree):
    "fastai's item transforms come after the policy, which is made for 32x32; the batch path makes way for them"
    import torch
    import albumentations as A
    from fastcifar.all import Resize, ToTensor, load_data, policy_transform
    data, mean_std = load_data(tree), lambda dls: [torch.tensor(v).view(3, 1, 1) for v in dls.stats]
    def images(dl, dls):
        mean, std = mean_std(dls)
        x = torch.cat([x for x, _ in dl])
        return ((x * std + mean) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    for tfms in ('item', 'batch'):
        make = lambda policy: data.dataloaders(bs=16, policy=policy, tfms=tfms, device='cpu')
        dls = make('crop_flip_cutout')
        dls.add_tfms([Resize(64)], 'after_item')
        assert [dl.one_batch()[0].shape for dl in dls.loaders] == [(16, 3, 64, 64)] * 2
        large = [Image.fromarray(x).resize((64, 64), Image.Resampling.BILINEAR) for x in data.x['test']]
        assert np.abs(images(dls.valid, dls).astype(int) - np.stack(large)).max() <= 1
        dls.show_batch(max_n=2)
        narrow = make('none')
        narrow = narrow.train.new(after_item=[Resize((16, 24)), *narrow.train.after_item.fs])
        assert narrow.one_batch()[0].shape == (16, 3, 16, 24)
        # a policy that is taken away, replaced, or joined by another
        dls = make('crop_flip_cutout')
        turned = policy_transform([A.VerticalFlip(p=1)])
        plain = images(dls.train.new(after_item=[ToTensor()], shuffle=False), dls)
        assert (plain == data.x['train']).all()
        other = images(dls.train.new(after_item=[turned, ToTensor()], shuffle=False), dls)
        assert (other == data.x['train'][:, ::-1]).all()
        dls = make('none')
        dls.add_tfms([turned], 'after_item', 'train')
        assert (images(dls.train.new(shuffle=False), dls) == data.x['train'][:, ::-1]).all()

def test_labels_of_files(tree, tmp_path):
    "`test_dl(files, with_labels=True)`: the label of a file is its folder"
    from fastcifar.all import FastcifarError, cifar_learner, get_image_files, load_data, nn
    dls = load_data(tree).dataloaders(bs=16, device='cpu')
    learn = cifar_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)))
    files = get_image_files(tree/'test').sorted(reverse=True)
    for items in (files, [str(f) for f in files]):
        dl = learn.dls.test_dl(items, with_labels=True)
        labels = [int(y) for _, ys in dl for y in ys]
        assert [learn.dls.vocab[y] for y in labels] == [f.parent.name for f in files]
    with learn.no_bar(), learn.no_logging():
        preds, targs = learn.get_preds(dl=dl)
        assert learn.validate(dl=dl)[1] == pytest.approx(float((preds.argmax(1) == targs).float().mean()))
    shutil.copy(files[0], tmp_path/'stray.png')
    with pytest.raises(FastcifarError, match='is no class .blue, green, red.: leave out with_labels'):
        learn.dls.test_dl([tmp_path/'stray.png'], with_labels=True).one_batch()
    with pytest.raises(FastcifarError, match='PILImage|PngImageFile has no label'):
        learn.dls.test_dl([Image.open(files[0])], with_labels=True).one_batch()

def test_the_star_import_replaces_no_name():
    "Neither one of fastai, nor one that its user had before, nor one of ours by another of ours"
    import fastai.vision.all as theirs
    import fastcifar.all as both
    names = {n: o for n, o in vars(theirs).items() if not n.startswith('_')}
    html = {n for n, o in names.items() if both._is_html(o)}
    assert {'A', 'P', 'Div'} <= html and not html & {'L', 'F', 'Image', 'Path', 'nn', 'Learner', 'Transform', 'Resize'}
    assert [n for n, o in names.items() if getattr(both, n) is not o] == []
    assert set(names) - set(both.__all__) == html
    modules = re.findall(r'^from \.([\w.]+) import \*', Path(both.__file__).read_text(), re.M)
    public = [(n, m, getattr(importlib.import_module(f'fastcifar.{m}'), n)) for m in modules
              for n in importlib.import_module(f'fastcifar.{m}').__all__]
    assert len(public) > 200
    lost = [(n, m) for n, m, o in public if getattr(both, n, None) is not o]
    assert sorted(lost) == [('Config', 'runs.settings'), ('MAX_TOTAL', 'data.archive'), ('MAX_TOTAL', 'share.predict'),
                            ('ResBlock', 'models.custom_resnet'), ('load_model', 'models.zoo'),
                            ('save_model', 'models.zoo'), ('trace', 'models.summary')]
    import albumentations
    mine = {}
    exec('import albumentations as A\nfrom fastcifar.all import *', mine)
    assert mine['A'] is albumentations and mine['load_data'] is both.load_data and 'MAX_TOTAL' not in mine

def test_distrib_ctx_takes_what_fastai_takes(learn, monkeypatch):
    import inspect
    from fastcifar.all import FastcifarError
    given = {n: p.default for n, p in inspect.signature(learn.distrib_ctx).parameters.items()}
    assert given['sync_bn'] is True and given['in_notebook'] is False and given['cpu'] is False
    with learn.distrib_ctx(True, in_notebook=True, cpu=True) as same: assert same is learn
    with pytest.warns(UserWarning, match='split_batches: no effect here'):
        with learn.distrib_ctx(sync_bn=False, split_batches=True): pass
    with pytest.raises(FastcifarError, match="did you mean 'sync_bn'"):
        with learn.distrib_ctx(sync_b=True): pass
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no') # notebook_launcher sets it, for one process too
    with learn.distrib_ctx(in_notebook=True): pass

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

def test_a_compiled_net_trains_what_is_trained_now(monkeypatch):
    "torch's programs do not look at what is frozen: one that was written while a part was frozen would never train it"
    import functools
    import torch
    from fastcifar.models.zoo import create_model
    from fastcifar.device import compile_net
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager')) # quicker, and as forgetful
    net, x = create_model('speednet', widths=(8, 8, 8)), torch.randn(8, 3, 32, 32)
    net.init_whitening(torch.randn(50, 3, 32, 32))
    net.whiten.bias.requires_grad_(False)
    compile_net(net, 'cpu')
    for trained in (False, True, False, True):
        net.whiten.bias.requires_grad_(trained)
        for p in net.parameters(): p.grad = None
        for _ in range(2): net(x).square().mean().backward()
        assert (net.whiten.bias.grad is not None) == trained and net.head.weight.grad is not None
