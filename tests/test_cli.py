"The whole program, as a person uses it."
import argparse, contextlib, io, json, os, re, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fastcifar.models.zoo import list_models

ROOT = Path(__file__).resolve().parents[1]
QUICK = ('--epochs', 3, '--bs', 20, '--lr-max', '1e-3')

@pytest.fixture(scope='module')
def run(tree, tmp_path_factory):
    "A finished run folder"
    out = tmp_path_factory.mktemp('run')/'out'
    done = subprocess.run([sys.executable, '-m', 'fastcifar', 'train', '--data', str(tree), *map(str, QUICK), '--out', str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout

def snapshot(folder): return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob('*') if p.is_file()}

def test_help_imports_nothing_heavy():
    code = 'import sys; from fastcifar.cli import main\ntry: main(["--help"])\nexcept SystemExit: pass\nprint([m for m in ("torch", "fastai", "albumentations", "matplotlib", "pandas") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip().endswith('[]')

def in_a_terminal(*args, cwd):
    "Exit code and what a terminal of 160 columns shows"
    pty, termios = map(pytest.importorskip, ('pty', 'termios')) # not on Windows
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    p = subprocess.Popen([sys.executable, '-m', 'fastcifar', *map(str, args)], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, 'TERM': 'xterm'})
    os.close(theirs)
    shown = b''
    while True:
        try: more = os.read(ours, 65536)
        except OSError: break # Linux' way to say that the other end is closed
        if not more: break
        shown += more
    os.close(ours)
    return p.wait(60), shown.decode()

def test_tables_and_progress_in_a_terminal(tree, tmp_path):
    code, shown = in_a_terminal('summary', 'sepnet178k', cwd=tmp_path)
    assert code == 0 and '178,178' in shown and '\x1b[1m' in shown # a bold header, by rich
    code, shown = in_a_terminal('compare', '--data', tree, '--models', 'normnet31k', '--norms', 'bn', '--epochs', 1, '--bs', 20, '--seeds', 1, '--no-pictures', cwd=tmp_path)
    assert code == 0 and '100%' in shown and '1/1' in shown and 'Traceback' not in shown
    code, shown = in_a_terminal('train', '--data', tree, '--model', 'normnet31k', '--epochs', 1, '--bs', 20, '--lr-max', '1e-3', '--no-pictures', cwd=tmp_path)
    assert code == 0 and '3/3' in shown and 'Traceback' not in shown

def commands():
    from fastcifar.cli import parser
    return next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))

def helped(main, *args):
    "What --help prints, which ends the program"
    with pytest.raises(SystemExit) as e, contextlib.redirect_stdout(io.StringIO()) as s: main(*args, '--help')
    assert e.value.code in (0, None)
    return ' '.join(s.getvalue().split())

def test_help_of_every_command(main):
    names = 'train compare sweep find-lr evaluate report demo predict export cache record replay models recipes summary bench'.split()
    assert sorted(commands()) == sorted(names)
    top = helped(main)
    for name in names:
        text = helped(main, name)
        assert f' {name} ' in top and text.startswith(f'usage: fastcifar {name} ')
        for a in commands()[name]._actions:
            assert (a.option_strings or [a.metavar or a.dest])[0] in text and a.help, (name, a)

def test_options_stand_in_groups_and_have_examples(main):
    from fastcifar.cli import COMMANDS, GROUPS, parser
    for name, p in commands().items():
        titles = {a.dest: g.title for g in p._action_groups for a in g._group_actions}
        positional = {a.dest for a in p._actions if not a.option_strings}
        assert {k for k, t in titles.items() if t not in GROUPS} == positional | {'help'}
        shown = p.format_help().partition('\nexamples:\n')[2].splitlines()
        assert shown == [f'  fastcifar {line}' for line in COMMANDS[name].examples] and len(shown) == 3
        for line in shown:
            assert parser().parse_args(shlex.split(line.partition('|')[0])[1:]).command == name

def test_help_without_a_command(main):
    code, said, err = main()
    assert code == 0 and err == '' and ' '.join(said.split()) == helped(main)

def test_run_folder(run):
    out, said = run
    names = {p.relative_to(out).as_posix() for p in out.rglob('*')}
    assert {'config.json', 'environment.json', 'history.csv', 'metrics.json', 'model.safetensors', 'checkpoints', 'curves.png', 'schedule.png', 'misclassified.png', 'predictions.png',
            'class_accuracy.png', 'augmented.png', 'confusion_matrix.png', 'top_losses.png', 'samples.png', 'wrong_predictions.csv', 'class_accuracy.csv'} <= names
    m = json.loads((out/'metrics.json').read_text())
    assert f'test accuracy {m["test_accuracy"]:.2%}' in said and str(out) in said
    h = pd.read_csv(out/'history.csv')
    assert h.epoch.tolist() == [1, 2, 3] and abs(h.accuracy.iloc[-1] - m['test_accuracy']) < 1e-6
    assert m['lr_min'] == m['lr_max'] / 50 and h.lr.iloc[-1] < h.lr.max() / 5
    env = json.loads((out/'environment.json').read_text())
    assert env['threads'] >= 1 and env['world_size'] == 1 and env['versions']['torch']
    for p in out.glob('*.png'):
        with Image.open(p) as im: assert im.width > 200
    assert not [n for n in names if n.endswith(('.pkl', '.pth', '.pt'))]

def test_finished_run_is_left_alone(run, main, tree):
    out, _ = run
    before = snapshot(out)
    code, said, _ = main('train', '--data', tree, *QUICK, '--out', out)
    assert code == 0 and 'is finished' in said
    code, _, err = main('train', '--resume', out, '--epochs', 5, '--model', 'groupnet')
    assert code == 2 and 'leave out --epochs, --model' in err and err.count('\n') == 1
    code, _, err = main('train', '--data', tree, *QUICK, '--seed', 1, '--out', out)
    assert code == 2 and 'seed=0, not 1' in err and err.count('\n') == 1
    assert main('train', '--resume', out)[0] == 0
    assert snapshot(out) == before

RESUMABLE = {'help', 'json', 'data', 'device', 'workers', 'threads', 'compile', 'no_pictures', 'log', 'checkpoint_every',
             'deterministic', 'resume'} # where and how, not what

def test_resume_refuses_every_setting(run, main):
    "Even one that is as the run has it, or as it would be without the option"
    out, _ = run
    usual = dict(seed='0', recipe='one_cycle', precision='auto', tfms='auto', epochs='3', bs='20', out=str(out),
                 set='anneal=cos', model_args='n_in=3')
    for a in commands()['train']._actions:
        if a.dest in RESUMABLE: continue
        value = () if a.nargs == 0 else (usual.get(a.dest, '1'),)
        option = a.option_strings[0]
        code, said, err = main('train', '--resume', out, option, *value)
        assert code == 2 and err == f'fastcifar: --resume goes on with the settings of the run: leave out {option}\n'

def test_hint_on_how_to_go_on_holds_what_was_given(main, tree, tmp_path, monkeypatch):
    from fastcifar.train.loop import CrossEntropy
    call, n = CrossEntropy.__call__, 0
    def stop(self, inp, targ):
        nonlocal n
        n += 1
        if n == 4: os.kill(os.getpid(), signal.SIGINT)
        return call(self, inp, targ)
    monkeypatch.setattr(CrossEntropy, '__call__', stop)
    kept = ['--data', str(tree), '--workers', '1', '--threads', '1', '--device', 'cpu', '--checkpoint-every', '1', '--no-pictures']
    code, said, err = main('train', *kept, *QUICK, '--model', 'normnet31k', '--tfms', 'item', '--out', 'my run')
    assert code == 130 and err.count('\n') == 1, err
    hint = shlex.split(err.partition('go on with: ')[2])
    assert hint == ['fastcifar', 'train', '--resume', 'my run', *kept]
    code, said, err = main(*hint[1:])
    assert code == 0 and 'continuing after' in said, err

def test_evaluate_and_predict(run, main, tree):
    out, _ = run
    m = json.loads((out/'metrics.json').read_text())
    e = json.loads(main('evaluate', out, '--json')[1])
    assert e['test_accuracy'] == m['test_accuracy'] and e['test_images'] == 24 and set(e['class_accuracy']) == {'blue', 'green', 'red'}
    files = sorted((tree/'test').rglob('*.png'))
    p = json.loads(main('predict', '--from', out, '--json', *files)[1])
    right = sum(r['prediction'] == f.parent.name for r, f in zip(p, files))
    assert right == round(m['test_accuracy'] * 24)
    assert main('predict', '--from', out, files[0], '--top', 1)[1].startswith(str(files[0]))

def test_moved_data_is_found_with_data(run, main, tree, tmp_path):
    shutil.copytree(tree, tmp_path/'moved')
    (tmp_path/'run').mkdir()
    for f in ('config.json', 'environment.json', 'model.safetensors'): shutil.copy(run[0]/f, tmp_path/'run')
    assert main('evaluate', tmp_path/'run')[0] == 2
    assert main('evaluate', tmp_path/'run', '--data', tmp_path/'moved')[0] == 0
    (tmp_path/'moved/test/red/00.png').unlink()
    code, _, err = main('evaluate', tmp_path/'run', '--data', tmp_path/'moved')
    assert code == 2 and 'its hash differs' in err

def test_find_lr(main, tree, tmp_path, monkeypatch):
    r = json.loads(main('find-lr', '--data', 'digits', '--model', 'normnet31k', '--bs', 8, '--json')[1])
    assert not r['note'] and 3e-5 < r['lr_min'] < r['lr_max'] / 2 and 1e-3 < r['lr_max'] < 3e-2
    assert (tmp_path/'lr_range.png').exists()
    monkeypatch.setattr('fastcifar.train.schedule.LEAST_FALL', 1e9) # as if no curve could be read
    said = 'the range test is uncertain: the loss falls by .*; LRMAX 0.003 is a usual rate instead'
    with pytest.warns(UserWarning, match=said):
        code, out, _ = main('find-lr', '--data', tree, '--model', 'normnet31k', '--bs', 20, '--plot', 'other.png')
    assert code == 0 and 'LRMAX 3.00e-03 (uncertain)' in out and (tmp_path/'other.png').exists()

def test_found_range_is_used(main, tree, tmp_path):
    m = json.loads(main('train', '--data', tree, '--epochs', 1, '--bs', 4, '--valid', 12, '--out', 'r', '--json')[1])
    r = json.loads((tmp_path/'r/lr_range.json').read_text())
    assert [m[k] for k in ('lr_min', 'lr_max', 'lr_note')] == [r[k] for k in ('lr_min', 'lr_max', 'note')]
    assert m['valid_images'] == 12 and (tmp_path/'r/lr_range.png').exists()

def test_refused_command_leaves_the_folder_free(main, tree, tmp_path):
    code, _, err = main('train', '--data', tree, *QUICK, '--model-args', 'nonsense=1', '--out', 'q')
    assert code == 2 and 'nonsense' in err and not (tmp_path/'q').exists()
    assert main('train', '--data', tree, *QUICK, '--valid', 60, '--out', 'q')[0] == 2
    code, said, err = main('train', '--data', tree, '--epochs', 1, '--bs', 20, '--lr-max', '1e-3', '--model', 'normnet31k', '--model-args', 'mended=true', '--valid', 12, '--no-pictures', '--out', 'q')
    assert code == 0, err
    assert json.loads((tmp_path/'q/config.json').read_text())['model_args'] == {'mended': True}
    assert main('evaluate', 'q')[0] == 0

def test_killed_and_continued(run, cli, tree, tmp_path):
    "SIGKILL between two epochs; the same command goes on and ends bit-equal"
    out = tmp_path/'killed'
    cmd = [sys.executable, '-m', 'fastcifar', 'train', '--data', str(tree), *map(str, QUICK), '--out', str(out)]
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not list(out.glob('checkpoints/epoch_*')):
        assert p.poll() is None and time.monotonic() < end
        time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (out/'metrics.json').exists()
    done = cli('train', '--resume', out)
    assert done.returncode == 0 and 'continuing after epoch' in done.stdout
    a, b = load_file(run[0]/'model.safetensors'), load_file(out/'model.safetensors')
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    h = [pd.read_csv(f/'history.csv').drop(columns='seconds') for f in (run[0], out)]
    assert h[0].equals(h[1])

def test_second_process_is_refused(tmp_path, main, tree):
    from filelock import FileLock
    (tmp_path/'busy').mkdir()
    with FileLock(tmp_path/'busy/.lock'): code, _, err = main('train', '--data', tree, *QUICK, '--out', 'busy')
    assert code == 2 and 'another process' in err

BAD = {
    'unknown model': (['train', '--data', '{tree}', '--model', 'custom_resnt'], "did you mean 'custom_resnet'"),
    'model of another library': (['train', '--data', '{tree}', '--model', 'resnet18'], "there is no model named 'resnet18': known: "),
    'unknown policy': (['train', '--data', '{tree}', '--policy', 'crop_flop'], "did you mean 'crop_flip'"),
    'unknown norm': (['train', '--data', '{tree}', '--norm', 'batchnorm'], 'no norm named'),
    'unknown data': (['train', '--data', 'cifra10'], "did you mean 'cifar10'"),
    'unknown command': (['trian'], "did you mean 'train'?"),
    'unknown option': (['train', '--data', '{tree}', '--epoch', '3'],
                       'fastcifar train has no option --epoch: did you mean --epochs?'),
    'abbreviated option': (['summary', '--mod', 'groupnet'],
                           'fastcifar summary has no option --mod: did you mean --model?'),
    'net without its option': (['train', 'groupnet', '--data', '{tree}'], 'write --model groupnet'),
    'no number': (['train', '--data', '{tree}', '--lr-max', 'abc'], "'abc' is not a number, such as 0.01"),
    'no net': (['summary'], 'as in fastcifar summary groupnet'),
    'two nets': (['summary', 'groupnet', '--model', 'speednet'], 'two nets, groupnet and speednet'),
    'empty cache': (['cache', '--clear', 'pets'], 'holds no data set to clear'),
    'unknown device': (['train', '--data', '{tree}', '--bs', '20', '--device', 'tpu9'], "no device 'tpu9'"),
    'no such device': (['train', '--data', '{tree}', '--bs', '20', '--device', 'cuda:7'], "no device 'cuda:7'"),
    'batch too large': (['train', '--data', '{tree}', '--bs', '512'], 'larger than the training split of 60'),
    'unwritable folder': (['train', '--data', '{tree}', '--bs', '20', '--out', '/dev/null/run'], 'cannot write'),
    'folder is a file': (['train', '--data', '{tree}', '--bs', '20', '--out', '{tree}/train/red/00.png'], 'cannot write'),
    'holdout too large': (['train', '--data', '{tree}', '--bs', '20', '--valid', '60'], 'cannot hold out 60'),
    'lr-min alone': (['train', '--data', '{tree}', '--bs', '20', '--lr-min', '1'], 'without lr_max'),
    'not a run': (['evaluate', '{tree}'], 'not a run folder'),
    'no model': (['predict', '--from', '{tree}', '{tree}/train/red/00.png'], 'no file'),
    'loss explodes': (['train', '--data', '{tree}', '--bs', '20', '--lr-max', '999', '--lr-min', '990', '--precision', 'fp32', '--norm', 'none', '--epochs', '9', '--out', 'nan'], 'learning rate'),
    'workers': (['train', '--data', '{tree}', '--workers', '-1'], 'at least 0'),
    'threads': (['train', '--data', '{tree}', '--threads', '0'], 'at least 1'),
    'plot': (['find-lr', '--data', '{tree}', '--plot', 'x.foo'], '.png'),
    'long name': (['train', '--data', 'x' * 400], 'no path'),
    'epochs': (['train', '--data', '{tree}', '--epochs', '0'], 'at least 1'),
    'groups of no group norm': (['train', '--data', '{tree}', '--groups', '4'], 'groups are for group norm'),
    'layer of no picture': (['evaluate', '{tree}', '--layer', 'x'], 'add --plots'),
    'port': (['demo', 'groupnet', '--port', '99999'], 'at most 65535'),
    'huge image': (['summary', 'groupnet', '--size', '1000000'], 'does not take images'),
    'no image': (['summary', 'groupnet', '--field', 'f.png', '--image', '{tree}/none.png'], 'there is no image'),
    'sweep': (['sweep', '--data', '{tree}', '--model', 'normnet31k', '--bs', '20', '--out', 'sw'], 'cannot hold out 5000'),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(name, tree, main):
    args, says = BAD[name]
    before = snapshot(tree)
    code, _, err = main(*(a.format(tree=tree) for a in args))
    lines = [l for l in err.splitlines() if l.startswith('fastcifar: ')]
    assert code == 2 and len(lines) == 1 and says in lines[0] and 'Traceback' not in err
    assert snapshot(tree) == before

@pytest.mark.parametrize('args', ['evaluate s', 'export s', 'record s --out r.jsonl', 'train --resume s',
                                  'predict --from s x.png'])
def test_a_study_is_no_run(args, main, tmp_path):
    (tmp_path/'s').mkdir()
    (tmp_path/'s/study.json').write_text('{}')
    code, _, err = main(*args.split())
    assert code == 2 and err == f'fastcifar: s is a study: give one of its runs, such as those in {Path("s/runs")}\n'

def damaged(tree, folder, what):
    shutil.copytree(tree, folder)
    red = folder/'train/red/00.png'
    if what == 'unreadable': red.write_bytes(b'no image')
    if what == 'size': Image.new('RGB', (30, 32)).save(red)
    if what == 'mode': Image.new('L', (32, 32)).save(red)
    if what == 'missing class': shutil.rmtree(folder/'test/red')
    if what == 'empty class': [f.unlink() for f in (folder/'train/red').iterdir()]
    if what == 'no test': shutil.rmtree(folder/'test')
    return folder

@pytest.mark.parametrize('what,says', [('unreadable', 'cannot be read as an image'), ('size', 'is 30x32'), ('mode', 'has mode L'), ('missing class', 'both need the same classes'),
                                       ('empty class', 'both need the same classes'), ('no test', 'holds no test/<class>')])
def test_bad_folders(what, says, tree, tmp_path, main):
    code, _, err = main('train', '--data', damaged(tree, tmp_path/'bad', what), '--bs', 20)
    assert code == 2 and err.startswith('fastcifar: ') and says in err and err.count('\n') == 1

def test_converted_on_request(tree, tmp_path):
    from fastcifar.data.load import load_data
    assert load_data(damaged(tree, tmp_path/'bad', 'size'), convert=True).x['train'].shape == (60, 32, 32, 3)

def test_no_network(main, monkeypatch):
    import fastcifar.data.fetch as fetch
    monkeypatch.setitem(fetch.ARCHIVES, 'cifar10', fetch.ARCHIVES['cifar10']._replace(url='http://127.0.0.1:9/x', tree=None))
    monkeypatch.setattr(fetch.time, 'sleep', lambda s: None)
    code, _, err = main('train')
    assert code == 2 and err.startswith('fastcifar: cifar10 could not be downloaded') and '--data FILE' in err

def test_recipe_is_saved_changed_and_trained_with(main, tree, tmp_path):
    assert main('recipes', 'normnet31k', '--recipe', 'reference', '--save', 'mine.json')[0] == 0
    code, _, err = main('recipes', 'normnet31k', '--save', 'mine.json')
    assert code == 2 and 'is there already' in err
    r = json.loads((tmp_path/'mine.json').read_text())
    r['settings'] |= dict(bs=12, epochs=1, policy='flip')
    (tmp_path/'mine.json').write_text(json.dumps(r))
    code, _, err = main('train', '--data', tree, '--recipe', 'mine.json', '--lr-max', '1e-3', '--set', 'anneal=linear,mom_cycle=null,mom=.5', '--no-pictures', '--out', 'mine')
    assert code == 0, err
    c = json.loads((tmp_path/'mine/config.json').read_text())
    assert c['lr_max'] / c['lr_min'] == pytest.approx(25) and c['lr_min'] < 1e-3 # goes along
    assert {k: c[k] for k in ('model', 'recipe', 'bs', 'policy', 'anneal', 'mom', 'mom_cycle')} == dict(model='normnet31k', recipe='reference', bs=12, policy='flip', anneal='linear', mom=.5, mom_cycle=None)

@pytest.mark.parametrize('args, says', [
    (('train', '--set', 'wd=1'), '--wd'), (('train', '--set', 'precision="fp32"'), '--precision'), (('find-lr', '--set', 'tfms=item'), '--tfms'), (('train', '--set', 'momentum=1'), 'momentum'), (('train', '--set', 'anneal=cubic'), 'cubic'), (('train', '--set', 'peak'), 'peak'), (('train', '--set', 'decay_all=True'), 'anneal=linear'), (('train', '--model-args', 'shared=True'), 'mended=true'),
    (('recipes', '--recipe', 'fast'), '--save'), (('recipes', '--save', 'r.txt'), '.json')])
def test_settings_that_are_refused(main, tree, args, says):
    code, _, err = main(*args, *(('--data', tree) if args[0] in ('train', 'find-lr') else ()))
    assert code == 2 and says in err and err.count('\n') == 1

def test_summary_of_grey_images(main):
    t = json.loads(main('summary', 'normnet31k', '--model-args', 'n_in=1', '--json')[1])
    rgb = json.loads(main('summary', 'normnet31k', '--json')[1])
    assert sum(r['parameters'] for r in rgb) - sum(r['parameters'] for r in t) == 2 * 9 * 16

def shown(main, columns, *args):
    "What a command prints in a terminal of so many columns, which it does not exceed"
    with pytest.MonkeyPatch.context() as m:
        if columns: m.setenv('COLUMNS', str(columns))
        else: m.delenv('COLUMNS', raising=False)
        code, out, err = main(*args)
    assert code == 0, err
    fitted = [l for l in out.splitlines() if os.environ['FASTCIFAR_CACHE'] not in l] # a path is not shortened
    assert max(map(len, fitted)) <= (columns or 80), out
    return out

WIDTHS = pytest.mark.parametrize('columns', [60, 80, None]) # None: a pipe

@WIDTHS
def test_lists_fit_a_terminal(main, columns):
    "With a line on what is listed, a header, and what the columns mean"
    out = shown(main, columns, 'models')
    lines = out.splitlines()
    assert lines[0] == f'{len(list_models())} nets for images of 32x32, as --model takes them:' and lines[1] == ''
    assert lines[2].split() == ['model', 'parameters', 'weights'] and 'parameters: with 10 classes' in out
    assert all(n in out for n in list_models())

@WIDTHS
@pytest.mark.parametrize('net', list_models())
def test_recipes_fit_a_terminal(main, columns, net):
    out = ' '.join(shown(main, columns, 'recipes', net).split())
    recipes = json.loads(main('recipes', '--model', net, '--json')[1])
    assert out.startswith(f'{len(recipes)} recipes of {net}, as fastcifar train --recipe takes them: setting one_cycle')
    assert '0.20833' not in out and 'see `fastcifar train --help`' in out
    common = out.partition('the same in all: ')[2].partition(' --name is an option')[0]
    for k in ('gamma', 'update_norm', 'eps', 'mom', 'anneal'):
        alike = len({r[k] for r in recipes.values()}) == 1
        assert bool(re.search(rf'\b{k} ', common)) == alike, k
    assert all(f' {n}: ' in out for n in recipes)

def test_a_finished_training_says_what_can_be_done_next(run, main):
    out, said = run
    assert said.splitlines()[-1] == f'next: fastcifar evaluate {out}, or fastcifar demo {out}'
    assert main('train', '--resume', out)[1].splitlines()[-1] == said.splitlines()[-1]

@pytest.mark.parametrize('columns', [60, None])
def test_cells_of_a_study_fit_a_terminal(columns, capsys, monkeypatch):
    "What no cell has is no column"
    from fastcifar.cli import _show_cells
    monkeypatch.setenv('COLUMNS', str(columns or 0))
    cell = dict(model='custom_resnet', norm='ln_chw', recipe='reference', bs=512, n=5, failed=0,
                mean=91.234, sd=1.5, low=88., high=93.21, epochs_to_60=2., epochs_to_70=None)
    t = pd.DataFrame([cell, cell | dict(norm='bn', epochs_to_60=12.)])
    _show_cells(t)
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert 'failed' not in header and 'to 70%' not in header and '91.23' in row and '88.00' in row
    assert ('to 60%' in header) == (columns is None) and len(row) <= (columns or 80)
    _show_cells(t.assign(failed=[0, 2]))
    assert 'failed' in capsys.readouterr().out.splitlines()[0]

def test_recipes_that_are_alike_share_a_column(main):
    out = main('recipes', 'speednet')[1]
    header = next(l for l in out.splitlines() if l.startswith('setting'))
    assert header.split() == ['setting', 'one_cycle', 'reference'] and '(here as reference)' in out

@pytest.mark.parametrize('more, lowest', [((), True), (('--recipe', 'reference', '--norm', 'gn'), False)])
def test_a_range_test_names_the_training(main, tree, more, lowest):
    "With whatever was given, and nothing of the range test's own; a schedule of steps has no lowest rate"
    given = ('--data', tree, '--model', 'normnet48k', '--bs', 20, *more)
    code, out, err = main('find-lr', *given, '--plot', 'lr.png')
    assert code == 0, err
    hint = out.splitlines()[-1].partition(': ')[2]
    words = shlex.split(hint)
    lr_min, lr_max = (re.search(f'{n} (.*)', out)[1].split()[0] for n in ('LRMIN', 'LRMAX'))
    assert words == ['fastcifar', 'train', *map(str, given), *(['--lr-min', lr_min] if lowest else []), '--lr-max', lr_max]
    assert 'wrote lr.png' in out and 'normnet48k (' in out and 'batches of 20' in out
    code, _, err = main(*words[1:], '--epochs', 1, '--no-pictures', '--out', 'r')
    assert code == 0, err

@WIDTHS
@pytest.mark.parametrize('net', list_models())
def test_a_summary_fits_a_terminal(main, columns, net):
    out = shown(main, columns, 'summary', net)
    header = out.splitlines()[0].split()
    assert header[:5] == ['layer', 'kind', 'output', 'field', 'params']
    assert header[5:] == ['MMACs'] or 'not shown for lack of columns: MMACs' in out and columns == 60
    rows = json.loads(main('summary', '--model', net, '--json')[1])
    assert len(out.partition('\n\n')[0].splitlines()) == len(rows) + (2 if header[5:] == [] else 1)
    if net == 'groupnet': assert '.1.conv' in out and 'Conv 3x3 s2 p1 g4' in out and 'in features' in out

def test_a_cache_of_many_sets_fits_a_terminal(main, tree, tmp_path):
    "The newest first, the others summed up, names shortened"
    from fastcifar.data.cache import cache_root, list_cache
    from fastcifar.data.load import load_data
    made = Path(load_data(tree).folder)
    names = [f'{"squares of many colours " * 3}{k}' for k in range(24)]
    for k, name in enumerate(names):
        copy = cache_root()/f'{k:032x}-3'
        shutil.copytree(made, copy)
        meta = json.loads((copy/'meta.json').read_text())
        place = str(tree if k < 3 else tmp_path/'gone')
        (copy/'meta.json').write_text(json.dumps(meta | dict(name=name, known=None, place=place)))
        os.utime(copy, (time.time() - 86400 * (30 - k),) * 2)
    for columns in (60, 80):
        out = shown(main, columns, 'cache')
        first, *rows = out.partition('\n\n')[0].splitlines()
        assert first.split()[:3] == ['name', 'state', 'used'] and len(rows) == 21
        days = [r.split(' d ')[0].split()[-1] for r in rows[1:4]]
        assert 'in use' in rows[0] and 'now' in rows[0] and days == ['7', '8', '9']
        assert rows[20].startswith('and 5 used longer ago, ')
        assert ': 25 data sets, ' in out and 'no longer needed: 24, ' in out
        assert out.splitlines()[-1].endswith(' MB: fastcifar cache --clear old')
    assert main('cache', '--clear', 'old')[0] == 0 and len(list_cache()) == 1
