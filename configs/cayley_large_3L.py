# cayley_large_2L.py with a third level of 131,072 features.
# torchrun --nproc_per_node=8 train.py configs/cayley_large_3L.py
out_dir = "out/cayley_large_3L"
n_layer = 24
n_head = 16
n_embd = 2048
cayley_levels = "11,16,0;15,32,256;17,64,256"  # n,k,delta per level
batch_size = 8  # sequences per GPU and micro-step
gradient_accumulation_steps = 192  # over all GPUs: 1,572,864 tokens an iteration
warmdown_frac = 0.5  # flat to iteration 6,358, then linear
muon_lr = 8e-3
muon_min_lr = 1e-4
adamw_lr = 3e-4
adamw_min_lr = 1e-5
