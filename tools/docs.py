"""The documentation as a site, made from the notebooks.

`python tools/docs.py` builds the offline preview in `_docs/`; `python tools/docs.py quarto` builds the published site there, where Quarto is installed.
After `preview` or `quarto` may stand two other folders (whole paths), for the site and for what lies on the way to it.
nbdev turns each notebook into a page: hidden and exported cells go, names in backticks become links. In place of an exported cell stands the reference
of what it defines, taken from the imported module; no other code is run. Outputs are those that the notebooks hold."""
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
from nbdev.processors import FilterDefaults, add_show_docs, exec_show_docs
from nbdev.process import Processor

NBS = ROOT/'nbs'
# The menu, in the order a newcomer reads; the sections of the API are the folders.
PAGES = {'What you can see': 'pages/checklist', 'Results': 'pages/results', 'Benchmarks': 'pages/benchmarks', 'Scaling': 'pages/scaling', 'Methods': 'pages/methods'}
API = {'Data': 'data', 'Nets': 'models', 'Training': 'train', 'Understanding': 'interpret', 'Runs': 'runs', 'Trained nets': 'share', 'Studies': 'study',
       'Benchmarks': 'bench', 'Base and faces': '.'}

# The menu

def menu(nbs:Path=NBS) -> dict: # Title -> notebook, or a dict of the same kind
    "The left menu, as paths relative to `nbs`; a notebook without a place in it is an error"
    def of(folder): # its own page first
        index = [] if folder == '.' else sorted((nbs/folder).glob('index.ipynb'))
        return [p.relative_to(nbs).as_posix() for p in [*index, *sorted((nbs/folder).glob('[0-9][0-9]_*.ipynb'))]]
    tree = {'Home': 'index.ipynb', 'Tutorials': [f'tutorials/{p.name}' for p in sorted(nbs.glob('tutorials/*.ipynb'))],
            **{k: f'{v}.ipynb' for k, v in PAGES.items()}, 'API': {k: of(v) for k, v in API.items()}}
    found = {p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    listed = set(leaves(tree))
    if found - listed: raise SystemExit(f'no section of the menu names {", ".join(sorted(found - listed))}: add it to API or PAGES in tools/docs.py')
    if listed - found: raise SystemExit(f'the menu names {", ".join(sorted(listed - found))}, which nbs/ does not have: see PAGES in tools/docs.py')
    return tree

def leaves(tree) -> list:
    "The notebooks of a menu, in order"
    if isinstance(tree, str): return [tree]
    return [n for t in (tree.values() if isinstance(tree, dict) else tree) for n in leaves(t)]

def page(notebook:str) -> str:
    "`08_models.sepnet.ipynb` -> `models.sepnet`, as nbdev names pages"
    return doclinks._nbpath2html(Path(notebook)).with_suffix('').as_posix()

# A notebook, as nbdev's documentation shows it

def find(name:str, module):
    "A function, class or method of a module, by its dotted name"
    for part in name.split('.'): module = inspect.getattr_static(module, part)
    return getattr(module, 'fget', None) or getattr(module, '__func__', module) # the function of a property or class method

def has_entry(name:str, module) -> bool:
    "Is this name explained on a page? Private names are not, nor are methods without a docstring and those that are dispatched by type"
    if any(part.startswith('_') for part in name.split('.')): return False
    try: return '.' not in name or inspect.isfunction(f := find(name, module)) and bool(f.__doc__)
    except AttributeError: return False

def own_index() -> dict:
    "nbdev's index of our names, without those that a link would look for in vain"
    from fastcifar._modidx import d
    return {**d, 'syms': {m: {k: v for k, v in names.items() if has_entry(k.removeprefix(f'{m}.'), importlib.import_module(m))} for m, names in d['syms'].items()}}

# nbdev looks for indexes among the installed packages; this is ours, in any checkout
doclinks.entry_points = lambda group: [*(e for e in entry_points(group=group) if e.name != 'fastcifar'), SimpleNamespace(name='fastcifar', load=own_index)]

def fence(text:str, language:str='') -> str: return f'````{language}\n{text.rstrip()}\n````' # four, since docstrings and outputs may hold three

def signature(node, obj) -> str:
    "The parameters as they stand in the source; of a class without `__init__`, as Python reports them"
    if isinstance(node, ast.ClassDef): node = next((n for n in node.body if getattr(n, 'name', '') == '__init__'), None)
    if node is None:
        try: return re.sub(r'^\(self(, )?', '(', str(inspect.signature(obj)))
        except ValueError: return ''
    node.args.args = [a for a in node.args.args if a.arg not in ('self', 'cls')]
    return f'({ast.unparse(node.args)})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')

def reference(name:str, node, obj, level:int=3) -> str:
    "The entry of a function, class or method: heading, signature, docstring and a table of its parameters"
    c, call = get_config(), f'{"class " * inspect.isclass(obj)}{name}{signature(node, obj)}'
    path, line = Path(inspect.getsourcefile(inspect.unwrap(obj))).relative_to(ROOT), inspect.getsourcelines(obj)[1]
    parts = [f'{"#" * level} {name} {{#{name.lower()}}}', f'[Source]({c.git_url}/blob/{c.branch}/{path}#L{line}){{.source}}',
             '```python\n' + textwrap.fill(call, 100, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False) + '\n```',
             inspect.cleandoc(obj.__doc__ or ''), str(DocmentTbl(obj))]
    return '\n\n'.join(p for p in parts if p)

def constant(name:str, source:str) -> str:
    "The entry of a constant is the line that defines it; its anchor keeps the case, since a class may have the same name in other letters"
    return f'### {name} {{#{name}}}\n\n```python\n{source}\n```'

class describe(Processor):
    "Puts the reference of what an exported cell defines after it, in the place of nbdev's `show_doc`, which would run every cell that imports something"
    def begin(self):
        named = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(c.source for c in self.nb.cells), re.M)
        if not named or named[1].endswith('__init__'): return
        module, cells = importlib.import_module(f'fastcifar.{named[1]}'), [c for c in self.nb.cells if 'export' in c.directives_]
        found = {c.idx_: [e for node in ast.parse(c.source).body for e in self.entries(node, c.source, module)] for c in cells}
        if not any(found.values()): found = {c.idx_: [fence(c.source, 'python')] for c in cells} # a module that defines nothing shows its source
        for i in reversed(found): self.nb.cells[i + 1:i + 1] = [mk_cell(e, 'markdown') for e in found[i]]
    def entries(self, node, source, module):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = doclinks.patch_name(node)
            for n in [names] if isinstance(names, str) else names:
                if not any(part.startswith('_') for part in n.split('.')): yield reference(n, node, find(n, module))
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for m in node.body:
                if isinstance(m, ast.FunctionDef) and has_entry(n := f'{node.name}.{m.name}', module): yield reference(n, m, find(n, module), 4)
        if isinstance(node, ast.Assign):
            for n in [t.id for t in node.targets if isinstance(t, ast.Name) and t.id in module.__all__ and t.id != '__all__']:
                yield constant(n, '\n'.join(source.splitlines()[node.lineno - 1:node.end_lineno]))

def joined(text) -> str: return text if isinstance(text, str) else ''.join(text)

class links(Processor):
    "Links lead to pages of the site, wherever it lies, and to the repository for everything else"
    def cell(self, cell):
        here = Path(self.nb.path_).resolve().relative_to(NBS).parent.as_posix()
        def linked(text): return re.sub(r'(?<=\]\()[^)\s]+(?=\))', lambda m: self.target(m[0], here), joined(text))
        if cell.cell_type == 'markdown': cell.source = linked(cell.source)
        for o in cell.get('outputs', []):
            if 'text/markdown' in o.get('data', {}): o.data['text/markdown'] = linked(o.data['text/markdown'])
    def target(self, url, here):
        c = get_config()
        if url.startswith(host := f'{c.doc_host}{c.doc_baseurl}/'): return relpath(url.removeprefix(host), here)
        if re.match(r'[a-z]+:|#', url): return url
        path, mark, anchor = url.partition('#')
        path = normpath(f'{here}/{path}')
        if path.endswith('.ipynb'): return relpath(f'{page(path)}.html', here) + mark + anchor
        if path.startswith('../'): return f'{c.git_url}/blob/{c.branch}/{path[3:]}{mark}{anchor}'
        return url

class Pages(FilterDefaults):
    def base_procs(self): return [describe if p is add_show_docs else p for p in super().base_procs() if p is not exec_show_docs] + [links]

def processed(notebook:str):
    "A notebook ready for the page"
    nb = read_nb(NBS/notebook)
    Pages()(nb)
    return nb

# The offline preview: Markdown, built by zensical

def shown(output, alt:str, save) -> str:
    "The markdown of one output; `save` takes the bytes and suffix of a picture and returns its address"
    if output.output_type == 'stream': return fence(joined(output.text), 'text') if output.name == 'stdout' and joined(output.text).strip() else ''
    data = {k: joined(v) for k, v in output.get('data', {}).items()}
    for kind in ('png', 'jpeg'):
        if f'image/{kind}' in data: return f'<img class="plot" alt="{html.escape(alt)}" src="{save(base64.b64decode(data[f"image/{kind}"]), kind)}">'
    if 'text/html' in data: return plain_html(data['text/html'])
    if 'text/markdown' in data: return data['text/markdown']
    return fence(data['text/plain'], 'text') if 'text/plain' in data else ''

def plain_html(text:str) -> str:
    "The tables of an HTML output without styles of their own, or all of it if it has none; nothing of a progress bar"
    def bare(tag): return f'<{tag[1]}{"".join(re.findall(r" (?:row|col)span=.[0-9]+.", tag[0]))}>'
    if tables := re.findall(r'<table.*?</table>', text, re.S): return '\n\n'.join(re.sub(r'<(table|tr|th|td)\b[^>]*>', bare, t) for t in tables)
    return '' if '<progress' in text or not re.sub(r'<[^>]*>', '', text).strip() else text

def markdown(nb, save) -> str:
    "The page of a processed notebook"
    fm, heading = nb.frontmatter_, nb.frontmatter_['title']
    parts = [f'# {fm["title"]}', fm.get('description', '')]
    for cell in nb.cells:
        options, source = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*)$', cell.source, re.M)), re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if cell.cell_type == 'markdown':
            parts.append('' if source.startswith('<!-- WARNING') else source)
            heading = re.sub(r' \{#.*\}$', '', (re.findall(r'^#+ (.+)$', source, re.M) or [heading])[-1])
        if cell.cell_type != 'code': continue
        if source and options.get('echo') != 'false': parts.append(fence(source, 'python'))
        alt = options.get('fig-alt', f'Output of the code above, under “{heading}”').strip('"\'')
        outputs = [s for o in cell.get('outputs', []) if (s := shown(o, alt, save))]
        if outputs and options.get('output') != 'asis': outputs = ['<div class="output" markdown>', *outputs, '</div>']
        parts += outputs
    return '\n\n'.join(p for p in parts if p) + '\n'

def titled(tree, titles:dict):
    "The menu as MkDocs and zensical read it"
    if isinstance(tree, str): return {titles[tree]: f'{page(tree)}.md'}
    if isinstance(tree, list): return [titled(t, titles) for t in tree]
    return [{k: f'{page(v)}.md' if isinstance(v, str) else titled(v, titles)} for k, v in tree.items()]

def config(tree:dict, titles:dict) -> dict:
    "The configuration of the preview, which loads nothing from other hosts"
    c = get_config()
    return dict(site_name=c.title, site_description=c.description, docs_dir='pages', site_dir='site', use_directory_urls=False,
        nav=titled(tree, titles), extra_css=['docs.css'], extra=dict(generator=False, social=[dict(icon='fontawesome/brands/git-alt', link=c.git_url, name='Source')]), plugins=['search'],
        theme=dict(name='material', font=False, features=['navigation.sections', 'navigation.footer', 'navigation.top', 'content.code.copy', 'search.highlight'],
            palette=[dict(media=f'(prefers-color-scheme: {m})', scheme=s, toggle=dict(icon=i, name=f'Switch to {o} mode'))
                     for m, s, i, o in (('light', 'default', 'lucide/sun', 'dark'), ('dark', 'slate', 'lucide/moon', 'light'))]),
        markdown_extensions=['attr_list', 'md_in_html', 'tables', 'pymdownx.superfences', {'pymdownx.highlight': dict(use_pygments=True)}, {'toc': dict(permalink=True, toc_depth='2-3')}])

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

def preview(site:Path=ROOT/'_docs', work:Path=ROOT/'_proc') -> Path:
    "Build the offline preview in `site`"
    tree, docs, about, texts = menu(), empty(work)/'pages', {}, {}
    for notebook in leaves(tree):
        nb, out = processed(notebook), docs/f'{page(notebook)}.md'
        files = out.with_name(f'{out.stem}_files')
        def save(data, kind):
            files.mkdir(parents=True, exist_ok=True)
            name = f'{len(list(files.iterdir()))}.{kind}'
            (files/name).write_bytes(data)
            return f'{files.name}/{name}'
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(markdown(nb, save))
        about[notebook], texts[page(notebook)] = nb.frontmatter_, out.read_text()
    shutil.copy(ROOT/'tools/docs.css', docs)
    copy_images(docs)
    (work/'mkdocs.yml').write_text(yaml.safe_dump(config(tree, {k: v['title'] for k, v in about.items()}), sort_keys=False))
    subprocess.run([sys.executable, '-m', 'zensical', 'build', '--clean', '--config-file', work/'mkdocs.yml'], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(work/'site', site) # zensical writes beside its configuration only
    for name, text in texts.items(): (site/f'{name}.html.md').write_text(text) # where llmstxt.org wants the markdown of a page
    (site/'llms.txt').write_text(llms(tree, about))
    return site

def llms(tree:dict, about:dict) -> str:
    "The site in one text for language models: every page with a line on what it holds"
    c = get_config()
    def line(n): return f'- [{about[n]["title"]}]({c.doc_host}{c.doc_baseurl}/{page(n)}.html.md): {about[n].get("description", "")}'
    groups = {'Start': ['index.ipynb'], 'Tutorials': tree['Tutorials'], 'Evidence': [tree[k] for k in PAGES], **{f'API: {k}': v for k, v in tree['API'].items()}}
    return f'# {c.title}\n\n> {c.description}\n\n' + '\n\n'.join(f'## {k}\n\n' + '\n'.join(map(line, v)) for k, v in groups.items()) + '\n'

# The published site, built by Quarto

def sidebar(tree) -> list:
    "The menu as Quarto reads it"
    if isinstance(tree, list): return tree
    return [dict(text=k, href=v) if isinstance(v, str) else dict(section=k, contents=sidebar(v)) for k, v in tree.items()]

def quarto_files(work:Path=ROOT/'_proc') -> Path:
    "Fill `work` with the processed notebooks and Quarto's configuration"
    c, tree, about = get_config(), menu(), {}
    empty(work)
    for notebook in leaves(tree):
        nb = processed(notebook)
        about[notebook] = nb.frontmatter_
        (work/notebook).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, work/notebook)
    copy_images(work)
    site = dict(title=c.title, description=c.description, search=True, sidebar=dict(style='floating', contents=sidebar(tree)), **{'site-url': f'{c.doc_host}{c.doc_baseurl}', 'repo-url': c.git_url})
    made = dict(project={'type': 'website', 'output-dir': '_site', 'resources': ['llms.txt']}, website=site,
                format={'html': {'theme': dict(light='cosmo', dark='darkly'), 'toc': True, 'keep-md': True}, 'commonmark': 'default'}, execute=dict(enabled=False))
    (work/'_quarto.yml').write_text(yaml.safe_dump(made, sort_keys=False))
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
