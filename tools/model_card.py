"""
A run's model card: what its checkpoint, config.json, log.csv and evals.json say, as Markdown.

export.py --export_format=hf writes it as the folder's README.md. What no file says is called "not
measured".
"""
import csv
import json
import os
import shlex

MISSING = "not measured"
HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{what}
"""
DENSE = "A GPT with a dense MLP input: the twin of the GPTs whose MLPs read a sparse code."
SPARSE = """A GPT that is interpretable by construction: in every block the MLP reads the residual
stream only through a sparse code (RMSNorm -> CayleySAE -> MLP). {active} of {features:,} features
are active for a token in a layer; their atoms are parity functions without weights."""
LOAD = """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))

Training began every document with the end-of-text token, which the tokenizer doesn't add. Prompt
and continuation have at most {block_size} tokens.
"""
STEER = """
    model.saes()[{layer}].edits.append(({level}, 3, 1, 8.0))    # feature 3: add 8 to its code
    model.saes()[{layer}].edits.append(({level}, 5, 0, 0.0))    # feature 5: ablate it
    model.saes()[{layer}].edits.clear()

An edit is (level, feature, keep, add): at every token a code c becomes keep * c + add.
"""
READ = """
    logits, codes = model.run_with_codes(ids)
    codes[{layer}][{level}].ids, codes[{layer}][{level}].values    # (B, T, k) each
    model.saes()[{layer}].atoms({level}, [3, 5])    # unit vectors of the residual stream, (2, d)
"""
FILES = {
    "model.safetensors": "the weights",
    "modeling_cayley_gpt.py": "the model and its layer, in one file",
    "config.json, generation_config.json": "the model's settings, and the defaults of generate()",
    "tokenizer.json, tokenizer_config.json": "the tokenizer",
    "training.json": "every setting of the training run, its command and versions",
}


def shown(value, digits=4):
    """A number in Markdown, or what stands for one that no file has."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def with_error(scores, key="accuracy", error_key="standard_error"):
    """A score with its standard error; scores may be None."""
    if not scores or scores.get(key) is None:
        return MISSING
    error = scores.get(error_key)
    return shown(scores[key]) + (f" +- {error:.2g}" if error is not None else "")


def table(header, rows):
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append(f"| {' | '.join(str(cell) for cell in row)} |")
    return "\n".join(lines) + "\n"


# -----------------------------------------------------------------------------
# the run's files

def read_run(directory):
    """
    A run's config.json, rows of log.csv (dicts of text) and evals.json; empty where there is none.

    Raises ValueError naming a file that can't be read.
    """
    found = []
    for name, read, empty in (
        ("config.json", json.load, {}),
        ("log.csv", lambda file: list(csv.DictReader(file)), []),
        ("evals.json", json.load, {}),
    ):
        path = os.path.join(directory, name)
        try:
            with open(path, encoding="utf-8", newline="") as file:
                content = read(file)
        except FileNotFoundError:
            content = empty
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} can't be read: {error}") from None
        if type(content) is not type(empty):
            raise ValueError(f"{path}: {str(content)[:40]} is not what this project writes")
        found.append(content)
    return found


def column(rows, key):
    """(iteration, number) of the rows that have a number in a column."""
    return [(int(row["iter"]), float(row[key])) for row in rows if row.get(key)]


def training_seconds(rows, tokens_per_iter):
    """Seconds of training that log.csv's throughput adds up to; None where it has none."""
    seconds = 0.0
    before = -1
    for it, tok_per_s in column(rows, "tok_per_s"):
        seconds += (it - before) * tokens_per_iter / tok_per_s
        before = it
    return seconds or None


def shown_time(seconds):
    if seconds is None:
        return MISSING
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def schedule_corners(rows):
    """Rows of (iteration, muon_lr, adamw_lr): where the logged learning rate bends."""
    rates = dict(column(rows, "muon_lr"))
    others = dict(column(rows, "adamw_lr"))
    if not rates:
        return []
    highest = max(rates.values())
    flat = [it for it, rate in rates.items() if rate == highest]
    corners = sorted({min(rates), flat[0], flat[-1], max(rates)})
    return [(it, shown(rates[it]), shown(others.get(it))) for it in corners]


# -----------------------------------------------------------------------------
# the sections

def headline(checkpoint, run, rows):
    config = checkpoint["config"]
    it = checkpoint.get("iter")
    at = dict(column(rows, "val_loss"))
    tokens_per_iter = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens_per_iter *= config["block_size"]
    before = [row for row in rows if it is not None and int(row["iter"]) < it]
    return table(("", ""), [
        ("val loss, nats a token", shown(at.get(it))),
        ("iteration of these weights", f"{shown(it)} of {shown(config['max_iters'])}"),
        ("tokens", shown(it * tokens_per_iter if it is not None else None)),
        ("tokens an iteration", shown(tokens_per_iter)),
        ("data", config["data_dir"]),
        ("wall clock, evaluations aside", shown_time(training_seconds(before, tokens_per_iter))),
        ("hardware", shown(run.get("hardware"))),
    ])


def backbone(model, config):
    args = model.config
    tokenizer = f"{config['tokenizer']}, {shown(config.get('tokenizer_vocab_size'))} tokens"
    return table(("", ""), [
        ("layers, width, heads", f"{args.n_layer}, {args.n_embd}, {args.n_head}"),
        ("context", shown(args.block_size)),
        ("vocabulary", f"{shown(args.vocab_size)} ({tokenizer})"),
        ("parameters, positions and SAE biases aside", shown(model.get_num_params())),
        ("attention, MLP, norms, positions", "causal, GELU 4x, RMSNorm, learned"),
        ("embeddings", "tied"),
    ])


def levels(model):
    args = model.config
    sae = model.saes()[0]
    rows = []
    for i, (n, k, _) in enumerate(sae.levels):
        gated = sae.block_bits[i] < n
        opened = shown(2 ** sae.block_bits[i]) if gated else "all are open"
        rows.append((i, shown(2**n), k, opened))
    switches = (
        "per_parent_budget", "score_standardize", "forward_standardized", "dense_gradient",
        "near_misses",
    )
    return table(("level", "features", "active", "opened by an active parent"), rows) + (
        "\n" + ", ".join(f"{name}={getattr(args, name)}" for name in switches) + "\n")


def health(model, rows):
    """Of the whole run, and of its last evaluation."""
    val = [loss for _, loss in column(rows, "val_loss")]
    falls = sum(after < before for before, after in zip(val, val[1:]))
    throughput = sorted(rate for _, rate in column(rows, "tok_per_s"))
    memory = [size for _, size in column(rows, "peak_memory_gb")]
    median = throughput[len(throughput) // 2] if throughput else None
    fell = MISSING
    if len(val) > 1:
        fell = f"{falls} of {len(val) - 1} times"
    cells = [
        ("throughput, median, tokens/s", f"{median:,.0f}" if median else MISSING),
        ("peak memory, GB", shown(max(memory) if memory else None)),
        ("val loss fell from one evaluation to the next", fell),
    ]
    if model.saes():
        for level, (n, _, _) in enumerate(model.saes()[0].levels):
            total = len(model.saes()) * 2**n
            dead = column(rows, f"dead_{level}")
            last = f"{dead[-1][1]:,.0f} of {total:,}" if dead else MISSING
            cells.append((f"level {level}: dead between the last two evaluations", last))
        explained = column(rows, "explained")
        cells.append(("MLP input's variance explained by the code, mean of layers",
                      shown(explained[-1][1] if explained else None)))
    return table(("", ""), cells)


def evaluations(model, scores):
    """evals.json's scores; the conventions are in evals.py's docstring."""
    def of(name, key="items"):
        return shown((scores.get(name) or {}).get(key))

    cells = [
        ("val loss", with_error(scores.get("val"), "loss"), ""),
        ("text, perplexity a token", of("text", "perplexity"), of("text", "texts") + " texts"),
        ("text, word perplexity", of("text", "word_perplexity"), of("text", "texts") + " texts"),
        ("HellaSwag, acc_norm", with_error(scores.get("hellaswag")), of("hellaswag") + " items"),
        ("LAMBADA, accuracy", with_error(scores.get("lambada")), of("lambada") + " items"),
        ("LAMBADA, perplexity", of("lambada", "perplexity"), of("lambada") + " items"),
    ]
    layers = (scores.get("codes") or {}).get("layers", [])
    for layer in range(len(model.saes())):
        row = layers[layer] if layer < len(layers) else {}
        difference = with_error(row, "zero_minus_loss", "zero_minus_loss_error")
        cells.append((f"layer {layer}: loss with its MLP reading zero, minus loss", difference, ""))
    rows = [(name, value, "" if value == MISSING else of_what) for name, value, of_what in cells]
    return table(("", "score +- standard error", ""), rows)


def recipe(config):
    """All settings of the run that are neither the model's nor about files."""
    return table(("setting", "value"), [(key, f"`{value!r}`") for key, value in config.items()])


def model_card(name, model, checkpoint, run, rows, scores):
    """
    The card as Markdown.

    checkpoint: of model.load_checkpoint; run, rows, scores: of read_run.
    """
    config = checkpoint["config"]
    saes = model.saes()
    what, tags = DENSE, "cayley-gpt"
    if saes:
        tags += ", interpretability, sparse-autoencoder"
        what = SPARSE.format(
            active=sum(level.k for level in saes[0].levels),
            features=sum(2**level.n for level in saes[0].levels),
        )
    command = shlex.join(run["command"]) if run.get("command") else MISSING
    versions = ", ".join(f"{key} {value}" for key, value in run.get("versions", {}).items())
    corners = schedule_corners(rows)
    parts = [HEAD.format(name=name, what=what, tags=tags), headline(checkpoint, run, rows)]
    parts += ["## Backbone\n", backbone(model, config)]
    if saes:
        parts += ["## Levels of every layer\n", levels(model)]
    parts += ["## Health\n", health(model, rows), "## Evaluations\n", evaluations(model, scores)]
    parts += ["## How to load it", LOAD.format(name=name, block_size=config["block_size"])]
    if saes:
        where = {"layer": len(saes) // 2, "level": len(saes[0].levels) - 1}
        parts += ["## How to steer it", STEER.format(**where)]
        parts += ["## How to read it", READ.format(**where)]
    parts += ["## Recipe\n", recipe(config)]
    parts.append("Learning rates where they bend, as logged:\n")
    bends = table(("iteration", "muon_lr", "adamw_lr"), corners) if corners else f"{MISSING}\n"
    parts += [bends, "The command:\n", f"    {command}\n"]
    commit = run.get("commit") or "not recorded"
    parts.append(f"Versions: {versions or 'not recorded'}; commit {commit}.\n")
    parts += ["## Files\n", table(("file", "what it is"), FILES.items())]
    return "\n".join(parts)
