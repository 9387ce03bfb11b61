# Limosa's everyday commands. `make help` lists them; what they need from the system is in packaging/setup.sh.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test quick check sim soak fuzz bench bench-async-rdma tidy fmt lab lab-shell lab-up lab-down lab-status

# Under sudo the caller's Rust is not in PATH. Use it, but keep root's own cargo home: no root-owned files in another's.
ifneq ($(SUDO_USER),)
ifeq ($(shell command -v cargo),)
CALLER_HOME := $(shell getent passwd $(SUDO_USER) | cut -d: -f6)
export RUSTUP_HOME ?= $(CALLER_HOME)/.rustup
export PATH := $(PATH):$(CALLER_HOME)/.cargo/bin
endif
endif
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/sbin:/sbin

CARGO ?= cargo

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the system packages that building, testing and benchmarking need (root), or say what is missing
	@packaging/setup.sh all

demo: ## two hosts on this machine, one live migration, a report (root and /dev/kvm)
	@packaging/setup.sh demo
	$(CARGO) build --release -p limosa
	target/release/limosa demo

test: check ## everything: check, then every test on real KVM, namespaces and bridges (root)
	$(CARGO) build --workspace --all-targets
	$(CARGO) build --workspace --features limosa/failpoints --bin limosa-failpoints
	@.ci/test all

quick: ## unit tests and tidy only: no root, no KVM, no namespaces of its own making
	@packaging/setup.sh build
	@.ci/test quick

check: ## formatting, clippy, documentation, licences and bans, tidy
	@packaging/setup.sh all
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		echo "$(CARGO) deny check bans licenses sources"; $(CARGO) deny --log-level error check bans licenses sources; \
	else echo "check: cargo-deny is not installed, licences and bans are unchecked (cargo install cargo-deny --locked)"; fi
	@$(MAKE) --no-print-directory tidy

sim: ## SEEDS=100000 worlds of migrations in which hosts, agents, disks and networks fail; SEED=n: replay one
	$(if $(SEED),LIMOSA_SIM_SEED=$(SEED),LIMOSA_SIM_SEEDS=$(or $(SEEDS),100000)) $(CARGO) test -p rig --test sim -- --nocapture

fuzz: ## every decoder, the plug's ends, both state machines and every virtio device, SECONDS=600 each (a C++ compiler)
	fuzz/run.sh $(or $(SECONDS),600)
	LIMOSA_FUZZ_SECONDS=$(or $(SECONDS),600) $(CARGO) test -p limosa-machine --lib -- --nocapture --test-threads 1 survives_any_driver

soak: ## real kills for hours: each harm at each fail point, then N=300 at random times with a release build (SEED=n, STAND_MS=30000, WORKERS=n labs at once) (root)
	@packaging/setup.sh demo
	$(CARGO) build --release -p limosa
	$(CARGO) test -p rig --test kills -- --ignored --nocapture --test-threads 1 soak_every_harm_at_every_point
	LIMOSA_BIN=$(CURDIR)/target/release/limosa N=$(or $(N),300) $(if $(SEED),SEED=$(SEED)) $(if $(STAND_MS),STAND_MS=$(STAND_MS)) $(if $(WORKERS),WORKERS=$(WORKERS)) \
		$(CARGO) test -p rig --test kills -- --ignored --nocapture --test-threads 1 soak_at_random_times

tidy: ## the rules of the house alone (tests/tidy.rs)
	$(CARGO) test --quiet -p rig --test tidy

# Each benchmark writes a record of every sample, then its table and its plot are made of that: docs/BENCHMARKS.md.
BENCH_DATE := $(shell date -u +%F)
BENCH_RECORD = docs/benchmarks/$(BENCH_DATE)-$(1).json
bench: bench-async-rdma ## measure every figure of docs/BENCHMARKS.md, and write its tables and plots (root, an idle machine)
	@packaging/setup.sh all
	$(CARGO) build --release -p limosa
	$(CARGO) build --release -p rig --bin lab
	$(CARGO) bench -p rig --bench links -- --json $(call BENCH_RECORD,links)
	$(CARGO) bench -p rig --bench links -- --lab --json $(call BENCH_RECORD,links-lab)
	$(CARGO) bench -p rig --bench peers -- --json $(call BENCH_RECORD,peers)
	$(CARGO) bench -p rig --bench peers -- --lab --json $(call BENCH_RECORD,peers-lab)
	$(CARGO) bench -p rig --bench downtime
	$(CARGO) bench -p limosa-machine --bench pause
	$(CARGO) bench -p rig --bench boot
	$(CARGO) bench -p rig --bench idle
	@for name in links links-lab peers peers-lab; do \
		record=docs/benchmarks/$(BENCH_DATE)-$$name.json; \
		if [ -f $$record ]; then $(CARGO) bench -q -p rig --bench links -- --render $$record || exit; fi; done

bench-async-rdma: ## build async-rdma (GPL-3.0, a workspace of its own) to be measured beside RDMA lanes, or say why not
	@benches/async-rdma/build.sh $(CARGO)

# The lab's two machines are alpha and beta. CMD reaches the shell inside as it was typed: make expands nothing in it.
# HOST counts only when it is said here: some shells have a variable of that name.
export LAB_CMD := $(value CMD)
LAB_RUN = $(CARGO) run --quiet -p rig --bin lab -- $(if $(LAB),--lab $(LAB)) $(if $(MEMORY),--memory $(MEMORY)) $(if $(CPUS),--cpus $(CPUS))
LAB_HOST = $(if $(findstring command,$(origin HOST)),--host $(HOST))

lab: ## CMD='ibv_devinfo': run it on two machines with soft-RoCE, KVM and netem (HOST=alpha: on one; LIMIT=seconds) (root)
	@packaging/setup.sh lab
	@$(LAB_RUN) run $(LAB_HOST) $(if $(LIMIT),--limit $(LIMIT)) -- "$${LAB_CMD:?what to run? make lab CMD=ibv_devinfo}"

lab-shell: ## a shell in one machine of the lab (HOST=beta: in the other)
	@packaging/setup.sh lab
	@$(LAB_RUN) shell $(LAB_HOST)

lab-up: ## make a lab that stays, for make lab and lab-shell to use (LAB=name: another one beside it; MEMORY=MiB, CPUS=n)
	@packaging/setup.sh lab
	@$(LAB_RUN) up

lab-down: ## end the lab that stays
	@$(LAB_RUN) down

lab-status: ## say whether a lab is up, and where
	@$(LAB_RUN) status

fmt: ## format everything
	$(CARGO) fmt --all
