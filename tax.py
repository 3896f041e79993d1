"""
The interpretability tax: the dense twin and Cayley settings trained by train.py on byte-identical batches.

    python tax.py                                        # configs/demo.py and its dense twin, 5 minutes on 2 cores
    python tax.py --variant "half k: cayley_levels=7,4,0;11,8,64" --variant "no gate: per_parent_budget=False"
    python tax.py --config=configs/cayley_small_2L.py --train_settings max_iters=2000
    python tax.py --ablation --seeds=3 --jobs=2          # what the design leaves open, see ABLATION

Prints each setting's val loss, its gaps to the dense twin and to the first setting at equal tokens, and the multiple of
tokens that it needs for a loss that the twin has reached (by interpolation). Writes tax.csv (a row per evaluation) and
tax.svg to out_dir. Stopped and started again, it goes on. Gaps are paired by seed; +- is the standard deviation.
"""
import csv
import io
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html import escape

import numpy as np
import torch
from tqdm import tqdm

import model
import train
from cayley import CayleySAE, Codes, _parity, labels
from configurator import configure, run_main
from prepare_fineweb import write_text

# settings, see configurator.py
config = "configs/demo.py"  # of every run
variant = []  # "name: key=value key=value", settings of train.py or of AblatedSAE; none: the config itself
train_settings = []  # key=value, settings of train.py for every run
seeds = 1  # runs of each setting, with different weights and batches
jobs = 1  # runs at a time, sharing the cores
out_dir = "out/tax"
ablation = False  # the table below, at its own size, instead of config and variant
long = False  # the ablation's few settings at twice its length

ABLATION_SIZE = ["n_layer=2", "n_embd=256", "n_head=4", "block_size=128", "batch_size=8", "gradient_accumulation_steps=1",
                 "max_iters=250", "warmup_iters=20", "eval_interval=50", "eval_iters=32"]
BASE = "cayley_levels=8,8,0;12,16,64"
RAW = " score_standardize=False forward_standardized=False"
ABLATION = {
    "two levels, 8 + 16 of 256 + 4,096": BASE,
    "level 0 alone, 24 active": "cayley_levels=8,24,0",
    "level 0 alone, 8 active": "cayley_levels=8,8,0",
    "three levels, 8 + 8 + 8": "cayley_levels=8,8,0;12,8,64;16,8,64",
    "k split 16 + 8": "cayley_levels=8,16,0;12,8,64",
    "k split 4 + 20": "cayley_levels=8,4,0;12,20,64",
    "delta 16": "cayley_levels=8,8,0;12,16,16",
    "delta 256": "cayley_levels=8,8,0;12,16,256",
    "no gate": BASE + " per_parent_budget=False",
    "raw scores, raw codes": BASE + RAW,
    "standardised scores, raw codes": BASE + " forward_standardized=False",
    "Gold exponent 3": BASE + " dictionary=gold",
    "random dictionary": BASE + " dictionary=random",
    "residual of the level above": BASE + " residual=True",
    "no repeats of parents": BASE + " repeats=False",
    "by absolute value": BASE + " absolute=True",
    "leaves weigh 1/2": BASE + " leaf_weight=0.5",
    "k split 16 + 8, delta 16": "cayley_levels=8,16,0;12,8,16",
    "k split 16 + 8, delta 16, raw": "cayley_levels=8,16,0;12,8,16" + RAW,
    "level 0 alone, 24 active, raw": "cayley_levels=8,24,0" + RAW,
}
LONG = ["two levels, 8 + 16 of 256 + 4,096", "level 0 alone, 24 active", "raw scores, raw codes", "no repeats of parents",
        "no gate", "residual of the level above", "leaves weigh 1/2", "k split 16 + 8, delta 16", "k split 16 + 8, delta 16, raw",
        "level 0 alone, 24 active, raw"]


class AblatedSAE(CayleySAE):
    """
    CayleySAE by the plain definition, with a dense dictionary, and options that it doesn't have: for small sizes.

    dictionary "kasami" (the design's), "gold" (label bits Tr(alpha^j x^3), j = 0, 1, ...) or "random" (signs; block 0 of
    each parent stays it); residual: a level scores what the levels above leave; repeats: a leaf may be its parent's atom;
    absolute: the largest |score| are active; leaf_weight: of the atoms of all levels but the first.
    """

    dictionary, residual, repeats, absolute, leaf_weight = "kasami", False, True, False, 1.0

    def __init__(self, *args):
        super().__init__(*args)
        for i, level in enumerate(self.levels):
            if self.dictionary == "random" and i > 0:
                signs = torch.randint(0, 2, (2**level.n, self.n_embd), generator=torch.Generator().manual_seed(i)) * 2.0 - 1
                signs[::2 ** (level.n - self.t)] = self.atoms(0, range(self.n_embd)) * 2 ** (self.t / 2)
                atoms = signs * 2 ** (-self.t / 2)
            elif self.dictionary == "gold" and i > 0:
                gold = labels(self.t, level.n, exponents=(3,))
                atoms = _parity(np.arange(2**level.n)[:, None], gold, torch.float32, "cpu") * 2 ** (-self.t / 2)
            else:
                atoms = self.atoms(i, range(2**level.n))
            self.register_buffer(f"atoms_{i}", atoms, persistent=False)
        self.register_buffer("pending_raw", torch.zeros(2, len(self.bias)), persistent=False)

    def encode(self, x):
        codes, left = [], x
        vectors = (*self.standardization(), self.bias)  # (F,) each
        for i, (level, where) in enumerate(zip(self.levels, self.level_slices)):
            atoms, m = getattr(self, f"atoms_{i}"), self.plan[3 * i + 2]
            scale, shift, bias = (vector[where] for vector in vectors)
            with torch.no_grad():
                raw = left @ atoms.T  # (..., 2^n)
                score = raw * scale + shift + bias
                rank = score.abs() if self.absolute else score
                if m < level.n:
                    opened = torch.zeros(*x.shape[:-1], 2 ** (level.n - m), dtype=torch.bool, device=x.device)
                    opened.scatter_(-1, codes[-1].ids >> (self.levels[i - 1].n + m - level.n), True)
                    rank = rank.unflatten(-1, (-1, 2**m)).masked_fill(~opened.unsqueeze(-1), -math.inf).flatten(-2)
                if i > 0 and not self.repeats:
                    rank[..., ::2 ** (level.n - self.levels[i - 1].n)] = -math.inf
                ids = rank.topk(level.k).indices
                if self.training:
                    some = raw[..., ::self.stats_stride, :].flatten(0, -2)
                    self.pending_raw[:, where] += torch.stack([some.sum(0), some.square().sum(0)])
                    self.pending_counts[where] += ids.flatten().bincount(minlength=2**level.n)
            raw = (atoms[ids] @ left.unsqueeze(-1)).squeeze(-1)  # of the active, with their gradient
            values = (raw * scale[ids] + shift[ids] if self.forward_standardized else raw) + bias[ids]
            codes.append(Codes(ids, values * (self.leaf_weight if i else 1)))
            if self.residual:  # in raw units
                left = left - self._sum(i, ids, raw)
        if self.training:
            self.pending_rows += x[..., ::self.stats_stride, 0].numel()
        return codes

    def _sum(self, level, ids, values):
        flat = torch.nn.functional.embedding_bag(ids.flatten(0, -2), getattr(self, f"atoms_{level}"), mode="sum",
                                                 per_sample_weights=values.flatten(0, -2))
        return flat.view(*ids.shape[:-1], self.n_embd)

    def decode(self, codes):
        return sum(self._sum(i, c.ids, c.values) for i, c in enumerate(codes))

    @torch.no_grad()
    def update_stats(self):
        """On one rank."""
        mean, square = self.pending_raw / self.pending_rows
        self.mean += self.stats_momentum * (mean - self.mean)
        self.var += self.stats_momentum * ((square - mean * mean).clamp_min(0) - self.var)
        self.active_counts += self.pending_counts
        for pending in (self.pending_raw, self.pending_rows, self.pending_counts):
            pending.zero_()


# -----------------------------------------------------------------------------
# runs

def parse_settings(text):
    """"key=value key=value" -> train.py's settings (a list of key=value) and AblatedSAE's (a dict)."""
    ours, theirs = {}, []
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: write key=value")
        default = AblatedSAE.__dict__.get(key)
        if isinstance(default, (bool, str, float)) and not key.startswith("_"):
            ours[key] = value == "True" if type(default) is bool else type(default)(value)
        else:
            theirs.append(word)
    return theirs, ours


def train_one():
    """This process is train.py with AblatedSAE in its model: tax.py --train-ablated "options" and train.py's arguments."""
    _, _, options, *sys.argv[1:] = sys.argv
    for key, value in parse_settings(options)[1].items():
        setattr(AblatedSAE, key, value)
    model.CayleySAE = AblatedSAE
    train.main()


def run_directory(name, seed):
    return os.path.join(out_dir, "".join(c if c.isalnum() else "_" for c in name), f"seed{seed}")


def claim(directory, text):
    """Raise ValueError if a directory holds a run with other settings than text; otherwise it is of these."""
    path = os.path.join(directory, "settings.txt")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if (old := file.read()) != text:
                raise ValueError(f"{directory} holds a run with {old!r}, not {text!r}: choose another name or --out_dir")
    os.makedirs(directory, exist_ok=True)
    write_text(path, text)


def run(name, settings, seed, common):
    """One run of train.py, to its end or from where it stopped -> rows (tokens, val_loss) of its evaluations."""
    directory = run_directory(name, seed)
    theirs, ours = parse_settings(settings)
    init_from = "resume" if os.path.exists(os.path.join(directory, "last.pt")) else "scratch"
    script = [os.path.abspath(__file__), "--train-ablated", settings] if ours else [train.__file__]
    arguments = [f"--{word}" for word in [*common, *theirs, f"seed={1337 + seed}", f"out_dir={directory}", f"init_from={init_from}"]]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    result = subprocess.run([sys.executable, *script, config, *arguments], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise ValueError(f"{name}, seed {seed}: {result.stderr.strip().splitlines()[-1]}")
    with open(os.path.join(directory, "log.csv"), newline="") as file:
        return [(int(row["tokens"]), float(row["val_loss"])) for row in csv.DictReader(file) if row["val_loss"]]


def token_multiple(curve, dense):
    """How many times the dense twin's tokens a curve's last loss took: rows (tokens, loss); nan if the twin is always above."""
    tokens, loss = curve[-1]
    for (t0, l0), (t1, l1) in zip(dense, dense[1:]):
        if l0 >= loss >= l1:
            return tokens / (t0 + (t1 - t0) * (l0 - loss) / max(l0 - l1, 1e-12))
    return math.nan


def summarize(curves):
    """{name: [curve per seed]}, the dense twin first -> printed table, a list of lines; gaps are paired by seed."""
    def cell(values, form):
        return f"{np.mean(values):{form}}" + (f" +- {np.std(values, ddof=1):{form.strip('+')}}" if len(values) > 1 else "")

    def gap(runs, others):
        return [c[-1][1] - other[-1][1] for c, other in zip(runs, others)]
    dense, first = list(curves.values())[:2]
    lines = ["| setting | val loss | gap to dense | to the first setting | tokens for equal loss |", "|---|---|---|---|---|"]
    for name, runs in curves.items():
        cells = [name, cell([c[-1][1] for c in runs], ".3f"), "", "", ""]
        if runs is not dense:
            cells[2] = cell(gap(runs, dense), ".3f")
            cells[4] = cell([token_multiple(c, d) for c, d in zip(runs, dense)], ".2f") + "x"
        if runs is not dense and runs is not first:
            cells[3] = cell(gap(runs, first), "+.3f")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def chart(curves):
    """Mean val loss against tokens as SVG text, in light and dark."""
    width, height, left, top = 760, 420, 60, 20
    mean = {name: np.mean(runs, axis=0) for name, runs in curves.items()}  # (evaluations, 2)
    shown = np.concatenate([curve[1:] for curve in mean.values()])  # the untrained model would flatten the rest
    x1, y0, y1 = shown[:, 0].max(), shown[:, 1].min(), shown[:, 1].max()

    def place(tokens, loss):
        return left + (width - left - 200) * tokens / x1, top + (height - top - 50) * (y1 - loss) / max(y1 - y0, 1e-9)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
             "<style>text{fill:#222}svg{background:#fff}line{stroke:#8884}@media(prefers-color-scheme:dark)"
             "{text{fill:#ddd}svg{background:#111}}</style>"]
    for i in range(6):
        tokens, loss = x1 * i / 5, y0 + (y1 - y0) * i / 5
        (x, _), (_, y) = place(tokens, y0), place(0, loss)
        parts.append(f'<line x1="{left}" x2="{width - 200}" y1="{y:.1f}" y2="{y:.1f}"/><text x="{left - 8}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{loss:.2f}</text><text x="{x:.1f}" y="{height - 32}" '
                     f'text-anchor="middle">{tokens / 1e6:.3g}M</text>')
    for i, (name, curve) in enumerate(mean.items()):
        colour = f"hsl({i * 360 / len(mean):.0f} 65% 48%)"
        points = " ".join("{:.1f},{:.1f}".format(*place(*row)) for row in curve[1:])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/><text x="{width - 190}" '
                     f'y="{top + 12 + 16 * i}" style="fill:{colour}">{escape(name[:34])}</text>')
    parts.append(f'<text x="{left}" y="{height - 10}">tokens; val loss in nats per token</text></svg>')
    return "\n".join(parts)


def main():
    if sys.argv[1:2] == ["--train-ablated"]:
        return train_one()
    configure(globals())
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds={seeds} and jobs={jobs} must be at least 1")
    if not os.path.isfile(config):
        raise ValueError(f"{config}: no such config")
    settings, common = {"dense": "cayley_levels="}, list(train_settings)
    if ablation:
        common = ABLATION_SIZE + ["max_iters=500"] * long + common
        settings |= {name: ABLATION[name] for name in (LONG if long else ABLATION)}
    else:
        settings |= dict(text.partition(":")[::2] for text in variant) or {"cayley": ""}
    for text in [*settings.values(), *common]:
        parse_settings(text)
    for name, text in settings.items():
        for seed in range(seeds):
            claim(run_directory(name, seed), " ".join([config, *common, text]))
    work = [(name, seed) for seed in range(seeds) for name in settings]
    with ThreadPoolExecutor(jobs) as pool:
        curves = list(tqdm(pool.map(lambda item: run(item[0], settings[item[0]], item[1], common), work), total=len(work), unit="run"))
    runs = {name: [curve for (n, _), curve in zip(work, curves) if n == name] for name in settings}
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("setting", "seed", "tokens", "val_loss")] + [
        (name, seed, *row) for name, c in runs.items() for seed, curve in enumerate(c) for row in curve])
    write_text(os.path.join(out_dir, "tax.csv"), table.getvalue())
    write_text(os.path.join(out_dir, "tax.svg"), chart(runs))
    for i, (tokens, _) in enumerate(runs["dense"][0]):
        print(f"{tokens:>13,} tokens: " + ", ".join(f"{name} {np.mean([c[i][1] for c in r]):.4f}" for name, r in runs.items()))
    print("\n".join(summarize(runs)))


if __name__ == "__main__":
    run_main(main)
