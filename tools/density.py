"""How densely the library is written: lengths of functions and lines, and what stands in the cells of the notebooks.

    python tools/density.py            print the table, a row a folder
    python tools/density.py --write    put it into CONTRIBUTING.md, between its two marks

A function is any `def`, methods and inner functions included; a syntax node is a node of its tree in Python's `ast`. Of
the notebooks, exported cells that define something count: how many functions and classes each has, and whether a cell
that shows or tests them comes before the next exported one.
"""
import argparse, ast, json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = '<!-- density: tools/density.py --write -->', '<!-- end of density -->'
FOLDERS = ('data', 'models', 'train', 'interpret', 'runs', 'share', 'study', 'bench') # in the order of imports
HEAD = ('', 'lines a function, median / 90%', 'syntax nodes a function, median / 90%', 'line length, 90 / 99%',
        'lines over 120 / 160', 'definitions a code cell, mean (most)', 'code cells followed by an example or test')
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef

def modules(folder:str='') -> list:
    "The exported modules of a folder of the library; of the library itself without one"
    return sorted(p for p in (ROOT/'fastcifar'/folder).rglob('*.py') if p.name != '_modidx.py')

def notebooks(folder:str='') -> list:
    "The notebooks of a folder, or all that export something"
    return sorted(p for p in (ROOT/'nbs'/folder).rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and exports(p))

def exports(notebook:Path) -> bool: return any(is_exported(c) for c in code_cells(notebook))

def code_cells(notebook:Path) -> list:
    "The sources of a notebook's code cells"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']

def is_exported(source:str) -> bool:
    return any(l.startswith(('#| export', '#|export')) for l in source.splitlines())

def functions(module:Path) -> list:
    "(lines, syntax nodes) of each function"
    tree = ast.parse(module.read_text(encoding='utf-8'))
    found = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(f.end_lineno - f.lineno + 1, sum(1 for _ in ast.walk(f))) for f in found]

def line_lengths(module:Path) -> list:
    "The lengths of the lines that hold something"
    return [len(l) for l in module.read_text(encoding='utf-8').splitlines() if l.strip()]

def definitions(source:str) -> int:
    "How many functions and classes stand at the top of a cell"
    return sum(isinstance(n, DEFINITIONS) for n in ast.parse(source).body)

def defining_cells(notebook:Path) -> list:
    "(definitions, whether an example or test follows) of each exported cell that defines something"
    cells = [c for c in code_cells(notebook) if not c.lstrip().startswith('%') and 'nbdev_export()' not in c]
    following = [*cells[1:], '#| export']
    return [(n, not is_exported(after)) for c, after in zip(cells, following)
            if is_exported(c) and (n := definitions(c))]

def row(name:str, paths:list, books:list) -> tuple:
    "A row of the table"
    lines, nodes = zip(*(f for p in paths for f in functions(p)))
    lengths = np.array([l for p in paths for l in line_lengths(p)])
    per_cell, shown = zip(*(c for b in books for c in defining_cells(b)))
    def quantiles(values, *q): return ' / '.join(f'{v:.0f}' for v in np.quantile(values, q))
    def over(limit): return f'{(lengths > limit).mean():.1%}'
    return (name, quantiles(lines, .5, .9), quantiles(nodes, .5, .9), quantiles(lengths, .9, .99),
            f'{over(120)} / {over(160)}', f'{np.mean(per_cell):.1f} ({max(per_cell)})', f'{100 * np.mean(shown):.0f}%')

def table() -> str:
    "The whole as Markdown: a row a folder, and one for all of the library"
    rows = [row(f'`{f}/`', modules(f), notebooks(f)) for f in FOLDERS]
    rows += [row('**fastcifar**', modules(), notebooks())]
    lines = [HEAD, ['--'] * len(HEAD), *rows]
    return '\n'.join(f'| {" | ".join(l)} |' for l in lines) + '\n'

def written(text:str, made:str) -> str:
    "A text with the table between its marks"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end: raise SystemExit(f'CONTRIBUTING.md has no place for the table: put the lines {BEGIN} and {END} there')
    return f'{before}{begin}\n{made}{end}{after}'

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--write', action='store_true', help='put the table into CONTRIBUTING.md')
    if not parser.parse_args().write: return print(table(), end='')
    page = ROOT/'CONTRIBUTING.md'
    page.write_text(written(page.read_text(encoding='utf-8'), table()), encoding='utf-8')

if __name__ == '__main__': main()
