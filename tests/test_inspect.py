"Receptive fields that are claimed, against those that gradients show, for operations put together at random."
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from fastcifar.models.summary import trace

SIZE, CHANNELS = 12, 2

def drawn(x, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(x.dtype)

def conv(x, kernel=(3, 3), **kwargs): return F.conv2d(x, drawn(x, CHANNELS, x.shape[1], *kernel), **kwargs)

def squeezed(x): return x * x.mean((2, 3), keepdim=True).sigmoid()

OPS = dict(
    conv=lambda x: conv(x, padding=1), strided=lambda x: conv(x, stride=2, padding=1),
    wide=lambda x: conv(x, dilation=2),
    flat_kernel=lambda x: conv(x, (1, 3)), point=lambda x: conv(x, (1, 1)),
    residual=lambda x: x + conv(x, padding=1).tanh(),
    avg=lambda x: F.avg_pool2d(x, 2), overlapping=lambda x: F.avg_pool2d(x, 3, 2, 1),
    most=lambda x: F.max_pool2d(x, 3, 1),
    to_3=lambda x: F.adaptive_avg_pool2d(x, 3), to_5=lambda x: F.adaptive_avg_pool2d(x, 5),
    to_1=lambda x: F.adaptive_avg_pool2d(x, 1),
    squeeze=squeezed, branches=lambda x: torch.cat([x, conv(x, (3, 1), padding=(1, 0))], 1),
    shuffle=lambda x: F.channel_shuffle(x, 2),
    tanh=torch.tanh, turn=lambda x: x.mT, behind=lambda x: x.permute(0, 2, 3, 1),
    before=lambda x: x.permute(0, 3, 1, 2),
    tokens=lambda x: x.flatten(2), maps=lambda x: x.unflatten(-1, (-1, SIZE)),
    linear=lambda x: F.linear(x, drawn(x, 3, x.shape[-1])),
    vector=lambda x: x.flatten(1), columns=lambda x: x.mean(2, keepdim=True), last=lambda x: x.mean(-1),
    spread=lambda x: x.norm(dim=1, keepdim=True),
    mixed=lambda x: drawn(x, 4, x.shape[-2]) @ x, softmax=lambda x: x.softmax(-1), softmax_1=lambda x: x.softmax(1),
    cumsum=lambda x: x.cumsum(-2),
    sort=lambda x: x.sort(-1).values, fft=lambda x: torch.fft.rfft2(x).abs(), unfold=lambda x: x.unfold(-1, 2, 1),
    roll=lambda x: x.roll(2, -1),
    cut=lambda x: x[..., 1:], every=lambda x: x[..., ::2], first=lambda x: x[..., :1], row=lambda x: x[:, :, 1],
    border=lambda x: F.pad(x, (2, 1)),
    mirror=lambda x: F.pad(x, (1, 1, 1, 1), mode='reflect'), shifted=lambda x: x[..., 1:] - x[..., :-1],
    stretched=lambda x: x + x[..., -1:],
    half=lambda x: x[..., :x.shape[-1] // 2] + x[..., ::2], attention=lambda x: x @ x.mT,
    larger=lambda x: F.interpolate(x, scale_factor=2))

class Composed(nn.Module):
    def __init__(self, names): super().__init__(); self.names = names
    def forward(self, x):
        for name in self.names: x = OPS[name](x)
        return x * 1.5

def seen(net, positions):
    "The most rows, and the most columns, that lie between the first and last pixel with a gradient for one value"
    torch.manual_seed(0)
    x = torch.randn(1, CHANNELS, SIZE, SIZE, dtype=torch.double, requires_grad=True)
    values, spans = net(x).flatten(), []
    for p in positions:
        g, = torch.autograd.grad(values[int(p * (len(values) - 1))], x, retain_graph=True)
        hits = [g.abs().sum(dims)[0].nonzero().flatten() for dims in ((1, 3), (1, 2))]
        spans.append([int(h.max() - h.min()) + 1 if len(h) else 0 for h in hits])
    return [max(s) for s in zip(*spans)]

def claimed(net):
    fields = trace(net, CHANNELS, SIZE)[-1].after
    return fields and [f.size for f in fields]

@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=5))
def test_no_field_is_too_small(names):
    net = Composed(names)
    try: spans = seen(net, [0, .13, .37, .5, .71, .93, 1])
    except (RuntimeError, IndexError, ValueError): assume(False) # shapes that do not fit
    fields = claimed(net)
    assert fields is None or all(f >= s for f, s in zip(fields, spans)), (names, fields, spans)

@pytest.mark.parametrize('names,fields', [
    ('conv strided wide', [13, 13]), ('flat_kernel turn flat_kernel', [3, 3]), ('squeeze', [12, 12]),
    ('residual avg', [4, 4]), ('turn cut row', [1, 1]),
    ('to_3 conv', [12, 12]), ('behind linear before', [1, 1]), ('linear', [1, 12]), ('mixed', [12, 1]),
    ('tokens maps', [1, 1]), ('tokens linear', [12, 12]),
    ('shifted', [1, 2]), ('first', [1, 1]), ('to_1 sort fft', [12, 12]), ('vector linear', [12, 12]),
    ('stretched', [1, 12]), ('border avg', [2, 2])])
def test_fields_that_are_known(names, fields):
    "And no larger than the truth, or there would be no use in them"
    net = Composed(names.split())
    assert claimed(net) == fields
    if names != 'to_3 conv': assert seen(net, [0, .5, 1]) <= fields
