"""
A run's model card: what its checkpoint, config.json, log.csv and evals.json say, as Markdown.

export.py --export_format=hf writes it as the folder's README.md. What no file says is called "not
measured" or "not recorded".
"""
import csv
import json
import os
import re
import shlex

from data import read_meta

MISSING = "not measured"
UNKNOWN = "not recorded"
FAMILY = "https://huggingface.co/markhenry/cayley-small-2L-mlp_in-20B"
PAPER = "https://arxiv.org/abs/2607.20652"
FINEWEB = "HuggingFaceFW/fineweb-edu"
HEAD = """---
library_name: transformers
pipeline_tag: text-generation
{front_matter}
---

# {name}

{what}

It is of the CayleySAE GPT project, as is [the published family]({family}).
The idea is of "Scaling Interpretable Transformers with Parity Bottleneck Layers",
[arXiv 2607.20652]({paper}).
"""
DENSE = "A GPT with a dense MLP input: the twin of the GPTs whose MLPs read a sparse code."
SPARSE = """A GPT that is interpretable by construction: in every block the MLP reads the residual
stream only through a sparse code (RMSNorm -> CayleySAE -> MLP). {active} of {features:,} features
are active for a token in a layer; their atoms are parity functions without weights."""
LOAD = """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
    prompt = tokenizer.eos_token + "Once upon a time"    # training began each document so
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(ids, max_new_tokens={new_tokens})[0]))

The tokenizer doesn't add end of text itself.
Tested with transformers {tested}, as config.json says.
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
TUNE = """Trainer never calls the layers' update_stats(), so that the statistics which standardise
the scores stay as training left them. To let them follow the new text, give Trainer this callback:

    from transformers import TrainerCallback
    class UpdateStatistics(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **others):
            [sae.update_stats() for sae in model.saes()]
"""
PADDED = """
`{padding}` is padding: no text has its id, so a collator that leaves padding out of the labels
keeps the end of each document in them.
"""
UNPADDED = """
Padding is end of text, since every id of the vocabulary is a token: a collator that leaves padding
out of the labels leaves out the end of each document too, and the model forgets how to end one. Set
the labels of end of text yourself.
"""
LIMITS = """
- It continues text as its corpus does, with that corpus' errors and biases. It was neither tuned to
  follow instructions nor tried for safety.
- Prompt and continuation have at most {block_size} tokens: generate() raises an error beyond.
- A batch's rows of different length are padded on the left, and read one length after the other:
  exactly as each would be alone, and as slowly. Masks with gaps, attention outputs and positions
  other than the tokens' order are refused.
"""
SPARSE_LIMITS = """- An edit changes an MLP's input by exactly its feature's atom. What a feature
  means is for you to find out.
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


def without_paths(value):
    """
    A JSON value that names no directory of the machine it is from.

    Of absolute paths, alone, in a list or behind --key=, their last names are left, and of
    working_directory nothing.
    """
    if isinstance(value, dict):
        kept = {key: without_paths(v) for key, v in value.items()}
        kept.pop("working_directory", None)
        return kept
    if isinstance(value, list):
        return [without_paths(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(?<![^=,])[/~][^,]*", lambda path: os.path.basename(path[0]), value)
    return value


def read_corpus(directories):
    """
    What prepared data are made of, the hub's names of their data sets, and their language.

    directories: their names, with commas. By their meta.json; (None, [], "") where one isn't on
    this machine. The language of a user's own files isn't known: "".
    """
    texts, datasets, language = [], [], "en"
    for directory in directories.split(","):
        try:
            meta = read_meta(directory)
        except ValueError:
            return None, [], ""
        source = meta.get("source")
        if source == "fineweb-edu":
            texts.append(f"[FineWeb-Edu](https://huggingface.co/datasets/{FINEWEB})")
            datasets.append(FINEWEB)
        elif source == "python":
            texts.append("the text that every Python ships")
        else:
            names = sorted({os.path.basename(name) for name in meta.get("files", {})})
            more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
            texts.append(", ".join(names[:3]) + more)
            language = ""
    return "; ".join(dict.fromkeys(texts)), sorted(set(datasets)), language


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

def val_loss(checkpoint, rows, scores):
    """The val loss, and of what it is: of evals.json if that has one, else of training."""
    config = checkpoint["config"]
    val = scores.get("val") or {}
    if val.get("loss") is not None:
        windows = shown(val["windows"]) if "windows" in val else "an unrecorded number of"
        return with_error(val, "loss"), (
            f"{windows} windows of {shown(config['block_size'])} tokens of the val split, by "
            "tools/evals.py"
        )
    loss = dict(column(rows, "val_loss")).get(checkpoint.get("iter"))
    n_tokens = config.get("eval_iters", 0) * config["batch_size"] * config["block_size"]
    return shown(loss), f"{shown(n_tokens)} tokens of the val split, in training"


def headline(checkpoint, run, rows, scores, facts):
    config = checkpoint["config"]
    it = checkpoint.get("iter")
    tokens_per_iter = config["batch_size"] * config["gradient_accumulation_steps"]
    tokens_per_iter *= config["block_size"]
    before = [row for row in rows if it is not None and int(row["iter"]) < it]
    loss, of_what = val_loss(checkpoint, rows, scores)
    return table(("", ""), [
        ("val loss, nats a token", loss),
        ("that is the mean of", of_what if loss != MISSING else MISSING),
        ("iteration of these weights", f"{shown(it)} of {shown(config['max_iters'])}"),
        ("tokens", shown(it * tokens_per_iter if it is not None else None)),
        ("tokens an iteration", shown(tokens_per_iter)),
        ("corpus", facts["corpus"] or UNKNOWN),
        ("language", facts["language"] or UNKNOWN),
        ("licence of the weights", facts["license"] or UNKNOWN),
        ("wall clock, evaluations aside", shown_time(training_seconds(before, tokens_per_iter))),
        ("hardware", shown(run.get("hardware"))),
    ])


def positions(model):
    """How the model knows where a token is, by its parameters."""
    if hasattr(model, "wpe"):
        return f"learned, {shown(model.wpe.num_embeddings)} of them"
    return "no parameters of their own: see the modeling file"


def backbone(model, config):
    args = model.config
    tokenizer = f"{config['tokenizer']}, {shown(config.get('tokenizer_vocab_size'))} tokens"
    tied = model.lm_head.weight is model.wte.weight
    return table(("", ""), [
        ("layers, width, heads", f"{args.n_layer}, {args.n_embd}, {args.n_head}"),
        ("context", shown(args.block_size)),
        ("vocabulary", f"{shown(args.vocab_size)} ({tokenizer})"),
        ("parameters, positions and SAE biases aside", shown(model.get_num_params())),
        ("attention, MLP, norms", f"causal, GELU 4x, {type(model.ln_f).__name__}"),
        ("positions", positions(model)),
        ("embeddings", "tied" if tied else "not tied"),
    ])


def levels(model):
    args = model.config
    sae = model.saes()[0]
    rows = []
    for i, (n, k, _) in enumerate(sae.levels):
        gated = sae.block_bits[i] < n
        opened = shown(2 ** sae.block_bits[i]) if gated else "all are open"
        rows.append((i, shown(2**n), k, opened))
    switches = ("per_parent_budget", "score_standardize", "forward_standardized")
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
        cells.append(("MLP input's variance explained by the best multiple of the code, mean of "
                      "layers (by the code itself it is less, and can be negative)",
                      shown(explained[-1][1] if explained else None)))
    return table(("", ""), cells)


def evaluations(model, scores):
    """evals.json's scores but val loss, each with what it is of; see evals.py's docstring."""
    def of(name, key="items"):
        return shown((scores.get(name) or {}).get(key))

    texts = f"{of('text', 'texts')} texts, {of('text', 'tokens')} tokens"
    cells = [
        ("text, perplexity a token", of("text", "perplexity"), texts),
        ("text, word perplexity", of("text", "word_perplexity"), texts),
        ("HellaSwag, acc_norm", with_error(scores.get("hellaswag")), of("hellaswag") + " items"),
        ("LAMBADA, accuracy", with_error(scores.get("lambada")), of("lambada") + " items"),
        ("LAMBADA, perplexity", of("lambada", "perplexity"), of("lambada") + " items"),
    ]
    windows = of("codes", "windows") + " windows"
    layers = (scores.get("codes") or {}).get("layers", [])
    for layer in range(len(model.saes())):
        row = layers[layer] if layer < len(layers) else {}
        difference = with_error(row, "zero_minus_loss", "zero_minus_loss_error")
        name = f"layer {layer}: loss with its MLP reading zero, minus loss"
        cells.append((name, difference, windows))
    rows = [(name, value, "" if value == MISSING else of_what) for name, value, of_what in cells]
    return table(("", "score +- standard error", "of"), rows)


def recipe(config):
    """All settings of the run but the places of its files."""
    places = ("out_dir", "data_dir", "working_directory")
    settings = without_paths(config)
    rows = [(key, f"`{value!r}`") for key, value in settings.items() if key not in places]
    return table(("setting", "value"), rows)


def front_matter(model, facts):
    """The lines of the card's head that the hub reads."""
    tags = "cayley-gpt, interpretability, sparse-autoencoder" if model.saes() else "cayley-gpt"
    lines = [f"tags: [{tags}]"]
    if facts["license"]:
        lines.append(f"license: {facts['license']}")
    if facts["language"]:
        lines.append(f"language: [{facts['language']}]")
    if facts["datasets"]:
        lines.append(f"datasets: [{', '.join(facts['datasets'])}]")
    return "\n".join(lines)


def model_card(name, model, checkpoint, run, rows, scores, facts):
    """
    The card as Markdown.

    checkpoint: of checkpoint.load_checkpoint; run, rows, scores: of read_run. facts: a dict of
    corpus, datasets, license and language, empty where they aren't known; padding, the padding
    token's text, None where that is end of text; tested, releases of transformers.
    """
    config = checkpoint["config"]
    saes = model.saes()
    block_size = model.config.block_size
    what, limits = DENSE, LIMITS.format(block_size=shown(block_size))
    if saes:
        limits += SPARSE_LIMITS
        what = SPARSE.format(
            active=sum(level.k for level in saes[0].levels),
            features=sum(2**level.n for level in saes[0].levels),
        )
    head = front_matter(model, facts)
    command = shlex.join(without_paths(run["command"])) if run.get("command") else UNKNOWN
    versions = ", ".join(f"{key} {value}" for key, value in run.get("versions", {}).items())
    corners = schedule_corners(rows)
    parts = [HEAD.format(front_matter=head, name=name, what=what, family=FAMILY, paper=PAPER)]
    parts.append(headline(checkpoint, run, rows, scores, facts))
    parts += ["## How to load it", LOAD.format(
        name=name, tested=" and ".join(facts["tested"]), new_tokens=max(1, min(50, block_size - 20))
    )]
    if saes:
        where = {"layer": len(saes) // 2, "level": len(saes[0].levels) - 1}
        parts += ["## How to steer it", STEER.format(**where)]
        parts += ["## How to read it", READ.format(**where)]
    padding = facts["padding"]
    parts += ["## How to train it further", PADDED.format(padding=padding) if padding else UNPADDED]
    if saes:
        parts.append(TUNE)
    parts += ["## Limitations", limits, "## Backbone\n", backbone(model, config)]
    if saes:
        parts += ["## Levels of every layer\n", levels(model)]
    parts += ["## Health\n", health(model, rows), "## Evaluations\n", evaluations(model, scores)]
    parts += ["## Recipe\n", recipe(config)]
    parts.append("Learning rates where they bend, as logged:\n")
    bends = table(("iteration", "muon_lr", "adamw_lr"), corners) if corners else f"{MISSING}\n"
    parts += [bends, "The command:\n", f"    {command}\n"]
    commit = run.get("commit") or UNKNOWN
    parts.append(f"Versions: {versions or UNKNOWN}; commit {commit}.\n")
    parts += ["## Files\n", table(("file", "what it is"), FILES.items())]
    return "\n".join(parts)
