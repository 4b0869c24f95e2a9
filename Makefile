# Every target makes .venv first if it is not there or out of date (scripts/setup.sh). PYTHON=… chooses the interpreter,
# ARGS=… adds arguments, PART=… chooses a folder of tests/: make test PART=engine ARGS="-k shuffle".

PY := .venv/bin/python
export PYTHON
unexport PYTHONPATH PYTHONHOME
.DEFAULT_GOAL := help
export INVENTORY NODE DATA PURGE CONFIRM PROJECT CA ARGS
UNIT = $(if $(PART),tests/$(PART)) $(ARGS)
.PHONY: help demo test test-quick test-appliance check bench docs setup update-lock clean appliance deploy start stop kill status push-project wheels add-node remove-node upgrade rotate-certs doctor collect-logs reset

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

demo: setup ## start a local cluster, run two jobs over Python's own standard library and a workflow, show what came out, stop it
	@.venv/bin/mrcore demo --folder . $(ARGS)

test: ## run every test: the unit tests, then the appliance's on containers; PART=engine or ARGS=: only these unit tests
	@scripts/test.sh $(UNIT)

test-quick: ## run the unit tests that are not marked slow: an answer in under 5 minutes; PART= and ARGS= as for test
	@scripts/test.sh -m "not slow" $(UNIT)

test-appliance: ## run the appliance's tests on containers only; ARGS=… see docs/testing.md
	@scripts/test.sh --appliance $(ARGS)

check: appliance ## format, lint, types, docstrings, imports between packages, sizes, YAML, playbooks and roles
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m ruff check --select D1 --ignore D104,D105,D107 mrcore
	$(PY) -m mypy --strict mrcore
	$(PY) tools/check_sizes.py
	.venv/bin/lint-imports
	.venv/bin/yamllint --strict .
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/ansible-lint --offline --strict

bench: ## measure against a script by hand, PySpark, mrjob and Dask (installs these three first)
	@scripts/setup.sh dev,dashboard,bench
	$(PY) bench/run.py $(ARGS)
	$(PY) bench/merge_output.py
	$(PY) bench/transfer.py
	$(PY) bench/progress.py

docs: ## make the documents a site: site/index.html
	@scripts/setup.sh dev,docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "see site/index.html"

setup: ## only make .venv
	@scripts/setup.sh dev,dashboard

update-lock: setup ## choose again the versions of all packages that make installs: lock/*.txt
	@$(PY) scripts/update_lock.py

clean: ## end the demo's cluster and remove what make made: .venv, .mrcore, caches
	@if [ -x .venv/bin/mrcore ] && [ -d .mrcore ]; then MRCORE_HOME=.mrcore .venv/bin/mrcore cluster kill; fi
	rm -rf .venv .mrcore .pytest_cache .mypy_cache .ruff_cache .hypothesis build site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

appliance: ## only make .venv with Ansible in it
	@scripts/setup.sh dev,dashboard,appliance

# One playbook each, ansible/VERB.yml. INVENTORY=prod names the folder inventory/prod; ARGS=… goes to ansible-playbook.

deploy: appliance ## make the machines of INVENTORY= a cluster, or bring it up to the inventory; safe to repeat
	@scripts/play.sh $@

start: appliance ## start the cluster of INVENTORY= and its Runner, also at the next boot
	@scripts/play.sh $@

stop: appliance ## stop Runner and cluster gracefully; they stay down
	@scripts/play.sh $@

kill: appliance ## end Runner and cluster at once, for certain
	@scripts/play.sh $@

status: appliance ## show every daemon, the Runner and the queue of INVENTORY=
	@scripts/play.sh $@

push-project: appliance ## bring projects/PROJECT to the master of INVENTORY=
	@scripts/play.sh $@

wheels: appliance ## collect the wheels of projects/PROJECT/requirements.txt for the machines of INVENTORY=
	@scripts/play.sh $@

add-node: appliance ## take NODE=, which is in the inventory, into the cluster that runs
	@scripts/play.sh $@

remove-node: appliance ## take NODE= out for good, also a dead one; DATA=move or DATA=abandon when it holds data
	@scripts/play.sh $@

upgrade: appliance ## bring the cluster to this checkout, node by node, with a health check and a way back
	@scripts/play.sh $@

rotate-certs: appliance ## new keys and certificates for all machines; CA=yes: a new authority too
	@scripts/play.sh $@

doctor: appliance ## find what is wrong or soon will be, and say what to type; changes nothing
	@scripts/play.sh $@

collect-logs: appliance ## one archive with logs and states of all machines, without secrets
	@scripts/play.sh $@

reset: appliance ## take the cluster off its machines; CONFIRM= its name; data stay unless PURGE=yes
	@scripts/play.sh $@
