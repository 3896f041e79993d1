"""
The interpretability tax: the dense twin and settings of train.py, trained on the same batches.

    python -m tools.tax                                # configs/demo.py and its dense twin
    python -m tools.tax --variant "half k: cayley_levels=7,4,0;11,8,64" \\
                  --variant "no gate: per_parent_budget=False"
    python -m tools.tax --config=configs/cayley_small_2L.py --train_settings max_iters=2000

Prints each setting's val loss, its gaps to the dense twin and to the first setting at equal tokens,
and the multiple of tokens that it needs for a loss that the twin has reached (by interpolation).
Writes tax.csv (a row per evaluation) and tax.svg to out_dir, and each run to out_dir/NAME/seedN,
which scorecard and circuits take as a checkpoint. Stopped and started again, it goes on.
Gaps are paired by seed; +- is the standard deviation. records/ablation/ uses its functions.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.tax")

import csv
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from configurator import configure
from data import make_directory, progress, write_text
from tools import account
from tools.report import line_chart, markdown, write_csv

# settings, see configurator.py
config = "configs/demo.py"  # of every run
variant = []  # "name: key=value key=value", settings of train.py; none: the config itself
train_settings = []  # key=value, settings of train.py for every run
seeds = 1  # runs of each setting, with different weights and batches
jobs = 1  # runs at a time, sharing the cores
out_dir = "out/tax"

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = [os.path.join(ROOT, "train.py")]
DENSE = "cayley_levels="
OURS = ("seed", "out_dir", "init_from")  # settings of train.py that this script gives
ALIKE = ("max_iters", "eval_interval", "batch_size", "gradient_accumulation_steps", "block_size",
         "data_dir")  # that only train_settings may give, for gaps at equal tokens

# -----------------------------------------------------------------------------
# runs

def check_words(words, alike=()):
    """Raise ValueError for a word that isn't key=value, or whose key is in OURS or alike."""
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: write key=value")
        key = key.replace("-", "_")  # as configurator.py reads it
        if key in OURS:
            raise ValueError(f"{word!r}: tax.py gives {key} itself")
        if key in alike:
            raise ValueError(f"{word!r}: all runs share {key}: give it by --train_settings")


def parse_variants(texts):
    """
    ["name: key=value key=value"] -> {name: "key=value key=value"}, the dense twin first.

    Raises ValueError for a text without a name and for a name that is taken.
    """
    settings = {"dense": DENSE}
    for text in texts or ["cayley:"]:
        name, colon, words = text.partition(":")
        if not colon or not name.strip():
            raise ValueError(f"variant={text!r}: write name: key=value key=value")
        if name in settings:
            raise ValueError(f"variant={text!r}: the name {name!r} is taken, choose another")
        settings[name] = words
    return settings


def run_directory(out_dir, name, seed):
    safe = "".join(c if c.isalnum() else "_" for c in name)
    return os.path.join(out_dir, safe, f"seed{seed}")


def claim(directory, text):
    """
    Note in a directory that its run has the settings text.

    Raises ValueError if it holds a run with other settings.
    """
    path = os.path.join(directory, "settings.txt")
    if os.path.exists(path) and os.path.exists(os.path.join(directory, "log.csv")):
        with open(path, encoding="utf-8") as file:
            old = file.read()
        if old != text:
            raise ValueError(f"{directory} holds a run with {old!r}, not {text!r}: "
                             "choose another name or --out_dir")
    make_directory(directory)
    write_text(path, text)


def read_curve(directory):
    """A run's evaluations: rows (tokens, val_loss)."""
    with open(os.path.join(directory, "log.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    return [(int(row["tokens"]), float(row["val_loss"])) for row in rows]


def can_resume(directory):
    return os.path.exists(os.path.join(directory, "last.pt"))


def launch(script, config, words, directory, threads):
    """
    A process of train.py, to its end, for a run in directory.

    script: the command line of train.py, or of a script that takes train.py's arguments; words:
    key=value. Raises ValueError with the last line of its errors if it fails.
    """
    words = [*words, f"out_dir={directory}"]
    command = [sys.executable, *script, config, *(f"--{word}" for word in words)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
        raise ValueError(f"{directory}: {reason}")


def check_setting(name, config, words):
    """Raise ValueError, with the setting's name, where train.py would refuse to begin its run."""
    try:
        account.check_run([config, *(f"--{word}" for word in words)])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def compare(settings, config, common, out_dir, seeds=1, jobs=1, script=TRAIN):
    """
    Train every setting with every seed, all on the same batches.

    settings: {name: "key=value key=value"}; common: a list of key=value for all of them; script:
    see launch. Settings of train.py itself are all checked before the first training; another
    script's arguments are its own to check. Returns {name: [curve per seed]}, a curve being rows
    (tokens, val_loss). Raises ValueError for impossible arguments, for a directory in out_dir that
    holds a run with other settings, and if a run fails.
    """
    if not os.path.isfile(config):
        raise ValueError(f"{config}: no such config")
    check_words(common)
    for text in settings.values():
        check_words(text.split(), ALIKE)
    if len({run_directory(out_dir, name, 0) for name in settings}) < len(settings):
        raise ValueError(f"two of {list(settings)} would share a directory: choose other names")
    if script == TRAIN:
        for name, text in settings.items():
            check_setting(name, config, [*common, *text.split()])
    work = [(name, seed) for seed in range(seeds) for name in settings]
    for name, seed in work:
        text = " ".join([config, *common, settings[name]])
        claim(run_directory(out_dir, name, seed), text)
    threads = max(1, os.cpu_count() // jobs)

    def run_one(item):
        name, seed = item
        directory = run_directory(out_dir, name, seed)
        init_from = "resume" if can_resume(directory) else "scratch"
        words = [*common, *settings[name].split(), f"seed={1337 + seed}", f"init_from={init_from}"]
        launch(script, config, words, directory, threads)
        return read_curve(directory)

    curves = {name: [] for name in settings}
    with ThreadPoolExecutor(jobs) as pool:
        finished = progress(pool.map(run_one, work), total=len(work), unit="run")
        for (name, _), curve in zip(work, finished):
            curves[name].append(curve)
    return curves


# -----------------------------------------------------------------------------
# what they say; curves: {name: [curve per seed]}, the dense twin first

def token_multiple(curve, dense):
    """
    How many times the dense twin's tokens a curve's last loss took: rows (tokens, loss).

    nan if the twin is always above it.
    """
    tokens, loss = curve[-1]
    for (t0, l0), (t1, l1) in zip(dense, dense[1:]):
        if l0 >= loss >= l1:
            return tokens / (t0 + (t1 - t0) * (l0 - loss) / max(l0 - l1, 1e-12))
    return math.nan


def mean_and_deviation(values, form, sign=""):
    """Text of the mean and, of more than one value, the standard deviation."""
    text = f"{np.mean(values):{sign}{form}}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):{form}}"
    return text


def gaps(runs, others):
    """Differences of the last losses, seed by seed."""
    return [curve[-1][1] - other[-1][1] for curve, other in zip(runs, others)]


def summarize(curves):
    """The table, as lines of Markdown; gaps are paired by seed."""
    dense, first = list(curves.values())[:2]
    rows = []
    for name, runs in curves.items():
        loss = mean_and_deviation([curve[-1][1] for curve in runs], ".3f")
        to_dense = to_first = multiple = ""
        if runs is not dense:
            to_dense = mean_and_deviation(gaps(runs, dense), ".3f")
            multiples = [token_multiple(curve, twin) for curve, twin in zip(runs, dense)]
            multiple = mean_and_deviation(multiples, ".2f") + "x"
        if runs is not dense and runs is not first:
            to_first = mean_and_deviation(gaps(runs, first), ".3f", sign="+")
        rows.append([name, loss, to_dense, to_first, multiple])
    columns = ["setting", "val loss", "gap to dense", "to the first setting",
               "tokens for equal loss"]
    return markdown(columns, rows)


def chart(curves):
    """Mean val loss against tokens as SVG text."""
    # the untrained model's loss would flatten the rest
    mean = {name: np.mean(runs, axis=0)[1:] for name, runs in curves.items()}  # (evaluations, 2)
    return line_chart(mean, "tokens; val loss in nats per token")


def report(curves, out_dir):
    """Write tax.csv and tax.svg to out_dir; print each evaluation's mean losses and the table."""
    rows = []
    for name, runs in curves.items():
        for seed, curve in enumerate(runs):
            rows += [(name, seed, tokens, loss) for tokens, loss in curve]
    write_csv(os.path.join(out_dir, "tax.csv"), ("setting", "seed", "tokens", "val_loss"), rows)
    write_text(os.path.join(out_dir, "tax.svg"), chart(curves))
    first_run = next(iter(curves.values()))[0]
    for i, (tokens, _) in enumerate(first_run):
        losses = {name: np.mean([curve[i][1] for curve in runs]) for name, runs in curves.items()}
        print(f"{tokens:>13,} tokens: "
              + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print("\n".join(summarize(curves)))


def main():
    configure(globals(), at_least={"seeds": 1, "jobs": 1})
    settings = parse_variants(variant)
    report(compare(settings, config, train_settings, out_dir, seeds, jobs), out_dir)


if __name__ == "__main__":
    main()
