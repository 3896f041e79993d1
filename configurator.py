"""
Overrides a script's globals by a config file and then by --key=value, checked. Every script here
uses it.

    config = configure(globals())     # at the top of a script, after its settings

A setting is a global of plain type (bool, int, float, str) in lower case, or a list of strings, to
which every --key=value adds one. A config file is a Python file of plain assignments to settings.
On the command line '--key=value', '--key value', and '--key' alone for a bool; '-' and '_' are the
same in keys. Mistakes end the script with one line that names them; --help lists the settings.
"""
import ast
import difflib
import json
import os
import sys

RENAMED = {  # settings that once had other names
    "compile": "torch_compile",
    "data": "data_dir",
    "format": "export_format",
    "json": "json_file",
    "model": "model_name",
    "out": "out_dir",
}


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


def fail(message):
    """End the script with one line on standard error and status 1."""
    line = f"{os.path.basename(sys.argv[0])}: {message}"
    if _tell_torchrun(line):
        sys.stdout.flush()
        os._exit(1)  # not by Python's own end, where gloo's threads may hang
    print(line, file=sys.stderr)
    sys.exit(1)


def run_main(main):
    """Run a script's main(): what it or a library raises of its input ends it with one line."""
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted")


def _check_known(key, settings, where):
    """End the script unless key is a setting."""
    if key in settings:
        return
    new_name = RENAMED.get(key)
    if new_name in settings:
        fail(f"{where}: the setting {key!r} is called {new_name!r} now")
    nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)
    fail(f"{where}: unknown setting {key!r}; the nearest is {nearest[0]!r} (--help lists all)")


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
        fail(f"{where}: {key}={value!r} must be {kind.__name__}, as {settings[key]!r} is")
    return value


def _read_config(path, settings):
    """The settings that a config file assigns, checked, as a dict."""
    where = f"config {path}"
    namespace = {}
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:  # it is the user's program, and may raise anything
        fail(f"{where}: {type(error).__name__}: {error}")
    assigned = {}
    for key, value in namespace.items():
        if not key.startswith("__"):
            assigned[key] = _checked(key, value, settings, where)
    return assigned


def _print_help(namespace, defaults):
    print((namespace.get("__doc__") or "").strip(), "\n\nSettings and their defaults:")
    for key, value in defaults.items():
        print(f"  --{key}={value!r}")


def configure(namespace, argv=None):
    """
    Apply a config file and --key=value arguments to the settings in namespace (a module's globals).

    argv: the arguments, sys.argv[1:] by default. Returns the resolved settings as a dict, in their
    order.
    """
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
            _print_help(namespace, defaults)
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
                    fail(f"--{key} needs a value")
            settings[key] = _checked(key, value, settings, "command line")
        elif arg.endswith(".py") and config_file is None:
            config_file = arg
            settings.update(_read_config(config_file, defaults))
        else:
            fail(f"command line: {arg!r} is neither one config file (.py) nor --key=value")
    namespace.update(settings)
    return settings
