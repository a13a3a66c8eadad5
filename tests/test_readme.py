"What the README and the page of commands tell people to type works, and prints what they show."
import json, re, shlex, shutil, subprocess, sys
from pathlib import Path

from fastcifar.models.zoo import count_parameters, create_model, list_models
from fastcifar.runs.replay import records_table
from fastcifar.study.statistics import study_summary

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/'README.md').read_text()
ABOUT = 'must', 'goal', 'missed', 'asked', 'hope', 'hoped' # words of a plan, not of a description

def page(name):
    "The prose of a notebook"
    cells = json.loads((ROOT/f'nbs/{name}.ipynb').read_text())['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

def blocks(text, language): return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)

def commands(text):
    "The lines of the shell blocks"
    return [shlex.split(l, comments=True) for b in blocks(text, 'sh') for l in b.splitlines() if l.strip()]

def session():
    "Commands of the README's terminal, each with the lines it prints"
    [text] = blocks(README, 'console')
    parts = re.split(r'^\$ ', text, flags=re.M)[1:]
    return [(p.splitlines()[0], [l for l in p.splitlines()[1:] if l]) for p in parts]

def alike(shown, printed, within):
    "The same text, with numbers that are nearly the same: another processor rounds otherwise"
    number = r'\d+(?:,\d{3})*(?:\.\d+)?'
    if re.sub(number, '#', ' '.join(shown.split())) != re.sub(number, '#', ' '.join(printed.split())): return False
    pairs = zip(re.findall(number, shown), re.findall(number, printed))
    return all(abs(float(a.replace(',', '')) - float(b.replace(',', ''))) <= within for a, b in pairs)

def timeless(line):
    "A line without the seconds at the end of an epoch's row"
    return re.sub(r'^( +\d+(?: +[\d.]+){4}) +[\d.]+$', r'\1', line)

def test_first_two_commands_are_make():
    assert commands(README)[:2] == [['make', 'demo'], ['make', 'test']]
    assert re.search(r'^make test$', (ROOT/'.ci/run').read_text(), re.M)
    assert {'demo', 'test', 'test-latest'} <= set(re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(), re.M))

def test_it_is_short_and_describes():
    assert len(README.splitlines()) <= 100
    assert not re.search(rf'\b({"|".join(ABOUT)})\b', README, re.I)
    assert not re.search('jpeg', README, re.I)
    for link in re.findall(r'\]\((?!https?:|#)([^)]+)\)', README): assert (ROOT/link).exists(), link

def test_commands_of_the_page(main, tmp_path):
    shutil.copytree(ROOT/'nbs/images', tmp_path/'nbs/images')
    typed = [c for c in commands(page('pages/commands')) if c[0] == 'fastcifar']
    assert {c[1] for c in typed} == {'train', 'compare', 'find-lr', 'evaluate', 'report', 'predict', 'export', 'sweep',
                                     'models', 'recipes', 'summary', 'bench'}
    for c in typed:
        code, out, err = main(*c[1:])
        assert code == 0 and out, (c, err)

def test_the_terminal_shows_what_is_printed(main, tmp_path):
    shutil.copytree(ROOT/'nbs/images', tmp_path/'nbs/images')
    for command, shown in session():
        code, out, err = main(*shlex.split(command)[1:])
        assert code == 0, err
        printed = [l for l in out.splitlines() if l]
        for line in shown:
            if line == '...': continue
            if re.match(r'\d+/\d+ ', line): continue # in the order in which they are ready
            assert any(alike(timeless(line), timeless(l), 12) for l in printed), (command, line)

def test_demo(main):
    "The command of `make demo`: at least 97% of the held-out digits"
    line = re.search(r'fastcifar (train .*)$', (ROOT/'Makefile').read_text().split('\ndemo:')[1], re.M).group(1)
    code, out, err = main(*shlex.split(line), '--json')
    assert code == 0, err
    m = json.loads(out)
    assert m['data'] == 'digits' and m['test_images'] == 300 and m['test_accuracy'] >= 0.97
    assert 'run folder: runs/demo' in err

def test_the_lines_of_python_print_what_is_shown():
    "As a script: the cycle, fastai's table and three mistakes"
    [lines], [shown] = blocks(README, 'python'), blocks(README, 'text')
    done = subprocess.run([sys.executable, '-c', lines], capture_output=True, check=True)
    printed = [l.rsplit('\r', 1)[-1].rstrip() for l in done.stdout.decode().split('\n')]
    printed, shown = [[l for l in t if l] for t in (printed, shown.splitlines())]
    assert len(printed) == len(shown) == 10
    assert alike(shown[0], printed[0], 0.05) and printed[1] == shown[1] and printed[6] == shown[6]
    accuracy = [float(l.split()[3]) for l in (shown[5], printed[5])]
    assert min(accuracy) > 0.9 and abs(accuracy[0] - accuracy[1]) <= 0.05
    mistakes = [l.split()[1:3] for t in (shown, printed) for l in t[7:]]
    assert all(truth != predicted for truth, predicted in mistakes)

def cells(line): return [c.strip() for c in line.strip().strip('|').split('|')]

def table(text, head):
    "The rows of a table whose head begins so, as dicts"
    lines = text.splitlines()
    start = next(i for i, l in enumerate(lines) if l.startswith(f'| {head} |'))
    rows = lines[start + 2:]
    end = next((i for i, l in enumerate(rows) if not l.startswith('|')), len(rows))
    return [dict(zip(cells(lines[start]), cells(l))) for l in rows[:end]]

def test_accuracies_come_from_their_runs():
    "Mean, interval and number of the runs of each net and recipe with batch norm"
    runs = records_table(*ROOT.glob('results/lossless/*.jsonl'))
    assert set(runs.data) == {'cifar10'} and set(runs.tta) == {'none'} and set(runs.test_images) == {10_000}
    summary, rows = study_summary(runs[runs.norm == 'bn'], ['model', 'recipe']), table(README, 'net')
    assert len(rows) == len(summary)
    for r in rows:
        net = r['net'].strip('`')
        s = summary.loc[(net, r['recipe'])]
        interval = f' ± {s["high"] - s["mean"]:.2f}' if s.n > 1 else ''
        assert r['test accuracy'] == f'{s["mean"]:.2f}{interval}% (n = {s.n:.0f})'
        assert r['parameters'] == f'{count_parameters(create_model(net)):,}'

def outputs(name):
    "What the cells of a notebook show, as text"
    found = json.loads((ROOT/f'nbs/{name}.ipynb').read_text())['cells']
    shown = [o.get('data', {}) for c in found for o in c.get('outputs', [])]
    return '\n\n'.join(''.join(d.get('text/markdown', '')) for d in shown)

def test_tables_of_the_nets_come_from_the_nets_and_runs():
    text = outputs('pages/nets')
    assert [r['net'].strip('`') for r in table(text.split('\n\n')[0], 'net')] == list(list_models())
    folders = [f.parent for f in ROOT.glob('results/digits-*/metrics.json')]
    runs = [json.loads((f/'metrics.json').read_text()) for f in folders]
    rows = table(text.strip().split('\n\n')[-1], 'net')
    assert len(rows) == len(runs)
    for r in rows:
        [m] = [m for m in runs if str(m['seed']) == r['seed']]
        assert (r['net'], r['epochs'], r['precision']) == (f'{m["model"]} {m["norm"]}', str(m['epochs']), m['precision'])
        assert (r['train accuracy'], r['test accuracy']) == (f'{m["train_accuracy"]:.2%}', f'{m["test_accuracy"]:.2%}')
        assert (r['LRMIN'], r['LRMAX']) == (f'{m["lr_min"]:.1e}', f'{m["lr_max"]:.1e}')

def test_the_sentence_of_speed_comes_from_benchmarks():
    files = (ROOT/f'benchmarks/{n}.json' for n in ('data', 'step'))
    ratio = {r['name']: r['ratio'] for f in files for r in json.loads(f.read_text())['rows']}
    numbers = r'ready (\d+) \(.*?\) times .*? takes (\d+) \(.*?\) µs .*? fastai takes (\d+)'
    times, ours, theirs = re.search(numbers, README, re.S).groups()
    assert int(times) == round(ratio['default/datablock'])
    assert (int(ours), int(theirs)) == (round(ratio['step/overhead_us']), round(ratio['step/fastai_overhead_us']))
