"Files of others stay as they are, whatever is given as a place to write to."
import json, os, shutil, stat, subprocess, sys

import numpy as np
import pytest
from PIL import Image

from fastcifar.basics import FastcifarError, remove_unfinished, write_text

QUICK = ('--model', 'normnet31k', '--epochs', 1, '--bs', 20, '--lr-max', '1e-3', '--no-pictures')
COMPARE = ('compare', '--models', 'normnet31k', '--norms', 'bn', '--epochs', 1, '--seeds', 1)

def project(folder):
    "A folder of somebody, with names that we give too; returns a function that says whether it is as it was"
    folder.mkdir()
    for name in ('report.html', 'model.safetensors', 'history.csv', 'curves.png', 'results.csv', '.draft.backup01.tmp'):
        (folder/name).write_text(f'{name} of somebody')
    was = {p.name: p.read_text() for p in folder.iterdir()}
    return lambda: {p.name: p.read_text() for p in folder.iterdir()} == was

@pytest.fixture(scope='module')
def run(tree, tmp_path_factory):
    "A finished run folder"
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    out = tmp_path_factory.mktemp('files')/'run'
    c = configure('fast', 'normnet31k', data=str(tree), epochs=1, bs=20)
    train_run(c, out, pictures=False, say=lambda *_: None)
    return out

@pytest.mark.parametrize('command', [
    ('train', *QUICK, '--out'), (*COMPARE, '--out'), ('export', 'RUN', '--no-onnx', '--out'),
    ('evaluate', 'RUN', '--plots'),
    ('sweep', '--model', 'normnet31k', '--epochs', 1, '--trials', 1, '--valid', 6, '--bs', 20, '--out')])
def test_a_folder_of_somebody_is_left_alone(main, tree, run, tmp_path, command):
    untouched = project(tmp_path/'project')
    data = () if command[0] in ('export', 'evaluate') else ('--data', tree)
    code, _, err = main(command[0], *data, *(run if a == 'RUN' else a for a in command[1:]), 'project')
    assert code == 2 and 'project' in err and 'left as it is' in err and err.count('\n') == 1, err
    assert untouched()

def test_runs_of_train_make_no_study(main, run, tree, tmp_path):
    "`train` puts its runs below `runs`, where those of a study are too"
    untouched = project(tmp_path/'project')
    shutil.copytree(run, tmp_path/'project/runs/mine')
    code, _, err = main(*COMPARE, '--data', tree, '--out', 'project')
    assert code == 2 and 'not a study' in err
    shutil.rmtree(tmp_path/'project/runs')
    assert untouched()

def test_a_page_of_somebody_in_a_run_folder(main, run, tmp_path):
    shutil.copytree(run, tmp_path/'r')
    (tmp_path/'r/report.html').write_text('<p>my notes on fastcifar')
    code, _, err = main('report', 'r')
    assert code == 2 and 'report.html is there already' in err
    assert (tmp_path/'r/report.html').read_text() == '<p>my notes on fastcifar'
    (tmp_path/'r/report.html').unlink()
    for _ in range(2): assert main('report', 'r')[0] == 0

def test_checkpoints_of_somebody(main, tree, tmp_path):
    from safetensors.torch import save_file
    import torch
    theirs = tmp_path/'project/checkpoints/epoch_0001.safetensors'
    theirs.parent.mkdir(parents=True), save_file({'w': torch.ones(2)}, theirs)
    was = theirs.read_bytes()
    code, _, err = main('train', '--data', tree, *QUICK, '--out', 'project')
    assert code == 2 and "holds 'checkpoints'" in err and theirs.read_bytes() == was
    assert main('train', '--data', tree, *QUICK, '--out', 'r')[0] == 0
    (tmp_path/'r/metrics.json').unlink()
    shutil.copy(theirs, tmp_path/'r/checkpoints/epoch_0009.safetensors')
    code, _, err = main('train', '--data', tree, *QUICK, '--out', 'r')
    assert code == 2 and 'is no checkpoint of fastcifar' in err
    assert (tmp_path/'r/checkpoints/epoch_0009.safetensors').read_bytes() == was

def test_a_pass_removes_its_own_checkpoints_alone(tree, tmp_path):
    from fastcifar.runs.config import configure
    from fastcifar.runs.fused import train_fused
    configs = [configure('fast', 'normnet31k', data=str(tree), epochs=1, bs=20, seed=s) for s in range(2)]
    def go(work):
        outs = [tmp_path/f'{work.name}{s}' for s in range(2)]
        train_fused(configs, outs, work, pictures=False, say=lambda *_: None)
    (tmp_path/'w/checkpoints').mkdir(parents=True)
    for name in ('.draft.backup01.tmp', 'epoch_notes.txt'): (tmp_path/'w/checkpoints'/name).touch()
    go(tmp_path/'w')
    left = sorted(p.name for p in (tmp_path/'w').rglob('*') if p.is_file())
    assert left == ['.draft.backup01.tmp', 'epoch_notes.txt']
    go(tmp_path/'v')
    assert not (tmp_path/'v').exists()
    (tmp_path/'u').mkdir(), (tmp_path/'u/mine').touch()
    with pytest.raises(FastcifarError, match="holds 'mine'"): go(tmp_path/'u')

def test_a_journal_that_is_a_link(tree, tmp_path):
    from fastcifar.data.load import load_data
    from fastcifar.study.sweep import Sweep
    sweep = Sweep(tmp_path/'s', 'normnet31k', str(tree), epochs=1, bs=20, valid=6)
    (tmp_path/'s').mkdir(), (tmp_path/'theirs').touch(), (tmp_path/'s/journal.log').symlink_to(tmp_path/'theirs')
    with pytest.raises(FastcifarError, match='not a sweep'): sweep.run(1, say=lambda *_: None)
    (tmp_path/'s/journal.log').unlink()
    sweep._settle(load_data(str(tree)))
    (tmp_path/'s/journal.log').symlink_to(tmp_path/'theirs')
    with pytest.raises(FastcifarError, match='journal.log is a link'): sweep.run(1, say=lambda *_: None)
    assert (tmp_path/'theirs').read_text() == ''

def test_our_own_folders_are_gone_on_with(main, tree, run, tmp_path):
    for _ in range(2): assert main('train', '--data', tree, *QUICK, '--out', 'r')[0] == 0
    for _ in range(2): assert main('evaluate', run, '--plots', 'plots')[0] == 0
    (tmp_path/'empty').mkdir()
    assert main('train', '--data', tree, *QUICK, '--out', 'empty')[0] == 0
    (tmp_path/'mine').mkdir(), (tmp_path/'mine/config.json').write_text('{"title": "my page"}')
    code, _, err = main('train', '--data', tree, *QUICK, '--out', 'mine')
    assert code == 2 and [p.name for p in (tmp_path/'mine').iterdir()] == ['config.json']

def test_pictures_and_other_files(main, tree, tmp_path):
    find = ('find-lr', '--data', tree, '--model', 'normnet31k', '--bs', 20, '--plot')
    for name in ('a.png', 'a.svg', 'a.pdf', 'a.jpg'):
        (tmp_path/name).write_text('of somebody')
        code, _, err = main(*find, name)
        assert code == 2 and '--overwrite' in err and (tmp_path/name).read_text() == 'of somebody'
        code, _, err = main('summary', 'normnet31k', '--graph', name)
        assert code == 2 and '--overwrite' in err and (tmp_path/name).read_text() == 'of somebody'
    for name in ('b.png', 'b.svg', 'b.pdf'):
        for _ in range(2): assert main('summary', 'normnet31k', '--graph', name)[0] == 0 # the second time it is ours
    (tmp_path/'a.jpg').write_text('of somebody')
    assert main('summary', 'normnet31k', '--graph', 'a.jpg', '--overwrite')[0] == 0
    assert (tmp_path/'a.jpg').read_bytes()[:3] == b'\xff\xd8\xff'
    (tmp_path/'r.json').write_text('{}')
    for args in (('recipes', '--save', 'r.json'), ('bench', 'data', '--out', 'r.json')):
        code, _, err = main(*args)
        assert code == 2 and '--overwrite' in err and (tmp_path/'r.json').read_text() == '{}'

def test_a_place_that_cannot_be_drawn_into_is_noticed_before_the_work(main, tree, monkeypatch):
    import fastcifar.data.load as data
    monkeypatch.setattr(data, 'load_data', lambda *_: pytest.fail('the work has begun'))
    for place in ('/dev/null/x.png', '/proc/x.png', '.', 'x.txt'):
        code, _, err = main('find-lr', '--data', tree, '--model', 'normnet31k', '--plot', place)
        assert code == 2 and err.count('\n') == 1, err

def test_permissions(tmp_path):
    "What a file had stays, and a new one has what the umask leaves"
    f = tmp_path/'secret'
    f.write_text('old'), f.chmod(0o600)
    write_text(f, 'new')
    assert stat.S_IMODE(f.stat().st_mode) == 0o600 and f.read_text() == 'new'
    f.chmod(0o440)
    write_text(f, 'newer')
    assert stat.S_IMODE(f.stat().st_mode) == 0o440
    was = os.umask(0o027)
    try: assert stat.S_IMODE(write_text(tmp_path/'group', '').stat().st_mode) == 0o640
    finally: os.umask(was)

def test_links_are_not_followed(tmp_path):
    from fastcifar.study.study import _log
    target = tmp_path/'target'
    target.write_text('of somebody')
    for name in ('results.csv', 'log.txt'): (tmp_path/name).symlink_to(target)
    write_text(tmp_path/'results.csv', 'ours')
    with pytest.raises(FastcifarError, match='log.txt'):
        with _log(tmp_path) as say: say('a line')
    assert target.read_text() == 'of somebody' and (tmp_path/'results.csv').read_text() == 'ours'

def a_dead_process():
    "Its number"
    code = 'import os; print(os.getpid())'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()

def test_only_unfinished_files_of_dead_processes_go(tmp_path):
    from fastcifar.basics import unfinished_name
    dead = a_dead_process()
    def named(pid, machine=None): # as that process would have
        own = unfinished_name(tmp_path/'x.npz').name.split('-')
        return '-'.join([own[0], machine or own[1], str(pid), own[3]])
    left, old = named(dead), named(dead, 'ffff')
    kept = ['.draft.backup01.tmp', '.a.12345678.tmp', 'notes-fastcifar-thesis.md', named(os.getpid()),
            named(dead, '0000')]
    for name in (*kept, left, old): (tmp_path/name).touch()
    os.utime(tmp_path/old, (0, 0)) # of another machine, long ago
    (tmp_path/named(dead)).symlink_to(tmp_path/kept[0]), (tmp_path/named(dead)).mkdir()
    remove_unfinished(tmp_path)
    there = {p.name for p in tmp_path.iterdir()}
    assert {*kept} <= there and not {left, old} & there and len(there) == len(kept) + 2

def held(folder):
    "Another process that holds the lock of a folder until it is told to end"
    code = f'''import sys, fastcifar.runs as r
from pathlib import Path
with r.own_folder(Path({str(folder)!r}), lambda f: True, 'it'): print('held', flush=True); sys.stdin.read()'''
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'held\n'
    return p

def test_studies_and_sweeps_hold_a_lock(tree, tmp_path):
    from fastcifar.study.study import Study
    from fastcifar.study.sweep import Sweep
    study = Study(tmp_path/'s', ['normnet31k'], str(tree), norms=('bn',), seeds=1, epochs=1, batch_sizes=20)
    sweep = Sweep(tmp_path/'s', 'normnet31k', str(tree), epochs=1, bs=20, valid=6)
    p = held(tmp_path/'s')
    try:
        for work in (lambda: study.run(1, say=lambda *_: None), lambda: sweep.run(1, say=lambda *_: None)):
            with pytest.raises(FastcifarError, match='another process is working in'): work()
    finally: p.kill(), p.wait()
    r = study.run(1, pictures=False, say=lambda *_: None)
    assert (r.status == 'finished').all() # the lock of a killed process is none

def test_two_exports_at_once(run, tmp_path, monkeypatch):
    "The second is refused before its work; what a killed one has left goes; a folder that has come up meanwhile stays"
    import fastcifar.share.export as export
    from fastcifar.basics import unfinished_name
    dead = a_dead_process()
    real, left = export._fill, tmp_path/unfinished_name(tmp_path/'out').name.replace(f'-{os.getpid()}-', f'-{dead}-')
    left.mkdir(), (left/'model.safetensors').touch(), (tmp_path/'.out.fastcifar-notes').touch()
    def during(folder, *args):
        with pytest.raises(FastcifarError, match='another process is exporting to'):
            export.export_run(run, tmp_path/'out', onnx=False)
        assert not left.exists()
        return real(folder, *args)
    monkeypatch.setattr(export, '_fill', during)
    export.export_run(run, tmp_path/'out', onnx=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.out.fastcifar-notes', 'out']
    assert (tmp_path/'out/README.md').is_file()
    def late(folder, *args):
        (tmp_path/'more').mkdir(), (tmp_path/'more/mine').touch()
        return real(folder, *args)
    monkeypatch.setattr(export, '_fill', late)
    with pytest.raises(FastcifarError, match='has come up meanwhile'):
        export.export_run(run, tmp_path/'more', onnx=False)
    assert [p.name for p in (tmp_path/'more').iterdir()] == ['mine']

def test_one_download_leaves_another_alone(monkeypatch, tmp_path):
    "While one process decodes cifar10, another one is in the middle of cifar100"
    import fastcifar.data.load as data
    from fastcifar.data.formats import Arrays
    half = data.cache_root()/'downloads'/'cifar100'/'cifar-100-binary.tar.gz.part'
    own = data.cache_root()/'downloads'/'cifar10'/'cifar-10-binary.tar.gz'
    for f in (half, own): f.parent.mkdir(parents=True), f.write_bytes(b'half')
    x, y = ({s: v for s in ('train', 'test')} for v in (np.zeros((2, 32, 32, 3), np.uint8), np.arange(2)))
    a = Arrays(x, y, ['a', 'b'])
    monkeypatch.setattr(data, 'fetch_archive', lambda *_: (a, None))
    with pytest.warns(UserWarning): data.load_data('cifar10')
    assert half.is_file() and not own.exists()

def test_cache_command(main, tree):
    from fastcifar.data.cache import cache_root
    code = f'''import sys
from fastcifar.data.load import load_data
data = load_data({str(tree)!r}); print(data.name, flush=True); sys.stdin.read()'''
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    name = p.stdout.readline().strip()
    try:
        (cache_root()/'downloads/cifar10').mkdir(parents=True)
        (cache_root()/'downloads/cifar10/cifar-10-binary.tar.gz.part').write_bytes(b'half')
        (cache_root()/'mine.txt').touch()
        listed = json.loads(main('cache', '--json')[1])
        found = [(r['what'], r['name']) for r in listed]
        assert found == [('current', name), ('not ours', 'mine.txt'), ('download', 'cifar10')]
        assert [listed[0][k] for k in ('train', 'test', 'classes', 'free')] == [60, 24, 3, False]
        code, said, _ = main('cache', '--clear', 'old')
        assert code == 0 and not (cache_root()/'downloads/cifar10').exists()
        code, said, _ = main('cache', '--clear', 'all')
        assert code == 0 and f'in use: {name}' in said and len(json.loads(main('cache', '--json')[1])) == 2
    finally: p.kill(), p.wait()
    (cache_root()/'downloads/cifar10').mkdir(parents=True)
    for f in ('notes.txt', 'cifar-10-binary.tar.gz.part'): (cache_root()/'downloads/cifar10'/f).touch()
    (cache_root()/'downloads/mine').mkdir(), (cache_root()/'downloads/mine/x').touch()
    assert main('cache', '--clear', 'old')[0] == 0
    assert [p.name for p in (cache_root()/'downloads').rglob('*') if p.is_file()] == ['notes.txt', 'x'] # not ours
    code, _, err = main('cache', '--clear', 'nothing')
    assert code == 2 and 'there is no data set in the cache' in err and name in err, err
    assert main('cache', '--clear', name)[0] == 0
    assert [p.name for p in cache_root().iterdir() if p.suffix != '.lock' and p.name != 'downloads'] == ['mine.txt']

def test_damaged_linked_and_former_sets(tree, tmp_path):
    "What is damaged is named; a link is not ours; the copy of a folder that has changed since is old"
    import fastcifar.data.cache as data
    from fastcifar.data.load import load_data
    copy = tmp_path/'pets'
    shutil.copytree(tree, copy)
    first = load_data(copy).folder
    Image.new('RGB', (32, 32)).save(copy/'train/red/more.png')
    load_data(copy)
    t = data.list_cache()
    assert sorted(t.what) == ['current', 'old'] and t.path[t.what == 'old'].tolist() == [str(first)]
    assert len(data.clear_cache('old')) == 0 and first.is_dir() # this process has it open
    data._USED.pop(first).close()
    assert len(data.clear_cache('old')) == 1 and not first.exists()
    bad, link = (data.cache_root()/f'{c * 32}-3' for c in 'bc')
    for content in ('', '[1]', '{"classes": 3}'):
        bad.mkdir(exist_ok=True), (bad/'meta.json').write_text(content)
        assert data.list_cache().what.tolist().count('damaged') == 1
    link.symlink_to(tmp_path)
    assert data.list_cache().set_index('name').what[link.name] == 'not ours'
    data.clear_cache('all')
    assert link.is_symlink() and copy.is_dir() and not bad.exists()
