"The custom ResNet is the references' net: the same answers with the same weights."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastcifar.layers import NORMS
from fastcifar.models.zoo import count_parameters, create_model

VECTORS = json.loads((Path(__file__).parent/'net_vectors.json').read_text())

def fill(net):
    "Known weights, drawn in the order in which the layers first run"
    order, hooks = [], []
    for m in net.modules():
        if not list(m.children()): hooks.append(m.register_forward_hook(lambda m, i, o: order.append(m) if m not in order else None))
    net.eval()(torch.zeros(1, 3, 32, 32))
    for h in hooks: h.remove()
    r = np.random.RandomState(0)
    put = lambda t, v: t.data.copy_(torch.from_numpy(np.asarray(v, np.float32)))
    for m in order:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            put(m.weight, r.standard_normal(m.weight.shape) * np.sqrt(2 / m.weight[0].numel()))
            if m.bias is not None: put(m.bias, 0.1 * r.standard_normal(m.bias.shape))
        elif isinstance(m, nn.BatchNorm2d):
            c = m.num_features
            put(m.weight, 1 + 0.1 * r.standard_normal(c)); put(m.bias, 0.1 * r.standard_normal(c))
            put(m.running_mean, 0.1 * r.standard_normal(c)); put(m.running_var, 1 + 0.1 * r.random_sample(c))
    return net

@pytest.mark.parametrize('key,kwargs', [('custom_resnet/bn', {}), ('custom_resnet/bn/bias', dict(bias=True)), ('custom_resnet/bn/shared', dict(shared=True))])
def test_answers(key, kwargs):
    net = fill(create_model('custom_resnet', **kwargs))
    assert count_parameters(net) == VECTORS[key]['parameters']
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((4, 3, 32, 32)).astype(np.float32))
    with torch.no_grad(): got = net(x).log_softmax(1).numpy()
    want = np.array(VECTORS[key]['log_probs'])
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()

@pytest.mark.parametrize('norm', NORMS)
def test_every_norm_in_every_place(norm):
    net = create_model('custom_resnet', norm=norm, n_out=7, n_in=1)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    kind = {'bn': nn.BatchNorm2d, 'ln_chw': nn.LayerNorm, 'none': nn.Identity}.get(norm, nn.GroupNorm)
    norms = [m for n, m in net.named_modules() if n.endswith('.norm')]
    assert len(norms) == 8 and all(type(m) is kind for m in norms)
    if kind is nn.GroupNorm: assert [m.num_groups for m in norms] == {'ln': [1] * 8, 'gn': [32] * 8, 'in': [64, 128, 128, 128, 256, 512, 512, 512]}[norm]
