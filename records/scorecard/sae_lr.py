"""
How the post-hoc TopK SAE of scorecard.py depends on its learning rate and batch.

    python records/scorecard/sae_lr.py --ckpt=cayley.pt --dense=dense.pt 3.5e5,5e-3,1024 ...

Each argument tokens,lr,batch fits one SAE to the middle layer of the dense twin and prints a row of
sae_lr.csv: what it explains of the val split's documents, and F1 of its best feature and of 5.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from variants import fitted_sae, one_layer, read_command  # noqa: E402

from checkpoint import pick_device  # noqa: E402
from model import covariances, explained  # noqa: E402
from tools import scorecard  # noqa: E402


def parse_choice(text):
    """"3.5e5,5e-3,1024" -> (350000, 0.005, 1024)."""
    try:
        tokens, lr, batch = text.split(",")
        return int(float(tokens)), float(lr), int(batch)
    except ValueError:
        raise ValueError(f"{text!r}: write tokens,lr,batch, as in 3.5e5,5e-3,1024") from None


def choose(tokens, lr, batch):
    """Have the next SAE fitted so. Raises ValueError for what makes no sense."""
    if batch < 1:
        raise ValueError(f"batch={batch}: must be at least 1")
    if tokens < batch:
        raise ValueError(f"sae_tokens={tokens}: must be at least a batch, {batch}")
    scorecard.sae_tokens = tokens
    scorecard.sae_lr = lr
    scorecard.SAE_BATCH = batch
    scorecard.check_settings()


def row_of(reader, sae):
    """What an SAE on the dense twin explains, F1 of one feature and of five, and dead features."""
    fit_x, score_x = reader.inputs(reader.pair.dense)
    sides = (reader.fit_labels, reader.score_labels, reader.documents)
    once = scorecard.resamples(reader.data.n_documents)[:1]
    arm = scorecard.sae_arm("SAE", reader.pair.dense, sae)
    fit, score = scorecard.encoded(arm, fit_x), scorecard.encoded(arm, score_x)
    one = scorecard.stacked(scorecard.probe_one(fit, score, *sides)[1])
    five = scorecard.stacked(scorecard.probe_some(fit, score, *sides))
    numbers = [explained(covariances(score_x, sae(score_x))).item()]
    numbers += [scorecard.probe_scores(tables, once)[0, 0] for tables in (one, five)]
    dead = int((score.counts() == 0).sum())
    return [*(f"{number:.4f}" for number in numbers), str(dead)]


def main():
    choices = [parse_choice(word) for word in read_command(__doc__)]
    if not choices:
        raise ValueError("give one or more choices tokens,lr,batch, as in 3.5e5,5e-3,1024")
    for choice in choices:  # a wrong one before the first takes minutes
        choose(*choice)
    target = pick_device(scorecard.device)
    pair, configs = scorecard.load_pair(scorecard.ckpt, scorecard.dense, target)
    layer = one_layer(pair.dense)
    data = scorecard.load_data(configs[0])
    reader = scorecard.Reader(pair, layer, data)
    shape = scorecard.code_shape(pair.cayley.saes()[0])
    print("tokens,lr,batch,explained,one_f1,five_f1,dead")
    for choice in choices:
        choose(*choice)
        sae = fitted_sae(pair.dense, data, layer, shape)
        print(*choice, *row_of(reader, sae), sep=",", flush=True)


if __name__ == "__main__":
    main()
