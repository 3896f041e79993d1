# cayley_small_2L.py with a third level of 131,072 features. Data: python prepare_fineweb.py
# torchrun --nproc_per_node=8 train.py configs/cayley_small_3L.py
out_dir = "out/cayley_small_3L"
cayley_levels = "10,16,0;15,32,256;17,64,256"  # n,k,delta per level
