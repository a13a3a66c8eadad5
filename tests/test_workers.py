"Item batches do not depend on how many workers make them, nor on how the workers are started; who made them is asked."
import ast, json, os, pickle, subprocess, sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

CODE = '''
import hashlib, json, multiprocessing, os, sys
from collections import Counter
from pathlib import Path
from fastcifar.data.load import load_data
from fastcifar.data.loaders import ArrayDL

class Watched(ArrayDL):
    "Notes which process makes each batch"
    def create_batches(self, samps):
        for batch in super().create_batches(samps):
            with open(self.log, 'a') as f: f.write(f'{os.getpid()} ')
            yield batch

def digest(batch):
    return hashlib.sha256(b''.join(t.contiguous().numpy().tobytes() for t in batch)).hexdigest()

if __name__ == '__main__':
    tree, *ways = sys.argv[1:]
    multiprocessing.set_forkserver_preload(['fastcifar.data.loaders']) # imported once, not by each worker
    data = load_data(tree)
    print(json.dumps(dict(pid=os.getpid())))
    for way in ways:
        method, n = way.split(':')
        multiprocessing.set_start_method(method, force=True)
        dls = data.dataloaders(bs=16, policy='crop_flip_cutout', seed=5, num_workers=int(n), tfms='item', device='cpu')
        dl = dls.train.new(cls=Watched)
        dl.log, dl.epoch = Path(f'{way}.log'), 0 # so that the second epoch is made: a worker has to know it
        batches = [digest(b) for b in dl]
        print(json.dumps(dict(way=way, batches=batches, made=Counter(map(int, dl.log.read_text().split())))))
'''

def test_start_methods(tree, tmp_path):
    "4 batches by 0, 2 and 4 workers; each worker under spawn imports fastai anew, so 4 of those only in `make soak`"
    (tmp_path/'w.py').write_text(CODE)
    soak = ['spawn:4'] if os.environ.get('FASTCIFAR_SOAK') == '1' else []
    ways = ['fork:0', 'fork:2', 'fork:4', 'forkserver:2', 'forkserver:4', 'spawn:2', *soak]
    done = subprocess.run([sys.executable, 'w.py', str(tree), *ways], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    parent, alone, *others = map(json.loads, done.stdout.splitlines())
    assert alone['made'] == {str(parent['pid']): 4} and len(set(alone['batches'])) == 4
    assert [o['way'] for o in others] == ways[1:]
    for o in others:
        workers = int(o['way'].split(':')[1])
        assert o['batches'] == alone['batches'], o['way']
        assert len(o['made']) == workers and str(parent['pid']) not in o['made'], o
        assert set(o['made'].values()) == {4 // workers}, o

def test_the_cache_is_not_sent_to_workers(tree):
    "What is pickled to a worker names the folder of the memory-mapped images and holds none of them"
    from fastcifar.data.load import load_data
    data = load_data(tree)
    dl = data.dataloaders(bs=16, num_workers=2, tfms='item', device='cpu').train
    for _ in dl: pass # as in a second epoch: with all that the first has left behind
    sent = bytes(ForkingPickler.dumps(dl))
    assert not [i for s in data.x for i, x in enumerate(data.x[s]) if x.tobytes() in sent]
    assert len(sent) < 100_000 < sum(x.nbytes for x in data.x.values())
    again = pickle.loads(sent)
    assert (np.asarray(again.dataset[7][0]) == np.asarray(dl.dataset[7][0])).all()

def test_loading_and_its_loaders_are_one_import():
    "In a fresh process; no module or test of the library is imported for what the import does"
    code = '''
from fastcifar.data.load import load_data
dls = load_data('digits').dataloaders(bs=64, device='cpu')
print(type(dls).__name__, len(dls.train))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ['CifarDataLoaders', '24']

def unused_imports(path):
    "Modules of the library that a file imports without using a name of theirs"
    tree = ast.parse(path.read_text())
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    dotted = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                name = a.asname or a.name
                if a.name.startswith('fastcifar.') and not any(d.startswith(f'{name}.') for d in dotted | used):
                    yield f'{path.name}: {a.name}'
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('fastcifar')):
            names = {a.asname or a.name for a in node.names}
            if not names & {*used, '*'}: yield f'{path.name}: {node.module}'

def test_no_module_is_imported_for_its_side_effects():
    "Folders and `all` hand names on, so theirs are not used where they are imported"
    modules = [p for p in (ROOT/'fastcifar').rglob('*.py') if p.name not in ('__init__.py', 'all.py')]
    assert len(modules) > 40 and [u for p in modules for u in unused_imports(p)] == []

def test_whole_batches_need_no_workers(tree):
    "The batch path starts no process, whatever number is given; the item path as many as asked for"
    from fastcifar.data.load import load_data
    data = load_data(tree)
    def workers(tfms, n): return [dl.fake_l.num_workers for dl in data.dataloaders(bs=8, tfms=tfms, num_workers=n, device='cpu')]
    assert workers('batch', 0) == workers('batch', 2) == [0, 0]
    assert workers('item', 0) == [0, 0] and workers('item', 2)[0] == 2
