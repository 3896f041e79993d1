"""
Overrides a script's globals by a config file and then by --key=value, checked. Every script here
uses it.

    config = configure(globals(), at_least=dict(batch_size=1))    # after a script's settings

A setting is a global of plain type (bool, int, float, str) in lower case, or a list of strings, to
which every --key=value adds one. A config file is a Python file of plain assignments to settings;
functions, classes, modules and names that begin with "_" are its own. On the command line
'--key=value', '--key value', and '--key' alone for a bool; '-' and '_' are the same in keys; --help
lists the settings. From then on a ValueError or OSError ends the script with one line and status 1,
and a reader that goes (| head) quietly.

Importing it sets GOMP_SPINCOUNT, unless the environment has it: import it before torch.
"""
import ast
import atexit
import contextlib
import difflib
import glob
import json
import math
import operator
import os
import re
import select
import sys
import types

# GCC's OpenMP reads it when torch is loaded: a CPU's threads that wait for each other sleep sooner,
# which beside another process is 2 to 18 times as fast, and as fast alone (records/bench)
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

NANOGPT = {  # names that its users will try
    "learning_rate": ("muon_lr", "adamw_lr"),
    "min_lr": ("muon_min_lr", "adamw_min_lr"),
    "compile": ("torch_compile",),
    "dropout": (),
}
NO_BOUNDS = types.MappingProxyType({})

# -----------------------------------------------------------------------------
# how a script ends


def _tell_torchrun(line):
    """Under torchrun: hand it the line for the report at its end, once for this machine's ranks."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return False
    ranks_dir = os.path.dirname(os.path.dirname(error_file))
    try:
        os.close(os.open(os.path.join(ranks_dir, "first_error"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:  # another rank was first
        return True
    except OSError:
        return False
    with open(error_file, "w") as file:
        json.dump({"message": line}, file)
    return True


def one_line(kind, error, traceback):
    """As sys.excepthook: what was raised of bad input is one line on standard error."""
    out_of_memory = kind.__name__ == "OutOfMemoryError"  # PyTorch's, which isn't imported here
    if not out_of_memory and not issubclass(kind, (ValueError, OSError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, traceback)
    if kind is BrokenPipeError and _reader_is_gone(sys.stdout):
        return None
    message = "interrupted" if kind is KeyboardInterrupt else error
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"  # without [Errno 2]
    if out_of_memory:
        sentences = str(error).split(". ")
        message = ". ".join(sentences[:2]) + ": a smaller --batch_size takes less"
    line = f"{os.path.basename(sys.argv[0])}: {message}"
    if _tell_torchrun(line):
        sys.stdout.flush()
        os._exit(1)  # not by Python's own end, where gloo's threads may hang
    print(line, file=sys.stderr)


def _reader_is_gone(stream):
    """Whether a stream is a pipe that nobody reads any more; from then on it leads nowhere."""
    ends = select.poll()
    ends.register(stream, 0)
    gone = bool(ends.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


def say(*words, file=None):
    """As print, at once; a full disk, or a reader that has gone, stops no run."""
    stream = file or sys.stdout
    with contextlib.suppress(OSError):  # what is left of it is written with the next
        print(*words, file=stream, flush=True)
    _reader_is_gone(stream)


# -----------------------------------------------------------------------------
# settings


def _check_known(key, settings, where):
    """Raise ValueError unless key is a setting."""
    if key in settings:
        return
    hint = ""
    ours = NANOGPT.get(key)
    near = difflib.get_close_matches(key, settings, n=1)
    if ours and set(ours) <= settings.keys():
        hint = f"; nanoGPT's {key} is {' and '.join(map(repr, ours))} here"
    elif ours == ():
        hint = f"; there is no {key} here"
    elif near:
        hint = f"; the nearest is {near[0]!r}"
    if where.endswith(".py"):
        hint += "; a config's own variables begin with _"
    raise ValueError(f"{where}: unknown setting {key!r}{hint} (--help lists all)")


def _checked(key, value, settings, where):
    """value for a setting, of its default's type; a command line's text is a Python literal."""
    _check_known(key, settings, where)
    kind = type(settings[key])
    if kind not in (str, list) and isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():  # --tokens=25e9
        value = int(value)
    if kind is list and isinstance(value, str):
        value = settings[key] + [value]
    if type(value) is not kind:
        raise ValueError(f"{where}: {key}={value!r} must be {kind.__name__}, as {settings[key]!r} "
                         "is")
    if kind is str and key.endswith(("_dir", "_file", "ckpt")):
        value = os.path.expanduser(value)  # the shell leaves the ~ of --out_dir=~/x alone
    return value


def _read_config(path, settings):
    """The settings that a config file assigns, checked, as a dict."""
    where = f"config {path}"
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, glob.glob("configs/*.py"), n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"{where}: no such file{hint}")
    namespace = {}
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:  # it is the user's program, and may raise anything
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
    assigned = {}
    for key, value in namespace.items():
        helper = callable(value) or isinstance(value, types.ModuleType)
        if not key.startswith("_") and (key in settings or not helper):
            assigned[key] = _checked(key, value, settings, where)
    return assigned


def _print_help(namespace, settings, choices):
    print((namespace.get("__doc__") or "").strip(), "\n\nSettings and their defaults:")
    with open(namespace["__file__"], encoding="utf-8") as file:
        assignments = re.findall(r"^(\w+) = .*?  (#.*)", file.read(), re.MULTILINE)
    comments = dict(reversed(assignments))  # the first of a name is the setting's
    for key, value in settings.items():
        words = [f"  --{key}={value!r}", comments.get(key, "")]
        if key in choices:
            words.append("one of " + ", ".join(map(repr, choices[key])))
        print("  ".join(filter(None, words)))


def _check_bounds(settings, choices, at_least, at_most, below):
    """Raise ValueError naming a setting that isn't among its choices or is beyond a bound."""
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise ValueError(f"{key}={settings[key]!r}: must be one of "
                             + ", ".join(map(repr, allowed)))
    checks = (
        ("at most", operator.le, at_most),
        ("below", operator.lt, below),
        ("at least", operator.ge, at_least),
    )
    for words, holds, bounds in checks:
        for key, bound in bounds.items():
            value = settings[key]
            if not holds(value, bound):
                raise ValueError(f"{key}={value}: must be {words} {bound}")
            if not math.isfinite(value):
                raise ValueError(f"{key}={value}: must be finite")


def configure(
    namespace,
    argv=None,
    choices=NO_BOUNDS,
    at_least=NO_BOUNDS,
    at_most=NO_BOUNDS,
    below=NO_BOUNDS,
):
    """
    Apply a config file and --key=value arguments to the settings in namespace (a module's globals).

    argv: the arguments, sys.argv[1:] by default. choices: {setting: its values}. at_least, at_most
    and below: {setting: bound}. Returns the resolved settings as a dict, in their order. Raises
    ValueError naming what is wrong, and where.
    """
    sys.excepthook = one_line
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks
    atexit.register(lambda: _reader_is_gone(sys.stdout))
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = {}
    for key, value in namespace.items():
        named_so = key.islower() and not key.startswith("_")
        if named_so and type(value) in (bool, int, float, str, list):
            settings[key] = value
    defaults = dict(settings)
    config_file = None
    while argv:
        arg = argv.pop(0)
        if arg in ("-h", "--help"):
            _print_help(namespace, defaults, choices)
            sys.exit(0)
        elif arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            if not equals:
                is_switch = type(defaults.get(key)) is bool
                if is_switch and not (argv and argv[0] in ("True", "False")):
                    value = "True"
                elif argv and not argv[0].startswith("--"):
                    value = argv.pop(0)
                else:
                    _check_known(key, defaults, "command line")
                    raise ValueError(f"--{key} needs a value")
            settings[key] = _checked(key, value, settings, "command line")
        elif arg.endswith(".py"):
            if config_file:
                raise ValueError(f"command line: two config files, {config_file} and {arg}: give "
                                 "one, and --key=value for what differs")
            config_file = arg
            settings.update(_read_config(config_file, defaults))
        else:
            raise ValueError(f"command line: {arg!r} is neither a config file (.py) nor "
                             "--key=value")
    _check_bounds(settings, choices, at_least, at_most, below)
    namespace.update(settings)
    return settings
