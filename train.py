"""
Trains a GPT (model.py) on token bins (prepare_fineweb.py), on one device or many; resumes exactly.

    python train.py configs/demo.py                                      # CPU, minutes
    torchrun --nproc_per_node=8 train.py configs/cayley_small_2L.py      # the published recipe
    python train.py configs/demo.py --max_iters=100 --out_dir=out/short  # any setting, by name
    python train.py configs/demo.py --init_from=resume                   # on from last.pt

In out_dir: ckpt.pt (best val loss), last.pt (newest), config.json (all settings, versions, commit)
and log.csv.
"""
import contextlib
import csv
import errno
import importlib.util
import inspect
import io
import itertools
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cayley
from checkpoint import load_checkpoint, pick_device
from configurator import configure
from data import Windows, atomic, get_tokenizer, lock, write_json
from model import GPT, GPTConfig
from muon import MuonAdamW
from tools import account
from tools.evals import code_statistics, explained

# -----------------------------------------------------------------------------
# settings: a config file and then --key=value override them, see configurator.py

# input and output
out_dir = "out"
data_dir = "data/fineweb_edu"
init_from = "scratch"  # or "resume": from out_dir/last.pt
resume_anyway = False  # resume although the order or content of the batches changes
eval_interval = 250  # iterations between evaluations; each also writes last.pt
eval_iters = 64  # micro-batches of the fixed validation set, over all ranks
log_interval = 10  # iterations between log lines
save_patience = 600.0  # seconds that the last checkpoint is tried again where it can't be written
final_evals = False  # evals.py's scores of the last weights, to out_dir/evals.json
final_evals_args = ""  # evals.py's settings, as "--hellaswag=hub --lambada=lambada.jsonl"
wandb_log = False
wandb_project = "cayley-gpt"
# batches: tokens per iteration = gradient_accumulation_steps * batch_size * block_size
batch_size = 32  # sequences per micro-batch
gradient_accumulation_steps = 48  # micro-batches per iteration, over all ranks
seed = 1337  # of the weights and of the data order
# model
block_size = 1024
vocab_size = 50304  # GPT-2's 50257, padded to a multiple of 64
n_layer = 12
n_head = 8
n_embd = 1024
cayley_levels = "10,16,0;15,32,256"  # n,k,delta per level; "" trains the dense twin
per_parent_budget = True  # only features in the blocks of active parents compete
score_standardize = True  # select features by their standardised score
forward_standardized = True  # and hand that score to the MLP
dense_gradient = 0.0  # weight of the MLP input's gradient that goes around the code
near_misses = 0  # features of level 0 after the active ones that the gradient reaches too
# optimizers: Muon for the matrices of the blocks, AdamW for the rest
muon_lr = 1.2e-2
muon_min_lr = 1.5e-4
adamw_lr = 1.2e-2
adamw_min_lr = 1.5e-4
momentum = 0.95
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0  # of the matrices of the blocks
# schedule, in iterations
max_iters = 12716
warmup_iters = 200
lr_schedule = "linear_warmdown"  # or "cosine", "constant", "parity"
warmdown_frac = 0.9  # of max_iters, for linear_warmdown
# parity: flat until val loss is within the band above the target, a linear warmdown, and the end
target_val_loss = 0.0  # nats per token
parity_band = 0.207  # nats per token: what the published parity run's warmdown was given to gain
parity_iters = 895  # of its warmdown
# system
device = "auto"  # "cuda", "cuda:1", "cpu", "mps"; auto: CUDA where there is one
dtype = "auto"  # "bfloat16" (autocast) or "float32"; auto: bfloat16 on CUDA, float32 elsewhere
torch_compile = True
kernels = "auto"  # of the layer on CUDA: "torch", "triton"; auto: the faster, if both agree
dry_run = False  # print the plan of the run and its memory on paper, and stop

CHOICES = {
    "init_from": ("scratch", "resume"),
    "lr_schedule": ("linear_warmdown", "cosine", "constant", "parity"),
    "dtype": ("auto", "bfloat16", "float32"),
    "kernels": ("auto", "torch", "triton"),
}
AT_LEAST_1 = (
    "eval_interval",
    "eval_iters",
    "log_interval",
    "batch_size",
    "gradient_accumulation_steps",
    "max_iters",
    "parity_iters",
    "block_size",
)
NOT_NEGATIVE = (
    "muon_lr",
    "muon_min_lr",
    "adamw_lr",
    "adamw_min_lr",
    "weight_decay",
    "dense_gradient",
    "warmup_iters",
    "seed",
    "save_patience",
    "parity_band",
)


def check_settings():
    """Raise ValueError for a setting that makes no sense, before anything is loaded."""
    for key, value in globals().items():
        if key in CHOICES and value not in CHOICES[key]:
            choices = ", ".join(map(repr, CHOICES[key]))
            raise ValueError(f"{key}={value!r}: must be one of {choices}")
        if key in AT_LEAST_1 and value < 1:
            raise ValueError(f"{key}={value}: must be at least 1")
        if key in NOT_NEGATIVE and not 0 <= value < math.inf:  # not a number is no good either
            raise ValueError(f"{key}={value}: must be finite and not negative")
    if wandb_log and not importlib.util.find_spec("wandb"):
        raise ValueError("wandb_log=True, but wandb is not installed: pip install wandb")
    for key in ("momentum", "beta1", "beta2"):
        if not 0 <= globals()[key] < 1:
            raise ValueError(f"{key}={globals()[key]}: must be from 0 to below 1")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if gradient_accumulation_steps % world_size:
        raise ValueError(
            f"gradient_accumulation_steps={gradient_accumulation_steps} is not a multiple of the "
            f"{world_size} ranks"
        )
    if seed >= 2**63:
        raise ValueError(f"seed={seed}: must be below 2^63")
    if not 0 <= warmdown_frac <= 1:
        raise ValueError(f"warmdown_frac={warmdown_frac}: must be from 0 to 1")
    if lr_schedule == "parity" and not 0 < target_val_loss < math.inf:
        raise ValueError(f"target_val_loss={target_val_loss}: lr_schedule='parity' needs the loss "
                         "to reach, in nats per token")
    if lr_schedule != "parity" and target_val_loss:
        raise ValueError(f"target_val_loss={target_val_loss}: lr_schedule={lr_schedule!r} knows no "
                         "target, only 'parity' does: --target_val_loss=0.0")


def last_iter(parity_start=-1):
    """The iteration at which training ends; parity_start: where parity's warmdown began, or -1."""
    if parity_start >= 0:
        return min(max_iters, parity_start + parity_iters)
    return max_iters


def get_lr(it, lr, min_lr, parity_start=-1):
    """Learning rate at an iteration, from lr down to min_lr at the last one."""
    # 1) linear warmup from 0
    if it < warmup_iters:
        return lr * it / warmup_iters
    # 2) flat until the decay begins
    decay_end = max_iters
    decay_start = {
        "linear_warmdown": (1 - warmdown_frac) * max_iters,
        "cosine": warmup_iters,
        "constant": max_iters,
        "parity": parity_start if parity_start >= 0 else max_iters,
    }[lr_schedule]
    if parity_start >= 0:
        decay_end = parity_start + parity_iters
    if it <= decay_start:
        return lr
    # 3) decay
    progress = min(1.0, (it - decay_start) / (decay_end - decay_start))
    if lr_schedule == "cosine":
        share = (1 + math.cos(math.pi * progress)) / 2
    else:
        share = 1 - progress
    return min_lr + (lr - min_lr) * share


# -----------------------------------------------------------------------------
# the process group: one rank without torchrun


class Ranks:
    """This process among those that torchrun started, and its device."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.master = self.rank == 0
        self.device = pick_device(device)
        launched = "RANK" in os.environ
        if self.device.type == "cuda":
            if launched:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if launched:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

        self.wide = torch.float32 if self.device.type == "mps" else torch.float64

    def sum(self, values):
        """A tensor summed over ranks, in float64 where the device has it."""
        values = values.to(self.wide)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def end(self):
        """Leave the process group and end the process."""
        if not dist.is_initialized():
            return
        dist.destroy_process_group()
        # Not by Python's own end: gloo's threads need the interpreter to let go of the last
        # tensors, and hang or abort there.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class StopSignals:
    """SIGINT or SIGTERM asks the run to stop after this step; a second one ends it at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def interrupt_from_now_on(self):
        """A signal raises KeyboardInterrupt: for what comes after the last checkpoint."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


# -----------------------------------------------------------------------------
# what a run is


@dataclass
class State:
    """Where a run stands, beside its weights and optimizer: saved and restored as a whole."""

    iter: int = 0  # iterations done
    windows_read: int = 0  # of the endless training order
    evaluated: int = -1  # the last iteration with an evaluation
    best_val_loss: float = math.inf
    parity_start: int = -1  # where parity's warmdown began; -1: not yet

    @property
    def end(self):
        return last_iter(self.parity_start)


class Run(NamedTuple):
    """What stays the same from the first iteration to the last."""

    config: dict  # all settings, with the data's tokenizer
    ranks: Ranks
    stop: StopSignals
    train_windows: Windows
    val_windows: Windows
    raw_model: GPT
    model: torch.nn.Module  # the same, compiled and in DDP
    optimizer: MuonAdamW
    use_bf16: bool
    autocast: contextlib.AbstractContextManager


def gpt_config(config):
    """The model of these settings. Raises ValueError for an impossible one."""
    return GPTConfig(**{field.name: config[field.name] for field in fields(GPTConfig)})


def read_data(config):
    """The splits' Windows; notes their tokenizer in config. Raises ValueError as Windows does."""
    train_windows = Windows(data_dir, "train", block_size)
    val_windows = Windows(data_dir, "val", block_size)
    meta = train_windows.meta
    if meta["vocab_size"] > vocab_size:
        padded = -(-meta["vocab_size"] // 64) * 64
        raise ValueError(
            f"vocab_size={vocab_size} is below the {meta['vocab_size']} of {data_dir}'s tokenizer "
            f"{meta['tokenizer']!r}: set vocab_size={padded}, the next multiple of 64"
        )
    config["tokenizer"] = meta["tokenizer"]
    config["tokenizer_vocab_size"] = meta["vocab_size"]
    config["working_directory"] = os.getcwd()  # that a relative data_dir is of
    return train_windows, val_windows


def parallel_model(raw_model, ranks):
    """raw_model compiled, and in DDP where there are several ranks."""
    model = torch.compile(raw_model) if torch_compile else raw_model
    if ranks.world_size == 1:
        return model
    # update_stats keeps the SAE's buffers equal on all ranks
    keyword = "forward_sync_buffers"  # since PyTorch 2.13
    if keyword not in inspect.signature(DistributedDataParallel).parameters:
        keyword = "broadcast_buffers"
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{keyword: False})


def to_device(windows, device):
    """
    Windows (B, T + 1), numpy -> inputs and targets (B, T) on device.

    On CUDA the copy is asynchronous to the host.
    """
    windows = torch.from_numpy(windows)
    if device.type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    else:
        windows = windows.to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def micro_batches(run, windows_read):
    """
    Yield this rank's micro-batches of one iteration after the other, from windows_read on.

    Whatever the number of ranks, an iteration has the same windows.
    """
    ranks = run.ranks
    for first in itertools.count(windows_read + ranks.rank * batch_size,
                                 ranks.world_size * batch_size):
        yield to_device(run.train_windows.shuffled(first, batch_size, seed), ranks.device)


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def validate(run):
    """
    Mean loss over the fixed validation set, each rank reading its share.

    None if a signal stopped it on any rank.
    """
    ranks = run.ranks
    # of losses, windows, and ranks that were stopped
    sums = torch.zeros(3, dtype=ranks.wide, device=ranks.device)
    n_windows = min(len(run.val_windows), eval_iters * batch_size)
    run.model.eval()
    for first in range(ranks.rank * batch_size, n_windows, ranks.world_size * batch_size):
        if run.stop.asked:
            sums[2] += 1
            break
        count = min(batch_size, n_windows - first)
        x, y = to_device(run.val_windows.shuffled(first, count, seed=0), ranks.device)
        with run.autocast:
            loss = run.model(x, y)[1]
        sums[0] += loss.to(ranks.wide) * count
        sums[1] += count
    run.model.train()
    loss_sum, count, stopped = ranks.sum(sums).tolist()
    return None if stopped else loss_sum / count


def sae_health(run):
    """
    State of the sparse codes, for log.csv.

    dead_<level>: features without an activation since the last call, summed over layers.
    active_<level>: mean active features per token.
    explained: mean over layers, see evals.explained.
    """
    saes = run.raw_model.saes()
    if not saes:
        return {}
    # the same windows on every rank: the numbers don't depend on how many there are
    count = min(batch_size, len(run.val_windows))
    idx, _ = to_device(run.val_windows.shuffled(0, count, seed=0), run.ranks.device)
    with run.autocast:
        statistics = code_statistics(run.raw_model, idx)  # (layers, 3 + levels)
    health = {}
    for level, active in enumerate(statistics[:, 3:].mean(0).tolist()):
        where = saes[0].level_slices[level]
        dead = sum((sae.active_counts[where] == 0).sum() for sae in saes)
        health[f"dead_{level}"] = dead.item()
        health[f"active_{level}"] = active
    health["explained"] = explained(statistics[:, :3]).mean().item()
    for sae in saes:
        sae.active_counts.zero_()
        if sae.skipped_updates > 0:
            print("inputs that were not finite were left out of a CayleySAE's statistics "
                  f"{sae.skipped_updates.item()} times", file=sys.stderr)
    return health


def follow_parity(state, val_loss, master):
    """Begin the warmdown where val loss has come into the band, and say how the run ended."""
    in_band = val_loss <= target_val_loss + parity_band
    words = ""
    if state.parity_start < 0 and in_band and state.iter >= warmup_iters:
        state.parity_start = state.iter
        words = (f"val loss is within {parity_band} of {target_val_loss}: warmdown to iteration "
                 f"{state.end}")
        if state.end < state.iter + parity_iters:
            words += f", where max_iters={max_iters} cuts its {parity_iters} iterations short"
    elif state.iter >= state.end and state.parity_start < 0:
        words = (f"val loss never came within {parity_band} of {target_val_loss} after the warmup "
                 f"of {warmup_iters} iterations, and the learning rate never fell: a larger "
                 "--max_iters goes on")
    elif state.iter >= state.end:
        reached = "reached" if val_loss <= target_val_loss else "not reached"
        words = f"target_val_loss={target_val_loss} is {reached}"
    if master and words:
        print(f"iter {state.iter}: {words}")


def evaluate(run, state, log):
    """Validate, log, and save; True if a signal stopped it."""
    val_loss = validate(run)
    if val_loss is None:
        return True
    health = sae_health(run)
    state.evaluated = state.iter
    best = val_loss < state.best_val_loss
    state.best_val_loss = min(state.best_val_loss, val_loss)
    if lr_schedule == "parity":
        follow_parity(state, val_loss, run.ranks.master)
    if run.ranks.master:
        tokens = state.windows_read * block_size
        log.write({"iter": state.iter, "tokens": tokens, "val_loss": val_loss, **health})
        shown = "".join(f", {key} {value:.6g}" for key, value in health.items())
        print(f"iter {state.iter}: val loss {val_loss:.4f}{shown}")
    save(run, state, best=best, last=state.iter >= state.end)
    return False


def first_nonfinite(model, idx, targets):
    """
    Name of the first module whose output, else of the last parameter whose gradient, isn't finite.

    None if all are finite.
    """
    found = []

    def checking(name):
        def check(module, inputs, output):
            if isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(name)
        return check

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(checking(name)))
    model.zero_grad()
    model(idx, targets)[1].backward()
    for hook in hooks:
        hook.remove()
    for name, p in reversed(list(model.named_parameters())):
        if not p.grad.isfinite().all():
            found.append(f"the gradient of {name}")
    return found[0] if found else None


def report_nonfinite(run, state, loss, grad_norm):
    """Raise ValueError that says where this iteration's loss or gradient stopped being finite."""
    accumulation = gradient_accumulation_steps // run.ranks.world_size
    where = None
    with run.autocast:
        for batch in itertools.islice(micro_batches(run, state.windows_read), accumulation):
            where = where or first_nonfinite(run.raw_model, *batch)
    where = where or "no micro-batch of this rank"
    raise ValueError(
        f"iteration {state.iter}: loss {loss}, gradient norm {grad_norm}, first in {where}; the "
        f"weights are as before it, {out_path('last.pt')} as it was. Lower the learning rates?"
    )


# -----------------------------------------------------------------------------
# files


def out_path(name):
    return os.path.join(out_dir, name)


def disk_error(error):
    """What went wrong with a file, in words: torch.save hides the system's message."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        message = str(error)
        error = error.__cause__ or error.__context__
    if "inline_container" in message or "PytorchStreamWriter" in message:
        return "the file could not be written to its end, as on a full disk"
    return message.splitlines()[0]


def persistently(write, path):
    """Call write(), again and again for save_patience seconds. Raises OSError if it never works."""
    deadline = time.monotonic() + save_patience
    while True:
        try:
            return write()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            message = f"{path} could not be written ({disk_error(error)})"
        if time.monotonic() >= deadline:
            raise OSError(f"{message}: what came after the last checkpoint there is lost")
        print(f"{message}: it is tried again every 5 seconds, for {save_patience:.0f} seconds in "
              "all: make room", file=sys.stderr)
        time.sleep(min(5, save_patience))


def write_checkpoint(checkpoint, best):
    """
    out_dir/last.pt, and a copy of it as ckpt.pt if best.

    Two independent files: damage to one leaves the other. What is there stays if this raises.
    """
    with atomic(out_path("last.pt"), "wb") as file:
        torch.save(checkpoint, file)
        if best:
            file.flush()
            with open(file.name, "rb") as source, atomic(out_path("ckpt.pt"), "wb") as copy:
                shutil.copyfileobj(source, copy, 2**24)


def save(run, state, best=False, last=False):
    """
    Save the run; on every rank, since momentum is gathered from all.

    A checkpoint that can't be written is reported, and training goes on; the last one is tried
    again for save_patience seconds and then raises OSError.
    """
    optimizer_state = run.optimizer.state_dict()
    if not run.ranks.master:
        return
    on_cuda = run.ranks.device.type == "cuda"
    checkpoint = {
        "model": run.raw_model.state_dict(),
        "optimizer": optimizer_state,
        "model_args": asdict(run.raw_model.config),
        "config": run.config,
        **asdict(state),
        "train_windows": len(run.train_windows),
        "data": run.train_windows.fingerprint,
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if on_cuda else None,
        },
    }
    if last:
        return persistently(lambda: write_checkpoint(checkpoint, best), out_path("last.pt"))
    try:
        write_checkpoint(checkpoint, best)
    except (OSError, RuntimeError) as error:
        print(f"{out_path('last.pt')} could not be written ({disk_error(error)}): training goes "
              f"on, and the next checkpoint is tried in at most {eval_interval} iterations",
              file=sys.stderr)


def load_last(config, train_windows):
    """last.pt, checked against settings and data. Raises ValueError naming what differs."""
    last, ckpt = out_path("last.pt"), out_path("ckpt.pt")
    try:
        checkpoint = load_checkpoint(last)
        needed = {field.name for field in fields(State)} - {"parity_start"}  # it is newer
        missing = {"optimizer", "rng", *needed} - checkpoint.keys()
        if missing:
            raise ValueError(f"{last}: it lacks {', '.join(sorted(missing))}")
    except ValueError as error:
        hint = ""
        if os.path.exists(ckpt):
            hint = f"; {ckpt} is there: to go on from it, copy it to {last}"
        raise ValueError(f"{error}{hint}") from None
    defaults = {field.name: field.default for field in fields(GPTConfig)}  # of settings since then
    for key, value in {**defaults, **checkpoint["model_args"]}.items():
        if config.get(key) != value:
            raise ValueError(f"{last} was trained with {key}={value!r}, not {config.get(key)!r}: "
                             "use that, or another out_dir")
    before = checkpoint["config"]
    if before["tokenizer"] != config["tokenizer"]:
        raise ValueError(f"{data_dir} has tokenizer {config['tokenizer']!r}, and {last} was "
                         f"trained with {before['tokenizer']!r}")
    if not resume_anyway:
        check_same_batches(checkpoint, train_windows)
    return checkpoint


def check_same_batches(checkpoint, train_windows):
    """Raise ValueError if the coming batches aren't those that the checkpoint's run would read."""
    before = checkpoint["config"]
    per_iter = before["batch_size"] * before["gradient_accumulation_steps"]
    changes = []
    if before["seed"] != seed:
        changes.append(f"seed={before['seed']}, not {seed}")
    if per_iter != batch_size * gradient_accumulation_steps:
        changes.append(f"batch_size * gradient_accumulation_steps = {per_iter}, not "
                       f"{batch_size * gradient_accumulation_steps}")
    if checkpoint["train_windows"] != len(train_windows):
        changes.append(f"{checkpoint['train_windows']} training windows, not "
                       f"{len(train_windows)}, in {data_dir}")
    elif checkpoint.get("data", train_windows.fingerprint) != train_windows.fingerprint:
        changes.append(f"other shards than those of {data_dir} (their checksums in meta.json)")
    if changes:
        raise ValueError(
            f"{out_path('last.pt')} was trained with {' and '.join(changes)}: the order or content "
            "of its batches would change; --resume_anyway takes it nevertheless"
        )


def changed_settings(before, now):
    """", with max_iters=30 (was 20)", of the settings that both have and that differ, or ""."""
    changes = []
    for key in sorted(before.keys() & now.keys() - {"init_from", "resume_anyway"}):
        if before[key] != now[key]:
            changes.append(f"{key}={now[key]!r} (was {before[key]!r})")
    return ", with " + ", ".join(changes) if changes else ""


def resume(run, state):
    """Restore what save has saved."""
    checkpoint = load_last(run.config, run.train_windows)
    try:
        run.raw_model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{out_path('last.pt')}: it doesn't fit this model ({reason})") from None
    for field in fields(state):
        setattr(state, field.name, checkpoint.get(field.name, field.default))
    if lr_schedule != "parity":
        state.parity_start = -1  # another schedule has no such warmdown, nor its end
    if run.ranks.master:
        print(f"goes on from {out_path('last.pt')} after {state.iter} iterations"
              + changed_settings(checkpoint["config"], run.config))
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if run.ranks.device.type == "cuda" and checkpoint["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])


class Log:
    """
    Rows of log.csv, and wandb where it is switched on.

    On resume without the rows of later iterations than the checkpoint's. Rows that can't be written
    wait in memory for the next one that can.
    """

    def __init__(self, columns, state, config):
        self.path = out_path("log.csv")
        self.columns = columns
        self.waiting = []
        resumed = state != State()
        rows = self._read(state) if resumed and os.path.exists(self.path) else []
        with atomic(self.path) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({key: row.get(key, "") for key in columns} for row in rows)
        self.wandb = None
        if wandb_log:
            import wandb
            self.wandb = wandb.init(
                project=wandb_project, name=os.path.basename(out_dir), config=config
            )

    def _read(self, state):
        """The rows before state.iter, and its evaluation. Raises ValueError for a foreign file."""
        try:
            with open(self.path, newline="") as file:
                reader = csv.DictReader(file)
                found = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} can't be read ({error}): move it away to go on without "
                             "it") from None
        if not {"iter", "val_loss"} <= set(reader.fieldnames or []):
            raise ValueError(f"{self.path}: its first line is not a header with iter and "
                             "val_loss: move it away to go on without it")
        rows = []
        for row in found:
            if None in row.values() or not row["iter"].isdecimal():
                continue  # a line that was cut off
            it = int(row["iter"])
            if it < state.iter or it == state.evaluated and row["val_loss"]:
                rows.append(row)
        return rows

    def write(self, row):
        if self.wandb:
            self.wandb.log(row, step=row["iter"])
        self.waiting.append(row)
        try:
            self._append()
        except OSError as error:
            if len(self.waiting) == 1:
                print(f"{self.path} can't be written ({error.strerror}): its rows are kept in "
                      "memory until it can", file=sys.stderr)

    def _append(self):
        if self.waiting:
            text = io.StringIO(newline="")
            csv.DictWriter(text, self.columns).writerows(self.waiting)
            append(self.path, text.getvalue().encode())
            self.waiting = []

    def finish(self):
        """Write what still waits. Raises OSError if that can't be done in save_patience seconds."""
        persistently(self._append, self.path)
        if self.wandb:
            self.wandb.finish()


def append(path, content):
    """Append bytes to a file, all or none. Raises OSError on a full disk."""
    with open(path, "ab", buffering=0) as file:  # a buffer would be written again at its closing
        size = os.fstat(file.fileno()).st_size
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def log_columns(model):
    """log.csv's columns, for a GPT."""
    columns = ["iter", "tokens", "loss", "val_loss", "muon_lr", "adamw_lr", "grad_norm"]
    columns += ["tok_per_s", "mfu", "peak_memory_gb", "data_wait_s"]
    if model.saes():
        for level in range(len(model.saes()[0].levels)):
            columns += [f"dead_{level}", f"active_{level}"]
        columns.append("explained")
    return columns


def write_config(config, hardware):
    """out_dir/config.json: what ran, with what."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, cwd=here).stdout.strip()
    except FileNotFoundError:  # no git here
        commit = ""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    write_json(out_path("config.json"), {
        "config": config,
        "command": sys.argv,
        "commit": commit or None,
        "versions": versions,
        "hardware": hardware,
    })


# -----------------------------------------------------------------------------
# the loop


class Meter:
    """Throughput, MFU and memory between two log lines."""

    def __init__(self, model, ranks, it):
        self.device = ranks.device
        self.tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
        self.flops_per_token = account.flops_per_token(model.config)
        self.name = platform.processor() or "CPU"
        if self.device.type == "cuda":
            self.name = torch.cuda.get_device_name()
        card = account.find_device(self.name)
        self.peak_flops = card.flops * ranks.world_size if card else None
        self.start(it)

    def start(self, it):
        self.start_it = it
        self.start_time = time.perf_counter()
        self.data_wait = 0.0

    def read(self, it):
        """Since start, up to the end of iteration it: log.csv's columns."""
        seconds = time.perf_counter() - self.start_time
        tok_per_s = self.tokens_per_iter * (it + 1 - self.start_it) / seconds
        mfu = tok_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        return {
            "tok_per_s": round(tok_per_s),
            "mfu": mfu,
            "peak_memory_gb": round(memory / 1e9, 3),
            "data_wait_s": round(self.data_wait, 4),
        }


def train(run, state, log):
    """Train from state to max_iters, or until a signal; True if a signal stopped it."""
    ranks = run.ranks
    accumulation = gradient_accumulation_steps // ranks.world_size
    windows_per_iter = gradient_accumulation_steps * batch_size
    epoch_windows = len(run.train_windows)
    batches = micro_batches(run, state.windows_read)
    x, y = next(batches)
    meter = Meter(run.raw_model, ranks, state.iter)
    while True:
        it = state.iter
        finished = it >= state.end
        if (it % eval_interval == 0 or finished) and state.evaluated != it:
            if evaluate(run, state, log):
                save(run, state, last=True)
                return True
            meter.start(it)  # an evaluation's time isn't training's
            finished = it >= state.end  # parity's warmdown may have begun
        if finished:
            return False

        muon_rate = get_lr(it, muon_lr, muon_min_lr, state.parity_start)
        adamw_rate = get_lr(it, adamw_lr, adamw_min_lr, state.parity_start)
        run.optimizer.set_lr(muon_rate, adamw_rate)

        loss_sum = torch.zeros((), device=ranks.device)
        for micro_step in range(accumulation):
            if ranks.world_size > 1:
                # before the forward: DDP reads it there, and sums gradients in the last backward
                run.model.require_backward_grad_sync = micro_step == accumulation - 1
            with run.autocast:
                loss = run.model(x, y)[1] / accumulation
            loss.backward()
            loss_sum += loss.detach()
            # the next micro-batch is read while a GPU still works on this one
            before = time.perf_counter()
            x, y = next(batches)
            meter.data_wait += time.perf_counter() - before

        gradients = [p.grad for p in run.raw_model.parameters()]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        # The one place in an iteration where the host waits for the device. Stopping is summed as
        # well, so that all ranks stop after the same iteration.
        asked = loss_sum.new_tensor(float(run.stop.asked))
        sums = ranks.sum(torch.stack([loss_sum, grad_norm, asked])).tolist()
        loss_mean = sums[0] / ranks.world_size
        grad_norm = sums[1] / ranks.world_size
        stopping = sums[2] > 0
        if not math.isfinite(loss_mean + grad_norm):
            report_nonfinite(run, state, loss_mean, grad_norm)

        run.optimizer.step()
        run.optimizer.zero_grad()
        for sae in run.raw_model.saes():
            sae.update_stats()  # after the step: no token sees its own step's statistics

        epoch = state.windows_read // epoch_windows
        state.iter += 1
        state.windows_read += windows_per_iter
        if ranks.master and it % log_interval == 0:
            log_iteration(log, state, loss_mean, grad_norm, muon_rate, adamw_rate, meter)
            meter.start(state.iter)
        if ranks.master and state.windows_read // epoch_windows > epoch:
            print(f"iter {state.iter}: epoch {state.windows_read // epoch_windows} of the data "
                  "begins")
        if stopping and state.iter < state.end:
            save(run, state, last=True)
            return True


def log_iteration(log, state, loss, grad_norm, muon_rate, adamw_rate, meter):
    """A row of log.csv and a line on the terminal for the iteration that state has just passed."""
    it = state.iter - 1
    row = {
        "iter": it,
        "tokens": state.windows_read * block_size,
        "loss": loss,
        "muon_lr": muon_rate,
        "adamw_lr": adamw_rate,
        "grad_norm": grad_norm,
        **meter.read(it),
    }
    log.write(row)
    minutes = (state.end - it - 1) * meter.tokens_per_iter / row["tok_per_s"] / 60
    mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
    print(f"iter {it}: loss {loss:.4f}, lr {muon_rate:.2e} {adamw_rate:.2e}, "
          f"{row['tok_per_s']:,} tok/s{mfu}, {row['peak_memory_gb']:.2f} GB, "
          f"{minutes:.1f} min left")


def prepare_final_evals(config):
    """A function of a Run that scores its weights; what it needs is missed now, not after hours."""
    from tools import evals
    arguments = final_evals_args.split()
    for argument in arguments:
        key = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if key in ("ckpt", "vs", "data_dir", "device"):  # they are the run's
            raise ValueError(f"final_evals_args={final_evals_args!r}: {key} can't be set there")
    configure(vars(evals), arguments)
    encoding = get_tokenizer(config["tokenizer"])
    tasks = evals.load_tasks(encoding, block_size)

    def run_final_evals(run):
        model = run.raw_model.eval()
        with run.autocast:
            windows = evals.val_windows(run.val_windows)
            scores = evals.evaluate(model, encoding, windows, tasks)
        evals.report(scores, out_dir)

    return run_final_evals


def choose_kernels(run):
    """
    The CayleySAEs' kernels on CUDA, by the kernels setting, after a check on a real batch.

    Raises ValueError for kernels="triton" where these can't be had or give other results.
    """
    if kernels == "torch" or not run.raw_model.saes():
        return
    try:
        if run.ranks.device.type != "cuda":
            raise ValueError(f"kernels='triton' needs a CUDA device, not {run.ranks.device}")
        cayley.use_kernels("triton")
    except ValueError as error:
        if kernels == "triton":
            raise
        if run.ranks.device.type == "cuda":
            print(f"rank {run.ranks.rank}: PyTorch's kernels are used ({error})", file=sys.stderr)
        return
    import cayley_triton
    idx, _ = next(micro_batches(run, 0))
    run.raw_model.eval()
    with torch.no_grad(), run.autocast, run.raw_model.recording() as records:
        run.raw_model(idx)
    run.raw_model.train()
    sae, x = run.raw_model.saes()[0], records[0][-1].x.flatten(0, 1)
    x = x.to(torch.bfloat16 if run.use_bf16 else torch.float32)
    message = cayley_triton.choose(sae, x, kernels, run.ranks.sum)
    if run.ranks.master:
        print(message)


def start_run(config, ranks):
    """Data, model and optimizer -> a Run at its beginning."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    train_windows, val_windows = read_data(config)
    raw_model = GPT(gpt_config(config)).to(ranks.device)
    use_bf16 = dtype == "bfloat16" or dtype == "auto" and ranks.device.type == "cuda"
    return Run(
        config=config,
        ranks=ranks,
        stop=StopSignals(),
        train_windows=train_windows,
        val_windows=val_windows,
        raw_model=raw_model,
        model=parallel_model(raw_model, ranks),
        optimizer=MuonAdamW(
            raw_model, muon_lr, adamw_lr, momentum, (beta1, beta2), weight_decay
        ),
        use_bf16=use_bf16,
        autocast=torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=use_bf16),
    )


# -----------------------------------------------------------------------------


def show_dry_run(config):
    """Print the plan of the run, once. Raises ValueError for a model that can't be."""
    with torch.device("meta"):
        GPT(gpt_config(config))
    if int(os.environ.get("RANK", 0)):
        return
    corners = [0, warmup_iters, max_iters]
    if lr_schedule == "parity":
        print(f"parity: flat until val loss is within {parity_band} of {target_val_loss}, then "
              f"a warmdown of {parity_iters} iterations, and the end")
    else:
        corners.append(int((1 - warmdown_frac) * max_iters))
    rates = {}
    for corner in corners:
        it = min(corner, max_iters)
        rates[it] = get_lr(it, muon_lr, muon_min_lr), get_lr(it, adamw_lr, adamw_min_lr)
    account.show_plan(config, rates)


def main():
    config = configure(globals())
    check_settings()
    if dry_run:
        return show_dry_run(config)
    ranks = Ranks()
    run = start_run(config, ranks)
    final = prepare_final_evals(config) if final_evals else None
    state = State()
    log = None
    with contextlib.ExitStack() as held:
        if ranks.master:
            os.makedirs(out_dir, exist_ok=True)
            held.enter_context(lock(out_dir))
        if init_from == "resume":
            resume(run, state)
        elif os.path.exists(out_path("last.pt")):
            raise ValueError(f"{out_path('last.pt')} is there already: go on with "
                             "--init_from=resume or choose another --out_dir")
        if ranks.master:
            meter = Meter(run.raw_model, ranks, 0)
            hardware = f"{ranks.world_size} x {meter.name}"
            write_config(config, hardware)
            log = Log(log_columns(run.raw_model), state, config)
            print(f"{run.raw_model.get_num_params():,} parameters without positions and features' "
                  f"biases, {hardware}, {meter.tokens_per_iter:,} tokens an iteration, "
                  f"{len(run.train_windows):,} training windows")
            if state.iter >= state.end:
                longer = "max_iters" if state.end == max_iters else "parity_iters"
                print(f"{out_path('last.pt')} has its {state.iter} iterations already: a larger "
                      f"--{longer} goes on")
        choose_kernels(run)
        stopped = train(run, state, log)
        if ranks.master:
            log.finish()
        if ranks.master and stopped:
            when = f"after iteration {state.iter - 1}" if state.iter else "before iteration 0"
            print(f"stopped {when}: {out_path('last.pt')} is written, go on with "
                  "--init_from=resume")
        if ranks.master and final and not stopped:
            run.stop.interrupt_from_now_on()
            final(run)
    ranks.end()


if __name__ == "__main__":
    main()
