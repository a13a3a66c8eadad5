"What a data set is: its images and labels, whatever holds them, wherever they lie"
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import fastcifar.data.cache
import fastcifar.data.load
from fastcifar.data.formats import Arrays, read_images, read_pickle
from fastcifar.basics import file_sha256
from fastcifar.basics import FastcifarError, read_json, write_json
from fastcifar.study.cluster import everywhere
from fastcifar.data.images import content_hash, image_digests, order_hash
from fastcifar.data.load import load_data, place_of
from fastcifar.data.fetch import ARCHIVES
from forms import (NAMES, as_folder, as_tar, as_zip, binary10, pngs, py2_array, py2_batch, py2_dict, py2_list, py2_text,
                   python10, records, small10)

REAL = os.environ.get('FASTCIFAR_DATA') # fixtures hide it from the tests
X, Y = small10()

@pytest.fixture
def known(monkeypatch, tmp_path):
    "The small set is CIFAR-10, its official order with it"
    a = Arrays(X, Y, NAMES)
    (tmp_path/'templates').mkdir()
    ranks = {s: np.argsort(np.argsort(d)).astype(np.uint16) for s, d in image_digests(a).items()}
    np.savez(tmp_path/'templates/order.npz', **ranks)
    monkeypatch.setattr(fastcifar.data.cache, 'files', lambda package: tmp_path)
    monkeypatch.setitem(ARCHIVES, 'cifar10', ARCHIVES['cifar10']._replace(content=content_hash(a), order='order.npz'))

def same(a, b):
    def equal(s): return np.array_equal(a.x[s], b.x[s]) and np.array_equal(a.y[s], b.y[s])
    return a.classes == b.classes and equal('train') and equal('test')

# Official pickles

def test_pickles_of_python_2_cifar10(tmp_path):
    files = python10(X, Y)
    packed, folder = as_tar(tmp_path/'cifar-10-python.tar.gz', files), as_folder(tmp_path/'unpacked', files)
    for path in (packed, folder, folder/'cifar-10-batches-py'):
        assert same(load_data(path), Arrays(X, Y, NAMES)), path

def test_pickles_of_python_2_cifar100(tmp_path):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 2))
    x, coarse = np.random.default_rng(1).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), y // 5
    fine, names = [f'fine {i:02}' for i in range(100)], [f'coarse {i:02}' for i in range(20)]
    meta = py2_dict(dict(fine_label_names=py2_list(fine, py2_text), coarse_label_names=py2_list(names, py2_text)))
    labels = dict(fine_labels=y.tolist(), coarse_labels=coarse.tolist())
    files = {s: py2_batch(x, f'{s} batch 1 of 1', ['f.png'] * 200, **labels) for s in ('train', 'test')}
    d = load_data(as_tar(tmp_path/'c.tgz', {f'cifar-100-python/{n}': b for n, b in (files | dict(meta=meta)).items()}))
    assert same(d, Arrays({'train': x, 'test': x}, {'train': y, 'test': y}, fine))
    assert d.coarse_classes == names and np.array_equal(d.coarse['train'], coarse)
    binary = {f'{s}.bin': records(x, coarse, y) for s in ('train', 'test')}
    binary |= {f'{n}_label_names.txt': '\n'.join(v).encode() for n, v in (('fine', fine), ('coarse', names))}
    assert load_data(as_tar(tmp_path/'b.tgz', binary)).source == d.source

KINDS = [('u1', '|'), *((k, o) for k in ('i2', 'u4', 'i8', 'f4', 'f8') for o in '<>')]

@given(st.sampled_from(KINDS), st.booleans(), st.integers(1, 5), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_arrays_of_python_2(kind, fortran, rows, cols):
    x = np.arange(rows * cols).reshape(rows, cols).astype(kind[1] + kind[0])
    got = read_pickle(py2_dict(dict(data=py2_array(x, *kind, fortran))), 'batch')[b'data']
    assert np.array_equal(got, x) and got.dtype == x.dtype

def test_python_2_objects_are_refused():
    for kind in ('O', 'S3', 'V8', 'nonsense'):
        batch = py2_dict(dict(data=py2_array(np.zeros((1, 1), 'u1'), kind)))
        with pytest.raises(FastcifarError, match='not a plain CIFAR batch'): read_pickle(batch, 'batch')

# What is the same set

@given(st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_content_does_not_depend_on_order(seed):
    rng = np.random.default_rng(seed)
    at, number = {s: rng.permutation(len(v)) for s, v in Y.items()}, rng.permutation(10)
    a = Arrays(X, Y, NAMES)
    y, names = {s: number[Y[s]][i] for s, i in at.items()}, [NAMES[i] for i in np.argsort(number)]
    b = Arrays({s: X[s][i] for s, i in at.items()}, y, names)
    assert content_hash(a) == content_hash(b) and order_hash(a) != order_hash(b)
    s, i = ('train', 'test')[seed % 2], int(rng.integers(20))
    b.x[s][i, 3, 4, 1] ^= 1
    assert content_hash(a) != content_hash(b)
    b.x[s][i, 3, 4, 1] ^= 1
    b.y[s][i] = (b.y[s][i] + 1) % 10
    assert content_hash(a) != content_hash(b)

def test_every_form_is_known(known, tmp_path):
    x, y = {s: v[::-1] for s, v in X.items()}, {s: v[::-1] for s, v in Y.items()}
    forms = dict(binary=binary10(X, Y), python=python10(X, Y), turned=binary10(x, y), png=pngs(X, Y, NAMES))
    forms['renamed'] = {f'a/b/{n}': b for n, b in pngs(X, Y, NAMES, 1).items()}
    for form, files in forms.items():
        packed = as_tar(tmp_path/f'{form}.tgz', files), as_zip(tmp_path/f'{form}.zip', files)
        for path in (as_folder(tmp_path/form, files), *packed):
            d = load_data(path)
            assert d.name == 'cifar10' and d.known_as(ARCHIVES['cifar10'].sha256) and same(d, Arrays(X, Y, NAMES)), path
            assert load_data(path).name == 'cifar10', 'from the cache'
            assert d.order == order_hash(Arrays(X, Y, NAMES))
    assert load_data(tmp_path/'png', convert=True).name == 'cifar10'

def test_one_pixel_or_label_makes_another_set(known, tmp_path):
    x, y = {s: v.copy() for s, v in X.items()}, {s: v.copy() for s, v in Y.items()}
    x['test'][0, 0, 0, 0] ^= 1
    assert load_data(as_tar(tmp_path/'cifar10.tgz', binary10(x, Y))).name == 'cifar10.tgz'
    y['train'][0] = (y['train'][0] + 1) % 10
    d = load_data(as_folder(tmp_path/'cifar10', pngs(X, y, NAMES)))
    assert d.name == './cifar10' and not d.known_as(ARCHIVES['cifar10'].content)

def test_cifar100_is_known_by_its_sums(monkeypatch, tmp_path):
    "Which are all that is published of its content"
    sums = tuple(tuple(int(X[s][..., c].sum(dtype=int)) for c in range(3)) for s in ('train', 'test'))
    monkeypatch.setitem(ARCHIVES, 'cifar100', ARCHIVES['cifar100']._replace(sums=sums, counts=(10, 2), classes=10))
    assert load_data(as_folder(tmp_path/'a', pngs(X, Y, NAMES))).name == 'cifar100'
    x = {s: v.copy() for s, v in X.items()}
    x['test'][0, 0, 0, 0] ^= 1
    assert load_data(as_folder(tmp_path/'b', pngs(x, Y, NAMES))).name == 'b'

def test_published_means_of_cifar100_are_its_sums():
    train, test = ARCHIVES['cifar100'].sums
    means = [.5070751592371323, .48654887331495095, .4409178433670343]
    assert np.abs(np.array(means) * 255 * 50_000 * 1024 - train).max() < 1e-5
    means = [.5088964127604166, .48739301317401956, .44194221124387256]
    assert np.abs(np.array(means) * 255 * 10_000 * 1024 - test).max() < 1e-5

def test_files_that_change_places_are_noticed(tmp_path):
    "Equal sizes, equal times: by bytes, by renaming and by links"
    def grey(v): return b'P6 32 32 255 ' + bytes([v]) * 3072
    def swap_bytes(a, b):
        one, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other); b.write_bytes(one)
    def swap_names(a, b): a.rename(tmp_path/'x'); b.rename(a); (tmp_path/'x').rename(b)
    def swap_links(a, b):
        for i, f in enumerate((a, b)): shutil.copy(f, tmp_path/f'target{i}'); f.unlink()
        a.symlink_to(tmp_path/'target1'); b.symlink_to(tmp_path/'target0')
    for swap in (swap_bytes, swap_names, swap_links):
        files = {f'{c}/{i}.ppm': grey(10 * i + k) for k, c in enumerate('ab') for i in range(3)}
        root = as_folder(tmp_path/swap.__name__, {f'{s}/{n}': b for s in ('train', 'test') for n, b in files.items()})
        a, b, when = root/'train/a/0.ppm', root/'train/b/0.ppm', (1_700_000_000_000_000_000,) * 2
        for f in (a, b): os.utime(f, ns=when)
        was = load_data(root)
        assert sorted(was.x['train'][was.y['train'] == 0][:, 0, 0, 0]) == [0, 10, 20]
        swap(a, b)
        for f in (a, b): os.utime(f, ns=when)
        now = load_data(root)
        assert sorted(now.x['train'][now.y['train'] == 0][:, 0, 0, 0]) == [1, 10, 20] and now.source != was.source, swap

# Names

def test_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch, tree):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tree, tmp_path/'digits')
    with pytest.warns(UserWarning, match='give ./digits'): assert len(load_data('digits').classes) == 10
    for own in ('./digits', Path('digits'), tmp_path/'digits'):
        d = load_data(own)
        assert d.classes == ['blue', 'green', 'red'] and d.name == './digits' and d.source == load_data(tree).source

def test_a_copy_of_other_content_is_no_cifar10(monkeypatch):
    a = Arrays(X, Y, NAMES)
    monkeypatch.setattr(fastcifar.data.load, 'fetch_archive', lambda name, folder: (a, 'f' * 64))
    assert load_data('cifar10').name == 'cifar10-copy'

# Runs

QUICK = ('--model', 'normnet31k', '--norm', 'gn', '--epochs', 2, '--bs', 20, '--lr-max', '1e-2', '--precision', 'fp32',
         '--threads', 1, '--no-pictures')

def turned_names(tree, to):
    "The same images, named the other way round"
    for f in tree.rglob('*.png'):
        (to/f.relative_to(tree).parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to/f.relative_to(tree).with_name(f'{99 - int(f.stem):02}.png'))
    return to

def half(run, to):
    "A run that was stopped after its first epoch"
    shutil.copytree(run, to)
    for f in ('metrics.json', 'model.safetensors', 'history.csv', 'checkpoints/epoch_0002.safetensors'): (to/f).unlink()
    return to

@pytest.fixture
def run(main, tree, tmp_path):
    assert main('train', '--data', tree, *QUICK, '--out', tmp_path/'run')[0] == 0
    return tmp_path/'run'

def test_other_data_of_the_same_name_are_trained_on(main, tree, tmp_path):
    shutil.copytree(tree, tmp_path/'A/images')
    shutil.copytree(tree, tmp_path/'B/images')
    for s in ('train', 'test'): (tmp_path/'B/images'/s/'red').rename(tmp_path/'B/images'/s/'rouge')
    outs = {}
    def train(path):
        code, out, err = main('train', '--data', path, *QUICK)
        assert code == 0, err
        outs.setdefault(path, set()).update(p for p in Path('runs').iterdir() if p not in set().union(*outs.values()))
        return 'is finished' in out
    assert not train('A/images') and not train('B/images'), 'other classes'
    assert train('A/images') and train('B/images')
    shutil.move(tmp_path/'A/images/train/red/00.png', tmp_path/'A/images/train/blue/mended.png')
    assert not train('A/images') and train('A/images'), 'a label was mended'
    (one, two), other = sorted(outs['A/images']), outs['B/images'].pop()
    names = [p.name.split('-')[:2] for p in (one, two, other)]
    assert {n for n, _ in names} == {'images'} and len({h for _, h in names}) == 3
    code, _, err = main('train', '--data', 'B/images', *QUICK, '--out', one)
    assert code == 2 and 'its hash differs' in err and err.count('\n') == 1
    shutil.rmtree(tmp_path/'B')
    assert main('train', '--resume', other)[0] == 0, 'its data are gone, and it is finished'

def test_a_folder_named_digits_is_not_the_digits(main, tree, tmp_path):
    shutil.copytree(tree, tmp_path/'digits')
    with pytest.warns(UserWarning, match='give ./digits'):
        code, out, _ = main('train', '--data', 'digits', *QUICK, '--epochs', 1, '--bs', 500)
    assert code == 0 and 'digits: 1,497 training' in out and len(os.listdir('runs')) == 1
    code, out, _ = main('train', '--data', './digits', *QUICK)
    assert code == 0 and './digits: 60 training' in out and 'is finished' not in out and len(os.listdir('runs')) == 2
    own, = Path('runs').glob('digits-????????-normnet31k*')
    assert read_json(own/'metrics.json')['data'] == './digits'
    code, out, _ = main('train', '--data', './digits', *QUICK)
    assert code == 0 and 'is finished' in out

def test_a_run_knows_its_data_in_other_containers(main, tree, run, tmp_path):
    def numbers(out): return {k: v for k, v in read_json(out/'metrics.json').items() if k not in ('seconds', 'data')}
    forms = [shutil.make_archive(str(tmp_path/kind), kind, tree) for kind in ('gztar', 'zip', 'tar')]
    forms.append(shutil.copytree(tree, tmp_path/'moved'))
    for i, form in enumerate(forms):
        assert 'is finished' in main('train', '--data', form, *QUICK, '--out', run)[1]
        assert main('evaluate', run, '--data', form)[0] == 0
        out = half(run, tmp_path/f'half{i}')
        code, said, err = main('train', '--data', form, *QUICK, '--out', out)
        assert code == 0 and 'continuing after epoch 1' in said, err
        assert numbers(out) == numbers(run)

def test_the_order_of_images_matters_to_an_unfinished_run(main, tree, run, tmp_path):
    other = turned_names(tree, tmp_path/'renamed')
    assert load_data(other).source == load_data(tree).source
    assert 'is finished' in main('train', '--data', other, *QUICK, '--out', run)[1]
    assert main('evaluate', run, '--data', other)[0] == 0
    code, _, err = main('train', '--data', other, *QUICK, '--out', half(run, tmp_path/'half'))
    assert code == 2 and 'in another order' in err and err.count('\n') == 1

def test_cifar10_goes_on_in_another_form(known, main, tmp_path):
    forms = dict(binary=binary10(X, Y), python=python10(X, Y), png=pngs(X, Y, NAMES))
    for name, files in forms.items(): as_folder(tmp_path/name, files)
    assert main('train', '--data', 'png', *QUICK)[0] == 0
    run, = Path('runs').iterdir()
    m = read_json(run/'metrics.json')
    assert run.name.startswith('cifar10-normnet31k') and m['data'] == read_json(run/'config.json')['data'] == 'cifar10'
    for name in forms:
        assert 'is finished' in main('train', '--data', name, *QUICK)[1]
        assert main('train', '--data', name, *QUICK, '--out', half(run, tmp_path/f'half-{name}'))[0] == 0
        assert read_json(tmp_path/f'half-{name}/metrics.json')['test_loss'] == m['test_loss']
    assert 'is finished' in main('train', '--data', 'cifar10', *QUICK)[1] # nothing is downloaded for that

def test_run_folders_of_older_versions_are_read(main, tree, run, tmp_path):
    "Which kept the hash of the archive, or of the arrays in their order; and the name of the folder"
    packed = shutil.make_archive(str(tmp_path/'packed'), 'gztar', tree)
    for i, (form, sha) in enumerate(((tree, order_hash(read_images(tree))), (packed, file_sha256(packed)))):
        old, begun = shutil.copytree(run, tmp_path/f'old{i}'), half(run, tmp_path/f'begun{i}')
        for out in (old, begun):
            c = read_json(out/'config.json')
            del c['data_order']
            write_json(out/'config.json', {**c, 'data': Path(form).name, 'data_sha256': sha})
        assert 'is finished' in main('train', '--data', form, *QUICK, '--out', old)[1]
        assert main('evaluate', old, '--data', form)[0] == 0
        assert main('train', '--data', form, *QUICK, '--out', begun)[0] == 0
        assert read_json(begun/'metrics.json')['test_loss'] == read_json(run/'metrics.json')['test_loss']
    assert load_data('digits').known_as('scikit-learn load_digits')

def test_an_older_run_on_files_of_cifar10_keeps_to_their_order(known, main, tmp_path):
    "Which is no longer the order in which they are read"
    tree = as_folder(tmp_path/'png', pngs(X, Y, NAMES))
    assert main('train', '--data', tree, *QUICK, '--out', 'run')[0] == 0
    c = read_json('run/config.json')
    del c['data_order']
    write_json('run/config.json', {**c, 'data_sha256': order_hash(read_images(tree))})
    assert 'is finished' in main('train', '--data', tree, *QUICK, '--out', 'run')[1]
    code, _, err = main('train', '--data', tree, *QUICK, '--out', half(Path('run'), Path('half')))
    assert code == 2 and 'in another order' in err

def test_a_place_means_the_same_everywhere(tmp_path, monkeypatch):
    "On other machines of a cluster, in the note of a run folder"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'digits').mkdir()
    assert everywhere('digits') == place_of('digits') == 'digits'
    assert everywhere('./digits') == place_of('./digits') == str(tmp_path/'digits')

# The real set

@pytest.fixture
def real():
    if not REAL: pytest.skip('FASTCIFAR_DATA names no CIFAR-10 archive')
    d = load_data(REAL)
    if d.name != 'cifar10': pytest.skip(f'FASTCIFAR_DATA is {d.name}, whose content is not that of the official set')
    return d

def test_real_cifar10(real, tmp_path):
    "In any order, and in pickles of Python 2"
    assert real.source == ARCHIVES['cifar10'].content
    x = {s: np.array(v) for s, v in real.x.items()}
    at = {s: np.random.default_rng(0).permutation(len(v)) for s, v in x.items()}
    mixed = Arrays({s: x[s][i] for s, i in at.items()}, {s: real.y[s][i] for s, i in at.items()}, real.classes)
    a, about = fastcifar.data.cache._identified(mixed, None)
    assert about['known'] == 'cifar10' and about['arranged'] and about['order'] == real.order and same(a, real)
    d = load_data(as_folder(tmp_path, python10(x, real.y)))
    assert d.name == 'cifar10' and d.order == real.order
