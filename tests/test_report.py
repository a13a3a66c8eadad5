"report.html of runs and studies, in a browser, and interpretation of any learner."
import json, re

import numpy as np
import pandas as pd
import pytest
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
    assert page.locator('h2').all_inner_texts() == ['Answer', 'Differences', 'Summary', 'Curves', 'Runs']
    assert page.locator('#runs ~ div tbody tr').count() == 4
    assert axe(page) == []
    assert page.faults == []
    page.locator('#runs ~ div tbody a').first.click()
    assert page.locator('.headline strong').is_visible()
    before = (tmp_path/'study/report.html').read_text()
    (tmp_path/'study/report.html').unlink()
    code, out, err = main('report', tmp_path/'study')
    assert code == 0 and (tmp_path/'study/report.html').read_text() == before
