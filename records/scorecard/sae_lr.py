"""
How the post-hoc TopK SAE of scorecard.py depends on its learning rate and batch.

    python records/scorecard/sae_lr.py --ckpt=cayley.pt --dense=dense.pt 3.5e5,5e-3,1024 ...

Each argument tokens,lr,batch fits one SAE to the middle layer of the dense twin and prints a row of
sae_lr.csv: what it explains of the val split's documents, and F1 of its best feature and of 5.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import scorecard  # noqa: E402
from evals import covariances, explained  # noqa: E402

words = [word for word in sys.argv[1:] if word.startswith("--")]
choices = [word.split(",") for word in sys.argv[1:] if not word.startswith("--")]
scorecard.configure(vars(scorecard), words)
pair, configs = scorecard.load_pair(scorecard.ckpt, scorecard.dense, torch.device("cpu"))
data = scorecard.load_data(configs[0])
layer = len(pair.dense.blocks) // 2
reader = scorecard.Reader(pair, layer, data)
fit_x, score_x = reader.inputs(pair.dense)
sides = (reader.fit_labels, reader.score_labels, reader.documents)
once = scorecard.resamples(data.n_documents)[:1]
shape = scorecard.code_shape(pair.cayley.saes()[0])
print("tokens,lr,batch,explained,one_f1,five_f1,dead")
for tokens, lr, batch in choices:
    scorecard.sae_tokens = int(float(tokens))
    scorecard.sae_lr = float(lr)
    scorecard.SAE_BATCH = int(batch)
    (sae,) = scorecard.fitted_saes(pair.dense, data.train, [(layer, "TopK")], *shape, seed=0)
    arm = scorecard.sae_arm("SAE", pair.dense, sae)
    fit, score = scorecard.encoded(arm, fit_x), scorecard.encoded(arm, score_x)
    one = scorecard.stacked(scorecard.probe_one(fit, score, *sides)[1])
    five = scorecard.stacked(scorecard.probe_some(fit, score, *sides))
    numbers = [explained(covariances(score_x, sae(score_x))).item()]
    numbers += [scorecard.probe_scores(tables, once)[0, 0] for tables in (one, five)]
    dead = int((score.counts() == 0).sum())
    print(f"{tokens},{lr},{batch}," + ",".join(f"{number:.4f}" for number in numbers) + f",{dead}",
          flush=True)
