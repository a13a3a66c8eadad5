"""Do the tests notice a mistake? Changes one line of a module at a time and runs the module's notebook and tests on it.

    python tools/mutate.py                            # all, in half an hour; writes results/mutation.csv and .json
    python tools/mutate.py --module interpret.corruptions --limit 10 # some changes of one module, only shown
    python tools/mutate.py --survivors                # what was not noticed last time, after tests were added

A process with torch and fastai, but not fastcifar, forks one for each change; that works in a copy of the repository.
The exported cells of the notebook run with the change too: a tool for plain modules (mutmut, cosmic-ray) would change
what a notebook never uses, and import torch for each change. A change is noticed where a cell or a test fails or takes
far too long. Results are kept in .cache/mutation, so a second call goes on where the first was stopped."""
import argparse, ast, collections, csv, dataclasses, hashlib, importlib, json, os, re, shutil, signal, subprocess, sys
import tempfile, threading, time, traceback
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import choose, make_mutants

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT/'.cache/mutation'
EACH = 25 # mutants of a module
LONGEST = 60 # seconds of tests for a mutant, the quickest first
TESTS = { # module -> what is run besides its notebook; of these, the tests that run the changed line
    'study.statistics': ['test_numbers', 'test_values'],
    'interpret.interpretation': ['test_numbers', 'test_values', 'test_names'],
    'interpret.corruptions': ['test_numbers', 'test_values'],
    'train.tta': ['test_values', 'test_fastai'],
    'train.callbacks': ['test_values', 'test_fastai', 'test_checkpoints', 'test_splits'],
    'train.schedule': ['test_values', 'test_rates', 'test_fastai'],
    'train.checkpoint': ['test_checkpoints', 'test_fastai'], 'data.loaders': ['test_batches'],
    'share.export': ['test_shared', 'test_files'],
    'runs.folder': ['test_records', 'test_provenance', 'test_options'],
    'runs.run': ['test_records', 'test_numbers', 'test_provenance', 'test_options'],
    'runs.recipes': ['test_numbers', 'test_recipes'], 'runs.fit': ['test_numbers', 'test_recipes'],
    'study.tables': ['test_records', 'test_growth', 'test_options'],
    'study.study': ['test_records', 'test_growth', 'test_options'],
    'study.sweep': ['test_searches', 'test_numbers', 'test_old_files']}
OWN = ('hostile', 'soak', 'docs', 'readme', 'forms') # modules beside the tests, which import fastcifar
HEAVY = ('ray', 'gradio', 'wandb', 'playwright') # not to be forked
SLOW = ('killed', 'hostile', 'wheel', 'browser') # names of tests that start processes of their own

# -- the copy that a child works in

def copy_repository(to:Path):
    "What git knows, and what Python has compiled: as it is now, whatever is edited while the mutants run"
    listed = subprocess.check_output(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT)
    for name in filter(None, listed.decode().split('\0')):
        if not (ROOT/name).is_file(): continue # a link to a folder, or a file that was deleted
        (to/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, to/name)
    for folder in (ROOT/'fastcifar').rglob('__pycache__'):
        shutil.copytree(folder, to/folder.relative_to(ROOT), dirs_exist_ok=True)

def enter(copy:Path):
    "Make this process one that works in the copy, and those that it starts"
    for name in ('cache', 'tmp', 'config'): (copy.parent/name).mkdir()
    os.environ |= dict(PYTHONPATH=str(copy), FASTCIFAR_CACHE=str(copy.parent/'cache'), TMPDIR=str(copy.parent/'tmp'),
        MPLCONFIGDIR=str(copy.parent/'config'), CUDA_VISIBLE_DEVICES='', NO_ALBUMENTATIONS_UPDATE='1')
    os.environ.pop('FASTCIFAR_DATA', None)
    tempfile.tempdir = None
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or '.').resolve() not in (ROOT, ROOT/'tools'))]
    os.chdir(copy)

def import_the_rest():
    "All that fastcifar and its tests import, but not fastcifar; a child then starts within a second"
    names = set()
    for path in [*(ROOT/'fastcifar').rglob('*.py'), *(ROOT/'tests').glob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): names |= {a.name for a in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module)
    names |= {'nbdev.process', 'nbdev.frontmatter', 'execnb.shell', 'matplotlib.pyplot', 'fastai.vision.all'}
    for name in sorted(names):
        if name.split('.')[0] in ('fastcifar', *OWN, *HEAVY): continue
        try: importlib.import_module(name)
        except Exception: pass # an extra that is not installed; the test that needs it says so
    import hypothesis, torch
    torch.set_num_threads(1)
    hypothesis.settings.register_profile('mutate', derandomize=True, database=None)
    hypothesis.settings.load_profile('mutate')

# -- what a child does

def notebook_of(module) -> str:
    "Its path in the folder of notebooks"
    *folder, name = module.split('.')
    return next((ROOT/'nbs').joinpath(*folder).glob(f'[0-9][0-9]_{name}.ipynb')).relative_to(ROOT/'nbs').as_posix()

def module_of(notebook) -> str:
    "What a notebook makes, by its path in the folder of notebooks"
    return re.sub(r'(^|/)\d+_', r'\1', notebook.removesuffix('.ipynb')).replace('/', '.')

def file_of(module) -> str: return f'fastcifar/{module.replace(".", "/")}.py'

def absolute(source, module) -> str:
    "With the imports that nbdev made relative as they are in the notebook"
    package = ['fastcifar', *module.split('.')[:-1]]
    def full(m): return f'{m[1]}from {".".join(package[:len(package) - len(m[2]) + 1])}.'
    return re.sub(r'^(\s*)from (\.+)(?=\w)', full, source, flags=re.M)

def parts_of(path:Path) -> dict:
    "Cell id -> (first line, source) of an exported module"
    lines, res, mine = path.read_text(encoding='utf-8').splitlines(), {}, None
    for n, line in enumerate(lines, 1):
        if found := re.match(r'# %% \S+ #(\w+)$', line): mine = res[found[1]] = [n + 1, []]
        elif mine: mine[1].append(line)
    return {k: (n, '\n'.join(source)) for k, (n, source) in res.items()}

def only_imports(source): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)

def run_notebook(copy:Path, module:str):
    "As `nbdev_test`, with the exported cells as they are in the module; gives the id of the cell that fails"
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    path, skipped, at = copy/'nbs'/notebook_of(module), set(get_config().tst_flags.split()), [None]
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    os.environ['IN_TEST'] = '1'
    os.chdir(path.parent)
    shell = CaptureShell(path)
    parts, file = parts_of(copy/file_of(module)), str(copy/file_of(module))
    def exported(cell_id):
        line, source = parts[cell_id]
        exec(compile('\n' * (line - 1) + absolute(source, module), file, 'exec'), shell.user_ns)
    shell.user_ns['run_exported_cell'] = exported
    def left_out(cell):
        if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
        said, at[0] = getattr(cell, 'directives_', None) or {}, cell.id
        if said.get('eval:', [''])[0].lower() == 'false' or skipped & said.keys(): return True
        if cell.id in parts and not only_imports(parts[cell.id][1]): cell.source = f'run_exported_cell({cell.id!r})'
    try: shell.run_all(nb, exc_stop=True, preproc=left_out)
    except BaseException: # noqa: an exit is a failure too
        print(shell.prettytb(fname=path))
        return f'{path.name}#{at[0]}'

class Lines:
    "Which lines of the modules run, and what for"
    def __init__(self, copy):
        self.files = {str(copy/file_of(m)): m for m in TESTS}
        self.now, self.stack = set(), []
    def __call__(self, frame, event, arg):
        module = self.files.get(frame.f_code.co_filename)
        if module is None: return None
        def inside(frame, event, arg):
            self.now.add((module, frame.f_lineno))
            return inside
        return inside(frame, event, arg)
    def start(self):
        self.stack.append([self.now, time.time(), 0.])
        self.now = set()
    def stop(self):
        "Lines and seconds since the start, without those of what was started and stopped in between"
        mine, (self.now, began, inner) = self.now, self.stack.pop()
        took = time.time() - began
        if self.stack: self.stack[-1][2] += took
        return mine, took - inner

class Recorder:
    "A plugin of pytest: the lines that each test runs, and the fixtures it asks for"
    def __init__(self, lines): self.lines, self.fixtures, self.tests, self.bad = lines, {}, {}, set()
    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        self.lines.start()
        yield
        mine, took = self.lines.stop()
        name = f'{fixturedef.baseid}::{fixturedef.argname}'
        old = self.fixtures.get(name, (set(), 0))
        self.fixtures[name] = old[0] | mine, max(took, old[1])
    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines.start()
        yield
        mine, took = self.lines.stop()
        asked = [f'{defs[-1].baseid}::{defs[-1].argname}' for defs in item._fixtureinfo.name2fixturedefs.values()]
        asked = {k: self.fixtures[k] for k in asked if k in self.fixtures}
        mine = mine.union(*(lines for lines, _ in asked.values()))
        self.tests[item.nodeid] = mine, took, {k: round(seconds, 2) for k, (_, seconds) in asked.items()}
    def pytest_runtest_logreport(self, report):
        if report.failed or report.skipped: self.bad.add(report.nodeid)
    def pytest_collection_modifyitems(self, items): items[:] = [i for i in items if not any(s in i.name for s in SLOW)]

class First:
    "A plugin of pytest: the first test that fails"
    name = None
    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name: self.name = report.nodeid

def run_tests(names, *plugins):
    return pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', *names], plugins=list(plugins))

def measure(copy:Path, unit:str) -> dict:
    "The tests of a unit (a notebook, or a file of tests): seconds, and the lines that they run"
    lines = Lines(copy)
    threading.settrace(lines)
    sys.settrace(lines)
    if unit.endswith('.ipynb'):
        lines.start()
        bad = run_notebook(copy, module_of(unit))
        tests, failed = {unit: (*lines.stop(), {})}, [bad] if bad else []
    else:
        recorder = Recorder(lines)
        pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', f'tests/{unit}.py'], plugins=[recorder])
        tests, failed = {k: v for k, v in recorder.tests.items() if k not in recorder.bad}, sorted(recorder.bad)
    sys.settrace(None)
    res = {}
    for name, (ran, took, fixtures) in tests.items():
        by_module = collections.defaultdict(list)
        for m, n in sorted(ran): by_module[m].append(n)
        res[name] = dict(seconds=round(took, 2), fixtures=fixtures, lines=by_module)
    return dict(tests=res, failed=failed)

def judge(copy:Path, mutant, source:str, names) -> dict:
    "Run tests on a mutant until one notices"
    (copy/file_of(mutant.module)).write_text(source, encoding='utf-8')
    for is_notebook, group in groups(names):
        if is_notebook: noticed = run_notebook(copy, mutant.module)
        else:
            first = First()
            code = run_tests(group, first)
            noticed = first.name or (f'pytest ends with {int(code)}' if code else None)
        os.chdir(copy)
        if noticed: return dict(outcome='killed', by=noticed)
    return dict(outcome='survived', by='')

def groups(names):
    "(is it a notebook?, names) of tests that can be run in one go"
    res = []
    for name in names:
        kind = name.endswith('.ipynb')
        if not res or res[-1][0] != kind or kind: res.append((kind, []))
        res[-1][1].append(name)
    return res

# -- children

@dataclasses.dataclass
class Child:
    pid: int
    folder: Path
    until: float
    then: object

class Pool:
    "Some forked processes at a time"
    def __init__(self, jobs):
        self.jobs, self.running, self.base = jobs, [], Path(tempfile.mkdtemp(prefix='mutants'))
        copy_repository(self.base)
    def submit(self, what, seconds, then):
        "Call `what(copy)` in a process of its own, and `then` with its result here: None where it was late or crashed"
        while len(self.running) >= self.jobs: self.wait()
        folder = Path(tempfile.mkdtemp(prefix='mutant'))
        sys.stdout.flush()
        if pid := os.fork(): self.running.append(Child(pid, folder, time.time() + seconds, then))
        else: self.child(what, folder)
    def child(self, what, folder):
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with open(folder/'log', 'w') as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            shutil.copytree(self.base, folder/'copy')
            enter(folder/'copy')
            (folder/'result').write_text(json.dumps(what(folder/'copy')))
            code = 0
        except BaseException: traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    def wait(self):
        "Until one has ended"
        while True:
            for c in self.running:
                ended, late = os.waitpid(c.pid, os.WNOHANG)[0], time.time() > c.until
                if ended or late: return self.end(c, late and not ended)
            time.sleep(.05)
    def end(self, c, late):
        self.kill(c)
        if late: os.waitpid(c.pid, 0)
        self.running.remove(c)
        try: result = json.loads((c.folder/'result').read_text())
        except (OSError, ValueError): result = None
        log = (c.folder/'log').read_text(errors='replace') if (c.folder/'log').exists() else ''
        shutil.rmtree(c.folder, ignore_errors=True)
        c.then(result, 'timeout' if late else log)
    def kill(self, c): # and whatever it has started
        try: os.killpg(c.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    def finish(self):
        while self.running: self.wait()
    def stop(self):
        for c in self.running: self.kill(c), shutil.rmtree(c.folder, ignore_errors=True)
        shutil.rmtree(self.base, ignore_errors=True)

# -- the whole

def digest(*paths) -> str:
    h = hashlib.sha256()
    for p in paths: h.update(p.read_bytes())
    return h.hexdigest()[:16]

def code_of(path:Path) -> str:
    "What runs of a notebook; its outputs and prose do not matter"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = ''.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    return hashlib.sha256(code.encode()).hexdigest()[:16]

def version_of(unit) -> str:
    if unit.endswith('.ipynb'): return code_of(ROOT/'nbs'/unit)
    return digest(ROOT/f'tests/{unit}.py', ROOT/'tests/conftest.py')

def library() -> str: return digest(*sorted((ROOT/'fastcifar').rglob('*.py')))

def load(name, default):
    try: return json.loads((STATE/name).read_text(encoding='utf-8'))
    except (OSError, ValueError): return default

def save(name, what):
    STATE.mkdir(parents=True, exist_ok=True)
    (STATE/f'{name}.new').write_text(json.dumps(what), encoding='utf-8')
    os.replace(STATE/f'{name}.new', STATE/name)

def units_of(module): return [notebook_of(module), *TESTS[module]]

def measured(modules, pool) -> dict:
    "Test -> seconds and lines, for all tests of some modules on the code as it is"
    old, new, code = load('tests.json', {}), {}, library()
    versions = {u: f'{code} {version_of(u)}' for m in modules for u in units_of(m)}
    for unit, version in versions.items():
        if old.get(unit, {}).get('version') == version: new[unit] = old[unit]
        else:
            def then(result, log, unit=unit, version=version):
                if not result: sys.exit(f'{unit} does not run: {log[-3000:]}')
                for name in result['failed']: print(f'left out, as it fails or is skipped on the code as it is: {name}')
                if result['failed'] and unit.endswith('.ipynb'): sys.exit(log[-3000:])
                new[unit] = dict(version=version, **result)
                took = sum(t['seconds'] for t in result['tests'].values())
                print(f'{unit}: {len(result["tests"])} tests, {took:.0f} s', flush=True)
                save('tests.json', old | new)
            pool.submit(lambda copy, unit=unit: measure(copy, unit), 1800, then)
    pool.finish()
    return {u: v['tests'] for u, v in new.items()}

def tests_for(mutant, tests) -> tuple:
    "The tests that run a changed line, the quickest first, up to a time; and that time"
    mine = {k: v for u in units_of(mutant.module) for k, v in tests[u].items()}
    def runs(v):
        ran = v['lines'].get(mutant.module)
        return ran and set(ran) & set(mutant.lines) if mutant.lines else ran
    res, total, made = [], 0, set()
    for name, v in sorted(mine.items(), key=lambda i: i[1]['seconds'] + sum(i[1]['fixtures'].values())):
        more = v['seconds'] + sum(s for k, s in v['fixtures'].items() if k not in made) # each is made once
        if runs(v) and (total + more <= LONGEST or name.endswith('.ipynb')):
            res.append(name)
            total, made = total + more, made | v['fixtures'].keys()
    return res, total

def equivalents() -> dict:
    "Changes that change nothing, each with the reason: mutant -> reason"
    path = ROOT/'tools/equivalent_mutants.csv'
    with open(path, newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    return {name_of(r): r['reason'] for r in rows}

def name_of(row): return ' | '.join(row[k] for k in ('module', 'function', 'line', 'change')) # as `Mutant.name`

def versions_of(module) -> str:
    return ' '.join((digest(ROOT/file_of(module)), *map(version_of, units_of(module))))

def judged(module, text, version, args, tests, pool, said) -> list:
    "A result for each mutant of a module"
    known, res = load(f'{module}.json', {}), {}
    mutants = choose(make_mutants(module, text), text, args.limit or EACH, args.seed)
    for m in mutants:
        old = known.get(m.name)
        if old and not args.fresh and (old['version'] == version or args.survivors and old['outcome'] == 'killed'):
            res[m.name] = old
            continue
        names, seconds = tests_for(m, tests)
        def then(result, log, m=m, began=time.time()):
            r = result or dict(outcome='killed', by='takes too long' if log == 'timeout' else 'the process ends')
            res[m.name] = known[m.name] = dict(r, version=version)
            save(f'{module}.json', known)
            said(m, r)
        if not names: then(dict(outcome='survived', by='no test runs this line'), '')
        else:
            work = lambda copy, m=m, names=names: judge(copy, m, m.source(text), names)
            pool.submit(work, 60 + 5 * seconds, then)
    pool.finish()
    return [row_of(m, res[m.name]) for m in mutants]

def row_of(m, r) -> dict:
    return dict(module=m.module, function=m.scope, kind=m.kind, line=m.line, change=m.change, outcome=r['outcome'],
        noticed_by=r['by'])

def kept(module, text, args) -> list:
    "A result for each mutant that has been judged already, with the tests of that time"
    known = load(f'{module}.json', {})
    mutants = choose(make_mutants(module, text), text, args.limit or EACH, args.seed)
    return [row_of(m, known[m.name]) for m in mutants if m.name in known]

def with_equivalents(rows, reasons):
    for r in rows:
        name = name_of(r)
        if name in reasons and r['outcome'] == 'killed': print(f'listed as equivalent, but noticed: {name}')
        elif name in reasons: r |= dict(outcome='equivalent', noticed_by=reasons[name])
    return rows

def table(rows) -> dict:
    "Module -> numbers"
    res = {}
    for m in [*dict.fromkeys(r['module'] for r in rows), 'all']:
        n = collections.Counter(r['outcome'] for r in rows if m in ('all', r['module']))
        judged = n['killed'] + n['survived']
        res[m] = dict(mutants=n.total(), equivalent=n['equivalent'], killed=n['killed'], survived=n['survived'],
            share=round(n['killed'] / judged, 4) if judged else None)
    return res

def write_results(rows, args):
    with open(ROOT/'results/mutation.csv', 'w', newline='', encoding='utf-8') as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        w.writeheader()
        w.writerows(rows)
    said = json.dumps(dict(seed=args.seed, modules=table(rows)), indent=1)
    (ROOT/'results/mutation.json').write_text(said + '\n', encoding='utf-8')

def show(rows):
    print(f'\n{"module":26}{"mutants":>9}{"equivalent":>12}{"killed":>8}{"survived":>10}{"share":>9}')
    for m, t in table(rows).items():
        share = '' if t['share'] is None else f'{t["share"]:.1%}'
        print(f'{m:26}{t["mutants"]:9}{t["equivalent"]:12}{t["killed"]:8}{t["survived"]:10}{share:>9}')
    for r in rows:
        if r['outcome'] != 'survived': continue
        print(f'\n{r["module"]}.{r["function"]}: {r["line"]}\n    {r["change"]}   ({r["noticed_by"] or "tests pass"})')

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--module', nargs='+', choices=list(TESTS), default=list(TESTS), help='which (default: all)')
    p.add_argument('--limit', type=int, help=f'mutants of each module (default: {EACH})')
    p.add_argument('--seed', type=int, default=0, help='another one gives other mutants')
    p.add_argument('--jobs', type=int, default=2, help='processes at a time')
    p.add_argument('--survivors', action='store_true', help='keep what was noticed, though tests have changed since')
    p.add_argument('--fresh', action='store_true', help='keep nothing')
    p.add_argument('--list', action='store_true', help='only list the mutants')
    p.add_argument('--collect', action='store_true', help='run nothing: write the results of what has been judged')
    args = p.parse_args()
    texts = {m: (ROOT/file_of(m)).read_text(encoding='utf-8') for m in args.module}
    if args.list:
        for m, text in texts.items():
            for o in choose(make_mutants(m, text), text, args.limit or EACH, args.seed): print(f'{o.kind:12}{o.name}')
        return
    if args.collect:
        rows = with_equivalents([r for m, text in texts.items() for r in kept(m, text, args)], equivalents())
        show(rows)
        return write_results(rows, args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped; the same command goes on')) # and ends the children
    pool, began, versions = Pool(args.jobs), time.time(), {m: versions_of(m) for m in args.module}
    import_the_rest()
    def said(m, r):
        print(f'{time.time() - began:6.0f} s  {r["outcome"]:9} {m.module}.{m.scope}: {m.change}  {r["by"]}', flush=True)
    try:
        tests, reasons = measured(args.module, pool), equivalents()
        found = [judged(m, texts[m], versions[m], args, tests, pool, said) for m in args.module]
        rows = with_equivalents([r for rows in found for r in rows], reasons)
    finally: pool.stop()
    show(rows)
    for name in sorted(reasons.keys() - {name_of(r) for r in rows}):
        if name.split(' | ')[0] in args.module and not args.limit: print(f'equivalent, but no mutant: {name}')
    if args.module == list(TESTS) and not args.limit: write_results(rows, args)

if __name__ == '__main__': main()
