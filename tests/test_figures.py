"Every accuracy of CIFAR-10 that a reader sees is of the lossless images, and of a run that is written down."
import csv, importlib.util, json, re
from html import unescape
from pathlib import Path

import pytest

from fastcifar.data.fetch import ARCHIVES
from fastcifar.runs.folder import RunFolder
from fastcifar.runs.replay import records_table
from fastcifar.study.statistics import paired_differences, study_summary

ROOT = Path(__file__).resolve().parents[1]
LOSSLESS = ARCHIVES['cifar10'].content
# what is no training on CIFAR-10: tests of the tests, of kills, what others report; and rates, whose files are named
# after their data
OTHER = 'mutation.*', 'soak.json', 'published.csv', 'rates/*', 'README.md', '*/README.md'
READ = {'lossless', 'digits-*', 'published.csv', 'soak.json', 'mutation.json', 'rates'} # by pages, below results/

def data_of(file):
    "The data that a file of results says its rows are of: pairs of name and hash"
    if file.suffix == '.jsonl':
        metrics = [json.loads(line)['metrics'] for line in file.read_text().splitlines()]
        return {(m['data'], m['data_sha256']) for m in metrics}
    if (file.parent/'metrics.json').exists(): # a run folder
        metrics = json.loads((file.parent/'metrics.json').read_text())
        return {(metrics['data'], metrics['data_sha256'])}
    with open(file, newline='') as f: return {('cifar10', row.get('data_sha256')) for row in csv.DictReader(f)}

def unfounded(folder):
    "Files of results that are of neither the digits nor the lossless CIFAR-10, or do not say so"
    files = [f for f in sorted(folder.rglob('*')) if f.is_file()]
    told = [f for f in files if not any(f.relative_to(folder).match(p) for p in OTHER)]
    return [f.relative_to(folder).as_posix() for f in told
            if not all(name == 'digits' or (name, sha) == ('cifar10', LOSSLESS) for name, sha in data_of(f))]

def test_results_are_of_the_lossless_set():
    assert unfounded(ROOT/'results') == []

def record(data='cifar10', sha=LOSSLESS): return json.dumps(dict(metrics=dict(data=data, data_sha256=sha))) + '\n'

@pytest.mark.parametrize('name,text,good', [
    ('a.jsonl', record(), True), ('a.jsonl', record() + record(sha='other'), False),
    ('a.jsonl', record(data='cifar10.tgz'), False), ('a.csv', f'seed,data_sha256\n0,{LOSSLESS}\n', True),
    ('a.csv', 'seed,data_sha256\n0,other\n', False), ('a.csv', 'seed,test_accuracy\n0,0.9\n', False)])
def test_results_of_other_data_are_noticed(tmp_path, name, text, good):
    (tmp_path/name).write_text(text)
    assert unfounded(tmp_path) == ([] if good else [name])

def pages(): return [ROOT/'nbs/index.ipynb', *(p for d in ('pages', 'tutorials') for p in ROOT.glob(f'nbs/{d}/*.ipynb'))]

def code(path): return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']

def results_read(text):
    "Names below `results/` that code reads"
    return {*re.findall(r"\bresults['\")]*/['\"]?([\w*.-]+)", text), *re.findall(r"\bresults['\")]*\.glob\('([\w*-]+)", text)}

def test_pages_read_results_of_the_lossless_set_alone():
    read = {p.stem: {n for text in code(p) for n in results_read(text)} for p in pages()}
    assert read['results'] >= {'lossless', 'published.csv'} and read['03_which_norm'] >= {'lossless', 'published.csv'}
    assert {page: names - READ for page, names in read.items() if names - READ} == {}

@pytest.mark.parametrize('text,name', [("pd.read_csv('../../results/norms/results.csv')", 'norms'),
                                       ("pd.read_csv(results/'tuning.csv')", 'tuning.csv'),
                                       ("Path('../../results').glob('speedrun_*/results.csv')", 'speedrun_*')])
def test_other_results_that_are_read_are_noticed(text, name): assert results_read(text) == {name}

def test_no_page_speaks_of_another_copy():
    "Only the packaged nets were trained on one, which their notebook says"
    for p in [ROOT/'README.md', *pages()]: assert 'JPEG-coded' not in p.read_text(), p.name
    for p in pages(): assert not [row for row in tables(p) if 'cifar10.tgz' in row], p.name

def tables(path):
    "Rows of all tables of a notebook's outputs, as lists of their cells' texts"
    shown = [o.get('data', {}) for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', [])]
    rows = re.findall(r'<tr.*?</tr>', '\n'.join(''.join(d.get('text/html', '')) for d in shown), re.S)
    cells = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row, re.S) for row in rows]
    return [[unescape(re.sub('<[^>]+>', '', c)).strip() for c in row] for row in cells]

def records():
    runs = records_table(*sorted(ROOT.glob('results/lossless/*.jsonl')))
    return runs[runs.recipe == 'reference']

def test_page_of_results_shows_the_records():
    "Each mean with its interval and n, and each difference; who adds runs makes the page anew"
    shown = tables(ROOT/'nbs/pages/results.ipynb')
    for (net, norm), r in study_summary(records(), ['model', 'norm']).iterrows():
        [row] = [row for row in shown if row[:2] == [net, norm]]
        assert row[3:] == [f'{r["mean"]:.2f}', f'{r.low:.2f} to {r.high:.2f}', f'{r.n:.0f}']
    for r in paired_differences(records(), 'norm').itertuples():
        [row] = [row for row in shown if row[:2] == [r.model, f'{r.a} - {r.b}']]
        assert row[2] == f'{r.difference:+.2f}' and row[4:] == [str(r.n), f'{r.p_holm:.4f}']

def test_the_main_job_is_shown_as_its_files_and_its_record_say():
    "On the page of results and in its tutorial"
    folder = RunFolder(ROOT/'results/lossless/custom_resnet')
    m = folder.metrics()
    runs = records_table(ROOT/'results/lossless/one_cycle_custom_resnet.jsonl')
    assert m['test_accuracy'] in set(runs.test_accuracy) and folder.lr_range().lr_max == m['lr_max']
    accuracy, lo, hi = f'{100 * m["test_accuracy"]:.2f}', f'{m["lr_min"]:.2e}', f'{m["lr_max"]:.2e}'
    [row] = [r for r in tables(ROOT/'nbs/pages/results.ipynb') if r[:2] == [lo, hi]]
    assert accuracy in row and row[-1] == str(m['wrong'])
    assert f'{accuracy}% of the 10,000 test images' in (ROOT/'nbs/tutorials/05_custom_resnet.ipynb').read_text()

def test_tutorial_of_norms_shows_the_records():
    shown = tables(ROOT/'nbs/tutorials/03_which_norm.ipynb')
    found = paired_differences(records(), 'norm')[['model', 'a', 'b', 'n', 'difference', 'low', 'high', 'p_holm']]
    for i, r in found.iterrows():
        [row] = [row for row in shown if row[1:4] == [r.model, r.a, r.b]]
        assert row[0] == str(i) and row[4:] == [str(r.n), *(f'{r[k]:.3f}' for k in ('difference', 'low', 'high', 'p_holm'))]

def test_page_of_benchmarks_shows_the_files():
    "No row less, and none of a file that is gone"
    rows = [r for f in ROOT.glob('benchmarks/*.json') for r in json.loads(f.read_text())['rows']]
    of_steps = [r for r in rows if r['name'].startswith(('breakdown/', 'limit/'))]
    cells = json.loads((ROOT/'nbs/pages/benchmarks.ipynb').read_text())['cells']
    page = json.dumps([c.get('outputs') for c in cells])
    shown = re.findall(r'<code>([^<]+)</code>', page)
    assert sorted(shown) == sorted(r['name'] for r in rows if r not in of_steps)
    for r in of_steps:
        if r['unit'] == 'share': assert f'>{r["ratio"]:.1%}<' in page, r['name']

def test_a_packaged_net_says_how_many_runs_there_are(main, tree, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location('pretrained', ROOT/'tools/pretrained.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, 'FOLDER', tmp_path)
    short = 'train', '--data', tree, '--model', 'normnet31k', '--epochs', 1, '--bs', 20, '--lr-max', '1e-3', '--no-pictures'
    for seed in (0, 1): assert main(*short, '--seed', seed, '--out', f'r{seed}')[0] == 0
    assert main('record', 'r0', 'r1', '--out', 'both.jsonl')[0] == 0
    runs = records_table(tmp_path/'both.jsonl')
    key, row = tool.add(RunFolder(tmp_path/'r1'), runs)
    assert key == 'normnet31k-bn' and (row['n'], row['seed'], row['data_sha256']) == (2, 1, runs.data_sha256[0])
    assert row['mean_accuracy'] == round(runs.test_accuracy.mean(), 6) and (tmp_path/f'{key}.safetensors').exists()
    with pytest.raises(SystemExit, match='not among the records'): tool.add(RunFolder(tmp_path/'r1'), runs[:1])
