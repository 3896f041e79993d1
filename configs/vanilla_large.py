# The dense twin of cayley_large_2L.py.
# torchrun --nproc_per_node=8 train.py configs/vanilla_large.py
out_dir = "out/vanilla_large"
n_layer = 24
n_head = 16
n_embd = 2048
cayley_levels = ""  # the dense twin: no bottleneck
batch_size = 8  # sequences per GPU and micro-step
gradient_accumulation_steps = 192  # over all GPUs: 1,572,864 tokens an iteration
warmdown_frac = 0.5  # flat to iteration 6,358, then linear
muon_lr = 8e-3
muon_min_lr = 1e-4
adamw_lr = 3e-4
adamw_min_lr = 1e-5
