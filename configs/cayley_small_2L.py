# The published recipe: 12 layers, d=1024, levels of 1,024 and 32,768 features.
# 20B tokens of FineWeb-Edu, 8 GPUs.
# torchrun --nproc_per_node=8 train.py configs/cayley_small_2L.py
out_dir = "out/cayley_small_2L"
data_dir = "data/fineweb_edu"
n_layer = 12
n_head = 8
n_embd = 1024
block_size = 1024
cayley_levels = "10,16,0;15,32,256"  # n,k,delta per level
batch_size = 32  # sequences per GPU and micro-step
gradient_accumulation_steps = 48  # over all GPUs: 1,572,864 tokens an iteration
max_iters = 12716
warmup_iters = 200
warmdown_frac = 0.9  # flat to iteration 1,271, then linear
muon_lr = adamw_lr = 1.2e-2  # in lockstep
muon_min_lr = adamw_min_lr = 1.5e-4
eval_interval = 250
