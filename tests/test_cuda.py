"""What only a GPU can show: the same batches as on a CPU, no waiting for the GPU within a step, exact continuation,
whole benchmarks."""
import contextlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

if not torch.cuda.is_available(): pytest.skip('these tests need a CUDA GPU', allow_module_level=True)

from fastcifar.all import (Arrays, ImageData, Stopped, Study, cifar_learner, configure, create_model, create_recipe,
                           fit_recipe, load_data, recipe_learner, seed_everything, train_run)
from fastcifar.bench.run import run_bench
from fastcifar.runs.fused import fused_learner

GPU = 'cuda'

def stop_after(n):
    "What raises an error in step `n` of a training"
    from fastai.callback.core import Callback
    class Stop(Callback):
        order, stateless = 90, True
        def after_batch(self):
            if self.training and self.learn.train_iter == n: raise Stopped('enough', 2)
    return Stop()

@pytest.mark.parametrize('policy', ['crop_flip_cutout', 'small_crop_altflip', 'shift_scale_rotate_black'])
def test_batches_are_those_of_the_cpu(policy):
    here, there = ([b for b in load_data('digits').dataloaders(bs=128, policy=policy, seed=1, device=d).train]
                   for d in ('cpu', GPU))
    for (x, y), (u, v) in zip(here, there, strict=True):
        assert u.is_cuda and torch.equal(y, v.cpu())
        apart = (x - u.cpu()).abs() # a rotation may round a pixel to its neighbour's value
        assert apart.max() < .05 and (apart > 1e-5).float().mean() < .01

@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('compile', [False, True])
def test_learns(precision, compile):
    seed_everything(0)
    learn = cifar_learner(load_data('digits').dataloaders(bs=64, device=GPU), create_model('groupnet'),
                          precision=precision, compile=compile)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 1e-2)
    assert learn.recorder.values[-1][-1] > .8

@pytest.mark.parametrize('name, recipe',
                         [('custom_resnet', 'fast'), ('speednet', 'speedrun'), ('normnet31k', 'reference')])
def test_no_step_waits_for_the_gpu(name, recipe):
    "Twenty steps without the host ever asking for a number; the check for NaN, every fifty, is left out"
    x = np.random.default_rng(0).integers(0, 256, (24 * 64, 32, 32, 3), dtype=np.uint8)
    data = ImageData(Arrays(dict(train=x, test=x[:64]), dict(train=np.arange(len(x)) % 10, test=np.arange(64) % 10),
                            [str(i) for i in range(10)]), 'noise')
    r = create_recipe(recipe, name, bs=64, epochs=1)
    learn = recipe_learner(data.dataloaders(bs=64, policy=r.policy, device=GPU), create_model(name), r)
    from fastai.callback.core import Callback
    class Watch(Callback):
        order = -90
        def before_batch(self):
            if self.training: torch.cuda.set_sync_debug_mode('error' if 2 <= self.iter < 22 else 'default')
        def after_train(self): torch.cuda.set_sync_debug_mode('default')
    try:
        with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, cbs=[Watch()])
    finally: torch.cuda.set_sync_debug_mode('default')

@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_continues_exactly(precision, tmp_path):
    "A deterministic training that was stopped within an epoch ends bit-equal"
    c = configure('fast', 'groupnet', data='digits', epochs=2, precision=precision, dropout=.1)
    whole = train_run(c, tmp_path/'whole', device=GPU, deterministic=True, pictures=False, say=lambda s: None)
    with pytest.raises(Stopped):
        with pytest.MonkeyPatch.context() as m:
            import fastcifar.runs.run as runs
            m.setattr(runs, '_loggers', lambda *a: contextlib.nullcontext([stop_after(18)]))
            train_run(c, tmp_path/'parts', device=GPU, deterministic=True, pictures=False, checkpoint_every=5,
                      say=lambda s: None)
    parts = train_run(c, tmp_path/'parts', device=GPU, deterministic=True, pictures=False, say=lambda s: None)
    a, b = (load_file(tmp_path/f'{name}/model.safetensors') for name in ('whole', 'parts'))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert {k: v for k, v in whole.items() if k != 'seconds'} == {k: v for k, v in parts.items() if k != 'seconds'}

def test_nets_in_one_pass():
    configs = [configure('fast', 'normnet31k', seed=s, bs=64, epochs=3, dropout=.05) for s in range(4)]
    learn = fused_learner(load_data('digits'), configs, torch.device(GPU))
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, configs[0])
    assert (learn.each_net.history[-1, :, -1] > .6).all()

def test_study_uses_every_gpu(tmp_path):
    said = []
    study = Study(tmp_path/'study', 'normnet31k', 'digits', ('bn', 'gn'), seeds=2, epochs=1)
    r = study.run(bars=False, pictures=False, say=said.append)
    assert set(r.status) == {'finished'} and f'cuda:{torch.cuda.device_count() - 1}' in said[0]

def test_benchmarks():
    "Both GPU rows of the speedrun, on digits, and the waiting of whole epochs"
    rows = {r['name']: r for r in run_bench('speedrun', device=GPU, data='digits', n=2)['rows']}
    assert set(rows) == {'gpu/custom_resnet_s', 'gpu/speednet_s'} and all(r['ratio'] > 0 for r in rows.values())
    rows = run_bench('epoch', rounds=1, device=GPU)['rows']
    assert {r['name'] for r in rows} == {'wait/normnet31k', 'wait/custom_resnet'}
