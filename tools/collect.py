"Write what finished runs say into a folder that is small enough to commit: python tools/collect.py FOLDER RUN... (run folders)"
import sys
from pathlib import Path

from fastcifar.basics import read_json, write_atomic, write_json
from fastcifar.layers import NORMS
from fastcifar.models.zoo import list_models
from fastcifar.runs import run_config
from fastcifar.study import collect_curves, collect_runs, run_name

def place_in_table(run):
    "Nets and norms in their usual order, not the alphabet's"
    c = run_config(run)
    return list_models().index(c.model), c.recipe, NORMS.index(c.norm), c.bs, c.seed

if __name__ == '__main__':
    out, runs = Path(sys.argv[1]), [Path(r) for r in sys.argv[2:] if (Path(r)/'metrics.json').exists()]
    runs.sort(key=place_in_table)
    names = [run_name(run_config(r)) for r in runs]
    if twice := {n for n in names if names.count(n) > 1}: raise SystemExit(f'two runs of {", ".join(sorted(twice))}: leave one out')
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (('results', collect_runs(runs)), ('curves', collect_curves(runs))): write_atomic(out/f'{name}.csv', lambda tmp: table.to_csv(tmp, index=False))
    place = lambda e: {k: v for k, v in e.items() if k != 'command'} # which names folders of the machine
    write_json(out/'runs.json', {run_name(run_config(r)): dict(config=read_json(r/'config.json'), environment=place(read_json(r/'environment.json'))) for r in runs})
    print(f'{len(runs)} runs: {out}')
