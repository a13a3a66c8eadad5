"The nets are the references' nets: the same layers, the same counts, and the same answers with the same weights."
import json, math, os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastcifar.models.summary import summarize, trace
from fastcifar.models.zoo import count_parameters, create_model, list_models, model_entry

ROOT = Path(__file__).resolve().parents[1]
REAL = os.environ.get('FASTCIFAR_DATA') # fixtures hide it from the tests
VECTORS, TABLES = (json.loads((Path(__file__).parent/f'net_{n}.json').read_text()) for n in ('vectors', 'tables'))

def fill(net):
    "Known weights, drawn in the order in which the layers first run"
    order = []
    def note(m, x, y):
        if m not in order: order.append(m)
    hooks = [m.register_forward_hook(note) for m in net.modules() if not list(m.children())]
    net.eval()(torch.zeros(1, 3, 32, 32))
    for h in hooks: h.remove()
    r = np.random.RandomState(0)
    def put(t, v): t.data.copy_(torch.from_numpy(np.asarray(v, np.float32)))
    for m in order:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            put(m.weight, r.standard_normal(m.weight.shape) * np.sqrt(2 / m.weight[0].numel()))
            if m.bias is not None: put(m.bias, 0.1 * r.standard_normal(m.bias.shape))
        elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
            c = len(m.weight)
            put(m.weight, 1 + 0.1 * r.standard_normal(c)); put(m.bias, 0.1 * r.standard_normal(c))
            if isinstance(m, nn.BatchNorm2d):
                put(m.running_mean, 0.1 * r.standard_normal(c))
                put(m.running_var, 1 + 0.1 * r.random_sample(c))
    return net

@pytest.mark.parametrize('key', VECTORS)
def test_answers(key):
    name, norm, *flags = key.split('/')
    net = fill(create_model(name, norm=norm, **{f: True for f in flags}))
    assert count_parameters(net) == VECTORS[key]['parameters']
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((4, 3, 32, 32)).astype(np.float32))
    with torch.no_grad(): got = net(x).log_softmax(1).numpy()
    want = np.array(VECTORS[key]['log_probs'])
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max()

MAIN = ('Conv2d', 'MaxPool2d', 'AvgPool2d', 'AdaptiveAvgPool2d', 'Linear', 'add')

def table_of(net):
    "The net as the reference tables have it: a row for each convolution, pool and addition, with what follows it"
    modules, rows = dict(net.named_modules()), []
    for r in trace(net):
        m = modules.get(r.layer)
        if r.kind in MAIN:
            conv, io, window = isinstance(m, nn.Conv2d), [None, None], [None] * 3
            if conv: io = [m.in_channels, m.out_channels]
            if r.kind == 'Linear': io = [m.in_features, m.out_features]
            if conv or r.kind in ('MaxPool2d', 'AvgPool2d'):
                window = [v[0] if v else None for v in (r.kernel, r.stride, r.padding)]
            bias, dilation = (m.bias is not None) if io[0] else None, r.dilation[0] if conv else None
            rows.append([r.kind, *io, *window, dilation, r.groups, bias, [], r.parameters, 0, list(r.output),
                         r.after[0].size, r.after[0].jump])
        elif isinstance(m, nn.BatchNorm2d):
            rows[-1][9].append(f'norm({m.num_features})')
            rows[-1][11] += r.parameters
        elif isinstance(m, nn.ReLU): rows[-1][9].append('ReLU')
        elif isinstance(m, nn.Dropout): rows[-1][9].append(f'drop {m.p:g}')
    return rows

@pytest.mark.parametrize('name', TABLES)
def test_every_row_of_the_reference_tables(name):
    got, want = table_of(create_model(name)), TABLES[name]
    for g, w in zip(got, want):
        if w[0] == 'Linear': w = w[:-2] + g[-2:] # the tables end before it
        assert g == w
    assert len(got) == len(want)

# The receptive-field table that the authors of sepnet178k published, with its two shortcuts where they are: in parallel
# field in, size in, jump in, stride, padding, kernel, dilation, field, size, jump
FIELDS_178K = [
    (1, 32, 1, 1, 1, 3, 1, 3, 32, 1), (3, 32, 1, 1, 0, 1, 1, 3, 32, 1), (3, 32, 1, 1, 1, 3, 1, 5, 32, 1),
    (5, 32, 1, 1, 0, 1, 1, 5, 32, 1), (5, 32, 1, 2, 1, 3, 1, 7, 16, 2), (7, 16, 2, 1, 0, 1, 1, 7, 16, 2),
    (7, 16, 2, 1, 1, 3, 1, 11, 16, 2), (11, 16, 2, 1, 0, 1, 1, 11, 16, 2), (11, 16, 2, 2, 1, 3, 1, 15, 8, 4),
    (15, 8, 4, 1, 0, 1, 1, 15, 8, 4), (15, 8, 4, 1, 1, 3, 1, 23, 8, 4), (23, 8, 4, 1, 0, 1, 1, 23, 8, 4),
    (15, 8, 4, 1, 0, 1, 1, 15, 8, 4), (23, 8, 4, 1, 0, 3, 2, 39, 4, 4), (39, 4, 4, 1, 0, 1, 1, 39, 4, 4),
    (39, 4, 4, 1, 1, 3, 1, 47, 4, 4), (47, 4, 4, 1, 0, 1, 1, 47, 4, 4), (39, 4, 4, 1, 0, 1, 1, 39, 4, 4),
    (47, 4, 4, 4, 0, 4, 1, 59, 1, 16)]

def test_published_field_table():
    rows = [r for r in trace(create_model('sepnet178k')) if r.kernel]
    assert len(rows) == 19
    size = {r.layer: r.output[1] for r in rows}
    for r, published in zip(rows, FIELDS_178K):
        field_in, size_in, jump_in, stride, padding, kernel, dilation, field, out, jump = published
        assert (r.before[0].size, r.before[0].jump) == (field_in, jump_in)
        assert (r.stride[0], r.padding[0], r.kernel[0], r.dilation[0]) == (stride, padding, kernel, dilation)
        assert (r.after[0].size, r.output[1], r.after[0].jump) == (field, out, jump)
        assert (size_in + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 == out

KINDS = {'bn': nn.BatchNorm2d, 'ln_chw': nn.LayerNorm, 'ln': nn.GroupNorm, 'gn': nn.GroupNorm, 'in': nn.GroupNorm}
NETS_AND_NORMS = [(name, norm) for name in list_models() for norm in model_entry(name).norms]

def norms_of(net): return [m for m in net.modules() if isinstance(m, tuple(KINDS.values()))]

@pytest.mark.parametrize('name,norm', NETS_AND_NORMS)
def test_every_norm_everywhere(name, norm):
    "A norm of this kind, and of no other, wherever the net has one; each with a scale and a shift of its own"
    net = create_model(name, norm=norm, n_out=7, n_in=1)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    own = norms_of(net)
    assert all(isinstance(m, KINDS[norm]) for m in own)
    assert len(own) == (0 if norm == 'none' else len(norms_of(create_model(name))) or len(own))
    if norm == 'ln': assert {m.num_groups for m in own} == {1}
    if norm == 'in': assert all(m.num_groups == m.num_channels for m in own)
    for m in own:
        if norm == 'ln_chw': assert count_parameters(m) == 2 * math.prod(m.normalized_shape)
        elif norm != 'bn': assert count_parameters(m) == 2 * m.num_channels
        elif m.weight is not None and m.weight.requires_grad: assert count_parameters(m) == 2 * m.num_features
    if 'none' in model_entry(name).norms:
        bare = create_model(name, norm='none', n_out=7, n_in=1)
        assert count_parameters(net) == count_parameters(bare) + sum(map(count_parameters, own))

def test_nets_of_the_references_have_norms():
    "speednet's batch norm learns no scale, the others' do"
    for name in ('normnet31k', 'sepnet178k', 'groupnet', 'custom_resnet', 'speednet'):
        n = {count_parameters(m) / m.num_features for m in norms_of(create_model(name))}
        assert n == {1 if name == 'speednet' else 2}, name

GROUPS = dict(normnet31k=4, normnet41k=8, normnet48k=4, sepnet178k=4, custom_resnet=32)

@pytest.mark.parametrize('name', GROUPS)
def test_default_groups(name):
    assert {m.num_groups for m in norms_of(create_model(name, norm='gn'))} == {GROUPS[name]}

@pytest.mark.parametrize('name', list_models())
def test_summary_counts_every_parameter_once(name):
    net = create_model(name)
    t = summarize(net)
    assert t.parameters.sum() == sum(p.numel() for p in net.parameters())
    assert (t.MACs > 0).sum() >= sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())

@pytest.mark.parametrize('name', list_models())
def test_multiply_accumulates_are_weights_times_positions(name):
    net, seen = create_model(name), 0
    for r in trace(net):
        m = dict(net.named_modules()).get(r.layer)
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            assert r.macs == m.weight.numel() * math.prod(r.output[1:])
            seen += 1
    assert seen == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules())

@pytest.mark.parametrize('name,norm', NETS_AND_NORMS)
def test_budgets(name, norm):
    "What a net was registered with holds with every norm but one, which has a scale at each position"
    if norm != 'ln_chw': assert count_parameters(create_model(name, norm=norm)) <= model_entry(name).budget

def test_budgets_of_ours_are_those_of_the_references():
    "And the smallest budget comes first"
    budgets = {name: model_entry(name).budget for name in list_models()}
    assert budgets['groupnet'] == budgets['normnet41k'] == 41_026 and budgets['fastnet200k'] == 200_000
    assert list(budgets.values()) == sorted(budgets.values())
    assert count_parameters(create_model('custom_resnet', norm='none')) == 6_568_650

def test_fastnet_sees_the_whole_image_without_max_pools():
    rows = [r for r in trace(create_model('fastnet200k')) if r.kernel]
    assert rows[-1].kind == 'AdaptiveAvgPool2d' and rows[-1].before[0].size > 44
    assert not [r for r in rows if 'Max' in r.kind]

def test_damaged_package_weights_are_noticed(tmp_path, monkeypatch):
    import shutil
    import fastcifar.models.zoo as zoo
    shutil.copytree(zoo._folder, tmp_path/'w')
    monkeypatch.setattr(zoo, '_folder', tmp_path/'w')
    key = next(iter(zoo._pretrained()))
    name, norm = key.rsplit('-', 1)
    create_model(name, norm=norm, pretrained=True)
    f = tmp_path/'w'/f'{key}.safetensors'
    f.write_bytes(f.read_bytes()[:-1] + b'x')
    with pytest.raises(zoo.FastcifarError, match='is damaged'): create_model(name, norm=norm, pretrained=True)
    with pytest.raises(zoo.FastcifarError, match='there are no trained weights of custom_resnet'):
        create_model('custom_resnet', pretrained=True)

def test_package_weights_agree_with_the_records_or_are_announced():
    "A net trained on the lossless set has its record; while there is another, the docs say so and show no accuracy of it"
    import fastcifar.models.zoo as zoo
    from fastcifar.data.fetch import ARCHIVES
    from fastcifar.runs.replay import records_table
    records = records_table(*ROOT.glob('results/lossless/*.jsonl'))
    notebook = json.loads((ROOT/'nbs/models/07_zoo.ipynb').read_text())['cells']
    announced = any('JPEG-coded copy' in ''.join(c['source']) for c in notebook if c['cell_type'] == 'markdown')
    shown = json.dumps([c.get('outputs') for c in notebook])
    for key, row in zoo._pretrained().items():
        if row['data_sha256'] != ARCHIVES['cifar10'].content:
            assert announced and f'{row["test_accuracy"]:.4f}' not in shown, key
            continue
        cell = records[(records.model + '-' + records.norm == key) & (records.recipe == row['recipe'])]
        same = cell[cell.seed == row['seed']].iloc[0]
        for k in ('test_accuracy', 'epochs', 'parameters', 'precision', 'data'): assert same[k] == row[k], (key, k)
        assert (len(cell), round(cell.test_accuracy.mean(), 6)) == (row['n'], row['mean_accuracy']), key

@pytest.mark.skipif(not REAL, reason='FASTCIFAR_DATA names no CIFAR-10 archive')
def test_package_weights_do_what_their_note_says():
    "On the real images, if they are at hand: the accuracy in the index, to the rounding of another machine"
    from fastcifar.data.load import load_data
    import fastcifar.models.zoo as zoo
    data = load_data(REAL)
    for key, row in zoo._pretrained().items():
        if not data.known_as(row['data_sha256']): continue
        name, norm = key.rsplit('-', 1)
        net = create_model(name, norm=norm, pretrained=True).eval()
        mean, std = (torch.tensor(net.note[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
        x = torch.from_numpy(np.array(data.x['test'])).permute(0, 3, 1, 2)
        y = torch.from_numpy(np.array(data.y['test']))
        def right(pixels, targets): return (net((pixels / 255 - mean) / std).argmax(1) == targets).sum().item()
        with torch.inference_mode(): total = sum(map(right, x.split(500), y.split(500)))
        assert abs(total / len(y) - row['test_accuracy']) < 0.002, key
