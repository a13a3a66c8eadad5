"""The nets for `torch.hub.load('fastcifar/fastcifar', 'groupnet', pretrained=True)`, each under its name."""
from fastcifar.models.zoo import create_model, list_models

dependencies = ['torch', 'torchvision', 'fastai', 'albumentations', 'safetensors', 'filelock']

def _entry(name):
    def make(pretrained=False, **options): return create_model(name, pretrained=pretrained, **options)
    make.__name__ = name
    make.__doc__ = f'{name} for 32x32 RGB images; `pretrained`, `norm`, `n_out` and the rest as in `create_model`'
    return make

globals().update({name: _entry(name) for name in list_models()})
