"""What parts and settings of the speedrun recipe bring: trials on a part of the training images; writes a table that
names its data by their hash.

    python tools/ablations.py DATA OUT.csv [SEEDS]
"""
import sys, time
from pathlib import Path

import pandas as pd
from torch import nn

from fastcifar.train.tta import TTA
from fastcifar.basics import seed_everything
from fastcifar.data.load import load_data
from fastcifar.data.images import stratified_holdout
from fastcifar.models.zoo import create_model
from fastcifar.runs.recipes import create_recipe
from fastcifar.runs.fit import fit_recipe, recipe_learner

TRAIN, VALID, EPOCHS = 10_000, 5_000, 4
FIRST = 'the recipe' # every other one changes one thing

def plain_filters(net):
    "A first layer as torch makes it, trained like the others"
    net.prepared.fill_(True)
    net.whiten.weight.requires_grad_(True)

def plain_convolutions(net):
    "No identity in the 3x3 convolutions"
    for m in net.features:
        if isinstance(m, nn.Conv2d): m.reset_parameters()

def quick_head(net):
    "No factor behind the head; it begins with the same answers"
    net.head.weight.data.mul_(net.scale)
    net.scale = 1.

VARIANTS = { # name: (settings of the recipe, what is done to the net)
    FIRST: ({}, None),
    'momentum 0.9': ({'mom': 0.9}, None),
    'half the rate': ({'lr_max': 0.01, 'lr_min': 0.01, 'lr_end': 1e-5}, None),
    'twice the rate': ({'lr_max': 0.04, 'lr_min': 0.04, 'lr_end': 4e-5}, None),
    "updates of Adam's size": ({'update_norm': 0.}, None),
    'filters of any size': ({'unit_filters': False}, None),
    'head as quick as the rest': ({}, quick_head),
    'without whitening': ({'freeze': ()}, plain_filters),
    'without identity': ({}, plain_convolutions),
    'without both': ({'freeze': ()}, lambda net: (plain_filters(net), plain_convolutions(net))),
    'random flips': ({'policy': 'small_crop_flip'}, None),
    'without label smoothing': ({'label_smoothing': 0.}, None),
    'Adam, rate 0.002': ({'optimizer': 'adam', 'lr_max': 0.002, 'lr_min': 2e-4, 'lr_end': 2e-6, 'peak': 0.05}, None),
    'Adam, rate 0.005': ({'optimizer': 'adam', 'lr_max': 0.005, 'lr_min': 5e-4, 'lr_end': 5e-6, 'peak': 0.05}, None),
    'whitening bias never frozen': ({'freeze': ()}, None),
    'averaged weights (0.95)': ({'ema': 0.95}, None),
    'biases a tenth as quick': ({'bias_lr_mult': 0.1}, None),
    'biases three times as quick': ({'bias_lr_mult': 3.}, None),
    'cosine schedule': ({'anneal': 'cos'}, None)}

def trial(data, settings, change, seed):
    "Validation accuracy in %, of the whole recipe with test-time views as well, and seconds of training"
    usual = dict(epochs=EPOCHS, bs=500, freeze=(('whiten.bias', 2),))
    r = create_recipe('speedrun', 'speednet', **{**usual, **settings})
    seed_everything(seed)
    net = create_model('speednet')
    if change: change(net)
    learn = recipe_learner(data.dataloaders(bs=r.bs, policy=r.policy, seed=seed), net, r)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        fit_recipe(learn, r)
        seconds = time.perf_counter() - start
        kinds = ('none',) if settings or change else ('none', 'flip', 'crops')
        tta = {k: 100 * float(learn.validate(cbs=[TTA(k)])[1]) for k in kinds}
    return dict(accuracy=tta['none'], flip_views=tta.get('flip'), six_views=tta.get('crops'),
                seconds=round(seconds))

if __name__ == '__main__':
    source, out, seeds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    full = load_data(source)
    x, y = full.x['train'], full.y['train']
    rest, valid = stratified_holdout(y, VALID)
    _, train = stratified_holdout(y[rest], TRAIN)
    data = load_data(((x[rest[train]], y[rest[train]]), (x[valid], y[valid])))
    rows = pd.read_csv(out).to_dict('records') if out.exists() else []
    for seed in range(seeds):
        for name, (settings, change) in VARIANTS.items():
            if any(r['variant'] == name and r['seed'] == seed for r in rows): continue
            rows.append(dict(variant=name, seed=seed, **trial(data, settings, change, seed), data_sha256=full.source))
            print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(out, index=False)
