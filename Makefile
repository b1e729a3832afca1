# make demo   set up, and run the whole product on a real 135M Llama
# make test   set up, and run the tests
# make test-kernels  every kernel, dtype and architecture
# make check  lint and type-check
# make env    set up only: .venv with everything the demo needs
.PHONY: demo test test-kernels test-slow check env env-dev clean
.DEFAULT_GOAL := help

export HF_HUB_DISABLE_TELEMETRY := 1
DEMO_EXTRAS := train,llamacpp,ollama,evals
DEV_EXTRAS := $(DEMO_EXTRAS),kernels,ray,dev

help:
	@sed -n 's/^# //p' Makefile

env:
	@launch/environment.sh demo $(DEMO_EXTRAS)

env-dev:
	@launch/environment.sh dev $(DEV_EXTRAS)

demo: env
	@.venv/bin/shipyard demo

test: env-dev
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-kernels: env-dev
	@[ -d .venv/triton-3.9.0/triton ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --target .venv/triton-3.9.0 triton==3.9.0
	SHIPYARD_SECOND_TRITON=.venv/triton-3.9.0 .venv/bin/python -m pytest -n 2 -m kernels_full tests/kernels

test-slow: env-dev
	.venv/bin/python -m pytest -m slow

check: env-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

clean:
	rm -rf .venv build dist *.egg-info runs exports
