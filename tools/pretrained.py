"""Put the nets of finished runs into the package; RECORDS (of `fastcifar record`) say how many runs of each there are.

    python tools/pretrained.py RECORDS.jsonl RUN...
"""
import sys
from pathlib import Path

from fastcifar.basics import file_sha256, read_json, write_json
from fastcifar.models.weights import load_tensors, save_tensors
from fastcifar.runs.config import upgrade_config
from fastcifar.runs.folder import RunFolder
from fastcifar.runs.replay import records_table

FOLDER = Path(__file__).resolve().parents[1]/'fastcifar/models/pretrained'

def add(run, results):
    "Copy one net with a note of where it comes from, and return its line of the index"
    tensors, note = load_tensors(run.weights_file)
    m, tfms = run.metrics(), upgrade_config(run.saved_config())['tfms']
    key = ['model', 'norm', 'recipe', 'bs', 'data_sha256']
    cell = results[(results[key] == [m[k] for k in key]).all(axis=1)]
    if m['seed'] not in set(cell.seed): raise SystemExit(f'{run.path} is not among the records: add it to them first')
    origin = dict(recipe=m['recipe'], epochs=m['epochs'], seed=m['seed'], precision=m['precision'], tfms=tfms,
                  data=m['data'], data_sha256=m['data_sha256'], test_accuracy=m['test_accuracy'],
                  n=len(cell), mean_accuracy=round(float(cell.test_accuracy.mean()), 6), parameters=m['parameters'])
    keep = {k: note[k] for k in ('model', 'classes', 'mean', 'std')}
    file = save_tensors(FOLDER/f'{m["model"]}-{m["norm"]}.safetensors', tensors, {**keep, **origin})
    return file.stem, dict(sha256=file_sha256(file), **origin)

if __name__ == '__main__':
    results, index = records_table(sys.argv[1]), FOLDER/'index.json'
    old = read_json(index) if index.exists() else {}
    new = dict(add(RunFolder(r), results) for r in sys.argv[2:])
    write_json(index, dict(sorted((old | new).items())))
    print('\n'.join(f'{k}: {v["test_accuracy"]:.2%}' for k, v in new.items()))
