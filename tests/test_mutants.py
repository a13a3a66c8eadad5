"`make mutate`: which changes it makes, and what it has found."
import ast, csv, json, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from mutants import choose, make_mutants # noqa: E402

SOURCE = '''"A module"
import math

LEVEL = 0.95 # of an interval

def share(hits:int, n:int=10, *, plain:bool=False) -> float:
    "A share, é: 1 of 2"
    if n < 1: raise ValueError(f'n is {n}: give at least 1')
    print('share of', n + 1)
    total = sum(h for h in hits if h > 0)
    return total / n if not plain else min(total, n)

def draw(ax, x):
    ax.plot(x, x[1:], lw=2, label='x', drawstyle='steps')
    ax.grid(alpha=.3)
    return ax
'''

def test_changes_of_a_module():
    "Each is another program in one place; texts, hints and looks stay"
    mutants = make_mutants('m', SOURCE)
    chosen = choose(mutants, SOURCE, 1000)
    assert len({m.name for m in chosen}) == len(chosen) > 15
    for m in chosen:
        changed = m.source(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert changed.count('\n') == SOURCE.count('\n')
        for kept in ('"A share, é: 1 of 2"', "'share of', n + 1", "{n}: give at least 1'", 'hits:int', 'lw=2',
            'alpha=.3', '# of an'):
            assert kept in changed or m.kind == 'statement' or 'plot' in m.change, m.name
    changes = {m.change for m in chosen}
    assert {'n < 1 -> n <= 1', 'n < 1 -> False', '1 -> 2', 'not plain -> plain', 'total / n -> total * n',
        '0.95 -> 1.9',
        'min(total, n) -> max(total, n)', '10 -> 11', 'False -> True', 'x[1:] -> x', 'return ax -> return'} <= changes
    assert 'n < 1 -> not n < 1' in changes and 'not plain -> not not plain' not in changes

def test_lines_in_which_a_change_matters():
    "A default value matters to the body of its function; a constant to whoever imports the module"
    lines = {m.change: m.lines for m in make_mutants('m', SOURCE)}
    assert lines['0.95 -> 1.9'] == () and lines['10 -> 11'] == tuple(range(7,
        12)) and lines['total / n -> total * n'] == (11,)

def test_choice_of_changes():
    "By the seed, of every kind in turn; a line more elsewhere leaves it as it is"
    def names(source, n, seed=0): return [m.name for m in choose(make_mutants('m', source), source, n, seed)]
    few = names(SOURCE, 12)
    assert len(few) == 12 and few == names(SOURCE, 12)
    assert set(few) < set(names(SOURCE, 18)) != set(names(SOURCE, 18, 1))
    assert len({m.kind for m in choose(make_mutants('m', SOURCE), SOURCE, 8)}) == 8
    assert names('import os\n' + SOURCE, 12) == few

def test_what_was_found():
    "At least 200 changes, of which the tests notice at least 85 in 100; each that cannot be noticed has its reason"
    import mutate
    with open(ROOT/'results/mutation.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    found = json.loads((ROOT/'results/mutation.json').read_text(encoding='utf-8'))['modules']
    n = {k: sum(r['outcome'] == k for r in rows) for k in ('killed', 'survived', 'equivalent')}
    assert len(rows) >= 200 and sum(n.values()) == len(rows) == found['all']['mutants']
    assert n == {k: found["all"][k] for k in n} and found.keys() == {*mutate.TESTS, "all"}
    assert found['all']['share'] == pytest.approx(n['killed'] / (n['killed'] + n['survived']),
        abs=1e-4) and found['all']['share'] >= .85
    with open(ROOT/'tools/equivalent_mutants.csv', newline='',
        encoding='utf-8') as f: equivalent = list(csv.DictReader(f))
    assert all(r['reason'] for r in equivalent) and n['equivalent'] <= len(equivalent) < .1 * len(rows)

def test_modules_and_their_notebooks():
    "Every module whose mutants are judged has its notebook, its tests are there, and the way back is the same"
    import mutate
    for module, tests in mutate.TESTS.items():
        notebook = mutate.notebook_of(module)
        assert mutate.module_of(notebook) == module and (ROOT/mutate.file_of(module)).is_file()
        assert all((ROOT/f'tests/{t}.py').is_file() for t in tests)
    assert mutate.module_of('00_basics.ipynb') == 'basics'
