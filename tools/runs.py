"""
What several tools need of a run: its data, wherever they are now, and a new directory to write to.
"""
import contextlib
import io
import os
import shutil

import torch

from data import Windows, atomic, lock


def run_windows(config, split, data_dir=""):
    """
    Windows of a split for the model of a run with this configuration, from data_dir or its own.

    Raises ValueError as Windows does, and if the data are of another tokenizer than the run's.
    """
    data_dir = data_dir or run_data_dir(config)
    windows = Windows(data_dir, split, config["block_size"])
    if windows.meta["tokenizer"] != config["tokenizer"]:
        raise ValueError(f"{data_dir}: its tokenizer is {windows.meta['tokenizer']!r} and the "
                         f"checkpoint's {config['tokenizer']!r}")
    return windows


def run_data_dir(config):
    """
    A run's data_dir, its relative names being of the directory in which the run was started.

    That is config["working_directory"]. A name that isn't there means a directory here, and so do
    those of runs that didn't record it.
    """
    found = []
    for directory in config["data_dir"].split(","):
        elsewhere = os.path.join(config.get("working_directory", ""), directory)
        found.append(elsewhere if os.path.isdir(elsewhere) else directory)
    return ",".join(found)


def write_tensors(path, value):
    """torch.save of a value to path, atomically. Raises OSError if it can't."""
    content = io.BytesIO()
    torch.save(value, content)
    with atomic(path, "wb") as file:
        file.write(content.getbuffer())  # torch.save has no OSError for a full disk


@contextlib.contextmanager
def new_directory(path):
    """
    A directory to fill, which is at path when it is whole, and gone if that fails.

    Until then it is path.partial, with a mark in it by which a killed run's is known. Raises
    ValueError if path is there, or if path.partial is another process' or not such a directory.
    """
    if not path.strip("/"):
        raise ValueError(f"out_dir={path!r}: must name a new directory")
    if os.path.lexists(path):  # a link to nothing, too
        raise ValueError(f"{path} is there already: choose another --out_dir, or remove it")
    partial = path.rstrip("/") + ".partial"
    mark = os.path.join(partial, ".unfinished")
    with lock(partial):
        if os.listdir(partial) and not os.path.exists(mark):
            raise ValueError(f"{partial} is in the way: choose another --out_dir, or remove it")
        try:
            open(mark, "w").close()
            for entry in os.scandir(partial):
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.path != mark:
                    os.remove(entry)
            yield partial
            os.remove(mark)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
