# The short commands. All they do is set-up (scripts/setup.sh), cmake presets and ctest; see CMakePresets.json.
.DEFAULT_GOAL := all
.PHONY: all demo test bench lint format fuzz asan tsan gpu-check gpu-pack clean help
.NOTPARALLEL:

JOBS ?= $(shell nproc)
SECONDS ?= 30
CMAKE_ARGS ?=
CTEST_ARGS ?=
DEVICE ?= auto

# $(call build,PRESET,CMAKE ARGUMENTS): configure and build. A new folder gets Ninja; one that exists keeps its generator.
build = cmake --preset $(1) $(if $(wildcard build/$(1)/CMakeCache.txt),,-G Ninja) $(2) $(CMAKE_ARGS) >build/$(1).log || \
	{ cat build/$(1).log; exit 1; }; cmake --build build/$(1) -j $(JOBS)
# a demo on a GPU needs the build that has one
demo_preset = $(if $(filter cuda%,$(DEVICE)),cuda,release)
# $(call check,PRESET): every test that can run on this machine.
check = ctest --test-dir build/$(1) --output-on-failure --no-tests=error $(CTEST_ARGS)

build:
	@mkdir -p build

all: | build ## release build into build/release/bin (the default)
	@scripts/setup.sh build
	$(call build,release,-DSLUICE_TESTS=OFF)

demo: | build ## build, then serve eight users with the model that ships (DEVICE=auto, cpu or cuda)
	@scripts/setup.sh build
	$(call build,$(demo_preset),-DSLUICE_TESTS=OFF)
	build/$(demo_preset)/bin/sluice-demo --device $(DEVICE)

test: | build ## build and run all tests
	@scripts/setup.sh build test
	$(call build,test)
	$(call check,test)

bench: | build ## build the benches into build/release/bin and list them
	@scripts/setup.sh build test
	$(call build,release,-DSLUICE_TESTS=ON)
	@ls build/release/bin/bench_*

lint: | build ## format, clang-tidy, cppcheck
	@scripts/setup.sh build test lint
	$(call build,test)
	scripts/lint.sh build/test

format: ## rewrite all sources in the house style
	@scripts/setup.sh lint
	scripts/lint.sh --format

gpu-check: | build ## GPU tests and a short bench, from build/cuda/bin (built first where it is not there)
	$(if $(wildcard build/cuda/bin/test_attn_sm90),,$(call build,cuda) --target gpu)
	scripts/gpu-check.sh run build/cuda/bin

gpu-pack: | build ## build/gpu.tar.xz: what gpu-check wants, to carry to a GPU machine without our libraries
	@scripts/setup.sh build test
	$(call build,cuda) --target gpu
	scripts/gpu-check.sh pack build/cuda/bin build/gpu.tar.xz

fuzz: | build ## run every fuzz target for SECONDS=30 each
	@scripts/setup.sh build test lint
	$(call build,fuzz) --target fuzzers
	scripts/fuzz.sh build/fuzz $(SECONDS)

asan: | build ## all tests under AddressSanitizer and UBSan
	@scripts/setup.sh build test
	$(call build,asan)
	$(call check,asan)

tsan: | build ## the threaded and multi-process tests under ThreadSanitizer
	@scripts/setup.sh build test
	$(call build,tsan) --target threaded
	$(call check,tsan) -L 'thread|process'

clean: ## remove everything that was built
	rm -rf build

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
