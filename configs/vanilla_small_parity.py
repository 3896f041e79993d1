# The dense twin of cayley_small_2L.py, stopped where it reaches that one's published val loss.
# torchrun --nproc_per_node=8 train.py configs/vanilla_small_parity.py
out_dir = "out/vanilla_small_parity"
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
lr_schedule = "parity"  # flat, then a warmdown from 0.207 above the target, 895 iterations long
target_val_loss = 3.1584  # nats per token: markhenry/cayley-small-2L-mlp_in-20B
muon_lr = adamw_lr = 1.2e-2  # in lockstep
muon_min_lr = adamw_min_lr = 1.5e-4
eval_interval = 250
