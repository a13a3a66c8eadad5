"Splits and labels that are not what they seem, and files that are no data set: read as meant, or refused in a line."
import gzip, io, os, pickle, shutil, tarfile, tracemalloc, warnings, zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from fastcifar.data.formats import read_images
from fastcifar.basics import FastcifarError
from fastcifar.data.load import load_data
from fastcifar.data.images import stratified_holdout

FORMS = 'folder', 'gztar', 'zip'
CLASSES = 'cat', 'dog', 'emu'

def picture(seed):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f, 'PNG')
    return f.getvalue()

def tree_of(split_classes, n=2):
    "Names below a folder -> bytes, `n` pictures in each of `split_classes`, all of them different"
    return {f'{place}/{i}.png': picture(n * k + i) for k, place in enumerate(split_classes) for i in range(n)}

def pair(train='train', test='test', classes=CLASSES): return [f'{s}/{c}' for s in (train, test) for c in classes]

def packed(folder, files, form, empty=()):
    "A folder or an archive that holds `files` and the folders `empty`"
    for name in empty: (folder/'data'/name).mkdir(parents=True)
    for name, data in files.items():
        (folder/'data'/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/'data'/name).write_bytes(data)
    return folder/'data' if form == 'folder' else Path(shutil.make_archive(str(folder/'packed'), form, folder/'data'))

def official(seed):
    "CIFAR-10 in its python form, with one image of each class in every batch"
    x = np.random.default_rng(seed).integers(0, 256, (10, 3072), dtype=np.uint8)
    names = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
    return {n: pickle.dumps({b'data': x + i, b'labels': list(range(10))}, 2) for i, n in enumerate(names)}

def below(folder, files): return {f'{folder}/{name}': data for name, data in files.items()}

TEN = {k: v for i in range(10) for k, v in below(f'f{i}', tree_of(pair(), 1)).items()}
PY = 'cifar-10-batches-py'
SEVERAL = {
    'folds': (below('fold1', tree_of(pair())) | below('fold2', tree_of(pair())), '2 data sets, in fold1, fold2'),
    'an old copy': (tree_of(pair()) | below('old', tree_of(pair())), '2 data sets, in its top folder, old'),
    'ten folds': (TEN, '10 data sets, in f0, f1, f2, f3, f4 and 5 more'),
    'half a copy': (tree_of(pair()) | below('more', tree_of(['train/cat'])), '2 data sets, in its top folder, more'),
    'official twice': (below(PY, official(0)) | below('copy', official(1)), f'2 data sets, in {PY}, copy'),
    'official and own': (below(PY, official(0)) | below('own', tree_of(pair())), f'2 data sets, in {PY}, own')}

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('what', SEVERAL)
def test_several_sets_are_not_merged(tmp_path, what, form):
    files, said = SEVERAL[what]
    source = packed(tmp_path, files, form)
    with pytest.raises(FastcifarError, match=said) as e: load_data(source)
    if form != 'folder': assert 'make an archive of one of them' in str(e.value)
    elif what == 'folds':
        assert f'give one of them, such as {source}/fold1' in str(e.value)
        assert load_data(source/'fold1').counts().values.tolist() == [[2, 2]] * 3

def test_one_set_may_lie_anywhere(tmp_path):
    "Its parts may even lie apart, and what is neither train nor test does not matter"
    files = below('a', tree_of(pair())) | below('b/val', tree_of(CLASSES))
    files = {k.replace('a/test', 'b/test'): v for k, v in files.items()}
    assert load_data(packed(tmp_path, files, 'folder')).counts().values.tolist() == [[2, 2]] * 3

@pytest.mark.parametrize('train, test', [('train/images', 'test/images'), ('train/images', 'test'), ('train', 'test/x'),
                                         ('train/train', 'test/test'), ('set/train/a/b', 'set/test/c')])
@pytest.mark.parametrize('form', FORMS)
def test_a_folder_around_the_classes(tmp_path, train, test, form):
    files = tree_of(pair(train, test))
    data = load_data(packed(tmp_path, files, form))
    assert data.classes == list(CLASSES) and data.counts().values.tolist() == [[2, 2]] * 3
    first = np.asarray(Image.open(io.BytesIO(files[f'{train}/dog/0.png'])))
    assert (data.x['train'][2] == first).all()

def test_folders_inside_classes_are_no_classes(tmp_path):
    files = tree_of([f'{p}/{i}' for p in pair() for i in ('images', 'more')], 1)
    data = load_data(packed(tmp_path, files, 'folder'))
    assert data.classes == list(CLASSES) and data.counts().values.tolist() == [[2, 2]] * 3

@pytest.mark.parametrize('inside', ['images', 'cat', 'a/cat'])
def test_one_class_is_refused(tmp_path, inside):
    source = packed(tmp_path, tree_of([f'train/{inside}', f'test/{inside}']), 'folder')
    name = inside.rpartition('/')[2]
    with pytest.raises(FastcifarError, match=f"all images are of one class, '{name}'"): load_data(source)

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('inside', [(), ('.gitkeep',), ('.DS_Store', '.hidden.png')])
def test_an_empty_class_folder_is_named(tmp_path, form, inside):
    files = tree_of(pair()) | {f'{s}/fox/{name}': b'' for s in ('train', 'test') for name in inside}
    source = packed(tmp_path, files, form, empty=['train/fox', 'test/fox'] if not inside else ())
    said = "the class folder 'fox' holds no image: add some, or remove it"
    with pytest.raises(FastcifarError, match=said): load_data(source)

def test_an_empty_class_folder_inside_another(tmp_path):
    files, empty = tree_of(pair('train/images', 'test/images')), ['train/images/fox', 'test/images/fox']
    source = packed(tmp_path, files, 'folder', empty)
    with pytest.raises(FastcifarError, match="class folder 'fox' holds no image"): load_data(source)
    shutil.rmtree(source/'train/images/fox'); shutil.rmtree(source/'test/images/fox')
    (source/'train/.ipynb_checkpoints').mkdir()
    assert load_data(source).classes == list(CLASSES)

@given(st.lists(st.integers(2, 60), min_size=2, max_size=8), st.data())
@settings(max_examples=60, deadline=None)
def test_every_class_is_in_both_parts(counts, data):
    y = np.repeat(np.arange(len(counts)), counts)
    n = data.draw(st.integers(len(counts), len(y) - len(counts)))
    keep, out = stratified_holdout(y, n)
    assert len(out) == n and sorted([*keep, *out]) == list(range(len(y)))
    assert set(y[keep]) == set(y[out]) == set(range(len(counts)))

def test_a_class_of_one_image_and_a_validation_split(tmp_path):
    files = {k: v for k, v in tree_of(pair(), 9).items() if not k.startswith('train/dog') or k.endswith('/0.png')}
    data = load_data(packed(tmp_path, files, 'folder'))
    assert data.dataloaders(bs=4, device='cpu').train.n == 19
    said = "class 'dog' has one image alone"
    with pytest.raises(FastcifarError, match=said): data.dataloaders(bs=4, valid=6, device='cpu')

def load_aloud(source):
    "The data and the lines that were said of them"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        data = load_data(source)
    return data, [str(w.message) for w in said if w.category is UserWarning]

@pytest.mark.parametrize('form', FORMS)
def test_copies_of_test_images(tmp_path, form):
    files = tree_of(pair(), 4)
    files |= {f'train/cat/copy{i}.png': files[f'test/cat/{i}.png'] for i in range(3)}
    files['train/emu/copy.png'] = files['test/dog/1.png']
    source = packed(tmp_path, files, form)
    for _ in range(2): # the second from the cache
        data, said = load_aloud(source)
        assert data.counts().values.tolist() == [[7, 4], [4, 4], [5, 4]]
        (line,) = said
        assert '4 of 12 test images are copies of training images, 1 of them of another class' in line

def test_no_copies_no_word(tree):
    for source in (tree, 'digits'): assert load_aloud(source)[1] == []

@pytest.fixture(scope='module')
def images(): return np.random.default_rng(0).integers(0, 256, (90, 32, 32, 3), dtype=np.uint8)

@given(st.lists(st.integers(0, 2**62), min_size=2, max_size=6, unique=True), st.booleans())
@settings(max_examples=25, deadline=None)
def test_labels_of_any_size(images, numbers, apart):
    numbers = sorted(numbers)
    y = np.array(numbers)[np.arange(90) % len(numbers)]
    tracemalloc.start()
    data, said = load_aloud(((images[:60], y[:60]), (images[60:], y[60:])) if apart else (images, y))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.classes == [str(n) for n in numbers] and peak < 50e6
    assert sum(data.counts().values.tolist(), []).count(0) == 0
    assert bool(said) == (numbers != list(range(len(numbers))))
    if apart: assert [data.classes[i] for i in data.y['test']] == [str(n) for n in y[60:]]

def test_three_and_five(images):
    data, said = load_aloud((images, np.where(np.arange(90) % 2, 3, 5)))
    assert data.classes == ['3', '5'] and data.counts().sum(axis=1).tolist() == [45, 45]
    (line,) = said
    told = 'they become that, and the classes keep the numbers as names'
    assert line == f'arrays: the labels are 3, 5, not 0 to 1: {told}'

@pytest.mark.parametrize('kind', [np.uint8, np.int64, np.float32, bool])
def test_one_hot_labels(images, kind):
    y = np.arange(90) % 5
    plain = load_data((images, y))
    for labels in (np.eye(5)[y].astype(kind), y[:, None]):
        data = load_data((images, labels))
        assert data.classes == plain.classes and all((data.y[s] == plain.y[s]).all() for s in ('train', 'test'))

@pytest.mark.parametrize('labels, said', [
    (np.full((90, 5), .2), 'not one-hot'), (np.ones((90, 5), int), 'not one-hot'),
    (np.zeros((90, 2, 2), int), 'give one number'),
    (np.zeros(90, int), 'of one class'), (np.arange(90), 'has one image alone'), (np.arange(90) % 3 - 1, 'run from -1'),
    (np.arange(90) / 2, 'float64'), ([[0], [1, 2]] * 45, 'no array'), (np.arange(80) % 5, '90 images but 80 labels')])
def test_labels_that_are_none(images, labels, said):
    with pytest.raises(FastcifarError, match=said): load_data((images, labels))

@pytest.mark.parametrize('flat', [(2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize('level', [0, 77, 255])
def test_a_colour_that_does_not_vary(images, flat, level):
    x = images.copy()
    x[..., flat] = level
    data, said = load_aloud((x, np.arange(90) % 3))
    names = ', '.join(('red', 'green', 'blue')[c] for c in flat)
    assert f'arrays: the training images do not vary in {names}, which is centred, and divided by 1' in said
    assert [data.std[c] for c in flat] == [1.] * len(flat) and all(.2 < data.std[c] < .4 for c in {0, 1, 2} - {*flat})
    for tfms in ('item', 'batch'):
        b = data.dataloaders(bs=30, tfms=tfms, policy='none', device='cpu').one_batch()[0]
        assert b.isfinite().all() and b[:, list(flat)].abs().max() < 1e-4
    with pytest.raises(FastcifarError, match='above 0'): data.dataloaders(bs=30, stats=([0.] * 3, [.2, .2, 0.]))

def test_training_without_one_colour(images):
    from fastcifar.models.zoo import create_model
    from fastcifar.train.learner import cifar_learner
    data, _ = load_aloud((images * np.array([1, 1, 0], np.uint8), np.arange(90) % 3))
    learn = cifar_learner(data.dataloaders(bs=25, device='cpu'), create_model('normnet31k', n_out=3), precision='fp32')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    assert np.isfinite(learn.recorder.values[-1]).all()

def test_a_net_for_other_classes(tree):
    from fastai.data.block import DataBlock, RegressionBlock
    from fastai.vision.data import ImageBlock, ImageDataLoaders
    from fastcifar.interpret.interpretation import CifarInterpretation
    from fastcifar.models.zoo import create_model
    from fastcifar.train.learner import cifar_learner
    ours = load_data(tree).dataloaders(bs=20, device='cpu')
    foreign = ImageDataLoaders.from_folder(tree, train='train', valid='test', bs=20, num_workers=0, device='cpu')
    for dls in (ours, foreign):
        for n_out in (2, 10):
            learn = cifar_learner(dls, create_model('normnet31k', n_out=n_out))
            with learn.no_bar(), learn.no_logging():
                for use in (lambda: learn.fit(1), lambda: learn.lr_range(show_plot=False), learn.validate,
                            lambda: CifarInterpretation.from_learner(learn)):
                    said = f'the net gives {n_out} outputs, but the data have 3 classes'
                    with pytest.raises(FastcifarError, match=said): use()
        right = cifar_learner(dls, create_model('normnet31k', n_out=3))
        with right.no_bar(), right.no_logging(): right.fit(1)
    def red(path): return float(path.parent.name == 'red')
    def square(p, y): return ((p.squeeze(-1) - y)**2).mean()
    block = DataBlock((ImageBlock, RegressionBlock(1)), get_items=lambda p: sorted(p.rglob('*.png')), get_y=red)
    dls = block.dataloaders(tree, bs=20, num_workers=0, device='cpu')
    learn = cifar_learner(dls, create_model('normnet31k', n_out=1), metrics=None, loss_func=square)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

OTHERS = {'a.7z': (b"7z\xbc\xaf'\x1c\0\4" + bytes(90), 'a 7z archive'),
          'a.rar': (b'Rar!\x1a\7\1\0' + bytes(90), 'a rar archive'),
          'a.tar.zst': (b'(\xb5/\xfd' + bytes(90), 'compressed by zstd'),
          'a.csv': (b'label,p0\n3,255\n' * 99, 'a text file'),
          'a.tsv': ('\ufefflabel\tp\u00e4\n'.encode() * 99, 'a text file'),
          'a.csv.gz': (gzip.compress(b'1,2,3\n' * 999), 'a text file'),
          'a.zip': (b'\n<!DOCTYPE html><html>' + b'x' * 999, 'a web page'),
          'a.tar.gz': (b'<html><body>404', 'a web page'),
          'a.png': (picture(0), 'one image'),
          'a.npy': (b'\x93NUMPY\1\0' + bytes(90), 'a NumPy array'),
          'a.parquet': (b'PAR1' + bytes(90), 'a Parquet table'),
          'data_batch_1': (official(0)['data_batch_1'], 'a pickle'),
          'a.bin': (bytes(range(256)) * 9, 'neither a tar nor a zip file'),
          'none.zip': (b'', 'empty')}

@pytest.mark.parametrize('name', OTHERS)
def test_files_that_are_no_archives(tmp_path, name):
    data, said = OTHERS[name]
    (tmp_path/name).write_bytes(data)
    with pytest.raises(FastcifarError, match=f'{name} is {said}') as e: load_data(tmp_path/name)
    assert 'damaged' not in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('form', ['gif', 'jpeg', 'bmp', 'webp', 'tiff'])
def test_one_image_is_no_data_set(tmp_path, form):
    Image.new('RGB', (32, 32), 'red').save(tmp_path/'a', form)
    with pytest.raises(FastcifarError, match='a is one image, .* is for `fastcifar predict`'): load_data(tmp_path/'a')

@pytest.mark.parametrize('form', ['gztar', 'bztar', 'xztar', 'tar', 'zip'])
def test_damaged_archives_are_still_damaged(tmp_path, form):
    whole = packed(tmp_path, tree_of(pair()), form)
    data = whole.read_bytes()
    for cut in (60, 700, len(data) // 2):
        whole.write_bytes(data[:cut])
        with pytest.raises(FastcifarError, match='damaged or incomplete'): load_data(whole)

@pytest.mark.parametrize('name', ['BMdata', 'GIF8/x', 'PAR1', '%PDF', 'MATLAB', 'II', 'Rar!'])
def test_a_tar_may_begin_with_any_name(tmp_path, name):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        for n, data in {name: b'x', **tree_of(pair())}.items():
            info = tarfile.TarInfo(n)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    assert load_data(tmp_path/'a.tar').classes == list(CLASSES)

@pytest.mark.parametrize('kind, said', [(tarfile.LNKTYPE, 'a hard link to train/cat/0.png: .*--hard-dereference'),
                                        (tarfile.SYMTYPE, 'a symbolic link to train/cat/0.png: .*--dereference'),
                                        (tarfile.FIFOTYPE, 'a device or a pipe')])
def test_what_a_tar_holds_instead_of_files(tmp_path, kind, said):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        info = tarfile.TarInfo('train/dog/1.png')
        info.type, info.linkname = kind, 'train/cat/0.png'
        t.addfile(info)
    with pytest.raises(FastcifarError, match=f'train/dog/1.png is {said}'): load_data(tmp_path/'a.tar')

def test_links_matter_only_where_they_hide_images(tmp_path):
    (tmp_path/'project/lib').mkdir(parents=True)
    os.symlink('lib', tmp_path/'project/lib64')
    said = 'project holds no train/<class>/<image> files: .*links to folders are not followed'
    with pytest.raises(FastcifarError, match=said): load_data(tmp_path/'project')
    data = packed(tmp_path, tree_of(pair()), 'folder')
    os.symlink(tmp_path/'project', data/'notes')
    assert load_data(data).classes == list(CLASSES)
    os.symlink(data/'train/cat', data/'train/fox')
    with pytest.raises(FastcifarError, match='train/fox is a link to a folder'): read_images(data)
    os.remove(data/'train/fox')
    shutil.move(data/'train', tmp_path/'elsewhere')
    os.symlink(tmp_path/'elsewhere', data/'train')
    with pytest.raises(FastcifarError, match='data/train is a link to a folder'): read_images(data)

def test_a_linked_file_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        info = zipfile.ZipInfo('train/cat/1.png')
        info.external_attr = 0o120777 << 16
        z.writestr(info, b'2.png')
    said = 'train/cat/1.png is a symbolic link: .*--symlinks'
    with pytest.raises(FastcifarError, match=said): load_data(tmp_path/'a.zip')
