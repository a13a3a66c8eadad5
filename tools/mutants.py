"""Mutants of a module: its source with one small mistake in it, as people make them; what `mutate.py` needs.

A mutant is one node of the syntax tree, replaced in the text, so that all other lines and comments stay where they are.
Texts for people (docstrings, errors, what is printed), type hints and the looks of plots are left alone."""
import ast, builtins, copy, dataclasses, hashlib

COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
EXACT = ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot # whose counterpart is their opposite
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr}
TWINS = [('min', 'max'), ('any', 'all'), ('minimum', 'maximum'), ('argmin', 'argmax'), ('idxmin', 'idxmax'),
    ('floor', 'ceil'), ('mean', 'sum'), ('startswith', 'endswith'), ('union', 'intersection'), ('low', 'high'),
    ('zeros', 'ones'), ('flatnonzero', 'argsort'), ('isna', 'notna'), ('head', 'tail'), ('before', 'after')]
TWIN = {a: b for pair in TWINS for a, b in (pair, pair[::-1])} # names for which another is taken by mistake
UNWRAPPED = {'abs', 'sorted', 'max', 'min', 'reversed', 'set'} # f(x) -> x
SYMMETRIC = {'isinstance', 'max', 'min', 'maximum', 'minimum', 'allclose', 'equal'} # the order does not matter
TOLD = {'print', 'say', 'warn', 'FastcifarError', 'attempt', 'attempt_plot'} # what they are given is for people
LOOKS = {'subplots', 'grid', 'legend', 'axis', 'tick_params', 'set_params', 'suptitle', 'text', 'set_label', 'figure'}
LOOK_KEYS = {'figsize', 'fontsize', 'labelsize', 'alpha', 'lw', 'ls', 'ms', 'color', 'ecolor', 'edgecolor', 'cmap',
    'layout', 'capsize', 'marker', 'rotation', 'ha', 'va', 'dpi', 'linewidth', 'pad', 'width', 'zorder', 'mfc', 'label',
    'xlabel', 'ylabel', 'title', 'height_ratios', 'align', 'encoding', 'stacklevel', 'desc', 'help'}

@dataclasses.dataclass
class Mutant:
    "One change of a module"
    module: str
    scope: str # function or method around it
    kind: str # of change
    line: str # the line of code, as it was
    change: str # what was replaced by what
    start: int # in the source
    end: int
    new: str
    lines: tuple # numbers of lines one of which runs where it matters; empty: it matters to whoever imports the module
    tree: ast.AST = dataclasses.field(repr=False)
    node: ast.AST = dataclasses.field(repr=False)
    other: ast.AST = dataclasses.field(repr=False) # what comes in the node's place
    @property
    def name(self) -> str: return f'{self.module} | {self.scope} | {self.line} | {self.change}'
    def source(self, text:str) -> str: return text[:self.start] + self.new + text[self.end:]

def _called(node):
    f = node.func if isinstance(node, ast.Call) else None
    return f.id if isinstance(f, ast.Name) else f.attr if isinstance(f, ast.Attribute) else ''

def _is_text(node):
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)

def _number(v):
    "Another number: a neighbour, or something else of about this size"
    if isinstance(v, bool): return not v
    return v + 1 if isinstance(v, int) else v * 2 if v else 1.

def _compare(node):
    for i, op in enumerate(node.ops):
        if type(op) in COMPARED: yield 'comparison', dict(ops=[*node.ops[:i], COMPARED[type(op)](), *node.ops[i + 1:]])

def _compute(node):
    if _is_text(node.left) or _is_text(node.right) or any(isinstance(o, (ast.List, ast.Tuple, ast.ListComp))
        for o in (node.left, node.right)): return # a type error, which anything notices
    if isinstance(node.op, ast.BitOr): yield 'operand', node.left # what is added to a dict, or an alternative
    elif type(node.op) in COMPUTED: yield 'arithmetic', dict(op=COMPUTED[type(node.op)]())

def _call(node):
    name = _called(node)
    if name in TOLD | LOOKS: return
    known = isinstance(node.func, ast.Attribute) or hasattr(builtins, TWIN.get(name, ''))
    if known and name in TWIN:
        field = 'id' if isinstance(node.func, ast.Name) else 'attr'
        yield 'function', dict(func=_with(node.func, **{field: TWIN[name]}))
    if name in UNWRAPPED and len(node.args) == 1 and isinstance(node.func, ast.Name): yield 'unwrapped', node.args[0]
    if isinstance(node.func, ast.Attribute) and name in ('abs', 'copy', 'clip', 'clone', 'detach', 'float', 'double',
        'dropna', 'round', 'clamp_'): yield 'unwrapped', node.func.value
    if len(node.args) > 1 and name not in SYMMETRIC and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        yield 'arguments', dict(args=[node.args[1], node.args[0], *node.args[2:]])
    for i, k in enumerate(node.keywords):
        if k.arg and k.arg not in LOOK_KEYS: yield 'keyword', dict(keywords=node.keywords[:i] + node.keywords[i + 1:])

def _condition(node):
    "Of an `if`, a `while` or a conditional expression; only the condition is written anew"
    t = node.test # of some, the opposite is another change already
    turned = isinstance(t, ast.UnaryOp) or isinstance(t, ast.Compare) and isinstance(t.ops[0], EXACT)
    if not turned: yield 'condition', ast.UnaryOp(ast.Not(), t), t
    if isinstance(node, ast.If) and not node.orelse and isinstance(node.body[0], (ast.Raise, ast.Return, ast.Continue)):
        yield 'guard', ast.Constant(False), t

def _comprehension(node):
    for g, part in enumerate(node.generators):
        if not part.ifs: continue
        yield 'filter', dict(generators=[*node.generators[:g], _with(part, ifs=[]), *node.generators[g + 1:]])

def _slice(node):
    s = node.slice
    if isinstance(s, ast.Slice) and (s.lower or s.upper): yield 'slice', node.value
    if isinstance(s, ast.Constant) and s.value == 0: yield 'constant', dict(slice=ast.Constant(-1))

def _value(node):
    v = node.value
    if isinstance(v, (int, float)): yield 'constant', dict(value=_number(v))

def _negative(node):
    if isinstance(node.op, (ast.Not, ast.USub, ast.Invert)): yield 'not', node.operand

def _bool(node):
    yield 'boolean', dict(op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    yield 'operand', dict(values=node.values[:-1]) if len(node.values) > 2 else node.values[0]

def _returned(node):
    v = node.value
    if v is None or isinstance(v, ast.Constant): return
    if isinstance(v, (ast.Compare, ast.BoolOp)): yield 'return', dict(value=ast.UnaryOp(ast.Not(), v))
    elif isinstance(v, ast.Tuple) and len(v.elts) > 1 and not any(isinstance(o, ast.Starred) for o in v.elts):
        yield 'return', dict(value=_with(v, elts=[v.elts[1], v.elts[0], *v.elts[2:]]))
    elif isinstance(v, (ast.Call, ast.Name)): yield 'return', dict(value=None)

def _statement(node):
    "Statements whose loss gives no name error"
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    effect = isinstance(node, (ast.AugAssign, ast.Delete)) or isinstance(target, (ast.Attribute, ast.Subscript))
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) not in TOLD | LOOKS
    if effect or call or isinstance(node, (ast.Continue, ast.Break)): yield 'statement', ast.Pass()

KINDS = {ast.Compare: _compare, ast.BinOp: _compute, ast.Call: _call, ast.If: _condition, ast.IfExp: _condition,
    ast.While: _condition, ast.ListComp: _comprehension, ast.SetComp: _comprehension, ast.DictComp: _comprehension,
    ast.GeneratorExp: _comprehension, ast.Subscript: _slice, ast.Constant: _value, ast.UnaryOp: _negative,
    ast.BoolOp: _bool, ast.Return: _returned} | {k: _statement for k in (ast.Assign, ast.AugAssign, ast.Delete,
    ast.Expr, ast.Continue, ast.Break)}

def _with(node, **fields):
    new = copy.copy(node)
    for k, v in fields.items(): setattr(new, k, v)
    return new

def _children(node):
    "The parts of a node in which a mistake is worth a test"
    left_out = set()
    if isinstance(node, ast.AnnAssign): left_out = {'annotation'}
    if isinstance(node, ast.arg): return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): left_out = {'returns', 'decorator_list'}
    if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)): return
    if isinstance(node, ast.Call) and _called(node) in TOLD | LOOKS: return
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == '__all__' for t in node.targets): return
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or name in left_out: continue
            if isinstance(child, ast.keyword) and child.arg in LOOK_KEYS: continue
            if isinstance(child, ast.Expr) and _is_text(child.value): continue # a docstring
            yield child

def _walk(node, scope=(), lines=()):
    "(node, names of the functions around it, lines that run if it matters)"
    for child in _children(node):
        inner, at = scope, lines
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)): inner = (*scope, child.name)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            body = node.body if isinstance(node, ast.FunctionDef) else [node.body]
            if child in body: at = None # from here on each statement has its own lines
            elif at == (): at = tuple(range(body[0].lineno, body[-1].end_lineno + 1)) # a default value
        if isinstance(child, ast.stmt) and at is None or isinstance(node, ast.stmt) and lines is None: at = None
        yield child, inner, at
        yield from _walk(child, inner, at)

def _offsets(text):
    "Where each line begins, in bytes"
    starts = [0]
    for line in text.encode().splitlines(keepends=True): starts.append(starts[-1] + len(line))
    return starts

def _replaced(tree, node, new):
    "The tree with a node replaced, as text that tells whether two trees are the same"
    class Replace(ast.NodeTransformer):
        def visit(self, n): return new if n is node else super().generic_visit(n)
    return ast.dump(Replace().visit(copy.deepcopy(tree, {id(node): node})))

def _written(tree, text, m):
    "The mutant with its node as text, or None where that cannot stand in the place of the old one"
    want = _replaced(tree, m.node, m.other)
    for pattern in ('{}', '({})'):
        tried = dataclasses.replace(m, new=pattern.format(m.new))
        try:
            if ast.dump(ast.parse(tried.source(text))) == want: return tried
        except SyntaxError: pass

def _change(old, new):
    "What differs in a node, with a little around it"
    old, new = ' '.join(old.split()), ' '.join(new.split())
    same = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), 0)
    cut = max(same - 20, 0) if len(old) > 90 else 0
    return ' -> '.join(s if len(s) <= 90 else f'{s[:60]} ... {s[-25:]}' for s in (old[cut:], new[cut:]))

def make_mutants(
    module:str, # Its name
    text:str, # Its source
) -> list: # Of `Mutant`
    "All mutants of a module, some of which cannot be written down; `choose` leaves those out"
    tree, starts, raw, rows, res, seen = ast.parse(text), _offsets(text), text.encode(), text.splitlines(), [], {}
    def at(line, col): return len(raw[:starts[line - 1] + col].decode())
    for node, scope, lines in _walk(tree):
        for kind, what, *part in KINDS.get(type(node), lambda _: ())(node):
            old, = part or [node]
            other = _with(old, **what) if isinstance(what, dict) else what
            start, end = at(old.lineno, old.col_offset), at(old.end_lineno, old.end_col_offset)
            new = ast.unparse(ast.fix_missing_locations(other))
            here = tuple(range(old.lineno, old.end_lineno + 1)) if lines is None else lines
            m = Mutant(module, '.'.join(scope), kind, rows[old.lineno - 1].strip(), _change(text[start:end], new),
                start, end, new, here, tree, old, other)
            seen[m.name] = seen.get(m.name, 0) + 1
            if seen[m.name] > 1: m.change += f' ({seen[m.name]})'
            res.append(m)
    return res

def choose(
    mutants, # All of a module
    text:str, # Its source
    n:int, # So many
    seed:int=0, # Another one gives others
) -> list:
    "Some mutants of every kind; the turn of one depends on its own text and the seed, not on the rest of the module"
    turn = lambda m: hashlib.sha256(f'{seed} {m.name}'.encode()).hexdigest()
    kinds, res = {}, []
    for m in sorted(mutants, key=turn): kinds.setdefault(m.kind, []).append(m)
    for row in range(max(map(len, kinds.values()), default=0)):
        for k in sorted(kinds):
            for m in kinds[k][row:row + 1]:
                if len(res) < n and (m := _written(m.tree, text, m)): res.append(m)
    return res
