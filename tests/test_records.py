"What a run folder says of itself, and what a study makes of many, without a training."
import ast, dataclasses, json, os, select, subprocess, time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from fastcifar.runs import artifacts, config as configs, folder as folders, run as runs
import fastcifar.study.study as study
from fastcifar.study import pool, tables
from fastcifar.basics import FastcifarError
from fastcifar.data.load import Arrays
from fastcifar.data.images import ImageData
from fastcifar.runs.settings import Config
from fastcifar.runs.run import RunHistory
from fastcifar.runs.config import build_model, configure
from fastcifar.runs.folder import RunFolder, check_same, check_settings, note_start
from fastcifar.runs.artifacts import draw_interpretation
from fastcifar.runs.folder import resolve_config, write_surroundings
from fastcifar.train.schedule import LRRange
from fastcifar.study.study import Study, run_name, study_grid
from fastcifar.study.tables import collect_curves, collect_runs

def config(**more): return configure('fast', 'normnet31k', **{**dict(data='digits', epochs=2, bs=64), **more})

def noise(name='noise', seed=0):
    x = {s: np.random.default_rng(seed).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8) for s in ('train', 'test')}
    return ImageData(Arrays(x, {s: np.arange(8) % 2 for s in x}, ['a', 'b']), name)

# -- the files of a run folder

# of a folder that is made to share
ALSO_NAMED = {'share/export.py': {'config.json', 'model.safetensors'}, 'models/zoo.py': {'model.safetensors'}}

def spelled(path):
    "Names of files of a run in the code of a module: texts that are such a name, whole or after a slash"
    names = {v.name for v in vars(RunFolder).values() if isinstance(v, folders._File)}
    texts = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    return names & {t.rpartition('/')[2] for t in texts if isinstance(t, str) and ' ' not in t and '\n' not in t}

def test_files_of_a_run_are_named_in_one_module():
    "Whoever looks into a run folder asks `RunFolder`"
    package = Path(folders.__file__).parents[1]
    for path in package.rglob('*.py'):
        room = path.relative_to(package).as_posix()
        if room in ('runs/folder.py', '_modidx.py'): continue
        assert spelled(path) <= ALSO_NAMED.get(room, set()), room
    assert len(spelled(package/'runs/folder.py')) == 11

def test_a_folder_is_asked(tmp_path):
    "For its files by name and by path, and for how far its run has come"
    run = RunFolder(tmp_path)
    assert (RunFolder.metrics_file, run.metrics_file) == ('metrics.json', tmp_path/'metrics.json')
    assert not (run.holds_run() or run.has_begun or run.is_finished) and run.surroundings() == {}
    assert str(run.unfinished()) == f'{tmp_path} is not finished: continue it with fastcifar train --resume {tmp_path}'
    c = resolve_config(config(), noise(), tmp_path, 'cpu')
    assert run.holds_run() and not run.has_begun and run.config().seed == c.seed
    run.write_metrics(dict(test_accuracy=.5))
    assert run.has_begun and run.is_finished and run.metrics() == dict(test_accuracy=.5)

# -- a configuration and its folder

@pytest.mark.parametrize('field, good, bad', [('seed', [0, 2**32 - 1], [-1, 2**32, 1.5]), ('valid', [None, 5], [.5]),
    ('groups', [None, 4], ['4']), ('norm', ['bn', 'gn'], ['xn']),
    ('precision', ['auto', 'fp32', 'bf16', 'fp16'], ['fp8']),
    ('tfms', ['auto', 'item', 'batch'], ['batches']), ('model', ['normnet31k'], ['normnet']), ('convert', [True], [1]),
    ('data', ['x'], [1]), ('recipe', ['fast'], ['slow'])])
def test_edges_of_a_configuration(field, good, bad):
    for v in good: assert getattr(Config(**{field: v}).checked(), field) == v
    for v in bad:
        with pytest.raises(FastcifarError, match=field): Config(**{field: v}).checked()

def test_a_net_of_a_configuration():
    "With what is given; the rest is the net's own"
    seen = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(configs, 'create_model', lambda name, **kw: seen.append((name, kw)))
        build_model(Config(model='normnet48k', norm='gn', groups=4, dropout=.3, model_args=dict(mended=True)), 7)
        build_model(Config(model='normnet31k'), 10)
    assert seen == [('normnet48k', dict(n_out=7, norm='gn', groups=4, dropout=.3, mended=True)),
        ('normnet31k', dict(n_out=10, norm='bn'))]
    with pytest.raises(FastcifarError, match='model_args has groups, norm, which'):
        build_model(Config(model_args=dict(norm='bn', groups=2)), 10)

def test_settings_of_a_folder(tmp_path):
    "Two runs are the same if every setting is; what is settled when one starts may be left open"
    c = dataclasses.replace(config(), precision='fp32', tfms='batch')
    data = noise()
    c = resolve_config(c, data, tmp_path, 'cpu')
    saved = json.loads((tmp_path/'config.json').read_text())
    assert (saved['data'], saved['data_sha256'], saved['data_order']) == ('noise', data.source, data.order)
    check_settings(c, tmp_path)
    check_settings(dataclasses.replace(c, precision='auto', tfms='auto', data='elsewhere'), tmp_path)
    for k, v in dict(precision='bf16', tfms='item', epochs=3, norm='gn', seed=1, model='normnet41k').items():
        with pytest.raises(FastcifarError,
            match=f'holds a run with {k}='): check_settings(dataclasses.replace(c, **{k: v}), tmp_path)

def test_a_finished_run_on_other_images_is_another_one(tmp_path):
    "Whatever the settings say: a command with the same ones does not take it for its own"
    c = resolve_config(config(), noise(), tmp_path, 'cpu')
    check_same(c, tmp_path, noise())
    with pytest.raises(FastcifarError, match='noise is not the data set of'): check_same(c, tmp_path, noise(seed=1))

def test_a_configuration_is_settled_once(tmp_path):
    "Until the run has begun it may be another one; afterwards it stays, with its data in their order"
    data, first = noise(), config()
    c = resolve_config(first, data, tmp_path, 'cpu')
    assert c.precision != 'auto' and c.tfms == 'batch' and dataclasses.replace(c, precision='auto',
        tfms='auto') == first
    assert resolve_config(config(epochs=5), data, tmp_path, 'cpu').epochs == 5
    assert json.loads((tmp_path/'config.json').read_text())['epochs'] == 5
    (tmp_path/'history.csv').write_text('')
    with pytest.raises(FastcifarError, match='epochs=5, not 2'): resolve_config(first, data, tmp_path, 'cpu')
    assert json.loads((tmp_path/'config.json').read_text())['epochs'] == 5
    with pytest.raises(FastcifarError, match='noise is not the data set of'): resolve_config(config(epochs=5),
        noise(seed=1), tmp_path, 'cpu')
    with pytest.raises(FastcifarError, match='begun=|epochs=5, not 4'):
        resolve_config(config(epochs=4), data, tmp_path, 'cpu')
    turned = noise()
    turned.order = 'other'
    with pytest.raises(FastcifarError, match='in another order'): resolve_config(config(epochs=5), turned, tmp_path,
        'cpu')
    (tmp_path/'config.json').write_text('{"data": 1}')
    with pytest.raises(FastcifarError, match='does not hold the configuration of a run'): resolve_config(first, data,
        tmp_path, 'cpu')

@pytest.mark.parametrize('name',
    ['checkpoints/epoch_0001.safetensors', 'lr_range.json', 'history.csv', 'model.safetensors',
    'metrics.json'])
def test_what_makes_a_run_begun(tmp_path, name):
    for n in ('config.json', 'environment.json'): (tmp_path/n).write_text('{}')
    (tmp_path/'checkpoints').mkdir()
    assert not RunFolder(tmp_path).has_begun
    (tmp_path/name).write_text('')
    assert RunFolder(tmp_path).has_begun

def test_order_of_data_of_older_runs(tmp_path):
    "They noted none: files whose order is unsure have none that could be compared"
    data = noise()
    for saved, arranged, refused in ((dict(data_sha256=data.source), False, False),
        (dict(data_sha256=data.source), True, True),
        (dict(data_sha256=data.order), True, False),
        (dict(data_sha256=data.source, data_order=data.order), True, False),
        (dict(data_sha256=data.source, data_order='x'), False, True)):
        data.arranged = arranged
        folders._check_data(saved, data, tmp_path, ordered=False)
        if not refused: folders._check_data(saved, data, tmp_path, ordered=True)
        else:
            with pytest.raises(FastcifarError, match='in another order: give another'):
                folders._check_data(saved, data, tmp_path, True, 'give another')

def test_names_of_folders_of_data():
    long = noise('/x/my birds, 2020/' + 'é b' * 40)
    assert folders._called(long) == ('é_b' * 40)[:60] + f'-{long.source[:8]}'
    assert folders._called(noise('/')).startswith('data-')
    assert folders._called(noise('a/cats & dogs.tar')) == f'cats_dogs.tar-{noise().source[:8]}'
    assert folders._called(noise('digits')) == 'digits'
    assert str(folders.default_out(config(seed=3))) == 'runs/digits-normnet31k-bn-fast-2ep-seed3'

def test_what_holds_a_run_or_its_plots(tmp_path):
    for content, ours in ((None, False), ('x', False), ('[]', False), ('{"data": 1, "model": 2, "epochs": 3}', False),
        ('{"data": 1, "model": 2, "epochs": 3, "seed": 4, "x": 5}', True)):
        if content: (tmp_path/'config.json').write_text(content)
        assert folders._is_run(tmp_path) == artifacts._holds_plots(tmp_path) == ours
    (tmp_path/'config.json').unlink()
    table = tmp_path/'wrong_predictions.csv'
    for content, ours in (('image,truth,prediction,probability\n1,a,b,.5\n', True),
        ('a\nimage,truth,prediction', False), ('', False)):
        table.write_text(content)
        assert artifacts._holds_plots(tmp_path) == ours

# -- where and how a run was trained

CPU = 'processor : 0\nmodel name : A: fine one\nflags : fpu amx_bf16{} sse\n\nprocessor : 1\nmodel name : another\n\n'

def test_name_of_the_processor(monkeypatch):
    "Of the first one; matrix units decide how quick bfloat16 is"
    monkeypatch.setattr(folders, 'read_text', lambda _: CPU.format(''))
    assert folders._cpu_name() == 'A: fine one with AMX'
    monkeypatch.setattr(folders, 'read_text', lambda _: CPU.format('_tile') + '')
    assert folders._cpu_name() == 'A: fine one'
    monkeypatch.setattr(folders.platform, 'processor', lambda: 'a processor')
    monkeypatch.setattr(folders, 'read_text', lambda _: 'a line without anything\n')
    assert folders._cpu_name() == 'a processor'
    def none(_): raise FastcifarError('no such file')
    monkeypatch.setattr(folders, 'read_text', none)
    assert folders._cpu_name() == 'a processor'

def test_commit_of_a_checkout(tmp_path, monkeypatch):
    "Of a checkout of fastcifar, with a word if the package was changed; of an installed one there is none"
    monkeypatch.delenv('FASTCIFAR_COMMIT', raising=False)
    for k in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'): monkeypatch.delenv(k, raising=False)
    (tmp_path/'fastcifar').mkdir()
    code = tmp_path/'fastcifar/__init__.py'
    code.write_text('1')
    monkeypatch.setattr(folders.fastcifar, '__file__', str(code))
    assert folders._commit() is None
    (tmp_path/'settings.ini').write_text('')
    def git(*args): return subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *args], cwd=tmp_path,
        capture_output=True, text=True, check=True).stdout.strip()
    git('init', '-q'), git('add', '.'), git('commit', '-qm', 'a')
    head = git('rev-parse', 'HEAD')
    (tmp_path/'results').write_text('beside the package')
    assert folders._commit() == head
    code.write_text('2')
    assert folders._commit() == f'{head}-dirty'
    monkeypatch.setenv('FASTCIFAR_COMMIT', 'abc')
    assert folders._commit() == 'abc'
    monkeypatch.delenv('FASTCIFAR_COMMIT')
    monkeypatch.setenv('PATH', '/nowhere')
    assert folders._commit() is None

def surroundings(folder): return json.loads((folder/'environment.json').read_text())

def test_every_start_is_listed(tmp_path):
    "The first one stays as it was; where each went on is noted, once it trains"
    c = config()
    def write(typed, **more):
        return write_surroundings(c, tmp_path, 'cpu', typed, f'{typed}, whole', dict(threads=1), **more)
    first = write('first')
    env = surroundings(tmp_path)
    assert env['starts'] == [] and env['command'] == 'first, whole' and env['options'] == dict(threads=1)
    note_start(tmp_path, first, 0)
    (tmp_path/'history.csv').write_text('')
    second = write('second', compile=True)
    assert [s['command'] for s in surroundings(tmp_path)['starts']] == ['first']
    note_start(tmp_path, second, 1)
    env = surroundings(tmp_path)
    assert env['command'] == 'first, whole' and 'compile' not in env and env['device'] == 'cpu'
    said = [(s['command'], s['compile'], s['epoch']) for s in env['starts']]
    assert said == [('first', None, 0), ('second', True, 1)]
    assert 'batch' not in env['starts'][1] and set(folders._KEPT) <= set(env['starts'][0])
    note_start(tmp_path, write('third'), 0, 7)
    env = surroundings(tmp_path)
    assert (env['starts'][2]['epoch'], env['starts'][2]['batch'], env['command']) == (0, 7, 'first, whole')
    (tmp_path/'history.csv').unlink() # it has not begun
    write('fourth')
    env = surroundings(tmp_path)
    assert env['command'] == 'fourth, whole' and env['starts'] == []
    note_start(tmp_path, write('fifth', begun=True), 2)
    env = surroundings(tmp_path)
    assert env['command'] == 'fourth, whole' and [s['command'] for s in env['starts']] == ['fifth']

def test_command_of_a_run_from_python(monkeypatch, tmp_path):
    "All that differs from what would be taken without it"
    seen = []
    monkeypatch.setattr(runs.Training, 'train', lambda t: seen.append(t.commands(t.asked)[0]))
    monkeypatch.setattr(runs, 'load_data', lambda *_: noise())
    c, out = config(), tmp_path/'r'
    runs.train_run(c, out, device=torch.device('cpu'), workers=2, threads=1, log=('tensorboard',))
    runs.train_run(c, out)
    assert seen == [f"train_run({c!r}, out='{out}', workers=2, threads=1, device='cpu', log=('tensorboard',))",
        f"train_run({c!r}, out='{out}')"]

@pytest.mark.parametrize('text, says', [('CUDA out of memory. Tried', 'out of memory .*: use a smaller --bs'),
    ("can't allocate memory: you tried", 'out of memory .*: use a smaller --bs'),
    ('DataLoader worker (pid 7) is killed', 'a worker process died .* continues the/run from'),
    ('shapes do not fit', None)])
def test_what_torch_says_in_many_lines(text, says):
    "What a user can do something about is said in one; a fault of ours stays what it is"
    error = FastcifarError if says else RuntimeError
    with pytest.raises(error, match=says
        or '^shapes do not fit') as e, runs.explain_errors('the/run'): raise RuntimeError(f'{text}\nmore')
    assert not says or 'more' not in str(e.value)

@pytest.mark.parametrize('epochs, batches, few', [(3, 16, True), (1, 49, True), (2, 25, False), (30, 2, False)])
def test_few_steps_are_named(epochs, batches, few):
    "Epochs times batches, below 50"
    said = []
    t = SimpleNamespace(say=said.append, data='noise', device='cpu', folder=SimpleNamespace(path='r'))
    learn = SimpleNamespace(model=torch.nn.Linear(1, 1), dls=SimpleNamespace(train=range(batches)))
    runs.Training.introduce(t, learn, config(epochs=epochs))
    assert ('few steps' in said[-1]) == few and 'run folder: r' in said[0]

def test_rates_that_were_given_or_found(tmp_path):
    "A given peak begins at a fiftieth of itself; found ones are kept, and a training does not go on without them"
    said, folder = [], RunFolder(tmp_path)
    t = SimpleNamespace(say=said.append, folder=folder)
    given, found = config(lr_max=.5, lr_min=None), config(lr_max=None, lr_min=None)
    assert runs.Training.find_rates(t, None, given)[:2] == (.01, .5) and not said
    runs.Training.check_rates_kept(t, given)
    with pytest.raises(FastcifarError, match='lr_range.json is missing'): runs.Training.check_rates_kept(t, found)
    folder.write_lr_range(LRRange(.001, .02, [.001, .02], [2., 1.]))
    runs.Training.check_rates_kept(t, found)
    assert runs.Training.find_rates(t, None, found)[:2] == (.001, .02) and 'LRMAX 2.00e-02' in said[0]

def test_history_is_told_and_kept(tmp_path):
    "A line of names, then a line for each epoch"
    row = dict(epoch=1, train_loss=1.5, train_accuracy=.25, valid_loss=1.25, accuracy=.5, seconds=2.)
    said, checkpoints = [], SimpleNamespace(history=[row])
    h = RunHistory(checkpoints, tmp_path, 'valid', said.append)
    h.after_epoch()
    checkpoints.history.append(dict(row, epoch=2, accuracy=.75))
    h.after_epoch()
    assert [l.split() for l in said] == ['epoch train loss train acc valid loss valid acc seconds'.split(),
        ['1', '1.5000', '0.2500', '1.2500', '0.5000', '2.0'], ['2', '1.5000', '0.2500', '1.2500', '0.7500', '2.0']]
    assert pd.read_csv(tmp_path/'history.csv').to_dict('records') == checkpoints.history

class Draws:
    "Predictions that draw nothing, and keep what they were asked for"
    targs, vocab = range(5), ['a', 'b']
    def __init__(self): self.asked = []
    def __getattr__(self, name):
        if not name.startswith('plot_'): raise AttributeError(name)
        return lambda *args, **kwargs: self.asked.append((name, args, kwargs)) or plt.figure(figsize=(1, 1))
    def grad_cam(self, *args): self.asked.append(('grad_cam', args, {}))
    def wrong(self): return pd.DataFrame(dict(image=[1], truth=['a'], prediction=['b']))
    def class_accuracy(self): return pd.DataFrame(dict(images=[5]), index=pd.Index(['a'], name='class'))

def test_pictures_of_an_interpretation(tmp_path):
    "With the layer that was asked for, which is tried first"
    for layer in (None, 'conv1'):
        i, out = Draws(), tmp_path/str(layer)
        draw_interpretation(i, out, layer, say=None)
        names = ('misclassified', 'predictions', 'class_accuracy', 'calibration', 'grad_cam', 'label_errors',
            'confusion_matrix',
            'top_losses')
        assert {p.name for p in out.iterdir()} == {f'{n}.png' for n in names} | {'wrong_predictions.csv',
            'class_accuracy.csv'}
        assert ('plot_grad_cam', (),
            dict(layer=layer)) in i.asked and (i.asked[0] == ('grad_cam', ([0], 'conv1'), {})) == bool(layer)
        assert dict((n, a) for n, a, _ in i.asked)['plot_top_losses'] == (5,)
        assert (out/'class_accuracy.csv').read_text() == 'class,images\na,5\n'
        assert (out/'wrong_predictions.csv').read_text() == 'image,truth,prediction\n1,a,b\n'
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/notes.txt').write_text('my own')
    with pytest.raises(FastcifarError, match='mine'): draw_interpretation(Draws(), tmp_path/'mine', say=None)

def test_pictures_of_a_training():
    "The second split by its name; the range test where there was one"
    history = [dict(epoch=1, train_loss=1., valid_loss=2., train_accuracy=.1, accuracy=.2)]
    for valid, name in ((None, 'test'), (5, 'validation')):
        plots = artifacts._training_plots((1e-3, 1e-2), config(valid=valid), history)
        assert set(plots) == {'curves', 'schedule'}
        assert [l.get_label() for l in plots['curves']().axes[0].get_lines()][1] == name
        assert plots['schedule']().axes[0].get_lines()[0].get_ydata().max() == pytest.approx(1e-2, rel=.01)
    found = LRRange(1e-3, 1e-2, np.geomspace(1e-6, 1, 20).tolist(), np.linspace(2, 1, 20).tolist())
    assert set(artifacts._training_plots(found, config(), history)) == {'curves', 'schedule', 'lr_range'}
    plt.close('all')

# -- the grid of a study

def test_grid_of_a_study():
    "By seed, then cell by cell; what is not said is the recipe's"
    grid = study_grid(['normnet31k', 'normnet41k'], ('bn', 'gn'), ('fast', 'reference'), 2, (32, 64), data='digits',
        epochs=3)
    assert len(grid) == 2 * 2 * 2 * 2 * 2 and [c.seed for c in grid] == [0] * 16 + [1] * 16
    assert run_name(grid[0]) == 'normnet31k-bn-fast-bs32-seed0' and run_name(grid[1]) == 'normnet31k-gn-fast-bs32-seed0'
    assert [run_name(c).split('-')[3] for c in grid[:4]] == ['bs32', 'bs32', 'bs64',
        'bs64'] and grid[8].model == 'normnet41k'
    assert [c.seed for c in study_grid('normnet31k', 'bn', seeds=[4, 2])] == [4, 2]
    assert study_grid('normnet31k', 'bn', seeds=1)[0].bs == 128
    groups = study_grid('groupnet', ('bn', 'gn'), seeds=1, groups=4)
    assert [c.groups for c in groups] == [None, 4]

@pytest.mark.parametrize('more, says',
    [(dict(batch_sizes=()), 'has no batch size'), (dict(batch_sizes=(0,)), 'batch size is 0'),
    (dict(batch_sizes=(8.,)), 'batch size is 8.0'), (dict(norms=()), 'has no norm'),
    (dict(recipes=()), 'has no recipe'),
    (dict(seeds=0), 'has no seeds'), (dict(seeds=()), 'has no seeds'), (dict(norms=('bn', 'bn')), 'same run twice'),
    (dict(seed=3), 'takes seeds, not seed'), (dict(bs=8), 'takes batch_sizes, not bs'),
    (dict(norms=('bn',), groups=4), 'groups'),
    (dict(norms=('xn',)), 'xn'), (dict(batch_sizes=(64, None), bs_=1), 'bs_')])
def test_grids_that_are_refused(more, says):
    with pytest.raises(FastcifarError, match=says): study_grid('normnet31k', **{**dict(norms=('bn', 'gn')), **more})

@pytest.mark.parametrize('optimizer, k', [('sgd', 4), ('muon', 2)])
def test_rates_go_with_the_batch_size(optimizer, k):
    "All parts of a cycle, but for those that were given; the size goes along"
    c = Config(bs=32, optimizer=optimizer, lr_max=.1, lr_min=.01)
    got = study._scaled(c, 128, {})
    assert (got.bs, got.lr_max, got.lr_min, got.lr_end) == (128, pytest.approx(.1 * k), pytest.approx(.01 * k), None)
    got = study._scaled(c, 128, dict(lr_min=.01))
    assert (got.lr_max, got.lr_min) == (pytest.approx(.1 * k), .01)
    got = study._scaled(c, 128, dict(lr_max=.1))
    assert (got.bs, got.lr_max, got.lr_min) == (128, .1, .01)

def done(folder, c): (folder/run_name(c)).mkdir(parents=True), (folder/run_name(c)/'metrics.json').write_text('{}')

def test_passes_over_several_seeds(tmp_path):
    "In the order of the grid; one that was begun goes on with the seeds that it had"
    folder = tmp_path/'runs'
    grid = study_grid('normnet31k', ('bn', 'gn'), seeds=5)
    def passes(fused): return [[(c.norm, c.seed) for c in p] for p in study._passes(grid, folder, fused)]
    assert passes(1) == [[(n, s)] for s in range(5) for n in ('bn', 'gn')]
    assert passes(2) == [[(n, s) for s in seeds] for seeds in ((0, 1), (2, 3), (4,)) for n in ('bn', 'gn')]
    done(folder, grid[0]), done(folder, grid[5]) # bn 0, gn 2
    assert passes(3) == [[('gn', 0), ('gn', 1), ('gn', 3)], [('bn', 1), ('bn', 2), ('bn', 3)], [('bn', 4)], [('gn', 4)]]
    assert passes(1) == [[(n, s)] for s in range(5) for n in ('bn', 'gn') if (n, s) not in (('bn', 0), ('gn', 2))]
    study._work([grid[2], grid[8]], folder).mkdir(parents=True) # bn 1 and 4
    assert study._work([grid[2], grid[8]], folder) == tmp_path/'fused/normnet31k-bn-fast-bs128-seeds1_4'
    assert passes(3)[1:] == [[('bn', 1), ('bn', 4)], [('bn', 2), ('bn', 3)], [('gn', 4)]] and len(passes(3)) == 4
    assert [('bn', 1)] in passes(1) and [('bn', 4)] in passes(1)
    done(folder, grid[2])
    assert [('bn', 1), ('bn', 4)] in passes(3), 'one of two is finished'
    done(folder, grid[8])
    assert passes(3)[1:] == [[('bn', 2), ('bn', 3)], [('gn', 4)]]

# -- what a study reads of its runs

def written(folder, c, accuracy=.7, rows=None, status='finished', **more):
    "A run folder as a finished training leaves it, as far as tables need it"
    folder.mkdir(parents=True)
    (folder/'config.json').write_text(json.dumps(dataclasses.asdict(dataclasses.replace(c, precision='fp32',
    tfms='batch')) | dict(
        data='digits', data_sha256='a' * 64)))
    rows = [dict(epoch=e, train_loss=2 / e, train_accuracy=.3 * e, valid_loss=1 / e, accuracy=a, lr=.1, seconds=1.)
        for e, a in enumerate(rows or [.65, accuracy], 1)]
    pd.DataFrame(rows).to_csv(folder/'history.csv', index=False)
    if status == 'finished':
        m = dict(test_accuracy=accuracy, test_loss=.5, train_accuracy=.8, test_images=200,
            wrong=round(200 * (1 - accuracy)),
            parameters=31000, precision='fp32', seconds=2., data='digits', train_tta='none', tta='none',
                epochs=c.epochs,
            seed=c.seed, bs=c.bs, model=c.model, norm=c.norm, recipe=c.recipe)
        (folder/'metrics.json').write_text(json.dumps(m | more))
    return folder

def test_rows_of_runs(tmp_path):
    "However far each has come"
    cs = study_grid('normnet31k', 'bn', seeds=6, data='digits', epochs=2)
    folders = [tmp_path/str(c.seed) for c in cs]
    written(folders[0], cs[0])
    written(folders[1], cs[1], .6, rows=[.3, .6])
    written(folders[2], cs[2], status='')
    (folders[2]/'checkpoints').mkdir()
    folders[3].mkdir(), (folders[3]/'failure.txt').write_text('NaN \x1b[31m\nafter epoch 1')
    folders[4].write_text('not a folder')
    t = collect_runs(folders, cs)
    assert t.status.tolist() == ['finished', 'finished', 'interrupted', 'failed', 'failed', 'missing']
    assert t.reason.tolist()[:4] == ['', '', '', 'NaN [31m after epoch 1'] and t.reason[4].endswith('4 is not a folder')
    assert t.test_accuracy.tolist()[:2] == [.7,
        .6] and t.test_accuracy[2:].isna().all() and t.seed.tolist() == list(range(6))
    assert t.epochs_to_60.tolist()[:2] == [1, 2] and t.epochs_to_70.fillna(-1).tolist()[:2] == [2, -1]
    assert t.loc[0, ['tfms', 'tta', 'precision', 'test_images', 'seconds']].tolist() == ['batch', 'none', 'fp32',
        200, 2]
    assert t.train_tta[0] == 'none'
    alone = collect_runs(folders[:2])
    assert alone.test_accuracy.tolist() == [.7, .6] and alone.seed.tolist() == [0, 1]
    curves = collect_curves(folders, cs)
    assert curves.seed.tolist() == [0, 0, 1, 1, 2, 2] and curves.accuracy.tolist() == [.65, .7, .3, .6, .65, .7]
    assert collect_curves(folders[:2]).epoch.tolist() == [1, 2, 1, 2] and curves.valid_loss.tolist()[:2] == [1, .5]
    with pytest.raises(FastcifarError, match='is not a run folder'): collect_runs([folders[3]])

@pytest.mark.parametrize('text, says',
    [('epoch,train_loss,train_accuracy,valid_loss,accuracy\n1,1,.5,1,.5\n3,1,.5,1,.5\n', 'epochs are not'),
    ('epoch,train_loss,train_accuracy,valid_loss,accuracy\n2,1,.5,1,.5\n', 'epochs are not'),
    ('epoch,train_loss,train_accuracy,valid_loss,accuracy\n1,1,.5,1,1.5\n', 'an accuracy is none'),
    ('epoch,train_loss,train_accuracy,valid_loss,accuracy\n1,1,.5,1,.5\n2,1,.5,1,1.5\n', 'an accuracy is none'),
    ('epoch,train_loss,train_accuracy,valid_loss,accuracy\n1,1,-.5,1,.5\n', 'an accuracy is none'),
    ('epoch,train_loss,train_accuracy,valid_loss,accuracy\n1,1,.5,1,.5', 'it is cut off'),
    ('epoch,accuracy\n1,.5\n', 'is damaged'),
    ('epoch,train_loss,train_accuracy,valid_loss,accuracy\n1,1,.5,x,.5\n', 'is damaged')])
def test_histories_that_are_damaged(tmp_path, text, says):
    (tmp_path/'history.csv').write_text(text)
    with pytest.raises(FastcifarError, match=f'{says}.*so its curve is left out'): tables._history(tmp_path)
    (tmp_path/'history.csv').write_text('epoch,train_loss,train_accuracy,valid_loss,accuracy\n1,1,0,1,1\n2,1,1,1,0\n')
    assert tables._history(tmp_path).epoch.tolist() == [1, 2]
    (tmp_path/'history.csv').unlink()
    assert tables._history(tmp_path).columns.tolist() == tables._columns

@pytest.mark.parametrize('more, says',
    [(dict(test_accuracy=1.5), 'test_accuracy'), (dict(test_accuracy=None), 'test_accuracy'),
    (dict(wrong=3), 'test_accuracy'), (dict(norm='gn'), 'norm'), (dict(seed=7), 'seed'), (dict(epochs=3), 'epochs'),
    (dict(test_images=0), 'test_'), (dict(precision=1), 'precision'), (dict(parameters='x'), 'parameters')])
def test_metrics_that_are_damaged(tmp_path, more, says):
    "Of another run, or with numbers that cannot be: a failure, which is named"
    c = study_grid('normnet31k', 'bn', seeds=1, data='digits', epochs=2)[0]
    folder = written(tmp_path/'r', c, **more)
    row = collect_runs([folder], [c]).iloc[0]
    assert row.status == 'failed' and f'metrics.json is damaged ({says}' in row.reason
    written(tmp_path/'good', c)
    assert collect_runs([tmp_path/'good'], [c]).iloc[0].status == 'finished'

def quiet(*_): pass

def test_tables_of_a_study(tmp_path, monkeypatch):
    "From the folders, once for each finished run; curves of unfinished ones are kept out of the means"
    s = Study(tmp_path/'s', 'normnet31k', 'digits', ('bn', 'gn'), seeds=2, epochs=2)
    for c, a in zip(s.grid, (.7, .6, .72)): written(s.out/'runs'/run_name(c), c, a)
    written(s.out/'runs'/run_name(s.grid[3]), s.grid[3], .9, status='')
    read, means = [], []
    monkeypatch.setattr(study, '_read', lambda f, *a, f_=tables._read: read.append(f.name) or f_(f, *a))
    monkeypatch.setattr(study, 'plot_study_curves', lambda whole,
        split: means.append((sorted(set(whole.seed[whole.norm == 'gn'])),
        split)) or plt.figure())
    r = s.write(quiet)
    assert r.status.tolist() == ['finished'] * 3 + ['missing'] and len(read) == 4 and means[0] == ([0], 'test')
    s.results(), s.curves()
    assert read[4:] == [run_name(s.grid[3])] * 2
    t = pd.read_csv(s.out/'results.csv')
    assert t.test_accuracy.fillna(0).tolist() == [.7, .6, .72, 0] and len(pd.read_csv(s.out/'curves.csv')) == 8
    summary = pd.read_csv(s.out/'summary.csv')
    assert summary.n.tolist() == [2, 1] and summary['mean'].tolist() == pytest.approx([71, 60])
    d = pd.read_csv(s.out/'differences.csv')
    assert d.difference.tolist() == pytest.approx([10]) and 'one run each' in (s.out/'answer.txt').read_text()
    assert {p.name for p in s.out.iterdir()} >= {'curves.png', 'differences.png', 'report.html'}
    study.write_json(s.out/'study.json', dict(runs={run_name(c): dataclasses.asdict(c) for c in s.grid}))
    (s.out/'report.html').unlink(), (s.out/'results.csv').unlink()
    assert study.report_study(s.out, quiet) == s.out/'report.html'
    assert (s.out/'report.html').is_file() and pd.read_csv(s.out/'results.csv').equals(t)

def test_a_pass_that_version_0_1_began_is_gone_on_with(tmp_path):
    "Where it lies; a folder that is no study's is not looked into"
    grid, runs = study_grid('normnet31k', 'bn', seeds=2, data='digits', epochs=2, recipes=('fast',)), tmp_path/'runs'
    new = study._work(grid, runs)
    assert new.parent == tmp_path/'fused'
    old = tmp_path/'together'/new.name
    old.mkdir(parents=True)
    assert study._work(grid, runs) == old and study._begun_passes(study._cell(grid[0]), grid, runs) == [grid]

def test_a_folder_of_somebody_keeps_its_names(tmp_path):
    "Also one named as version 0.1 named its passes"
    (tmp_path/'together').mkdir()
    (tmp_path/'together/us.txt').write_text('mine')
    s = Study(tmp_path, 'normnet31k', 'digits', ('bn',), ('fast',), 1, 256, epochs=1)
    with pytest.raises(FastcifarError): s.run(bars=False, say=quiet)
    assert (tmp_path/'together/us.txt').read_text() == 'mine' and not (tmp_path/'fused').exists()

def test_a_folder_of_other_folders_is_no_study(tmp_path):
    "Runs alone are one's; anything else among them is somebody's"
    written(tmp_path/'runs/a', config())
    assert study._is_study(tmp_path)
    (tmp_path/'runs/photos').mkdir()
    assert not study._is_study(tmp_path)

def test_reasons_are_short(): assert tables._plain('x' * 5000) == 'x' * 1000

def test_only_seeds_may_be_added(tmp_path, monkeypatch):
    "Whatever else differs is another study, and named"
    data = noise()
    monkeypatch.setattr(study, 'load_data', lambda *_: data)
    def settle(**more):
        s = Study(tmp_path, **{**dict(models='normnet31k', data='noise', norms=('bn',), seeds=2, epochs=2), **more})
        s._settle()
        return list(json.loads((tmp_path/'study.json').read_text())['runs'])
    first = settle()
    assert settle() == first and settle(seeds=3) == [*first, 'normnet31k-bn-fast-bs128-seed2']
    for more, says in ((dict(seeds=2), '3 runs'), (dict(norms=('bn', 'gn'), seeds=3), '3 runs'),
        (dict(norms=('gn',), seeds=3), '3 runs'),
        (dict(epochs=3, seeds=3), 'epochs=2, not 3'), (dict(wd=.1, seeds=4), 'wd=0.0, not 0.1')):
        with pytest.raises(FastcifarError, match=f'a study of another configuration .*{says}'): settle(**more)
    data.source = 'other'
    with pytest.raises(FastcifarError, match='data='): settle(seeds=3)

class FakePool:
    "Runs that are over at once"
    def __init__(self): self.calls = None
    def __call__(self, work, calls, jobs, say):
        self.calls, self.jobs = calls, jobs
        for i, (cs, folder, *_) in calls.items():
            for c in cs:
                if c.seed == 0: written(folder/run_name(c), c)
            yield i, [None if c.seed == 0 else 'no memory' for c in cs]

def test_a_study_runs_what_is_left(tmp_path, monkeypatch):
    "Counted with what was finished; a process for each core, of as many threads as each has"
    pool = FakePool()
    monkeypatch.setattr(study, '_on_pool', pool)
    monkeypatch.setattr(study, 'load_data', lambda *_: noise())
    monkeypatch.setattr(study, 'check_same', quiet)
    monkeypatch.setattr(study, 'save_plot', quiet)
    monkeypatch.setattr(study, 'cpu_count', lambda: 6)
    s = Study(tmp_path/'s', 'normnet31k', 'noise', ('bn', 'gn'), seeds=2, epochs=2)
    written(s.out/'runs'/run_name(s.grid[0]), s.grid[0], .75)
    said = []
    r = s.run(threads=2, device='cpu', bars=False, say=said.append)
    assert pool.jobs == 3 and [c.seed for args in pool.calls.values() for c in args[0]] == [0, 1, 1]
    assert all(args[2:] == (2, 'cpu', os.getpid(), 0, True, []) for args in pool.calls.values())
    assert said[0] == '4 runs, 1 finished; 3 at a time on cpu' and [l.split()[0] for l in said[1:4]] == ['1/3', '2/3',
        '3/3']
    assert said[1].endswith('gn-fast-bs128-seed0: 70.00%') and said[2].endswith('failed: no memory')
    assert r.status.tolist() == ['finished', 'finished', 'failed', 'failed'] and (s.out/'results.csv').is_file()
    again = Study(tmp_path/'s', 'normnet31k', 'noise', ('bn', 'gn'), seeds=2, epochs=2)
    again.run(threads=9, device='cpu', bars=False, say=quiet)
    assert pool.jobs == 1 and len(pool.calls) == 2
    for k in ('jobs', 'threads', 'fused'):
        with pytest.raises(FastcifarError, match=f'{k} is 0'): again.run(**{k: 0}, device='cpu')

def test_one_run_of_a_study(tmp_path, monkeypatch):
    "With what it was told; what it says is in its log, and what went wrong is one line"
    seen = []
    def train(c, out, **kwargs):
        seen.append((c, out, {k: v for k, v in kwargs.items() if k != 'say'}))
        kwargs['say']('a line')
        if c.seed: raise ValueError('two\nlines')
    monkeypatch.setattr(study, 'train_run', train)
    a, b = study_grid('normnet31k', 'bn', seeds=2, data='digits')
    (tmp_path/run_name(a)).mkdir(), (tmp_path/run_name(a)/'failure.txt').write_text('old')
    assert study._one_pass([a], tmp_path, 3, 'cpu', os.getpid(), pictures=False) == [None]
    assert study._one_pass([b], tmp_path, 3, 'cpu', os.getpid(), 9) == ['ValueError: two']
    options = dict(threads=3, device='cpu', bars=False)
    assert seen == [(a, tmp_path/run_name(a), options | dict(wait=0, pictures=False)),
        (b, tmp_path/run_name(b), options | dict(wait=9, pictures=True))]
    assert (tmp_path/run_name(a)/'log.txt').read_text() == 'a line\n'
    assert not (tmp_path/run_name(a)/'failure.txt').exists()
    done_ = tmp_path/run_name(b)/'metrics.json'
    done_.write_text('{}')
    assert study._one_pass([b], tmp_path, 3, 'cpu', os.getpid()) == [None] and len(seen) == 2

def test_a_run_does_not_outlive_its_study():
    "Its process ends soon after the one that waits for it, and not before"
    read, write = os.pipe()
    middle = os.fork()
    if not middle:
        parent = os.getpid()
        if not os.fork():
            try:
                pool._die_with(parent)
                time.sleep(.7)
                os.write(write, b'alive')
                time.sleep(60)
            finally: os._exit(0) # whatever happens: it is a copy of the process that runs the tests
        time.sleep(1.5)
        os._exit(0)
    os.close(write)
    assert os.read(read, 9) == b'alive'
    os.waitpid(middle, 0)
    assert select.select([read], [], [], 20)[0] and os.read(read, 9) == b'', 'the pipe is closed'
    os.close(read)
