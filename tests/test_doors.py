"Other tools open what is here: torch.hub, the hub of model cards, plain torch."
import re, runpy, subprocess, sys, textwrap
from pathlib import Path

import pytest
import torch

from fastcifar import __version__
from fastcifar.models.zoo import count_parameters, create_model, list_models

ROOT = Path(__file__).resolve().parents[1]

def test_torch_hub_lists_and_makes_the_nets(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    entries = runpy.run_path(str(ROOT/'hubconf.py'))
    assert all(name in entries and entries[name].__doc__.startswith(name) for name in list_models())
    net = torch.hub.load(str(ROOT), 'groupnet', source='local', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), create_model('groupnet', pretrained=True).eval()(x))
    assert torch.hub.load(str(ROOT), 'normnet31k', source='local', norm='gn', n_out=7)(x).shape == (2, 7)

def test_the_citation_and_the_tools_page_name_this_version():
    page = (ROOT/'nbs/pages/which_tool.ipynb').read_text()
    assert f'version = {{{__version__}}}' in page
    assert f'fastcifar is at version {__version__.rsplit(".", 1)[0]} |' in page
    largest = max(count_parameters(create_model(name)) for name in list_models())
    assert f"fastcifar's largest has {largest / 1e6:.1f} million parameters" in page

@pytest.fixture(scope='module')
def shared(tree, tmp_path_factory):
    "An exported folder with a torch.export program"
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    from fastcifar.share.export import export_run
    folder = tmp_path_factory.mktemp('shared')
    c = configure('fast', 'normnet31k', data=str(tree), epochs=1, bs=20)
    train_run(c, folder/'run', device='cpu', bars=False, pictures=False, say=lambda *_: None)
    export_run(folder/'run', folder/'out', onnx=False, pt2=True)
    return folder/'out'

def test_the_card_has_metadata_that_the_hub_takes(shared):
    hub = pytest.importorskip('huggingface_hub', reason='it comes with the extra demo')
    card = hub.ModelCard.load(shared/'README.md')
    data = card.data.to_dict()
    assert data['library_name'] == 'fastcifar' and data['pipeline_tag'] == 'image-classification'
    assert 'cifar10' not in data.get('datasets', []) # it was trained on something else

def test_plain_torch_opens_the_program(shared):
    "By the lines that its card shows, without fastcifar"
    card = (shared/'README.md').read_text()
    lines = re.search(r'(?:^ {4}.+\n)+', card[card.index('`model.pt2`'):], re.M)[0]
    assert lines.count('\n') <= 5
    code = textwrap.dedent(lines) + ("print(tuple(probabilities.shape), round(float(probabilities.sum()), 3), "
                                     "'fastcifar' in __import__('sys').modules)")
    done = subprocess.run([sys.executable, '-c', code], cwd=shared, capture_output=True, text=True)
    assert done.stdout.strip() == '(2, 3) 2.0 False', done.stderr[-500:]
