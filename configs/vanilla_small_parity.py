# The dense twin of cayley_small_2L.py, stopped where it reaches that one's published val loss.
# Data: python prepare_fineweb.py
# torchrun --nproc_per_node=8 train.py configs/vanilla_small_parity.py
out_dir = "out/vanilla_small_parity"
cayley_levels = ""  # the dense twin: no bottleneck
lr_schedule = "parity"  # flat, then a warmdown from 0.207 above the target, 895 iterations long
target_val_loss = 3.1584  # nats per token: markhenry/cayley-small-2L-mlp_in-20B
