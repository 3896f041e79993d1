"""
A run's directory: its checkpoints, log.csv and config.json, written whole, read and checked.

train.py saves and resumes by these functions; every other script loads by load_model.
"""
import csv
import errno
import io
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, fields

import torch

from configurator import say
from data import atomic, write_json
from model import GPT, GPTConfig

REMOVED = ("dense_gradient", "near_misses")  # settings that the layer had up to commit b50401d

# -----------------------------------------------------------------------------
# devices


def pick_device(device):
    """
    The torch.device that a script's setting names; "auto" is CUDA where there is one.

    A CUDA device has its index, under torchrun that of the rank. Raises ValueError for a name that
    PyTorch doesn't know or a device that isn't there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in available:
        raise ValueError(f"device={device!r}: must be 'auto', 'cpu', 'cuda' or 'mps'")
    if not available[kind]:
        raise ValueError(
            f"device={device!r}, but this PyTorch sees no {kind.upper()} device: use --device=cpu"
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}: must be {kind!r} or {kind}:number") from None
    if kind == "cuda" and picked.index >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices, "
                         "counted from 0")
    return picked


# -----------------------------------------------------------------------------
# a disk that may be full


def _reason(error):
    """What went wrong with a file, in words: torch.save hides the system's message."""
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def try_to_write(write, path, patience=None):
    """
    Call write(), which writes path; a full disk is said on standard error, and training goes on.

    patience: seconds in which it is tried again, for what must not be lost. Raises OSError if that
    was in vain.
    """
    deadline = time.monotonic() + (patience or 0)
    while True:
        try:
            return write()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            message = f"{path} could not be written ({_reason(error)})"
        if patience is None:
            return say(f"{message}: training goes on, and tries again later", file=sys.stderr)
        if time.monotonic() >= deadline:
            raise OSError(f"{message}: what came after the last checkpoint there is lost")
        say(f"{message}: it is tried again every 5 seconds, for {patience:.0f} seconds in all: "
            "make room", file=sys.stderr)
        time.sleep(min(5, patience))


def append(path, content):
    """Append bytes to a file, all or none. Raises OSError on a full disk."""
    with open(path, "ab", buffering=0) as file:  # a buffer would be written again at its closing
        size = os.fstat(file.fileno()).st_size
        if file.write(content) < len(content):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -----------------------------------------------------------------------------
# saving


def save(config, state, model, optimizer, windows, best=False, patience=None):
    """
    Save a run to out_dir/last.pt and, if best, ckpt.pt; on every rank, which the optimizer needs.

    state: a dict of plain values; windows: the training split's. Two independent files: damage to
    one leaves the other. patience: see try_to_write.
    """
    optimizer_state = optimizer.state_dict()
    if int(os.environ.get("RANK", 0)) != 0:
        return
    on_cuda = next(model.parameters()).is_cuda
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer_state,
        "model_args": asdict(model.config),
        "config": config,
        **state,
        "train_windows": len(windows),
        "data": windows.fingerprint,
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if on_cuda else None,
        },
    }
    last = os.path.join(config["out_dir"], "last.pt")
    ckpt = os.path.join(config["out_dir"], "ckpt.pt")

    def write():
        with atomic(last, "wb") as file:
            torch.save(checkpoint, file)
            if best:
                file.flush()
                with open(file.name, "rb") as source, atomic(ckpt, "wb") as copy:
                    shutil.copyfileobj(source, copy, 2**24)

    try_to_write(write, last, patience)


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
    write_json(os.path.join(config["out_dir"], "config.json"), {
        "config": config,
        "command": sys.argv,
        "commit": commit or None,
        "versions": versions,
        "hardware": hardware,
    })


def start_wandb(config, state):
    """A wandb run, the same one again after a resume. Raises ValueError where wandb refuses."""
    import wandb
    name = os.path.basename(config["out_dir"])
    same = {"id": state["wandb_id"] or None, "resume": "allow"}
    try:
        run = wandb.init(project=config["wandb_project"], name=name, config=config, **same)
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"wandb_log=True, but wandb refuses ({reason}): wandb login, or "
                         "--wandb_log=False") from None
    state["wandb_id"] = run.id
    return run


class Log:
    """
    Rows of out_dir/log.csv, and wandb where config switches it on.

    On resume without the rows of later iterations than the checkpoint's. Rows that can't be written
    wait in memory for the next one that can.
    """

    def __init__(self, config, columns, state):
        self.path = os.path.join(config["out_dir"], "log.csv")
        self.columns = columns
        self.waiting = []
        resumed = config["init_from"] == "resume"
        rows = self._read(state) if resumed and os.path.exists(self.path) else []
        with atomic(self.path) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({key: row.get(key, "") for key in columns} for row in rows)
        self.wandb = start_wandb(config, state) if config["wandb_log"] else None

    def _read(self, state):
        """The rows before state's iter, and its evaluation. Raises ValueError for another file."""
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
            if it < state["iter"] or it == state["evaluated"] and row["val_loss"]:
                rows.append(row)
        return rows

    def write(self, row):
        """Append a row, a dict; one that can't be written is kept for later."""
        if self.wandb:
            self.wandb.log(row, step=row["iter"])
        self.waiting.append(row)
        try_to_write(self._append, self.path)

    def _append(self):
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(self.waiting)
        append(self.path, text.getvalue().encode())
        self.waiting = []

    def finish(self, patience):
        """Write what still waits. Raises OSError if that can't be done in patience seconds."""
        try_to_write(self._append, self.path, patience)
        if self.wandb:
            self.wandb.finish()


# -----------------------------------------------------------------------------
# resuming


def _check_model_args(checkpoint, config, path):
    """Raise ValueError unless a checkpoint is of the model that config describes."""
    for field in fields(GPTConfig):
        # a setting that is newer than the checkpoint had its default
        value = checkpoint["model_args"].get(field.name, field.default)
        if config[field.name] != value:
            raise ValueError(f"{path} was trained with {field.name}={value!r}, not "
                             f"{config[field.name]!r}: use that, or another out_dir")
    tokenizer = checkpoint["config"]["tokenizer"]
    if tokenizer != config["tokenizer"]:
        raise ValueError(f"{config['data_dir']} has tokenizer {config['tokenizer']!r}, and {path} "
                         f"was trained with {tokenizer!r}")


def _check_same_batches(checkpoint, config, windows, path):
    """Raise ValueError if the coming batches aren't those that the checkpoint's run would read."""
    before = checkpoint["config"]
    old, new = (c["batch_size"] * c["gradient_accumulation_steps"] for c in (before, config))
    changes = []
    if before["seed"] != config["seed"]:
        changes.append(f"seed={before['seed']}, not {config['seed']}")
    if old != new:
        changes.append(f"batch_size * gradient_accumulation_steps = {old}, not {new}")
    if checkpoint["train_windows"] != len(windows):
        changes.append(f"{checkpoint['train_windows']} training windows, not {len(windows)}, in "
                       f"{config['data_dir']}")
    elif checkpoint.get("data", windows.fingerprint) != windows.fingerprint:
        changes.append(f"other shards than those of {config['data_dir']} (their checksums in "
                       "meta.json)")
    if changes:
        raise ValueError(
            f"{path} was trained with {' and '.join(changes)}: the order or content of its batches "
            "would change; --resume_anyway takes it nevertheless"
        )


def resume(config, state, model, optimizer, windows):
    """
    Restore what save has saved, from out_dir/last.pt -> a line that says from where.

    Raises ValueError naming what is wrong with it, or what differs from config and windows.
    """
    last = os.path.join(config["out_dir"], "last.pt")
    ckpt = os.path.join(config["out_dir"], "ckpt.pt")
    try:
        checkpoint = load_checkpoint(last)
        needed = {"optimizer", "rng", *state} - {"parity_start", "wandb_id"}  # they are newer
        missing = needed - checkpoint.keys()
        if missing:
            raise ValueError(f"{last}: it lacks {', '.join(sorted(missing))}")
    except ValueError as error:
        hint = ""
        if os.path.exists(ckpt):
            hint = f"; {ckpt} is there: to go on from it, copy it to {last}"
        raise ValueError(f"{error}{hint}") from None
    _check_model_args(checkpoint, config, last)
    if not config["resume_anyway"]:
        _check_same_batches(checkpoint, config, windows, last)
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{last}: it doesn't fit this model ({reason})") from None
    state.update({key: checkpoint.get(key, value) for key, value in state.items()})
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if next(model.parameters()).is_cuda and checkpoint["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    before = checkpoint["config"]
    line = f"goes on from {last} after {state['iter']} iterations"
    for key in sorted(before.keys() & config.keys() - {"init_from", "resume_anyway"}):
        if before[key] != config[key]:
            line += f", {key}={config[key]!r} (was {before[key]!r})"
    return line


# -----------------------------------------------------------------------------
# loading


def check_archive(path):
    """Raise zipfile.BadZipFile for a damaged file of torch.save: torch.load may read past that."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong: the file was altered")


def load_checkpoint(path, device="cpu"):
    """
    A checkpoint of train.py as a dict of tensors and plain values; of a directory its ckpt.pt.

    Raises ValueError, in one line that names the file, if it is missing, damaged, holds anything
    but data, or is of a layer that this code no longer has.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        missing = {"model", "model_args", "config"} - checkpoint.keys()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # whatever a damaged zip or a refused pickle raises
        text = str(error).strip()
        reason = text.splitlines()[0][:200] if text else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from None
    if missing and {"model_config", "iter_num"} <= checkpoint.keys():
        raise ValueError(f"{path}: a checkpoint of the published models' own code, whose "
                         "dictionary isn't known to be this one: it can't be read here")
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{path}: not a checkpoint of train.py, it lacks {names}")
    config = checkpoint["config"]
    if not isinstance(config, dict) or not {"tokenizer", "block_size", "data_dir"} <= config.keys():
        raise ValueError(f"{path}: its config is not one of train.py's: {str(config)[:40]}")
    for key in REMOVED:
        value = checkpoint["model_args"].pop(key, 0)
        if value:
            raise ValueError(f"{path} was trained with {key}={value}, which the layer no longer "
                             "has: commit b50401d reads it")
    return checkpoint


def build_model(checkpoint, path):
    """The GPT of a checkpoint with its weights. Raises ValueError naming path if they don't fit."""
    try:
        model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:  # an unknown argument; a missing or misshapen tensor
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: its model can't be built ({reason})") from None
    return model


def load_model(path, device="cpu"):
    """A checkpoint's GPT, in evaluation mode on device, and its training configuration, a dict."""
    checkpoint = load_checkpoint(path)
    return build_model(checkpoint, path).to(device).eval(), checkpoint["config"]
