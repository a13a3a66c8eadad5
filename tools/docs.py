"""The documentation as a site, made from the notebooks.

    python tools/docs.py           the offline preview, into _docs/
    python tools/docs.py quarto    the published site there, where Quarto is installed

After `preview` or `quarto` may stand two other folders (whole paths), for the site and for what lies on the way to it.

nbdev turns each notebook into a page: hidden and exported cells go, names in backticks become links. Four things are
added. The menu is the folders. In place of an exported cell stands the reference of what it defines, taken from the
imported module, so that no other code is run; outputs are those that the notebooks hold. Links lead to pages of the
site wherever it lies. And the preview needs no Quarto: zensical builds it from Markdown.
"""
import ast, base64, html, importlib, inspect, os, re, shutil, subprocess, sys, textwrap
from importlib.metadata import entry_points
from pathlib import Path
from posixpath import normpath, relpath
from types import SimpleNamespace

import yaml

ROOT = Path(__file__).resolve().parents[1]
os.environ['IN_TEST'] = '1' # nbdev then writes no files of its own
os.chdir(ROOT) # where nbdev looks for settings.ini

from execnb.nbio import mk_cell, read_nb, write_nb
from fastcore.docments import DocmentTbl
from nbdev import doclinks
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, add_show_docs, exec_show_docs

from density import FOLDERS

NBS = ROOT/'nbs'

# The menu

PAGES = {'Which tool when': 'which_tool', 'From a shell': 'commands', 'Nets and recipes': 'nets',
         'What you can see': 'checklist', 'Results': 'results', 'Benchmarks': 'benchmarks', 'Scaling': 'scaling',
         'Methods': 'methods', 'Promises': 'promises'}

def menu(nbs:Path=NBS) -> dict: # Title -> notebook, list of notebooks, or a dict of the same kind
    "The left menu, as paths relative to `nbs`: what a newcomer reads, then the folders in the order of imports"
    tree = {'Home': 'index.ipynb', 'Tutorials': numbered(nbs, 'tutorials'),
            **{title: f'pages/{name}.ipynb' for title, name in PAGES.items()},
            'API': {**{f: [f'{f}/index.ipynb', *numbered(nbs, f)] for f in FOLDERS}, 'fastcifar': numbered(nbs, '.')}}
    check_menu(leaves(tree), nbs)
    return tree

def numbered(nbs:Path, folder:str) -> list:
    "The notebooks of a folder whose names begin with a number"
    return [p.relative_to(nbs).as_posix() for p in sorted((nbs/folder).glob('[0-9][0-9]_*.ipynb'))]

def leaves(tree) -> list:
    "The notebooks of a menu, in order"
    if isinstance(tree, str): return [tree]
    return [n for t in (tree.values() if isinstance(tree, dict) else tree) for n in leaves(t)]

def check_menu(listed:list, nbs:Path):
    "Stop if the menu and the notebooks are not the same"
    found = {p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    if left := found - {*listed}:
        raise SystemExit(f'no section of the menu names {", ".join(sorted(left))}: '
                         'begin its name with two digits, in one of the folders, or add it to PAGES in tools/docs.py')
    if missing := {*listed} - found:
        raise SystemExit(f'the menu names {", ".join(sorted(missing))}, which nbs/ does not have: '
                         'see PAGES in tools/docs.py and FOLDERS in tools/density.py')

def page(notebook:str) -> str:
    "`models/03_sepnet.ipynb` -> `models/sepnet`, as nbdev names pages"
    return doclinks._nbpath2html(Path(notebook)).with_suffix('').as_posix()

# Names, and the links to them

def find(name:str, module):
    "A function, class or method of a module, by its dotted name"
    for part in name.split('.'): module = inspect.getattr_static(module, part)
    return getattr(module, 'fget', None) or getattr(module, '__func__', module) # of a property or class method

def is_private(name:str) -> bool: return any(part.startswith('_') for part in name.split('.'))

def has_entry(name:str, module) -> bool:
    "Is this name explained on a page? Methods without a docstring and those that are dispatched by type are not"
    if is_private(name): return False
    if '.' not in name: return True
    try: method = find(name, module)
    except AttributeError: return False
    return inspect.isfunction(method) and bool(method.__doc__)

def own_index() -> dict:
    "nbdev's index of our names, without those that a link would look for in vain"
    from fastcifar._modidx import d
    def explained(module, names):
        imported = importlib.import_module(module)
        return {k: v for k, v in names.items() if has_entry(k.removeprefix(f'{module}.'), imported)}
    return {**d, 'syms': {module: explained(module, names) for module, names in d['syms'].items()}}

def with_own_index(group):
    "The entry points of a group, with this checkout's index in the place of an installed one"
    others = [e for e in entry_points(group=group) if e.name != 'fastcifar']
    return [*others, SimpleNamespace(name='fastcifar', load=own_index)]

doclinks.entry_points = with_own_index # nbdev looks for indexes among the installed packages only

class links(Processor):
    "Links lead to pages of the site, wherever it lies, and to the repository for everything else"
    def cell(self, cell):
        here = Path(self.nb.path_).resolve().relative_to(NBS).parent.as_posix()
        def linked(text): return re.sub(r'(?<=\]\()[^)\s]+(?=\))', lambda m: self.target(m[0], here), joined(text))
        if cell.cell_type == 'markdown': cell.source = linked(cell.source)
        for o in cell.get('outputs', []):
            if 'text/markdown' in o.get('data', {}): o.data['text/markdown'] = linked(o.data['text/markdown'])

    def target(self, url, here):
        "Where a link of a notebook in the folder `here` leads on the site"
        c = get_config()
        if url.startswith(host := f'{c.doc_host}{c.doc_baseurl}/'): return relpath(url.removeprefix(host), here)
        if re.match(r'[a-z]+:|#', url): return url
        path, mark, anchor = url.partition('#')
        path = normpath(f'{here}/{path}')
        if path.endswith('.ipynb'): return relpath(f'{page(path)}.html', here) + mark + anchor
        if path.startswith('../'): return f'{c.git_url}/blob/{c.branch}/{path[3:]}{mark}{anchor}'
        return url

# The reference

def fence(text:str, language:str='') -> str:
    "A block of code; four backticks, since docstrings and outputs may hold three"
    return f'````{language}\n{text.rstrip()}\n````'

def joined(text) -> str: return text if isinstance(text, str) else ''.join(text)

def signature(node, obj) -> str:
    "The parameters as they stand in the source; of a class without `__init__`, as Python reports them"
    if isinstance(node, ast.ClassDef): node = next((n for n in node.body if getattr(n, 'name', '') == '__init__'), None)
    if node is None:
        try: return re.sub(r'^\(self(, )?', '(', str(inspect.signature(obj)))
        except ValueError: return ''
    node.args.args = [a for a in node.args.args if a.arg not in ('self', 'cls')]
    return f'({ast.unparse(node.args)})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')

def parameters(obj) -> str:
    "The table of the parameters; a comment of several lines stays in its cell"
    return re.sub(r'\n(?!\|)', ' ', str(DocmentTbl(obj)).strip())

def reference(name:str, node, obj, level:int=3) -> str:
    "The entry of a function, class or method: heading, link to the source, signature, docstring, table of parameters"
    c, kind = get_config(), 'class ' if inspect.isclass(obj) else ''
    path, line = Path(inspect.getsourcefile(inspect.unwrap(obj))).relative_to(ROOT), inspect.getsourcelines(obj)[1]
    call = textwrap.fill(f'{kind}{name}{signature(node, obj)}', 80, subsequent_indent='    ',
                         break_long_words=False, break_on_hyphens=False)
    parts = [f'{"#" * level} {name} {{#{name.lower()}}}',
             f'[Source]({c.git_url}/blob/{c.branch}/{path}#L{line}){{.source}}',
             f'```python\n{call}\n```', inspect.cleandoc(obj.__doc__ or ''), parameters(obj)]
    return '\n\n'.join(p for p in parts if p)

def constant(name:str, source:str) -> str:
    "The entry of a constant is the line that defines it; its anchor keeps the case: a class may differ in case alone"
    return f'### {name} {{#{name}}}\n\n```python\n{source}\n```'

def entries(node, source:str, module):
    "The entries of what a statement of an exported cell defines"
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        names = doclinks.patch_name(node) # several, where one function is put into several classes
        for n in [names] if isinstance(names, str) else names:
            if not is_private(n): yield reference(n, node, find(n, module))
    if isinstance(node, ast.ClassDef) and not is_private(node.name):
        for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
            if has_entry(n := f'{node.name}.{method.name}', module): yield reference(n, method, find(n, module), 4)
    if isinstance(node, ast.Assign):
        text = '\n'.join(source.splitlines()[node.lineno - 1:node.end_lineno])
        names = [t.id for t in node.targets if isinstance(t, ast.Name) and t.id != '__all__']
        yield from (constant(n, text) for n in names if n in module.__all__)

class describe(Processor):
    "Puts the reference of what an exported cell defines after it, where nbdev's `show_doc` would run the cells"
    def begin(self):
        named = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(c.source for c in self.nb.cells), re.M)
        if not named or named[1].endswith('__init__'): return
        module = importlib.import_module(f'fastcifar.{named[1]}')
        exported = [c for c in self.nb.cells if 'export' in c.directives_]
        def entries_of(c): return [e for node in ast.parse(c.source).body for e in entries(node, c.source, module)]
        found = {c.idx_: entries_of(c) for c in exported}
        if not any(found.values()): # a module that defines nothing shows its source
            found = {c.idx_: [fence(c.source, 'python')] for c in exported}
        for i in reversed(found): self.nb.cells[i + 1:i + 1] = [mk_cell(e, 'markdown') for e in found[i]]

class Pages(FilterDefaults):
    "nbdev's processors, with these for its reference and its links"
    def base_procs(self):
        own = {add_show_docs: [describe], exec_show_docs: []}
        return [p for theirs in super().base_procs() for p in own.get(theirs, [theirs])] + [links]

def processed(notebook:str):
    "A notebook ready for the page"
    nb = with_opening(read_nb(NBS/notebook))
    Pages()(nb)
    return nb

def with_opening(nb):
    "A notebook whose first cell has title and description alone; what else stands there, nbdev would drop"
    first = nb.cells[0]
    head = re.match(r'# .*(\n+>.*)?', first.source)
    if not head or not (rest := first.source[head.end():].strip()): return nb
    first.source = head[0]
    nb.cells.insert(1, mk_cell(rest, 'markdown'))
    for i, cell in enumerate(nb.cells): cell.idx_ = i
    return nb

# The Markdown of a page

def shown(output, alt:str, save) -> str:
    "The Markdown of one output; `save` takes the bytes and suffix of a picture and returns its address"
    if output.output_type == 'stream':
        text = joined(output.text) if output.name == 'stdout' else ''
        return fence(text, 'text') if text.strip() else ''
    data = {k: joined(v) for k, v in output.get('data', {}).items()}
    for kind in ('png', 'jpeg'):
        if picture := data.get(f'image/{kind}'):
            return f'<img class="plot" alt="{html.escape(alt)}" src="{save(base64.b64decode(picture), kind)}">'
    if 'text/html' in data: return plain_html(data['text/html'])
    if 'text/markdown' in data: return data['text/markdown']
    return fence(data['text/plain'], 'text') if 'text/plain' in data else ''

def plain_html(text:str) -> str:
    "The tables of an HTML output without their styles, or all of it if it has none; nothing of a progress bar"
    def bare(tag): return f'<{tag[1]}{"".join(re.findall(r" (?:row|col)span=.[0-9]+.", tag[0]))}>'
    if tables := re.findall(r'<table.*?</table>', text, re.S):
        return '\n\n'.join(re.sub(r'<(table|tr|th|td)\b[^>]*>', bare, t) for t in tables)
    return '' if '<progress' in text or not re.sub(r'<[^>]*>', '', text).strip() else text

def code_cell(cell, source:str, heading:str, save) -> list:
    "The Markdown of a code cell and of its outputs"
    options = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*)$', cell.source, re.M))
    alt = options.get('fig-alt', f'Output of the code above, under “{heading}”').strip('"\'')
    code = [fence(source, 'python')] if source and options.get('echo') != 'false' else []
    outputs = [s for o in cell.get('outputs', []) if (s := shown(o, alt, save))]
    if not outputs or options.get('output') == 'asis': return code + outputs
    return [*code, '<div class="output" markdown>', *outputs, '</div>']

def markdown(nb, save) -> str:
    "The page of a processed notebook"
    about = nb.frontmatter_
    parts, heading = [f'# {about["title"]}', about.get('description', '')], about['title']
    for cell in nb.cells:
        source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if cell.cell_type == 'code': parts += code_cell(cell, source, heading, save)
        if cell.cell_type != 'markdown': continue
        if not source.startswith('<!-- WARNING'): parts.append(source)
        for last in re.findall(r'^#+ (.+)$', source, re.M)[-1:]: heading = re.sub(r' \{#.*\}$', '', last)
    return '\n\n'.join(p for p in parts if p) + '\n'

# The offline preview, built by zensical

def accessible(text:str) -> str:
    "A page for those who hear it: headings go down one level at a time, and an empty cell is no heading of a column"
    above = []
    def level(m):
        if not m[1]:
            while above and above[-1] >= m[2]: above.pop()
            above.append(m[2])
        return f'<{m[1]}h{len(above)}'
    head, article, rest = text.partition('<article')
    article, end, rest = (article + rest).partition('</article>')
    article = re.sub(r'<th([^>]*)>(?:\s|&nbsp;)*</th>', r'<td\1></td>', article)
    return head + re.sub(r'<(/?)h([1-6])\b', level, article) + end + rest

def titled(tree, titles:dict):
    "The menu as MkDocs and zensical read it"
    if isinstance(tree, str): return {titles[tree]: f'{page(tree)}.md'}
    if isinstance(tree, list): return [titled(t, titles) for t in tree]
    return [{k: f'{page(v)}.md' if isinstance(v, str) else titled(v, titles)} for k, v in tree.items()]

def theme() -> dict:
    "Light or dark as the reader's system is, with a switch; fonts of the system"
    modes = ('light', 'default', 'lucide/sun', 'dark'), ('dark', 'slate', 'lucide/moon', 'light')
    palette = [dict(media=f'(prefers-color-scheme: {mode})', scheme=scheme,
                    toggle=dict(icon=icon, name=f'Switch to {other} mode')) for mode, scheme, icon, other in modes]
    features = ['navigation.sections', 'navigation.footer', 'navigation.top', 'content.code.copy', 'search.highlight']
    return dict(name='material', font=False, features=features, palette=palette)

def config(tree:dict, titles:dict) -> dict:
    "The configuration of the preview, which loads nothing from other hosts"
    c = get_config()
    source = dict(icon='fontawesome/brands/git-alt', link=c.git_url, name='Source')
    extensions = ['attr_list', 'md_in_html', 'tables', 'pymdownx.superfences',
                  {'pymdownx.highlight': dict(use_pygments=True)}, {'toc': dict(permalink=True, toc_depth='2-3')}]
    return dict(site_name=c.title, site_description=c.description, docs_dir='pages', site_dir='site',
                use_directory_urls=False, nav=titled(tree, titles), theme=theme(), plugins=['search'],
                extra_css=['docs.css'], extra_javascript=['docs.js'], extra=dict(generator=False, social=[source]),
                markdown_extensions=extensions)

def empty(folder:Path) -> Path:
    "`folder`, new and empty"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

def copy_images(folder:Path):
    "Put the pictures that notebooks may show where their pages will look for them"
    for p in NBS.rglob('images/*'):
        (folder/p.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, folder/p.relative_to(NBS))

def write_page(nb, out:Path) -> str:
    "Write the Markdown of a notebook, and its pictures into a folder beside it"
    files = out.with_name(f'{out.stem}_files')
    def save(data, kind):
        files.mkdir(parents=True, exist_ok=True)
        name = f'{len(list(files.iterdir()))}.{kind}'
        (files/name).write_bytes(data)
        return f'{files.name}/{name}'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text := markdown(nb, save))
    return text

def preview(site:Path=ROOT/'_docs', work:Path=ROOT/'_proc') -> Path:
    "Build the offline preview in `site`"
    tree, docs, about, texts = menu(), empty(work)/'pages', {}, {}
    for notebook in leaves(tree):
        nb = processed(notebook)
        about[notebook] = nb.frontmatter_
        texts[page(notebook)] = write_page(nb, docs/f'{page(notebook)}.md')
    for name in ('docs.css', 'docs.js'): shutil.copy(ROOT/'tools'/name, docs)
    copy_images(docs)
    titles = {notebook: a['title'] for notebook, a in about.items()}
    (work/'mkdocs.yml').write_text(yaml.safe_dump(config(tree, titles), sort_keys=False))
    command = [sys.executable, '-m', 'zensical', 'build', '--clean', '--config-file', work/'mkdocs.yml']
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(work/'site', site) # zensical writes beside its configuration only
    for name, text in texts.items(): (site/f'{name}.html.md').write_text(text) # where llmstxt.org wants it
    for p in site.rglob('*.html'): p.write_text(accessible(p.read_text()))
    (site/'llms.txt').write_text(llms(tree, about))
    return site

def llms(tree:dict, about:dict) -> str:
    "The site in one text for language models: every page with a line on what it holds"
    c = get_config()
    def line(n):
        title, what = about[n]['title'], about[n].get('description', '')
        return f'- [{title}]({c.doc_host}{c.doc_baseurl}/{page(n)}.html.md): {what}'
    groups = {'Start': ['index.ipynb'], 'Tutorials': tree['Tutorials'], 'Evidence': [tree[k] for k in PAGES],
              **{f'API: {k}': v for k, v in tree['API'].items()}}
    sections = [f'## {k}\n\n' + '\n'.join(map(line, notebooks)) for k, notebooks in groups.items()]
    return '\n\n'.join([f'# {c.title}', f'> {c.description}', *sections]) + '\n'

# The published site, built by Quarto

def sidebar(tree) -> list:
    "The menu as Quarto reads it"
    if isinstance(tree, list): return tree
    return [dict(text=k, href=v) if isinstance(v, str) else dict(section=k, contents=sidebar(v))
            for k, v in tree.items()]

def quarto_config(tree:dict) -> dict:
    "Quarto's configuration; it runs no code"
    c = get_config()
    website = {'title': c.title, 'description': c.description, 'site-url': f'{c.doc_host}{c.doc_baseurl}',
               'repo-url': c.git_url, 'search': True, 'sidebar': dict(style='floating', contents=sidebar(tree))}
    page_format = {'theme': dict(light='cosmo', dark='darkly'), 'toc': True, 'keep-md': True}
    return dict(project={'type': 'website', 'output-dir': '_site', 'resources': ['llms.txt']}, website=website,
                format={'html': page_format, 'commonmark': 'default'}, execute=dict(enabled=False))

def quarto_files(work:Path=ROOT/'_proc') -> Path:
    "Fill `work` with the processed notebooks and Quarto's configuration"
    tree, about = menu(), {}
    empty(work)
    for notebook in leaves(tree):
        nb = processed(notebook)
        about[notebook] = nb.frontmatter_
        (work/notebook).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, work/notebook)
    copy_images(work)
    (work/'_quarto.yml').write_text(yaml.safe_dump(quarto_config(tree), sort_keys=False))
    (work/'llms.txt').write_text(llms(tree, about))
    return work

def quarto(site:Path=ROOT/'_docs', work:Path=ROOT/'_proc'):
    "Build the published site in `site`"
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=quarto_files(work), check=True)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(work/'_site', site)

if __name__ == '__main__':
    how, *folders = sys.argv[1:] or ['preview']
    dict(preview=preview, quarto=quarto)[how](*map(Path, folders))
