"On a GPU that counts and computes nothing: launches a step, no waiting within one, and a dry run of the GPU slot."
import json, os, subprocess, sys
from pathlib import Path

import pytest

if 'STANDIN' not in os.environ:
    pytest.skip('runs on the stand-in for a GPU alone: make test-standin', allow_module_level=True)

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]

def python(*args, **env):
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def test_launches_a_step(tmp_path):
    python(HERE/'launches.py', '--out', tmp_path/'rows.jsonl')
    rows = [json.loads(l) for l in (tmp_path/'rows.jsonl').read_text().splitlines()]
    assert {r['net'] for r in rows} >= {'speednet', 'custom_resnet'}
    for r in rows: assert r['launches'] <= r['goal'] < r['one_by_one']

AIRBENCH = '''
import torch
x = torch.load('cifar10/train.pt')
for run in ('warmup', 0, 1, 2): print(f'|    |  eval  |  0.9  |  0.8  |  0.81  |  2.5  |', flush=True)
'''

def test_dry_run_of_the_slot(tmp_path):
    "Every part writes its rows; numbers mean nothing here"
    (tmp_path/'airbench94_muon.py').write_text(AIRBENCH)
    parts = ['facts', 'steps', 'same', 'layout', 'duel', 'resnet', 'studies']
    python(ROOT/'tools/gpu_slot/slot.py', *parts, '--seconds', 500, '--out', tmp_path/'out',
           '--airbench', tmp_path/'airbench94_muon.py', SLOT_TINY='1', SLOT_STANDIN='1')
    rows = [json.loads(l) for l in (tmp_path/'out/results.jsonl').read_text().splitlines()]
    log = (tmp_path/'out/log.txt').read_text()[-3000:]
    for p in parts: assert [r for r in rows if r['part'] in (p, p.rstrip('s')) and 'ends' not in r], (p, log)
    assert all(code == 0 for r in rows for code in r.get('ends', [])), log
    assert any('theirs_accuracy' in r and r['theirs_accuracy'] == .81 for r in rows)
