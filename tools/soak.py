"""What the world does to a training, many times over: kills at random moments, and hostile files.

    python tools/soak.py kills 50        # runs that are killed and continued: bit-equal to runs that are not?
    python tools/soak.py hostile 10000   # damaged and hostile files of every kind: refused in one line?

Some are killed while they write a checkpoint; the files are of all kinds that the library reads. Both end with exit
code 1 if anything was not as it should be, and write what they found into results/soak.json.
"""
import contextlib, json, os, random, shutil, signal, sys, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')

import pandas as pd

import fastcifar.train.checkpoint, fastcifar.models.weights
from fastcifar.basics import read_json, write_json
from fastcifar.runs.config import configure
from fastcifar.runs.folder import RunFolder, environment
from fastcifar.runs.run import train_run
from fastcifar.models.weights import load_tensors

RESULTS = Path(__file__).resolve().parents[1]/'results/soak.json'
SETTINGS = dict(batch=dict(tfms='batch'), item=dict(tfms='item', policy='crop_flip_cutout'),
                averaged=dict(tfms='batch', ema=.9, freeze=(('head.*', 2),)),
                bf16=dict(tfms='batch', precision='bf16'),
                # few images, as fp16 is slow on a CPU
                fp16=dict(tfms='batch', precision='fp16', optimizer='adam', lr_max=2e-3, valid=1000))

def config(kind):
    usual = dict(data='digits', epochs=3, bs=128, dropout=.1, valid=100, precision='fp32')
    return configure('fast', 'normnet31k', **{**usual, **SETTINGS[kind]})

# --- runs that are killed

class Child:
    "A function in a process of its own; forking spares the seconds that the imports take"
    def __init__(self, work):
        self.status, self.pid = None, os.fork()
        if self.pid: return
        try:
            with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null): work()
        except BaseException as e: # whatever it is, a forked process must not go on with what its parent was doing
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    def wait(self, seconds) -> bool:
        "Has it ended, after so long?"
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.status = status
            elif time.monotonic() > end: return False
            else: time.sleep(.002)
        return True

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.wait(10)

def die_while_writing(n, stage):
    "Kill this process at its `n`th checkpoint: with half of the file written, before it gets its name, or after"
    seen, save, replace = 0, fastcifar.models.weights.save_file, os.replace
    def die(now):
        if seen == n and stage == now: os.kill(os.getpid(), signal.SIGKILL)
    def half(tensors, path, *args):
        nonlocal seen
        save(tensors, path, *args)
        seen += 'epoch_' in str(path)
        if seen == n and stage == 'half written': os.truncate(path, os.path.getsize(path) // 2)
        die('half written')
    def rename(a, b):
        die('written')
        replace(a, b)
        die('renamed')
    fastcifar.models.weights.save_file, os.replace = half, rename

def train(kind, out, workers=0, prepare=None):
    if prepare: die_while_writing(*prepare)
    train_run(config(kind), out, workers=workers, threads=1, device='cpu', bars=False, checkpoint_every=2,
              pictures=False, say=lambda s: None)

def outcome(out):
    "What has to be equal: weights, history and metrics without their times"
    run = RunFolder(out)
    tensors, note = load_tensors(run.weights_file, sealed=True)
    history = pd.read_csv(run.history_file).drop(columns='seconds')
    return tensors, note, history, {k: v for k, v in run.metrics().items() if k != 'seconds'}

def equal(a, b):
    tensors, *rest = a
    others, *other_rest = b
    if tensors.keys() != others.keys() or not all(v.equal(others[k]) for k, v in tensors.items()): return False
    return rest[0] == other_rest[0] and rest[1].equals(other_rest[1]) and rest[2] == other_rest[2]

def kill_once(kind, out, rng) -> str: # At which moment; None if the run came to its end before
    "Go on with a run and kill it, after a checkpoint"
    stage = rng.choice(('half written', 'written', 'renamed', *['any moment'] * 3))
    n, workers = rng.randint(2, 12), rng.choice((0, 1)) if kind == 'item' else 0
    p = Child(lambda: train(kind, out, workers, None if stage == 'any moment' else (n, stage)))
    def begun(): return list(RunFolder(out).checkpoints.glob('epoch_*.safetensors'))
    while stage == 'any moment' and not p.wait(.002) and not begun(): pass
    if not p.wait(rng.uniform(0, 3) if stage == 'any moment' else 120): p.kill()
    if p.status != signal.SIGKILL and not RunFolder(out).is_finished:
        raise RuntimeError(f'{out}: the run ended by itself, with status {p.status}')
    return stage if p.status == signal.SIGKILL else None

def killed_run(kind, out, rng) -> list: # The moments
    "A run that is killed one to three times, then left to come to its end"
    moments = []
    for _ in range(rng.randint(1, 3)):
        if (moment := kill_once(kind, out, rng)) is None: break
        moments.append(moment)
    p = Child(lambda: train(kind, out))
    if not p.wait(120) or p.status: raise RuntimeError(f'{out} does not come to its end (status {p.status})')
    return moments

def forgetful(kind, out):
    "The negative control: killed, and continued without the position in the epoch"
    Child(lambda: train(kind, out, 0, (3, 'renamed'))).wait(120)
    def work():
        latest = fastcifar.train.checkpoint.Checkpoints.latest
        def forget(self, learn):
            done = latest(self, learn)
            self.note['batch'] = 0
            return done
        fastcifar.train.checkpoint.Checkpoints.latest = forget
        train(kind, out)
    Child(work).wait(120)

def kills(n:int, seed:int=0) -> dict:
    "`n` runs that were killed at least once each: how many ended equal to an uninterrupted one?"
    rng, moments, same, done, whole = random.Random(seed), [], 0, 0, {}
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        for kind in SETTINGS:
            Child(lambda: train(kind, folder/kind)).wait(120)
            whole[kind] = outcome(folder/kind)
        while done < n:
            kind, out = list(SETTINGS)[done % len(SETTINGS)], folder/'run'
            got = killed_run(kind, out, rng)
            if got: # it may have been quicker
                moments += got
                done += 1
                same += equal(outcome(out), whole[kind])
            shutil.rmtree(out)
        forgetful('batch', folder/'control')
        control = equal(outcome(folder/'control'), whole['batch'])
    return dict(runs=done, bit_equal=same, kills=len(moments),
                moments={m: moments.count(m) for m in sorted(set(moments))}, kinds=list(SETTINGS),
                control_equal=control)

# --- hostile files

def hostile(n:int, seed:int=0) -> dict:
    "`n` inputs, in equal shares of every kind of file"
    from hostile import KINDS, try_kind
    kinds = {k: try_kind(k, -(-n // len(KINDS)), seed) for k in KINDS}
    return dict(inputs=sum(k['inputs'] for k in kinds.values()), accepted=sum(k['accepted'] for k in kinds.values()),
                wrong=sum('wrong' in k for k in kinds.values()), kinds=kinds)

def main(what, n):
    res = dict(kills=kills, hostile=hostile)[what](int(n))
    print(json.dumps(res, indent=1))
    old = read_json(RESULTS) if RESULTS.exists() else {}
    e = environment()
    made_with = {k: e[k] for k in ('python', 'system', 'versions', 'commit')}
    write_json(RESULTS, {**old, what: {**res, **made_with}})
    good = res['bit_equal'] == res['runs'] and not res['control_equal'] if what == 'kills' else not res['wrong']
    sys.exit(0 if good else 1)

if __name__ == '__main__': main(*sys.argv[1:])
