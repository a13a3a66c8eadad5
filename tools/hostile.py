"""Damaged and hostile files of every kind that the library reads; each has to be refused in one line, or to be harmless
and right. Run by tools/soak.py."""
import contextlib, copy, gzip, io, json, os, pickle, resource, shutil, signal, struct, sys, tarfile, tempfile, warnings
import zipfile, zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hypothesis import HealthCheck, Verbosity, given, seed as with_seed, settings, strategies as st
from PIL import Image
from torch import nn

from fastcifar.data.formats import check_arrays, decode_image, read_images, read_pickle
from fastcifar.basics import FastcifarError
from fastcifar.data.load import load_data
from fastcifar.share.export import export_run, write_onnx
from fastcifar.models.zoo import create_model, load_model, save_model
from fastcifar.share.predict import open_predictor, pixel_net
from fastcifar.runs.config import configure
from fastcifar.runs.reopen import load_run
from fastcifar.runs.run import recipe_learner, train_run
from fastcifar.runs.folder import run_config
from fastcifar.train.checkpoint import Checkpoints
from fastcifar.study.study import Study
from fastcifar.models.weights import load_tensors, save_tensors

SECONDS, MEMORY = 20, 2**31 # what one input may take, and all together above what the seeds need

class Hang(BaseException):
    "Raised by the alarm clock; not an `Exception`, which the library could take for a damaged file"
class Wrong(Exception): "An input that was not treated as it should be"

# --- inputs

def _bytes(x): return struct.pack('<I', x)
TOKENS = [b'', b'\0' * 8, b'\xff' * 8, b'../../evil', b'/etc/passwd', _bytes(2**31 - 1), struct.pack('<Q', 2**63 - 1),
          b'1' * 400, b'[' * 5000, b'cos\nsystem\n(S"echo"\ntR.', b'NaN', b'-1', b'\x80\x04']
EDITS = st.tuples(st.sampled_from(('flip', 'set', 'insert', 'remove', 'double', 'cut', 'write')),
                  st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.sampled_from(TOKENS))

def edited(data, edits):
    "`data` after some random damage"
    b = bytearray(data)
    for kind, where, n, token in edits:
        i = int(where * max(len(b), 1))
        if kind == 'flip' and b: b[i] ^= 1 << n % 8
        if kind == 'set' and b: b[i] = n
        if kind == 'insert': b[i:i] = token
        if kind == 'remove': del b[i:i + n]
        if kind == 'double': b[i:i] = b[i:i + n]
        if kind == 'cut': del b[i:]
        if kind == 'write': b[i:i + len(token)] = token
    return bytes(b)

def damaged(seeds): return st.builds(edited, st.sampled_from(seeds), st.lists(EDITS, min_size=1, max_size=6))

ODD = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(),
                st.sampled_from([-1, 0, 10**9, 10**400, 2**63, 1e-300, '../../evil', '/dev/zero', 'x' * 10_000, '',
                                 'cifar10', [], {}, [[]] * 50, {'name': 'custom_resnet'}]),
                st.text(max_size=5), st.recursive(st.none(), lambda c: st.lists(c, max_size=2), max_leaves=30))

def _places(v, at=()):
    yield at
    for k, w in v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ():
        yield from _places(w, (*at, k))

def turned(value, changes):
    "JSON with some values replaced, removed or added"
    value = copy.deepcopy(value)
    for share, kind, new in changes:
        new = copy.deepcopy(new)
        places = list(_places(value))
        *above, last = place if (place := places[int(share * len(places))]) else (None,)
        if last is None:
            value = new if kind == 'top' else value
            continue
        v = value
        for k in above: v = v[k]
        if kind == 'remove' and isinstance(v, dict): del v[last]
        elif kind == 'add' and isinstance(v, dict): v['extra'] = new
        else: v[last] = new
    return value

def hostile_json(values):
    kinds = st.sampled_from(('set', 'set', 'set', 'remove', 'add', 'top'))
    changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), kinds, ODD), min_size=1, max_size=4)
    return st.builds(turned, st.sampled_from(values), changes)

# --- the kinds of files: for each, inputs and what is done with one, which returns whether the answer makes sense

def _png(w, h, data):
    parts = (b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(data)), (b'IEND', b'')
    def chunk(k, d): return struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d))
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(k, d) for k, d in parts)

def _pictures():
    im, res = Image.radial_gradient('L').resize((40, 40)).convert('RGB'), []
    for kind in ('PNG', 'JPEG', 'BMP', 'PPM', 'WEBP', 'GIF', 'TIFF'):
        f = io.BytesIO(); im.save(f, kind); res.append(f.getvalue())
    grey, exif = np.asarray(im.convert('L')), Image.Exif()
    exif[0x0112] = 6
    odd = [(Image.fromarray(grey * np.uint16(257)), 'PNG', dict(transparency=0)),
           (Image.fromarray(grey * np.uint16(257)), 'TIFF', {}),
           (Image.fromarray(grey.astype(np.int32) * 257), 'TIFF', {}),
           (Image.fromarray(grey / np.float32(255)), 'TIFF', {}),
           (im.convert('RGBA'), 'WEBP', {}), (im.convert('P'), 'GIF', dict(transparency=0)),
           (im.convert('P'), 'PNG', dict(transparency=b'\0\xff')),
           (im, 'JPEG', dict(exif=exif)), (im, 'PNG', dict(exif=exif)),
           (im, 'TIFF', dict(exif=exif, compression='tiff_lzw'))]
    for im, kind, how in odd:
        f = io.BytesIO(); im.save(f, kind, **how); res.append(f.getvalue())
    return res

def images(tmp):
    sizes = st.builds(_png, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.binary(max_size=60))
    def use(data):
        x = decode_image(data, 'an image', convert=True)
        return x.dtype == np.uint8 and x.shape == (32, 32, 3)
    return st.one_of(damaged(_pictures()), sizes, st.binary(max_size=200)), use

OPCODES = [b'(', b'.', b'0', b'1', b'2', b'N', b'}', b']', b')', b'a', b'b', b'd', b'e', b'l', b'o', b'p0\n', b'g0\n',
           b'q\0', b'h\0', b'R', b's', b't', b'u', b'\x81', b'\x85', b'\x86', b'\x87', b'\x88', b'\x89', b'\x90',
           b'\x91', b'\x92', b'\x93', b'\x94', b'\x95' + b'\xff' * 8,
           b'cos\nsystem\n', b'cbuiltins\neval\n', b'c__builtin__\nexec\n', b'cnumpy\nndarray\n',
           b'cnumpy.core.multiarray\n_reconstruct\n', b'cnumpy\ndtype\n', b'c_codecs\nencode\n', b'iposix\nsystem\n',
           b"S'touch evil'\n", b"X\4\0\0\0evil", b'K\1', b'J\xff\xff\xff\x7f', b'U\4evil', b'B\xff\xff\xff\x7f',
           b'P1\n', b'\x82\1', b'I99999999999\n', b'L9L\n', b'F1e999\n', b'\x8a\4\xff\xff\xff\xff', b'\x8c\4evil',
           b'\x8f', b'\x98']

def pickles(tmp):
    batch = {b'data': np.arange(3072, dtype=np.uint8).reshape(1, 3072), b'labels': [1]}
    good = [pickle.dumps(batch, p) for p in (0, 2, 4)]
    good += [pickle.dumps(np.zeros(1), 2), b"cos\nsystem\n(S'touch evil'\ntR."]
    def plain(v):
        if v is None or isinstance(v, (bool, int, float, str, bytes, bytearray, np.ndarray)): return True
        if type(v).__module__ == 'fastcifar.data.formats': return True
        if isinstance(v, (list, tuple, set, frozenset)): return all(map(plain, v))
        return isinstance(v, dict) and all(plain(w) for w in (*v, *v.values()))
    program = st.lists(st.sampled_from(OPCODES), max_size=25).map(lambda ops: b'\x80\2' + b''.join(ops) + b'.')
    return st.one_of(damaged(good), program), lambda data: plain(read_pickle(data, 'a batch'))

TAR_TYPES = (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)

def _archive(kind, names, payload):
    f = io.BytesIO()
    if kind == 'zip':
        with warnings.catch_warnings(action='ignore'), zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z:
            for n in names: z.writestr(zipfile.ZipInfo(n or 'x'), payload)
    else:
        with tarfile.open(fileobj=f, mode='w:gz' if kind == 'tgz' else 'w') as t:
            for i, n in enumerate(names):
                info = tarfile.TarInfo(n)
                info.size, info.linkname = len(payload), '/etc/passwd'
                info.type = TAR_TYPES[i % 6 if n.startswith('link') else 0]
                t.addfile(info, io.BytesIO(payload))
    return f.getvalue()

def archives(tmp):
    f = io.BytesIO(); Image.new('RGB', (32, 32), 'red').save(f, 'PNG')
    tree = [f'{s}/{c}/{i}.png' for s in ('train', 'test') for c in ('cat', 'dog') for i in range(2)]
    batch = pickle.dumps({b'data': np.zeros((2, 3072), np.uint8), b'labels': [0, 1], b'label_names': [b'a', b'b']}, 2)
    batches = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
    official = [f'cifar-10-batches-py/{n}' for n in (*batches, 'batches.meta')]
    binary = [f'cifar-10-batches-bin/{n}' for n in (*(f'{b}.bin' for b in batches), 'batches.meta.txt')]
    good = [_archive(k, n, d) for k in ('zip', 'tgz', 'tar')
            for n, d in ((tree, f.getvalue()), (official, batch), (binary, bytes(3073 * 2)))]
    name = st.sampled_from([*tree, '../evil.png', '/tmp/evil.png', 'train/../../evil', 'train/cat/..', 'link1',
                            'link2', 'link3', 'link4', 'link5', 'C:\\evil', 'train/cat/\0.png',
                            'train/cat/' + 'x' * 300 + '.png', 'data_batch_1', 'train.bin'])
    made = st.builds(_archive, st.sampled_from(('zip', 'tgz', 'tar')), st.lists(name, max_size=8),
                     st.sampled_from([f.getvalue(), b'', bytes(10**7), b'no image', batch]))
    tars = [d for d in good if d[:2] == b'tr' or d[257:262] == b'ustar']
    packed = st.builds(lambda data: gzip.compress(data), damaged(tars)) # damage below the compression
    def use(data):
        (tmp/'data.tgz').write_bytes(data)
        a = read_images(tmp/'data.tgz', convert=True)
        check_arrays(a, 'it')
        return all(x.dtype == np.uint8 and x.shape[1:] == (32, 32, 3) for x in a.x.values())
    return st.one_of(damaged(good), made, packed), use

def _learner():
    torch.manual_seed(0)
    return recipe_learner(load_data('digits').dataloaders(bs=512, device='cpu'), create_model('normnet31k'),
                          configure('fast', 'normnet31k', data='digits', ema=.9), precision='fp32')

def checkpoints(tmp):
    learn, folder = _learner(), tmp/'checkpoints'
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Checkpoints(folder, every=2))
    files = [f for f in folder.iterdir()]
    good = {f.read_bytes(): f.name for f in files}
    tensors, note = load_tensors(files[0])
    shutil.rmtree(folder)
    learn = _learner()
    def use(data):
        "Bytes, or a note that somebody has put into a whole file"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        f = folder/'epoch_0001.safetensors'
        f.write_bytes(data) if isinstance(data, bytes) else save_tensors(f, tensors, data)
        ck = Checkpoints(folder, say=lambda s: None)
        ck.latest(learn)
        if ck.note is None: return True # refused, and said so
        learn.n_epoch, learn.epoch, accepted = 1, 0, ck.note
        try:
            learn.add_cb(ck)
            for cb in learn.cbs: # as a fit begins
                if cb.name == 'progress': continue
                for event in ('before_fit', 'before_train'):
                    if hasattr(type(cb), event): getattr(cb, event)()
            learn.opt.step()
            pd.DataFrame(ck.history).to_csv(os.devnull)
        finally: learn.remove_cb(ck)
        return not isinstance(data, bytes) or data in good # a changed byte has to be noticed
    return st.one_of(damaged(list(good)), hostile_json([note])), use

def weights(tmp):
    path = tmp/'model.safetensors'
    save_model(create_model('normnet31k'), path, classes=list('0123456789'), mean=[.5] * 3, std=[.2] * 3)
    good = path.read_bytes()
    tensors, note = load_tensors(path)
    def use(data):
        path.write_bytes(data) if isinstance(data, bytes) else save_tensors(path, tensors, data)
        net, classes = pixel_net(load_model(path), path)
        return isinstance(net, nn.Module) and len(classes) == 10 and (not isinstance(data, bytes) or data == good)
    return st.one_of(damaged([good]), hostile_json([note])), use

def run_folders(tmp):
    run, copy_ = tmp/'run', tmp/'copy'
    train_run(configure('fast', 'normnet31k', data='digits', epochs=1, bs=500), run, bars=False, pictures=False,
              say=lambda s: None)
    files = {f: json.loads((run/f).read_text()) for f in ('config.json', 'metrics.json', 'environment.json')}
    c, folder = run_config(run), tmp/'export'
    def use(what):
        name, value = what
        shutil.rmtree(copy_, ignore_errors=True); shutil.rmtree(folder, ignore_errors=True)
        copy_.mkdir()
        for f in (*files, 'model.safetensors', '.data'): os.link(run/f, copy_/f)
        (copy_/name).unlink()
        (copy_/name).write_bytes(value) if isinstance(value, bytes) else (copy_/name).write_text(json.dumps(value))
        for f in (lambda: load_run(copy_), lambda: train_run(c, copy_, bars=False, pictures=False, say=lambda s: None),
                  lambda: export_run(copy_, folder, onnx=False)):
            with contextlib.suppress(FastcifarError): f()
        run_config(copy_).checked()
        return True
    def changed(value): return st.one_of(hostile_json([value]), damaged([json.dumps(value).encode()]))
    values = st.one_of(*[st.tuples(st.just(f), changed(v)) for f, v in files.items()])
    return values, use

def onnx_files(tmp):
    import onnx
    path, good = tmp/'model.onnx', []
    for norm in ('bn', 'gn'):
        write_onnx(pixel_net(_noted(norm))[0], list('0123456789'), path)
        good.append(path.read_bytes())
    def changed(data, node, attribute, value, op):
        "The same program with one operation or one of its settings exchanged"
        m = onnx.load_model_from_string(data)
        n = m.graph.node[node % len(m.graph.node)]
        if op: n.op_type = op
        elif n.attribute:
            a = n.attribute[attribute % len(n.attribute)]
            if a.ints: a.ints[attribute % len(a.ints)] = value
            else: a.i = value
        else: m.graph.initializer[node % len(m.graph.initializer)].dims[:] = [value % 2**40, attribute]
        return m.SerializeToString()
    programs = st.builds(changed, st.sampled_from(good), st.integers(0, 100), st.integers(0, 9),
                         st.sampled_from([-1, 0, 1, 2, 3, 7, 100, 2**20, 2**31 - 1, 2**40, 2**62]),
                         st.sampled_from([None, None, None, 'Loop', 'If', 'Expand', 'Tile', 'ConstantOfShape', 'Pad',
                                          'Concat', 'Reshape', 'MaxPool']))
    x = np.zeros((3, 32, 32, 3), np.uint8)
    def use(data):
        path.write_bytes(data)
        p = open_predictor(path)(x)
        return p.shape == (3, 10) and abs(p.sum() - 3) < .01
    return st.one_of(damaged(good), programs), use

def _noted(norm):
    model = create_model('normnet31k', norm=norm).eval()
    model.note = dict(model=model.config, classes=list('0123456789'), mean=[.5] * 3, std=[.2] * 3)
    return model

def studies(tmp):
    f = tmp/'study/study.json'
    f.parent.mkdir()
    s = Study(f.parent, ['normnet31k'], 'digits', epochs=1, batch_sizes=500)
    s._settle()
    good = json.loads(f.read_text())
    def use(value):
        f.write_bytes(value) if isinstance(value, bytes) else f.write_text(json.dumps(value))
        s._settle()
        return json.loads(f.read_text()) == good # what it accepts is this study
    return st.one_of(hostile_json([good]), damaged([json.dumps(good).encode()])), use

KINDS = dict(images=images, pickles=pickles, archives=archives, checkpoints=checkpoints, weights=weights,
             run_folders=run_folders, onnx=onnx_files, studies=studies)

# --- watching

_watch = None # (folder, what was seen) while an input is in use

def _hook(event, args):
    if _watch is None: return
    folder, seen = _watch
    if event in ('os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'os.fork', 'socket.connect',
                 'pickle.find_class'):
        seen.append(f'{event} {args}'[:200])
    if event == 'open' and isinstance(args[0], (str, bytes, os.PathLike)):
        if isinstance(args[1], str): writes = args[1] and set(args[1]) & set('wax+')
        else: writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not os.path.abspath(os.fsdecode(args[0])).startswith((folder, '/dev/null')):
            seen.append(f'open {args}'[:200])

def _alarm(*_): raise Hang

def tried(use, value, folder) -> bool:
    "Use an input; was it accepted? `Wrong` if anything happened that must not"
    global _watch
    seen = []
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    _watch = (str(folder), seen)
    try:
        if not use(value): raise Wrong('accepted wrongly')
        accepted = True
    except FastcifarError as e:
        accepted = False
        if len(str(e)) > 1500: raise Wrong(f'a line of {len(str(e))} characters') from e
    except Hang: raise Wrong(f'it took more than {SECONDS} s') from None
    finally:
        _watch = None
        signal.alarm(0)
    if seen: raise Wrong(seen[0])
    return accepted

def _peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def try_kind(kind:str, n:int, seed:int=0) -> dict:
    "`n` inputs of a kind"
    count = dict(inputs=0, accepted=0)
    with tempfile.TemporaryDirectory() as d:
        os.environ['FASTCIFAR_CACHE'] = f'{d}/cache'
        old = Path.cwd()
        os.chdir(d)
        try:
            inputs, use = KINDS[kind](Path(d))
            before = _peak()
            @with_seed(seed)
            @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                      verbosity=Verbosity.quiet)
            @given(inputs)
            def each(value):
                count['inputs'] += 1
                count['accepted'] += tried(use, value, d)
            with warnings.catch_warnings(action='ignore'): each()
            if _peak() - before > MEMORY: raise Wrong(f'the inputs took {_peak() - before:,} bytes')
        except Exception as e: count['wrong'] = f'{type(e).__name__}: {str(e)[:300]}'
        finally: os.chdir(old)
    return count

sys.addaudithook(_hook)
