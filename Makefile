# Every target makes its environment first; the second time that is quick. `make study STUDY=smoke` is the smallest.
STUDY  ?= laptop
VARIANT ?= sci
SEED   ?= 0
ON     ?= here
THREADS ?= $(JOBS)
JOBS   ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
PYTHON ?= python3
VENV   := $(if $(TPU),.venv-xla,.venv)
BIN    := $(VENV)/bin

.PHONY: study test lab readme plan bench export publish check test-xla
.DEFAULT_GOAL := study

# the environment: pinned versions, the project itself in place; make study TPU=1 takes the one for TPUs
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  f"Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: make study PYTHON=python3.12")'
	@echo "Setting up the environment in .venv: a few minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch | grep -v already
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev]' | grep -v already
	@mkdir -p .venv/etc/ipython && echo 'c.IPKernelApp.log_level = 40  # no advice on stderr' > .venv/etc/ipython/ipython_kernel_config.py
	@touch $@

# torch_xla 2.9.0, the last release, works with torch 2.9.0 alone: an environment of its own
.venv-xla/ready: pyproject.toml constraints.txt
	@echo "Setting up the environment for XLA in .venv-xla (7 GB): a few minutes, once."
	$(PYTHON) -m venv .venv-xla
	@sed 's/^torch==.*/torch==2.9.0/' constraints.txt > .venv-xla/constraints.txt
	.venv-xla/bin/python -m pip install --quiet --upgrade -c .venv-xla/constraints.txt pip
	.venv-xla/bin/python -m pip install --progress-bar on -c .venv-xla/constraints.txt torch 'torch_xla$(if $(TPU),[tpu])==2.9.0' | grep -v already
	.venv-xla/bin/python -m pip install --progress-bar on -c .venv-xla/constraints.txt -e '.[dev]' | grep -v already
	@touch $@

study: $(VENV)/ready  ## a whole study, from data to report; on a cluster: PROFILE=slurm or googlebatch
	@$(BIN)/python -m snakemake $(if $(PROFILE),--profile papermill_params/profiles/$(PROFILE),-j $(JOBS)) \
	  --nolock --rerun-incomplete --quiet host reason --config study=$(STUDY) threads=$(THREADS)
	@$(BIN)/python -c "from mft_nb.settings import settings; s = settings(); \
	  print('report: ', *(s.runs / '$(STUDY)').glob('*report/report.html')); print('figures:', s.figures / '$(STUDY)')"

publish: $(VENV)/ready  ## a masked checkpoint with its card: make publish STUDY=laptop VARIANT=sci
	@$(BIN)/python -m snakemake -j $(JOBS) --nolock --rerun-incomplete --quiet host reason --config study=$(STUDY) -- \
	  "$$($(BIN)/python -c "from mft_nb.settings import settings; \
	  print(settings().runs / '$(STUDY)/apply_mask/$(VARIANT)-seed$(SEED)/.done')")"

test: $(VENV)/ready check  ## lint, the smoke study, every notebook, every test
	OMP_NUM_THREADS=1 $(BIN)/python -m snakemake -j $(JOBS) --nolock --rerun-incomplete --quiet host reason --config study=smoke threads=1
	OMP_NUM_THREADS=1 MFT_NB_TERMINAL=/dev/null $(BIN)/nbdev-test --n-workers $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-xla: .venv-xla/ready  ## the smoke studies on XLA's CPU devices, one and four, against the CPU
	OMP_NUM_THREADS=1 .venv-xla/bin/python -m pytest tests/xla -n $(JOBS) --dist loadfile

check: $(VENV)/ready  ## ruff; notebooks and modules in step; notebooks clean; README made from its notebook
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_house.py

lab: $(VENV)/ready  ## read and rerun the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs

export: $(VENV)/ready  ## notebooks to modules, then clean them
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean

readme: $(VENV)/ready  ## README.md from nbs/index.ipynb
	cd nbs && MFT_NB_TERMINAL=/dev/null ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace index.ipynb
	$(BIN)/nbdev-clean --fname nbs/index.ipynb
	$(BIN)/python tests/readme.py > README.md

plan: $(VENV)/ready  ## what a study takes, and whether it fits: make plan STUDY=llama2-7b-coding [ON=h200 or v4-8]
	@$(BIN)/python -m mft_nb.plan $(STUDY) --on $(ON)

bench: $(VENV)/ready  ## speed and memory as ratios within one run
	$(BIN)/python tests/bench.py
