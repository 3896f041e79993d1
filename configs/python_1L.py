# Level 0 alone on Python code, bytes as tokens: of what was tried, the code that costs the least
# loss (records/trend), 0.024 nats a byte after such 98M bytes. 75 s on an H100, hours on a CPU.
# Data, of the packages that are installed:
# python prepare_fineweb.py --tokenizer=bytes --out_dir=data/code --val_tokens=2e5 \
#     --source="$(python -c 'import site; print(site.getsitepackages()[0])')/**/*.py"
out_dir = "out/python_1L"
data_dir = "data/code"
eval_interval = 500
eval_iters = 4
batch_size = 256
gradient_accumulation_steps = 1
block_size = 256
vocab_size = 320  # 256 bytes and end of text, padded to a multiple of 64
n_layer = 4
n_head = 8
n_embd = 512
cayley_levels = "9,36,0"  # 36 of 512 features, 7% of d
max_iters = 1500  # of 65,536 bytes
warmup_iters = 100
