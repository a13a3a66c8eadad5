"""An emulated GPU: torch's real CUDA host code over a stand-in runtime; what kernels would compute, the CPU computes
over the same memory."""
import collections, contextlib, ctypes, gc, os, traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_lib = ctypes.CDLL(os.environ['STANDIN'] + '/libfakecudart.so')
_lib.fc_count.restype = ctypes.c_long
NAMES = 'launch h2d d2h d2d memset ssync dsync esync malloc halloc query memcpy_sync graph'.split()

def counts() -> dict:
    "What the runtime was asked for so far"
    return {n: _lib.fc_count(i) for i, n in enumerate(NAMES)}

aten = torch.ops.aten
# these need cuBLAS, cuDNN or cuSOLVER, or real numbers: only the CPU does them
LIBRARY = set('''convolution convolution_backward mm addmm bmm baddbmm addbmm addmv mv dot vdot linear _linalg_eigh
    linalg_eigh _linalg_svd nonzero equal unique _unique2 unique_dim unique_consecutive masked_select cudnn_convolution
    cudnn_batch_norm cudnn_batch_norm_backward linalg_qr sort topk matmul _batch_norm_with_update batch_norm_backward
    _addmm_activation bincount nonzero_static grid_sampler_2d _efficientzerotensor argsort histc repeat_interleave
    cudnn_grid_sampler
    affine_grid_generator'''.split())
WAITING = set('''nonzero equal unique _unique2 unique_dim unique_consecutive masked_select bincount _linalg_eigh
    repeat_interleave'''.split())
NEVER_CPU = {'_local_scalar_dense', 'is_pinned', '_pin_memory', 'record_stream', 'set_', 'resize_'}
VIEWS = {'detach', 'alias', 'lift', 'lift_fresh'}
SHORT = (torch.bfloat16, torch.float16)

class Log:
    "What was noticed on the way"
    waits = collections.Counter() # times that the host waited for the GPU, by place
    mixed = [] # operations whose result differs in type between the two devices

def _place(limit=4):
    def ours(f): return '/fastcifar/' in f.filename or '/tests/' in f.filename and __file__ != f.filename
    frames = [f for f in traceback.extract_stack() if ours(f)]
    return ' < '.join(f'{os.path.basename(f.filename)}:{f.lineno}' for f in reversed(frames[-limit:]))

def alias(t):
    "A CPU tensor over the memory of a `CUDA` one"
    if not isinstance(t, torch.Tensor) or not t.is_cuda: return t
    storage = t.untyped_storage()
    if not storage.nbytes(): return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device('cpu'), storage.nbytes())
    res = torch.empty(0, dtype=t.dtype)
    with torch.no_grad(): res.set_(same, t.storage_offset(), t.size(), t.stride())
    return res.conj() if t.is_conj() else res

def to_cuda(c):
    "A `CUDA` tensor with the numbers of a CPU one"
    if not isinstance(c, torch.Tensor) or c.is_cuda: return c
    out = torch.empty_strided(c.size(), c.stride(), dtype=c.dtype, device='cuda')
    if c.numel(): alias(out).copy_(c)
    return out

def _seed():
    "A seed from the state of the GPU's generator, which each random operation moves on"
    state = torch.cuda.default_generators[0].get_state()
    seed, offset = (int.from_bytes(bytes(state[i:i + 8].tolist()), 'little') for i in (0, 8))
    return hash((seed, offset)) & (2**63 - 1)

def _memory(values):
    storages = [v.untyped_storage() for v in values if isinstance(v, torch.Tensor)]
    return {s.data_ptr() for s in storages if s.nbytes()}

class Emulator(TorchDispatchMode):
    "Computes on the CPU what CUDA operations are to give"
    tape = None # what runs while a graph is being recorded

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.run(func, args, kwargs or {})
        if Emulator.tape is not None: Emulator.tape.append((func, args, kwargs or {}, out))
        return out

    def run(self, func, args, kwargs):
        flat, spec = tree_flatten((args, kwargs))
        def on_gpu(a):
            return a.is_cuda if isinstance(a, torch.Tensor) else isinstance(a, torch.device) and a.type == 'cuda'
        if not any(map(on_gpu, flat)): return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == '_local_scalar_dense': return self.watched(func, args, kwargs, name)
        if func.is_view or name in NEVER_CPU or name in VIEWS: return func(*args, **kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        seed, saved = (_seed(), torch.get_rng_state()) if random else (None, None)
        if name in ('cudnn_batch_norm', 'cudnn_batch_norm_backward'): return getattr(self, name)(*args, **kwargs)
        out = self.library(name, flat) if name in LIBRARY else self.watched(func, args, kwargs, name)
        with torch.no_grad():
            cpu = [self.for_cpu(a) for a in flat]
            a, k = tree_unflatten(cpu, spec)
            if 'pin_memory' in k: k = {**k, 'pin_memory': None}
            if random: torch.manual_seed(seed)
            try: res = self.on_cpu(func, a, k)
            finally:
                if random: torch.set_rng_state(saved)
            if name in LIBRARY: return self.wrap(res, (a, k), (args, kwargs))
            if isinstance(out, (bool, int, float)): return res
            self.write(out, res, flat, name)
        return out

    def for_cpu(self, a):
        if isinstance(a, torch.device) and a.type == 'cuda': return torch.device('cpu')
        return None if isinstance(a, torch.Generator) else alias(a)

    def library(self, name, flat):
        kinds = {a.device.type for a in flat if isinstance(a, torch.Tensor) and (a.ndim or a.is_cuda)}
        if kinds == {'cpu', 'cuda'}: raise RuntimeError(f'{name} got tensors on cpu and cuda @ {_place()}')
        if name in WAITING:
            Log.waits[f'{name} @ {_place()}'] += 1
            if torch.cuda.get_sync_debug_mode() == 2: raise RuntimeError(f'a synchronizing CUDA operation: {name}')

    def on_cpu(self, func, a, k):
        "In float32 where the CPU has no such operation for short numbers"
        try: return func(*a, **k)
        except (RuntimeError, NotImplementedError) as e:
            known = ('not implemented for', 'Half', 'BFloat16', 'mixed dtype', 'expected scalar type',
                     'must have the same dtype', 'should be the same')
            if not any(s in str(e) for s in known): raise
        def up(t): return t.float() if isinstance(t, torch.Tensor) and t.dtype in SHORT else t
        low = next((t.dtype for t in tree_flatten((a, k))[0] if isinstance(t, torch.Tensor) and t.dtype in SHORT), None)
        def down(t): return t.to(low) if isinstance(t, torch.Tensor) and low and t.dtype == torch.float32 else t
        return tree_map(down, func(*tree_map(up, a), **tree_map(up, k)))

    def wrap(self, res, on_cpu, on_gpu):
        "The results of a library call as CUDA tensors; what it wrote in place is what was given"
        pairs = zip(tree_flatten(on_cpu)[0], tree_flatten(on_gpu)[0])
        written = {id(c): g for c, g in pairs if isinstance(c, torch.Tensor)}
        return tree_map(lambda r: written.get(id(r), None) if id(r) in written else to_cuda(r), res)

    def write(self, out, res, flat, name):
        "Put the CPU's numbers into the outputs that torch has made on the GPU"
        given = _memory(flat)
        for o, r in zip(tree_flatten(out)[0], tree_flatten(res)[0]):
            if isinstance(o, torch.Tensor) != isinstance(r, torch.Tensor):
                Log.mixed.append(f'{name} gives other things on the two devices')
                continue
            if not isinstance(o, torch.Tensor) or not o.numel() or not r.numel(): continue
            if o.untyped_storage().data_ptr() not in given:
                assert o.shape == r.shape, f'{name} gives {tuple(o.shape)} on CUDA and {tuple(r.shape)} on the CPU'
                if o.dtype != r.dtype: Log.mixed.append(f'{name}: {o.dtype} on CUDA, {r.dtype} on the CPU @ {_place()}')
                (alias(o) if o.is_cuda else o).copy_(r)

    def watched(self, func, args, kwargs, name):
        before = counts()
        out = func(*args, **kwargs)
        after = counts()
        n = sum(after[k] - before[k] for k in ('ssync', 'dsync', 'memcpy_sync'))
        if n: Log.waits[f'{name} @ {_place()}'] += n
        return out

    def cudnn_batch_norm(self, x, w, b, rm, rv, training, mom, eps):
        for t, what in ((w, 'weight'), (b, 'bias')):
            if t is None: raise RuntimeError(f'cudnn_batch_norm without {what}')
        if w.dtype != torch.float32 and x.dtype in SHORT: raise RuntimeError('cudnn_batch_norm: weight must be float')
        c = [alias(t) for t in (x, w, b, rm, rv)]
        o, m, s = aten.native_batch_norm(c[0].float(), *c[1:], training, mom, eps)
        out = torch.empty_like(x)
        alias(out).copy_(o)
        if not training: m = s = torch.empty(0)
        return out, to_cuda(m.float()), to_cuda(s.float()), torch.empty(0, dtype=torch.uint8, device='cuda')

    def cudnn_batch_norm_backward(self, x, g, w, rm, rv, sm, sv, eps, reserve):
        c = [alias(t) for t in (x, g, w, rm, rv, sm, sv)]
        gi, gw, gb = aten.native_batch_norm_backward(c[1].float(), c[0].float(), *c[2:], True, eps, [True, True, True])
        out = torch.empty_like(x)
        alias(out).copy_(gi)
        return out, to_cuda(gw), to_cuda(gb)

class Graph:
    "A CUDA graph whose replay runs the recorded operations again, over the same memory"
    def __init__(self): self.tape = []

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.tape:
            if func.is_view or func.overloadpacket.__name__ in VIEWS: continue
            given, new = _memory(tree_flatten((args, kwargs))[0]), func(*args, **kwargs)
            for o, n in zip(tree_flatten(out)[0], tree_flatten(new)[0]):
                if isinstance(o, torch.Tensor) and o.numel() and o.untyped_storage().data_ptr() not in given: o.copy_(n)

def _all_memory():
    "The bytes behind every tensor on the GPU that Python knows, each as a CPU tensor over the same memory"
    on_gpu = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.is_cuda]
    storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in on_gpu) if s.nbytes()}
    def bytes_of(s):
        same = torch._C._construct_storage_from_data_pointer(s.data_ptr(), torch.device('cpu'), s.nbytes())
        return torch.empty(0, dtype=torch.uint8).set_(same, 0, (s.nbytes(),), (1,))
    return [(s, bytes_of(s)) for s in storages.values()] # with `s`, so that the memory stays

@contextlib.contextmanager
def record(graph, **kwargs):
    "What `torch.cuda.graph` does. A real recording computes nothing: afterwards all memory is as before"
    before = [(s, memory, memory.clone()) for s, memory in _all_memory()]
    Emulator.tape = graph.tape
    try: yield
    finally:
        Emulator.tape = None
        for _, memory, old in before: memory.copy_(old)

def install():
    "From now on tensors on `cuda` hold what a GPU would have computed"
    mode = Emulator()
    mode.__enter__()
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, record
    return mode
