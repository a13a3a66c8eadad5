"One decoder for every image: loading, `predict`, the demo, calls from Python and a model card see the same picture."
import io, re, struct, sys, types

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from fastcifar.data.formats import BACKGROUND, IMAGE_SUFFIXES, decode_image
from fastcifar.basics import FastcifarError
from fastcifar.data.load import load_data
from fastcifar.share.demo import explain_image
from fastcifar.share.export import model_card
from fastcifar.data.loaders import CifarDataLoaders
from fastcifar.models.zoo import load_model
from fastcifar.share.predict import open_predictor, pixel_net, predict_files

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
GREY[0, :2] = 0, 255
COLOUR = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
ALPHA = np.where(RNG.random((32, 32)) < .5, 0, 255).astype(np.uint8)

# what each EXIF orientation says of the picture as it is stored
TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
         5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
         7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}

def rgb(grey): return np.dstack([grey] * 3)

def over(x, alpha): return np.where(alpha[..., None] > 0, x, np.array(BACKGROUND, np.uint8))

def saved(image, kind, **kw):
    f = io.BytesIO()
    image.save(f, kind, **kw)
    return f.getvalue()

def turned(kind, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    return saved(Image.fromarray(COLOUR), kind, exif=exif, **(dict(lossless=True) if kind == 'WEBP' else {}))

def tiff(x, bits, form):
    "An uncompressed grey TIFF of any type of number: 1 unsigned, 2 signed, 3 float"
    data = np.ascontiguousarray(x).tobytes()
    tags = [(256, 32), (257, 32), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 32), (279, len(data)),
            (339, form)]
    table = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in tags)
    return b'II*\0' + struct.pack('<I', 8 + len(data)) + data + table + bytes(4)

def palette(transparent):
    "Sixteen colours, and which of them cannot be seen"
    p = Image.frombytes('P', (32, 32), (GREY // 16).tobytes())
    colours = COLOUR.reshape(-1, 3)[:16]
    p.putpalette(colours.tobytes())
    return p, over(colours[GREY // 16], np.where(np.isin(GREY // 16, transparent), 0, 255))

def frames(kind):
    first, second = (Image.fromarray(x) for x in (GREY, 255 - GREY))
    return saved(first, kind, save_all=True, append_images=[second], **(dict(lossless=True) if kind == 'WEBP' else {}))

def packed(x):
    "Numbers of 12 bits, two in three bytes"
    a, b = x.reshape(-1, 2).astype(int).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8)

WIDE = GREY.astype(np.uint32)
GREY16 = GREY * np.uint16(257)
OPACITY = bytes(0 if i in (2, 9) else 255 for i in range(16)) # of each colour of a palette; two cannot be seen
CASES = {f'{kind} turned {tag}': (turned(kind, tag), turn(COLOUR))
         for kind in ('PNG', 'TIFF', 'WEBP') for tag, turn in TURNS.items()} | {
    '16-bit PNG': (saved(Image.fromarray(GREY16), 'PNG'), rgb(GREY)),
    '16-bit TIFF': (saved(Image.fromarray(GREY16), 'TIFF'), rgb(GREY)),
    '12-bit TIFF': (tiff(packed(GREY * np.uint16(16) + GREY // 16), 12, 1), rgb(GREY)),
    '16-bit dark PNG': (saved(Image.fromarray((GREY // 2) * np.uint16(257)), 'PNG'), rgb(GREY // 2)),
    '16-bit dark PGM': (saved(Image.fromarray((GREY // 2) * np.uint16(257)), 'PPM'), rgb(GREY // 2)),
    '16-bit PGM': (saved(Image.fromarray(GREY16), 'PPM'), rgb(GREY)),
    '16-bit colour': (None, COLOUR), # made by OpenCV below
    '32-bit TIFF, 8 bits used': (tiff(WIDE.astype(np.int32), 32, 2), rgb(GREY)),
    '32-bit TIFF, 16 bits used': (tiff(WIDE.astype(np.int32) * 257, 32, 2), rgb(GREY)),
    '32-bit TIFF, signed': (tiff((WIDE * 8421504).astype(np.int32), 32, 2), rgb(GREY)),
    '32-bit TIFF, unsigned': (tiff(WIDE * np.uint32(16843009), 32, 1), rgb(GREY)),
    '32-bit TIFF, below 0': (tiff(WIDE.astype(np.int32) - 128, 32, 2), rgb(GREY)),
    'float TIFF to 1': (tiff(WIDE.astype(np.float32) / 255, 32, 3), rgb(GREY)),
    'float TIFF to 255': (tiff(WIDE.astype(np.float32), 32, 3), rgb(GREY)),
    'float TIFF to 65535': (tiff(WIDE.astype(np.float32) * 257, 32, 3), rgb(GREY)),
    'float TIFF from -1 to 1': (tiff(WIDE.astype(np.float32) / 127.5 - 1, 32, 3), rgb(GREY)),
    'black float TIFF': (tiff(np.zeros((32, 32), np.float32), 32, 3), np.zeros_like(COLOUR)),
    'RGBA PNG': (saved(Image.fromarray(np.dstack([COLOUR, ALPHA])), 'PNG'), over(COLOUR, ALPHA)),
    'RGBA WebP': (saved(Image.fromarray(np.dstack([COLOUR, ALPHA])), 'WEBP', lossless=True), over(COLOUR, ALPHA)),
    'RGBA TIFF': (saved(Image.fromarray(np.dstack([COLOUR, ALPHA])), 'TIFF'), over(COLOUR, ALPHA)),
    'LA PNG': (saved(Image.fromarray(np.dstack([GREY, ALPHA])), 'PNG'), over(rgb(GREY), ALPHA)),
    'RGB PNG with a transparent colour': (
        saved(Image.fromarray(COLOUR), 'PNG', transparency=tuple(COLOUR[3, 4].tolist())),
        over(COLOUR, (COLOUR != COLOUR[3, 4]).any(-1))),
    'grey PNG with a transparent grey': (
        saved(Image.fromarray(GREY), 'PNG', transparency=0), over(rgb(GREY), GREY != 0)),
    '16-bit PNG with a transparent grey': (
        saved(Image.fromarray(GREY16), 'PNG', transparency=0), over(rgb(GREY), GREY != 0)),
    'palette': (saved(palette([])[0], 'PNG'), palette([])[1]),
    'palette, one transparent': (saved(palette([5])[0], 'PNG', transparency=5), palette([5])[1]),
    'palette, several transparent': (saved(palette([])[0], 'PNG', transparency=OPACITY), palette([2, 9])[1]),
    'GIF': (saved(palette([])[0], 'GIF'), palette([])[1]),
    'GIF, one transparent': (saved(palette([5])[0], 'GIF', transparency=5), palette([5])[1]),
    'bilevel': (saved(Image.fromarray(GREY > 127), 'PNG'), rgb(np.where(GREY > 127, 255, 0))),
    'BMP': (saved(Image.fromarray(COLOUR), 'BMP'), COLOUR),
    'PPM': (saved(Image.fromarray(COLOUR), 'PPM'), COLOUR),
    'TIFF': (saved(Image.fromarray(COLOUR), 'TIFF', compression='tiff_lzw'), COLOUR)} | {
    f'{kind} of two frames': (frames(kind), rgb(GREY)) for kind in ('GIF', 'TIFF', 'WEBP', 'PNG')}

def case(name):
    data, right = CASES[name]
    if data is None:
        cv2 = pytest.importorskip('cv2')
        data = cv2.imencode('.png', COLOUR[..., ::-1] * np.uint16(257))[1].tobytes()
    return data, right

# --- the five doors; each gives the pixels that it sees

def loading(data, d):
    for place in ('train/it', 'train/same', 'test/it', 'test/same'):
        (d/place).mkdir(parents=True)
        (d/place/'1.png').write_bytes(data)
    return load_data(d, convert=True).x['train'][0]

class Seen(list):
    "A net that remembers its pictures"
    def __call__(self, images):
        self.append(np.asarray(images))
        return np.full((len(images), 1), 1, np.float32)

def predicting(data, d, monkeypatch):
    from fastcifar.share.predict import Predictor
    seen = Seen()
    monkeypatch.setattr('fastcifar.share.predict.open_predictor', lambda *_: Predictor(['it'], seen, 'net'))
    (d/'1.png').write_bytes(data)
    predict_files('net', [d/'1.png'])
    return seen[0][0]

NET = []
def demo(data):
    if not NET: NET[:] = pixel_net(load_model('groupnet'))
    return explain_image(*NET, data)[1]

def calls(data, d):
    "Bytes, a path and a PIL image, all at once"
    (d/'2.png').write_bytes(data)
    pictures = [data, d/'2.png', str(d/'2.png'), Image.open(io.BytesIO(data))]
    dl = load_data('digits').dataloaders(bs=16, device='cpu').test_dl(pictures)
    seen = [np.asarray(dl.dataset[i][0]) for i in range(4)]
    for x in seen[1:]: assert (x == seen[0]).all()
    return seen[0]

def card():
    "A model card with the snippet for ONNX"
    m = dict(test_images=10, wrong=1, data_sha256='x', data='it', parameters=1, test_accuracy=.9,
             seed=0, recipe='fast', epochs=1, bs=1, precision='fp32')
    return model_card(dict(metrics=m, classes=['it'], tta='none', architecture=dict(name='n', norm='bn'),
                           onnx=dict(opset=18, images=10, max_difference=1e-6),
                           environment=dict(device_name='cpu', versions=dict(torch='2', fastcifar='1'))))

def snippet(data, d, monkeypatch):
    code = max(re.findall(r'(?:^    .*\n)+', card(), re.M), key=lambda s: 'onnxruntime' in s)
    seen = []
    class Session:
        def __init__(self, path): assert path == 'model.onnx'
        def run(self, outputs, inputs):
            seen.append(inputs['images'])
            return [np.ones((1, 1), np.float32)]
    monkeypatch.setitem(sys.modules, 'onnxruntime', types.SimpleNamespace(InferenceSession=Session))
    monkeypatch.chdir(d)
    (d/'PICTURE.png').write_bytes(data)
    exec(re.sub('^    ', '', code, flags=re.M), {})
    return seen[0][0]

@pytest.mark.parametrize('name', CASES)
def test_every_door_sees_the_same_picture(name, tmp_path, monkeypatch):
    data, right = case(name)
    doors = dict(loading=loading(data, tmp_path/'tree'), demo=demo(data), calls=calls(data, tmp_path),
                 snippet=snippet(data, tmp_path, monkeypatch), predict=predicting(data, tmp_path, monkeypatch))
    for door, seen in doors.items():
        assert seen.dtype == np.uint8 and seen.shape == (32, 32, 3), door
        assert np.abs(seen.astype(int) - right).max() <= 1, door # a 16-bit colour may lose its last bit

@pytest.mark.parametrize('tag', TURNS)
def test_a_photograph_stands_upright(tag, tmp_path):
    "JPEG, not square, larger than 32x32: turned before it is squeezed; without conversion too if it is 32x32"
    x = np.zeros((60, 90, 3), np.uint8)
    x[:20, :30] = 255, 0, 0
    exif = Image.Exif()
    exif[0x0112] = tag
    seen = decode_image(saved(Image.fromarray(x), 'JPEG', exif=exif, quality=95), convert=True)
    right = np.asarray(Image.fromarray(np.ascontiguousarray(TURNS[tag](x))).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(seen.astype(int) - right).mean() < 6
    assert (decode_image(turned('PNG', tag)) == TURNS[tag](COLOUR)).all()

def test_a_six_upside_down_is_a_six(tmp_path):
    "What EXIF says changes nothing in what a net answers"
    x = COLOUR.copy()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(x).save(tmp_path/'up.png')
    Image.fromarray(np.ascontiguousarray(np.rot90(x, 2))).save(tmp_path/'down.png', exif=exif)
    up, down = predict_files('groupnet', [tmp_path/'up.png', tmp_path/'down.png'])
    assert up['top'] == down['top']

@given(st.integers(0, 2**16 - 1), st.sampled_from((np.uint16, np.int32, np.float32)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_grey_is_scaled_and_keeps_its_order(top, kind):
    x = np.linspace(0, 1, 1024).reshape(32, 32) * top
    seen = decode_image(Image.fromarray(x.astype(kind)), convert=True)[..., 0].ravel().astype(int)
    assert (np.diff(seen) >= 0).all() and seen[0] == 0
    whites = {np.uint16: (65535,), np.int32: (255, 65535), np.float32: (1, 255, 65535)}[kind]
    white = next(w for w in whites if top <= w)
    assert abs(seen[-1] - 255 * int(top) / white) <= 1

@given(st.tuples(*[st.integers(0, 255)] * 4))
@settings(max_examples=60, deadline=None)
def test_transparency_lies_over_the_stated_colour(rgba):
    seen = decode_image(Image.new('RGBA', (50, 40), rgba), convert=True)[16, 16]
    a = rgba[3] / 255
    assert np.abs(seen - (np.array(rgba[:3]) * a + np.array(BACKGROUND) * (1 - a))).max() <= 1

def test_damaged_exif_does_not_cost_a_picture():
    data = saved(Image.fromarray(COLOUR), 'PNG', exif=b'Exif\0\0II*\0\xff\xff\xff\xffgarbage')
    assert (decode_image(data) == COLOUR).all()

def test_without_conversion_nothing_is_converted(tmp_path):
    modes = {'RGBA PNG': 'RGBA', '16-bit PNG': 'I;16', 'GIF': 'P',
             'RGB PNG with a transparent colour': 'RGB with transparency'}
    for name, mode in modes.items():
        said = f'{re.escape(mode)}.*convert=True, --convert'
        with pytest.raises(FastcifarError, match=said): decode_image(CASES[name][0])
    no_numbers = tiff(np.full((32, 32), np.nan, np.float32), 32, 3)
    with pytest.raises(FastcifarError, match='not finite'): decode_image(no_numbers, convert=True)

def test_files_of_a_folder_are_read_or_named(tmp_path, cli):
    (tmp_path/'in').mkdir()
    kinds = {'.jfif': 'JPEG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.tif': 'TIFF', '.tiff': 'TIFF', '.gif': 'GIF',
             '.webp': 'WEBP', '.bmp': 'BMP', '.png': 'PNG', '.ppm': 'PPM', '.pgm': 'PPM', '.pbm': 'PPM'}
    assert set(kinds) == set(IMAGE_SUFFIXES)
    for suffix, kind in kinds.items():
        mode = {'.pgm': 'L', '.pbm': '1'}.get(suffix, 'RGB')
        (tmp_path/f'in/a{suffix.upper()}').write_bytes(saved(Image.fromarray(COLOUR).convert(mode), kind))
    for name in ('b.heic', 'c.heic', 'notes.txt', 'README', '.DS_Store'): (tmp_path/'in'/name).write_bytes(b'?')
    left_out = '4 files are left out, no images by their names (2 with .heic, 1 with .txt, 1 with no ending)'
    with pytest.warns(UserWarning, match=re.escape(f'in: {left_out}')):
        assert len(predict_files('groupnet', [tmp_path/'in'])) == len(kinds)
    done = cli('predict', '--from', 'groupnet', tmp_path/'in')
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(kinds)
    assert done.stderr.splitlines() == [f'fastcifar: {tmp_path}/in: {left_out}']
    (tmp_path/'none').mkdir()
    with pytest.raises(FastcifarError, match='holds no images'): predict_files('groupnet', [tmp_path/'none'])

def test_a_field_is_drawn_over_the_same_picture(tmp_path, main, monkeypatch):
    seen = []
    def plot(model, image, *_):
        seen.append(image)
        return plt.figure()
    monkeypatch.setattr('fastcifar.models.summary.plot_field', plot)
    (tmp_path/'a.png').write_bytes(turned('PNG', 3))
    code, _, err = main('summary', 'normnet31k', '--field', tmp_path/'f.png', '--image', tmp_path/'a.png')
    assert code == 0, err
    assert (seen[0] == np.rot90(COLOUR, 2)).all()
    code, _, err = main('summary', 'normnet31k', '--field', tmp_path/'f.png', '--image', tmp_path/'none.png')
    assert code == 2 and 'there is no image' in err
