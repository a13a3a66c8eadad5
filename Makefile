# The two commands that do everything on a fresh machine with Python 3.11 or later: `make demo` and `make test`.
PYTHON ?= python3
BIN = .venv/bin
LATEST = .venv-latest/bin
export NO_ALBUMENTATIONS_UPDATE = 1
say = @printf '\n== %s\n'

.PHONY: help demo test test-gpu test-standin test-latest test-wheel soak mutate bench bench-gpu readme docs clean
help:
	@echo 'make demo         set up .venv, train on the embedded digits (offline), print accuracy and run folder'
	@echo 'make test         set up .venv, check the export, run every notebook and the tests, on the CPU'
	@echo 'make test-gpu     the tests of what only a CUDA GPU can show; PYTHON=python3 where packages are there already'
	@echo 'make test-standin what can be shown of CUDA without a GPU: torch\'s own CUDA code over a stand-in (some minutes)'
	@echo 'make test-latest  the tests with the newest fastai 2.8, fastcore and torch'
	@echo 'make test-wheel   build the wheel, install it into an empty environment, run the demo there'
	@echo 'make soak         kill 50 runs and continue them, try 12,000 hostile files, kill a node of a Ray cluster (about half an hour)'
	@echo 'make mutate       do the tests notice a mistake? 300 changes of a line, into results/mutation.csv (about half an hour; goes on where it was stopped)'
	@echo 'make bench        the CPU benchmarks into benchmarks/ (about a quarter of an hour on an idle machine)'
	@echo 'make bench-gpu DATA=FOLDER AIRBENCH=airbench94_muon.py   all that a CUDA GPU can show, into benchmarks/gpu, line by line'
	@echo 'make readme       write README.md from nbs/index.ipynb'
	@echo 'make docs         build the documentation into _docs/ (offline)'

.venv/installed: constraints.txt setup.cfg settings.ini
	$(say) 'making .venv and installing the locked packages (some minutes, 6 GB)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastcifar needs Python 3.11 or later, this is %s: make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed
	$(say) 'training the custom ResNet on scikit-learn digits'
	@$(BIN)/fastcifar train --data digits --epochs 3 --bs 64 --out runs/demo

test: .venv/installed
	$(say) 'notebooks and fastcifar/ hold the same code?'
	@$(BIN)/python tools/drift.py
	$(say) 'running every notebook'
	@cache=$$(mktemp -d); FASTCIFAR_CACHE=$$cache CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2; code=$$?; rm -rf $$cache; exit $$code
	$(say) 'running the tests'
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# A CUDA machine may have all packages, and no index to install from: PYTHON is used as it is where it has fastai
gpu_python = $$($(PYTHON) -c 'import fastai, sys; print(sys.executable)' 2>/dev/null || { $(MAKE) -s .venv/installed >&2; echo $(BIN)/python; })

test-gpu:
	@python="$(gpu_python)"; $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch %s finds no CUDA GPU" % torch.__version__)' && PYTHONPATH=. $$python -m pytest tests/test_cuda.py

test-standin: .venv/installed
	$(say) 'running the CUDA code on a GPU that is not there'
	@tests/standin/run.sh -m pytest -p emulated tests/standin/test_emulated.py; code=$$?; [ $$code = 77 ] || exit $$code
	@tests/standin/run.sh -m pytest -p emulated tests/test_cuda.py -k 'batches_are or continues or fp32-False or False-fp32'; code=$$?; [ $$code = 77 ] || exit $$code
	@tests/standin/run.sh -m pytest tests/standin/test_counted.py; code=$$?; [ $$code = 77 ] || exit $$code

test-latest:
	$(say) 'making .venv-latest with the newest packages'
	@test -d .venv-latest || $(PYTHON) -m venv .venv-latest
	@$(LATEST)/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e . pytest hypothesis build
	$(say) 'running the tests'
	@$(LATEST)/python -m pytest

test-wheel: .venv/installed
	$(say) 'building the wheel and installing it into an empty environment'
	@rm -rf dist .venv-wheel
	@$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	@$(PYTHON) -m venv .venv-wheel
	@.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	$(say) 'running the demo there'
	@cd .venv-wheel && bin/fastcifar train --data digits --epochs 2 --bs 64 --lr-max 2e-3 --out demo

soak: .venv/installed
	$(say) 'killing 50 runs at random moments and continuing them'
	@$(BIN)/python tools/soak.py kills 50
	$(say) 'trying 12,000 hostile files'
	@$(BIN)/python tools/soak.py hostile 12000
	$(say) 'killing a node of a Ray cluster in the middle of a study'
	@OMP_NUM_THREADS=1 FASTCIFAR_SOAK=1 $(BIN)/python -m pytest tests/test_cluster.py tests/test_workers.py

mutate: .venv/installed
	$(say) 'changing a line at a time and running the tests that belong to it'
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python tools/mutate.py

bench: .venv/installed
	@$(BIN)/fastcifar bench data --out benchmarks/data.json
	@$(BIN)/fastcifar bench step --rounds 20 --out benchmarks/step.json
	@$(BIN)/fastcifar bench epoch --out benchmarks/epoch.json
	@$(BIN)/fastcifar bench speedrun --device cpu --out benchmarks/cpu_speedrun.json
	@$(BIN)/fastcifar bench parallel --rounds 3 --out benchmarks/parallel.json
	@$(BIN)/fastcifar bench fused --device cpu --rounds 3 --out benchmarks/fused.json
	@$(BIN)/fastcifar bench start --out benchmarks/start.json
	@$(BIN)/fastcifar bench memory --out benchmarks/memory.json --rounds 3
	@$(BIN)/fastcifar bench scale --out benchmarks/scale.json --rounds 3
	@$(BIN)/fastcifar bench breakdown --out benchmarks/breakdown.json --rounds 3

bench-gpu:
	@python="$(gpu_python)"; PYTHONPATH=. $$python tools/gpu_slot/slot.py --out benchmarks/gpu $(if $(DATA),--data $(DATA)) $(if $(AIRBENCH),--airbench $(AIRBENCH))

readme: .venv/installed
	@$(BIN)/python tools/readme.py

docs: .venv/installed
	$(say) 'building the documentation'
	@$(BIN)/python tools/docs.py
	@echo 'to look at it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs, then http://127.0.0.1:8000'

clean:
	rm -rf .venv .venv-latest .venv-wheel dist build _docs _proc
