"Does fastcifar/ hold what the notebooks export? Exports into a temporary copy and compares."
import filecmp, shutil, subprocess, sys, tempfile
from pathlib import Path

def drift(root:Path) -> list:
    "Names of modules that differ from what the notebooks export"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        copy.mkdir()
        for name in ('settings.ini', 'setup.cfg', 'pyproject.toml', 'README.md'): shutil.copy(root/name, copy)
        shutil.copytree(root/'nbs', copy/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
        (copy/'fastcifar').mkdir()
        shutil.copy(root/'fastcifar/__init__.py', copy/'fastcifar')
        done = subprocess.run([sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()'],
                              cwd=copy, capture_output=True, text=True)
        if done.returncode: raise SystemExit(f'nbdev_export failed: {done.stderr[-2000:]}')
        files = {p.relative_to(r/'fastcifar').as_posix() for r in (root, copy) for p in (r/'fastcifar').rglob('*.py')}
        def same(f):
            here, made = root/'fastcifar'/f, copy/'fastcifar'/f
            return here.exists() and made.exists() and filecmp.cmp(here, made, shallow=False)
        return sorted(f for f in files if not same(f))

if __name__ == '__main__':
    wrong = drift(Path(__file__).resolve().parents[1])
    if wrong: sys.exit(f'these modules differ from the notebooks: {", ".join(wrong)}; edit nbs/ and run nbdev_export')
    print('yes')
