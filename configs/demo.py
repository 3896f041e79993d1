# A small model on Python's own sources and documentation, bytes as tokens: minutes on a CPU. Data:
# python prepare_fineweb.py --source=python --tokenizer=bytes --out_dir=data/python --val_tokens=2e5
out_dir = "out/demo"
data_dir = "data/python"
eval_interval = 100
eval_iters = 4
batch_size = 4
gradient_accumulation_steps = 2  # so that 2 ranks can share an iteration
block_size = 256
vocab_size = 320  # 256 bytes and end of text, padded to a multiple of 64
n_layer = 4
n_head = 4
n_embd = 128
cayley_levels = "7,8,0;11,16,64"
max_iters = 700
warmup_iters = 20
device = "cpu"
torch_compile = False
