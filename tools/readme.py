"README.md is nbs/index.ipynb rendered: hidden cells left out, outputs kept, links as seen from the top folder."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]

def render(path:Path) -> str:
    "The markdown of a notebook"
    nb = nbformat.read(path, 4)
    nb.metadata['language_info'] = {'name': 'python'} # nbdev_clean takes it away
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide\b', c.source, re.M)]
    for c in nb.cells:
        if re.search(r'^#\|\s*echo:\s*false', c.source, re.M): c.metadata['transient'] = {'remove_source': True}
        c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
        if c.cell_type == 'markdown': c.source = re.sub(r'^> ', '', c.source, flags=re.M)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?!https?:|#|\.\./)', '](nbs/', text) # links are relative to nbs/
    return re.sub(r'\n{3,}', '\n\n', text.replace('](../', '](')).strip() + '\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(render(ROOT/'nbs/index.ipynb'))
