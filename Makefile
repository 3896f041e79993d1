# make demo: train a small model on Python's own text and sample from it, on a CPU.
# make test: the whole test suite. make dryrun: the published recipe's plan and memory, without a GPU.
# make reference: the published recipe on 8 GPUs; GPUS=4 for fewer.
# make gpu: what a user does on a GPU is tested and timed, in 8 minutes; PYTHON=... has PyTorch for
# CUDA, the other packages of requirements.txt, and pytest. Send out/gpu/gpu.txt and gpu.json.
# demo, dryrun and test install into .venv first; reference uses the Python that is active.

PYTHON ?= python3
GPUS ?= 8
PIP_INSTALL = .venv/bin/python -m pip install -q -c tests/constraints.txt
RESUME = $(if $(wildcard out/$(1)/last.pt),resume,scratch)

demo: .venv/installed
	.venv/bin/python prepare_fineweb.py --source=python --tokenizer=bytes --out_dir=data/python \
	    --val_tokens=200_000
	.venv/bin/python train.py configs/demo.py --init_from=$(call RESUME,demo)
	.venv/bin/python sample.py --ckpt=out/demo --num_samples=2 --device=cpu

test: .venv/tested
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal  # two tests at a time

dryrun: .venv/installed
	.venv/bin/python -m tools.account configs/cayley_small_2L.py

reference:
	$(PYTHON) prepare_fineweb.py
	torchrun --nproc_per_node=$(GPUS) train.py configs/cayley_small_2L.py \
	    --init_from=$(call RESUME,cayley_small_2L)
	$(PYTHON) -m tools.evals --ckpt=out/cayley_small_2L --hellaswag=hub --lambada=hub --ppl=hub
	$(PYTHON) sample.py --ckpt=out/cayley_small_2L --start="The reason is"

gpu:
	mkdir -p out/gpu
	{ nvidia-smi; git log --oneline -1; $(PYTHON) -m pip list | grep -E "^(torch|triton|numpy|transformers) "; \
	  $(PYTHON) -m pytest -q -rs --durations=0 tests/test_cuda.py; \
	  $(PYTHON) -m tools.bench --device=cuda --json_file=out/gpu/gpu.json; \
	} 2>&1 | tee out/gpu/gpu.txt

.venv/installed: requirements.txt tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -r requirements.txt
	touch $@

.venv/tested: .venv/installed tests/requirements.txt
	$(PIP_INSTALL) -r tests/requirements.txt
	touch $@

.PHONY: demo test dryrun reference gpu
