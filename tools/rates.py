"""How good the rates of a range test are: short trainings at them, and at a grid of rates around them.

    python tools/rates.py digits                 measure; what was measured before is not measured again
    python tools/rates.py digits --table         the table of what was measured

DATA is what `load_data` takes; of large sets `--images` and `--tests` take a part. Two tables are kept in
results/rates, a row at a time, so that a run that was broken off goes on: `DATA_found.csv`, what the range test
and fastai's four rules say of the same curve, and `DATA_trained.csv`, test accuracies. Only peaks are compared:
every training is one cycle that begins and ends at a 25th of its peak. Peaks are rounded to a sixth of a decade,
so that rates that nearly agree are trained once. Seeds are the outer loop: a run that is broken off has every cell
before any has a second seed.
"""
import argparse, csv, dataclasses, itertools, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback import schedule as fastai_rules

from fastcifar.basics import FastcifarError, seed_everything
from fastcifar.data.load import load_data
from fastcifar.data.images import stratified_holdout
from fastcifar.runs.fit import fit_recipe, recipe_learner
from fastcifar.runs.config import build_model, configure

CELL = ['model', 'norm', 'optimizer']
RULES = ['valley', 'slide', 'steep', 'minimum']
STEPS = 6 # to a decade of peaks
GRID = (-6, -3, 0, 3, 6) # in those steps: a tenth, a third, one, three and ten times the rate that was found

def number(rate): return int(round(STEPS * np.log10(rate)))

def rate(number): return float(10 ** (number / STEPS))

def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('data')
    p.add_argument('--table', action='store_true', help='print the table of what was measured')
    p.add_argument('--name', help='what to call the data in the names of the tables')
    p.add_argument('--out', type=Path, default=Path('results/rates'))
    p.add_argument('--models', default='normnet31k,groupnet,sepnet178k,fastnet200k')
    p.add_argument('--norms', default='bn,gn,ln')
    p.add_argument('--optimizers', default='adam,sgd,muon')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--epochs', type=int, default=4)
    p.add_argument('--images', type=int, help='train on so many of the training images')
    p.add_argument('--tests', type=int, help='test on so many of the test images')
    p.add_argument('--peaks', type=lambda s: [float(r) for r in s.split(',')], help='train at these alone')
    return p

def part(x, y, n):
    "So many images, with all classes alike"
    if n is None or n >= len(y): return x, y
    _, chosen = stratified_holdout(y, n)
    return x[chosen], y[chosen]

def loaded(args):
    "The data set, or a part of it"
    data = load_data(args.data)
    if not (args.images or args.tests): return data
    return load_data(tuple(part(data.x[s], data.y[s], n) for s, n in (('train', args.images), ('test', args.tests))))

def files(args):
    "The two tables"
    return [args.out/f'{args.name or Path(args.data).name}_{t}.csv' for t in ('found', 'trained')]

def learner(data, c):
    "A fresh learner of a configuration"
    seed_everything(c.seed)
    dls = data.dataloaders(bs=c.bs, policy=c.policy, seed=c.seed)
    return recipe_learner(dls, build_model(c, len(data.classes)), c, precision=c.precision)

def fastai_rates(rates, losses):
    "What fastai's rules say, on its own smoothed curve without the first tenth and the last five steps"
    shown, mean = [], 0.
    for i, loss in enumerate(losses): # what its Recorder shows
        mean = .98 * mean + .02 * loss
        shown.append(mean / (1 - .98 ** (i + 1)))
    lrs, shown = (torch.tensor(v, dtype=torch.float)[len(rates) // 10:-5] for v in (rates, shown))
    said = {}
    for rule in RULES:
        try: said[rule] = float(getattr(fastai_rules, rule)(lrs, shown, len(rates))[0])
        except (IndexError, ValueError, RuntimeError): said[rule] = np.nan # too few steps, or nothing that falls
    return said

def find(data, c):
    "The rates of a range test, and what fastai's rules say of the curve that they were read from"
    learn = learner(data, c)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(action='ignore'): # a column says so instead
        r = learn.lr_range(show_plot=False)
    own = dict(lr_min=r.lr_min, lr_max=r.lr_max, certain=r.certain, steps=len(r.rates))
    return own | fastai_rates(r.rates, r.losses)

def train(data, c, peak):
    "Test accuracy in % after a cycle with this peak, 0 if it diverges, and the share of the commonest prediction"
    c = dataclasses.replace(c, lr_max=peak, lr_min=peak / 25)
    learn = learner(data, c)
    try:
        with learn.no_bar(), learn.no_logging():
            fit_recipe(learn, c)
            predicted, targets = learn.get_preds()
    except FastcifarError: return dict(accuracy=0., largest=1.) # the loss became NaN
    predicted = predicted.argmax(1)
    right, most = (predicted == targets).float().mean(), predicted.bincount().max() / len(predicted)
    return dict(accuracy=100 * float(right), largest=float(most))

class Table:
    "A csv file that grows by rows"
    def __init__(self, path):
        self.path = path
        self.rows = pd.read_csv(path).to_dict('records') if path.exists() else []

    def add(self, row):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('a', newline='') as f:
            writer = csv.DictWriter(f, row)
            if not self.rows: writer.writeheader()
            writer.writerow({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()})
        self.rows.append(row)
        print(row, flush=True)

def measure(args):
    "Whatever is missing in the two tables"
    data = loaded(args)
    found, trained = (Table(f) for f in files(args))
    known = {tuple(r[k] for k in (*CELL, 'seed')): r for r in found.rows}
    seen = {tuple(r[k] for k in (*CELL, 'seed', 'number')) for r in trained.rows}
    names = [s.split(',') for s in (args.models, args.norms, args.optimizers)]
    for seed, model, norm, opt in itertools.product(range(args.seeds), *names):
        c = configure('one_cycle', model, norm=norm, optimizer=opt, seed=seed, bs=args.bs, epochs=args.epochs)
        cell = dict(model=model, norm=norm, optimizer=opt, seed=seed)
        key = tuple(cell.values())
        if args.peaks: numbers = [number(p) for p in args.peaks]
        else:
            if key not in known:
                found.add(cell | find(data, c))
                known[key] = found.rows[-1]
            r = known[key]
            numbers = [number(r['lr_max']) + g for g in GRID] + [number(r[k]) for k in RULES if r[k] > 0]
        for n in sorted(set(numbers)):
            if (*key, n) in seen: continue
            seen.add((*key, n))
            trained.add(cell | dict(number=n, peak=rate(n)) | train(data, c, rate(n)))

def shortfalls(found, trained):
    """Points below the best of the grid, for each rule: of means over the seeds, a row a cell, and of single seeds.

    A rule that names no rate gets nothing right."""
    accuracy = trained.set_index([*CELL, 'seed', 'number']).accuracy
    one = []
    for r in found.to_dict('records'):
        key = tuple(r[k] for k in (*CELL, 'seed'))
        at = lambda n: accuracy.get((*key, n), np.nan)
        grid = {f'grid {g}': at(number(r['lr_max']) + g) for g in GRID}
        rules = {k: at(number(r[k])) if r[k] > 0 else 0. for k in RULES}
        one.append({k: r[k] for k in (*CELL, 'seed')} | dict(ours=grid['grid 0']) | rules | grid)
    one = pd.DataFrame(one).dropna() # seeds that are complete
    below = lambda t: -t[['ours', *RULES]].sub(t.filter(like='grid').max(axis=1), axis=0)
    one = one.set_index([*CELL, 'seed'])
    return below(one.groupby(CELL).mean()), below(one)

def table(args):
    "How often each rule lands within a point of the best of the grid"
    found, trained = (pd.read_csv(f) for f in files(args))
    cells, one = shortfalls(found, trained)
    near, near_one = (t.round(3) <= 1 for t in (cells, one))
    lines = {f'cells within a point, of {len(cells)}': near.sum(), 'share of them': near.mean(),
             f'single seeds within a point, of {len(one)}': near_one.sum(), 'share of these': near_one.mean(),
             'mean points below the best, of cells': cells.mean(), 'most': cells.max()}
    print(pd.DataFrame(lines).T.round(2).to_string())
    print(f'uncertain: {(~found.certain).sum()} of {len(found)} range tests')
    print(cells.round(1).to_string())

if __name__ == '__main__':
    torch.set_num_threads(1)
    args = parser().parse_args()
    table(args) if args.table else measure(args)
