# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# Everything here is a name for one call of tests/run/run, which installs what it needs.
# `make help` lists the targets; tests/run/run --list lists the checks.

RUN := tests/run/run

.DEFAULT_GOAL := help
.PHONY: help demo demo-down bench test check lint sanity build test-unit test-live test-lab test-long test-kernel test-eda molecule clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

demo: ## Build a throw-away cluster, encrypt it, show that nothing was lost and nothing can be read
	@$(RUN) demo up

demo-down: ## Remove all of it
	@$(RUN) demo down

test: ## What fits into 30 minutes on 2 cores, fast checks first; it names what it leaves out
	@$(RUN) gate all

check: ## The fast checks that need no root: linters, documentation, unit tests
	@$(RUN) gate static unit awx

lint: ## Linters only
	@$(RUN) gate static

sanity: ## ansible-test sanity on ansible-core 2.19 and 2.21
	@$(RUN) gate sanity sanity-core-2.19

build: ## Build the artifact, install it, check it as Galaxy does
	@$(RUN) gate build

test-unit: ## Unit tests on Python 3.8, 3.11 and 3.13
	@$(RUN) gate unit unit-python-3.13 awx

test-live: ## Modules against userspace WireGuard in network namespaces (root)
	@$(RUN) gate live live-agent

test-lab: ## The playbooks on a cluster of hosts with systemd (root)
	@$(RUN) gate lab lab-variants lab-kill lab-change lab-agent lab-self

test-long: ## What `make test` leaves out, and 60 controllers killed at random moments (root, installs Java 17, hours)
	@KUBEMESH_KILLS=60 $(RUN) gate kernel-boot lab-kill lab-change lab-agent lab-runner lab-self lab-variants live-agent eda awx other-core

test-kernel: ## The kernel's WireGuard in an emulated machine (root, at most 8 minutes)
	@$(RUN) gate kernel kernel-boot

test-eda: ## ansible-rulebook itself: events and runs, hosts with systemd (root, installs Java 17)
	@$(RUN) gate eda

bench: ## Benchmarks: change to kernel, memory, processor time (root; benchmarks/README.md)
	@$(RUN) bench

molecule: ## The default Molecule scenario (root)
	@$(RUN) gate molecule

clean: ## Remove logs and build results; the cache of environments stays
	rm -rf tests/output .ruff_cache .pytest_cache .hypothesis .ansible kubemesh-wireguard-*.tar.gz
