"""
The scorecard's headline numbers of variants of the layer, without the rows that they share.

    python records/scorecard/variants.py --dense=dense.pt "name: cayley.pt" "name: other.pt" ...

Prints a row of variants.csv for each checkpoint and each of its levels: val loss, how far it lies
above the dense twin, F1 of the best feature and of 5, steering's share of the gradient's effect,
the ablation's specificity, features that are never active, and what the code explains.
"""
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import scorecard  # noqa: E402
from configurator import run_main  # noqa: E402
from model import pick_device  # noqa: E402

NUMBERS = ("one_f1", "five_f1", "steering_share", "specificity")


def loss_of(model, data):
    return scorecard.losses(model, data.val_windows, {}, model)[:, 0].mean().item()


def rows_of(name, pair, data, loss_of_dense):
    """Lists of cells for one checkpoint."""
    once = scorecard.resamples(data.n_documents)[:1]
    (layer,) = scorecard.chosen_layers(len(pair.dense.blocks))
    reader = scorecard.Reader(pair, layer, data)
    loss = loss_of(pair.cayley, data)
    for row, make in reader.arms().items():
        if row.startswith("Cayley"):
            result = reader.row(make())
            numbers = scorecard.row_numbers(result, once, data.score.documents[:, 0])
            values = [loss, loss - loss_of_dense, *(numbers[key][0] for key in NUMBERS)]
            values += [result["codes"]["dead"], result["codes"]["explained"]]
            yield [name, row, *(f"{value:.4f}" for value in values)]


def main():
    words = [word for word in sys.argv[1:] if word.startswith("--")]
    variants = [word.partition(": ") for word in sys.argv[1:] if not word.startswith("--")]
    scorecard.configure(vars(scorecard), words)
    scorecard.check_settings()
    if not variants or not all(path for _, _, path in variants):
        raise ValueError('give one or more checkpoints as "name: cayley.pt"')
    target = pick_device(scorecard.device)
    pairs = []
    for name, _, path in variants:
        pair, configs = scorecard.load_pair(path, scorecard.dense, target)
        pairs.append((name, pair))
    # all are twins of one dense model, and so of one set of data
    data = scorecard.load_data(configs[0])
    loss_of_dense = loss_of(pair.dense, data)
    writer = csv.writer(sys.stdout)
    writer.writerow(["variant", "row", "val_loss", "minus_dense", *NUMBERS, "dead", "explained"])
    for name, pair in pairs:
        writer.writerows(rows_of(name, pair, data, loss_of_dense))


if __name__ == "__main__":
    run_main(main)
