"Batches do not depend on how workers are started."
import subprocess, sys

CODE = '''
import multiprocessing, sys, torch
from fastcifar.data import load_data
from fastcifar.loaders import CifarDataLoaders
if __name__ == '__main__':
    if sys.argv[1] != 'none': multiprocessing.set_start_method(sys.argv[1])
    dl = load_data(sys.argv[2]).dataloaders(bs=16, policy='crop_flip_cutout', seed=5, num_workers=0 if sys.argv[1] == 'none' else 2, device='cpu').train
    print([float(x.double().sum()) for _ in range(2) for x, _ in dl])
'''

def sums(method, tree, tmp_path):
    (tmp_path/'w.py').write_text(CODE)
    done = subprocess.run([sys.executable, tmp_path/'w.py', method, str(tree)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

def test_start_methods(tree, tmp_path):
    base = sums('none', tree, tmp_path)
    for method in ('fork', 'spawn', 'forkserver'): assert sums(method, tree, tmp_path) == base, method
