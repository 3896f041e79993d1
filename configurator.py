"""
Overrides a script's globals by a config file and then by --key=value, checked: used by every script here.

    config = configure(globals())     # at the top of a script, after its settings

A setting is a global of plain type (bool, int, float, str) in lower case, or a list of strings, to which every
--key=value adds one. A config file is a Python file of plain assignments to settings. On the command line
'--key=value', '--key value', and '--key' alone for a bool; '-' and '_' are the same in keys. Mistakes end the script
with one line that names them; --help lists the settings.
"""
import ast
import difflib
import os
import sys


def fail(message):
    """End the script with one line on standard error and status 1."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(1)


def run_main(main):
    """Run a script's main(): what it or a library raises about its input ends the script with one line."""
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)


def _checked(key, value, settings, where):
    """value for a setting, of the type of its default; text from a command line is read as a Python literal."""
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)
        fail(f"{where}: unknown setting {key!r}; the nearest is {nearest[0]!r} (--help lists all)")
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


def configure(namespace, argv=None):
    """
    Apply a config file and --key=value arguments to the settings in namespace (a module's globals()).

    argv: the arguments, sys.argv[1:] by default. Returns the resolved settings as a dict, in their order.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = {key: value for key, value in namespace.items()
                if not key.startswith("_") and key.islower() and type(value) in (bool, int, float, str, list)}
    defaults, files = dict(settings), 0
    while argv:
        arg = argv.pop(0)
        if arg in ("-h", "--help"):
            print((namespace.get("__doc__") or "").strip(), "\n\nSettings and their defaults:")
            print("\n".join(f"  --{key}={value!r}" for key, value in defaults.items()))
            sys.exit(0)
        elif arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            key = key.replace("-", "_")
            if not equals and type(defaults.get(key)) is bool and not (argv and argv[0] in ("True", "False")):
                value = "True"
            elif not equals:
                value = argv.pop(0) if argv and not argv[0].startswith("--") else fail(f"--{key} needs a value")
            settings[key] = _checked(key, value, settings, "command line")
        elif arg.endswith(".py") and not files:
            files, assigned = 1, {}
            try:
                with open(arg, encoding="utf-8") as file:
                    exec(compile(file.read(), arg, "exec"), assigned)
            except (OSError, SyntaxError, NameError, TypeError, ValueError) as error:
                fail(f"config {arg}: {error}")
            for key, value in assigned.items():
                if not key.startswith("__"):
                    settings[key] = _checked(key, value, defaults, f"config {arg}")
        else:
            fail(f"command line: {arg!r} is neither one config file (.py) nor --key=value")
    namespace.update(settings)
    return settings
