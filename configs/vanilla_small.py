# The dense twin of cayley_small_2L.py. Data: python prepare_fineweb.py
# torchrun --nproc_per_node=8 train.py configs/vanilla_small.py
out_dir = "out/vanilla_small"
cayley_levels = ""  # the dense twin: no bottleneck
