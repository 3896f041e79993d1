# The published recipe, which train.py's defaults are: 12 layers, d=1024, levels of 1,024 and 32,768
# features, 20B tokens of FineWeb-Edu, 8 GPUs. Data: python prepare_fineweb.py
# torchrun --nproc_per_node=8 train.py configs/cayley_small_2L.py
out_dir = "out/cayley_small_2L"
