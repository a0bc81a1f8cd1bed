# Each target sets up .venv by itself; .venv is kept while requirements.txt stays the same.
PYTHON = $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin

.PHONY: demo compare sd15 pocket test lint
.DEFAULT_GOAL := demo

demo: .venv
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/demo.py

# hours; the same command resumes it
compare: .venv
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/experiment.py configs/experiment/pocket.yaml --out outputs/compare
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/experiment.py configs/experiment/pocket_ablations.yaml --out outputs/compare

# SD 1.5 on DreamBooth's photos: make sd15 PHOTOS=path/to/dreambooth/dataset
sd15: EXPERIMENT = HF_HUB_OFFLINE=1 $(BIN)/python scripts/experiment.py configs/experiment/sd15.yaml subjects.from=$(PHOTOS)
sd15: .venv
	@test -n "$(PHOTOS)" || { echo "error: PHOTOS: name the folder dataset/ of github.com/google/dreambooth" >&2; exit 2; }
	$(BIN)/python scripts/weights.py
	$(EXPERIMENT) --plan
	$(EXPERIMENT)

# trains the pocket model, part by part: about a day; resumes what was interrupted
pocket: .venv
	HF_HUB_OFFLINE=1 $(BIN)/python -m scripts.pocket_two.train

# side by side, one process a core; then those marked slow, which take cores and memory for themselves; not with FAST=1
test: .venv
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 --dist loadfile
	$(if $(FAST),,HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow)

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: .venv
.venv: .venv/installed

.venv/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: python3 >= 3.11 with venv is needed (Debian: apt install python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
