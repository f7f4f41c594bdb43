# Everything a new machine needs:  make quickstart   and   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
# The quickstart trains on two CPU ranks everywhere, so that its result is the same on every machine.
CPU := DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1

.PHONY: install quickstart test test-slow check format docs

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	@echo "== Installing into $(VENV) (about 7 GB, most of it PyTorch)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --upgrade pip setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -e '.[train,fit,serve,report,digits,export,test]'
	@touch $@

quickstart: install
	@echo "== 1/5 Making the data: handwritten and spoken digits"
	@$(BIN)/python tools/quickstart/make_digits.py data/digits
	@echo "== 2/5 Packing it into shards"
	@$(BIN)/python tools/pack.py data/digits data/shards --name image --subdir image
	@$(BIN)/python tools/pack.py data/digits data/shards --name speech --subdir speech
	@echo "== 3/5 Training one model for both, on 2 ranks: deepspeed bfsys/train.py configs/quickstart.yaml"
	@PATH="$(abspath $(BIN)):$$PATH" $(CPU) deepspeed --num_accelerators 2 bfsys/train.py configs/quickstart.yaml
	@echo "== 4/5 Evaluating it on the validation files, each once: python -m bfsys.evaluate $(RUN)"
	@$(BIN)/python -m bfsys.evaluate $(RUN)
	@echo "== 5/5 Predicting validation files from their bytes: python -m bfsys.predict $(RUN) FILE…"
	@$(BIN)/python -m bfsys.predict $(RUN) $$(for c in 3 7; do for k in image/seen speech/heard; do \
	    ls data/digits/val/$${k}_$$c/* | head -n 2; done; done)
	@echo
	@echo "TensorBoard logs: $(RUN)/tb      checkpoints: $(RUN)/checkpoints      all about the run: $(RUN)"
	@echo "Try next:"
	@echo "  $(BIN)/tensorboard --logdir runs"
	@echo "  $(BIN)/python -m bfsys.predict $(RUN) data/digits/val/speech --top 1"
	@echo "  PATH=$(BIN):\$$PATH deepspeed --num_accelerators 2 bfsys/train.py configs/quickstart.yaml name=wider model.dim=192"

test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m 'hypothesis and not slow' --hypothesis-profile thorough

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The site is in build/site; to read it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site"

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]'
	@touch $@
