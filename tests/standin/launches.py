"Launches that the host asks for in a step of training: run.sh tests/standin/launches.py [--out FILE]"
import argparse, json, statistics, warnings

import count
import numpy as np
import torch
from fastai.callback.core import Callback

from fastcifar.bench.timing import noise_data
from fastcifar.models.zoo import create_model
from fastcifar.runs.recipes import create_recipe
from fastcifar.runs.fit import fit_recipe, recipe_learner
from fastcifar.train.callbacks import StopOnNaN

CASES = [('speednet', 'speedrun', 1000), ('custom_resnet', 'fast', 512), ('custom_resnet', 'one_cycle', 512),
         ('normnet31k', 'reference', 512), ('normnet48k', 'fast', 128), ('groupnet', 'fast', 128)]
ASKED = ('launch', 'library', 'd2d', 'h2d', 'memset', 'graph')
MUST, GOAL = 60, 30

class Counts(Callback):
    "What the runtime was asked for before each batch"
    order, run_valid, capturable = -999, False, True # it only looks
    def __init__(self): self.rows = []
    def before_batch(self): self.rows.append(count.counts())

def launches(name, recipe, bs, capture, steps=24):
    "The median over the last steps of an epoch, all that the host asks of the GPU counted"
    r = create_recipe(recipe, name, bs=bs, epochs=1, **(dict(lr_max=1e-3) if recipe == 'one_cycle' else {}))
    dls = noise_data(bs * steps).dataloaders(bs=bs, policy=r.policy, device='cuda')
    learn = recipe_learner(dls, create_model(name), r, capture=capture)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, StopOnNaN)]) # without kernels there are no numbers
    c = Counts()
    learn.dls.valid.n = 0
    with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, cbs=[c])
    rows = [sum((b - a)[k] for k in ASKED) for a, b in zip(c.rows, c.rows[1:])]
    return statistics.median(rows[6:])

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--out')
    args = p.parse_args()
    rows = []
    with warnings.catch_warnings(action='ignore'):
        for name, recipe, bs in CASES:
            ours, eager = (launches(name, recipe, bs, capture) for capture in (True, False))
            print(f'{name:14} {recipe:10} {ours:5.0f} launches a step, {eager:5.0f} one by one', flush=True)
            rows.append(dict(net=name, recipe=recipe, bs=bs, launches=ours, one_by_one=eager, must=MUST, goal=GOAL))
    if args.out: # a JSON object a line
        with open(args.out, 'w') as f:
            for r in rows: f.write(json.dumps(dict(r, torch=str(torch.__version__))) + '\n')

if __name__ == '__main__': main()
