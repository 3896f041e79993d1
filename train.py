"""
Trains a GPT (model.py) on token bins (prepare_fineweb.py), on one device or many, with exact resume.

    python train.py configs/demo.py                                          # CPU, minutes
    torchrun --nproc_per_node=8 train.py configs/cayley_small_2L.py          # the reference run
    python train.py configs/demo.py --max_iters=100 --out_dir=out/short      # any setting below, by name
    python train.py configs/demo.py --init_from=resume                       # go on where last.pt stands

In out_dir: ckpt.pt (best val loss), last.pt (newest), config.json (all settings, versions, commit) and log.csv.
"""
import csv
import importlib.util
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, run_main
from model import GPT, GPTConfig, code_statistics, explained, first_nonfinite, load_checkpoint, pick_device
from muon import MuonAdamW
from prepare_fineweb import Windows, get_tokenizer, write_json

# -----------------------------------------------------------------------------
# settings: a config file and then --key=value override them, see configurator.py

# input and output
out_dir = "out"
data_dir = "data/fineweb_edu"
init_from = "scratch"  # or "resume": from out_dir/last.pt
eval_interval = 250  # iterations between evaluations; each also writes last.pt
eval_iters = 64  # micro-batches of the fixed validation set, over all ranks
log_interval = 10  # iterations between log lines
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
lr_schedule = "linear_warmdown"  # or "cosine", "constant"
warmdown_frac = 0.9  # of max_iters, for linear_warmdown
# system
device = "auto"  # "cuda", "cuda:1", "cpu"; auto: CUDA where there is one
dtype = "auto"  # "bfloat16" (autocast) or "float32"; auto: bfloat16 on CUDA, float32 on a CPU
compile = True  # torch.compile

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "RTX 4090": 165e12}


CHOICES = {"init_from": ("scratch", "resume"), "lr_schedule": ("linear_warmdown", "cosine", "constant"),
           "dtype": ("auto", "bfloat16", "float32")}
AT_LEAST_1 = ("eval_interval", "eval_iters", "log_interval", "batch_size", "gradient_accumulation_steps", "max_iters")
NOT_NEGATIVE = ("muon_lr", "muon_min_lr", "adamw_lr", "adamw_min_lr", "weight_decay", "warmup_iters", "seed")


def check_settings():
    """Raise ValueError for a setting that makes no sense, before anything is loaded."""
    for key, value in globals().items():
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{key}={value!r}: must be one of {', '.join(map(repr, CHOICES[key]))}")
        if key in AT_LEAST_1 and value < 1:
            raise ValueError(f"{key}={value}: must be at least 1")
        if key in NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"{key}={value}: must not be negative")
    if wandb_log and not importlib.util.find_spec("wandb"):
        raise ValueError("wandb_log=True, but wandb is not installed: pip install wandb")
    if not 0 <= warmdown_frac <= 1:
        raise ValueError(f"warmdown_frac={warmdown_frac}: must be from 0 to 1")


def get_lr(it, lr, min_lr):
    """Learning rate at an iteration: linear warmup from 0, then lr_schedule down to min_lr at max_iters."""
    if it < warmup_iters:
        return lr * it / warmup_iters
    start = {"linear_warmdown": (1 - warmdown_frac) * max_iters, "cosine": warmup_iters, "constant": max_iters}[lr_schedule]
    if it <= start:
        return lr
    progress = min(1.0, (it - start) / (max_iters - start))
    return min_lr + (lr - min_lr) * (1 - progress if lr_schedule == "linear_warmdown" else (1 + math.cos(math.pi * progress)) / 2)


# -----------------------------------------------------------------------------
# the process group: one rank without torchrun

class Ranks:
    """This process among those that torchrun started, and its device."""

    def __init__(self):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if gradient_accumulation_steps % self.world_size:
            raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} is not a multiple of the "
                             f"{self.world_size} ranks")
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "RANK" in os.environ else self.device
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, values):
        """Floats (a list) or a tensor, summed over ranks -> tensor."""
        values = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


# -----------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def validate(model, windows, ranks, autocast):
    """Mean loss over the fixed validation set, each rank reading its share."""
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    n = min(len(windows), eval_iters * batch_size)
    model.eval()
    for first in range(ranks.rank * batch_size, n, ranks.world_size * batch_size):
        x, y = to_device(windows.shuffled(first, min(batch_size, n - first), seed=0), ranks.device)
        with autocast:
            loss = model(x, y)[1]
        sums += torch.stack([loss.double() * len(x), torch.tensor(len(x), device=ranks.device)])
    model.train()
    total, count = ranks.sum(sums).tolist()
    return total / count


def sae_health(model, windows, ranks, autocast):
    """
    State of the sparse codes: dead_<level> (features without an activation since the last call, summed over layers),
    active_<level> (mean active features per token) and explained (mean over layers, see model.explained).
    """
    saes = model.saes()
    if not saes:
        return {}
    count = min(batch_size, len(windows))
    idx, _ = to_device(windows.shuffled(ranks.rank * count, count, seed=0), ranks.device)
    with autocast:
        statistics = ranks.sum(code_statistics(model, idx))  # (layers, 3 + levels)
    health = {}
    for level, active in enumerate((statistics[:, 3:].mean(0) / ranks.world_size).tolist()):
        health[f"dead_{level}"] = sum((sae.active_counts[sae.level_slices[level]] == 0).sum().item() for sae in saes)
        health[f"active_{level}"] = active
    health["explained"] = explained(statistics[:, :3]).mean().item()
    for sae in saes:
        sae.active_counts.zero_()
    return health


# -----------------------------------------------------------------------------
# files

def save_checkpoint(checkpoint, best):
    """Write out_dir/last.pt by atomic rename, and ckpt.pt as the same file if best. A failure is reported, and the old stay."""
    last, ckpt = os.path.join(out_dir, "last.pt"), os.path.join(out_dir, "ckpt.pt")
    try:
        with open(last + ".tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if best:
            if os.path.exists(ckpt + ".tmp"):
                os.remove(ckpt + ".tmp")
            try:
                os.link(last + ".tmp", ckpt + ".tmp")
            except OSError:  # a file system without hard links
                shutil.copyfile(last + ".tmp", ckpt + ".tmp")
            os.replace(ckpt + ".tmp", ckpt)
        os.replace(last + ".tmp", last)
        directory = os.open(out_dir, os.O_RDONLY)
        os.fsync(directory)  # the renames themselves
        os.close(directory)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        print(f"{last} could not be written ({str(error).splitlines()[0]}): training goes on, and the next "
              f"checkpoint is tried in at most {eval_interval} iterations", file=sys.stderr)


class Log:
    """Rows of log.csv, on resume without those of later iterations than last.pt's; wandb too where it is switched on."""

    def __init__(self, columns, it, evaluated, config):
        self.path, self.columns, rows = os.path.join(out_dir, "log.csv"), columns, []
        if it > 0 and os.path.exists(self.path):
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()  # a line that was cut off
                        and (int(row["iter"]) < it or int(row["iter"]) == evaluated and row["val_loss"])]
        with open(self.path + ".tmp", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({key: row.get(key, "") for key in columns} for row in rows)
        os.replace(self.path + ".tmp", self.path)
        self.file = open(self.path, "a", newline="", buffering=1)
        self.wandb = None
        if wandb_log:
            import wandb
            self.wandb = wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)

    def write(self, row):
        csv.DictWriter(self.file, self.columns).writerow(row)
        if self.wandb:
            self.wandb.log(row, step=row["iter"])


def write_config(config):
    """out_dir/config.json: what ran, with what."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                            cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    record = {"config": config, "command": sys.argv, "commit": commit or None,
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}}
    write_json(os.path.join(out_dir, "config.json"), record)


def to_device(windows, device):
    """Windows (B, T + 1), numpy -> inputs and targets (B, T) on device, asynchronously on CUDA."""
    windows = torch.from_numpy(windows)
    if device.type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# the loop

def load_last(ranks, config):
    """last.pt of out_dir, checked against the settings. Raises ValueError naming a setting that differs."""
    path, other = os.path.join(out_dir, "last.pt"), os.path.join(out_dir, "ckpt.pt")
    try:
        checkpoint = load_checkpoint(path)
    except ValueError as error:
        hint = f"; {other} is there: to go on from it, copy it to {path}" if os.path.exists(other) else ""
        raise ValueError(f"{error}{hint}") from None
    for key, value in checkpoint["model_args"].items():
        if config[key] != value:
            raise ValueError(f"{path} was trained with {key}={value!r}, not {config[key]!r}: use that, or another out_dir")
    return checkpoint


def main():
    config = configure(globals())
    check_settings()
    ranks = Ranks()
    master = ranks.rank == 0
    model_args = {key: config[key] for key in GPTConfig.__dataclass_fields__}
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    use_bf16 = dtype == "bfloat16" or dtype == "auto" and ranks.device.type == "cuda"
    autocast = torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=use_bf16)

    train_windows, val_windows = (Windows(data_dir, split, block_size) for split in ("train", "val"))
    if train_windows.meta["vocab_size"] > vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is below the {train_windows.meta['vocab_size']} of {data_dir}'s tokenizer "
                         f"{train_windows.meta['tokenizer']!r}")
    config["tokenizer"], config["tokenizer_vocab_size"] = train_windows.meta["tokenizer"], train_windows.meta["vocab_size"]
    if final_evals:  # what it needs is missed now, not after hours
        import evals
        configure(vars(evals), final_evals_args.split())
        encoding = get_tokenizer(config["tokenizer"])
        tasks = evals.load_tasks(encoding, block_size)
    raw_model = GPT(GPTConfig(**model_args)).to(ranks.device)
    optimizer = MuonAdamW(raw_model, muon_lr, adamw_lr, momentum, (beta1, beta2), weight_decay)
    it, windows_read, evaluated, best_val_loss = 0, 0, -1, math.inf  # evaluated: the last iteration with an evaluation
    last = os.path.join(out_dir, "last.pt")
    if init_from == "resume":
        checkpoint = load_last(ranks, config)
        raw_model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        it, windows_read, evaluated, best_val_loss = (
            checkpoint[key] for key in ("iter", "windows_read", "evaluated", "best_val_loss"))
        if checkpoint["train_windows"] != len(train_windows):
            raise ValueError(f"{data_dir} has {len(train_windows)} training windows, and had {checkpoint['train_windows']} "
                             "when last.pt was written: the data order would not go on")
        if checkpoint["config"]["tokenizer"] != config["tokenizer"]:
            raise ValueError(f"{data_dir} has tokenizer {config['tokenizer']!r}, and {last} was trained with "
                             f"{checkpoint['config']['tokenizer']!r}")
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if ranks.device.type == "cuda" and checkpoint["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
        del checkpoint
    elif os.path.exists(last):
        raise ValueError(f"{last} is there already: go on with --init_from=resume or choose another --out_dir")
    model = torch.compile(raw_model) if compile else raw_model
    if ranks.world_size > 1:  # the SAE's buffers are kept equal by update_stats
        model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    accumulation = gradient_accumulation_steps // ranks.world_size
    windows_per_iter = gradient_accumulation_steps * batch_size
    tokens_per_iter = windows_per_iter * block_size
    flops_per_token = 6 * raw_model.get_num_params() + 12 * n_layer * n_embd * block_size
    device_name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "CPU"
    peak_flops = next((flops for name, flops in PEAK_BF16_FLOPS.items() if name in device_name), None)

    health_columns = [f"{key}_{level}" for level in range(len(raw_model.saes()[0].levels) if cayley_levels else 0)
                      for key in ("dead", "active")] + ["explained"] * bool(cayley_levels)
    if master:
        os.makedirs(out_dir, exist_ok=True)
        write_config(config)
        log = Log(["iter", "tokens", "loss", "val_loss", "muon_lr", "adamw_lr", "grad_norm", "tok_per_s", "mfu",
                   "peak_memory_gb", "data_wait_s"] + health_columns, it, evaluated, config)
        print(f"{raw_model.get_num_params():,} parameters, {ranks.world_size} x {device_name}, {tokens_per_iter:,} tokens "
              f"an iteration, {len(train_windows):,} training windows")
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))

    def micro_batch(windows_read, micro_step):
        """The rank's share of an iteration: whatever the number of ranks, an iteration has the same windows."""
        first = windows_read + (micro_step * ranks.world_size + ranks.rank) * batch_size
        return to_device(train_windows.shuffled(first, batch_size, seed), ranks.device)

    def save(best):
        optimizer_state = optimizer.state_dict()  # gathers momentum from all ranks
        if master:
            cuda_rng = torch.cuda.get_rng_state() if ranks.device.type == "cuda" else None
            save_checkpoint({"model": raw_model.state_dict(), "optimizer": optimizer_state, "model_args": model_args,
                             "config": config, "iter": it, "windows_read": windows_read, "evaluated": evaluated,
                             "best_val_loss": best_val_loss, "train_windows": len(train_windows),
                             "rng": {"cpu": torch.get_rng_state(), "cuda": cuda_rng}}, best)

    x, y = micro_batch(windows_read, 0)
    start_time, start_it, data_wait = time.perf_counter(), it, 0.0
    while True:
        if (it % eval_interval == 0 or it == max_iters) and evaluated != it:
            evaluated = it
            val_loss = validate(model, val_windows, ranks, autocast)
            health = sae_health(raw_model, val_windows, ranks, autocast)
            best = val_loss < best_val_loss
            best_val_loss = min(best_val_loss, val_loss)
            if master:
                log.write({"iter": it, "tokens": windows_read * block_size, "val_loss": val_loss, **health})
                print(f"iter {it}: val loss {val_loss:.4f}" + "".join(f", {key} {value:.6g}" for key, value in health.items()))
            save(best)
            start_time, start_it, data_wait = time.perf_counter(), it, 0.0
        if it >= max_iters:
            break

        lrs = get_lr(it, muon_lr, muon_min_lr), get_lr(it, adamw_lr, adamw_min_lr)
        optimizer.set_lr(*lrs)
        loss_sum = torch.zeros((), device=ranks.device)
        for micro_step in range(accumulation):
            if ranks.world_size > 1:  # DDP reads it in forward
                model.require_backward_grad_sync = micro_step == accumulation - 1
            with autocast:
                loss = model(x, y)[1] / accumulation
            loss.backward()
            loss_sum += loss.detach()
            wait = time.perf_counter()
            if micro_step < accumulation - 1:  # on CUDA this is asynchronous to the kernels in flight
                x, y = micro_batch(windows_read, micro_step + 1)
            else:
                x, y = micro_batch(windows_read + windows_per_iter, 0)
            data_wait += time.perf_counter() - wait
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in raw_model.parameters()])
        # the one place in an iteration where the host waits for the device
        loss_mean, grad_norm, n_stop = ranks.sum(torch.stack([loss_sum, grad_norm, loss_sum.new_tensor(len(stop))])).tolist()
        loss_mean, grad_norm = loss_mean / ranks.world_size, grad_norm / ranks.world_size
        if not math.isfinite(loss_mean + grad_norm):
            with autocast:
                names = (first_nonfinite(raw_model, *micro_batch(windows_read, i)) for i in range(accumulation))
                where = next(filter(None, names), "no micro-batch of this rank")
            raise ValueError(f"iteration {it}: loss {loss_mean}, gradient norm {grad_norm}, first in {where}; the weights are "
                             f"as before it, {last} as it was. Lower the learning rates?")
        optimizer.step()
        optimizer.zero_grad()
        for sae in raw_model.saes():
            sae.update_stats()
        if it % log_interval == 0 and master:
            seconds = time.perf_counter() - start_time
            tok_per_s = tokens_per_iter * (it + 1 - start_it) / seconds
            memory = (torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
            mfu = tok_per_s * flops_per_token / (peak_flops * ranks.world_size) if peak_flops else None
            log.write({"iter": it, "tokens": (windows_read + windows_per_iter) * block_size, "loss": loss_mean, "muon_lr": lrs[0],
                       "adamw_lr": lrs[1], "grad_norm": grad_norm, "tok_per_s": round(tok_per_s), "mfu": mfu,
                       "peak_memory_gb": round(memory, 3), "data_wait_s": round(data_wait, 4)})
            eta = (max_iters - it - 1) * tokens_per_iter / tok_per_s
            print(f"iter {it}: loss {loss_mean:.4f}, lr {lrs[0]:.2e} {lrs[1]:.2e}, {tok_per_s:,.0f} tok/s"
                  + (f", MFU {mfu:.1%}" if mfu else "") + f", {memory:.2f} GB, {eta / 60:.1f} min left")
            start_time, start_it, data_wait = time.perf_counter(), it + 1, 0.0
        it += 1
        windows_read += windows_per_iter
        if master and windows_read // len(train_windows) > (windows_read - windows_per_iter) // len(train_windows):
            print(f"iter {it}: epoch {windows_read // len(train_windows)} of the data begins")
        if n_stop and it < max_iters:
            save(best=False)
            if master:
                print(f"stopped after iteration {it - 1}: {last} is written, go on with --init_from=resume")
            break
    if final_evals and master and it == max_iters:
        with autocast:
            evals.report(evals.evaluate(raw_model.eval(), encoding, evals.val_windows(val_windows), tasks), out_dir)
    if master and log.wandb:
        log.wandb.finish()
    if dist.is_initialized():
        dist.destroy_process_group()
        # Not by Python's own end: gloo's threads need the interpreter to let go of the last tensors, and hang or abort there.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    run_main(main)
