# cayley_small_2L.py with level 0 alone: 1,024 features a layer, all 48 active ones among them. At
# small sizes it loses less than two levels and reads better (records/ablation, records/scorecard);
# not run at this one. Data: python prepare_fineweb.py
# torchrun --nproc_per_node=8 train.py configs/cayley_small_1L.py
out_dir = "out/cayley_small_1L"
cayley_levels = "10,48,0"  # n,k,delta per level
