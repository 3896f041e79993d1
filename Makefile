# make demo: train a small model on Python's own text and sample from it; make test: the whole test suite.
# Both install requirements.txt into .venv first; nothing else is downloaded.

PYTHON ?= python3
RESUME = $(if $(wildcard out/demo/last.pt),resume,scratch)

demo: .venv/installed
	.venv/bin/python prepare_fineweb.py --source=python --tokenizer=bytes --out=data/python --val_tokens=200_000
	.venv/bin/python train.py configs/demo.py --init_from=$(RESUME)
	.venv/bin/python sample.py --ckpt out/demo/ckpt.pt --num_samples=2 --device=cpu

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal  # two tests at a time, of one thread each

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.PHONY: demo test
