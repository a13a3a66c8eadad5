"A notebook shows each picture once."
import base64, collections, json
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

def width(picture): return int.from_bytes(base64.b64decode(picture)[16:20], 'big') # in pixels

def faults(cell):
    "What is wrong with the pictures of a cell: shown twice, described and not shown, or wider than 9 inches"
    shown, described = pictures(cell), 'fig-alt:' in ''.join(cell['source'])
    most = max(collections.Counter(shown).values(), default=0)
    return [*['not once'] * (most > 1 or described and len(shown) != 1),
            *['wide'] * any(width(p) > 930 for p in shown)] # at 100 dots an inch, with what matplotlib puts around

def test_notebooks_show_their_pictures_once():
    assert [(place, *found) for place, c in committed() if (found := faults(c))] == []

@pytest.mark.parametrize('described,widths,wrong', [
    (True, [], ['not once']), (True, [900], []), (True, [900, 600], ['not once']), (False, [], []),
    (False, [900, 600], []), (False, [900, 900], ['not once']), (False, [1019], ['wide'])])
def test_a_missing_a_doubled_and_a_wide_picture_are_noticed(described, widths, wrong):
    def picture(w): return base64.b64encode(bytes(16) + w.to_bytes(4, 'big')).decode()
    outputs = [dict(data={'image/png': picture(w)}) for w in widths]
    assert faults(dict(source=['#| fig-alt: "..."\n'] * described + ['plot()'], outputs=outputs)) == wrong
