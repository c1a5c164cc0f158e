# make demo   the main job on a real guest in a real QEMU, measured
# make demo-handoff   a running application moves between cloudlets, with a client at work
# make test   every test, the end-to-end ones included; CLOUDLET_NO_SKIP=0 skips what cannot run here
# make test-faults  each fault at each moment of a handoff, with real processes
# make bench-api   what the API costs, a crowd of clients, many at once, the daemon's start
# make bench-handoff  handoffs over links, beside zstd -3 and QEMU's own migration
# make bench-lazy  first response over slow links, by every way to bring an overlay
# make bench-libvirt  first response through libvirt, beside QEMU alone (after make demo)
# make bench-strategies   overlay strategies compared, on every guest that is prepared in build (make demo guests)
# make guests more real guests for bench-strategies: a database with data, a Node service
# make mutants    changes the handoff machines, one place at a time: a test must notice each
# make check  format, vet, staticcheck, tidy, import rules, unit tests with -race
# make build  build/cloudlet
# make deps   install what the others need, from Debian's packages

GO       ?= go
BUILD    := build
# A test that did not run is no test that passed: 1 lets what would be skipped fail.
CLOUDLET_NO_SKIP ?= 1
# The longest first: the others run beside it.
PACKAGES  = ./vmm $$($(GO) list ./... | grep -v -e '/integration$$' -e '/vmm$$')

# With cgo and a C compiler, programs and tests can use libvirt, whose library they look for
# when they run. Else they are built without, and say so when they are asked for it.
ifeq ($(shell [ "$${CGO_ENABLED:-1}" != 0 ] && command -v $$($(GO) env CC) >/dev/null 2>&1 && echo yes),yes)
export GOFLAGS := $(GOFLAGS) -tags=libvirt_dlopen
BUILT := with libvirt
RACE := -race
else
export CGO_ENABLED := 0
BUILT := without libvirt: no C compiler was found, or CGO_ENABLED is 0
endif

.PHONY: build guest guests demo demo-handoff bench-api bench-handoff bench-lazy bench-libvirt bench-strategies units test test-faults mutants lint check deps clean

build:
	$(GO) build -trimpath -ldflags "-X main.release=$$(git describe --tags --always --dirty 2>/dev/null || echo unknown)" -o $(BUILD)/cloudlet ./cmd/cloudlet
	@echo "$(BUILD)/cloudlet: $(BUILT)"

guest: deps
	$(GO) run ./integration/guest/cmd/buildguest -o $(BUILD)/guest

demo: deps build
	$(GO) run ./integration/cmd/demo -cloudlet $(BUILD)/cloudlet -guest $(BUILD)/appguest

demo-handoff: deps build
	$(GO) run ./integration/cmd/demohandoff -cloudlet $(BUILD)/cloudlet -guest $(BUILD)/guest -dir $(BUILD)/handoff -o $(BUILD)/demo-handoff.json

bench-api: deps build
	$(GO) run ./integration/cmd/benchapi -cloudlet $(BUILD)/cloudlet -guest $(BUILD)/guest -dir $(BUILD)/benchapi -o $(BUILD)/bench-api.json

bench-handoff: deps build
	$(GO) run ./integration/cmd/benchhandoff -cloudlet $(BUILD)/cloudlet -guest $(BUILD)/guest -dir $(BUILD)/handoff -o $(BUILD)/bench-handoff.json

bench-lazy: build
	@sh integration/deps.sh nbdkit
	$(GO) run ./integration/cmd/benchlazy -cloudlet $(BUILD)/cloudlet -guest $(BUILD)/appguest -dir $(BUILD)/demo -o $(BUILD)/bench-lazy.json -svg $(BUILD)/bench-lazy.svg

bench-libvirt: deps
	$(GO) test -count=1 -timeout 20m -tags pairs,libvirt_dlopen -run TestLibvirtPairs -v ./integration -args -pairs $(CURDIR)/$(BUILD)/demo

guests: deps build
	$(GO) run ./integration/cmd/guests -cloudlet $(BUILD)/cloudlet -guest $(BUILD)/appguest -dir $(BUILD)/demo -o $(BUILD)

# Each folder of build that a demo or a benchmark has prepared is a guest of its name: make
# demo prepares the demo's, make guests the others.
GUESTS = $(foreach p,$(wildcard $(BUILD)/*/prepared.json),-guest $(notdir $(patsubst %/,%,$(dir $(p))))=$(patsubst %/,%,$(dir $(p))))

bench-strategies: deps
	$(GO) build -trimpath -o $(BUILD)/overlaybench ./cmd/overlaybench
	$(BUILD)/overlaybench $(GUESTS) -dir $(BUILD)/strategies -o $(BUILD)/bench-strategies.json -csv $(BUILD)/bench-strategies.csv -plot $(BUILD)/bench-strategies $(BENCHFLAGS)

units check test test-faults: export CLOUDLET_NO_SKIP := $(CLOUDLET_NO_SKIP)

# Once for check and test: with the race detector where there is cgo.
units: guest
	$(GO) test $(RACE) -timeout 30m $(PACKAGES)

# Of handoff's faults every one is tried only without the detector, which is too slow for it.
test: units
	$(GO) test -timeout 20m ./handoff
	$(GO) test -timeout 40m ./integration

test-faults: guest
	$(GO) test -tags faults -timeout 90m -run TestFaults -v ./integration

mutants:
	$(GO) test -tags mutants -timeout 20m -run TestMutants ./handoff

check: guest lint units
	GOMAXPROCS=1 $(GO) test -timeout 10m ./fusefs

lint:
	@bad=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$bad" ]; then echo "gofmt wants: $$bad"; exit 1; fi
	$(GO) vet ./...
	CGO_ENABLED=0 GOFLAGS= $(GO) vet ./vmm ./cmd/cloudlet
	$(GO) vet -tags faults ./integration
	$(GO) tool staticcheck ./...
	$(GO) tool staticcheck -tags libvirt_dlopen ./vmm
	$(GO) mod tidy -diff
	$(GO) test -run TestImports ./integration

deps:
	@sh integration/deps.sh

clean:
	rm -rf $(BUILD)
