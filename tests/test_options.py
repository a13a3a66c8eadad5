"""Options that contradict each other or change nothing, values that are none, folders that are damaged: one line says
so, from the command line and from Python, before any work is done."""
import copy, json, os, re, shutil, subprocess, sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fastcifar.basics import FastcifarError, as_json
from fastcifar.bench.run import run_bench
from fastcifar.cli import GROUPS
from fastcifar.study.cluster import RayTasks
from fastcifar.data.load import load_data
from fastcifar.share.demo import serve_demo
from fastcifar.share.export import export_run
from fastcifar.models.zoo import create_model, list_models, load_model, save_model
from fastcifar.train.optim import optimizer
from fastcifar.runs.recipes import create_recipe, override_recipe, read_recipe, write_recipe
from fastcifar.runs.config import build_model, configure
from fastcifar.runs.reopen import evaluate_run, report_run
from fastcifar.runs.folder import run_config
from fastcifar.runs.run import train_run
from fastcifar.runs.settings import Config, OneOf, RECIPES, SCHEDULES, check_setting, settings_table
from fastcifar.study.study import Study, report_study, run_name, study_grid
from fastcifar.study.tables import collect_runs
from fastcifar.study.sweep import Sweep

def quiet(line): pass

# --- settings that change nothing

LINES = {
    'lr-min of a constant rate': (
        'train --recipe reference --model normnet41k --lr-min 1e-3', 'for the schedule one_cycle'),
    'lr-min beside constant': (
        'train --recipe fast --model normnet31k --schedule constant --lr-min 8e-4', 'lr_min is for'),
    'peak of steps': ('train --recipe reference --model normnet48k --set peak=0.3', 'it is steps: leave it out'),
    'gamma of no steps': ('train --recipe fast --model normnet31k --set gamma=0.1', 'gamma is for the schedule steps'),
    'steps of a cycle': ('compare --models normnet31k --set step_epochs=2', 'step_epochs is for the schedule steps'),
    'update_norm of sgd': ('train --lr-max .1 --optimizer sgd --set update_norm=12', 'update_norm is not for the optimizer sgd'),
    'eps of sgd': ('sweep --model normnet31k --optimizer sgd --set eps=1e-8', 'eps is not for the optimizer sgd'),
    'muon of adam': ('train --set ns_steps=3', 'ns_steps is not for the optimizer adam'),
    'momentum that is cycled': ('train --set mom=0.5', 'mom_cycle moves it'),
    'decay of nothing': ('train --recipe fast --model normnet31k --set decay=l2', 'wd is 0'),
    'one setting twice': ('train --set mom_cycle=null,mom=.1,mom=.9', 'has mom twice'),
    'one argument twice': ('train --model-args bias=true,bias=false', 'has bias twice'),
    'groups of bn': ('train --norm bn --groups 4', 'groups are for group norm, and the norm is bn'),
    'groups of a summary': ('summary normnet31k --groups 4', 'groups are for group norm, and the norm is bn'),
    'name of a summary': ('summary normnet31k --model-args name=3', '--model-args has name'),
    'norm of a summary': ('summary normnet31k --model-args norm=3', '--model-args has norm'),
    'image of no field': ('summary normnet31k --image TREE/test/red/00.png', 'add --field'),
    'weight decay of a sweep': ('sweep --model normnet31k --wd .1', 'search --tune lr_max,label_smoothing,policy'),
    'smoothing of a sweep': ('sweep --model normnet31k --label-smoothing .1 --tune label_smoothing', '--tune others'),
    'policy of a sweep': ('sweep --model normnet31k --policy flip', 'policy is given, and searched'),
    'rates of a range test': ('find-lr --set lr_max=1', 'lr_max has no part in a range test'),
    'shape of a range test': ('find-lr --set anneal=linear', 'anneal has no part in a range test'),
    'tta of a range test': ('find-lr --set tta=flip', 'tta has no part in a range test'),
    'a name of before': ('train --set views=flip', 'the setting views is called tta now'),
    'converted digits': ('train --data digits --convert', 'convert is for your own images'),
    'converted digits of a range test': ('find-lr --data digits --convert', 'convert is for your own images'),
    'data of a packaged net': ('demo groupnet --data TREE', 'groupnet is none'),
    'device of a packaged net': ('demo groupnet --device cpu', 'groupnet is none'),
    'runs of steps': ('bench step --runs 3', '--runs is for the speedrun on a GPU'),
    'data of steps': ('bench step --data TREE', '--data is for the speedrun on a GPU'),
    'loggers twice': ('train --lr-max 1e-3 --epochs 1 --bs 20 --log tensorboard,tensorboard', 'the same logger twice'),
    'one channel': ('train --epochs 1 --bs 20 --model-args n_in=1', 'n_in, which a training sets by itself'),
    'one width': ('train --model speednet --recipe speedrun --bs 20 --model-args widths=[3]', 'those of three groups'),
    'negative classes': ('summary normnet31k --model-args n_out=-3', 'n_out of normnet31k'),
    'no number': ('summary speednet --model-args scale=NaN', 'scale of speednet'),
    'division by zero': ('summary speednet --model-args scale=0', 'cannot be built with'),
}

@pytest.fixture
def no_work(monkeypatch):
    "What would take long raises an error"
    import fastcifar.bench.run as bench, fastcifar.share.demo as demo, fastcifar.models.summary as inspect, fastcifar.runs.fit as recipes
    import fastcifar.runs.reopen as runs, fastcifar.study.study as study, fastcifar.study.sweep as sweep
    def work(*args, **kw): raise AssertionError('the work was begun')
    for module, name in ((recipes, 'recipe_learner'), (runs, 'recipe_learner'), (sweep, 'recipe_learner'),
                         (runs, 'evaluate_run'), (study, '_on_pool'), (bench, 'bench_step'), (bench, 'bench_data'),
                         (demo, 'demo_app'), (inspect, 'summarize')):
        monkeypatch.setattr(module, name, work)

@pytest.mark.parametrize('name', LINES)
def test_command_is_refused_in_a_line(name, main, tree, tmp_path, no_work):
    line, says = LINES[name]
    args = line.replace('TREE', str(tree)).split()
    if args[0] in ('train', 'compare', 'sweep', 'find-lr') and '--data' not in args: args += ['--data', str(tree)]
    code, said, err = main(*args)
    assert code == 2 and err.startswith('fastcifar: ') and err.count('\n') == 1 and says in err, err
    assert not list(tmp_path.iterdir()) # nothing was begun

def _config(): return configure('fast', 'normnet31k', data='digits')

CALLS = {
    'a constant rate': (lambda: create_recipe('fast', 'normnet31k', schedule='constant', lr_min=1e-3), 'lr_min is for'),
    'a configuration overridden': (lambda: override_recipe(_config(), gamma=.5), 'gamma is for'),
    'groups of a configuration': (lambda: override_recipe(_config(), groups=4), 'groups are for group norm'),
    'a configuration': (lambda: configure('reference', 'normnet41k', peak=.3), 'peak is for'),
    'kind of no decay': (lambda: configure('fast', 'normnet31k', decay_all=True), 'wd is 0'),
    'converted digits': (lambda: configure(data='digits', convert=True), 'convert is for your own images'),
    'converted arrays': (lambda: load_data((np.zeros((9, 32, 32, 3), np.uint8), np.zeros(9, int)), True), 'are arrays'),
    'an optimizer': (lambda: optimizer('sgd', update_norm=12.), 'sgd has no update_norm'),
    'a net': (lambda: create_model('groupnet', norm='ln', groups=4), 'groups are for group norm'),
    'a sweep': (lambda: Sweep('s', 'normnet31k', 'digits', wd=.1), 'wd is given, and searched'),
    'a study': (
        lambda: study_grid(['normnet31k', 'normnet41k'], recipes='reference', peak=.3), 'normnet41k, reference: peak'),
    'Ray and jobs': (lambda: Study('s', 'normnet31k', 'digits').run(jobs=2, tasks='a cluster'), 'Ray places its own'),
    'Ray and a device': (
        lambda: Study('s', 'normnet31k', 'digits').run(device='cpu', tasks='a cluster'), 'Ray places its own'),
    'a GPU that is none': (lambda: RayTasks(gpus=float('nan')), 'a task with 1 processors and nan GPUs'),
    'a benchmark': (lambda: run_bench('data', n=3), '--runs is for the speedrun on a GPU'),
    'a demo': (lambda: serve_demo('groupnet', data='digits', block=False), 'groupnet is none'),
    'channels of a training': (
        lambda: build_model(configure(model_args=dict(n_in=1)), 10), 'n_in, which a training sets'),
}

@pytest.mark.parametrize('name', CALLS)
def test_call_is_refused_in_a_line(name, tmp_path, monkeypatch, no_work):
    monkeypatch.chdir(tmp_path)
    call, says = CALLS[name]
    with pytest.raises(FastcifarError) as e: call()
    assert says in str(e.value) and '\n' not in str(e.value)
    assert not list(tmp_path.iterdir())

def test_what_has_an_effect_is_taken():
    assert create_recipe(mom=.5, mom_cycle=None).mom == .5 and create_recipe(schedule='constant', mom=.5).mom == .5
    assert create_recipe('reference', 'normnet48k', gamma=.5).gamma == .5
    assert create_recipe('fast', 'normnet31k', schedule='steps', gamma=.5, step_epochs=2).step_epochs == 2
    assert create_recipe('fast', 'normnet31k', schedule='constant').lr_min == .02 / 25 # idle, not given
    assert create_recipe('fast', 'normnet31k', lr_min=None, schedule='constant').lr_min is None
    assert create_recipe('speedrun', 'speednet', optimizer='sgd').update_norm == 12
    assert configure('fast', 'normnet31k', norm='gn', groups=4).groups == 4
    assert Sweep('s', 'normnet31k', 'digits', lr_max=.01).base.lr_max == .01 # the search goes out from it
    assert Sweep('s', 'normnet31k', 'digits', decay='l2').base.decay == 'l2' # of the weight decay that is searched
    assert Sweep('s', 'normnet31k', 'digits', tune=['lr_max'], wd=.1).base.wd == .1

def test_a_recipe_file_holds_idle_settings(tmp_path, main, tree):
    "It has all; what somebody has changed in it to no effect is refused"
    file = tmp_path/'r.json'
    for name, settings in (('fast', dict(schedule='constant', lr_max=.003)), ('reference', dict(optimizer='adam'))):
        r = create_recipe(name, 'normnet31k', **settings)
        written = write_recipe(file, r, name, 'normnet31k', True)
        kept = read_recipe(file)
        assert as_json(asdict(create_recipe(kept.pop('recipe'), kept.pop('model'), **kept))) == as_json(asdict(r))
    written['settings']['gamma'] = .5
    file.write_text(json.dumps(written))
    with pytest.raises(FastcifarError, match='r.json: gamma is for the schedule steps'): read_recipe(file)
    write_recipe(file, create_recipe('fast', 'normnet31k'), 'fast', 'normnet31k', True, norm='gn', groups=4)
    quick = ('--data', tree, '--epochs', 1, '--bs', 20, '--no-pictures')
    assert main('train', '--recipe', file, '--norm', 'ln', *quick, '--out', 'r')[0] == 0 # groups went with gn
    assert run_config('r').groups is None

# --- arguments of nets

VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.floats(), st.text(max_size=3),
                   st.sampled_from([10**400, 10**9, 2**31, -1, [3], [3, 3, 3], [64, -1, 3], [[1]] * 3, {}, 'gn']))

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list_models()), st.dictionaries(st.sampled_from(
    'n_out n_in groups dropout mended residual bias shared head_scale widths scale'.split()), VALUES, max_size=3),
    st.sampled_from(['bn', 'gn', 'ln_chw']))
def test_arguments_make_a_net_or_a_line(name, args, norm):
    import torch
    try:
        with torch.device('meta'): net = create_model(name, norm=norm, **args)
    except FastcifarError as e:
        assert '\n' not in str(e)
        return
    n_in, n_out = net.config.get('n_in', 3), net.config['n_out']
    if n_in > 40 or n_out > 40: return
    assert net.to_empty(device='cpu').eval()(torch.zeros(1, n_in, 32, 32)).shape == (1, n_out)

def test_file_of_a_net_that_is_none(tmp_path):
    net = create_model('normnet31k')
    for change in (dict(n_out=-3), dict(n_in=True), dict(dropout=2), dict(name='x'), dict(extra=1)):
        net.config = dict(name='normnet31k', n_out=10, norm='bn') | change
        save_model(net, tmp_path/'m.safetensors')
        with pytest.raises(FastcifarError, match='m.safetensors describes a net that cannot be built'):
            load_model(tmp_path/'m.safetensors')
    net.config = dict(name='normnet31k', n_out=10, norm='bn', groups=4) # as older versions let pass
    save_model(net, tmp_path/'m.safetensors', classes=list('0123456789'))
    assert load_model(tmp_path/'m.safetensors').note['classes']

def test_labels_far_apart():
    x = np.zeros((20, 32, 32, 3), np.uint8)
    with pytest.warns(UserWarning, match='the labels are 0, 100000000, not 0 to 1'):
        data = load_data((x, np.repeat([0, 10**8], 10)))
    assert data.classes == ['0', '100000000'] and len(data.counts()) == 2

# --- places that cannot be written

@pytest.mark.parametrize('place', ['/dev/null/p.png', 'FOLDER.png', 'FILE/p.png'])
def test_a_plot_that_cannot_be_written_is_noticed_before_the_work(place, main, run, tmp_path, no_work):
    (tmp_path/'FOLDER.png').mkdir(), (tmp_path/'FILE').write_text('')
    before = sorted(tmp_path.rglob('*'))
    commands = [('find-lr', '--data', 'digits', '--plot', place), ('bench', 'step', '--out', place),
                ('summary', 'normnet31k', '--graph', place), ('summary', 'normnet31k', '--field', place)]
    if place != 'FOLDER.png': commands.append(('evaluate', run, '--plots', Path(place).parent))
    for args in commands:
        code, _, err = main(*args)
        assert code == 2 and 'cannot write ' in err and err.count('\n') == 1, (args, err)
    assert sorted(tmp_path.rglob('*')) == before

# --- settings are declared once

TORCH_FREE = """
import sys, time
{line}
loaded = [m for m in ('torch', 'fastai', 'albumentations', 'matplotlib', 'pandas') if m in sys.modules]
print(loaded, time.process_time() < 1)
"""
HELP = 'from fastcifar.cli import main\ntry: main({args})\nexcept SystemExit: pass'

@pytest.mark.parametrize('line', ['import fastcifar.runs.settings', *(HELP.format(args=args) for args in (
    [], ['--help'], ['train', '--help'], ['sweep', '--help']))])
def test_settings_and_help_are_there_at_once(line):
    done = subprocess.run([sys.executable, '-c', TORCH_FREE.format(line=line)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == '[] True', done.stderr[-2000:]

def test_declared_names_are_those_that_are_implemented():
    from fastcifar.data.policies import POLICIES
    from fastcifar.models.layers import NORMS
    from fastcifar.train.optim import OPTIMIZERS
    from fastcifar.train.tta import VIEWS
    from fastcifar.device import PRECISIONS
    declared = {f.name: f.metadata['rule'].names for f in fields(Config) if isinstance(f.metadata['rule'], OneOf)}
    assert declared == dict(
        policy=list(POLICIES), optimizer=list(OPTIMIZERS), schedule=list(SCHEDULES), anneal=['cos', 'linear'],
        decay=['decoupled', 'l2'], tta=list(VIEWS), model=list_models(), norm=list(NORMS), recipe=list(RECIPES),
        precision=['auto', *PRECISIONS], tfms=['auto', 'item', 'batch'])
    known = {f.name for f in fields(Config)}
    assert {k for names in (*SCHEDULES.values(), *OPTIMIZERS.values()) for k in names} <= known

def test_every_setting_is_declared_whole():
    for f in fields(Config):
        assert f.metadata['help'] and f.metadata['option'] in ('', *GROUPS), f.name
        assert (type(None) in getattr(f.type, '__args__', ())) >= bool(f.metadata['none']), f.name
        check_setting(f, f.default)
    assert list(settings_table().index) == [f.name for f in fields(Config)]

NEW_SETTINGS = """
    sharpness:float = setting(0., 'weight of the sharpness in the loss', between(0, 2), option='recipe')
    tilt:str = setting('left', 'side that images lean to', OneOf(('left', 'right')))
"""
WITH_NEW_SETTINGS = """
import importlib.util, io, json, re, sys
from contextlib import redirect_stderr, redirect_stdout
name = 'fastcifar.runs.settings'
spec = importlib.util.find_spec(name)
source = open(spec.origin, encoding='utf-8').read()
source, n = re.subn(r'(?=\\n\\n# %% [^\\n]+\\n@patch\\ndef __repr__)', {new!r}, source, count=1)
assert n == 1
module = sys.modules[name] = importlib.util.module_from_spec(spec)
exec(compile(source, spec.origin, 'exec'), vars(module))
from fastcifar.cli import main

def run(*args):
    "The exit code, and what is printed"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        try: code = main(list(args))
        except SystemExit as e: code = e.code or 0
    return code, ' '.join(out.getvalue().split())
"""
CHECKS = """
for name in ('train', 'compare', 'sweep', 'find-lr'):
    code, text = run(name, '--help')
    assert "--sharpness SHARPNESS weight of the sharpness in the loss (default: the recipe's)" in text, text
    assert 'tilt side that images lean to (left or right)' in text, text
assert 'torch' not in sys.modules
code, text = run('train', '--sharpness', '2')
assert (code, text) == (2, 'fastcifar: sharpness is 2.0: choose a value of at least 0 and below 2'), text
assert run('train', '--sharpness', 'x')[1].startswith("fastcifar: argument --sharpness: 'x' is not a number")
assert "no tilt named 'lef': did you mean 'left'?" in run('find-lr', '--set', 'tilt=lef')[1]
code, text = run('recipes', 'normnet31k')
assert '--sharpness 0' in text and 'tilt left' in text, text
run('recipes', 'normnet31k', '--save', 'mine.json')
with open('mine.json') as f: saved = json.load(f)
assert saved['settings']['sharpness'] == 0 and saved['settings']['tilt'] == 'left'
saved['settings']['sharpness'] = -1
with open('mine.json', 'w') as f: json.dump(saved, f)
assert 'sharpness is -1: choose' in run('train', '--recipe', 'mine.json')[1]
print('checked')
"""

def test_a_new_setting_is_one_declaration(tmp_path):
    "It is checked, an option with its help, in recipes and their files, and in tables, by its declaration alone"
    program = WITH_NEW_SETTINGS.format(new=NEW_SETTINGS) + CHECKS
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == 'checked\n', done.stderr[-2000:]

# --- Ctrl-C

def test_ctrl_c_while_arguments_are_read(main, monkeypatch):
    import fastcifar.cli as cli
    def interrupted(text): raise KeyboardInterrupt
    monkeypatch.setattr(cli, '_settings', interrupted)
    assert main('train', '--set', 'wd=1') == (130, '', '\nfastcifar: stopped\n')
    monkeypatch.setattr(cli, 'parser', lambda: interrupted(''))
    assert main('models') == (130, '', '\nfastcifar: stopped\n')

# --- where rates come from

RATES = [
    ('fast', {}, 'LRMIN 8.00e-04; LRMAX 2.00e-02, as the recipe has it.'),
    ('fast', dict(lr_max=.01), 'LRMIN 4.00e-04; LRMAX 1.00e-02, as given.'),
    ('one_cycle', dict(lr_max=.01), 'LRMIN 2.00e-04, a fiftieth of LRMAX; LRMAX 1.00e-02, as given.'),
    ('one_cycle', {}, 'LRMIN 1.00e-05; LRMAX 1.00e-03, found by a range test before the training.'),
    ('fast', dict(schedule='constant'), 'Learning rate 2.00e-02, as the recipe has it.'),
    ('fast', dict(schedule='steps', lr_max=.1), 'Learning rate 1.00e-01 at first, as given.'),
]

@pytest.mark.parametrize('recipe, more, says', RATES)
def test_a_page_says_where_rates_come_from(recipe, more, says, run, tmp_path, monkeypatch):
    import fastcifar.runs.report as report
    shutil.copytree(run, tmp_path/'r')
    c = configure(recipe, 'normnet31k', **more)
    config = json.loads((run/'config.json').read_text())
    own = {k: getattr(c, k) for k in ('recipe', 'bs', 'schedule', 'lr_max', 'lr_min', 'lr_end', 'mom_cycle')}
    (tmp_path/'r/config.json').write_text(json.dumps(config | own | dict(bs=c.bs)))
    m = json.loads((run/'metrics.json').read_text())
    found = (c.lr_min or (c.lr_max or 0) / 50 or 1e-5), c.lr_max or 1e-3
    (tmp_path/'r/metrics.json').write_text(json.dumps(m | dict(zip(('lr_min', 'lr_max'), found))))
    shown = {}
    monkeypatch.setattr(report, 'render', lambda template, **values: shown.update(values) or '')
    for name in ('drawn_svgs', '_losses', '_shown', '_augmented'):
        monkeypatch.setattr(report, name, lambda *a, **kw: {})
    monkeypatch.setattr('fastcifar.runs.reopen.evaluate_run', lambda *a: interp(run))
    monkeypatch.setattr('fastcifar.runs.artifacts.drawn_svgs', lambda *a: {})
    report_run(tmp_path/'r', say=quiet)
    assert shown['rates'] == says

_interps = {} # of the fixture's run

def interp(out): return _interps[out]

@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "A cache for what is made once for all tests"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FASTCIFAR_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield

@pytest.fixture(scope='module')
def run(tree, own, tmp_path_factory):
    "A finished run folder"
    out = tmp_path_factory.mktemp('run')/'run'
    c = configure('fast', 'normnet31k', data=str(tree), epochs=1, bs=20)
    train_run(c, out, bars=False, pictures=False, say=quiet)
    _interps[out] = evaluate_run(out, bars=False)
    return out

@pytest.mark.parametrize('file, content', [
    ('environment.json', '[]'), ('metrics.json', '[]'), ('metrics.json', '{"test_images": 0}'),
    ('lr_range.json', '{"lr_min": "a", "lr_max": 1}'), ('lr_range.json', '[1]'),
    ('history.csv', ''), ('history.csv', 'epoch\n1\n')])
def test_damaged_tables_of_a_run(file, content, run, tmp_path, monkeypatch):
    monkeypatch.setattr('fastcifar.runs.reopen.evaluate_run', lambda *a: interp(run))
    for name in ('_losses', '_shown', '_augmented'):
        monkeypatch.setattr(f'fastcifar.runs.report.{name}', lambda *a, **kw: {})
    shutil.copytree(run, tmp_path/'r')
    (tmp_path/'r'/file).write_text(content)
    with pytest.raises(FastcifarError, match='damaged') as e: report_run(tmp_path/'r', say=quiet)
    assert '\n' not in str(e.value)

def test_data_without_a_format_to_compare(run, tmp_path):
    with pytest.raises(FastcifarError, match='none is written: leave them out'):
        export_run(run, tmp_path/'e', onnx=False, data='digits')
    assert not (tmp_path/'e').exists()

# --- a damaged study

@pytest.fixture(scope='module')
def study(tree, own, tmp_path_factory):
    "A finished study without its weights: the folder, and what it was made from"
    out = tmp_path_factory.mktemp('study')/'study'
    what = dict(models='normnet31k', data=str(tree), norms=('bn', 'gn'), seeds=2, batch_sizes=20, epochs=2)
    s = Study(out, **what)
    for c in s.grid: train_run(c, out/'runs'/run_name(c), threads=1, bars=False, pictures=False, say=quiet)
    s.run(bars=False, say=quiet)
    for f in (*out.glob('runs/*/checkpoints'), *out.glob('*.png'), *out.glob('runs/*/model.safetensors')):
        shutil.rmtree(f) if f.is_dir() else f.unlink()
    return out, what

ODD = st.one_of(st.none(), st.booleans(), st.integers(-2, 60), st.floats(), st.text(max_size=4),
                st.sampled_from([10**400, 1e308, -1, '../../evil', '\x1b[31m', [], {}, [[]] * 9, {'a': 1}, 'bn', 'gn']))

def _places(v, at=()):
    yield at
    for k, w in v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ():
        yield from _places(w, (*at, k))

def _turned(value, share, new):
    "JSON with one of its values replaced"
    value, places = copy.deepcopy(value), list(_places(value))
    place = places[int(share * len(places))]
    if not place: return new
    v = value
    for k in place[:-1]: v = v[k]
    v[place[-1]] = new
    return value

def _damage(out, original, name, kind, share, new, junk):
    f, other = out/name, original/'runs/normnet31k-gn-fast-bs20-seed0'/Path(name).name
    data = f.read_bytes() if f.is_file() else b''
    if f.is_file(): f.unlink()
    if kind == 'directory': f.mkdir()
    if kind == 'truncated': f.write_bytes(data[:int(share * len(data))])
    if kind == 'flipped': f.write_bytes(data[:(i := int(share * len(data)))] + junk + data[i + len(junk):])
    if kind == 'junk': f.write_bytes(junk)
    if kind == 'another' and other.exists(): shutil.copy(other, f)
    if kind == 'value':
        try: f.write_text(json.dumps(_turned(json.loads(data), share, new)))
        except ValueError: # no JSON
            f.write_bytes(re.sub(rb'[0-9.]+', lambda m: str(new).encode(), data, count=1 + int(9 * share)))

OF_A_RUN = 'config.json metrics.json history.csv failure.txt environment.json'.split()
FILES = ['study.json', 'results.csv', 'report.html', 'answer.txt', 'curves.csv',
         *(f'runs/normnet31k-{run}/{f}' for run in ('bn-fast-bs20-seed0', 'gn-fast-bs20-seed1') for f in OF_A_RUN)]
KINDS = ['removed', 'directory', 'truncated', 'flipped', 'junk', 'another', 'value', 'value', 'value']
DAMAGE = st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), ODD,
                            st.binary(max_size=4)), min_size=1, max_size=3, unique_by=lambda d: d[0])

def accuracies(r):
    done = r[r.status == 'finished']
    return {(norm, seed): a for norm, seed, a in zip(done.norm, done.seed, done.test_accuracy)}

@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(damage=DAMAGE)
def test_a_damaged_study(study, damage, tmp_path_factory):
    "A line, or a result in which every run that counts is as it was, and the others are named"
    import fastcifar.study.study as module
    original, what = study
    right = accuracies(pd.read_csv(original/'results.csv'))
    out = tmp_path_factory.mktemp('damaged')/'study'
    shutil.copytree(original, out)
    for d in damage: _damage(out, original, *d)
    ways = (lambda: report_study(out, say=told.append), lambda: Study(out, **what).run(bars=False, say=told.append))
    def not_now(work, calls, *more): return ((i, ['not now'] * len(args[0])) for i, args in calls.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'save_plot', lambda *a: None), patch.setattr(module, '_on_pool', not_now)
        patch.setattr(module, 'drawn_svgs', lambda plots, *a: dict.fromkeys(plots, []))
        for way in ways:
            told = []
            try: way()
            except FastcifarError as e:
                assert '\n' not in str(e)
                continue
            if not (out/'results.csv').is_file():
                assert any('results.csv' in s for s in told)
                continue
            r = pd.read_csv(out/'results.csv')
            assert accuracies(r).items() <= right.items() and len(r) == 4
            answer = (out/'answer.txt').read_text() if (out/'answer.txt').is_file() else None
            for row in r[r.reason.notna()].itertuples():
                assert row.status in ('failed', 'finished') and '\x1b' not in row.reason
                assert answer is None or f'{row.norm} fast 20 seed {row.seed}: ' in answer
    shutil.rmtree(out.parent)

@pytest.mark.parametrize('file, content, says', [
    ('metrics.json', '{"test_accuracy": 0.99}', 'metrics.json is damaged'), ('metrics.json', None, 'cannot read'),
    ('config.json', '{}', 'not the configuration of a run'),
    ('history.csv', 'epoch,accuracy\n1,.5', 'history.csv is damaged'), ('history.csv', None, 'history.csv is damaged')])
def test_the_broken_run_is_named(file, content, says, study, main, tmp_path):
    shutil.copytree(study[0], tmp_path/'s')
    f = tmp_path/'s/runs/normnet31k-bn-fast-bs20-seed1'/file
    f.unlink()
    f.mkdir() if content is None else f.write_text(content)
    code, _, err = main('report', 's')
    r = pd.read_csv(tmp_path/'s/results.csv')
    assert code == 0 and 'Traceback' not in err and r.reason.notna().sum() == 1
    (line,) = [l for l in (tmp_path/'s/answer.txt').read_text().splitlines() if l.startswith(('failed', 'incomplete'))]
    assert 'normnet31k bn fast 20 seed 1: ' in line and says in line
    assert (r.status == 'finished').sum() == (4 if file == 'history.csv' else 3)

LISTS = [None, '', '[]', '{"runs": {}}', '{"runs": []}', '{"runs": {"a": {"model": []}}}', '{"runs": {"a": {}}}']

@pytest.mark.parametrize('content', LISTS)
def test_a_damaged_list_of_runs(content, study, main, tmp_path):
    shutil.copytree(study[0], tmp_path/'s')
    (tmp_path/'s/study.json').unlink()
    (tmp_path/'s/study.json').mkdir() if content is None else (tmp_path/'s/study.json').write_text(content)
    code, _, err = main('report', 's')
    assert code == 2 and err.startswith('fastcifar: ') and err.count('\n') == 1, err

def test_a_run_whose_folder_is_none(study, tmp_path):
    "It fails by itself, with a reason; the others go on"
    from fastcifar.study.study import _one_pass
    shutil.copytree(study[0], tmp_path/'s')
    s = Study(tmp_path/'s', **study[1])
    folder, c = tmp_path/'s/runs', s.grid[0]
    shutil.rmtree(folder/run_name(c))
    (folder/run_name(c)).write_text('a file')
    (said,) = _one_pass([c], folder, 1, 'cpu', os.getpid())
    assert 'exists' in said.lower() or 'not a directory' in said.lower()
    r = collect_runs([folder/run_name(c) for c in s.grid], s.grid)
    assert r.status.tolist() == ['failed', *['finished'] * 3] and 'is not a folder' in r.reason[0]

def test_report_of_a_study_takes_no_data(study, main):
    code, _, err = main('report', study[0], '--data', 'digits')
    assert code == 2 and 'this is a study: leave them out' in err
