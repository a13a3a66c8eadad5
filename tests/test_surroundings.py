"""What surrounds a training: paths, variables, outputs, files that are locked, pictures that fail. None of it ends in a
traceback or loses a result."""
import ast, contextlib, io, json, locale, os, pwd, re, shlex, shutil, subprocess, sys, tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NET = ('--model', 'normnet31k', '--epochs', 1, '--bs', 20, '--lr-max', '1e-3')
QUICK = (*NET, '--no-pictures')

def quiet(line): pass

def one_line(err): return err.startswith('fastcifar: ') and err.count('\n') == 1

# --- paths

def take_as_ours(monkeypatch):
    "Let a folder pass that holds what is not ours"
    for room in ('folder', 'run'): monkeypatch.setattr(f'fastcifar.runs.{room}.check_folder', lambda out, *_: Path(out))

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    return tmp_path/'home'

def test_home_folder_in_options(main, home, tree, tmp_path):
    "A shell leaves the ~ of --out=~/x as it is"
    code, said, err = main('train', '--data', tree, *QUICK, '--out=~/my run')
    assert code == 0 and (home/'my run/metrics.json').exists(), err
    for args in (('evaluate', '~/my run', '--plots=~/plots'), ('export', '~/my run', '--no-onnx', '--out=~/e'),
                 ('recipes', '--save=~/r.json'), ('predict', '--from=~/my run', tree/'test/red/00.png')):
        assert main(*args)[0] == 0, args
    assert {p.name for p in home.iterdir()} == {'my run', 'plots', 'e', 'r.json'}
    assert [p.name for p in tmp_path.iterdir()] == ['home']

def test_home_folder_in_python(home, tree):
    from fastcifar.runs.config import configure
    from fastcifar.runs.reopen import evaluate_run
    from fastcifar.runs.run import train_run
    from fastcifar.study.study import Study
    from fastcifar.study.sweep import Sweep
    c = configure('fast', 'normnet31k', data=str(tree), epochs=1, bs=20)
    m = train_run(c, '~/r', bars=False, pictures=False, say=quiet)
    assert (home/'r/metrics.json').exists() and evaluate_run('~/r', bars=False).accuracy == m['test_accuracy']
    assert Study('~/s', 'normnet31k').out == home/'s' and Sweep('~/s', 'normnet31k').out == home/'s'

UNUSABLE = '''
train --data TREE --out PLACE
train --resume PLACE
train --recipe PLACE.json
train --data PLACE
compare --data TREE --models normnet31k --epochs 1 --bs 20 --out PLACE
sweep --data TREE --model normnet31k --out PLACE
evaluate PLACE
report PLACE
demo PLACE
export PLACE
predict --from PLACE TREE/test/red/00.png
predict --from groupnet PLACE
summary groupnet --graph PLACE.png
summary groupnet --field f.png --image PLACE
recipes --save PLACE.json
'''

@pytest.mark.parametrize('place', ['LONG', 'LONG/below', '猫' * 100, '~nobody_of_this_name/x', 'CLOSED/x', 'a\0b'])
def test_places_that_cannot_be_used(place, main, tree, tmp_path, monkeypatch):
    "LONG is a name of 300 bytes, CLOSED a folder that may not be looked into"
    place = place.replace('LONG', 'x' * 300)
    if place.startswith('CLOSED'): # root may look into every folder
        closed, stat = str(tmp_path/'CLOSED'), os.stat
        def refusing(path, *args, **kw):
            if os.path.abspath(os.fspath(path)).startswith(closed): raise PermissionError(13, 'Permission denied', path)
            return stat(path, *args, **kw)
        monkeypatch.setattr(os, 'stat', refusing)
    for line in UNUSABLE.split('\n')[1:-1]:
        args = [a.replace('TREE', str(tree)).replace('PLACE', place) for a in line.split()]
        code, said, err = main(*args)
        assert code == 2 and one_line(err), (line, err)
    assert not list(tmp_path.iterdir())

@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_path_is_one_or_an_error_in_one_line(path):
    from fastcifar.basics import FastcifarError, user_path
    try: assert isinstance(user_path(path), Path)
    except FastcifarError as e: assert '\n' not in str(e)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can become somebody else')
def test_folders_without_permission(main):
    "As another user, whom modes do stop: a folder that may not be looked into, and one that may not be written"
    from fastcifar.basics import FastcifarError
    from fastcifar.runs.folder import run_folder
    with tempfile.TemporaryDirectory() as d:
        Path(d).chmod(0o755), (Path(d)/'closed').mkdir(0o700), (Path(d)/'open').mkdir(0o755)
        os.seteuid(65534)
        try:
            for args in (('train', '--data', 'digits', *QUICK, '--out'), ('evaluate',), ('report',),
                         ('compare', '--models', 'groupnet', '--out')):
                for name in ('closed', 'closed/run'):
                    code, _, err = main(*args, Path(d)/name)
                    assert code == 2 and one_line(err) and 'Permission denied' in err, err
            with pytest.raises(FastcifarError, match='cannot write .*: Permission denied'):
                with run_folder(Path(d)/'open/run'): pass
        finally: os.seteuid(0)

def test_a_file_that_the_system_refuses_in_the_middle(main, tree, monkeypatch):
    import fastcifar.runs.run as runs
    def refuse(*args, **kw): raise PermissionError(13, 'Permission denied', '/a/file')
    monkeypatch.setattr(runs, 'resolve_config', refuse)
    code, _, err = main('train', '--data', tree, *QUICK, '--out', 'r')
    assert code == 2 and one_line(err) and '/a/file cannot be used (Permission denied)' in err

def test_names_as_long_as_they_can_be(main, tree, tmp_path):
    "A run folder, and data whose name alone fills the length that a name may have"
    out, data = 'r' * 255, tmp_path/('d' * 255)
    shutil.copytree(tree, data)
    assert main('train', '--data', data, *QUICK, '--out', out)[0] == 0
    assert main('train', '--data', data, *QUICK)[0] == 0
    [run] = (tmp_path/'runs').iterdir() # with some digits of the data's hash
    assert re.fullmatch('d{60}-[0-9a-f]{8}-normnet31k-bn-one_cycle-1ep-seed0', run.name)
    assert main('export', out, '--no-onnx', '--out', 'e' * 255)[0] == 0
    assert main('recipes', '--save', 's' * 250 + '.json')[0] == 0

# --- variables

def nameless(monkeypatch):
    "An account without name and home, as in a container that runs under any number"
    def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')
    for name in ('HOME', 'XDG_CACHE_HOME', 'FASTCIFAR_CACHE'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)

def test_no_home(main, tree, monkeypatch):
    nameless(monkeypatch)
    code, _, err = main('train', '--data', tree, *QUICK)
    assert code == 2 and one_line(err) and '$FASTCIFAR_CACHE' in err
    code, _, err = main('train', '--data', 'digits', *QUICK[:-3], '--lr-max', '1e-3', '--no-pictures') # needs no cache
    assert code == 0, err

@pytest.mark.parametrize('place', ['~nobody_of_this_name/x', 'x' * 300, '/dev/null/cache'])
def test_cache_that_cannot_be_used(place, main, tree, monkeypatch):
    monkeypatch.setenv('FASTCIFAR_CACHE', place)
    code, _, err = main('train', '--data', tree, *QUICK)
    assert code == 2 and one_line(err) and 'FASTCIFAR_CACHE' in err

@pytest.mark.parametrize('name', ['WORLD_SIZE', 'RANK'])
@pytest.mark.parametrize('text', ['abc', '-1', '1.5', '²', '0'])
def test_numbers_of_a_launcher(name, text, main, tree, monkeypatch):
    if (name, text) == ('RANK', '0'): return # the first of several
    monkeypatch.setenv(name, text)
    for args in (('models',), ('models', '--json'), ('train', '--data', tree, *QUICK)):
        code, said, err = main(*args)
        assert (code, said) == (2, '') and one_line(err) and f'{name} is {text!r}' in err, err

def test_rank_that_is_none_of_the_processes(monkeypatch):
    from fastcifar.basics import FastcifarError
    from fastcifar.train.distributed import rank, world_size
    for size, number in (('2', '2'), ('2', 'abc'), ('abc', '0')):
        monkeypatch.setenv('WORLD_SIZE', size), monkeypatch.setenv('RANK', number)
        with pytest.raises(FastcifarError, match='in the environment'): rank()
    monkeypatch.setenv('WORLD_SIZE', '2'), monkeypatch.setenv('RANK', '1')
    assert (world_size(), rank()) == (2, 1)

# --- outputs and texts

@pytest.fixture
def chinese(tmp_path):
    "Data whose folder and classes have names that few encodings know"
    for split, n in (('train', 8), ('test', 4)):
        for k, name in enumerate(('猫', '犬')):
            (tmp_path/'データ'/split/name).mkdir(parents=True)
            for i in range(n):
                Image.new('RGB', (32, 32), (50 + 100 * k, i, 9 * i)).save(tmp_path/'データ'/split/name/f'{i}.png')
    return tmp_path/'データ'

def chinese_commands(data):
    "Two of them are wrong"
    train = ['train', '--data', str(data), *map(str, QUICK), '--bs', '4', '--out', '出']
    predict = ['predict', '--from', '出']
    return [train, train, ['evaluate', '出'], [*predict, str(data/'test/猫/0.png')],
            [*predict, '無'], ['train', '--data', '無']]

NAMELESS = '''
import json, os, pwd, sys
def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')
pwd.getpwuid = unknown # as in a container; torch's compiler names a folder after the user
from fastcifar.cli import main
print([main(a) for a in json.load(open(sys.argv[1], encoding='utf-8'))])
'''

def test_ascii_output_of_a_nameless_account(chinese, tmp_path):
    (tmp_path/'commands.json').write_text(json.dumps(chinese_commands(chinese)), encoding='utf-8')
    hidden = ('HOME', 'LOGNAME', 'USER', 'LNAME', 'USERNAME', 'TORCHINDUCTOR_CACHE_DIR')
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= dict(PYTHONIOENCODING='ascii', PYTHONPATH=str(ROOT), MPLCONFIGDIR=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', NAMELESS, 'commands.json'], cwd=tmp_path, env=env,
                          capture_output=True, encoding='ascii')
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr[-3000:]
    assert 'run folder: ?' in done.stdout and done.stdout.splitlines()[-1] == '[0, 0, 0, 0, 2, 2]', done.stderr
    told = [l for l in done.stderr.splitlines() if l.startswith('fastcifar: ') and 'copies of training images' not in l]
    assert len(told) == 2

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_outputs_that_lack_characters(encoding, main, chinese, monkeypatch):
    "A redirected output on Windows knows the characters of Western Europe"
    from fastcifar.cli import main as program # whose outputs are replaced
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, 'stdout', out), monkeypatch.setattr(sys, 'stderr', err)
    codes = [program(a) for a in chinese_commands(chinese)]
    c = configure('fast', 'normnet31k', data=str(chinese), epochs=1, bs=4)
    train_run(c, 'py', bars=False, pictures=False)
    monkeypatch.undo()
    said, err = (s.flush() or s.buffer.getvalue().decode(encoding) for s in (out, err))
    cat, folder = ('猫', '出') if encoding == 'utf-8' else ('?', '?')
    assert codes == [0, 0, 0, 0, 2, 2] and err.count('\n') == 2
    assert f'run folder: {folder}' in said and f'{cat}/0.png: ' in said and 'run folder: py' in said

@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=())), st.sampled_from(['ascii', 'cp1252', 'shift_jis', 'utf-8']))
def test_anything_can_be_said(text, encoding):
    from fastcifar.basics import harmless, say
    out = io.TextIOWrapper(io.BytesIO(), encoding, newline='')
    with contextlib.redirect_stdout(out): say(text)
    shown = out.buffer.getvalue().decode(encoding)
    text = harmless(text)
    with contextlib.suppress(UnicodeEncodeError): assert text.encode(encoding).decode(encoding) + '\n' == shown

def without_encoding(source):
    "Lines that open a text file in the encoding of the system: `open`, and methods of `Path`"
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if method else getattr(call.func, 'id', None)
        of_a_module = method and isinstance(call.func.value, ast.Name) # Image.open, os.open, tarfile.open
        opens = name in ('read_text', 'write_text') and method or name == 'open' and not of_a_module
        given = (*call.args, *(k.value for k in call.keywords))
        words = [c.value for a in given for c in ast.walk(a) if isinstance(c, ast.Constant)]
        binary = name == 'open' and any(w in ('rb', 'wb', 'ab', 'rb+') for w in words)
        if opens and not binary and not any(k.arg == 'encoding' for k in call.keywords): yield call.lineno

def test_every_text_file_is_utf8():
    "Whatever the locale: by an encoding that is given in every place"
    calls = ['Path(f).read_text()', 'open(f)', 'open(f, "w")', 'open(f, "rb" if x else "wb")', 'Image.open(f)']
    assert list(without_encoding('\n'.join(calls))) == [1, 2, 3]
    sources = {p: p.read_text(encoding='utf-8') for p in (ROOT/'fastcifar').rglob('*.py')}
    assert not [f'{p.relative_to(ROOT)}:{line}' for p, source in sources.items() for line in without_encoding(source)]

def test_texts_in_a_locale_of_its_own(chinese, main, tmp_path):
    "What is written as UTF-8 is read as UTF-8, where the system would read something else"
    from fastcifar.runs.folder import data_source
    from fastcifar.runs.reopen import evaluate_run
    from fastcifar.study.tables import collect_runs
    assert main(*chinese_commands(chinese)[0])[0] == 0
    (tmp_path/'failed').mkdir()
    shutil.copy(tmp_path/'出/config.json', tmp_path/'failed')
    (tmp_path/'failed/failure.txt').write_text('猫 is no number', encoding='utf-8')
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, 'C')
    try: got = data_source('出'), collect_runs(['failed']).reason[0], len(evaluate_run('出', bars=False).targs)
    finally: locale.setlocale(locale.LC_CTYPE, before)
    assert got == (str(chinese), '猫 is no number', 8)

# --- pictures

class Failing:
    "Figures that cannot be written, all or some; notes what the run folder held when the first was drawn"
    def __init__(self, monkeypatch, out, which=''):
        self.before, save, own = None, plt.Figure.savefig, self
        def savefig(fig, to, *args, **kw):
            if own.before is None: own.before = {p.name for p in out.iterdir()}
            if which in str(to): raise ValueError('Missing glyph\nin a font')
            return save(fig, to, *args, **kw)
        monkeypatch.setattr(plt.Figure, 'savefig', savefig)

PICTURES = {f'{n}.png' for n in (
    'curves', 'schedule', 'samples', 'augmented', 'misclassified', 'predictions', 'class_accuracy', 'calibration',
    'grad_cam', 'label_errors', 'confusion_matrix', 'top_losses')}
TABLES = {'wrong_predictions.csv', 'class_accuracy.csv'}

def test_pictures_that_fail_lose_nothing(main, tree, tmp_path, monkeypatch):
    plt.close('all') # what tests before this one may have left
    out = tmp_path/'r'
    failing = Failing(monkeypatch, out)
    code, said, err = main('train', '--data', tree, *NET, '--out', out)
    assert code == 0 and 'Traceback' not in err, err
    assert {'metrics.json', 'model.safetensors', 'history.csv'} <= failing.before, 'numbers and weights come first'
    lines = [l for l in said.splitlines() if 'is left out' in l]
    assert {l.split()[0] for l in lines} >= PICTURES
    assert all(l.endswith('is left out: ValueError: Missing glyph') for l in lines)
    names = {p.name for p in out.iterdir()}
    assert TABLES | {'report.html'} <= names and not PICTURES & names and not plt.get_fignums()
    assert json.loads((out/'metrics.json').read_text())['test_images'] == 24
    assert main('evaluate', out, '--plots', tmp_path/'p')[0] == 0
    assert {p.name for p in (tmp_path/'p').iterdir()} == TABLES
    assert main('report', out)[0] == 0
    code, said, err = main('find-lr', '--data', tree, '--bs', 4, '--plot', 'lr.png')
    assert code == 0 and 'LRMAX' in said and 'lr.png is left out' in said and 'plot: ' not in said

def test_one_picture_that_fails(main, tree, tmp_path, monkeypatch):
    "The others are drawn, whichever it is: one that cannot be written, and one that cannot even be drawn"
    from fastcifar.interpret.interpretation import CifarInterpretation
    out = tmp_path/'r'
    Failing(monkeypatch, out, 'samples')
    def broken(*args, **kw): raise RuntimeError('Failed to parse US$_5_bill')
    monkeypatch.setattr(CifarInterpretation, 'plot_class_accuracy', broken)
    code, said, err = main('train', '--data', tree, *NET, '--out', out)
    assert code == 0, err
    assert {p.name for p in out.glob('*.png')} == PICTURES - {'samples.png', 'class_accuracy.png'}
    assert said.count('is left out') == 3
    assert 'class_accuracy in report.html is left out: RuntimeError: Failed to parse' in said
    page = (out/'report.html').read_text()
    assert '<svg role="img" aria-label="calibration' in page and 'aria-label="class accuracy' not in page

def test_page_that_fails(main, tree, tmp_path, monkeypatch):
    import fastcifar.runs.artifacts as runs
    write = runs.write_run_report
    monkeypatch.setattr(runs, 'draw_run', lambda *_: None)
    def broken(*args, **kw): raise RuntimeError('no page')
    monkeypatch.setattr(runs, 'write_run_report', broken)
    code, said, _ = main('train', '--data', tree, *NET, '--out', 'r')
    assert code == 0 and 'report.html is left out: RuntimeError: no page' in said and 'to read' not in said
    code, said, _ = main('train', '--data', tree, *NET, '--out', 'r')
    assert code == 0 and 'to write it: fastcifar report r' in said
    monkeypatch.setattr(runs, 'write_run_report', write)
    assert main('report', 'r')[0] == 0 and 'missing' not in main('train', '--data', tree, *NET, '--out', 'r')[1]

# --- tables that are locked: a folder in the place of the file cannot be replaced, as a file that a spreadsheet holds

@pytest.fixture(scope='module')
def locked(tree, tmp_path_factory):
    "A study in whose folder no table can be written, nor a picture drawn"
    from fastcifar.study.study import Study
    out, said, save = tmp_path_factory.mktemp('locked')/'s', [], plt.Figure.savefig
    for name in ('results.csv', 'curves.csv', 'summary.csv'): (out/name).mkdir(parents=True)
    def broken(*args, **kw): raise ValueError('Missing glyph')
    with pytest.MonkeyPatch.context() as mp, contextlib.chdir(out.parent):
        mp.setenv('FASTCIFAR_CACHE', str(out.parent/'cache'))
        mp.setattr(plt.Figure, 'savefig', broken)
        take_as_ours(mp)
        s = Study(out, 'normnet31k', str(tree), ('bn', 'gn'), seeds=2, batch_sizes=20, epochs=1)
        r = s.run(1, bars=False, pictures=False, say=said.append)
    return out, r, said

def test_locked_tables_do_not_stop_a_study(locked):
    out, r, said = locked
    assert (r.status == 'finished').all() and len(r) == 4 and 'normnet31k' in (out/'answer.txt').read_text()
    lines = [s for s in said if 'is left out' in s]
    pictures = {'curves.png', 'curves', 'differences.png', 'differences'} # as files, and in the page
    assert {s.split()[0] for s in lines} == {'results.csv', 'curves.csv', 'summary.csv'} | pictures
    assert all('\n' not in s for s in lines)
    assert any(f'cannot write {out}/results.csv' in s for s in lines)
    assert (out/'report.html').exists() and '<svg role="img"' not in (out/'report.html').read_text()

def test_report_of_a_study_after_that(locked, main):
    out = locked[0]
    for name in ('results.csv', 'curves.csv', 'summary.csv'): (out/name).rmdir()
    code, said, _ = main('report', out)
    assert code == 0 and 'left out' not in said and len(pd.read_csv(out/'results.csv')) == 4
    assert (out/'differences.png').exists()
    (out/'report.html').unlink(); (out/'report.html').mkdir()
    assert main('report', out)[0] == 2 # the page is what was asked for
    (out/'report.html').rmdir()

def test_locked_history_does_not_stop_a_run(main, tree, tmp_path, monkeypatch):
    take_as_ours(monkeypatch)
    (tmp_path/'r/history.csv').mkdir(parents=True)
    code, said, _ = main('train', '--data', tree, *QUICK, '--out', 'r')
    assert code == 0 and 'history.csv is left out: cannot write' in said and (tmp_path/'r/metrics.json').exists()
    from fastcifar.study.tables import collect_curves, collect_runs
    assert collect_runs(['r']).status.tolist() == ['finished'] and not len(collect_curves(['r']))

def test_locked_tables_do_not_stop_a_sweep(main, tree, tmp_path, monkeypatch):
    take_as_ours(monkeypatch)
    (tmp_path/'s/trials.csv').mkdir(parents=True), (tmp_path/'s/sweep.png').mkdir()
    kept = ['--data', str(tree), '--seed', '3', '--device', 'cpu', '--threads', '1']
    code, said, err = main('sweep', *kept, *NET[:-2], '--valid', 12, '--trials', 2, '--out', 's')
    assert code == 0 and 'trials.csv is left out' in said and 'sweep.png is left out' in said, err
    hint = said.splitlines()[-1].removeprefix('train with it: ')
    assert shlex.split(hint) == ['fastcifar', 'train', '--recipe', 's/recipe.json', *kept]
    code, said, err = main(*shlex.split(hint)[1:], '--no-pictures', '--out', 'r') # it can be copied as it is
    assert code == 0 and json.loads((tmp_path/'r/metrics.json').read_text())['seed'] == 3, err
