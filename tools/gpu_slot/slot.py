"Some minutes on a CUDA GPU: parts in the order of their worth, each in a process of its own; see README.md"
import argparse, contextlib, fcntl, json, os, shutil, signal, subprocess, sys, tarfile, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TINY = bool(os.environ.get('SLOT_TINY')) # a dry run
if os.environ.get('SLOT_STANDIN'): # a GPU that is not there, see tests/standin
    import count
    count.without_numbers()

def out_folder():
    out = Path(os.environ.get('OUT', 'out'))
    out.mkdir(parents=True, exist_ok=True)
    return out

def note(part, **what):
    "Append a line to the results"
    at = time.time() - float(os.environ.get('SLOT_START', time.time()))
    line = json.dumps(dict(part=part, at=round(at, 1), **what), default=float)
    with open(out_folder()/'results.jsonl', 'a') as f:
        f.write(line + '\n')
        f.flush()
    print(line[:300], flush=True)

@contextlib.contextmanager
def alone():
    "Context in which no other part times anything"
    with open(out_folder()/'.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def facts():
    "The machine"
    import torch
    from fastcifar.runs.folder import environment
    n, k = (1 << 20, 256) if TINY else (1 << 30, 8192)
    a, b = (torch.empty(n, dtype=torch.uint8, device='cuda') for _ in range(2))
    m = torch.randn(k, k, device='cuda', dtype=torch.bfloat16)
    def milliseconds(f, times=5):
        f()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times): f()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / times or 1e-9
    copy, product = milliseconds(lambda: b.copy_(a)), milliseconds(lambda: m @ m)
    x = torch.zeros(16, device='cuda')
    torch.cuda.synchronize()
    t = time.perf_counter()
    for _ in range(5000): x.add_(1)
    launch = (time.perf_counter() - t) / 5000
    note('facts', **environment('cuda'), cudnn=torch.backends.cudnn.version(), copy_TBps=2 * n / copy / 1e9,
         bf16_TFLOPs=2 * k**3 / product / 1e9, launch_us=launch * 1e6)

def learner(name, recipe, bs, steps, **kwargs):
    from fastcifar.bench.timing import noise_data
    from fastcifar.models.zoo import create_model
    from fastcifar.runs.recipes import create_recipe
    from fastcifar.runs.fit import recipe_learner
    from fastcifar.basics import seed_everything
    seed_everything(0)
    r = create_recipe(recipe, name, bs=bs, epochs=1, **(dict(lr_max=1e-3) if recipe == 'one_cycle' else {}))
    dls = noise_data(bs * steps).dataloaders(bs=bs, policy=r.policy, device='cuda')
    return r, recipe_learner(dls, create_model(name), r, **kwargs)

def kernels(profile, steps, most=20):
    "Microseconds of GPU time a step, and the kernels that take most of it: (microseconds, launches, name)"
    found = [(e.self_device_time_total / steps, e.count / steps, e.key[:100]) for e in profile.key_averages()]
    rows = sorted(found, reverse=True)
    return sum(t for t, *_ in rows), [(round(t, 1), round(n, 1), name) for t, n, name in rows[:most]]

def step(name, recipe, bs, how):
    "One case of `steps`: `how` says c(ompiled), and r(ecorded) or o(ne by one)"
    import torch
    from fastai.callback.core import Callback
    from torch.profiler import ProfilerActivity, profile
    from fastcifar.bench.timing import _NoValidation
    from fastcifar.runs.fit import fit_recipe
    bs, steps = (16, 8) if TINY else (int(bs), 80)
    r, learn = learner(name, recipe, bs, steps, compile='c' in how and not TINY, capture='r' in how)
    class Clock(Callback):
        order, run_valid, capturable = -100, False, True # it only looks
        def __init__(self): self.begun = []
        def before_batch(self): self.begun.append(time.perf_counter())
        def after_train(self):
            torch.cuda.synchronize()
            self.done = time.perf_counter()
    def fit(*cbs):
        with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, cbs=[_NoValidation(), *cbs])
    t = time.time()
    fit()
    first = time.time() - t
    with alone():
        c = Clock()
        fit(c)
        gpu, table = None, []
        if not TINY:
            with profile(activities=[ProfilerActivity.CUDA]) as p: fit()
            gpu, table = kernels(p, steps)
    skip, host = steps // 10, sorted(b - a for a, b in zip(c.begun, c.begun[1:]))
    refusal = learn.step_graph and learn.step_graph.refusal
    note('step', net=name, recipe=recipe, bs=bs, how=how, refusal=refusal, first_fit_s=first,
         wall_us=(c.done - c.begun[skip]) / (steps - skip) * 1e6, host_us=host[len(host) // 4] * 1e6, gpu_us=gpu,
         memory_GB=torch.cuda.max_memory_allocated() / 1e9, kernels=table)

STEPS = [('speednet', 'speedrun', 1000, 'cr'), ('speednet', 'speedrun', 2000, 'cr'),
         ('speednet', 'speedrun', 1000, 'r'),
         ('custom_resnet', 'fast', 512, 'cr'), ('custom_resnet', 'fast', 512, 'r'),
         ('custom_resnet', 'one_cycle', 512, 'r'), ('custom_resnet', 'one_cycle', 512, 'o'),
         ('normnet31k', 'reference', 512, 'r'),
         ('normnet48k', 'fast', 128, 'r'), ('normnet48k', 'fast', 128, 'cr'),
         ('fastnet200k', 'fast', 128, 'r')]

def same():
    "Losses of recorded steps against those launched one by one"
    import torch
    from fastcifar.basics import seed_everything
    from fastcifar.bench.timing import _NoValidation, noise_data
    from fastcifar.models.zoo import create_model
    from fastcifar.runs.recipes import create_recipe
    from fastcifar.runs.fit import fit_recipe, recipe_learner
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    data, adam = noise_data(64 * (4 if TINY else 12) + 20), dict(optimizer='adam', lr_max=1e-3)
    cases = [('groupnet', 'fast', adam), ('groupnet', 'fast', dict(optimizer='sgd', lr_max=1e-2)),
             ('groupnet', 'fast', {}),
             ('normnet31k', 'one_cycle', dict(lr_max=1e-3)), ('speednet', 'speedrun', {})]
    for name, recipe, kw in cases[:1] if TINY else cases:
        losses = []
        for capture in (True, False):
            seed_everything(0)
            r = create_recipe(recipe, name, bs=64, epochs=2, **kw)
            net = create_model(name, **({} if name == 'speednet' else dict(dropout=0.)))
            dls = data.dataloaders(bs=64, policy=r.policy, device='cuda')
            learn = recipe_learner(dls, net, r, precision='fp32', capture=capture)
            with learn.no_bar(), learn.no_logging(): fit_recipe(learn, r, cbs=[_NoValidation()])
            losses.append([float(l) for l in learn.recorder.losses])
            if capture: refusal = learn.step_graph.refusal
        apart = [a - b for a, b in zip(*losses)]
        note('same', net=name, recipe=recipe, settings=kw, refusal=refusal, apart=apart, last=losses[0][-1])

def layout():
    "Which memory format is the faster one, forward and backward, without the host"
    import torch
    from fastcifar.models.zoo import create_model
    torch.backends.cudnn.benchmark = True
    cases = [('normnet31k', 'gn'), ('normnet31k', 'ln'), ('custom_resnet', 'gn'), ('groupnet', 'bn'),
             ('sepnet178k', 'bn')]
    for name, norm in cases:
        res = {}
        for form in (torch.channels_last, torch.contiguous_format):
            net = create_model(name, norm=norm).cuda().to(memory_format=form)
            x = torch.randn(16 if TINY else 512, 3, 32, 32, device='cuda').contiguous(memory_format=form)
            def both():
                with torch.autocast('cuda', torch.bfloat16): o = net(x)
                o.float().logsumexp(1).mean().backward()
                net.zero_grad()
            s = torch.cuda.Stream()
            with torch.cuda.stream(s):
                for _ in range(3): both()
            torch.cuda.synchronize()
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g): both()
            with alone():
                torch.cuda.synchronize()
                t = time.perf_counter()
                for _ in range(20): g.replay()
                torch.cuda.synchronize()
                res[str(form).split('.')[-1]] = (time.perf_counter() - t) / 20 * 1e6
        note('layout', net=name, norm=norm, **res)

def the_data():
    from fastcifar.bench.timing import noise_data
    from fastcifar.data.load import load_data
    return noise_data(512) if TINY else load_data(os.environ['FASTCIFAR_DATA'])

def duel(n=10):
    "Our speedrun and an unmodified airbench94_muon.py, in turns"
    import torch
    from fastcifar.bench.gpu import Airbench, _random_labels, _timed_fit
    from fastcifar.runs.recipes import create_recipe
    data, n, small = the_data(), 2 if TINY else n, dict(epochs=1, bs=128) if TINY else {}
    r = create_recipe('speedrun', 'speednet', **small)
    t = time.time()
    _timed_fit('speednet', r, _random_labels(data), 0, torch.device('cuda'))
    note('duel', ours='warm', seconds=time.time() - t)
    with Airbench(os.environ['AIRBENCH'], data, 'cuda') as theirs:
        for k in range(n):
            seconds, accuracy = _timed_fit('speednet', r, data, k, torch.device('cuda'))
            note('duel', run=k, ours_s=seconds, ours_accuracy=accuracy, data=data.name)
            seconds, accuracy = theirs.run()
            note('duel', run=k, theirs_s=seconds, theirs_accuracy=accuracy)

def resnet(n=3):
    "24 epochs of the custom ResNet"
    import torch
    from fastcifar.bench.gpu import _random_labels, _timed_fit
    from fastcifar.runs.recipes import create_recipe
    data, device, small = the_data(), torch.device('cuda'), dict(epochs=1, bs=128) if TINY else {}
    t = time.time()
    one_epoch = create_recipe('fast', 'custom_resnet', **(small or dict(epochs=1)))
    _timed_fit('custom_resnet', one_epoch, _random_labels(data), 0, device)
    note('resnet', run='warm', seconds=time.time() - t)
    for k in range(1 if TINY else n):
        recipe = create_recipe('fast', 'custom_resnet', **small)
        seconds, accuracy = _timed_fit('custom_resnet', recipe, data, k, device)
        note('resnet', run=k, seconds=seconds, accuracy=accuracy, data=data.name)

NORM_CELLS = [(net, norm) for net in ('normnet31k', 'normnet41k', 'normnet48k') for norm in ('bn', 'ln', 'gn')]
def tasks(seeds):
    "(model, norm, recipe, seed) of the studies, so that every cell has its first seeds before any has its last"
    for seed in range(seeds):
        yield from [(net, norm, 'reference', seed) for net, norm in NORM_CELLS]
        yield from [('speednet', 'bn', 'speedrun', seed), ('groupnet', 'bn', 'fast', seed)]
        if seed < 3: yield from [('custom_resnet', 'bn', recipe, seed) for recipe in ('one_cycle', 'reference', 'fast')]
        yield from [(net, norm, 'fast', seed) for net, norm in NORM_CELLS]
        for net in ('sepnet178k', 'fastnet200k'):
            if seed < 3: yield from [(net, 'bn', recipe, seed) for recipe in ('reference', 'fast')]

def studies(worker=0, workers=1, seeds=5):
    "Every `workers`-th run of the studies"
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    todo = [('groupnet', 'bn', 'fast', 0)] if TINY else list(tasks(int(seeds)))
    for net, norm, recipe, seed in todo[int(worker)::int(workers)]:
        more = dict(epochs=1, bs=64, lr_max=1e-3) if TINY else {}
        c = configure(recipe, net, norm=norm, seed=seed, data='digits' if TINY else os.environ['FASTCIFAR_DATA'],
                      **more)
        out = out_folder()/'runs'/f'{net}-{norm}-{recipe}-seed{seed}'
        try: m = train_run(c, out, device='cuda', pictures=False, bars=False, say=lambda s: None)
        except Exception as e:
            note('studies', run=out.name, error=repr(e)[:300])
            continue
        told = ('model', 'norm', 'recipe', 'seed', 'epochs', 'test_accuracy', 'train_accuracy', 'seconds', 'data')
        note('studies', run=out.name, **{k: m[k] for k in told})

def pack():
    "The run folders in one file, without checkpoints and large weights"
    runs = out_folder()/'runs'
    if not runs.is_dir(): return
    def wanted(info):
        if '/checkpoints' in info.name or info.name.endswith('.safetensors') and info.size > 2**20: return None
        return info
    with tarfile.open(out_folder()/'runs.tar.gz', 'w:gz') as t: t.add(runs, 'runs', filter=wanted)
    shutil.rmtree(runs)

PARTS = { # seconds at most, and those below which a part is not begun
    'facts': (40, 10), 'steps': (130, 40), 'same': (60, 25), 'tests': (150, 40), 'layout': (40, 25), 'duel': (260, 90),
    'resnet': (120, 50), 'studies': (600, 60)}
TIMED = ('duel', 'resnet') # these have the GPU for themselves

def commands(part):
    me = [sys.executable, str(Path(__file__).resolve())]
    if part == 'steps': return [[*me, '--one', 'step', *map(str, s)] for s in (STEPS[:1] if TINY else STEPS)]
    if part == 'tests':
        report = ['-p', 'no:cacheprovider', '--tb=short', f'--junitxml={out_folder()/"tests.xml"}']
        return [[sys.executable, '-m', 'pytest', str(ROOT/'tests/test_cuda.py'), '-v', *report]]
    if part == 'studies':
        n = 1 if TINY else int(os.environ.get('SLOT_WORKERS', max(2, (os.cpu_count() or 2) - 4)))
        return [[*me, '--one', 'studies', str(i), str(n)] for i in range(n)]
    return [[*me, '--one', part]]

def start(command):
    log = open(out_folder()/'log.txt', 'a')
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

def finish(processes, until):
    "Wait, and end what is not done in time"
    for p in processes:
        try: p.wait(max(until - time.time(), .1))
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL)
    return [p.wait() for p in processes]

def everything(parts, seconds):
    end = time.time() + seconds
    together = [p for p in parts if p not in TIMED and p != 'studies']
    for group in [together, *([p] for p in parts if p in TIMED or p == 'studies')]:
        left = end - time.time()
        begun = [p for p in group if left >= PARTS[p][1]]
        for p in set(group) - set(begun): note(p, skipped=f'{left:.0f} s are left')
        running = {p: [start(c) for c in commands(p)] for p in begun}
        for p, processes in running.items(): note(p, ends=finish(processes, min(end - 5, time.time() + PARTS[p][0])))
    pack()

def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('parts', nargs='*', default=list(PARTS))
    a.add_argument('--seconds', type=float, default=3600)
    a.add_argument('--out')
    a.add_argument('--data')
    a.add_argument('--airbench')
    a.add_argument('--one', nargs='+', help=argparse.SUPPRESS)
    args = a.parse_args()
    if args.one: return globals()[args.one[0]](*args.one[1:])
    for name, value in (('OUT', args.out), ('FASTCIFAR_DATA', args.data), ('AIRBENCH', args.airbench)):
        if value: os.environ[name] = str(Path(value).resolve())
    os.environ['SLOT_START'] = str(time.time())
    parts = [p for p in args.parts or PARTS if p != 'duel' or os.environ.get('AIRBENCH')]
    if not os.environ.get('FASTCIFAR_DATA') and not TINY:
        parts = [p for p in parts if p not in ('duel', 'resnet', 'studies')] # these need images
    everything(parts, args.seconds)

if __name__ == '__main__': main()
