# The table of this directory's README.md on one CUDA GPU, three seeds; not run yet. A run of 98M
# bytes at d=512 took 75 s on an H100. From the repository's root: bash records/trend/gpu.sh
set -e
python prepare_fineweb.py --tokenizer=bytes --out_dir=data/code --val_tokens=2e5 \
    --source="$(python -c 'import site; print(site.getsitepackages()[0])')/**/*.py"

# 0.5M, 1.4M, 5.7M, 23M and 98M bytes by width, and at d=512 the codes with other levels
for width in "256: 8,24,0: 8,8,0;12,16,64" "512: 9,36,0: 9,12,0;13,24,128" \
             "1024: 10,48,0: 10,16,0;15,32,256"; do
    IFS=: read -r d one two <<< "$width"
    for iterations in 64 175 700 2800; do  # of 8,192 bytes
        python -m tools.tax --config=configs/python_1L.py --seeds=3 \
            --out_dir=out/trend/d${d}_$iterations \
            --variant "level 0 alone: cayley_levels=${one# }" \
            --variant "two levels: cayley_levels=${two# }" \
            --train_settings n_embd=$d --train_settings batch_size=32 \
            --train_settings max_iters=$iterations --train_settings eval_interval=$iterations \
            --train_settings warmup_iters=$((iterations / 15))
    done
    python -m tools.tax --config=configs/python_1L.py --seeds=3 --out_dir=out/trend/d${d}_98M \
        --variant "level 0 alone: cayley_levels=${one# }" \
        --variant "two levels: cayley_levels=${two# }" --train_settings n_embd=$d
done
python -m tools.tax --config=configs/python_1L.py --seeds=3 --out_dir=out/trend/levels \
    --variant "two levels, few leaves: cayley_levels=9,24,0;13,12,16" \
    --variant "two levels, as the reference scales: cayley_levels=9,8,0;14,16,256" \
    --variant "three levels: cayley_levels=9,8,0;13,16,64;15,12,64"

# SAEs in all layers of the d=512 twin, and finetuned at 5e-4
twin=out/trend/d512_98M/dense/seed0
python -m tools.splice --dense=$twin --out_dir=out/trend/splice --features=512,2048,8704 \
    --kinds=TopK,Matryoshka --tokens=1e6,4e6,16e6 --lr=1e-3,2e-3,5e-3,1e-2
python -m tools.splice --dense=$twin --out_dir=out/trend/splice --features=512,2048,8704 \
    --tokens=16e6 --lr=5e-3 --kl_tokens=0,2e6,8e6,32e6 --seeds=3
python -m tools.splice --dense=$twin --out_dir=out/trend/splice --features=512,2048,8704 \
    --fitted_to=spliced --tokens=16e6 --lr=5e-3
