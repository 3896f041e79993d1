"""
Does the suite notice a fault? Puts faults by hand into a copy of the project, one at a time.

    python records/mutants/mutants.py                    # those that mutants.csv doesn't have yet
    python records/mutants/mutants.py --only=cayley.py   # the faults of one file

The copy has the files that git knows, as they are in the working tree. Each fault is one change of
text; the tests that should notice it run until the first one fails. Before that the same tests must
pass on the copy without a fault. Rows of mutants.csv whose fault is still in the list are kept and
not run again: remove a row, or the file, to run it anew.
"""
import contextlib
import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from faults import FAULTS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "mutants.csv"
COLUMNS = ["file", "fault", "killed_by", "seconds"]
TIMEOUT = 300  # seconds of one run of tests


class Outcome(NamedTuple):
    status: int  # pytest's: 0 all passed, 1 some failed
    failed: str  # the first test that failed
    seconds: float
    output: str


def copy_project(directory):
    """The files that git knows, as they are now."""
    command = ["git", "ls-files"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)


def end_all(process):
    """End what is left of a process and of those that it started, as training runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_tests(directory, tests):
    """pytest on a copy of the project, to the first failure; TIMEOUT counts as one."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command + shlex.split(tests), cwd=directory, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        end_all(process)
        output, _ = process.communicate()
        return Outcome(1, f"no end in {TIMEOUT} seconds", TIMEOUT, output)
    end_all(process)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
    seconds = time.monotonic() - start
    return Outcome(process.returncode, failed[1] if failed else "", seconds, output)


def check_faults():
    """Raise ValueError for a fault whose text isn't in its file once, or that changes nothing."""
    for fault in FAULTS:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1 or fault.old == fault.new:
            raise ValueError(f"{fault.file}, {fault.words}: {count} places, must be one")
    names = [(fault.file, fault.words) for fault in FAULTS]
    if len(set(names)) < len(names):
        raise ValueError("two faults have the same words")


def read_table():
    """{(file, fault): row} of what has been run."""
    if not TABLE.exists():
        return {}
    with open(TABLE, newline="") as file:
        return {(row["file"], row["fault"]): row for row in csv.DictReader(file)}


def write_table(rows):
    """In the order of FAULTS, without rows of faults that are not there any more."""
    partial = TABLE.with_suffix(".tmp")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for fault in FAULTS:
            if (fault.file, fault.words) in rows:
                writer.writerow(rows[fault.file, fault.words])
    os.replace(partial, TABLE)


def try_fault(directory, fault):
    """The row of a fault. Raises RuntimeError where the tests can't be run at all."""
    path = directory / fault.file
    whole = path.read_text()
    path.write_text(whole.replace(fault.old, fault.new))
    try:
        outcome = run_tests(directory, fault.tests)
    finally:
        path.write_text(whole)
    if outcome.status not in (0, 1):
        raise RuntimeError(f"{fault.words}: pytest ended with {outcome.status}\n{outcome.output}")
    killed_by = outcome.failed if outcome.status else "survived"
    values = [fault.file, fault.words, killed_by, round(outcome.seconds)]
    return dict(zip(COLUMNS, values))


def main(only):
    check_faults()
    passed = set()  # tests that pass without a fault
    todo = [fault for fault in FAULTS if only in ("", fault.file)]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        copy_project(directory)
        for fault in todo:
            if (fault.file, fault.words) in read_table():
                continue
            if fault.tests not in passed:
                outcome = run_tests(directory, fault.tests)
                if outcome.status:
                    raise RuntimeError(f"without a fault {fault.tests} fails:\n{outcome.output}")
                passed.add(fault.tests)
            row = try_fault(directory, fault)
            write_table({**read_table(), (fault.file, fault.words): row})
            print(f"{row['seconds']:4} s  {fault.file}: {fault.words}: {row['killed_by']}",
                  flush=True)
    rows = read_table()
    for file in dict.fromkeys(fault.file for fault in FAULTS):
        results = [row["killed_by"] for (name, _), row in rows.items() if name == file]
        killed = sum(result != "survived" for result in results)
        print(f"{file}: {killed} of {len(results)} killed")


if __name__ == "__main__":
    main("".join(sys.argv[1:]).removeprefix("--only="))
