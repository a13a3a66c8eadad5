"What a run folder says of how it was made stays true when it is continued."
import dataclasses, json, shlex, signal
from pathlib import Path

import pytest

from fastcifar.basics import read_json

SIZE = ('--model', 'normnet31k', '--norm', 'gn', '--epochs', '2', '--bs', '20', '--lr-max', '1e-3', '--seed', '3')

def stop_after(epochs):
    "What stops a training as Ctrl-C does, once so many epochs are done"
    from fastcifar.runs.run import RunHistory
    real = RunHistory.after_epoch
    def after_epoch(self):
        real(self)
        if self.epoch + 1 == epochs: self.checkpoints.request.number = signal.SIGINT
    return after_epoch

@pytest.fixture
def broken_off(main, tree, tmp_path, monkeypatch):
    "A run that was stopped after its first epoch"
    import fastcifar.runs.run as runs
    with monkeypatch.context() as m:
        m.setattr(runs.RunHistory, 'after_epoch', stop_after(1))
        options = ('--threads', 1, '--deterministic', '--checkpoint-every', 2, '--out', 'r')
        args = ('train', '--data', tree, *SIZE, *options)
        code, _, err = main(*args)
    assert code == 130, err
    return tmp_path/'r', shlex.join(['fastcifar', *map(str, args)]), err

def test_the_hint_says_everything(broken_off, tree):
    _, _, err = broken_off
    hint = shlex.split(err.split('go on with: ')[1])
    assert hint[:4] == ['fastcifar', 'train', '--resume', 'r']
    assert hint[hint.index('--data') + 1] == str(tree) and hint[hint.index('--checkpoint-every') + 1] == '2'
    assert hint[hint.index('--threads') + 1] == '1' and '--deterministic' in hint

def test_the_first_command_stays_and_starts_are_listed(main, broken_off):
    out, first, _ = broken_off
    before = read_json(out/'environment.json')
    more = before['command'].removeprefix(f'{first} ').split() # what was left to the machine
    assert more[::2] == ['--device', '--precision'] and before['deterministic'] is True
    code, _, err = main('train', '--resume', 'r')
    assert code == 0, err
    env = read_json(out/'environment.json')
    assert {k: v for k, v in env.items() if k != 'starts'} == {k: v for k, v in before.items() if k != 'starts'}
    assert env['command'] == before['command']
    assert [s['command'] for s in env['starts']] == [first, 'fastcifar train --resume r']
    assert [s['epoch'] for s in env['starts']] == [0, 1]
    for s in env['starts']: # it goes on as it was begun
        assert s['deterministic'] is True and s['threads'] == 1 and s['time']
    page = (out/'report.html').read_text()
    assert f'<code>{env["command"]}</code>' in page
    assert 'started 2 times, 1 of them from a checkpoint of an earlier start. All were made in the same way.' in page

def test_a_start_on_another_machine_is_told(main, broken_off, monkeypatch):
    import fastcifar.runs.folder as runs
    from fastcifar.share.export import export_run
    out, _, _ = broken_off
    monkeypatch.setattr(runs, '_cpu_name', lambda: 'Another processor')
    assert main('train', '--resume', 'r')[0] == 0
    page = (out/'report.html').read_text()
    assert 'They differ in device, so another training may end in other last digits.' in page
    assert ', then Another processor</dd>' in page
    c = export_run(out, out.with_name('e'), onnx=False)
    assert 'It was continued on Another processor, with torch' in (out.with_name('e')/'README.md').read_text()
    assert c['environment']['device_name'] != 'Another processor'

def test_a_refused_or_unbegun_start_is_no_start(main, tree, tmp_path, monkeypatch):
    import fastcifar.runs.run as runs
    with monkeypatch.context() as m:
        m.setattr(runs.Training, 'fit', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert main('train', '--data', tree, *SIZE, '--threads', 1, '--out', 'r')[0] == 130
    assert main('train', '--data', tree, *SIZE, '--threads', 1, '--no-pictures', '--out', 'r')[0] == 0
    env = read_json(tmp_path/'r/environment.json')
    assert len(env['starts']) == 1 and '--no-pictures' in env['command']

def killed_in(m, step):
    "From now on, a training dies in a step of it"
    def die(*args, **more): raise KeyboardInterrupt
    m.setattr(f'fastcifar.runs.run.{step}', die)

def test_resumed_before_anything_was_trained(main, tree, tmp_path, monkeypatch):
    "Killed in the range test: --resume goes on as the run was begun, and what began it stays"
    began = ('train', '--data', tree, *SIZE, '--tfms', 'item', '--workers', 1, '--device', 'cpu')
    with monkeypatch.context() as m:
        killed_in(m, 'Training.find_rates')
        assert main(*began, '--checkpoint-every', 2, '--deterministic', '--threads', 1, '--out', 'r')[0] == 130
    before = read_json(tmp_path/'r/environment.json')
    assert before['starts'] == [] and before['command'].startswith('fastcifar train --data')
    import fastcifar.runs.run as runs
    real, used = runs.Training.commands, []
    monkeypatch.setattr(runs.Training, 'commands', lambda t, c: used.append(t.options) or real(t, c))
    assert main('train', '--resume', 'r', '--no-pictures')[0] == 0
    env = read_json(tmp_path/'r/environment.json')
    assert env['command'] == before['command'] and env['deterministic'] is True
    assert [(s['epoch'], s['command']) for s in env['starts']] == [(0, 'fastcifar train --resume r --no-pictures')]
    asked = dict(workers=1, threads=1, device='cpu', checkpoint_every=2, deterministic=True)
    assert before['options'] == env['options'] == asked == used[-1]

def test_a_start_that_trains_nothing_is_no_start(main, broken_off, monkeypatch):
    out, _, _ = broken_off
    before = (out/'environment.json').read_text()
    with monkeypatch.context() as m:
        killed_in(m, 'recipe_learner')
        assert main('train', '--resume', 'r')[0] == 130
    with monkeypatch.context() as m:
        m.setitem(__import__('sys').modules, 'wandb', None)
        assert main('train', '--resume', 'r', '--log', 'wandb')[0] == 2
    assert (out/'environment.json').read_text() == before

def test_a_training_that_begins_anew(main, broken_off, monkeypatch):
    "Without its checkpoints the run starts from nothing, so where that was done is where it was trained"
    import fastcifar.runs.run as runs
    out, first, _ = broken_off
    for f in (out/'checkpoints').iterdir(): f.unlink()
    monkeypatch.setattr('fastcifar.runs.folder._cpu_name', lambda: 'Another processor')
    assert main('train', '--resume', 'r', '--threads', 2)[0] == 0
    env = read_json(out/'environment.json')
    assert env['command'].startswith(first) and env['device_name'] == 'Another processor' and env['threads'] == 2
    assert [s['epoch'] for s in env['starts']] == [0, 0]
    page = (out/'report.html').read_text()
    assert 'started 2 times, 0 of them from a checkpoint' in page and 'They differ in device, threads, so' in page
    assert '<dd>Another processor</dd>' in page

def test_a_run_of_python_and_one_of_a_study(tree, tmp_path):
    from fastcifar.runs.settings import Config
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    from fastcifar.study.study import Study
    quick = dict(epochs=1, bs=20, data=str(tree))
    train_run(configure('fast', 'normnet31k', **quick), tmp_path/'r', threads=1, pictures=False, say=lambda *_: None)
    settings = {k: v for k, v in quick.items() if k not in ('bs', 'data')}
    study = Study(tmp_path/'s', ['normnet31k'], str(tree), norms=('bn',), seeds=1, batch_sizes=20, **settings)
    study.run(1, pictures=False, say=lambda *_: None)
    [of_study] = (tmp_path/'s/runs').iterdir()
    for out in (tmp_path/'r', of_study):
        command = read_json(out/'environment.json')['command']
        called = []
        eval(command, dict(train_run=lambda c, **kw: called.append((c, kw)), Config=Config)) # it is what it says
        [(c, kw)] = called
        saved = read_json(out/'config.json')
        assert c.epochs == saved['epochs'] == 1 and c.seed == saved['seed'] and kw['threads'] == 1
        assert c.model == saved['model'] and c.lr_max == saved['lr_max'] and Path(kw['out']).resolve() == out.resolve()
        assert c.precision == saved['precision'] != 'auto' and kw['device'] and kw['pictures'] is False

def test_seeds_in_one_pass_say_so_and_a_finished_one_stays(tree, tmp_path):
    from fastcifar.runs.settings import Config
    from fastcifar.runs.config import configure
    from fastcifar.runs.fused import train_fused
    cs = [configure('fast', 'normnet31k', epochs=1, bs=20, data=str(tree), seed=s) for s in (0, 1)]
    outs, work = [tmp_path/'0', tmp_path/'1'], tmp_path/'w'
    def train(): train_fused(cs, outs, work, threads=1, pictures=False, say=lambda *_: None)
    train()
    was = {f: f.read_bytes() for f in outs[0].glob('*.json')}
    env = read_json(outs[0]/'environment.json')
    called = []
    eval(env['command'], dict(train_fused=lambda *a, **kw: called.append((a, kw)), Config=Config))
    [((configs, folders, folder), kw)] = called
    assert [c.seed for c in configs] == [0, 1] and folders == list(map(str, outs)) and folder == str(work)
    assert kw == dict(device=env['device'], threads=1, pictures=False)
    assert env['fused'] == 2 and len(env['starts']) == 1
    (outs[1]/'metrics.json').unlink() # its pass goes on, for the other alone
    train()
    assert {f: f.read_bytes() for f in outs[0].glob('*.json')} == was
    assert len(read_json(outs[1]/'environment.json')['starts']) == 2

def test_launchers_are_part_of_a_command(monkeypatch):
    from fastcifar.runs.folder import launched, python_call
    assert launched('fastcifar train') == 'fastcifar train'
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert launched('fastcifar train') == 'torchrun --nproc_per_node 2 -m fastcifar train'
    monkeypatch.setenv('WORLD_SIZE', '8'), monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert launched('fastcifar train') == 'torchrun --nnodes 2 --nproc_per_node 4 -m fastcifar train'
    assert eval(python_call('dict', a=1)) == dict(a=1) and python_call('dict', a=1).endswith(' # in 8 processes')

def test_what_is_left_to_the_machine_is_said(tree, tmp_path):
    "Data of the environment, precision, device and threads stand in the command; what was given stands as it was"
    import torch
    from fastcifar.runs.settings import Config
    from fastcifar.runs.folder import RunFolder
    from fastcifar.runs.run import Training
    c = Config(precision='bf16', tfms='batch')
    def commands(asked, words, **more):
        t = Training(asked, None, None, RunFolder(tmp_path), 'cpu', dict(threads=3), words, **more)
        return t.commands(c)
    typed, again = commands(Config(), ['train', '--threads', '3'])
    assert typed == 'fastcifar train --threads 3' and again == f'{typed} --device cpu --precision bf16'
    typed, again = commands(c, ['train', '--resume', 'r'])
    assert typed == 'fastcifar train --resume r' # alone it would begin nothing
    assert again == f"train_run(Config(precision='bf16', tfms='batch'), out={str(tmp_path)!r}, threads=3, device='cpu')"
    torch.use_deterministic_algorithms(True)
    try: again = commands(Config(), None, pictures=False)[1]
    finally: torch.use_deterministic_algorithms(False)
    assert again.endswith("threads=3, device='cpu', deterministic=True, pictures=False)")

def test_data_of_the_environment_are_part_of_the_command(main, tree, tmp_path, monkeypatch):
    monkeypatch.setenv('FASTCIFAR_DATA', str(tree))
    with monkeypatch.context() as m:
        killed_in(m, 'Training.find_rates')
        assert main('train', *SIZE, '--out', 'r')[0] == 130
    words = shlex.split(read_json(tmp_path/'r/environment.json')['command'])
    assert words[words.index('--data') + 1] == str(tree)

def start(**known):
    return dict(epoch=0, device='cpu', device_name='A', versions=dict(torch='2', numpy='1'), threads=1) | known

@pytest.mark.parametrize('other, said', [
    (dict(), 'All were made in the same way.'),
    (dict(versions=dict(torch='2', numpy='2')), 'They differ in numpy, so'),
    (dict(python='3.12'), 'Nothing that is known of them differs.'),
    (dict(versions=None), 'Nothing that is known of them differs.'),
    (dict(device='mps'), 'They differ in kind of device, so'),
    (dict(threads=2, device_name='B', device='cuda:0'), 'They differ in device, kind of device, threads, so')])
def test_differences_of_starts(other, said):
    from fastcifar.runs.report import _devices, _starts
    starts = [start(), start(epoch=1, **other)]
    text, table = _starts(dict(start(), starts=starts))
    assert said in text and text.startswith('The training was started 2 times, 1 of them from a checkpoint')
    assert _starts(dict(starts=starts[:1])) == ('', None) == _starts({})
    assert _devices(dict(start(), starts=starts)) == ('A, then B' if 'device_name' in other else 'A')

def test_options_of_a_damaged_record_are_left_out(tmp_path):
    from fastcifar.basics import FastcifarError
    from fastcifar.runs.folder import begun_with
    def of(env):
        (tmp_path/'environment.json').write_text(json.dumps(env))
        return begun_with(tmp_path)
    assert of(dict(options=dict(workers=-1, device=3, log='wandb', out='x', checkpoint_every=True), threads='2')) == {}
    good = dict(workers=2, log=['wandb'])
    assert of(dict(options=good, threads=1, compile=True)) == good | dict(threads=1, compile=True)
    for env in ([], dict(starts=3), dict(starts=[1])):
        with pytest.raises(FastcifarError, match='environment.json is damaged'): of(env)

def test_a_record_names_no_folders(main, broken_off, tmp_path):
    from fastcifar.runs.replay import record_of
    out, first, _ = broken_off
    assert main('train', '--resume', 'r', '--no-pictures')[0] == 0
    assert str(tmp_path) in first or '--data' in first
    text = json.dumps(record_of(out)['surroundings'])
    assert 'command' not in text and str(out.parent) not in text

def test_environments_of_before_are_continued(main, broken_off):
    out, first, _ = broken_off
    env = read_json(out/'environment.json')
    for k in ('starts', 'options', 'compile'): env.pop(k)
    (out/'environment.json').write_text(json.dumps(env))
    assert main('train', '--resume', 'r')[0] == 0
    env = read_json(out/'environment.json')
    assert env['command'].startswith(first) and [s.get('epoch') for s in env['starts']] == [None, 1]
    page = (out/'report.html').read_text()
    assert 'started 2 times, 1 of them from a checkpoint of an earlier start. Nothing that is known' in page

def test_a_record_of_before_that_says_resume(main, broken_off):
    "Older versions kept the last command alone: the page has the call that does it again, and so without any record"
    out, _, _ = broken_off
    assert main('train', '--resume', 'r', '--no-pictures')[0] == 0
    env = read_json(out/'environment.json')
    old = {k: v for k, v in env.items() if k not in ('starts', 'options')}
    for command in ('fastcifar train --resume r', None):
        (out/'environment.json').write_text(json.dumps(dict(old, command=command)))
        assert main('report', 'r')[0] == 0
        page = (out/'report.html').read_text()
        assert '<code>train_run(Config(epochs=2, bs=20' in page and '<code>fastcifar train --resume' not in page
