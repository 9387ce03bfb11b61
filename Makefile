# Limosa's everyday commands. `make help` lists them; what they need from the system is in packaging/setup.sh.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test quick check bench tidy fmt

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
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the system packages that building, testing and benchmarking need (root), or say what is missing
	@packaging/setup.sh all

demo: ## two hosts on this machine, one live migration, a report (root and /dev/kvm)
	@packaging/setup.sh demo
	$(CARGO) build --release -p limosa
	target/release/limosa demo

test: check ## everything: check, then every test on real KVM, namespaces and bridges (root)
	$(CARGO) build --workspace --all-targets
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

tidy: ## the rules of the house alone (tests/tidy.rs)
	$(CARGO) test --quiet -p rig --test tidy

bench: ## the figures of docs/BENCHMARKS.md (root, an idle machine)
	@packaging/setup.sh all
	$(CARGO) build --release -p limosa
	$(CARGO) bench -p rig

fmt: ## format everything
	$(CARGO) fmt --all
