"Class names of every kind, from the folder to tables, pictures, pages and predictions."
import io, json, os, re, tarfile, unicodedata, warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image

from fastcifar.data.formats import Arrays
from fastcifar.data.archive import clean_name, clean_names
from fastcifar.basics import FastcifarError
from fastcifar.data.images import ImageData, legible
from fastcifar.data.load import load_data
from fastcifar.data.loaders import CifarDataLoaders
from fastcifar.models.zoo import create_model, load_model, save_model
from fastcifar.share.predict import open_predictor, pixel_net

def picture(seed=0):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f, 'PNG')
    return f.getvalue()

PNG = picture()

def packed(names, path):
    "A tar file with an image of each class in both splits"
    with tarfile.open(path, 'w') as t:
        for s in ('train', 'test'):
            for n in names:
                info = tarfile.TarInfo(f'{s}/{n}/1.png')
                info.size = len(PNG)
                t.addfile(info, io.BytesIO(PNG))
    return path

def folder(names, path, n=1):
    for s in ('train', 'test'):
        for k, name in enumerate(names):
            d = path/s/name
            d.mkdir(parents=True)
            for i in range(n): (d/f'{i}.png').write_bytes(picture([k, i]))
    return path

def quiet(f, *args):
    with warnings.catch_warnings(action='ignore'): return f(*args)

# --- the normal form

# what can be in a name: anything but what parts a path and what hides a file
SPECIAL = [
    '$', '_', '#000000', '\u00a0', '\u200d', '\u200b', '\ufe0f', '\u202e', '\u0301', 'e\u0301', 'é', ' ', '  ', '\n',
    '\t', '\x1b', '\x7f', '\u3164', '\u2800', '犬', '🐱', '\udcff', '\U000e0041', '&', '<b>', '"', "'", '\u00ad', 'ﬁ',
    '\u2028', '\ue000', '\u0378']
PART = st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_characters='/\\\0'))
TEXT = st.lists(PART, min_size=1, max_size=5).map(''.join)
def in_a_tar(name):
    "Can a tar hold a folder of this name? It holds bytes, and half a surrogate pair is none"
    try: return bool(name.encode('utf-8', 'surrogateescape')) and not name.startswith(('.', '__MACOSX'))
    except UnicodeEncodeError: return False

NAMES = st.lists(TEXT.filter(in_a_tar), min_size=2, max_size=3, unique=True)

@given(st.text())
@settings(max_examples=300, deadline=None)
def test_the_normal_form(text):
    try: name = clean_name(text)
    except FastcifarError as e:
        assert 'UTF-8' in str(e) and any('\ud800' <= c <= '\udfff' for c in text)
        return
    assert clean_name(name) == name == unicodedata.normalize('NFC', name) == ' '.join(name.split())
    def hidden(c): return unicodedata.category(c) in ('Cc', 'Cf', 'Cs', 'Zl', 'Zp') or c.isspace() and c != ' '
    assert not [c for c in name if hidden(c)]
    plain = unicodedata.normalize('NFC', text)
    def may_go(c): return not c.isprintable() or c.isspace() or unicodedata.category(c) in ('Mn', 'Lo', 'So', 'Cn')
    assert name == plain or [c for c in plain if may_go(c)]

@given(NAMES)
@example(['US$_5_bill', '$a$_b'])
@example(['red\u00a0apple', 'cat\u200d'])
@example(['new\nline', 'two  blanks'])
@example(['é', 'e\u0301'])
@example(['犬', '👩\u200d🚀'])
@example(['caf\udce9', 'tea'])
@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_what_is_loaded_can_be_predicted(tmp_path_factory, names):
    "Load, write weights as a run does, open them: the same names; or one line that says what is wrong"
    d = tmp_path_factory.mktemp('names')
    try: data = quiet(load_data, packed(names, d/'a.tar'))
    except FastcifarError as e:
        said = str(e)
        assert '\n' not in said and said.encode() and re.search('rename', said)
        texts = [n for n in names if n.encode(errors='ignore') == n.encode(errors='surrogateescape')]
        normal = {clean_name(n) for n in texts}
        assert len(normal) < len(names) or '' in normal
        return
    assert sorted(data.classes) == sorted(map(clean_name, names))
    assert data.classes == json.loads(json.dumps(data.classes))
    again = quiet(load_data, d/'a.tar') # from the cache
    assert again.classes == data.classes and again.source == data.source
    net, file = create_model('normnet31k', n_out=len(names)), d/'model.safetensors'
    save_model(net, file, classes=list(data.classes), mean=data.mean, std=[1.] * 3)
    assert open_predictor(file).classes == data.classes == pixel_net(load_model(file))[1]
    with warnings.catch_warnings(action='error'): assert clean_names(data.classes, 'it') == data.classes

def test_changes_are_told_and_say_where(tmp_path):
    with pytest.warns(UserWarning, match=r"a\.tar.*'red\\xa0apple' is now 'red apple'"):
        load_data(packed(['red\u00a0apple', 'pear'], tmp_path/'a.tar'))
    with warnings.catch_warnings(record=True, action='always') as told:
        load_data(packed(['red apple', 'US$_5_bill', '犬', '#000000'], tmp_path/'b.tar'))
    assert not [w for w in told if 'is now' in str(w.message) or 'left out' in str(w.message)]

@pytest.mark.parametrize('names,said', [
    (['é', 'e\u0301'], "both read 'é'"), (['a  b', 'a b'], "both read 'a b'"),
    (['cat', 'cat\u200b'], "both read 'cat'"), (['\u200d', 'cat'], 'no character that can be seen'),
    (['caf\udce9', 'tea'], 'not valid UTF-8')])
def test_refused_names(names, said, tmp_path, main):
    for data in (packed(names, tmp_path/'a.tar'), folder(names, tmp_path/'f')):
        code, _, err = main('train', '--data', data, '--model', 'normnet31k', '--out', tmp_path/'run')
        assert code == 2 and said in err and 'rename' in err and err.count('\n') == 1 and str(data) in err
    assert not (tmp_path/'run').exists()

def test_a_class_is_one_class_in_both_splits(tmp_path):
    "However each computer wrote its name"
    folder(['tea'], tmp_path)
    for s, name in (('train', 'caf\u00e9'), ('test', 'cafe\u0301')):
        (tmp_path/s/name).mkdir()
        (tmp_path/s/name/'1.png').write_bytes(PNG)
    assert quiet(load_data, tmp_path).classes == ['café', 'tea']

def test_names_of_official_files_and_of_arrays():
    "A carriage return at the end of each line of batches.meta.txt; names that were given in Python"
    from fastcifar.data.formats import check_arrays
    x, y = np.zeros((2, 32, 32, 3), np.uint8), np.arange(2)
    xs, ys = {'train': x, 'test': x}, {'train': y, 'test': y}
    a = Arrays(xs, ys, ['cat\r', 'dog\r'], ys, ['pet\r', 'pet\u00a02'])
    b = quiet(check_arrays, a, 'it')
    assert b.classes == ['cat', 'dog'] and b.coarse_classes == ['pet', 'pet 2']
    with pytest.warns(UserWarning, match='mine'): assert ImageData(a, 'mine').classes == ['cat', 'dog']
    with pytest.raises(FastcifarError, match='is no text'): ImageData(a._replace(classes=[0, 1]), 'mine')

def test_weights_of_older_versions_are_read(tmp_path):
    net, file, stats = create_model('normnet31k', n_out=2), tmp_path/'w.safetensors', dict(mean=[.5] * 3, std=[.2] * 3)
    save_model(net, file, classes=['red\u00a0apple', 'cat\u200d'], **stats)
    assert open_predictor(file).classes == ['red apple', 'cat']
    save_model(net, file, classes=['\u200b', '\udcff'], **stats)
    with pytest.raises(FastcifarError, match='does not say its classes'): open_predictor(file)

@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_a_hidden_class_is_named(kind, tmp_path):
    names = ['.NET', 'Java', 'Rust']
    data = folder(names, tmp_path/'f') if kind == 'folder' else packed(names, tmp_path/'a.tar')
    with pytest.warns(UserWarning, match=r"left out.*hidden: '\.NET' \(2 files\); rename"):
        assert load_data(data).classes == ['Java', 'Rust']

def test_file_names_that_are_not_utf8(tmp_path, main):
    data = folder(['cat', 'dog'], tmp_path/'f')
    odd = os.fsencode(data/'train/cat')+b'/caf\xe9.png'
    with open(odd, 'wb') as f: f.write(PNG)
    assert load_data(data).counts().train.tolist() == [2, 1]
    os.rename(data, os.fsencode(data) + b'\xe9')
    assert load_data(os.fsdecode(os.fsencode(data) + b'\xe9')).name == r'f\udce9'
    os.rename(os.fsencode(data) + b'\xe9', data)
    code, out, _ = main('predict', '--json', '--from', 'groupnet', os.fsdecode(odd))
    assert code == 0 and json.loads(out)[0]['file'] == os.fsdecode(odd)

# --- pictures and pages

HARD = ['US$_5_bill', 'US$_10_bill', '$a$_b', '#000000', 'url(#a', '<b>&', '%s', '犬', '🐱', 'two\u00a0words',
        'cafe\u0301', 'cat\u200d', 'new\nline']

def dataset(names):
    n = len(names)
    x = np.random.default_rng(0).integers(0, 256, (8 * n, 32, 32, 3), dtype=np.uint8)
    y = np.arange(8 * n) % n
    xs, ys = ({'train': a, 'test': a[:4 * n]} for a in (x, y))
    return ImageData(Arrays(xs, ys, quiet(clean_names, names, 'it')), 'it')

@pytest.fixture(scope='module')
def interp():
    from fastcifar.basics import seed_everything
    from fastcifar.interpret.interpretation import CifarInterpretation
    from fastcifar.train.learner import cifar_learner
    seed_everything(0)
    learn = cifar_learner(dataset(HARD).dataloaders(bs=16, device='cpu'), create_model('normnet31k', n_out=len(HARD)))
    with learn.no_bar(), learn.no_logging(): return CifarInterpretation.from_learner(learn)

def texts(fig):
    from matplotlib.text import Text
    fig.draw_without_rendering() # also one that is closed
    return '\n'.join(t.get_text() for t in fig.findobj(Text))

PLOTS = {
    'plot_wrong': lambda i: i.plot_wrong(),
    'plot_predictions': lambda i: i.plot_predictions(40),
    'plot_grad_cam': lambda i: i.plot_grad_cam(n=16),
    'plot_class_accuracy': lambda i: i.plot_class_accuracy(),
    'plot_label_errors': lambda i: i.plot_label_errors(),
    'plot_confusion_matrix': lambda i: i.plot_confusion_matrix(),
    'plot_top_losses': lambda i: i.plot_top_losses(16),
    'show_samples': lambda i: i.learn.dls.data.show_samples(),
    'show_batch': lambda i: i.learn.dls.show_batch(max_n=16),
    'valid.show_batch': lambda i: i.learn.dls.valid.show_batch(max_n=16),
    'show_results': lambda i: i.learn.show_results(max_n=16)}

@pytest.mark.parametrize('name', PLOTS)
def test_every_picture_draws_names_as_they_are(name, interp, monkeypatch):
    "Also two dollar signs in one label; and no box for a character that no font here has"
    import matplotlib.pyplot as plt
    plt.close('all')
    monkeypatch.setattr(type(interp), 'sure_enough', lambda self: 0.) # or an untrained net would suspect no label
    with interp.learn.no_bar(), interp.learn.no_logging(): made = PLOTS[name](interp)
    fig = made if hasattr(made, 'savefig') else plt.gcf()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        shown = texts(fig) # draws: a formula would be an error here
    assert [n for n in HARD[:7] if n in shown] and (name != 'plot_class_accuracy' or all(n in shown for n in HARD[:7]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        legible(fig).savefig(io.BytesIO(), format='png')
        after = texts(fig)
    assert not [str(w.message) for w in told if 'Glyph' in str(w.message)]
    k = HARD.index('犬')
    if '犬' in shown:
        said = str(told[0].message)
        assert f'class {k}' in after and '犬' not in after and 'no installed font' in said and f'犬 is class {k}' in said
    plt.close('all')

def test_other_figures_keep_their_formulas():
    import matplotlib.pyplot as plt
    from fastcifar.train.schedule import LRRange, plot_range
    fig = plot_range(LRRange(1e-4, 1e-2, np.geomspace(1e-6, 1, 50).tolist(), np.linspace(2, 1, 50).tolist()))
    assert r'10^{' in texts(legible(fig)) and plt.rcParams['text.parse_math']
    assert all(t.get_parse_math() for t in fig.axes[0].get_xticklabels())
    plt.close(fig)

def test_a_font_that_has_the_characters_is_used(tmp_path):
    "A font with one Chinese character, made here"
    import matplotlib.pyplot as plt
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager as fm
    pen = TTGlyphPen(None)
    for i, p in enumerate(((0, 0), (0, 700), (700, 700), (700, 0))): (pen.lineTo if i else pen.moveTo)(p)
    pen.closePath()
    b = FontBuilder(1000, isTTF=True)
    b.setupGlyphOrder(['.notdef', 'dog'])
    b.setupCharacterMap({ord('犬'): 'dog'})
    b.setupGlyf({'.notdef': pen.glyph(), 'dog': pen.glyph()})
    b.setupHorizontalMetrics({'.notdef': (800, 0), 'dog': (800, 0)})
    b.setupHorizontalHeader(ascent=800, descent=-200)
    b.setupNameTable(dict(familyName='One Dog Sans', styleName='Regular'))
    b.setupOS2()
    b.setupPost()
    b.save(tmp_path/'dog.ttf')
    before = list(fm.fontManager.ttflist)
    try:
        fm.fontManager.addfont(tmp_path/'dog.ttf')
        fig = dataset(['犬', 'cat']).show_samples()
        with warnings.catch_warnings(action='error'):
            legible(fig).savefig(io.BytesIO(), format='png')
            assert '犬' in texts(fig)
        assert 'One Dog Sans' in fig.axes[0].title.get_family()
        plt.close(fig)
    finally:
        fm.fontManager.ttflist[:] = before
        (fm if hasattr(fm, '_findfont_cached') else fm.fontManager)._findfont_cached.cache_clear()

def test_a_page_keeps_text(interp):
    from fastcifar.runs.report import figure_svg
    svg = figure_svg(interp.plot_class_accuracy(), 'classes')
    for n in ('#000000', 'url(#a', '&lt;b&gt;&amp;', 'US$_5_bill', '$a$_b', '犬', '🐱'):
        assert f'>{n}</text>' in svg, n
    assert '#000000' not in re.sub(r'<text[^>]*>[^<]*</text>', '', svg) and 'currentColor' in svg

def test_a_whole_run(tmp_path, main):
    "Train with pictures, predict, evaluate, write the page again, export: every name arrives"
    data = folder([n.replace('\n', '\x0b') for n in HARD], tmp_path/'f', 2)
    classes = quiet(load_data, data).classes
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        code, _, err = main('train', '--data', data, '--model', 'normnet31k', '--recipe', 'fast', '--epochs', 1,
                            '--bs', 8, '--lr-max', 1e-3, '--threads', 1, '--out', 'run')
    assert code == 0, err
    said = [str(w.message) for w in told]
    assert not [s for s in said if 'Glyph' in s] and [s for s in said if 'no installed font' in s]
    code, out, err = main('predict', '--json', '--top', 99, '--from', 'run', data/'test/犬')
    assert code == 0 and sorted(c for c, _ in json.loads(out)[0]['top']) == sorted(classes), err
    code, out, err = main('evaluate', 'run', '--json', '--plots', 'plots')
    assert code == 0 and list(json.loads(out)['class_accuracy']) == classes, err
    assert (tmp_path/'plots/confusion_matrix.png').stat().st_size > 1000
    code, _, err = main('report', 'run')
    assert code == 0, err
    page = (tmp_path/'run/report.html').read_text(encoding='utf-8')
    assert all(page.count(n.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')) > 3 for n in classes)
    code, _, err = main('export', 'run', '--no-onnx')
    assert code == 0 and json.loads((tmp_path/'run-export/config.json').read_text())['classes'] == classes, err
    assert open_predictor(tmp_path/'run-export').classes == classes
    card = (tmp_path/'run-export/README.md').read_text(encoding='utf-8')
    assert r'US\$\_5\_bill' in card and r'\<b\>\&' in card and '犬' in card
