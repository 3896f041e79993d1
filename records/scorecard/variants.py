"""
The scorecard's headline numbers of variants of the layer, without the rows that they share.

    python records/scorecard/variants.py --dense=dense.pt "name: cayley.pt" "name: other.pt" ...

Prints a row of variants.csv for each checkpoint and each of its levels: val loss, how far it lies
above the dense twin, F1 of the best feature and of 5, steering's share of the gradient's effect,
the ablation's specificity, features that are never active, and what the code explains.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import scorecard  # noqa: E402

words = [word for word in sys.argv[1:] if word.startswith("--")]
variants = [word.split(": ") for word in sys.argv[1:] if not word.startswith("--")]
scorecard.configure(vars(scorecard), words)

data = None
print("variant,row,val_loss,minus_dense,one_f1,five_f1,steering_share,specificity,dead,explained")
for name, path in variants:
    pair, configs = scorecard.load_pair(path, scorecard.dense, torch.device("cpu"))
    if data is None:
        data = scorecard.load_data(configs[0])
        once = scorecard.resamples(int(data.score.documents.max()) + 1)[:1]
    layer = len(pair.dense.blocks) // 2
    reader = scorecard.Reader(pair, layer, data)
    of_models = [scorecard.losses(model, data.val_windows, {}, model)[:, 0].mean().item()
                 for model in (pair.cayley, pair.dense)]
    for row, make in reader.arms().items():
        if not row.startswith("Cayley"):
            continue
        result = reader.row(make())
        numbers = scorecard.row_numbers(result, once, data.score.documents[:, 0])
        values = [of_models[0], of_models[0] - of_models[1]]
        for key in ("one_f1", "five_f1", "steering_share", "specificity"):
            values.append(numbers[key][0])
        values += [result["codes"]["dead"], result["codes"]["explained"]]
        print(f'"{name}","{row}",' + ",".join(f"{value:.4f}" for value in values), flush=True)
