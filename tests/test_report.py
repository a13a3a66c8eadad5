"report.html of runs and studies, in a browser, and interpretation of any learner."
import json, re, shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

WIDTHS = [(390, True), (1280, False), (390, False), (1280, True)]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The run folder of a short training on the digits, range test and all"
    import matplotlib; matplotlib.use('agg')
    from fastcifar.runs.config import configure
    from fastcifar.runs.run import train_run
    out = tmp_path_factory.mktemp('report')/'run'
    c = configure(model='normnet31k', data='digits', epochs=3, bs=64)
    train_run(c, out, threads=1, bars=False, say=lambda s: None)
    return out

def axe(page):
    "What a screen reader's or keyboard user's rules say against the page"
    from axe_playwright_python.sync_playwright import Axe
    return [(v['id'], [n['html'][:120] for n in v['nodes']][:3]) for v in Axe().run(page).response['violations']]

@pytest.mark.parametrize('width,dark', WIDTHS)
def test_run_report_in_a_browser(run, visit, width, dark):
    page = visit((run/'report.html').as_uri(), width, dark)
    assert page.evaluate('document.documentElement.scrollWidth') <= width, 'nothing sticks out'
    accuracy = json.loads((run/'metrics.json').read_text())['test_accuracy']
    assert page.locator('.headline strong').inner_text() == f'{accuracy:.2%}'
    for section in ('curves', 'rates', 'mistakes', 'classes', 'net', 'images', 'again'):
        assert page.locator(f'h2#{section}').is_visible(), section
    assert page.locator('.plot svg').count() >= 6
    assert page.evaluate('[...document.images].every(i => i.complete && i.naturalWidth == 32)')
    assert axe(page) == []
    assert page.faults == []

OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
WIDER = """[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)
           .map(e => e.getAttribute('aria-label'))"""

@pytest.mark.parametrize('width', (1280, 390))
def test_no_table_is_cut_off(run, visit, width):
    "On a wide screen all tables fit; on a narrow one those that do not scroll in boxes of their own"
    page = visit((run/'report.html').as_uri(), width)
    page.evaluate(OPEN)
    sizes = page.evaluate('[document.documentElement.scrollWidth, document.documentElement.clientWidth]')
    assert sizes[0] <= sizes[1]
    wider = page.evaluate(WIDER)
    assert wider == [] if width == 1280 else {'Layers, with receptive fields'} <= set(wider)
    assert not {'Configuration, as used', 'Environment'} & set(wider)

@pytest.mark.parametrize('width', (1280, 800, 390))
def test_lines_of_images_are_full(run, visit, width):
    "Twenty images in lines of 10, 5 or 4, all of one size"
    page = visit((run/'report.html').as_uri(), width)
    boxes = page.evaluate("""[...document.querySelectorAll('#images ~ .grid')].map(g => [...g.querySelectorAll('img')]
                             .map(i => i.getBoundingClientRect()).map(b => [b.top, b.width, b.height]))""")
    assert [len(grid) for grid in boxes] == [20, 20]
    for grid in boxes:
        lines = pd.Series([round(top) for top, *_ in grid]).value_counts()
        assert lines.nunique() == 1 and lines.iloc[0] == {1280: 10, 800: 5, 390: 4}[width]
        assert len({(round(w), round(h)) for _, w, h in grid}) == 1

def with_predictions(interp, decoded, sure=.9):
    "An interpretation in which each image is predicted as given, with this probability"
    from fastcifar.interpret.interpretation import CifarInterpretation
    n = len(interp.vocab)
    preds = torch.full((len(decoded), n), (1 - sure) / (n - 1))
    preds[torch.arange(len(decoded)), decoded] = sure
    losses = -preds.gather(1, interp.targs[:, None]).squeeze(1).log()
    return CifarInterpretation(interp.learn, interp.dl, losses, preds, interp.targs)

@pytest.fixture(scope='module')
def interp(run):
    from fastcifar.runs.reopen import evaluate_run
    return evaluate_run(run, device='cpu', bars=False)

@pytest.fixture
def page_of(run, interp, monkeypatch, tmp_path):
    "Writes the page of the run with other predictions; returns its text in one line"
    import fastcifar.runs.reopen as reopen
    def write(decoded, sure=.9, **metrics):
        out = tmp_path/'run'
        shutil.copytree(run, out)
        changed = with_predictions(interp, decoded, sure)
        wrong = int((decoded != interp.targs).sum())
        about = dict(wrong=wrong, test_accuracy=1 - wrong / 300)
        (out/'metrics.json').write_text(json.dumps(json.loads((out/'metrics.json').read_text()) | about | metrics))
        monkeypatch.setattr(reopen, 'evaluate_run', lambda *_: changed)
        return re.sub(r'\s+', ' ', reopen.report_run(out, device='cpu', bars=False).read_text())
    return write

def mistakes_in(page): return page[page.index('id="mistakes"'):page.index('id="classes"')]

def test_only_mistakes_are_shown_as_mistakes(page_of, interp):
    "Three wrong predictions, and twelve places for them"
    decoded = interp.targs.clone()
    decoded[:3] = (decoded[:3] + 1) % 10
    part = mistakes_in(page_of(decoded))
    caption = r'<figcaption>(\d) -&gt; <span class="(\w+)">(\d)</span> <span class="whole">\((\d+)%\)</span>'
    said = re.findall(caption, part)
    wrong = [(str(t), 'bad', str(d), '90') for t, d in zip(interp.targs[:3].tolist(), decoded[:3].tolist())]
    assert sorted(said[:3]) == sorted(said[3:6]) == sorted(wrong), 'the largest losses, then the surest'
    assert '3 of 300 test images' in part

def test_page_of_a_net_without_mistakes(page_of, interp):
    part = mistakes_in(page_of(interp.targs))
    assert '0 of 300 test images are classified wrongly.' in part and '<figcaption>' not in part
    assert 'No label is suspected' in part and 'largest losses' not in part

def test_labels_are_left_to_nets_that_can_be_believed(page_of, interp):
    "Half of the predictions wrong, all of them as sure: whatever differs from a label says nothing about it"
    decoded = interp.targs.clone()
    decoded[::2] = (decoded[::2] + 1) % 10
    part = mistakes_in(page_of(decoded))
    assert 'Label errors are left out: the accuracy is 50%' in part and 'Below each, label' not in part

@pytest.mark.parametrize('right,guessed', ((30, True), (60, False)))
def test_page_of_a_net_at_chance(page_of, interp, right, guessed):
    "30 of 300 is one of ten"
    decoded = (interp.targs + 1) % 10
    decoded[:right] = interp.targs[:right]
    said = 'at chance: no better than guessing among 10 classes (10%)'
    assert (said in page_of(decoded)) == guessed

def rows_of(page, caption):
    "A table of a page as a dictionary"
    table = page[page.index(f'<caption>{caption}</caption>'):]
    return dict(re.findall(r'<tr><td>(.*?)</td><td>(.*?)</td></tr>', re.sub(r'\s+', ' ', table[:table.index('</table>')])))

def test_configuration_is_that_of_the_training(run):
    "Rates, decay and policy as used; defaults are folded, and nothing is lost"
    import dataclasses
    from fastcifar.runs.settings import Config
    from fastcifar.train.schedule import LRRange, one_cycle
    page, m = (run/'report.html').read_text(), json.loads((run/'metrics.json').read_text())
    used, rest = rows_of(page, 'Configuration, as used'), rows_of(page, 'Other settings')
    assert used['lr_max'] == f'{m["lr_max"]:.4g} (range test)' and used['lr_min'] == f'{m["lr_min"]:.4g} (range test)'
    assert used['wd'] == f'{one_cycle(LRRange(m["lr_min"], m["lr_max"]))["wd"]:.4g}'
    assert used['policy'] == 'crop' and json.loads((run/'config.json').read_text())['policy'] is None
    assert used['precision'] == m['precision'] != 'auto'
    assert (used['epochs'], used['decay'], used['seed']) == ('3', 'decoupled', '0')
    assert {'gamma', 'ns_steps', 'l1', 'ema', 'freeze'} <= set(rest) and not set(used) & set(rest)
    assert {*used, *rest} == {f.name for f in dataclasses.fields(Config)}
    folded = page[:page.index('<caption>Other settings')]
    assert folded.count('<details>') == folded.count('</details>') + 1

def test_report_is_one_file_under_three_megabytes(run):
    text = (run/'report.html').read_text()
    assert len(text.encode()) < 3e6
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and '@import' not in text
    assert 'url(' not in re.sub(r'url\(#[\w-]+\)', '', text)

def test_tables_sort_by_mouse_and_keyboard(run, visit):
    page = visit((run/'report.html').as_uri())
    table = page.locator('table', has=page.locator('caption', has_text='Accuracy of each class')).first
    column = lambda i: table.locator(f'tbody tr td:nth-child({i})').all_inner_texts()
    shares = lambda: [float(t.rstrip('%')) for t in column(4)]
    table.get_by_role('button', name='accuracy').click()
    assert shares() == sorted(shares()) and table.locator('th[aria-sort=ascending]').inner_text().startswith('accuracy')
    table.get_by_role('button', name='accuracy').focus()
    page.keyboard.press('Enter')
    assert shares() == sorted(shares(), reverse=True)
    table.get_by_role('button', name='class').click()
    assert column(1) == sorted(column(1))
    assert page.faults == []

def test_pictures_enlarge_and_close(run, visit):
    page = visit((run/'report.html').as_uri(), 390)
    small = page.locator('.zoom').first
    small.focus()
    page.keyboard.press('Enter')
    big = page.locator('dialog img')
    assert big.is_visible() and big.bounding_box()['width'] > 2 * small.bounding_box()['width']
    page.keyboard.press('Escape')
    assert not big.is_visible()
    page.locator('.plot').first.click()
    assert page.locator('dialog svg').is_visible()
    page.get_by_role('button', name='Close').click()
    assert not page.locator('dialog').is_visible()
    assert page.faults == []

def test_report_command_writes_the_same_page_again(run, main):
    before = (run/'report.html').read_text()
    (run/'report.html').unlink()
    code, out, err = main('report', run)
    assert code == 0 and out.strip() == f'to read: {run}/report.html'
    but_field = lambda page: re.sub(r'<image.*?/>', '', page, flags=re.S) # a gradient may differ in its last bits
    assert but_field((run/'report.html').read_text()) == but_field(before)
    code, out, err = main('report', run.parent)
    assert code == 2 and len(err.splitlines()) == 1 and 'no config.json' in err
    damaged = run/'history.csv'
    kept = damaged.read_text()
    try:
        damaged.write_text('no table')
        code, out, err = main('report', run)
        assert code == 2 and len(err.splitlines()) == 1 and 'damaged' in err
    finally: damaged.write_text(kept)

def test_evaluate_draws_into_a_folder(run, main, tmp_path):
    code, out, err = main('evaluate', run, '--plots', tmp_path/'plots', '--layer', 'features.5', '--robustness', 30)
    assert code == 0, err
    pictures = ('misclassified', 'predictions', 'class_accuracy', 'calibration', 'grad_cam', 'label_errors',
                'confusion_matrix', 'top_losses', 'robustness')
    tables = ('wrong_predictions', 'class_accuracy', 'robustness')
    made = {f'{n}.png' for n in pictures} | {f'{n}.csv' for n in tables}
    assert {p.name for p in (tmp_path/'plots').iterdir()} == made
    t = pd.read_csv(tmp_path/'plots/robustness.csv')
    assert len(t) == 36 and (t.images == 30).all() and t.low.between(0, 1).all()
    code, out, err = main('evaluate', run, '--plots', tmp_path/'plots', '--layer', 'features.55')
    assert code == 2 and len(err.splitlines()) == 1 and 'features.55' in err
    (tmp_path/'file').touch()
    code, out, err = main('evaluate', run, '--plots', tmp_path/'file/plots')
    assert code == 2 and len(err.splitlines()) == 1 and 'cannot write' in err

def test_one_pass_of_inference_for_everything(run):
    from fastcifar.interpret.interpretation import CifarInterpretation
    from fastcifar.runs.artifacts import draw_interpretation
    from fastcifar.runs.reopen import load_run
    learn = load_run(run, device='cpu')
    seen = []
    learn.model.register_forward_hook(lambda m, a, out: seen.append(len(a[0])))
    with learn.no_bar():
        interp = CifarInterpretation.from_learner(learn)
        assert sum(seen) == 300
        draw_interpretation(interp, run.parent/'drawn')
        interp.most_confused(); interp.label_errors(); interp.calibration(); interp.wrong(); interp.class_accuracy()
    # ten images twice for their Grad-CAMs, after one each to see the sizes of the maps
    assert sum(seen) <= 300 + 2 * (10 + 1)

def test_interpretation_of_a_plain_fastai_learner(tree, tmp_path):
    from fastai.vision.all import CrossEntropyLossFlat, ImageDataLoaders, Learner, Normalize, Resize, accuracy
    from fastai.vision.all import imagenet_stats
    from fastcifar.interpret.interpretation import CifarInterpretation
    from fastcifar.models.zoo import create_model
    from fastcifar.interpret.corruptions import robustness
    from fastcifar.runs.artifacts import draw_interpretation
    tfms = dict(item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = ImageDataLoaders.from_folder(tree, train='train', valid='test', bs=16, num_workers=0, device='cpu', **tfms)
    learn = Learner(dls, create_model('normnet31k', n_out=3), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 1e-2)
        interp = CifarInterpretation.from_learner(learn)
        assert interp.accuracy == pytest.approx(float(learn.recorder.values[-1][-1]))
        for i in (0, 9, 23):
            image = np.asarray(Image.open(dls.valid.items[i]))
            assert np.abs(interp.images([i])[0].astype(int) - image).max() <= 1 # fastai cuts off where it decodes
        draw_interpretation(interp, tmp_path/'plots')
        t = robustness(interp, n=12, names=['blur'], severities=(1, 5))
    assert len(list((tmp_path/'plots').glob('*.png'))) == 8 and t.right.iloc[0] <= 12

def test_study_report(main, visit, tmp_path):
    grid = '--data digits --models normnet31k --norms bn,gn --recipes fast --epochs 1 --seeds 2 --lr-max 1e-2 --jobs 1'
    code, out, err = main('compare', *grid.split(), '--out', tmp_path/'study')
    assert code == 0, err
    page = visit((tmp_path/'study/report.html').as_uri(), 390)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    captions = '[...document.querySelectorAll("caption")].every(c => c.getBoundingClientRect().right <= innerWidth)'
    assert page.evaluate(captions), 'of a table that scrolls, too'
    assert page.locator('h2').all_inner_texts() == ['Answer', 'Differences', 'Summary', 'Curves', 'Runs']
    assert page.locator('#runs ~ div tbody tr').count() == 4
    assert 'tta none' in page.locator('#runs + p').inner_text() and 'seed' not in page.locator('#runs + p').inner_text()
    assert visit((tmp_path/'study/report.html').as_uri(), 1280).evaluate(WIDER) == []
    assert axe(page) == []
    assert page.faults == []
    page.locator('#runs ~ div tbody a').first.click()
    assert page.locator('.headline strong').is_visible()
    before = (tmp_path/'study/report.html').read_text()
    (tmp_path/'study/report.html').unlink()
    code, out, err = main('report', tmp_path/'study')
    assert code == 0 and (tmp_path/'study/report.html').read_text() == before

def test_study_of_nets_that_learned_nothing(main, tmp_path):
    "The answer says so first: in the terminal, in answer.txt and on the page"
    grid = '--data digits --models normnet31k,normnet41k --norms bn --recipes fast --epochs 1 --seeds 1 --jobs 1'
    code, out, err = main('compare', *grid.split(), '--lr-max', '1e-7', '--no-pictures', '--out', tmp_path/'study')
    assert code == 0, err
    said = 'at chance (the only run): no better than guessing among 10 classes (10%)'
    lines = [line for line in (tmp_path/'study/answer.txt').read_text().splitlines()]
    assert [said in line for line in lines] == [True, True, False]
    printed = ' '.join(out.split()) # a terminal breaks lines
    assert printed.count(said) == 2 and (tmp_path/'study/report.html').read_text().count(said) == 2
