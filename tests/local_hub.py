"""
prepare_fineweb.py with a local folder of .parquet files as the hub's FineWeb-Edu.

    python tests/local_hub.py FOLDER --source=fineweb-edu --out_dir=...
"""
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import prepare_fineweb  # noqa: E402
from configurator import run_main  # noqa: E402


def serve(folder):
    """Replace prepare_fineweb's two calls of the hub by reading and copying from a folder."""

    def hub_files():
        sizes = {name: os.path.getsize(folder / name) for name in sorted(os.listdir(folder))}
        return "commit", sizes

    def hub_fetch(file, commit, directory):
        assert commit == "commit"
        os.makedirs(directory, exist_ok=True)
        with open(folder / file, "rb") as source, open(Path(directory) / file, "wb") as copy:
            shutil.copyfileobj(source, copy, 100_000)

    prepare_fineweb.hub_files = hub_files
    prepare_fineweb.hub_fetch = hub_fetch
    prepare_fineweb.time.sleep = lambda seconds: None


if __name__ == "__main__":
    serve(Path(sys.argv.pop(1)))
    run_main(prepare_fineweb.main)
