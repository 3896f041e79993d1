# The dense twin of cayley_small_2L.py.
# torchrun --nproc_per_node=8 train.py configs/vanilla_small.py
out_dir = "out/vanilla_small"
data_dir = "data/fineweb_edu"
n_layer = 12
n_head = 8
n_embd = 1024
block_size = 1024
cayley_levels = ""  # the dense twin: no bottleneck
batch_size = 32  # sequences per GPU and micro-step
gradient_accumulation_steps = 48  # over all GPUs: 1,572,864 tokens an iteration
max_iters = 12716
warmup_iters = 200
warmdown_frac = 0.9  # flat to iteration 1,271, then linear
muon_lr = adamw_lr = 1.2e-2  # in lockstep
muon_min_lr = adamw_min_lr = 1.5e-4
eval_interval = 250
