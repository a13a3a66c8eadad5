"""Add what finished runs say to a folder that is small enough to commit; the same run is replaced, others stay.

    python tools/collect.py FOLDER RUN...
"""
import io, sys
from pathlib import Path

import pandas as pd

from fastcifar.basics import read_json, write_atomic, write_json
from fastcifar.models.layers import NORMS
from fastcifar.models.zoo import list_models
from fastcifar.runs.folder import RunFolder, run_config
from fastcifar.study.tables import collect_curves, collect_runs
from fastcifar.study.study import run_name

KEY = ['model', 'recipe', 'norm', 'bs', 'seed']

def place(run):
    "Nets and norms in their usual order, not the alphabet's"
    return list_models().index(run['model']), run['recipe'], NORMS.index(run['norm']), int(run['bs']), int(run['seed'])

def as_text(csv):
    return pd.read_csv(csv, dtype=str, keep_default_na=False) # so that what is kept stays as it was written

def joined(file, new):
    "The table in a file, if there is one, with the rows of new runs in the place of old ones"
    new = as_text(io.StringIO(new.to_csv(index=False)))
    if file.exists():
        old = as_text(file)
        new = pd.concat([old[~pd.MultiIndex.from_frame(old[KEY]).isin(pd.MultiIndex.from_frame(new[KEY]))], new],
                        ignore_index=True).fillna('')
    return new.loc[sorted(new.index, key=lambda i: place(new.loc[i]))]

def about(run):
    "Settings and surroundings of a run, without its commands, which name folders of the machine"
    def shared(d): return {k: v for k, v in d.items() if k != 'command'}
    run = RunFolder(run)
    env = shared(run.surroundings())
    if 'starts' in env: env['starts'] = [shared(s) for s in env['starts']]
    return dict(config=run.saved_config(), environment=env)

if __name__ == '__main__':
    out, runs = Path(sys.argv[1]), [Path(r) for r in sys.argv[2:] if RunFolder(r).is_finished]
    names = [run_name(run_config(r)) for r in runs]
    if twice := {n for n in names if names.count(n) > 1}:
        raise SystemExit(f'two runs of {", ".join(sorted(twice))}: leave one out')
    if not runs: raise SystemExit('no finished runs: give folders with a metrics.json')
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (('results', collect_runs(runs)), ('curves', collect_curves(runs))):
        table = joined(out/f'{name}.csv', table)
        write_atomic(out/f'{name}.csv', lambda tmp: table.to_csv(tmp, index=False))
    old = read_json(out/'runs.json') if (out/'runs.json').exists() else {}
    every = old | {n: about(r) for n, r in zip(names, runs)}
    write_json(out/'runs.json', dict(sorted(every.items(), key=lambda e: place(e[1]['config']))))
    print(f'{len(runs)} runs added, {len(every)} in all: {out}')
