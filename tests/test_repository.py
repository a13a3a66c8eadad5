"The repository agrees with itself."
import ast, configparser, json, re, subprocess, sys
from pathlib import Path

import pytest

import fastcifar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import density # noqa: E402
from density import FOLDERS # noqa: E402, in the order of imports

def rooms_of(folder):
    "Modules of a folder in the order of their notebooks"
    return [f'{folder}.{p.stem[3:]}' for p in sorted((ROOT/'nbs'/folder).glob('[0-9][0-9]_*.ipynb'))]

def rooms():
    "All modules in the order of imports"
    return ['basics', 'device', *(m for folder in FOLDERS for m in rooms_of(folder)), 'cli', 'all', '__main__']

def source_of(room): return (ROOT/'fastcifar'/f'{room.replace(".", "/")}.py').read_text(encoding='utf-8')

def library_imports(room, text):
    "(module, name, name it has here) of what the text of a module imports from the library, at its top or within"
    package = ['fastcifar', *room.split('.')[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((a.name, None, a.asname or a.name) for a in node.names if a.name.startswith('fastcifar'))
        if not isinstance(node, ast.ImportFrom): continue
        above = package[:len(package) - node.level + 1] if node.level else []
        module = '.'.join([*above, *([node.module] if node.module else [])])
        if module.split('.')[0] == 'fastcifar':
            yield from ((module, a.name, a.asname or a.name) for a in node.names)

def wrong_imports(room, text, order):
    "What a module imports from modules that are not before it, or from a folder that is not below its own"
    allowed, wrong = order[:order.index(room)], []
    folders_below = {r.split('.')[0] for r in allowed} - {room.split('.')[0]}
    for module, name, _ in library_imports(room, text):
        used = module.removeprefix('fastcifar').removeprefix('.')
        inner = f'{used}.{name}'.removeprefix('.') # `from fastcifar.data import images` is an import of data.images
        used = inner if inner in order else used
        if used and used not in allowed and used not in folders_below: wrong.append(f'{room} imports {used}')
    return wrong

def unused_imports(room, text):
    "Modules of the library that a module imports without using a name of theirs"
    tree, used = ast.parse(text), {}
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {'*'}
    for module, _, name in library_imports(room, text):
        used[module] = used.get(module, False) or name.split('.')[0] in read
    return [f'{room} uses nothing of {module}' for module, is_used in used.items() if not is_used]

def ini(name):
    c = configparser.ConfigParser(interpolation=None)
    c.read(ROOT/name)
    return c

def test_settings_and_setup_agree():
    s, m = ini('settings.ini')['DEFAULT'], ini('setup.cfg')
    assert s['lib_name'] == m['metadata']['name']
    assert s['description'] == m['metadata']['description']
    assert s['author'] == m['metadata']['author']
    assert s['version'] == fastcifar.__version__
    assert m['metadata']['version'] == 'attr: fastcifar.__version__'
    assert f">={s['min_python']}" == m['options']['python_requires']

def test_pyproject_is_the_build_system_alone():
    assert re.findall(r'^\[.*\]$', (ROOT/'pyproject.toml').read_text(), re.M) == ['[build-system]']

def test_exported_code_never_imports_nbdev():
    texts = {p: p.read_text() for p in (ROOT/'fastcifar').rglob('*.py')}
    assert not [p for p, text in texts.items() if re.search(r'^\s*(import|from) nbdev', text, re.M)]

def test_drift_check_notices_an_edit(tmp_path):
    pytest.importorskip('nbdev', reason='the dev extra is not installed')
    import shutil
    for n in ('nbs', 'fastcifar', 'tools'): shutil.copytree(ROOT/n, tmp_path/n)
    for n in ('settings.ini', 'setup.cfg', 'pyproject.toml', 'README.md'): shutil.copy(ROOT/n, tmp_path)
    with open(tmp_path/'fastcifar/basics.py', 'a') as f: f.write('# edited by hand\n')
    done = subprocess.run([sys.executable, tmp_path/'tools/drift.py'], capture_output=True, text=True)
    assert done.returncode and 'basics.py' in done.stderr and 'data.py' not in done.stderr

def test_readme_is_the_index():
    pytest.importorskip('nbconvert', reason='the dev extra is not installed')
    from readme import render
    assert (ROOT/'README.md').read_text() == render(ROOT/'nbs/index.ipynb'), 'run `make readme`'

def test_notebooks_ran_without_error_leak_no_paths_and_are_clean():
    for p in ROOT.glob('nbs/**/*.ipynb'):
        nb = json.loads(p.read_text())
        outputs = json.dumps([c.get('outputs') for c in nb['cells']])
        assert not re.search(r'["\']/(home|root|Users)/|environ\(?\{', outputs), p
        assert '"output_type": "error"' not in outputs, p
        dirty = any(c['metadata'].keys() - {'tags'} or c.get('execution_count') for c in nb['cells'])
        assert not dirty, f'{p.name}: run nbdev_clean'

def registered_and_forgotten(sources):
    "The nets that code makes known by name, and those that it takes back"
    res = dict(register_model=set(), forget_model=set())
    for node in (n for text in sources for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
        if getattr(node.func, 'id', None) not in res: continue
        res[node.func.id] |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return res['register_model'], res['forget_model']

def example_cells(path):
    "Code of a notebook that is run and not exported, where it is about registered nets"
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
    return [text for text in cells if '_model(' in text and not re.match(r'#\|\s*(export|eval: *false)', text)]

def test_examples_leave_no_net_behind():
    "Notebooks are tested several in a process, in no order: a net that one leaves is in the tables of the next"
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        if path.match('models/00_registry.ipynb'): continue # has a register of its own
        registered, forgotten = registered_and_forgotten(example_cells(path))
        assert not registered - forgotten, f'{path.name}: forget_model{tuple(registered - forgotten)} at its end'

def test_a_net_left_behind_is_noticed():
    assert registered_and_forgotten(["@register_model('a')\nclass A: pass"]) == ({'a'}, set())
    assert registered_and_forgotten(["register_model('a')(A)", "forget_model('a', 'b')"]) == ({'a'}, {'a', 'b'})

def test_every_module_imports_only_from_modules_before_it():
    "Data flows one way: the folders in their order, in a folder the numbers of the notebooks; so there is no circle"
    order = rooms()
    assert [w for room in order for w in wrong_imports(room, source_of(room), order)] == []

def test_no_module_is_imported_for_its_side_effect():
    order = rooms()
    assert [w for room in order for w in unused_imports(room, source_of(room))] == []

@pytest.mark.parametrize('line, wrong', [
    ('from fastcifar.basics import FastcifarError', 0), ('from ..data.formats import Arrays', 0),
    ('from fastcifar.data import Arrays', 0), ('from fastcifar.train.loop import piecewise', 1),
    ('def f(): from fastcifar.train.loop import piecewise', 1), ('import fastcifar.train.loop', 1),
    ('from ..train import loop', 1), ('from fastcifar.models.zoo import create_model', 1),
    ('from fastcifar.models import zoo', 1), ('from fastcifar.runs import load_run', 1), ('from . import layers', 0)])
def test_a_wrong_import_is_noticed(line, wrong):
    "Seen from a module of the nets that stands before the zoo"
    assert len(wrong_imports('models.sepnet', line, rooms())) == wrong

@pytest.mark.parametrize('text, unused', [
    ('from fastcifar.data.loaders import CifarDataLoaders', 1), ('import fastcifar.data.loaders', 1),
    ('from ..data.loaders import CifarDataLoaders as C', 1), ('from ..data.loaders import CifarDataLoaders as C\nC', 0),
    ('import fastcifar.data.loaders as l\nl.x', 0), ('from fastcifar.data.loaders import *', 0),
    ('from fastcifar.basics import check_name, read_json\nread_json', 0)])
def test_an_unused_import_is_noticed(text, unused): assert len(unused_imports('runs.run', text)) == unused

def test_every_module_has_a_notebook_in_the_folder_of_its_name():
    named = {re.search(r'default_exp ([\w.]+)', p.read_text())[1]: p for p in ROOT.glob('nbs/**/*.ipynb')
             if 'default_exp ' in p.read_text()}
    files = (p.relative_to(ROOT/'fastcifar').with_suffix('') for p in (ROOT/'fastcifar').rglob('*.py'))
    written = {'.'.join(p.parts) for p in files}
    assert written - {'__init__', '_modidx'} == named.keys()
    for name, path in named.items(): assert path.parent == ROOT.joinpath('nbs', *name.split('.')[:-1]), name

# How densely the library is written: the table of CONTRIBUTING.md, and lines and cells that stay within bounds

def test_density_of_a_module(tmp_path):
    (tmp_path/'m.py').write_text('def f(x):\n    return x\n\n\nclass A:\n    def g(self): return 1\n')
    assert density.functions(tmp_path/'m.py') == [(2, 6), (1, 5)]
    assert density.line_lengths(tmp_path/'m.py') == [9, 12, 8, 25]

def test_density_of_a_notebook(tmp_path):
    sources = ['#| export\nimport os',
               '#| export\ndef f(): pass\ndef g(): pass', 'f()', '#| export\nclass A: pass', '#| export\nx = 1']
    cells = [dict(cell_type='code', source=s.splitlines(True)) for s in sources]
    cells.append(dict(cell_type='markdown', source=['prose']))
    (tmp_path/'n.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert density.defining_cells(tmp_path/'n.ipynb') == [(2, True), (1, False)]

def test_density_finds_its_place():
    page = f'before\n{density.BEGIN}\nold\n{density.END}\nafter\n'
    made = density.written(page, '| a |\n')
    assert made == f'before\n{density.BEGIN}\n| a |\n{density.END}\nafter\n' == density.written(made, '| a |\n')
    with pytest.raises(SystemExit, match='no place for the table'): density.written('before', '| a |\n')

def test_density_counts_every_folder():
    assert {p.parent.name for p in (ROOT/'fastcifar').glob('*/__init__.py')} == set(FOLDERS)

# What keeps it so

LINE = 120 # characters
CELL = 60 # lines of an exported cell

def sources():
    "(place, text) of everything that somebody writes: cells of notebooks, what is exported from them, tools"
    for p in sorted([*ROOT.glob('fastcifar/**/*.py'), *ROOT.glob('tools/**/*.py')]):
        if p.name != '_modidx.py': yield p.relative_to(ROOT).as_posix(), p.read_text(encoding='utf-8')
    yield from cells()

def cells():
    "(place, text) of every code cell of a notebook"
    for p in sorted(ROOT.glob('nbs/**/*.ipynb')):
        if '.ipynb_checkpoints' in p.parts: continue
        yield from ((f'{p.relative_to(ROOT)}, code cell {i}', c) for i, c in enumerate(density.code_cells(p), 1))

def long_lines(place, text):
    "Lines that are too long, but for directives such as `#| fig-alt:` and what nbdev writes at the top of a module"
    lines = list(enumerate(text.splitlines(), 1))
    if any(l.startswith('# AUTOGENERATED!') for _, l in lines):
        first = next(n for n, l in lines if l.startswith('# %% ') and '.ipynb' in l)
        lines = lines[first:]
    return [f'{place}, line {n}: {len(l)} characters' for n, l in lines if len(l) > LINE and not l.startswith('#|')]

def test_no_line_is_long():
    found = [l for place, text in sources() for l in long_lines(place, text)]
    assert not found, f'{len(found)} lines are longer than {LINE}:\n' + '\n'.join(found[:40])

def long_cells(place, text):
    "An exported cell that is too long"
    n = len(text.splitlines())
    return [f'{place}: {n} lines'] if n > CELL and density.is_exported(text) else []

def test_no_exported_cell_is_long():
    found = [l for place, text in cells() for l in long_cells(place, text)]
    assert not found, f'{len(found)} cells are longer than {CELL} lines:\n' + '\n'.join(found)

def test_long_lines_and_cells_are_noticed():
    long, directive = 'y' * 121, f'#| fig-alt: {"y" * 120}'
    assert long_lines('m.py', f'x = 1\n{long}\n') == ['m.py, line 2: 121 characters']
    assert long_lines('m.py', f'{"y" * 120}\n{directive}') == []
    generated = '\n'.join([long, '# AUTOGENERATED! DO NOT EDIT!', f'__all__ = [{long}]', '# %% n.ipynb', long])
    assert long_lines('m.py', generated) == ['m.py, line 5: 121 characters']
    assert long_cells('n', '#| export\n' + 'x\n' * 60) == ['n: 61 lines']
    assert long_cells('n', '#| export\n' + 'x\n' * 59) == long_cells('n', 'x\n' * 99) == []

PERCENT = re.compile(r'(?<=[\d}]) %(?![\w(])')

def readable():
    "What people read: prose of notebooks and other pages, strings and comments of the library"
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] == 'markdown': yield path.name, ''.join(c['source'])
    pages = [*ROOT.glob('*.md'), *ROOT.glob('fastcifar/templates/*.html')]
    yield from ((p.name, p.read_text(encoding='utf-8')) for p in pages)
    for room in rooms():
        strings = (n.value for n in ast.walk(ast.parse(source_of(room))) if isinstance(n, ast.Constant))
        yield from ((room, s) for s in strings if isinstance(s, str))

def test_percent_is_written_in_one_way():
    "94%, as Python formats it, without a space"
    spaced = [(name, text[max(0, m.start() - 30):m.end()]) for name, text in readable() for m in PERCENT.finditer(text)]
    assert not spaced
