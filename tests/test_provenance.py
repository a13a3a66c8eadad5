"What a run folder says of how it was made stays true when it is continued."
import dataclasses, json, shlex, signal
from pathlib import Path

import pytest

from fastcifar.basics import read_json

SIZE = ('--model', 'normnet31k', '--norm', 'gn', '--epochs', '2', '--bs', '20', '--lr-max', '1e-3', '--seed', '3')

def stop_after(epochs):
    "What stops a training as Ctrl-C does, once so many epochs are done"
    from fastcifar.runs import RunHistory
    real = RunHistory.after_epoch
    def after_epoch(self):
        real(self)
        if self.epoch + 1 == epochs: self.checkpoints.request.number = signal.SIGINT
    return after_epoch

@pytest.fixture
def broken_off(main, tree, tmp_path, monkeypatch):
    "A run that was stopped after its first epoch"
    import fastcifar.runs as runs
    with monkeypatch.context() as m:
        m.setattr(runs.RunHistory, 'after_epoch', stop_after(1))
        args = ('train', '--data', tree, *SIZE, '--threads', 1, '--deterministic', '--checkpoint-every', 2, '--out', 'r')
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
    assert before['command'] == first and before['deterministic'] is True
    code, _, err = main('train', '--resume', 'r')
    assert code == 0, err
    env = read_json(out/'environment.json')
    assert {k: v for k, v in env.items() if k != 'starts'} == {k: v for k, v in before.items() if k != 'starts'}
    assert [s['command'] for s in env['starts']] == [first, 'fastcifar train --resume r']
    assert [s['epoch'] for s in env['starts']] == [0, 1]
    assert all(s['deterministic'] is True and s['threads'] == 1 and s['time'] for s in env['starts']) # it goes on as it was begun
    page = (out/'report.html').read_text()
    assert f'<code>{first}</code>' in page and 'continued 1 time. All were made in the same way.' in page

def test_a_start_on_another_machine_is_told(main, broken_off, monkeypatch):
    import fastcifar.runs as runs
    from fastcifar.export import export_run
    out, _, _ = broken_off
    monkeypatch.setattr(runs, '_cpu_name', lambda: 'Another processor')
    assert main('train', '--resume', 'r')[0] == 0
    assert 'They differ in device, so another training may end in other last digits.' in (out/'report.html').read_text()
    c = export_run(out, out.with_name('e'), onnx=False)
    assert 'It was continued on Another processor with torch' in (out.with_name('e')/'README.md').read_text()
    assert c['environment']['device_name'] != 'Another processor'

def test_a_refused_or_unbegun_start_is_no_start(main, tree, tmp_path, monkeypatch):
    import fastcifar.runs as runs
    with monkeypatch.context() as m:
        m.setattr(runs, '_fit', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert main('train', '--data', tree, *SIZE, '--threads', 1, '--out', 'r')[0] == 130
    assert main('train', '--data', tree, *SIZE, '--threads', 1, '--no-pictures', '--out', 'r')[0] == 0
    env = read_json(tmp_path/'r/environment.json')
    assert len(env['starts']) == 1 and '--no-pictures' in env['command']

def test_a_run_of_python_and_one_of_a_study(tree, tmp_path):
    from fastcifar.runs import Config, configure, train_run
    from fastcifar.study import Study
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
        assert dataclasses.asdict(c)['epochs'] == saved['epochs'] == 1 and c.seed == saved['seed'] and kw['threads'] == 1
        assert c.model == saved['model'] and c.lr_max == saved['lr_max'] and Path(kw['out']).resolve() == out.resolve()

def test_launchers_are_part_of_a_command(monkeypatch):
    from fastcifar.runs import launched
    assert launched('fastcifar train') == 'fastcifar train'
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert launched('fastcifar train') == 'torchrun --nproc_per_node 2 -m fastcifar train'
    monkeypatch.setenv('WORLD_SIZE', '8'), monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert launched('fastcifar train') == 'torchrun --nnodes 2 --nproc_per_node 4 -m fastcifar train'

def test_environments_of_before_are_continued(main, broken_off):
    out, first, _ = broken_off
    env = read_json(out/'environment.json')
    for k in ('starts', 'compile'): env.pop(k)
    (out/'environment.json').write_text(json.dumps(env))
    assert main('train', '--resume', 'r')[0] == 0
    env = read_json(out/'environment.json')
    assert env['command'] == first and [s.get('epoch') for s in env['starts']] == [None, 1]
    assert 'continued 1 time.' in (out/'report.html').read_text()
