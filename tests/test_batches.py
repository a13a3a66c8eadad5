"The batches of every path, epoch and process, and what becomes of images on their way."
import shutil

import albumentations as A
import numpy as np
import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.vision.augment import Resize
from PIL import Image

from fastcifar.basics import FastcifarError
from fastcifar.data.load import Arrays
from fastcifar.data.images import ImageData
from fastcifar.data.loaders import ArrayDL, BatchDL, CifarDataLoaders, KeyedDL, ReadLabel, make_resident

@pytest.fixture(scope='module')
def data():
    "Images of noise, no two alike; 22 to train on and 10 to test on"
    x = {s: np.random.default_rng(i).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        for i, (s, n) in enumerate((('train', 22), ('test', 10)))}
    return ImageData(Arrays(x, {s: np.arange(len(v)) % 4 for s, v in x.items()}, list('abcd')), 'noise')

def labels(dl): return [y.tolist() for _, y in dl]

@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('drop_last', [True, False])
def test_processes_share_every_batch(data, world, drop_last):
    "Each image once, in the batch that it is in without them; weights make up for parts of unequal size"
    def made(): return data.dataloaders(bs=6, policy='none', device='cpu', drop_last=drop_last).train
    whole, parts = labels(made()), []
    for rank in range(world):
        dl = made()
        dl.share(rank, world)
        assert dl.bs == 6 // world and len(dl) == len(whole)
        if rank == 0: assert not drop_last or len(dl) == 3
        parts.append([dl.get_idxs(), [dl.shard_weight(i) for i in range(len(dl))], labels(dl)])
        dl.share()
        assert labels(dl) and (dl.bs, dl.rank, dl.world) == (6, 0, 1)
    assert len(whole) == (3 if drop_last else 4)
    for i, batch in enumerate(whole):
        mine = [p[2][i] for p in parts]
        assert sorted(y for part in mine for y in part) == sorted(batch)
        assert all(part == batch[rank::world] for rank, part in enumerate(mine))
        share = [len(part) * world / len(batch) for part in mine]
        assert [p[1][i] for p in parts] == pytest.approx(share) and sum(share) == pytest.approx(world)
    with pytest.raises(FastcifarError, match='choose a batch size that 4 divides'): made().share(0, 4)

def test_a_process_without_an_image_borrows_one(data):
    "And gives it no weight; where nothing is trained it has none"
    dls = data.dataloaders(bs=7, policy='none', device='cpu') # 22 images: the fourth batch has one
    for rank in range(7):
        dl, valid = dls.train.new(), dls.evaluation(0)
        dl.share(rank, 7), valid.share(rank, 7)
        ys = labels(dl)
        assert [len(y) for y in ys] == [1] * 4 and dl.shard_weight(3) == (7 if rank == 0 else 0)
        assert [len(y) for y in labels(valid)] == [1] * (4 if rank == 0 else 3)
        assert rank == 0 or ys[3][0] in range(4)

def test_a_process_borrows_one_image_of_several(data):
    dl = data.dataloaders(bs=10, policy='none', device='cpu').train # 22 images: the third batch has two
    dl.share(3, 5)
    assert [len(y) for y in labels(dl)] == [2, 2, 1] and dl.shard_weight(2) == 0

@pytest.mark.parametrize('step', [A.Resize(16, 16), A.ToFloat()])
def test_a_pipeline_gives_images_of_bytes(data, step):
    "In the size that they had"
    dl = data.dataloaders(bs=8, policy=A.Compose([step]), device='cpu', tfms='item').train
    with pytest.raises(FastcifarError, match='it has to give uint8'): next(iter(dl))

def images(dl): return torch.cat([x for x, _ in dl])

def test_augmentation_of_whole_batches_goes_by_epoch(data):
    "The pixels of each image in each epoch, whatever the order: a policy that moves nothing away keeps them apart"
    dl = data.dataloaders(8, 'small_crop_flip', seed=0, device='cpu', tfms='batch').train
    again = data.dataloaders(8, 'small_crop_flip', seed=0, device='cpu', tfms='batch').train
    def sums(dl): return sorted(x.double().sum().item() for batch, _ in dl for x in batch)
    epochs = [sums(dl) for _ in range(3)]
    assert [sums(again) for _ in range(3)] == epochs
    assert all(a != b for a, b in zip(epochs, epochs[1:])) and epochs[0] != epochs[2]

def test_augmentation_goes_by_seed_and_epoch_on_every_way(data):
    "Through the items of fastai, through arrays, and after another item transform"
    def made(seed=0): return data.dataloaders(8, 'small_crop_flip', seed=seed, device='cpu', tfms='item').train
    arrays, items = made(), made()
    items._rows = lambda: None # forbids the short way
    epochs = [images(arrays) for _ in range(3)]
    for e in epochs: assert torch.equal(images(items), e)
    assert arrays.epoch == 2 and len({float(e.sum()) for e in epochs}) == 3
    other = made(seed=1)
    assert not torch.equal(images(other), epochs[0])
    again = made()
    assert torch.equal(again.one_batch()[0], epochs[0][:8]) and again.epoch == -1, 'looking does not count'
    assert torch.equal(images(again), epochs[0])
    later = arrays.new(epoch=0)
    assert torch.equal(images(later), epochs[1]) and later.seed == 0

def test_an_epoch_can_begin_in_the_middle(data):
    "Once; the next one is whole again"
    dl = data.dataloaders(bs=8, policy='none', device='cpu').train
    whole = [labels(dl) for _ in range(2)]
    dl = dl.new(epoch=-1)
    dl.first_batch = 2
    assert labels(dl) == whole[0][2:] and labels(dl) == whole[1]

def test_evaluation_in_order(data):
    "All images of any loader, without augmentation, though training shuffles, augments and drops some"
    dls = data.dataloaders(bs=8, policy='crop_flip_cutout', device='cpu', valid=4, drop_last=True)
    assert [len(dl) for dl in dls.loaders] == [2, 1, 2]
    for i in range(3):
        dl = dls.evaluation(i)
        wanted = [int(np.concatenate([data.y['train'], data.y['test']])[k]) for k in dls[i].items]
        assert sum(labels(dl), []) == wanted and torch.equal(images(dl), images(dl))
        few = dls.evaluation(i, 3)
        assert sum(labels(few), []) == [wanted[k] for k in np.linspace(0, len(wanted) - 1, 3).round().astype(int)]
    x = torch.from_numpy(data.x['train'][dls.train.items[0]] / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in dls.stats)
    assert torch.allclose(next(iter(dls.evaluation(0)))[0][0].double(), (x - mean) / std, atol=1e-5)

@pytest.mark.parametrize('tfms', ['item', 'batch'])
def test_normalized_once_and_back(data, tfms):
    "By the path's own arithmetic, by fastai's after another transform, and back into images"
    mean, std = [.1, .2, .3], [.5, 1., 2.]
    dls = data.dataloaders(bs=10, policy='none', device='cpu', tfms=tfms, stats=(mean, std))
    assert isinstance(dls.train, BatchDL if tfms == 'batch' else ArrayDL) and dls.tfms == tfms
    x, y = next(iter(dls.valid))
    pixels = torch.from_numpy(data.x['test']).permute(0, 3, 1, 2) / 255
    wanted = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(x.as_subclass(torch.Tensor), wanted, atol=1e-5) and y.tolist() == data.y['test'].tolist()
    back = dls.valid.after_batch.decode((x,))[0]
    assert torch.allclose(back.as_subclass(torch.Tensor), pixels, atol=1e-5) and 0 <= back.min() and back.max() <= 1
    beyond = dls.valid.after_batch.decode((x.clone() * 3 - 1,))[0]
    assert beyond.min() == 0 and beyond.max() == 1, 'a picture has no other numbers'
    dls.add_tfms([Resize(16)], 'after_item')
    small = dls.valid.one_batch()[0]
    assert small.shape[-1] == 16 and abs(float(small[:, 2].mean()) - float(wanted[:, 2].mean())) < .05

def test_policies_come_before_other_transforms(data):
    "A policy is made for 32x32; images are read before all"
    dls = data.dataloaders(bs=8, policy='flip', device='cpu', tfms='item')
    dls.add_tfms([Resize(40)], 'after_item')
    kinds = [type(t).__name__ for t in dls.train.after_item.fs]
    assert kinds.index('AlbumentationsTransform') < kinds.index('Resize') and dls.one_batch()[0].shape[-1] == 40
    assert [type(t).__name__ for t in dls.train.dataset.tls[0].tfms.fs][0] == 'ReadImage'
    seen = []
    class First(Resize):
        order = 0
        def encodes(self, o):
            seen.append(type(o).__name__)
            return o
    ds = data.dataloaders(bs=8, policy='none', device='cpu', tfms='item').train.dataset
    ds.tls[0].tfms.add([First(32)])
    assert ds[0][0].size == (32, 32) and seen == ['PILImage']

def test_images_of_other_kinds(data, tmp_path):
    "Grey, transparent, large, as arrays and tensors; what is no image is named"
    dls = data.dataloaders(bs=8, policy='flip', device='cpu')
    grey = Image.fromarray(np.full((50, 40), 100, np.uint8))
    clear = Image.fromarray(np.zeros((32, 32, 4), np.uint8), 'RGBA')
    dl = dls.test_dl([grey, clear, data.x['test'][3], torch.from_numpy(data.x['test'][3]), 22 + 3])
    x, = dl.one_batch()
    shown = (dl.after_batch.decode((x,))[0] * 255).round().permute(0, 2, 3, 1)
    assert torch.all(shown[0] == 100) and torch.all(shown[1] == 255) and len(x) == 5, 'transparency lies over white'
    third = torch.from_numpy(data.x['test'][3]).float()
    for i in (2, 3, 4): assert torch.equal(shown[i].as_subclass(torch.Tensor), third)
    for bad in (np.zeros((32, 32, 3)), np.zeros((32, 32), np.uint8), np.zeros((32, 32, 4), np.uint8)):
        with pytest.raises(FastcifarError, match='give uint8 of shape'): dls.test_dl([bad]).one_batch()
    arrays = data.dataloaders(bs=8, policy='flip', device='cpu', tfms='item')
    with pytest.raises(FastcifarError, match='there is no image 32, noise'): arrays.test_dl([32]).one_batch()

def test_labels_of_other_images(data, tmp_path):
    "From the folder a file lies in; those of the data set by their row number"
    dls, files = data.dataloaders(bs=8, policy='flip', device='cpu'), []
    for name in 'cab':
        (tmp_path/name).mkdir()
        files.append(tmp_path/name/'x.png')
        Image.fromarray(data.x['test'][0]).save(files[-1])
    (tmp_path/'zebra').mkdir()
    shutil.copy(files[0], tmp_path/'zebra/x.png')
    def said(items): return dls.test_dl(items, with_labels=True).one_batch()[1].tolist()
    assert said(files) == said(list(map(str, files))) == [2, 0, 1] and said([22 + 3, 1]) == [3, 1]
    with pytest.raises(FastcifarError, match="its folder 'zebra' is no class"): said([str(tmp_path/'zebra/x.png')])
    with pytest.raises(FastcifarError, match='a Image has no label'): said([Image.open(files[0]).convert('RGB')])
    label = next(t for t in dls.train.dataset.tls[1].tfms.fs if isinstance(t, ReadLabel))
    assert label.encodes('c') == 'c' and label.encodes(np.int64(2)) == 'c', 'a class stays what it is'

def test_emptied_loaders_hold_nothing(data):
    "Not on a device either, and classes of classes only where there were some"
    dls = data.dataloaders(bs=8, policy='flip', device='cpu')
    images(dls.train)
    assert data.resident
    empty = dls.new_empty()
    d = empty.data
    assert not d.resident and d is not data and d.folder is None
    assert [len(v) for v in (*d.x.values(), *d.y.values())] == [0] * 4 and len(data.x['train']) == 22
    assert d.classes == data.classes and d.coarse is None and d.x['train'].shape == (0, 32, 32, 3)
    assert empty.test_dl([data.x['test'][0]]).one_batch()[0].shape == (1, 3, 32, 32)
    assert (empty.seed, empty.stats, empty.tfms) == (dls.seed, dls.stats, dls.tfms)
    with_coarse = ImageData(Arrays(data.x, data.y, data.classes), 'noise')
    with_coarse.coarse = data.y
    empty = with_coarse.dataloaders(bs=8, device='cpu').new_empty().data
    assert {s: len(v) for s, v in empty.coarse.items()} == dict(train=0, test=0)

def test_images_are_put_on_a_device_once(data):
    (x, y), again = make_resident(data, 'cpu'), make_resident(data, torch.device('cpu'))
    assert again[0] is x and again[1] is y and x.shape == (32, 1089)
    assert y.tolist() == [*data.y['train'], *data.y['test']]

def test_only_the_training_split_is_augmented(data):
    "By each path; another policy's loader does without the first one's batch form"
    for tfms in ('item', 'batch'):
        dls = data.dataloaders(bs=10, policy='crop_flip_cutout', device='cpu', tfms=tfms)
        plain = data.dataloaders(bs=10, policy='none', device='cpu', tfms=tfms)
        assert torch.equal(images(dls.valid), images(plain.valid))
        assert not torch.equal(images(dls.train), images(plain.train))
        unaugmented = dls.train.new(after_item=plain.train.after_item)
        assert torch.allclose(images(unaugmented).sort(0)[0], images(plain.train.new()).sort(0)[0], atol=1e-5)

def test_loaders_without_a_length():
    "What fastai makes of streams stays as it is"
    class Stream:
        def __iter__(self): return iter([torch.tensor([i]) for i in range(5)])
    ours, theirs = ([b.flatten().tolist() for b in made(Stream(), bs=2)] for made in (KeyedDL, TfmdDL))
    assert ours == theirs
    one = KeyedDL([torch.tensor([i]) for i in range(3)], bs=None)
    assert one.whole == 1 and len(list(one)) == 3
