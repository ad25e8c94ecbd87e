# `make run` and `make test` need Go and make; the rest installs or builds what it uses.

GO        ?= go
FUZZTIME  ?= 60
SOAK_FUZZTIME ?= 1800
SOAK_PUSH_FUZZTIME ?= 1800
BENCH     ?= .
BENCHCOUNT ?= 6
# For bench: rounds, how long one takes, a regular expression of scenarios, variants (all, or names separated by commas),
# further flags (bin/bench -h); BASELINE=update writes what later runs are compared with.
ROUNDS    ?= 11
ROUNDTIME ?= 3s
SCENARIO  ?=
VARIANTS  ?=
BASELINE  ?=
BENCHFLAGS ?=
PKG       ?= ./...
# For vet-systems. linux/386 is there for what a 32-bit int does not hold.
SYSTEMS   ?= linux/386 linux/arm64 darwin/arm64 freebsd/amd64 windows/amd64
# What `make cover` runs, and what it counts, separated by commas.
COVERED   := ./crypto/...,./tokens/...,./caddymodule/...,./internal/http1

GOVERSION = $(shell awk '$$1 == "go" { print $$2 }' go.mod)
TOOL     := $(GO) tool -modfile=tools/go.mod
RUN      := .run
MODULES  := $(shell find . -name go.mod -not -path './tools/*' -not -path './.*' -not -path '*/testdata/*' -not -path '*/node_modules/*' -exec dirname {} \;)
GOFILES  := find . -name '*.go' -not -path './.*' -print0
# Everything runs without a C compiler; only the race detector wants one.
BUILD    := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: build ## build the gateway and show its jobs against a simulated WeChat; Ctrl-C ends it
	@bin/demo

.PHONY: release-check
release-check: build ## rehearse WeChat's release check (全网发布接入检测) on the running example, or on one of its own
	@bin/demo -release-check

# Of go.mod, Go itself speaks of a version that is invalid (before 1.21), or of one that it may not fetch.
.PHONY: check-go
check-go:
	@$(GO) list -m >/dev/null || { echo "This needs Go $(GOVERSION) or newer: https://go.dev/dl/ (in mainland China https://golang.google.cn/dl/)." >&2; \
	echo "Go 1.21 and newer fetches it by itself from GOPROXY, unless GOTOOLCHAIN says local, as some distributions have it: GOTOOLCHAIN=auto make ..." >&2; exit 1; }

.PHONY: build
build: check-go ## build bin/caddy, and bin/demo, which `make run` runs
	@echo "building bin/caddy and bin/demo (the first time all of Caddy is compiled, which takes minutes)"
	@mkdir -p bin
	$(BUILD) -o bin/caddy ./cmd/caddy
	$(BUILD) -o bin/demo ./integration/demo

.PHONY: test
test: check-go ## run all tests: race detector, shuffled, nested modules; then the allocation gates without it
	@sh scripts/install-test-needs.sh
	@mkdir -p $(RUN)
	@CGO_ENABLED=1 $(GO) run ./internal/testrun -p 2 -summary $(RUN)/summary $(PKG)

.PHONY: cover
# Not in the race run: with the race detector the counters are atomic, and what is counted together is taken for synchronised.
cover: ## run the packages' own tests and hold the coverage against scripts/coverage.txt
	@sh scripts/install-test-needs.sh
	@mkdir -p $(RUN)
	@$(GO) test -count=1 -p 2 -timeout 20m -covermode=set -coverpkg=$(COVERED) -coverprofile=$(RUN)/cover.out $$(echo $(COVERED) | tr , " ")
	@$(GO) tool cover -func $(RUN)/cover.out | awk '$$NF == "0.0%" { print "never ran: " $$1 " " $$2 }'
	@$(GO) run ./internal/covercheck -profile $(RUN)/cover.out

.PHONY: fuzz
fuzz: ## fuzz all targets for FUZZTIME seconds together
	@FUZZTIME=$(FUZZTIME) sh scripts/fuzz.sh

.PHONY: bench-micro
bench-micro: ## run the packages' benchmarks and sum them up; BENCH is a regular expression
	@mkdir -p $(RUN)
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -count $(BENCHCOUNT) ./crypto/... ./tokens/... ./caddymodule/... ./internal/http1/... > $(RUN)/bench-micro.txt || { cat $(RUN)/bench-micro.txt; exit 1; }
	@$(TOOL) benchstat $(RUN)/bench-micro.txt

.PHONY: bench
bench: bench-build ## hold the gateway against stock Caddy (docs/performance.md); ROUNDS, ROUNDTIME, SCENARIO, VARIANTS, BASELINE=update
	@bin/bench -rounds $(ROUNDS) -time $(ROUNDTIME) -run '$(SCENARIO)' -variants '$(VARIANTS)' $(if $(filter update,$(BASELINE)),-update) $(BENCHFLAGS)

.PHONY: bench-memory
bench-memory: bench-build ## the same for memory: idle, at work, many clients, uploads, slow backends, a million pushes
	@bin/bench -memory $(BENCHFLAGS)

.PHONY: bench-build
bench-build: # what both run
	@mkdir -p bin
	$(BUILD) -o bin/caddy ./cmd/caddy
	$(BUILD) -o bin/caddy-stock ./integration/bench/stock
	$(BUILD) -o bin/bench ./integration/bench
# A file as the linker writes it has more of its pages in memory than a copy of it, by chance: both are copies.
	@for b in caddy caddy-stock; do cp bin/$$b bin/$$b.copy && mv bin/$$b.copy bin/$$b || exit 1; done

.PHONY: soak
soak: ## run by hand what takes long: the tests with the build tag soak, SOAK_FUZZTIME seconds of fuzzing, SOAK_PUSH_FUZZTIME more of the push handler
	@sh scripts/install-test-needs.sh
	@CGO_ENABLED=1 $(GO) run ./internal/testrun -soak -timeout 6h
	@FUZZTIME=$(SOAK_FUZZTIME) sh scripts/fuzz.sh
	@FUZZTIME=$(SOAK_PUSH_FUZZTIME) FUZZTARGET=FuzzPush sh scripts/fuzz.sh

.PHONY: xcaddy
xcaddy: ## build Caddy with this checkout through xcaddy, from xcaddy.json
	@$(GO) run ./internal/xcaddybuild -folder $(RUN)/xcaddy

.PHONY: lint
lint: fmt-check vet staticcheck ## fmt-check, vet and staticcheck

.PHONY: fmt
fmt: ## format all Go files
	@$(GOFILES) | xargs -0 gofmt -l -w

.PHONY: fmt-check
fmt-check: ## fail when a Go file is not formatted
	@files=$$($(GOFILES) | xargs -0 gofmt -l); [ -z "$$files" ] || { echo "not formatted (make fmt):"; echo "$$files"; exit 1; }

.PHONY: vet
vet: ## go vet, with and without the build tags soak and nginx
	@for m in $(MODULES); do echo "vet $$m"; (cd $$m && $(GO) vet ./... && $(GO) vet -tags soak,nginx ./...) || exit 1; done

.PHONY: vet-systems
vet-systems: ## go vet for other systems and processors; takes minutes
	@for t in $(SYSTEMS); do echo "vet $$t"; GOOS=$${t%/*} GOARCH=$${t#*/} CGO_ENABLED=0 $(GO) vet ./... || exit 1; done

.PHONY: staticcheck
staticcheck: ## staticcheck, as tools/go.mod pins it
	@mkdir -p $(RUN)
	@$(GO) build -modfile=tools/go.mod -o $(RUN)/staticcheck honnef.co/go/tools/cmd/staticcheck
	@for m in $(MODULES); do echo "staticcheck $$m"; (cd $$m && "$(CURDIR)/$(RUN)/staticcheck" ./...) || exit 1; done

.PHONY: scan
scan: ## look for names of this machine, and for private keys, in the files to be published
	@sh scripts/scan.sh

.PHONY: clean
clean: ## remove what was built and written here
	rm -rf bin $(RUN)
