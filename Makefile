# The four verbs of the project; `make` alone lists them.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
TORCH := torch==2.13.0
EXTRAS := dev

.PHONY: help install train test check bench clean

help:
	@echo "make train   install into $(VENV), then train a small model on 4 ranks of this machine"
	@echo "make test    run the tests"
	@echo "make check   lint, types, import layers"
	@echo "make bench   run the benchmarks (results in benchmarks/results)"

# The pinned torch goes in first and alone; the constraints file then keeps every later install, extras
# included, from drawing in another one.
$(VENV)/.installed: setup.py pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCH)
	$(BIN)/python -m pip freeze --disable-pip-version-check | sed -n 's/^torch\(==\| @\).*/$(TORCH)/p' > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	touch $@

install: $(VENV)/.installed

train: install
	$(BIN)/distrain train examples/tiny.toml

test: install
	$(BIN)/python -m pytest -m alone; alone=$$?; $(BIN)/python -m pytest -n 2 -m "not alone" && exit $$alone

check: install
	$(BIN)/python scripts/check.py

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .links build *.egg-info
