"""
Trains a GPT (model.py) on token bins (prepare_fineweb.py), on one device or many; resumes exactly.

    python train.py configs/demo.py                                      # CPU, minutes
    torchrun --nproc_per_node=8 train.py configs/cayley_small_2L.py      # the published recipe
    python train.py configs/demo.py --max_iters=100 --out_dir=out/short  # any setting, by name
    python train.py configs/demo.py --init_from=resume                   # on from last.pt

In out_dir: ckpt.pt (best val loss), last.pt (newest), config.json (all settings, versions, commit)
and log.csv. python -m tools.account CONFIG prints a run's plan and its memory on paper.
"""
import contextlib
import importlib.util
import itertools
import math
import os
import resource
import signal
import sys
import time
from dataclasses import fields

from configurator import configure, say  # before torch, for GOMP_SPINCOUNT

# isort: split
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import Log, pick_device, resume, save, write_config
from data import Windows, lock
from model import GPT, GPTConfig, peak_flops
from muon import MuonAdamW

# -----------------------------------------------------------------------------
# settings: a config file and then --key=value override them, see configurator.py

# input and output
out_dir = "out"
data_dir = "data/fineweb_edu"
init_from = "scratch"  # "resume" goes on from out_dir/last.pt
resume_anyway = False  # resume although the order or content of the batches changes
eval_interval = 250  # iterations between evaluations; each also writes last.pt
eval_iters = 64  # micro-batches of the fixed validation set, over all ranks
log_interval = 10  # iterations between log lines
save_patience = 600.0  # seconds that the last checkpoint is tried again where it can't be written
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
lr_schedule = "linear_warmdown"
warmdown_frac = 0.9  # of max_iters, for linear_warmdown
# parity: flat until val loss is within the band above the target, a linear warmdown, and the end
target_val_loss = 0.0  # nats per token
parity_band = 0.207  # nats per token: what the published parity run's warmdown was given to gain
parity_iters = 895  # of its warmdown
# system
device = "auto"  # "cuda", "cuda:1", "cpu", "mps"; auto: CUDA where there is one
dtype = "auto"  # "bfloat16" (autocast) or "float32"; auto: bfloat16 on CUDA, float32 elsewhere
torch_compile = True
kernels = "auto"  # of the layer on CUDA: Triton's, where they agree with PyTorch's on a batch

config = configure(
    globals(),
    choices=dict(
        init_from=("scratch", "resume"),
        lr_schedule=("linear_warmdown", "cosine", "constant", "parity"),
        dtype=("auto", "bfloat16", "float32"),
        kernels=("auto", "torch"),
    ),
    at_least=dict(
        eval_interval=1, eval_iters=1, log_interval=1, batch_size=1, gradient_accumulation_steps=1,
        block_size=1, max_iters=1, parity_iters=1, warmup_iters=0, seed=0, save_patience=0,
        muon_lr=0, muon_min_lr=0, adamw_lr=0, adamw_min_lr=0, momentum=0, beta1=0, beta2=0,
        weight_decay=0, warmdown_frac=0, target_val_loss=0, parity_band=0,
    ),
    at_most=dict(warmdown_frac=1),
    below=dict(momentum=1, beta1=1, beta2=1, seed=2**63),
)
rank = int(os.environ.get("RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
if gradient_accumulation_steps % world_size:
    raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} is not a multiple "
                     f"of the {world_size} ranks")
if (lr_schedule == "parity") != (target_val_loss > 0):
    raise ValueError(f"target_val_loss={target_val_loss}: lr_schedule='parity' needs the loss to "
                     f"reach, in nats per token, and {lr_schedule!r} knows no target")
if wandb_log and not importlib.util.find_spec("wandb"):
    raise ValueError("wandb_log=True, but wandb is not installed: pip install wandb")

# -----------------------------------------------------------------------------
# ranks, and the signals that stop a run

device = pick_device(device)
master = rank == 0
if device.type == "cuda":
    torch.cuda.set_device(device)
if "RANK" in os.environ:  # torchrun's
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
wide = torch.float32 if device.type == "mps" else torch.float64


def all_ranks(values):
    """A tensor summed over ranks, in float64 where the device has it."""
    values = values.to(wide)
    if world_size > 1:
        dist.all_reduce(values)
    return values


stop_asked = False  # by a signal: the run stops after this step; a second one ends it at once


def ask_to_stop(number, frame):
    global stop_asked
    if stop_asked:
        os._exit(128 + number)
    stop_asked = True


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
        signal.signal(number, ask_to_stop)

# -----------------------------------------------------------------------------
# data

train_windows = Windows(data_dir, "train", block_size)
val_windows = Windows(data_dir, "val", block_size)
meta = train_windows.meta
if meta["vocab_size"] > vocab_size:
    padded = -(-meta["vocab_size"] // 64) * 64
    raise ValueError(f"vocab_size={vocab_size} is below the {meta['vocab_size']} of {data_dir}'s "
                     f"tokenizer {meta['tokenizer']!r}: set vocab_size={padded}, the next multiple "
                     "of 64")
config["tokenizer"] = meta["tokenizer"]
config["tokenizer_vocab_size"] = meta["vocab_size"]
config["working_directory"] = os.getcwd()  # that a relative data_dir is of


def to_device(windows):
    """
    Windows (B, T + 1), numpy -> inputs and targets (B, T) on the device.

    On CUDA the copy is asynchronous to the host.
    """
    windows = torch.from_numpy(windows)
    if device.type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    else:
        windows = windows.to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def micro_batches(windows_read):
    """
    Yield this rank's micro-batches of one iteration after the other, from windows_read on.

    Whatever the number of ranks, an iteration has the same windows.
    """
    for first in itertools.count(windows_read + rank * batch_size, world_size * batch_size):
        yield to_device(train_windows.shuffled(first, batch_size, seed))


# -----------------------------------------------------------------------------
# model and optimizer

torch.manual_seed(seed)
torch.set_float32_matmul_precision("high")  # TF32 on CUDA
raw_model = GPT(GPTConfig(**{field.name: config[field.name] for field in fields(GPTConfig)}))
raw_model.to(device)
saes = raw_model.saes()
use_bf16 = dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"
autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16)
if torch_compile:
    try:  # on a trifle: without a compiler this fails here and not after the first evaluation
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"torch.compile doesn't work here ({reason}): --torch_compile=False does "
                         "without") from None
model = torch.compile(raw_model) if torch_compile else raw_model
if world_size > 1:
    # update_stats keeps the SAEs' buffers equal on all ranks
    sync_buffers = "forward_sync_buffers" if torch.__version__ >= "2.13" else "broadcast_buffers"
    options = {"gradient_as_bucket_view": True, sync_buffers: False}
    model = DistributedDataParallel(model, **options)
optimizer = MuonAdamW(raw_model, muon_lr, adamw_lr, momentum, (beta1, beta2), weight_decay)

if kernels == "auto" and saes and device.type == "cuda" and importlib.util.find_spec("triton"):
    import cayley_triton
    idx, _ = next(micro_batches(0))
    with torch.no_grad(), autocast, raw_model.recording() as records:
        raw_model.eval()(idx)
    raw_model.train()
    fault = cayley_triton.find_fault(saes[0], records[0][0].x)
    del idx, records  # gigabytes at the reference's size
    if all_ranks(torch.tensor(float(fault != ""), device=device)):
        cayley_triton.enabled(False)
        say(f"WARNING, rank {rank}: Triton's kernels don't agree with PyTorch's on a batch "
            f"({fault or 'on another rank'}), and PyTorch's are used", file=sys.stderr)

state = {  # where the run stands, beside weights and optimizer: saved and restored as a whole
    "iter": 0,  # iterations done
    "windows_read": 0,  # of the endless training order
    "evaluated": -1,  # the last iteration with an evaluation
    "best_val_loss": math.inf,
    "parity_start": -1,  # where parity's warmdown began; -1: not yet
    "wandb_id": "",
}


def last_iter():
    """The iteration at which training ends."""
    if state["parity_start"] >= 0:
        return min(max_iters, state["parity_start"] + parity_iters)
    return max_iters


def get_lr(it, lr, min_lr, parity_start=-1):
    """Learning rate at an iteration, from lr down to min_lr at the last one."""
    if it < warmup_iters:
        return lr * it / warmup_iters
    decay = {  # from where to where
        "linear_warmdown": ((1 - warmdown_frac) * max_iters, max_iters),
        "cosine": (warmup_iters, max_iters),
        "constant": (max_iters, max_iters),
        "parity": (max_iters, max_iters),
    }
    start, end = decay[lr_schedule]
    if parity_start >= 0:
        start, end = parity_start, parity_start + parity_iters
    if it <= start:
        return lr
    progress = min(1.0, (it - start) / (end - start))
    share = 1 - progress
    if lr_schedule == "cosine":
        share = (1 + math.cos(math.pi * progress)) / 2
    return min_lr + (lr - min_lr) * share


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def validate():
    """
    Mean loss over the fixed validation set, each rank reading its share.

    None if a signal stopped it on any rank.
    """
    sums = torch.zeros(3, dtype=wide, device=device)  # losses, windows, ranks that were stopped
    n_windows = min(len(val_windows), eval_iters * batch_size)
    model.eval()
    for first in range(rank * batch_size, n_windows, world_size * batch_size):
        if stop_asked:
            sums[2] += 1
            break
        count = min(batch_size, n_windows - first)
        x, y = to_device(val_windows.shuffled(first, count, seed=0))
        with autocast:
            loss = model(x, y)[1]
        sums[0] += loss.to(wide) * count
        sums[1] += count
    model.train()
    loss_sum, count, n_stopped = all_ranks(sums).tolist()
    return None if n_stopped else loss_sum / count


@torch.no_grad()
def sae_health():
    """
    State of the sparse codes, for log.csv.

    dead_<level>: features without an activation since the last call, summed over layers.
    explained: of a batch of validation windows, mean over layers, see GPT.explained.
    """
    if not saes:
        return {}
    # the same windows on every rank: the numbers don't depend on how many there are
    idx, _ = to_device(val_windows.shuffled(0, min(batch_size, len(val_windows)), seed=0))
    with autocast:
        shares = raw_model.explained(idx)
    health = {}
    for level, where in enumerate(saes[0].level_slices):
        dead = sum((sae.active_counts[where] == 0).sum() for sae in saes)
        health[f"dead_{level}"] = dead.item()
    health["explained"] = shares.mean().item()
    for sae in saes:
        sae.active_counts.zero_()
        if sae.skipped_updates > 0:
            say("inputs that were not finite were left out of a CayleySAE's statistics "
                f"{sae.skipped_updates.item()} times", file=sys.stderr)
    return health


def follow_parity(val_loss):
    """Begin parity's warmdown where val loss comes near its target -> what to say, or ""."""
    it = state["iter"]
    near = f"within {parity_band} of {target_val_loss}"
    started = state["parity_start"] >= 0
    if not started and it >= warmup_iters and val_loss <= target_val_loss + parity_band:
        state["parity_start"] = it
        words = f"val loss is {near}: warmdown to iteration {last_iter()}"
        if last_iter() < it + parity_iters:
            words += f", where max_iters={max_iters} cuts its {parity_iters} iterations short"
        return words
    if it < last_iter():
        return ""
    if not started:
        return (f"val loss never came {near} after the warmup of {warmup_iters} iterations, and "
                "the learning rate never fell: a larger --max_iters goes on")
    reached = "reached" if val_loss <= target_val_loss else "not reached"
    return f"target_val_loss={target_val_loss} is {reached}"


# -----------------------------------------------------------------------------
# the run's directory

this_run = (config, state, raw_model, optimizer, train_windows)  # as save and resume take it
last = os.path.join(out_dir, "last.pt")
lock_held = contextlib.ExitStack()  # to the end of the process
if master:
    lock_held.enter_context(lock(out_dir))
if init_from == "resume":
    line = resume(*this_run)
    if lr_schedule != "parity":
        state["parity_start"] = -1  # another schedule has no such warmdown, nor its end
    if master:
        say(line)
elif os.path.exists(last):
    raise ValueError(f"{last} is there already: go on with --init_from=resume or choose another "
                     "--out_dir")

tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
name, flops = peak_flops(device)
if master:
    write_config(config, f"{world_size} x {name}")
    columns = ["iter", "tokens", "loss", "val_loss", "muon_lr", "adamw_lr", "grad_norm"]
    columns += ["tok_per_s", "mfu", "peak_memory_gb", "data_wait_s"]
    if saes:
        columns += [f"dead_{level}" for level in range(len(saes[0].levels))] + ["explained"]
    log = Log(config, columns, state)
    say(f"{raw_model.get_num_params():,} parameters without positions and features' biases, "
        f"{world_size} x {name}, {tokens_per_iter:,} tokens an iteration, {len(train_windows):,} "
        "training windows")
    if state["iter"] >= last_iter():
        longer = "max_iters" if last_iter() == max_iters else "parity_iters"
        say(f"{last} has its {state['iter']} iterations already: a larger --{longer} goes on")

# -----------------------------------------------------------------------------
# the loop

accumulation = gradient_accumulation_steps // world_size
epoch_windows = len(train_windows)
batches = micro_batches(state["windows_read"])
x, y = next(batches)
stopped = False
timed_from = state["iter"]  # throughput is of the iterations from here on
start_time = time.perf_counter()
data_wait = 0.0

while True:
    it = state["iter"]
    if (it % eval_interval == 0 or it >= last_iter()) and state["evaluated"] != it:
        val_loss = validate()
        stopped = val_loss is None
        if stopped:
            break
        health = sae_health()
        state["evaluated"] = it
        best = val_loss < state["best_val_loss"]
        state["best_val_loss"] = min(state["best_val_loss"], val_loss)
        words = follow_parity(val_loss) if lr_schedule == "parity" else ""
        if master:
            tokens = state["windows_read"] * block_size
            log.write({"iter": it, "tokens": tokens, "val_loss": val_loss, **health})
            shown = "".join(f", {key} {value:.6g}" for key, value in health.items())
            say(f"iter {it}: val loss {val_loss:.4f}{shown}")
            if words:
                say(f"iter {it}: {words}")
        save(*this_run, best=best, patience=save_patience if it >= last_iter() else None)
        timed_from = it  # an evaluation's time isn't training's
        start_time = time.perf_counter()
        data_wait = 0.0
    if it >= last_iter():
        break

    muon_rate = get_lr(it, muon_lr, muon_min_lr, state["parity_start"])
    adamw_rate = get_lr(it, adamw_lr, adamw_min_lr, state["parity_start"])
    optimizer.set_lr(muon_rate, adamw_rate)

    loss_sum = torch.zeros((), device=device)
    for micro_step in range(accumulation):
        if world_size > 1:
            # before the forward: DDP reads it there, and sums gradients in the last backward
            model.require_backward_grad_sync = micro_step == accumulation - 1
        with autocast:
            loss = model(x, y)[1] / accumulation
        loss.backward()
        loss_sum += loss.detach()
        # the next micro-batch is read while a GPU still works on this one
        before = time.perf_counter()
        x, y = next(batches)
        data_wait += time.perf_counter() - before

    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in raw_model.parameters()])
    # The one place in an iteration where the host waits for the device. Stopping is summed as well,
    # so that all ranks stop after the same iteration.
    asked = loss_sum.new_tensor(float(stop_asked))
    loss_mean, grad_norm, asked = all_ranks(torch.stack([loss_sum, grad_norm, asked])).tolist()
    loss_mean /= world_size
    grad_norm /= world_size
    if not math.isfinite(loss_mean + grad_norm):
        with autocast:
            again = itertools.islice(micro_batches(state["windows_read"]), accumulation)
            found = [raw_model.first_nonfinite(*batch) for batch in again]
        where = next(filter(None, found), "no micro-batch of this rank")
        raise ValueError(f"iteration {it}: loss {loss_mean}, gradient norm {grad_norm}, first in "
                         f"{where}; the weights are as before it, {last} as it was. Lower the "
                         "learning rates?")

    optimizer.step()
    optimizer.zero_grad()
    for sae in saes:
        sae.update_stats()  # after the step: no token sees its own step's statistics

    epoch = state["windows_read"] // epoch_windows
    state["iter"] += 1
    state["windows_read"] += gradient_accumulation_steps * batch_size
    if master and it % log_interval == 0:
        seconds = time.perf_counter() - start_time
        tok_per_s = tokens_per_iter * (it + 1 - timed_from) / seconds
        mfu = tok_per_s * raw_model.flops_per_token() / (flops * world_size) if flops else None
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        log.write({
            "iter": it,
            "tokens": state["windows_read"] * block_size,
            "loss": loss_mean,
            "muon_lr": muon_rate,
            "adamw_lr": adamw_rate,
            "grad_norm": grad_norm,
            "tok_per_s": round(tok_per_s),
            "mfu": mfu,
            "peak_memory_gb": round(memory / 1e9, 3),
            "data_wait_s": round(data_wait, 4),
        })
        minutes = (last_iter() - it - 1) * tokens_per_iter / tok_per_s / 60
        shown = f", MFU {mfu:.1%}" if mfu else ""
        say(f"iter {it}: loss {loss_mean:.4f}, lr {muon_rate:.2e} {adamw_rate:.2e}, "
            f"{tok_per_s:,.0f} tok/s{shown}, {memory / 1e9:.2f} GB, {minutes:.1f} min left")
        timed_from = state["iter"]
        start_time = time.perf_counter()
        data_wait = 0.0
    if master and state["windows_read"] // epoch_windows > epoch:
        say(f"iter {it + 1}: epoch {state['windows_read'] // epoch_windows} of the data begins")
    stopped = asked > 0 and it + 1 < last_iter()
    if stopped:
        break

if stopped:
    save(*this_run, patience=save_patience)
if master:
    log.finish(save_patience)
if master and stopped:
    when = f"after iteration {state['iter'] - 1}" if state["iter"] else "before iteration 0"
    say(f"stopped {when}: {last} is written, go on with --init_from=resume")
if dist.is_initialized():
    dist.destroy_process_group()
    # Not by Python's own end: gloo's threads need the interpreter to let go of the last tensors,
    # and hang or abort there.
    os._exit(0)
