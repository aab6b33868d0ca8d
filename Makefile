# Everything sets itself up: an environment in .venv, brought up to date when pyproject.toml or the constraints change.
SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
OLDEST := .venv-oldest
PROTOC := .venv-protoc
FUZZ_S ?= 60
CHAOS_SEED ?= 0
CHAOS_FAULTS ?= 500
# Test files at a time: each keeps two thirds of a core busy, and needs up to 3 GB where it is one of a training framework.
JOBS ?= 3
TORCH := torch==2.13.0
BENCHMARKS := benchmarks/bare_exchange.py benchmarks/mtls_exchange.py benchmarks/watched_exchange.py benchmarks/hook_cost.py benchmarks/sum_calls.py \
	benchmarks/accuracy.py benchmarks/xgboost_tunnel.py benchmarks/xgboost_levelwise.py benchmarks/figure4.py benchmarks/fedbuff.py benchmarks/lora.py benchmarks/membership.py \
	benchmarks/cost_attacks.py benchmarks/secure_sum_cost.py
PROJECT := -e '.[hf,torch,lightning,keras,monai,xgboost-cpu,sklearn,statistics,trust,dp,he,failover,metrics,dashboard,mlflow,wandb,examples,dev]'

# The Python to build environments with: the first on the path that is new enough, or `make PYTHON=/path/to/python3`.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	    $$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
# The floors have wheels for these two only.
OLDEST_PYTHON ?= $(shell for p in python3.11 python3.12 $(PYTHON); do \
	    $$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)

# $(call environment,folder,python)
define environment
	@$(2) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  echo "Python 3.11 or newer with its venv module is needed; name it with: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Setting up $(1) with $$($(2) --version); the first time this takes a few minutes."
	@$(2) -m venv $(1) && : > $(1)/install.log
endef

# $(call install,folder,arguments): pip, with a line for each large download, and its last lines where it fails.
define install
	@echo "  pip install $(2)"
	@set -o pipefail; $(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off $(2) 2>&1 \
	  | tee -a $(1)/install.log \
	  | awk '/Downloading .*\.whl \([0-9.]+ [MG]B\)/ { sub(/^ +/, ""); print "    " $$0; fflush() } \
	         /^Installing collected packages/ { print "    installing " NF - 3 " packages"; fflush() }' \
	  || { echo "pip failed; the end of $(1)/install.log:"; tail -n 20 $(1)/install.log; exit 1; }
endef

# $(call tests,folder): pytest, JOBS files at a time, importing the built wheel (what users get) rather than the source tree.
# Keras and MONAI load TensorFlow and JAX. They have processes of their own: beside other frameworks' native code, these
# have crashed. A process that crashes ends its group, since pytest-xdist would wait for ever for the rest of its files.
# One thread of OpenMP each: with several processes, more threads than cores wait for each other.
TEST_GROUPS := tests/integrations/keras tests/integrations/monai
define tests
	@rm -rf build && mkdir build
	@{ $(1)/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel . && \
	   $(1)/bin/python -m pip install --no-deps --target build/installed build/wheel/*.whl; } > build/log.txt 2>&1 \
	  || { tail -n 20 build/log.txt; exit 1; }
	@failed=0; for group in "tests $(TEST_GROUPS:%=--ignore=%)" $(TEST_GROUPS); do \
	  echo "pytest $$group"; \
	  OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/installed $(1)/bin/python -P -m pytest -n $(JOBS) --dist loadfile \
	    --no-loadscope-reorder --max-worker-restart=0 $(ARGS) $$group || { [ $$? = 5 ] || failed=1; }; \
	done; exit $$failed  # 5: no test of this group has been chosen
endef

.PHONY: help
help:  ## this list
	@echo "make TARGET [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(VENV)/.stamp  ## three sites fine-tune a transformer together, beside each alone and all data in one place
	@$(VENV)/bin/python examples/hf/text_classification/demo.py $(ARGS)

.PHONY: demo-lightning
demo-lightning: $(VENV)/.stamp  ## four sites train a Lightning module together, beside each alone and all data in one place
	@$(VENV)/bin/python examples/lightning/image_classification/demo.py $(ARGS)

.PHONY: demo-torch
demo-torch: $(VENV)/.stamp  ## four sites train with a PyTorch loop together, beside each alone and all data in one place
	@$(VENV)/bin/python examples/torch/image_classification/demo.py $(ARGS)

.PHONY: demo-keras
demo-keras: $(VENV)/.stamp  ## four sites train a Keras model together, beside each alone and all data in one place
	@$(VENV)/bin/python examples/keras/image_classification/demo.py $(ARGS)

.PHONY: demo-monai
demo-monai: $(VENV)/.stamp  ## four sites train a MONAI bundle together, beside each alone and all data in one place
	@$(VENV)/bin/python examples/monai/spleen_bundle/demo.py $(ARGS)

.PHONY: demo-tabular
demo-tabular: $(VENV)/.stamp  ## five uneven sites fit a pipeline of scikit-learn together, beside each alone and all data in one place
	@$(VENV)/bin/python examples/tabular/demo.py $(ARGS)

.PHONY: demo-xgboost
demo-xgboost: $(VENV)/.stamp  ## five uneven sites grow trees together in three ways, beside each alone and all data in one place
	@$(VENV)/bin/python examples/xgboost/adult/demo.py $(ARGS)

.PHONY: docs
docs: $(VENV)/.stamp  ## the documentation site, in build/site; a warning is an error
	@$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs build/site && echo "build/site/index.html"

.PHONY: man
man: $(VENV)/.stamp  ## manual pages of all commands, in build/man
	@$(VENV)/bin/python -m fl_adapters manual --out build/man

.PHONY: test
test: lint  ## lint, types, and every test against the built wheel (ARGS='-k name' to choose)
	$(call tests,$(VENV))

.PHONY: test-oldest
test-oldest: export USE_TF = 0  # transformers 4 takes up any TensorFlow, and fails beside Keras 3
test-oldest: $(OLDEST)/.stamp  ## the tests with the oldest supported version of every dependency
	$(call tests,$(OLDEST))

.PHONY: wheel
wheel: $(VENV)/.stamp  ## the wheel, in build/wheel
	@$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	@ls build/wheel/*.whl

.PHONY: lint
lint: $(VENV)/.stamp  ## ruff (rules and format) and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

.PHONY: chaos
chaos: $(VENV)/.stamp  ## runs under faults: CHAOS_FAULTS of them, as CHAOS_SEED says; each must end as if undisturbed
	@PYTHONPATH=$(CURDIR):tests/_support $(VENV)/bin/python tests/chaos/chaos.py --seed $(CHAOS_SEED) \
	  --faults $(CHAOS_FAULTS) $(ARGS)

.PHONY: attack
attack: $(VENV)/.stamp  ## hostile sites, admins, servers and strangers against one federation, which must not notice
	@PYTHONPATH=$(CURDIR):tests/_support:tests/attack $(VENV)/bin/python tests/attack/attack.py $(ARGS)

.PHONY: bench
bench: $(VENV)/.stamp  ## the measurements under benchmarks/, one after the other
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(VENV)/bin/python $$script $(ARGS); done

.PHONY: bench-peers
bench-peers: $(VENV)/.stamp  ## the same exchange on ours, Flower and NVIDIA FLARE; installs the two into .venv-peers
	@$(VENV)/bin/python benchmarks/peers/compare.py $(ARGS)
	@$(VENV)/bin/python benchmarks/peers/compare.py --virtual --out runs/peers-virtual $(ARGS)

.PHONY: proto
proto: $(PROTOC)/.stamp  ## regenerate fl_runtime/wire/fl/v1/federation_pb2.py and .pyi from the .proto
	@$(PROTOC)/bin/python -m grpc_tools.protoc -I fl_runtime/wire --python_out=fl_runtime/wire \
	  --pyi_out=fl_runtime/wire fl/v1/federation.proto

.PHONY: fuzz
fuzz: $(VENV)/.stamp  ## coverage-guided fuzzing of decoders and file readers for FUZZ_S seconds; findings are in .fuzz/
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || $(VENV)/bin/python -m pip install -q atheris
	@mkdir -p .fuzz
	@$(VENV)/bin/python tests/fuzz/fuzz_decoder.py -max_total_time=$(FUZZ_S) -max_len=4096 -timeout=10 \
	  -dict=tests/fuzz/dictionary -rss_limit_mb=2048 -artifact_prefix=.fuzz/ .fuzz tests/fuzz/corpus

.PHONY: permissions
permissions: $(VENV)/.stamp  ## make docs/permissions.md from the table of permissions
	@$(VENV)/bin/python -c 'from fl_runtime.trust import permissions; print(permissions.as_markdown(), end="")' > docs/permissions.md

.PHONY: pictures
pictures: $(VENV)/.stamp  ## make the pictures of the README anew; needs Chromium
	@PYTHONPATH=$(CURDIR) $(VENV)/bin/python docs/pictures/make.py

.PHONY: clean
clean:  ## remove what building and testing left (not the environments, not runs/)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## also remove the environments
	@rm -rf $(VENV) $(OLDEST) $(PROTOC) .venv-peers

$(VENV)/.stamp: pyproject.toml constraints/newest.txt
	$(call environment,$(VENV),$(PYTHON))
	$(call install,$(VENV),-c constraints/newest.txt $(TORCH))
	$(call install,$(VENV),-c constraints/newest.txt $(PROJECT))
	@touch $@

$(OLDEST)/.stamp: pyproject.toml constraints/oldest.txt
	$(call environment,$(OLDEST),$(OLDEST_PYTHON))
	$(call install,$(OLDEST),-c constraints/oldest.txt $(TORCH))
	$(call install,$(OLDEST),-c constraints/oldest.txt $(PROJECT))
	@touch $@

# protoc 25.1: what it generates loads under every protobuf from 4.25 to 7.
$(PROTOC)/.stamp:
	$(call environment,$(PROTOC),$(OLDEST_PYTHON))
	$(call install,$(PROTOC),grpcio-tools==1.62.3 'setuptools<80')
	@touch $@
