"What a long study or a large set takes grows no faster than it has to; counted, since timing belongs to no test."
import json, shutil, tracemalloc

import numpy as np
import pytest

@pytest.fixture(scope='module')
def study(tree, tmp_path_factory):
    "Sixty finished runs, copies of one"
    from fastcifar.study.study import Study, run_name
    out = tmp_path_factory.mktemp('growth')/'study'
    def make(seeds):
        return Study(out, ['normnet31k'], str(tree), norms=('bn', 'gn'), seeds=seeds, epochs=1, batch_sizes=20)
    make(1).run(1, pictures=False, say=lambda *_: None)
    for c in make(30).grid:
        f = out/'runs'/run_name(c)
        if f.exists(): continue
        shutil.copytree(out/'runs'/run_name(c).replace(f'seed{c.seed}', 'seed0'), f)
        for name in ('config.json', 'metrics.json'):
            d = json.loads((f/name).read_text())
            (f/name).write_text(json.dumps({**d, 'seed': c.seed}))
    return make

def test_a_finished_run_is_read_once(study, monkeypatch):
    import fastcifar.study.tables as room
    read, lines = [], []
    monkeypatch.setattr(room, '_history', lambda f, real=room._history: read.append(f.name) or real(f))
    s = study(30)
    for name in sorted(p.name for p in (s.out/'runs').iterdir())[-3:]: shutil.rmtree(s.out/'runs'/name)
    r = s.run(1, pictures=False, say=lines.append)
    assert (r.status == 'finished').all() and len(r) == 60 and sum('seed' in l for l in lines) >= 3
    # each once, and the new ones while they are not finished
    assert len([n for n in read if n not in read[-3:]]) <= 60 + 3 * 3
    del read[:]
    s.results(), s.curves(), s.write(say=lambda *_: None)
    assert read == [] and len(s.curves()) == 60

def test_tables_are_the_same_from_memory_and_from_the_folders(study):
    from fastcifar.study.tables import collect_curves, collect_runs
    from fastcifar.study.study import run_name
    s = study(30)
    s.results()
    folders = [s.out/'runs'/run_name(c) for c in s.grid]
    assert s.results().equals(collect_runs(folders, s.grid)) and s.curves().equals(collect_curves(folders, s.grid))

def test_pixel_statistics_take_little_memory():
    from fastcifar.data.images import pixel_stats
    x = np.random.default_rng(0).integers(0, 256, (6000, 32, 32, 3), np.uint8)
    tracemalloc.start()
    mean, std = pixel_stats(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * x.nbytes # 18 MB of images; three channels at once would take 66
    counts = np.stack([np.bincount(x[..., c].ravel(), minlength=256) for c in range(3)])
    assert mean == (counts @ (np.arange(256) / 255) / counts[0].sum()).tolist()
    np.testing.assert_allclose(std, x.reshape(-1, 3).std(0) / 255, rtol=1e-6)
