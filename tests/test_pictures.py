"A notebook shows each picture once."
import collections, json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
BEFORE = '''
import pandas as pd
from fastcifar.interpret.interpretation import plot_curves
from fastcifar.train.schedule import LRRange, plot_range
row = dict(train_loss=1., valid_loss=1., train_accuracy=.5, accuracy=.5)
history = pd.DataFrame([row | dict(epoch=n) for n in (1, 2)])
found = LRRange(1e-3, 1e-2, [1e-4, 1e-3, 1e-2, 1e-1], [2., 1.9, 1., 3.])
'''
CELLS = {'plot_curves(history)': 1, 'plot_curves(history);': 1, 'fig = plot_curves(history)': 1, 'fig': 1, 'fig;': 0,
         'plot_range(found)': 1, 'plot_range(found);': 1, 'plot_range(found); plot_curves(history)': 2, 'len([1])': 0}

def pictures(cell):
    "The PNG pictures that a cell shows"
    return [o['data']['image/png'] for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]

def test_each_picture_is_shown_once(monkeypatch):
    "As a value, in front of a semicolon, assigned, and once more where it is asked for"
    monkeypatch.delenv('MPLBACKEND', raising=False)
    cells = [nbformat.v4.new_code_cell(text) for text in (BEFORE, *CELLS)]
    nb = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute()
    assert {c.source: len(pictures(c)) for c in nb.cells[1:]} == CELLS

def committed():
    "Code cells of all notebooks, each with where it stands"
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] == 'code': yield f'{path.relative_to(ROOT)} {c["id"]}', c

def without_picture(cells):
    "Cells that describe a picture and show none"
    return [place for place, c in cells if 'fig-alt:' in ''.join(c['source']) and not pictures(c)]

def shown_twice(cells):
    "Cells that show one picture more than once"
    return [place for place, c in cells if max(collections.Counter(pictures(c)).values(), default=0) > 1]

def test_notebooks_show_their_pictures_once():
    cells = list(committed())
    assert without_picture(cells) == [] and shown_twice(cells) == []

@pytest.mark.parametrize('shown,missing,twice', [([], ['a'], []), (['x'], [], []), (['x', 'y'], [], []), (['x', 'x'], [], ['a'])])
def test_a_missing_and_a_doubled_picture_are_noticed(shown, missing, twice):
    cell = dict(source=['#| fig-alt: "..."\n', 'plot()'], outputs=[dict(data={'image/png': p}) for p in shown])
    assert (without_picture([('a', cell)]), shown_twice([('a', cell)])) == (missing, twice)
