"""
A run's directory: the checkpoints of train.py and what else it writes, written, read and checked.
"""
import os
import zipfile

import torch

from model import GPT, GPTConfig


def check_archive(path):
    """Raise zipfile.BadZipFile for a damaged file of torch.save: torch.load may read past that."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong: the file was altered")


def load_checkpoint(path, device="cpu"):
    """
    A checkpoint of train.py as a dict of tensors and plain values; of a directory its ckpt.pt.

    Raises ValueError, in one line that names the file, if it is missing, damaged, or holds anything
    but data.
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
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{path}: not a checkpoint of train.py, it lacks {names}")
    config = checkpoint["config"]
    if not isinstance(config, dict) or not {"tokenizer", "block_size", "data_dir"} <= config.keys():
        raise ValueError(f"{path}: its config is not one of train.py's: {str(config)[:40]}")
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


def pick_device(device):
    """
    The torch.device that a script's setting names; "auto" is CUDA where there is one.

    Raises ValueError for a name that PyTorch doesn't know or a device that isn't there.
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
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}: must be {kind!r} or {kind}:number") from None
