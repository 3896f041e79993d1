"""
The scorecard's headline numbers of variants of the layer, without the rows that they share.

    python records/scorecard/variants.py --dense=dense.pt "name: cayley.pt" "name: other.pt" ...

Prints a row of variants.csv for each checkpoint, for each of its levels if it has several, and for
a post-hoc SAE on the dense twin with as many features: val loss (the SAE's with it in the layer),
how far it lies above the dense twin, F1 of the best feature and of 5, steering's share of the
gradient's effect, the ablation's specificity, features that are never active, and what the code
explains.
"""
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from checkpoint import pick_device  # noqa: E402
from tools import scorecard  # noqa: E402

NUMBERS = ("one_f1", "five_f1", "steering_share", "specificity")


def mean_loss(model, data, modules):
    scores = scorecard.losses(model, data.val_windows, modules, model, scorecard.batch_size)
    return scores[:, 0].mean().item()


def numbers_of(reader, arm, modules, loss_of_dense):
    """Cells of one row, after the names; modules: what is spliced into the model for its loss."""
    data = reader.data
    result = reader.row(arm)
    once = scorecard.resamples(data.n_documents)[:1]
    numbers = scorecard.row_numbers(result, once, data.score.documents[:, 0])
    loss = mean_loss(arm.model, data, modules)
    values = [loss, loss - loss_of_dense, *(numbers[key][0] for key in NUMBERS)]
    values += [result["codes"]["dead"], result["codes"]["explained"]]
    return [f"{value:.4f}" for value in values]


def read_command(doc):
    """
    Set scorecard.py from the command line -> the other arguments; doc: what --help prints.

    Raises ValueError as scorecard.py does.
    """
    settings = [word for word in sys.argv[1:] if word.startswith("--")]
    scorecard.__doc__ = doc
    scorecard.configure(vars(scorecard), settings, at_least=scorecard.AT_LEAST)
    scorecard.check_settings()
    return [word for word in sys.argv[1:] if not word.startswith("--")]


def one_layer(model):
    """The layer to read. Raises ValueError if the settings name several."""
    chosen = scorecard.chosen_layers(len(model.blocks))
    if len(chosen) > 1:
        raise ValueError(f"layers={scorecard.layers!r}: name one layer")
    return chosen[0]


def fitted_sae(model, data, layer, shape):
    """A post-hoc SAE of a model; shape: its features, and how many of them are active."""
    (sae,) = scorecard.fitted_saes(model, data.train, [(layer, "TopK")], *shape, seed=0)
    return sae.eval().requires_grad_(False)


def main():
    variants = [word.partition(": ") for word in read_command(__doc__)]
    if not variants or not all(path for _, _, path in variants):
        raise ValueError('give one or more checkpoints as "name: cayley.pt"')
    target = pick_device(scorecard.device)
    pairs = []
    for name, _, path in variants:
        pair, configs = scorecard.load_pair(path, scorecard.dense, target)
        pairs.append((name, pair))
    layer = one_layer(pair.dense)
    # all are twins of one dense model, and so of one set of data
    data = scorecard.load_data(configs[0])
    loss_of_dense = mean_loss(pair.dense, data, {})
    writer = csv.writer(sys.stdout)
    writer.writerow(["variant", "row", "val_loss", "minus_dense", *NUMBERS, "dead", "explained"])
    shapes = {}  # of post-hoc SAEs, without repetition
    for name, pair in pairs:
        reader = scorecard.Reader(pair, layer, data)
        for row, make in reader.arms().items():
            if row.startswith("Cayley"):
                writer.writerow([name, row, *numbers_of(reader, make(), {}, loss_of_dense)])
        shapes[scorecard.code_shape(pair.cayley.saes()[0])] = None
    for n_features, k in shapes:
        sae = fitted_sae(pair.dense, data, layer, (n_features, k))
        arm = scorecard.sae_arm(scorecard.REFERENCE, pair.dense, sae)
        cells = numbers_of(reader, arm, {layer: sae}, loss_of_dense)
        writer.writerow([f"{k} of {n_features}", scorecard.REFERENCE, *cells])


if __name__ == "__main__":
    main()
