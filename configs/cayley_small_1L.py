# Level 0 alone: 1,024 features a layer, all 48 active ones among them. At small sizes it loses less
# than two levels and reads better (records/ablation, records/scorecard); not run at this one.
# torchrun --nproc_per_node=8 train.py configs/cayley_small_1L.py
out_dir = "out/cayley_small_1L"
data_dir = "data/fineweb_edu"
n_layer = 12
n_head = 8
n_embd = 1024
block_size = 1024
cayley_levels = "10,48,0"  # n,k,delta per level
batch_size = 32  # sequences per GPU and micro-step
gradient_accumulation_steps = 48  # over all GPUs: 1,572,864 tokens an iteration
max_iters = 12716
warmup_iters = 200
warmdown_frac = 0.9  # flat to iteration 1,271, then linear
muon_lr = adamw_lr = 1.2e-2  # in lockstep
muon_min_lr = adamw_min_lr = 1.5e-4
eval_interval = 250
