"""
What does it cost if every MLP reads features and nothing else? Models whose MLPs read a code by
construction, beside a dense model with post-hoc SAEs spliced into all of its layers.

    python -m tools.splice --dense=dense.pt --ckpt=one.pt,two.pt
    python -m tools.splice --dense=dense.pt --features=512,2048 --lr=2e-3,5e-3 --tokens=3e5,1e6
    python -m tools.splice --dense=dense.pt --fitted_to=spliced --kl_tokens=131_072

Settings with commas are swept: an SAE in each layer for every combination. Prints a table and
writes it as splice.csv, anew at every run, and the SAEs to out_dir, a file for each combination
(circuits.py takes one as --saes); those that are there already are not fitted again.

--fitted_to: "clean", what the dense model's MLPs read, or "spliced", what they read when the SAEs
in the layers before are spliced in, as these are by then (all layers are fitted together; the first
8 steps are clean).
--kl_tokens: afterwards all SAEs are finetuned together to the least KL(dense || spliced), end to
end (Braun et al., "Identifying Functionally Important Features with End-to-End Sparse Dictionary
Learning", 2024; Karvonen, "Revisiting End-to-End Sparse Autoencoder Training: A Short Finetune Is
All You Need", 2025), in steps of about 1,024 tokens, at a tenth of the learning rate, which falls
to 0.

Losses are in nats a token, over n_windows of the val split; "above dense" is paired by window, with
its standard error. KL is KL(dense || row). Fits see the train split alone. parameters and FLOPs:
what the row adds to the dense model, FLOPs as a share of its forward; for a CayleySAE they aren't
counted (records/bench has them: 5% of a block with the reference's two levels). fitting: FLOPs of
the fit, 2 a weight and token forward and as many for each gradient, the dense model's forward with
them.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.splice")

import contextlib
import functools
import itertools
import math
import os
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from checkpoint import build_model, load_checkpoint, load_model, pick_device
from configurator import configure
from data import lock, progress
from tools.evals import digest, mean_and_error
from tools.report import aligned, batches, write_csv
from tools.runs import run_windows, write_tensors
from tools.topk_sae import Schedule, TopKSAE, fit_saes, restored, states_of

# settings, see configurator.py
dense = "out/dense/ckpt.pt"  # a model without a CayleySAE
ckpt = ""  # models with one, of the same data, commas between; "": none
data_dir = ""  # "": that of the dense model's run
out_dir = "out/splice"
features = "2048"  # of an SAE
k = 36  # of them active
kinds = "TopK"  # and Matryoshka
fitted_to = "clean"  # and spliced, see above
tokens = "262_144"  # that SAEs are fitted to
lr = "5e-3"  # of Adam, at the peak
kl_tokens = "0"  # of the finetuning; 0: none
seeds = 1  # of the SAEs
n_windows = 192  # of the val split
batch_size = 16  # windows in a forward pass
device = "auto"

SAE_BATCH = 1024  # tokens in a step of a fit, and of a finetuning
KL_RATE = 0.1  # of the finetuning, of the fit's
CHOICES = {"kinds": ("TopK", "Matryoshka"), "fitted_to": ("clean", "spliced")}
ANOTHER = {"model": "another model", "data": "other data, take another out_dir"}

# -----------------------------------------------------------------------------
# what an MLP reads, and what comes of reading something else


class Site(NamedTuple):
    """What a forward had at one layer: (B, T, d) each."""

    residual: Any  # before the second norm
    x: Any  # after it
    mlp_input: Any  # what the MLP read: x, or the code of x


@contextlib.contextmanager
def watching(model, layer):
    """Yields a list to which every forward inside the block appends its Site."""
    seen = []
    block = model.blocks[layer]

    def see(module, inputs, output):
        seen.append((inputs[0], output))

    def see_mlp(module, inputs, output):
        seen[-1] = Site(*seen[-1], inputs[0])

    hooks = [block.ln_2.register_forward_hook(see), block.mlp.register_forward_hook(see_mlp)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def spliced(model, modules):
    """The model with other modules between norm and MLP: {layer: module of x}."""
    before = {layer: model.blocks[layer].sae for layer in modules}
    for layer, module in modules.items():
        model.blocks[layer].sae = module
    try:
        yield model
    finally:
        for layer, module in before.items():
            model.blocks[layer].sae = module


def on_device(model):
    return model.wte.weight.device


@torch.no_grad()
def mlp_inputs(model, windows, at_layers, size, label="reading"):
    """{layer: x (N, d) on the CPU} of windows (M, T), size of them in a forward pass."""
    inputs = {layer: [] for layer in at_layers}
    for rows in batches(windows, size, label):
        with contextlib.ExitStack() as stack:
            seen = {layer: stack.enter_context(watching(model, layer)) for layer in at_layers}
            model(torch.from_numpy(rows).to(on_device(model)))
            for layer, (site,) in seen.items():
                inputs[layer].append(site.x.flatten(0, 1).cpu())
    return {layer: torch.cat(x) for layer, x in inputs.items()}


def kl_divergence(logits, other):
    """KL(softmax(logits) || softmax(other)) in nats: (..., V) -> (...)."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - other.log_softmax(-1))).sum(-1)


@torch.no_grad()
def losses(model, windows, modules, reference, size):
    """
    Per window the mean loss of a model with modules spliced in, and KL(reference || that) in nats
    a token, reference being a model as it is: windows (M, T + 1), size in a pass -> (M, 2).
    """
    rows = []
    for batch in batches(windows, size, "losses"):
        batch = torch.from_numpy(batch).to(on_device(model))
        idx, targets = batch[:, :-1], batch[:, 1:]
        before = reference(idx, n_logits=0)[0].float()
        with spliced(model, modules):
            logits = model(idx, n_logits=0)[0].float()  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = loss.view(targets.shape).mean(1)
        rows.append(torch.stack([loss, kl_divergence(before, logits).mean(1)], 1).cpu())
    return torch.cat(rows)


# -----------------------------------------------------------------------------
# fitting


def new_sae(kind, model, layer, n_features, n_active, seed):
    """
    A TopKSAE for a layer's MLP input, the same for the same seed whatever others are made.

    kind: "TopK" or "Matryoshka", whose prefixes are 1/32, 3/32, 7/32 and 15/32 of the features.
    """
    matryoshka = kind == "Matryoshka"
    torch.manual_seed(1000 * seed + 2 * layer + matryoshka)
    prefixes = [n_features * share // 32 for share in (1, 3, 7, 15)] if matryoshka else ()
    return TopKSAE(model.config.n_embd, n_features, n_active, prefixes).to(on_device(model))


def shuffled_inputs(model, windows, at_layers, size, seed, modules=None):
    """
    Yield lists of x (SAE_BATCH, d), one for each of at_layers, endlessly, tokens shuffled.

    modules: {layer: SAE} to splice in, as they are when some 8 batches are read; the first are
    read without, since they have learned nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    n_rows = max(1, 8 * SAE_BATCH // windows.block_size)
    for first in itertools.count(0, n_rows):
        rows = windows.shuffled(first, n_rows, seed=seed + 1)[:, :-1]
        with spliced(model, modules if modules and first else {}):
            inputs = mlp_inputs(model, rows, set(at_layers), size)
        for picked in torch.randperm(rows.size, generator=rng).split(SAE_BATCH):
            if len(picked) == SAE_BATCH or rows.size < SAE_BATCH:
                yield [inputs[layer][picked].to(on_device(model)) for layer in at_layers]


def finetuning_steps(windows, n_tokens):
    """How many windows a step of a finetuning reads, and how many steps n_tokens make."""
    n_rows = max(1, SAE_BATCH // windows.block_size)
    return n_rows, max(1, n_tokens // (n_rows * windows.block_size))


def kl_losses(reference, forward, windows, n_tokens, seed):
    """
    Yield for every step of a finetuning the mean KL(reference || forward) in nats a token.

    reference: a model; forward: idx (B, T) -> logits (B, T, V); windows: of the train split, of
    which n_tokens in shuffled order are read.
    """
    n_rows, n_steps = finetuning_steps(windows, n_tokens)
    for step in progress(range(n_steps), desc="KL"):
        rows = windows.shuffled(step * n_rows, n_rows, seed=seed + 2)[:, :-1]
        idx = torch.from_numpy(rows).to(on_device(reference))
        with torch.no_grad():
            before = reference(idx, n_logits=0)[0].float()
        yield kl_divergence(before, forward(idx)).mean()


def finetune(model, saes, windows, n_tokens, rate, seed):
    """
    Finetune SAEs, one a layer, to the least KL(model || model with all of them spliced in).

    windows, n_tokens and seed: as kl_losses has them.
    """
    modules = dict(enumerate(saes))

    def forward(idx):
        with spliced(model, modules):
            return model(idx, n_logits=0)[0].float()

    _, n_steps = finetuning_steps(windows, n_tokens)
    schedules = [Schedule(sae, rate, n_steps, cooldown=1.0) for sae in saes]
    for sae in saes:
        sae.requires_grad_(True)
    for step, loss in enumerate(kl_losses(model, forward, windows, n_tokens, seed)):
        loss.backward()
        for schedule in schedules:
            schedule.step(step)
    for sae in saes:
        sae.requires_grad_(False)


# -----------------------------------------------------------------------------
# the sweep


class Variant(NamedTuple):
    """A combination of the settings that are swept, and a seed; k is the same for all."""

    kind: str
    n_features: int
    fitted_to: str
    tokens: int
    lr: float
    kl_tokens: int
    seed: int

    @property
    def path(self):
        words = [*self[:5], "k", k, "kl", self.kl_tokens, "seed", self.seed]
        return os.path.join(out_dir, "_".join(map(str, words)) + ".pt")

    def before_finetuning(self):
        return self._replace(kl_tokens=0)


def swept(name, kind):
    """The values of a setting with commas. Raises ValueError for one that it can't have."""
    values = []
    for word in globals()[name].split(","):
        try:
            value = kind(word.strip())
        except ValueError:
            value = None
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name}={globals()[name]!r}: {word.strip()!r} is none of "
                             f"{', '.join(CHOICES[name])}")
        if value is None or kind is not str and not 0 <= value < math.inf:
            raise ValueError(f"{name}={globals()[name]!r}: {word.strip()!r} is not a number from 0 "
                             "on; write numbers with commas between")
        if value not in values:
            values.append(value)
    return values


def whole(word):
    """An int written as 262144, 262_144 or 3e5. Raises ValueError for others."""
    number = float(word)
    if not number.is_integer():  # infinity isn't, either
        raise ValueError(word)
    return int(number)


def variants():
    """Every Variant that the settings name. Raises ValueError where one makes no sense."""
    axes = {
        "kinds": swept("kinds", str),
        "features": swept("features", whole),
        "fitted_to": swept("fitted_to", str),
        "tokens": swept("tokens", whole),
        "lr": swept("lr", float),
        "kl_tokens": swept("kl_tokens", whole),
    }
    for name, lowest in (("features", max(32, k)), ("tokens", SAE_BATCH)):
        if min(axes[name]) < lowest:
            raise ValueError(f"{name}={globals()[name]!r}: must be at least {lowest}, with k={k}")
    if min(axes["lr"]) == 0:
        raise ValueError(f"lr={lr!r}: must be above 0")
    combinations = itertools.product(*axes.values(), range(seeds))
    return [Variant(*combination) for combination in combinations]


def origin_of(model, windows):
    """What SAEs of a model's inputs on windows depend on beside a Variant, by name."""
    return {"model": digest(model), "data": windows.fingerprint}


def write_saes(saes, path, origin):
    """Write SAEs, one for each layer, and their origin. Raises OSError if it can't."""
    write_tensors(path, {"k": saes[0].k, "saes": states_of(saes), **origin})


def read_saes(path, model, origin):
    """
    The SAEs of a file, one for each layer of a model.

    Raises ValueError if it is no such file, or of another origin: a dict as origin_of's, or a part.
    """
    try:
        content = torch.load(path, map_location=on_device(model), weights_only=True)
        saes = [restored(state, content["k"], on_device(model)) for state in content["saes"]]
        found = {name: content[name] for name in origin}
    except Exception as error:  # whatever a damaged file raises
        raise ValueError(f"{path}: not a file of SAEs by tools.splice, which fits them anew where "
                         f"none is ({error})") from None
    for name, value in origin.items():
        if found[name] != value:
            raise ValueError(f"{path}: its SAEs were fitted to {ANOTHER[name]}")
    return saes


def fit_together(model, windows, group, origin):
    """Fit and write the SAEs of Variants that read the same inputs for as many tokens."""
    n_layer = len(model.blocks)
    like = group[0]
    sets = []
    for variant in group:
        sets.append([new_sae(variant.kind, model, layer, variant.n_features, k, variant.seed)
                     for layer in range(n_layer)])
    modules = dict(enumerate(sets[0])) if like.fitted_to == "spliced" else None
    inputs = shuffled_inputs(model, windows, list(range(n_layer)) * len(group), batch_size,
                             like.seed, modules)
    rates = [variant.lr for variant in group for _ in range(n_layer)]
    fit_saes([sae for of_variant in sets for sae in of_variant], inputs,
             like.tokens // SAE_BATCH, rates)
    for variant, saes in zip(group, sets):
        if not all(sae.W_dec.isfinite().all() for sae in saes):
            raise ValueError(f"lr={variant.lr}: the fit of an SAE of {variant.n_features} features "
                             "diverged, take a smaller one")
        write_saes(saes, variant.path, origin)


def fit(model, windows, wanted, origin):
    """
    Fit and write what is not there of the Variants' SAEs.

    Raises ValueError as read_saes does for those that are there.
    """
    for variant in wanted:
        if os.path.exists(variant.path):
            read_saes(variant.path, model, origin)
    missing = {v.before_finetuning() for v in wanted if not os.path.exists(v.path)}
    missing = sorted(v for v in missing if not os.path.exists(v.path))

    def inputs_of(variant):  # on spliced inputs no two read the same
        alone = variant if variant.fitted_to == "spliced" else None
        return variant.fitted_to, variant.tokens, variant.seed, alone

    missing.sort(key=inputs_of)
    for _, group in itertools.groupby(missing, inputs_of):
        fit_together(model, windows, list(group), origin)
    for variant in wanted:
        if variant.kl_tokens and not os.path.exists(variant.path):
            saes = read_saes(variant.before_finetuning().path, model, origin)
            finetune(model, saes, windows, variant.kl_tokens, KL_RATE * variant.lr, variant.seed)
            write_saes(saes, variant.path, origin)


# -----------------------------------------------------------------------------
# the table


COLUMNS = ("row", "k", "n_features", "fitted_to", "tokens", "lr", "kl_tokens", "seed", "loss",
           "above_dense", "error", "kl", "parameters", "flops_share", "fitting_flops")


def costs(model, variant):
    """Parameters that SAEs add, their FLOPs over the model's forward, and FLOPs of their fit."""
    n_layer, d = model.config.n_layer, model.config.n_embd
    parameters = n_layer * (2 * variant.n_features * d + variant.n_features + d)
    forward = model.flops_per_token() / 3
    encode = 2 * variant.n_features * d
    decode = 2 * k * d
    n_prefixes = 5 if variant.kind == "Matryoshka" else 1
    added = n_layer * (encode + decode)
    # the input of a fit needs no gradient, the model's weights none in the finetuning
    fit = forward + n_layer * (2 * encode + 3 * n_prefixes * decode)
    flops = variant.tokens * fit + variant.kl_tokens * 3 * (forward + added)
    return parameters, added / forward, flops


def row_of(name, n_active, variant_cells, scores, base, cost_cells):
    """A row of COLUMNS: scores and base (M, 2) of losses."""
    above, error = mean_and_error((scores - base)[:, 0].numpy())
    loss, kl = scores.mean(0).tolist()
    return [name, n_active, *variant_cells, loss, above, error, kl, *cost_cells]


def table(rows):
    """Lines of the table for a terminal."""
    cells = []
    for row in rows:
        of = dict(zip(COLUMNS, row))
        name = of["row"]
        if of["tokens"] != "":
            name += f" {of['n_features']}, {of['fitted_to']}, {of['tokens']:,} at {of['lr']:g}"
            name += f", KL {of['kl_tokens']:,}" if of["kl_tokens"] else ""
            name += f", seed {of['seed']}" if seeds > 1 else ""
        share = "" if of["flops_share"] == "" else f"{of['flops_share']:.1%}"
        fitting = "" if of["fitting_flops"] == "" else f"{of['fitting_flops']:.2g}"
        cells.append([name, str(of["k"]), f"{of['loss']:.4f}",
                      f"{of['above_dense']:+.4f} ({of['error']:.4f})", f"{of['kl']:.4f}",
                      f"{of['parameters']:,}", share, fitting])
    return aligned(["every MLP reads", "k", "loss", "above dense (s.e.)", "KL", "parameters",
                    "FLOPs", "fitting"], cells)


def load_models(target):
    """{path: model with a CayleySAE}, the dense model, and its run's config."""
    checkpoint = load_checkpoint(dense)
    model = build_model(checkpoint, dense).to(target).eval().requires_grad_(False)
    if model.saes():
        raise ValueError(f"dense={dense}: it is no dense model, it has a CayleySAE")
    others = {}
    for path in filter(None, ckpt.split(",")):
        others[path] = load_model(path)[0].to(target).eval().requires_grad_(False)
        if not others[path].saes():
            raise ValueError(f"ckpt={path}: it has no CayleySAE, give one dense model as --dense")
        for key in ("block_size", "vocab_size"):
            sizes = [getattr(m.config, key) for m in (model, others[path])]
            if sizes[0] != sizes[1]:
                raise ValueError(f"{dense} has {key}={sizes[0]} and {path} {sizes[1]}: they don't "
                                 "read the same windows")
    return others, model, checkpoint["config"]


def main():
    configure(globals(), at_least={"k": 1, "seeds": 1, "n_windows": 2, "batch_size": 1})
    wanted = variants()
    others, model, config = load_models(pick_device(device))
    train = run_windows(config, "train", data_dir)
    val = run_windows(config, "val", data_dir)
    val_windows = val.shuffled(0, min(n_windows, len(val)), seed=0)
    score = functools.partial(losses, windows=val_windows, reference=model, size=batch_size)
    origin = origin_of(model, train)
    with lock(out_dir):
        fit(model, train, wanted, origin)
        base = score(model, modules={})
        rows = [row_of("dense", model.config.n_embd, [""] * 6, base, base, [0, 0, ""])]
        for other in others.values():
            saes = other.saes()
            n_features = sum(len(sae.bias) for sae in saes)
            n_active = sum(level.k for level in saes[0].levels)
            cells = [len(saes[0].bias), *[""] * 5]
            name = f"code {other.config.cayley_levels}"
            rows.append(row_of(name, n_active, cells, score(other, modules={}), base,
                               [n_features, "", ""]))
        for variant in wanted:
            modules = dict(enumerate(read_saes(variant.path, model, origin)))
            rows.append(row_of(f"{variant.kind} SAEs", k, variant[1:],
                               score(model, modules=modules), base,
                               costs(model, variant)))
        write_csv(os.path.join(out_dir, "splice.csv"), COLUMNS, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
