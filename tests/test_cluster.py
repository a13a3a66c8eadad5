"Studies on Ray, with two nodes on this machine, and sweeps."
import json, os, subprocess, sys, textwrap, time
from pathlib import Path

import pandas as pd
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ('--data digits --models normnet31k --norms bn,gn --recipes fast --epochs 2 --bs 128 --seeds 4 '
            '--precision fp32 --no-pictures').split()

def compare(*args, **where):
    "`fastcifar compare` in a process of its own"
    words = [sys.executable, '-m', 'fastcifar', 'compare', *SETTINGS, *args]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, **where)

@pytest.mark.skipif(os.environ.get('FASTCIFAR_SOAK') != '1', reason='two minutes: make soak runs it')
def test_a_node_dies_in_the_middle_of_a_study(tmp_path):
    "Eight runs on two nodes, one of which is killed: none is lost or trained twice, and all end as on the local pool"
    pytest.importorskip('ray', reason='the ray extra is not installed')
    script = tmp_path/'script.py'
    script.write_text(textwrap.dedent(f'''
        import json, os, sys, threading, time
        os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
        import ray
        from ray.cluster_utils import Cluster
        from pathlib import Path
        from fastcifar.study.cluster import RayTasks
        from fastcifar.study.study import Study
        import matplotlib; matplotlib.use('agg')
        out = Path(sys.argv[1])
        cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
        second = cluster.add_node(num_cpus=1)
        killed = []
        def kill():
            def unfinished(): return [d for d in out.glob('runs/*') if not (d/'metrics.json').exists()]
            def begun(): return [d for d in unfinished() if list((d/'checkpoints').glob('*'))]
            while len(list(out.glob('runs/*/metrics.json'))) < 2 or len(begun()) < 2: time.sleep(.05)
            killed.append(sorted(d.name for d in unfinished()))
            cluster.remove_node(second, allow_graceful=False)
        threading.Thread(target=kill, daemon=True).start()
        s = Study(out, 'normnet31k', 'digits', ('bn', 'gn'), ('fast',), 4, (128,), epochs=2, precision='fp32')
        r = s.run(tasks=RayTasks(cluster.address), device='cpu', bars=False, pictures=False)
        print(json.dumps(dict(killed=killed, status=r.status.tolist())))
        cluster.shutdown()
    '''))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    words = [sys.executable, script, tmp_path/'ray']
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told['status'] == ['finished'] * 8 and len(told['killed']) == 1
    logs = {d.name: (d/'log.txt').read_text() for d in (tmp_path/'ray/runs').iterdir()}
    assert all(t.count('test accuracy') == 1 for t in logs.values()), 'each is trained to its end once'
    again = [n for n, t in logs.items() if 'continuing after' in t]
    assert again and set(again) <= set(told['killed'][0]), 'what was lost with the node went on from its checkpoint'
    local = compare('--seeds', '1', '--jobs', '1', '--out', str(tmp_path/'local'), cwd=ROOT, env=env)
    assert local.returncode == 0, local.stderr
    for name in ('normnet31k-bn-fast-bs128-seed0', 'normnet31k-gn-fast-bs128-seed0'):
        a, b = (load_file(tmp_path/where/'runs'/name/'model.safetensors') for where in ('ray', 'local'))
        assert all((a[k] == b[k]).all() for k in a), name
    r = pd.read_csv(tmp_path/'ray/results.csv')
    assert len(r) == 8 and (r.status == 'finished').all()

def test_compare_on_ray(tmp_path):
    pytest.importorskip('ray', reason='the ray extra is not installed')
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    one = '--epochs 1 --norms gn --seeds 1 --on ray --out study'.split()
    done = compare(*one, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'on a Ray cluster' in done.stdout and (pd.read_csv(tmp_path/'study/results.csv').status == 'finished').all()

def test_compare_on_ray_by_command(main, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    code, out, err = main('compare', *SETTINGS, '--on', 'ray', '--out', tmp_path/'a')
    assert code == 2 and err.strip().endswith("a study on Ray needs ray: pip install 'fastcifar[ray]'")
    code, out, err = main('compare', *SETTINGS, '--gpus', '.5', '--out', tmp_path/'a')
    assert code == 2 and 'add --on ray' in err and len(err.splitlines()) == 1

def test_sweep_gives_a_recipe_that_train_takes(main, tmp_path):
    pytest.importorskip('optuna', reason='the sweep extra is not installed')
    words = ('sweep --data digits --model normnet31k --epochs 1 --bs 64 --valid 300 --precision fp32 '
             '--tune lr_max,label_smoothing').split()
    args = (*words, '--out', tmp_path/'sweep')
    code, out, err = main(*args, '--trials', 2)
    assert code == 0 and f'fastcifar train --recipe {tmp_path}/sweep/recipe.json' in out, err
    code, out, err = main(*args, '--trials', 3, '--json')
    r = json.loads(out)
    assert code == 0 and r['found']['trials'] == 3 and '2 done' in err
    made = {'.lock', 'sweep.json', 'journal.log', 'trials.csv', 'recipe.json', 'sweep.png'}
    assert set(p.name for p in (tmp_path/'sweep').iterdir()) == made
    found = tmp_path/'sweep/recipe.json'
    code, out, err = main('train', '--data', 'digits', '--recipe', found, '--out', tmp_path/'run')
    assert code == 0, err
    c = json.loads((tmp_path/'run/config.json').read_text())
    assert (c['model'], c['recipe'], c['epochs']) == ('normnet31k', 'fast', 1)
    assert all(c[k] == r['settings'][k] for k in ('lr_max', 'label_smoothing'))
    code, out, err = main(*args, '--trials', 3, '--epochs', 2)
    assert code == 2 and 'another configuration' in err

def test_damaged_recipes_and_missing_optuna(main, tmp_path, monkeypatch):
    f = tmp_path/'recipe.json'
    damaged = {'{"settings": {"lr_max": "much"}, "recipe": "fast", "model": "normnet31k"}': 'lr_max',
               '[]': 'holds no recipe', '{': 'recipe.json', '{"settings": {}, "recipe": "fast"}': 'no model'}
    for text, said in damaged.items():
        f.write_text(text)
        code, out, err = main('train', '--data', 'digits', '--recipe', f)
        assert code == 2 and said in err and len(err.splitlines()) == 1, err
    monkeypatch.setitem(sys.modules, 'optuna', None)
    code, out, err = main('sweep', '--data', 'digits', '--model', 'normnet31k', '--valid', 300, '--out', tmp_path/'s')
    assert code == 2 and err.strip().endswith("a sweep needs optuna: pip install 'fastcifar[sweep]'")
