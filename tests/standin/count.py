"""CUDA operations that need cuBLAS, cuDNN or cuSOLVER give empty tensors; the rest is torch's real host code over
kernels that do nothing. Import it before anything runs; `counts()` and `LIBRARY` say what was asked for."""
import collections, ctypes, os, warnings

import torch

_lib = ctypes.CDLL(os.environ['STANDIN'] + '/libfakecudart.so')
_lib.fc_count.restype = ctypes.c_long
NAMES = 'launch h2d d2h d2d memset ssync dsync esync malloc halloc query memcpy_sync graph'.split()
LIBRARY = collections.Counter() # calls of the libraries, each at least one launch

def counts() -> collections.Counter:
    "What the runtime and the libraries were asked for so far"
    runtime = {n: _lib.fc_count(i) for i, n in enumerate(NAMES)}
    return collections.Counter(runtime, library=sum(LIBRARY.values()))

def _side(i, p, d, k, s): return (i + 2 * p - d * (k - 1) - 1) // s + 1

def convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups):
    LIBRARY['convolution'] += 1 + (b is not None)
    last = x.ndim == 4 and any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, w))
    shape = (x.shape[0], w.shape[0], *map(_side, x.shape[2:], padding, dilation, w.shape[2:], stride))
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)

def convolution_backward(g, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
    LIBRARY['convolution_backward'] += sum(mask)
    bias = torch.empty(w.shape[0], dtype=w.dtype, device=w.device) if mask[2] else None
    return torch.empty_like(x) if mask[0] else None, torch.empty_like(w) if mask[1] else None, bias

def _product(name, shape):
    def f(*args, beta=1, alpha=1):
        LIBRARY[name] += 1
        return torch.empty(shape(*args), dtype=args[-1].dtype, device=args[-1].device)
    return f

def baddbmm(c, a, b, *, beta=1, alpha=1):
    LIBRARY['baddbmm'] += 1
    return torch.empty_like(c).copy_(c) # as torch does it before the product

def cudnn_batch_norm(x, w, b, rm, rv, training, mom, eps):
    LIBRARY['batch_norm'] += 1
    reserve = torch.empty(0, dtype=torch.uint8, device=x.device)
    return torch.empty_like(x), torch.empty_like(w), torch.empty_like(w), reserve

def cudnn_batch_norm_backward(x, g, w, rm, rv, sm, sv, eps, reserve):
    LIBRARY['batch_norm_backward'] += 1
    return torch.empty_like(x), torch.empty_like(w), torch.empty_like(w)

def _linalg_eigh(A, UPLO='L', compute_v=True):
    return torch.ones(A.shape[-1], dtype=A.dtype, device=A.device), torch.empty_like(A)

def _written(name):
    def f(*args, out, **kwargs):
        LIBRARY[name] += 1
        return out
    return f

_library = torch.library.Library('aten', 'IMPL')
with warnings.catch_warnings(action='ignore'):
    for f in (convolution, convolution_backward, baddbmm, cudnn_batch_norm, cudnn_batch_norm_backward, _linalg_eigh):
        _library.impl(f.__name__, f, 'CUDA')
    _library.impl('mm', _product('mm', lambda a, b: (a.shape[0], b.shape[1])), 'CUDA')
    _library.impl('addmm', _product('addmm', lambda c, a, b: (a.shape[0], b.shape[1])), 'CUDA')
    _library.impl('bmm', _product('bmm', lambda a, b: (*a.shape[:2], b.shape[2])), 'CUDA')
    for name in ('mm', 'addmm', 'bmm', 'baddbmm'): _library.impl(f'{name}.out', _written(name), 'CUDA')

def without_numbers():
    "For dry runs of whole programs: trainings go on, whatever lies in memory as their loss; nothing is compiled"
    import fastcifar.train.callbacks as callbacks, fastcifar.train.checkpoint as state, fastcifar.train.learner as train
    callbacks.StopOnNaN._stop = lambda self, ago: None
    state.Checkpoints._refuse = lambda self, when, what='': None
    train.compile_net = lambda model, device: model
