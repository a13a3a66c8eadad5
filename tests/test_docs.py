"""The documentation: every page built, linked, filled and readable, and every public name in it. Built once, as
`make docs` does, into a temporary folder."""
import ast, functools, http.server, importlib, inspect, json, re, subprocess, sys, threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytest.importorskip('nbdev', reason='the dev extra is not installed')
pytest.importorskip('zensical', reason='the dev extra is not installed')
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]

def run_docs(code):
    "Python code about `docs`, in a process of its own"
    head = f'import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT/"tools")!r}); import docs\n'
    return subprocess.run([sys.executable, '-c', head + code], capture_output=True, text=True)

def tree_state():
    "What a build must leave alone: the names of all files, and the files that nbdev likes to write"
    names = {p for d in ('nbs', 'fastcifar', 'tools') for p in (ROOT/d).rglob('*')
             if not {'__pycache__', '.ipynb_checkpoints'} & {*p.parts}}
    return names, [(ROOT/f).read_bytes() for f in ('settings.ini', 'README.md', 'pyproject.toml')]

@pytest.fixture(scope='session')
def built(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp('docs'), tree_state()
    done = run_docs(f'folder = Path({str(folder)!r}); docs.preview(folder/"site", folder/"work"); '
                    'docs.quarto_files(folder/"quarto")')
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree_state() == before, 'the build wrote into the work tree'
    return folder

@pytest.fixture(scope='session')
def site(built): return built/'site'

@functools.cache
def parsed(path): return BeautifulSoup(Path(path).read_bytes(), 'html.parser')

def pages(site): return sorted(p for p in site.rglob('*.html') if p.name != '404.html')

def name(site, page): return page.relative_to(site).as_posix()

def main_text(page): return parsed(page).find('article').get_text(' ', strip=True)

# The checks, as functions of a folder, so that they can be shown something broken

def broken_links(site) -> list:
    "Links and anchors that lead nowhere within the site"
    wrong, base = [], 'http://site/'
    for page in sorted(site.rglob('*.html')):
        for tag in parsed(page).find_all(['a', 'img', 'script', 'link']):
            url = tag.get('href') or tag.get('src')
            if not url or not (full := urljoin(base + name(site, page), url)).startswith(base): continue
            parts = urlsplit(full)
            target = site/unquote(parts.path[1:])
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): wrong.append(f'{name(site, page)}: {url}')
            elif parts.fragment and target.suffix == '.html' and not parsed(target).find(id=unquote(parts.fragment)):
                wrong.append(f'{name(site, page)}: no anchor {url}')
    return wrong

LOADING = ['script', 'img', 'iframe', 'source', 'video', 'audio', 'embed', 'object', 'link', 'style']

def outside_resources(site) -> list:
    "What a browser would load from elsewhere just by opening a page"
    def foreign(url): return bool(re.match(r'(https?:)?//', url or ''))
    wrong = []
    for page in sorted(site.rglob('*.html')):
        for tag in parsed(page).find_all(LOADING):
            if tag.name == 'link' and set(tag.get('rel', [])) & {'canonical', 'next', 'prev', 'alternate'}: continue
            loaded = any(foreign(tag.get(a)) for a in ('src', 'href', 'data'))
            if loaded or re.search(r'(url\(|@import)\W*(https?:)?//', tag.string or ''):
                wrong.append(f'{name(site, page)}: {str(tag)[:100]}')
    for css in site.rglob('*.css'):
        if re.search(r'(url\(|@import\s)\s*["\']?(https?:)?//', css.read_text()): wrong.append(name(site, css))
    return wrong

def empty_pages(site) -> list: return [name(site, p) for p in pages(site) if len(main_text(p)) < 100]

def images_without_alt(site) -> list:
    return [f'{name(site, p)}: {str(i)[:80]}' for p in pages(site) for i in parsed(p).find_all('img')
            if not (i.get('alt') or '').strip()]

def literal_markdown(site) -> list:
    "Markup that reached the reader as it was typed"
    wrong = []
    for p in pages(site):
        article = BeautifulSoup(str(parsed(p).find('article')), 'html.parser')
        for code in article.find_all(['pre', 'code']): code.decompose()
        typed = r'\$\$.{0,40}|:::.{0,40}|\{[#.][\w.]+\}|\]\(.{0,40}|```.{0,20}'
        wrong += [f'{name(site, p)}: {m}' for m in re.findall(typed, article.get_text())]
    return wrong

def ragged_tables(site) -> list:
    "Tables with rows of different length"
    wrong = []
    for p in pages(site):
        for table in parsed(p).find_all('table'):
            below, lengths = {}, set() # row number -> cells that reach down into it
            for i, row in enumerate(table.find_all('tr')):
                cells = row.find_all(['th', 'td'])
                lengths.add(sum(int(c.get('colspan', 1)) for c in cells) + below.get(i, 0))
                for c in cells:
                    for j in range(1, int(c.get('rowspan', 1))): below[i + j] = below.get(i + j, 0) + 1
            if len(lengths) > 1: wrong.append(f'{name(site, p)}: {table.get_text(" ", strip=True)[:80]}')
    return wrong

CHECKS = broken_links, outside_resources, empty_pages, images_without_alt, literal_markdown, ragged_tables

@pytest.mark.parametrize('check', CHECKS, ids=lambda f: f.__name__)
def test_site(site, check):
    assert len(pages(site)) > 30
    assert check(site) == []

BROKEN = {'broken_links': '<a href="gone.html">x</a>',
          'outside_resources': '<script src="https://example.org/x.js"></script>', 'empty_pages': '',
          'images_without_alt': '<img src="index.html">',
          'literal_markdown': 'a formula $$x^2$$',
          'ragged_tables': '<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>'}

@pytest.mark.parametrize('check', CHECKS, ids=lambda f: f.__name__)
def test_checks_can_fail(tmp_path, check):
    good = ('<article><h1 id="top">Title</h1><a href="#top">up</a> <a href="index.html#top">up</a> '
            '<a href="https://example.org">away</a> <img src="a.png" alt="a cat"> ' + 'word ' * 60)
    (tmp_path/'a.png').touch()
    (tmp_path/'index.html').write_text(good + '</article>')
    assert check(tmp_path) == []
    body = '' if check is empty_pages else good
    (tmp_path/'index2.html').write_text(f'{body or "<article>"}{BROKEN[check.__name__]}</article>')
    assert check(tmp_path)

def test_a_missing_anchor_is_a_broken_link(tmp_path):
    (tmp_path/'index.html').write_text('<a href="#here">x</a><p id="there">')
    assert broken_links(tmp_path) == ['index.html: no anchor #here']

# The menu

def leaves(nav): return [l for e in nav for v in e.values() for l in ([v] if isinstance(v, str) else leaves(v))]

def test_menu_and_pages_are_the_same(built, site):
    nav = yaml.safe_load((built/'work/mkdocs.yml').read_text())['nav']
    assert [next(iter(e)) for e in nav] == ['Home', 'Tutorials', 'Which tool when', 'From a shell', 'Nets and recipes',
                                            'What you can see', 'Results', 'Benchmarks', 'Scaling', 'Methods', 'Promises',
                                            'API']
    expected = {l.replace('.md', '.html') for l in leaves(nav)}
    assert {name(site, p) for p in pages(site)} == expected
    for page in ('index.html', 'tutorials/faster.html'): # and the menu that is shown, on pages of two depths
        shown = {urlsplit(urljoin(f'http://site/{page}', a['href'])).path[1:]
                 for a in parsed(site/page).select('.md-nav--primary a.md-nav__link') if '#' not in a['href']}
        assert shown == expected - {page} or shown == expected
    tutorials = [l for e in nav if 'Tutorials' in e for l in leaves(e['Tutorials'])]
    assert len(tutorials) == len([*ROOT.glob('nbs/tutorials/*.ipynb')])

@pytest.mark.parametrize('notebook', ['new.ipynb', 'pages/new.ipynb'])
def test_a_notebook_outside_the_menu_stops_the_build(tmp_path, notebook):
    for p in ROOT.rglob('nbs/**/*.ipynb'):
        (tmp_path/p.relative_to(ROOT/'nbs')).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/p.relative_to(ROOT/'nbs')).touch()
    (tmp_path/notebook).touch()
    done = run_docs(f'docs.menu(Path({str(tmp_path)!r}))')
    assert done.returncode and len(done.stderr.splitlines()) == 1 and notebook in done.stderr

# Tutorials in Colab

TUTORIALS = sorted((ROOT/'nbs/tutorials').glob('*.ipynb'))

def sources(notebook): return [''.join(c['source']) for c in json.loads(notebook.read_text())['cells']]

def setting(name): return re.search(rf'^{name} = (.+)$', (ROOT/'settings.ini').read_text(), re.M)[1]

@pytest.mark.parametrize('notebook', TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_opens_in_colab(site, notebook):
    title, link, install, *_ = sources(notebook)
    place = '/'.join(map(setting, ('user', 'repo'))) + f'/blob/{setting("branch")}/nbs/tutorials/{notebook.name}'
    assert title.startswith('# ')
    assert link == f'[Open in Colab](https://colab.research.google.com/github/{place})'
    assert install == sources(TUTORIALS[0])[2] and install.startswith('#| hide\n')
    page = site/f'tutorials/{notebook.stem[3:]}.html'
    assert 'Open in Colab' in main_text(page) and 'google.colab' not in page.read_text()

@pytest.mark.parametrize('in_colab', [False, True])
def test_a_tutorial_is_installed_in_colab_alone(monkeypatch, in_colab):
    "The repository is fetched, since some tutorials read its results, and installed; nothing is done elsewhere"
    from IPython.core.inputtransformer2 import TransformerManager
    ran = []
    class Shell:
        system = staticmethod(lambda command: ran.append(command))
        run_line_magic = staticmethod(lambda name, line: ran.append(f'%{name} {line}'))
    if in_colab: monkeypatch.setitem(sys.modules, 'google.colab', object())
    exec(TransformerManager().transform_cell(sources(TUTORIALS[0])[2]), dict(get_ipython=lambda: Shell))
    assert len(ran) == (3 if in_colab else 0)
    if not in_colab: return
    fetch, enter, install = ran
    assert f'git clone -q --depth 1 {setting("git_url")} /content/fastcifar' in fetch
    assert enter.split()[-1] == '/content/fastcifar/nbs/tutorials' and (ROOT/enter.split('fastcifar/')[1]).is_dir()
    assert install == '%pip install -q "/content/fastcifar[onnx]"'

# Every public name

def modules():
    "Module name -> its public names, as the export wrote them"
    res = {}
    for p in sorted((ROOT/'fastcifar').rglob('*.py')):
        lists = re.search(r'^__all__ = (\[.*?\])$', p.read_text(), re.M | re.S)
        if not lists: continue
        module = '.'.join(p.relative_to(ROOT/'fastcifar').with_suffix('').parts)
        res[module.replace('__main__', 'main')] = ast.literal_eval(lists.group(1))
    return res

def undocumented(site, module, names) -> list:
    "Public names of a module that its page does not explain, or that have no docstring"
    article = parsed(site/f'{module.replace(".", "/")}.html').find('article')
    source, wrong = importlib.import_module(f'fastcifar.{module}'), []
    for n in names:
        heading, obj = article.find(id=n) or article.find(id=n.lower()), getattr(source, n)
        if heading is None: wrong.append(f'{module}.{n} is not on its page')
        elif inspect.isfunction(obj) or inspect.isclass(obj):
            words = re.findall(r'\w+', inspect.getdoc(obj) or '')
            entry = ' '.join(s.get_text(' ') for s in heading.find_all_next(['p', 'table', 'pre', 'div'], limit=8))
            if not words: wrong.append(f'{module}.{n} has no docstring')
            elif not set(words[:5]) <= set(re.findall(r'\w+', entry)):
                wrong.append(f'{module}.{n}: its page lacks the docstring')
    return wrong

def test_every_public_name_is_documented(site):
    known = {k: v for k, v in modules().items() if k != 'main' and not k.endswith('__init__')}
    assert len(known) > 25 and sum(map(len, known.values())) > 150
    assert [w for module, names in known.items() for w in undocumented(site, module, names)] == []

def test_an_undocumented_name_is_noticed(site):
    wrong = undocumented(site, 'basics', ['check_name', 'json', 'Path'])
    assert wrong == ['basics.json is not on its page', 'basics.Path is not on its page']

def test_parameters_stand_in_a_table(site):
    table = parsed(site/'basics.html').find(id='check_name').find_next('table')
    assert 'What was asked for' in table.get_text() and 'Returns' in table.get_text()

def test_a_comment_of_several_lines_stays_in_its_cell(site):
    rows = parsed(site/'data/load.html').find(id='load_data').find_next('table').find_all('tr')
    cells = [[c.get_text(' ', strip=True) for c in row.find_all(['td', 'th'])] for row in rows]
    assert [row[0] for row in cells] == ['', 'source', 'convert', 'Returns'] and cells[1][-1].endswith('arrays')

# Pages of the API open with the call that a user needs

OPENINGS = ['runs/config', 'runs/run', 'runs/reopen', 'models/zoo'] # each needs what those before it made
FOR_USERS = 'data', 'models', 'train', 'interpret', 'runs', 'share', 'study' # folders

def opening(site, page):
    "The first code of a page, if it stands before the reference"
    text = (site/f'{page}.html.md').read_text()
    first = re.search(r'^(```+)\w*\n(.*?)^\1', text, re.M | re.S)
    return first[2] if first.start() < text.find('{.source}') else ''

def is_open(site, page):
    "Does a page begin with a call, or does it say which other page is for users?"
    return bool(re.search(r'\w\(', opening(site, page))) or 'An inner module' in main_text(site/f'{page}.html')

def test_pages_of_the_api_open_with_a_call(site):
    pages = [m.replace('.', '/') for m in modules() if m.split('.')[0] in FOR_USERS and not m.endswith('__init__')]
    assert len(pages) > 40
    assert [page for page in pages if not is_open(site, page)] == []
    assert not is_open(site, 'basics')

def test_the_opening_calls_work(site, tmp_path):
    "One after the other, on the digits"
    code = 'from fastcifar.all import *\n' + ''.join(opening(site, page) for page in OPENINGS)
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'runs/mine/report.html').is_file()

def test_the_prose_below_a_title_is_kept(site):
    text = main_text(site/'train/learner.html')
    assert 'Afterwards it is a fastai learner like any other' in text

# What goes with the site

def test_llms_txt_names_every_page(site):
    text = (site/'llms.txt').read_text()
    assert re.match(r'# fastcifar\n\n> .+\n\n## ', text)
    entries = re.findall(r'^- \[(.+)\]\(https://[^/]+/fastcifar/(.+)\.md\): (.+)$', text, re.M)
    assert len(entries) == text.count('\n- ') and sorted(e[1] for e in entries) == [name(site, p) for p in pages(site)]
    for title, page, about in entries:
        assert title and about.endswith('.'), page
        assert (site/f'{page}.md').read_text().startswith(f'# {title}\n')

def test_search_finds_a_function(site):
    items = json.loads((site/'search.json').read_text())['items']
    assert any('check_name' in i['location'] for i in items)

def test_quarto_gets_the_same_menu(built):
    made = yaml.safe_load((built/'quarto/_quarto.yml').read_text())
    def hrefs(item):
        if isinstance(item, str): return [item]
        return [item['href']] if 'href' in item else [h for i in item['contents'] for h in hrefs(i)]
    notebooks = hrefs(made['website']['sidebar'])
    nav = leaves(yaml.safe_load((built/'work/mkdocs.yml').read_text())['nav'])
    assert [re.sub(r'(^|/)\d+_', r'\1', n).replace('.ipynb', '.md') for n in notebooks] == nav
    for n, page in zip(notebooks, nav):
        head = json.loads((built/'quarto'/n).read_text())['cells'][0]
        assert head['cell_type'] == 'raw'
        assert yaml.safe_load(''.join(head['source']).strip('-\n'))['output-file'] == f'{Path(page).stem}.html'
    assert (built/'quarto/llms.txt').read_text() == (built/'site/llms.txt').read_text()
    assert 'tools/docs.py quarto' in (ROOT/'.github/workflows/docs.yaml').read_text()

# In a browser

@pytest.fixture(scope='session')
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

# what lies beyond its box without a way to get there, code that a copy button covers, and cells one word wide
UNREADABLE = """() => [...document.querySelectorAll('article :is(pre > code, td, th, img)')].flatMap(e => {
    const box = e.getBoundingClientRect(), cut = e.scrollWidth > e.clientWidth + 1, wrong = []
    const text = document.createRange()
    text.selectNodeContents(e)
    if (e.matches('code') && cut && !e.closest('.output')) wrong.push('code runs to the right')
    const button = e.matches('code') && e.parentNode.querySelector('.md-code__nav')
    if (button && button.offsetWidth && button.getBoundingClientRect().left < box.right - 1) wrong.push('covered code')
    const {width, height} = text.getBoundingClientRect()
    if (e.matches('td, th') && height > Math.max(100, 2.5 * width)) wrong.push('a narrow cell')
    if (e.matches('img') && box.right > innerWidth) wrong.push('a cut picture')
    return wrong.map(w => `${w}: ${(e.innerText ?? e.src).slice(0, 60)}`) })"""

@pytest.mark.parametrize('width', [390, 1280])
def test_nothing_is_cut_or_covered(browser, served, width):
    tab, wrong = browser.new_page(viewport=dict(width=width, height=900)), {}
    for page in ('index', 'train/learner', 'pages/benchmarks', 'pages/commands', 'pages/which_tool', 'data/load'):
        tab.goto(f'{served}/{page}.html', wait_until='networkidle')
        assert tab.locator('.md-code__nav').count() or page == 'pages/benchmarks'
        if found := tab.evaluate(UNREADABLE): wrong[page] = found
    tab.close()
    assert wrong == {}

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_accessible(browser, served, scheme):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason='the dev extra is not installed').Axe()
    for width in (390, 1280):
        tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        for page in ('index', 'train/learner', 'pages/results', 'pages/benchmarks', 'tutorials/learning_rate'):
            tab.goto(f'{served}/{page}.html', wait_until='networkidle')
            assert axe.run(tab).response['violations'] == [], (page, width)
        tab.close()

@pytest.mark.parametrize('width', [390, 1280])
def test_in_a_browser(browser, served, width):
    for scheme, page in (('light', 'index'), ('dark', 'tutorials/custom_resnet'), ('light', 'data/loaders'),
                         ('dark', 'pages/results'), ('light', 'pages/methods')):
        context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
        tab, said, asked = context.new_page(), [], []
        tab.on('console', lambda m: said.append(m.text) if m.type in ('error', 'warning') else None)
        tab.on('pageerror', lambda e: said.append(str(e)))
        tab.on('request', lambda r: asked.append(r.url))
        tab.goto(f'{served}/{page}.html', wait_until='networkidle')
        assert tab.locator('article h1').inner_text().strip(), page
        assert tab.locator('article').bounding_box()['height'] > 800, page
        fits = tab.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
        assert fits, f'{page} scrolls sideways at {width} px'
        drawn = tab.evaluate('[...document.images].every(i => i.complete && i.naturalWidth > 0)')
        assert drawn, f'{page}: a picture is missing'
        assert tab.evaluate("document.body.dataset.mdColorScheme") == dict(light='default', dark='slate')[scheme], page
        assert said == [] and [u for u in asked if not u.startswith((served, 'data:', 'blob:'))] == [], page
        context.close()

def test_search_works_in_a_browser(browser, served):
    tab = browser.new_page()
    tab.goto(f'{served}/index.html', wait_until='networkidle')
    tab.keyboard.press('Control+k')
    tab.keyboard.type('check_name')
    tab.wait_for_selector('a[href*="basics.html"] mark, [role="dialog"] a[href*="basics.html"], .md-search '
                          'a[href*="basics.html"]', timeout=5000)
    tab.close()
