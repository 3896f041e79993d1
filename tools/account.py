"""
A training step on paper: parameters and one rank's memory, from a model's configuration.

    python -m tools.account configs/demo.py --max_iters=2    # a run: its plan, without training
    python -m tools.account                    # the recipes of configs/: memory, what fits a card
    python -m tools.account --world_size=1 --csv_file=account.csv

A run's plan is of train.py's settings, given as train.py takes them and refused as it refuses
them; the variable WORLD_SIZE says on how many GPUs (or CPU processes, where device is "cpu"). No
GPU is needed, and nothing is written. The rest are pure functions of a GPTConfig, which bench.py
prints beside what it measures.

Shapes: N = tokens of a micro-batch, d = n_embd, V = vocab_size, H = n_head, F = features and K =
active features of a layer.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.account")

import ast
import bisect
import math
import os
import sys
from dataclasses import fields

import torch

from cayley import CHUNK_BYTES, TABLE_BYTES, parse_levels
from checkpoint import pick_device
from configurator import configure
from data import Windows
from model import GPT, GPTConfig
from tools.report import markdown, write_csv

# settings, see configurator.py
world_size = 8  # ranks that share Muon's state, in the table of recipes
csv_file = ""  # for that table, in bytes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECIPES = (
    "cayley_small_2L",
    "cayley_small_3L",
    "vanilla_small",
    "cayley_large_2L",
    "cayley_large_3L",
    "vanilla_large",
)
CARDS = (80, 40, 24)  # GB
USABLE = 0.9  # of a card: the rest is for CUDA, NCCL and fragmentation

# -----------------------------------------------------------------------------
# parameters


def layer_levels(config):
    """The Levels of a layer; none in the dense twin."""
    return parse_levels(config.cayley_levels) if config.cayley_levels else []


def n_features(config):
    return sum(2**level.n for level in layer_levels(config))


def muon_parameters(config):
    """Of the matrices of the blocks: 4 of d x d, and 4d x d and d x 4d."""
    return 12 * config.n_layer * config.n_embd**2


def adamw_parameters(config):
    """Of embeddings (the output's are the same), positions, norms and SAE biases."""
    d, n_layer = config.n_embd, config.n_layer
    embeddings = (config.vocab_size + config.block_size) * d
    norms = (2 * n_layer + 1) * d
    return embeddings + norms + n_layer * n_features(config)


# -----------------------------------------------------------------------------
# memory


def activation_bytes(config, n_tokens, bf16=True, fused_norm=True):
    """
    What the forward saves for the backward, without weights and without the loss.

    bf16: under autocast. fused_norm: on CUDA; elsewhere RMSNorm saves what it has normalised, too.
    Attention is flash attention. The order below is that of the forward.
    """
    d = config.n_embd
    a = 2 if bf16 else 4  # bytes of an activation; the residual stream is fp32
    norm = 4 * d + 4  # its input and the inverse root mean square
    if not fused_norm:
        norm += 4 * d
    layer = norm
    layer += a * d  # input of c_attn
    layer += a * 3 * d  # q, k, v
    layer += a * d + 4 * config.n_head  # attention's output, input of c_proj; its logsumexp
    layer += norm
    layer += sae_activation_bytes(config)
    layer += a * d  # input of c_fc
    layer += a * 4 * d  # input of GELU
    layer += a * 4 * d  # input of c_proj
    head = norm + a * d  # input of lm_head
    idx = 8
    return n_tokens * (config.n_layer * layer + head + idx)


def sae_activation_bytes(config):
    """Of a CayleySAE, a token: the active features, which select and combine save together."""
    return 8 * sum(level.k for level in layer_levels(config))


def loss_bytes(config, n_tokens, bf16=True, compiled=False):
    """
    Of the loss at the start of the backward.

    Eager: log-probabilities and two gradients of their size, all in fp32, of which the forward has
    saved the first. Compiled: logits, which the forward has saved, and their gradient; that takes
    GPT.forward's logits to be without a gradient of their own.
    """
    n_logits = n_tokens * config.vocab_size
    if compiled:
        return 2 * (2 if bf16 else 4) * n_logits
    return 3 * 4 * n_logits


def temporary_bytes(config, n_tokens, bf16=True):
    """
    Most that a block holds for a moment.

    In an MLP's backward the gradients of GELU's output and input; in a CayleySAE's forward the
    scores of a chunk of tokens, twice: before and after a transform.
    """
    mlp = (2 if bf16 else 4) * 2 * 4 * config.n_embd * n_tokens
    slots = 1
    token_bytes = 0
    levels = layer_levels(config)
    for i, level in enumerate(levels):
        gated = config.per_parent_budget and i > 0
        scored = level.delta if gated else 2**level.n
        if not gated:
            slots = 1
        token_bytes = max(token_bytes, 4 * slots * (config.n_embd + 2 * scored))
        slots = level.k
    chunk = min(n_tokens * token_bytes, max(CHUNK_BYTES["cuda"], token_bytes))
    return max(mlp, 2 * chunk)


def sae_state_bytes(config, bf16=True):
    """Of the CayleySAEs: statistics and sums of every layer, and the table of atoms they share."""
    levels = layer_levels(config)
    if not levels:
        return 0
    d = config.n_embd
    buffers = (4 + 4 + 8 + 4) * n_features(config)  # mean, var, counts of activations, pending ones
    sums = 4 * (d * d + d)
    # of PyTorch's kernels; Triton's have none
    table = (2 if bf16 else 4) * d * 2 ** levels[-1].n
    if table > TABLE_BYTES:
        table = 0  # its rows are made when needed
    return config.n_layer * (buffers + sums) + table


def muon_state_bytes(config, world_size):
    """Of the largest share of a rank: momentum of whole matrices, shape by shape."""
    d, n_layer = config.n_embd, config.n_layer
    total = 0
    for count, size in ((4 * n_layer, d * d), (n_layer, 4 * d * d), (n_layer, 4 * d * d)):
        share = -(-count // world_size)
        total += 4 * share * size
    return total


def memory_account(
    config, batch_size, world_size=1, bf16=True, compiled=False, fused_norm=True
):
    """
    One rank's memory at the peak of a training step -> {part: bytes}, "peak" the last.

    config: a GPTConfig; batch_size: sequences of block_size in the rank's micro-batch; compiled: by
    torch.compile, which fuses the loss and saves the same activations; fused_norm: see
    activation_bytes. The peak is where the backward begins: all activations are there, and the
    loss's gradients. Later, when a block runs backward, its temporaries stand where those were. Not
    in it: what CUDA and its libraries hold, and fragmentation.
    """
    n_tokens = batch_size * config.block_size
    n_parameters = muon_parameters(config) + adamw_parameters(config)
    account = {
        "weights": 4 * n_parameters,
        "gradients": 4 * n_parameters,
        "Muon's share": muon_state_bytes(config, world_size),
        "AdamW": 8 * adamw_parameters(config),
        "SAE statistics and atoms": sae_state_bytes(config, bf16),
        "weights in bf16": 0,
        "activations": activation_bytes(config, n_tokens, bf16, fused_norm),
        "loss": loss_bytes(config, n_tokens, bf16, compiled),
        "temporaries": temporary_bytes(config, n_tokens, bf16),
    }
    if bf16:  # autocast keeps them until the backward has used them
        matrices = muon_parameters(config) + config.vocab_size * config.n_embd
        account["weights in bf16"] = 2 * matrices
    held = sum(account.values()) - account["loss"] - account["temporaries"]
    account["peak"] = held + max(account["loss"], account["temporaries"])
    return account


def largest_batch(config, card_bytes, world_size=1, compiled=False):
    """The largest batch_size with a peak of at most USABLE of a card in bf16; 0 if none has."""

    def peak(batch_size):
        return memory_account(config, batch_size, world_size, compiled=compiled)["peak"]

    batch_sizes = range(1, int(card_bytes))  # a sequence takes more than a byte
    return bisect.bisect_right(batch_sizes, USABLE * card_bytes, key=peak)


# -----------------------------------------------------------------------------
# a run of train.py


def train_settings(arguments):
    """
    train.py's globals with its arguments applied and checked, as it does both itself.

    Importing train.py would train. So its source is run down to the statement that picks the
    device, which stands below settings and their checks; get_lr is defined, and the rest never
    runs. Raises ValueError as train.py does.
    """
    path = os.path.join(ROOT, "train.py")
    with open(path, encoding="utf-8") as file:
        statements = ast.parse(file.read(), path).body
    end = 0
    while ast.unparse(statements[end]) != "device = pick_device(device)":
        end += 1
    get_lr = [s for s in statements[end:] if getattr(s, "name", "") == "get_lr"]
    program = ast.Module(statements[:end] + get_lr, type_ignores=[])
    namespace = {"__name__": "train", "__file__": path}
    before = sys.argv
    sys.argv = [before[0], *arguments]  # configure() reads it
    try:
        exec(compile(program, path, "exec"), namespace)
    finally:
        sys.argv = before
    return namespace


def gpt_config(settings):
    """The GPTConfig of train.py's settings. Raises ValueError for an impossible one."""
    return GPTConfig(**{field.name: settings[field.name] for field in fields(GPTConfig)})


def check_run(arguments):
    """
    train_settings of a run that train.py would begin, and its GPT without memory.

    Raises ValueError also for a device of no known kind and for a model that can't be built.
    """
    train = train_settings(arguments)
    if train["device"].split(":")[0] not in ("cuda", "mps"):  # which need not be here
        pick_device(train["device"])
    with torch.device("meta"):
        return train, GPT(gpt_config(train))


def describe_data(settings):
    """A line on the training data, as far as they are there."""
    data_dir = settings["data_dir"]
    try:
        windows = Windows(data_dir, "train", settings["block_size"])
    except ValueError as error:
        return f"not ready ({error})"
    per_iter = settings["gradient_accumulation_steps"] * settings["batch_size"]
    epochs = settings["max_iters"] * per_iter / len(windows)
    tokenizer = windows.meta["tokenizer"]
    return f"{data_dir}: tokenizer {tokenizer}, {len(windows):,} windows, read {epochs:.2f} times"


def show_schedule(train):
    """Print the learning rates at the corners of the schedule: train is train_settings'."""
    max_iters = train["max_iters"]
    corners = [0, train["warmup_iters"], max_iters]
    if train["lr_schedule"] == "parity":
        print(f"parity: flat until val loss is within {train['parity_band']} of "
              f"{train['target_val_loss']}, then a warmdown of {train['parity_iters']} iterations, "
              "and the end")
    else:
        corners.append(int((1 - train["warmdown_frac"]) * max_iters))
    for it in sorted({min(corner, max_iters) for corner in corners}):
        muon = train["get_lr"](it, train["muon_lr"], train["muon_min_lr"])
        adamw = train["get_lr"](it, train["adamw_lr"], train["adamw_min_lr"])
        print(f"iteration {it:,}: learning rates {muon:.3g} (Muon), {adamw:.3g} (AdamW)")


def show_plan(train, model):
    """Print what a run would be, and a rank's memory, of check_run's results."""
    settings = train["config"]
    config = model.config
    accumulation = settings["gradient_accumulation_steps"]
    # unless it is said, one CPU, or the GPUs of a machine of 8 that share the accumulation evenly
    on_cpu = settings["device"] == "cpu"
    ranks = int(os.environ.get("WORLD_SIZE", 1 if on_cpu else math.gcd(8, accumulation)))
    bf16 = settings["dtype"] == "bfloat16" or settings["dtype"] == "auto" and not on_cpu
    batch_size = settings["batch_size"]
    compiled = settings["torch_compile"]
    tokens = accumulation * batch_size * config.block_size
    iterations = settings["max_iters"]
    muon, adamw = muon_parameters(config), adamw_parameters(config)
    print("settings: " + ", ".join(f"{key}={value!r}" for key, value in settings.items()))
    print(f"data: {describe_data(settings)}")
    print(f"parameters: {model.get_num_params():,} without positions and features' biases, "
          f"{muon + adamw:,} with them, of which Muon's {muon:,}")
    print(f"tokens: {iterations:,} iterations of {tokens:,} = {iterations * tokens:,}")
    print(f"arithmetic: {model.flops_per_token() * iterations * tokens:.3g} FLOPs")
    show_schedule(train)
    kind = "CPU process" if on_cpu else "GPU"
    print(f"memory of a {kind} of {ranks} in {'bf16' if bf16 else 'fp32'}, on paper (WORLD_SIZE=1 "
          "sets how many):")
    account = memory_account(config, batch_size, ranks, bf16, compiled, fused_norm=not on_cpu)
    for name, size in account.items():
        print(f"  {name:26} {size / 1e6:12,.1f} MB")
    for card in () if on_cpu else CARDS:
        fits = largest_batch(config, card * 1e9, ranks, compiled)
        print(f"  a card of {card} GB holds batch_size up to {fits}")


# -----------------------------------------------------------------------------
# the recipes


def read_recipe(path):
    """A config file on top of train.py's defaults -> its GPTConfig and batch_size."""
    settings = train_settings([str(path)])
    return gpt_config(settings), settings["batch_size"]


def recipe_rows():
    """{recipe: {quantity: value}}, in bytes where it is memory."""
    rows = {}
    for name in RECIPES:
        config, batch_size = read_recipe(os.path.join(ROOT, "configs", f"{name}.py"))
        row = {"micro-batch": batch_size}
        row |= memory_account(config, batch_size, world_size)
        compiled = memory_account(config, batch_size, world_size, compiled=True)
        row["peak, compiled"] = compiled["peak"]
        for card in CARDS:
            row[f"fits {card} GB"] = largest_batch(config, card * 1e9, world_size)
            row[f"fits {card} GB, compiled"] = largest_batch(
                config, card * 1e9, world_size, compiled=True
            )
        rows[name] = row
    return rows


def show_recipes():
    """Print the table of recipes, and write it to csv_file."""
    rows = recipe_rows()
    quantities = list(rows[RECIPES[0]])
    print(f"one rank of {world_size}, bf16: GB at the peak of a step, eager unless said, and the "
          "largest micro-batch that fits a card\n")
    table = []
    for quantity in quantities:
        values = [row[quantity] for row in rows.values()]
        if values[0] > 1e6:
            values = [f"{value / 1e9:.2f}" for value in values]
        table.append([quantity, *map(str, values)])
    print("\n".join(markdown(["", *rows], table)))
    if csv_file:
        write_csv(csv_file, ["recipe", *quantities],
                  [[name, *row.values()] for name, row in rows.items()])


def main():
    if any(not word.startswith("-") and word.endswith(".py") for word in sys.argv[1:]):
        show_plan(*check_run(sys.argv[1:]))
    else:
        configure(globals(), at_least={"world_size": 1})
        show_recipes()


if __name__ == "__main__":
    main()
