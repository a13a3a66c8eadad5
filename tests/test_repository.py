"The repository agrees with itself."
import ast, configparser, json, re, subprocess, sys
from pathlib import Path

import pytest

import fastcifar

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ('data', 'models', 'train', 'interpret', 'runs', 'share', 'study', 'bench') # in the order of imports

def rooms_of(folder):
    "Modules of a folder in the order of their notebooks"
    return [f'{folder}.{p.stem[3:]}' for p in sorted((ROOT/'nbs'/folder).glob('[0-9][0-9]_*.ipynb'))]

def imported_rooms(room, text):
    "Modules of the library that the text of one imports, at its top or within a function"
    package = ['fastcifar', *room.split('.')[:-1]]
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom): continue
        above = package[:len(package) - node.level + 1] if node.level else []
        full = '.'.join([*above, *([node.module] if node.module else [])])
        if full.startswith('fastcifar.'):
            yield full.removeprefix('fastcifar.')
            yield from (f'{full}.{a.name}'.removeprefix('fastcifar.') for a in node.names)

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
    assert not [p for p in (ROOT/'fastcifar').rglob('*.py') if re.search(r'^\s*(import|from) nbdev', p.read_text(), re.M)]

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
    sys.path.insert(0, str(ROOT/'tools'))
    from readme import render
    assert (ROOT/'README.md').read_text() == render(ROOT/'nbs/index.ipynb'), 'run `make readme`'

def test_notebooks_ran_without_error_leak_no_paths_and_are_clean():
    for p in ROOT.glob('nbs/**/*.ipynb'):
        nb = json.loads(p.read_text())
        outputs = json.dumps([c.get('outputs') for c in nb['cells']])
        assert not re.search(r'"/(home|root|Users)/', outputs), p
        assert '"output_type": "error"' not in outputs, p
        assert not any(c['metadata'].keys() - {'tags'} or c.get('execution_count') for c in nb['cells']), f'{p.name}: run nbdev_clean'

def test_every_room_imports_only_from_rooms_before_it():
    "Data flows one way: the folders in their order, in a folder the numbers of the notebooks"
    rooms = ['basics', 'device', *(m for folder in FOLDERS for m in rooms_of(folder)), 'cli', 'all', '__main__']
    for room in rooms:
        text = (ROOT/'fastcifar'/f'{room.replace(".", "/")}.py').read_text()
        for used in imported_rooms(room, text):
            if used == room.split('.')[0] or used not in rooms: continue
            assert rooms.index(used) < rooms.index(room), f'{room} imports {used}'

def test_every_module_has_a_notebook_in_the_folder_of_its_name():
    named = {re.search(r'default_exp ([\w.]+)', p.read_text())[1]: p for p in ROOT.glob('nbs/**/*.ipynb')
             if 'default_exp ' in p.read_text()}
    written = {'.'.join(p.relative_to(ROOT/'fastcifar').with_suffix('').parts) for p in (ROOT/'fastcifar').rglob('*.py')}
    assert written - {'__init__', '_modidx'} == named.keys()
    for name, path in named.items(): assert path.parent == ROOT.joinpath('nbs', *name.split('.')[:-1]), name
