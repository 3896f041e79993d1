"""
Circuits of features: how few nodes carry what a model does on a task, or makes of a prompt.

    python -m tools.circuits --ckpt=ckpt.pt --task=quote
    python -m tools.circuits --ckpt=a.pt,b.pt --dense=dense.pt --saes=saes.pt --task=quote,bracket
    python -m tools.circuits --ckpt=ckpt.pt --prompt="f(a" --answer=")" --patch="f[a" --wrong="]"

A task (those of tasks.py; "all") prints a table and writes circuits.json, .csv and .svg to out_dir;
a prompt writes circuit.json, a graph that circuit-tracer's and Neuronpedia's viewer reads, and
circuit.html, the same as a page of its own (see circuit_graph.py).

Nodes are (layer, position, feature) at the input of an MLP: a CayleySAE's features; of the dense
twin its coordinates, a TopK SAE's features and, a node per layer and position, its error; or, at
the second matrix's input, the twin's neurons. Attention is not among them and runs freely.

Protocol: sparse feature circuits, Marks et al., arXiv 2403.19647. With M all nodes, C some, and
m(C) the mean over contexts of the metric when every other node is held at its ablated value and
those of C are computed anew from what the layers before them give:

    metric        logit(answer) - logit(wrong) after the clean prompt; log p(answer) if no --wrong
    faithfulness  (m(C) - m(none)) / (m(M) - m(none)): above 1 where the nodes left out, together,
                  work against the answer; below 0 where those of C do
    completeness  (m(M \\ C) - m(none)) / (m(M) - m(none)), the complement's faithfulness: 0 is best
    score         integrated gradients along the line from the layer's clean values to its ablated
                  ones, all other layers clean: (clean - ablated) times the mean of dm/dvalue at
                  0, 1/10, ..., 9/10 of the way. The n nodes of largest |score| in each context
                  are C.

--ablation: "patch" holds a node at its value in the patched prompt at the same position, "zero" at
0, "mean" at the feature's mean over the patched prompts of the contexts for choice.

CPR and CMD: MIB, arXiv 2504.13151. With f the faithfulness with a fraction of the nodes, by the
trapezoid rule over fractions 0.001, 0.002, 0.005, ..., 0.5, 1: CPR is the integral of f, CMD that
of |1 - f|. Fractions are of the row's own nodes whose clean and ablated values differ.

Controls, beside every row: "random": nodes drawn among those that differ. "other contexts": a
node's score is |clean - ablated| times the feature's mean score for each unit of that, at this kind
of position (the changed, the last, the others), on the disjoint contexts for choice. "nonsense
task": the metric is the difference of two logits that have nothing to do with it, the same in every
context (turned so that M's is above none's); nodes are chosen and measured by it. "permuted": each
node adds its value's change along another feature's atom to the ablated input; nodes are chosen
with these atoms. "joint - singles": the faithfulness of the 10 best nodes less the sum of theirs
one by one.

Intervals are 95%, from 1,000 resamples of the contexts.
"""
if not __package__:
    raise SystemExit("from the repository's root: python -m tools.circuits")

import functools
import os
import re

import numpy as np
import torch

from checkpoint import load_model, pick_device
from configurator import configure
from data import encode, get_tokenizer, make_directory, progress, write_json, write_text
from tools.attribution import (
    CayleyFeatures,
    Coordinates,
    Neurons,
    SAEFeatures,
    differences,
    held_reads,
    integrated_gradients,
    margin,
    mean_reads,
    node_scores,
    node_sizes,
    ranks,
    reads,
    with_nodes,
    with_permuted,
)
from tools.circuit_graph import Node, make_graph, write_graph
from tools.evals import digest
from tools.report import svg, svg_line, svg_text, write_csv
from tools.runs import run_windows
from tools.splice import read_saes
from tools.tasks import IN_DOCUMENTS, TASKS, Example, as_contexts, make_contexts, tokenized

# settings, see configurator.py
ckpt = "out/ckpt.pt"  # of Cayley models, commas between
dense = ""  # their dense twin
saes = ""  # the twin's SAEs, a file of tools.splice
task = ""  # of tasks.py, commas between; "all"
prompt = ""  # one's own, instead of a task
answer = ""  # how it goes on
patch = ""  # a prompt of as many tokens that goes on otherwise; "": zero ablation
wrong = ""  # how the patched one goes on
ablation = "patch"  # what the nodes outside of a circuit are held at
n_contexts = 32  # to choose on, and as many to test on
context_tokens = 64  # of a context, at most
n_nodes = 50  # of a prompt's graph
site = ""  # of tools.features, an address or directory that a prompt's page links to
data_dir = ""  # "": that of the runs
out_dir = "out/circuits"
batch_size = 8  # contexts in a forward pass
device = "auto"

ABLATIONS = ("patch", "zero", "mean")
SIZES = (1, 3, 10, 30, 100, 300, 1000)  # nodes
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)  # MIB's
N_JOINT = 10
LEAST_ACCURACY = 0.75  # on the clean prompts, for a task to count
RESAMPLES = 1000

# -----------------------------------------------------------------------------
# a row: a dictionary on the contexts of a task


def position_kinds(contexts):
    """One-hot (B, T, 3) of positions: where the prompts differ, the last one, the others."""
    changed = contexts.clean != contexts.patch
    last = torch.zeros_like(changed).scatter(1, contexts.last[:, None], True) & ~changed
    return torch.stack([changed, last, ~changed & ~last], -1).float()


def score_rates(dictionary, contexts, means):
    """A feature's score for each unit of its nodes' sizes, by kind of position, (3, L, F + 1)."""
    scores, sizes = 0, 0
    for batch in contexts.batches(batch_size):
        _, clean = reads(dictionary, batch.clean, batch.last)
        held = held_reads(dictionary, batch, clean, ablation, means)
        gradients, = integrated_gradients(dictionary, batch, clean, held, [batch])
        parts = differences(batch, clean, held)
        kinds = position_kinds(batch)
        of_batch = node_scores(dictionary, *parts, gradients)
        scores = scores + torch.einsum("bltf,btk->klf", of_batch, kinds)
        sizes = sizes + torch.einsum("bltf,btk->klf", node_sizes(dictionary, *parts), kinds)
    return scores / sizes.clamp_min(1e-12)


def nonsense_targets(contexts, tokens, at_all, at_none):
    """Contexts with two tokens as answer and wrong, so turned that m(all) is at least m(none)."""
    one, other = (torch.full_like(contexts.answer, token) for token in tokens)
    target = contexts._replace(answer=one, wrong=other)
    falls = margin(at_all, target) < margin(at_none, target)
    return target._replace(answer=torch.where(falls, other, one),
                           wrong=torch.where(falls, one, other))


def rankings(dictionary, contexts, parts, gradients, rates, permutations, generator):
    """
    Ranks of the nodes (B, L, T, F + 1) by score and by the controls' scores.

    parts: differences; gradients: of the metric and of the nonsense task's; rates: score_rates.
    """
    sizes = node_sizes(dictionary, *parts)
    drawn = torch.rand(sizes.shape, generator=generator).to(sizes.device)
    rates = torch.einsum("klf,btk->bltf", rates, position_kinds(contexts))
    scores = {
        "best": node_scores(dictionary, *parts, gradients[0]),
        "random": drawn * (sizes > 0),
        "other contexts": rates * sizes,
        "nonsense task": node_scores(dictionary, *parts, gradients[1]),
        "permuted": node_scores(dictionary, *parts, gradients[0], permutations),
    }
    return {name: ranks(of_name) for name, of_name in scores.items()}


def measure_batch(dictionary, contexts, means, rates, tokens, permutations, generator):
    """m of every circuit of some contexts: {name: (B,) or (B, circuits)}."""
    at_all, clean = reads(dictionary, contexts.clean, contexts.last)
    held = held_reads(dictionary, contexts, clean, ablation, means)
    parts = differences(contexts, clean, held)
    differs = node_sizes(dictionary, *parts) > 0
    n_nodes = differs.flatten(1).sum(1)
    run = functools.partial(with_nodes, dictionary, contexts, held)
    permuted = functools.partial(with_permuted, dictionary, contexts, held, permutations)

    def m_of(circuits, run=run, target=contexts):
        return torch.stack([margin(run(keep), target) for keep in circuits], 1)

    at_none = run(torch.zeros_like(differs))
    nonsense = nonsense_targets(contexts, tokens, at_all, at_none)
    gradients = integrated_gradients(dictionary, contexts, clean, held, [contexts, nonsense])
    by = rankings(dictionary, contexts, parts, gradients, rates, permutations, generator)
    best = by["best"]
    fractions = [(fraction * n_nodes).long().view(-1, 1, 1, 1) for fraction in FRACTIONS]
    return {
        "nodes": n_nodes,
        "all": margin(at_all, contexts),
        "none": margin(at_none, contexts),
        "every node": margin(run(torch.ones_like(differs)), contexts),
        "best": m_of(best < n for n in SIZES),
        "complement": m_of(best >= n for n in SIZES),
        "fractions": m_of(best < n for n in fractions),
        "joint": margin(run(best < N_JOINT), contexts),
        "singles": m_of(best == i for i in range(N_JOINT)),
        "random": m_of(by["random"] < n for n in SIZES),
        "other contexts": m_of(by["other contexts"] < n for n in SIZES),
        "permuted": m_of((by["permuted"] < n for n in SIZES), permuted),
        "nonsense task": m_of((by["nonsense task"] < n for n in SIZES), target=nonsense),
        "nonsense all": margin(at_all, nonsense),
        "nonsense none": margin(at_none, nonsense),
    }


def frequent_tokens(contexts):
    """The two most frequent tokens of the prompts that are nowhere answer or wrong."""
    tokens, counts = contexts.clean.unique(return_counts=True)
    counts[torch.isin(tokens, torch.cat([contexts.answer, contexts.wrong]))] = -1
    return tokens[counts.topk(2).indices].tolist()


def measure(dictionary, choice, test):
    """measure_batch of all contexts of a test set: {name: numpy (N,) or (N, circuits)}."""
    generator = torch.Generator().manual_seed(0)
    means = mean_reads(dictionary, choice.batches(batch_size)) if ablation == "mean" else None
    rates = score_rates(dictionary, choice, means)
    tokens = frequent_tokens(test)
    permutations = [torch.randperm(rates.shape[-1] - 1, generator=generator).to(rates.device)
                    for _ in dictionary.model.blocks]
    results = []
    for batch in progress(list(test.batches(batch_size)), dictionary.name):
        results.append(measure_batch(dictionary, batch, means, rates, tokens, permutations,
                                     generator))
    return {name: torch.cat([result[name] for result in results]).double().cpu().numpy()
            for name in results[0]}


def accuracy(model, contexts):
    """The share of clean prompts after which the answer's logit is above the wrong one's."""
    dictionary = Coordinates("", model)
    right = [margin(reads(dictionary, batch.clean, batch.last)[0], batch) > 0
             for batch in contexts.batches(batch_size)]
    return torch.cat(right).float().mean().item()


# -----------------------------------------------------------------------------
# numbers with intervals


def resamples(n):
    """How often each context counts: once in the first row, drawn in the others, (1 + R, n)."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn]) / n


def with_interval(values):
    """values (1 + R,) or (1 + R, S) -> value, low, high, each a number or a list."""
    low, high = np.percentile(values[1:], [2.5, 97.5], axis=0)
    return {"value": values[0].tolist(), "low": low.tolist(), "high": high.tolist()}


def summary(result):
    """A measure's numbers as JSON: faithfulness of every circuit, CPR, CMD, joint and singles."""
    weights = resamples(len(result["all"]))
    means = {name: weights @ values for name, values in result.items()}  # (1 + R, ...)

    def faithfulness(name, every="all", none="none"):
        base = means[none].reshape(-1, *[1] * (means[name].ndim - 1))
        span = means[every].reshape(base.shape) - base
        return (means[name] - base) / span

    fractions = faithfulness("fractions")
    joint = faithfulness("joint")
    numbers = {
        "nodes": means["nodes"],
        "m(all)": means["all"],
        "m(none)": means["none"],
        "every node": faithfulness("every node"),
        "best": faithfulness("best"),
        "complement": faithfulness("complement"),
        "random": faithfulness("random"),
        "other contexts": faithfulness("other contexts"),
        "nonsense task": faithfulness("nonsense task", "nonsense all", "nonsense none"),
        "permuted": faithfulness("permuted"),
        "fractions": fractions,
        "CPR": np.trapezoid(fractions, FRACTIONS, axis=1),
        "CMD": np.trapezoid(abs(1 - fractions), FRACTIONS, axis=1),
        "joint": joint,
        "joint - singles": joint - faithfulness("singles").sum(1),
    }
    return {name: with_interval(values) for name, values in numbers.items()}


# -----------------------------------------------------------------------------
# output

FAITHFULNESS = ("faithfulness: 0 as without any node, 1 as with all, above 1 where those left out "
                "oppose the answer")
CONTROLS = ("complement", "random", "other contexts", "nonsense task", "permuted")
CSV_COLUMNS = ("task", "row", "number", "nodes", "value", "low", "high")


def short(number):
    """Two digits behind the point."""
    return f"{number:.2f}".replace("0.", ".", 1) if abs(number) < 1 else f"{number:.2f}"


def line(name, cells):
    """A line of the table."""
    return f"{name:<28}" + "".join(f"{cell:>8}" for cell in cells)


def row_lines(row):
    """The lines of a row and of its controls."""
    best, joint = row["best"], row["joint - singles"]
    spread = [(high - low) / 2 for low, high in zip(best["low"], best["high"])]
    areas = [row["CPR"]["value"], row["CMD"]["value"]]
    lines = [line(row["name"], map(short, best["value"] + areas)),
             line("  95% over contexts, +-", map(short, spread))]
    lines += [line(f"  {name}", map(short, row[name]["value"])) for name in CONTROLS]
    joint = " ".join(short(joint[key]) for key in ("value", "low", "high"))
    lines.append(line("  joint - singles, 95%", joint.split()))
    m, of_none, every = (row[key]["value"] for key in ("m(all)", "m(none)", "every node"))
    return [*lines, f"  {row['nodes']['value']:,.0f} nodes; m(all) {m:.2f}, m(none) {of_none:.2f}; "
                    f"every node {short(every)}; accuracy {row['accuracy']:.0%}"]


def table(result):
    """The lines of a task's table, of up to 100 columns."""
    lines = [f"{result['task']}: faithfulness of the best nodes, {ablation} ablation, "
             f"{result['contexts']} contexts", "", line("nodes kept", [*SIZES, "CPR", "CMD"])]
    for row in result["rows"]:
        lines += row_lines(row)
    if result["rows"]:
        lines.append(FAITHFULNESS)
    return lines + [f"left out, below {LEAST_ACCURACY:.0%} accuracy: {name}"
                    for name in result["left_out"]]


def csv_rows(result):
    """A task's numbers as rows of CSV_COLUMNS."""
    rows = []
    for row in result["rows"]:
        for name, number in row.items():
            if not isinstance(number, dict):
                continue
            values = [number[key] for key in ("value", "low", "high")]
            sizes = FRACTIONS if name == "fractions" else SIZES
            if not isinstance(values[0], list):
                sizes, values = [""], [[value] for value in values]
            for size, *cells in zip(sizes, *values):
                cells = [round(cell, 5) for cell in cells]
                rows.append([result["task"], row["name"], name, size, *cells])
    return rows


COLOURS = ("#d60", "#36c", "#0a7", "#a3a", "#777", "#b80", "#c33")
LEFT, TOP, WIDTH, HEIGHT, GAP = 40, 40, 300, 220, 50  # of a panel, in pixels


def panel(result, start, colours):
    """A task's rows, faithfulness with its interval over nodes kept, as SVG from x = start on."""
    def points(shares):
        return [f"{start + WIDTH * i / (len(SIZES) - 1):.1f},{height_of(share):.1f}"
                for i, share in enumerate(shares)]

    parts = [svg_text(start, 18, f"{result['task']}: faithfulness")]
    for share in (0, 0.5, 1):
        y = height_of(share)
        parts += [svg_line(start, y, start + WIDTH, y),
                  svg_text(start - 6, y + 4, str(share), "end")]
    for i, size in enumerate(SIZES):
        x = start + WIDTH * i / (len(SIZES) - 1)
        parts.append(svg_text(x, TOP + HEIGHT + 34, str(size), "middle"))
    for row in result["rows"]:
        best, colour = row["best"], colours[row["name"]]
        outline = " ".join(points(best["high"]) + points(best["low"])[::-1])
        middle = " ".join(points(best["value"]))
        parts += [f'<polygon points="{outline}" fill="{colour}" opacity=".15"/>',
                  f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="2"/>']
    return parts


def height_of(share):
    """Where a faithfulness is in a panel."""
    return TOP + HEIGHT * (1 - min(1.1, max(-0.1, share)))


def chart(results):
    """Faithfulness over nodes kept, a panel for each task, as SVG text, in light and dark."""
    names = list(dict.fromkeys(row["name"] for result in results for row in result["rows"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width = LEFT + len(results) * (WIDTH + GAP)
    parts = []
    for i, result in enumerate(results):
        parts += panel(result, LEFT + i * (WIDTH + GAP), colours)
    for i, (name, colour) in enumerate(colours.items()):
        y = TOP + HEIGHT + 58 + 18 * i
        parts.append(svg_text(LEFT, y, name, colour=colour))
    return svg(width, TOP + HEIGHT + 50 + 18 * len(names), parts)


# -----------------------------------------------------------------------------
# the script


def check_settings():
    """Raise ValueError for settings that make no sense together, before anything is loaded."""
    if bool(task) == bool(prompt):
        raise ValueError("give either --task or --prompt: --task=all are those of tools/tasks.py")
    unknown = [name for name in task_names() if name not in TASKS]
    if unknown:
        raise ValueError(f"task={unknown[0]!r}: the tasks are {', '.join(TASKS)}")
    if task and (answer or patch or wrong or site):
        raise ValueError("--answer, --patch, --wrong and --site belong to --prompt, not to --task")
    if prompt and not answer:
        raise ValueError("--prompt needs --answer, the text that goes on with it")
    if bool(patch) != bool(wrong):
        raise ValueError("--patch and --wrong belong together: another prompt, and how it goes on")
    if prompt and (dense or saes or "," in ckpt):
        raise ValueError("--prompt makes the graph of one Cayley model: --dense, --saes and a "
                         "second --ckpt are for --task")
    if prompt and ablation == "mean":
        raise ValueError("ablation='mean': one prompt has no mean, use --patch and --wrong or zero")
    if saes and not dense:
        raise ValueError(f"saes={saes}: they are of the dense twin, give it as --dense")


def task_names():
    """The tasks that the setting names."""
    if task == "all":
        return list(TASKS)
    return task.split(",") if task else []


def load_frozen(path, target):
    """A checkpoint's GPT without gradients for its weights, and its configuration."""
    model, config = load_model(path, target)
    return model.requires_grad_(False), config


def run_name(path):
    """The name of a checkpoint's directory."""
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    return os.path.basename(os.path.abspath(directory))


def load_rows(target):
    """The dictionaries of the table's rows, and a run's configuration."""
    rows = []
    configs = []
    for path in ckpt.split(","):
        model, config = load_frozen(path, target)
        if not model.saes():
            raise ValueError(f"ckpt={path}: it has no CayleySAE: give the dense twin as --dense")
        rows.append(CayleyFeatures(f"{run_name(path)} {model.config.cayley_levels}", model))
        configs.append(config)
    if dense:
        twin, config = load_frozen(dense, target)
        configs.append(config)
        rows += [Neurons("dense neurons", twin), Coordinates("dense coordinates", twin)]
    for key in ("tokenizer", "block_size"):
        values = {config[key] for config in configs}
        if len(values) > 1:
            raise ValueError(f"the checkpoints differ in {key}: {sorted(values, key=str)}")
    if saes:
        fitted = read_saes(saes, twin, {"model": digest(twin)})
        size = f"{len(fitted[0].W_dec):,}, {fitted[0].k}"
        rows += [SAEFeatures(f"SAE {size}", twin, fitted, keeps_error=True),
                 SAEFeatures(f"SAE {size}, no errors", twin, fitted, keeps_error=False)]
    return rows, configs[0]


def read_documents(config, encoding):
    """The texts of the val split's first shard."""
    windows = run_windows(config, "val", data_dir)
    ids = windows.read(range(windows.ends[0]))  # each starts with the last token of the one before
    ids = np.append(ids[:, :-1].ravel(), ids[-1, -1])
    ends = np.flatnonzero(ids == encoding.eot_token)
    return [encoding.decode(part[part != encoding.eot_token].tolist())
            for part in np.split(ids, ends)]


def run_task(name, rows, documents, encoding, target):
    """A task's result: names and numbers of its rows. Raises ValueError as make_contexts does."""
    contexts = make_contexts(name, documents, encoding, n_contexts, context_tokens)
    choice, test = (side.to(target) for side in contexts)
    result = {"task": name, "contexts": len(test.clean), "chosen on": len(choice.clean),
              "rows": [], "left_out": []}
    accuracies = {}
    for dictionary in rows:
        model = dictionary.model
        if model not in accuracies:
            accuracies[model] = accuracy(model, test)
        if accuracies[model] < LEAST_ACCURACY:
            result["left_out"].append(f"{dictionary.name} ({accuracies[model]:.0%})")
            continue
        numbers = summary(measure(dictionary, choice, test))
        result["rows"].append({"name": dictionary.name, "accuracy": accuracies[model], **numbers})
    return result


def run_tasks(target):
    """Print the tasks' tables; write circuits.json, .csv and .svg."""
    rows, config = load_rows(target)
    make_directory(out_dir)  # what is in its way is told of now
    encoding = get_tokenizer(config["tokenizer"])
    needed = any(TASKS[name] in IN_DOCUMENTS for name in task_names())
    documents = read_documents(config, encoding) if needed else []
    results = []
    for name in task_names():
        try:
            results.append(run_task(name, rows, documents, encoding, target))
        except ValueError as error:
            if len(task_names()) == 1:
                raise
            print(f"left out: {error}\n")
            continue
        print("\n".join(table(results[-1])) + "\n", flush=True)
    settings = {key: globals()[key] for key in ("ablation", "n_contexts", "context_tokens")}
    write_json(os.path.join(out_dir, "circuits.json"), {"settings": settings, "tasks": results})
    rows = [row for result in results for row in csv_rows(result)]
    write_csv(os.path.join(out_dir, "circuits.csv"), CSV_COLUMNS, rows)
    write_text(os.path.join(out_dir, "circuits.svg"), chart(results))


def only_token(name, ids, encoding):
    """The one id in which a setting goes on. Raises ValueError if there are more."""
    if len(ids) != 1:
        raise ValueError(f"{name}={globals()[name]!r}: {len(ids)} tokens, and a circuit is of one: "
                         f"--{name}={encoding.decode(ids[:1])!r} is the first")
    return ids[0]


def prompt_contexts(encoding, block_size):
    """Contexts of the one prompt. Raises ValueError if they can't be made."""
    ids = [encoding.eot_token, *encode(encoding, prompt)]
    if len(ids) > block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens with end of text, more than "
                         f"block_size={block_size}")
    if not wrong:
        answer_id = only_token("answer", encode(encoding, answer), encoding)
        return as_contexts([(ids, ids, answer_id, -1)], ids[0])
    row = tokenized(Example(prompt, patch, answer, wrong), encoding, block_size)
    if row is None:
        raise ValueError("--prompt and --patch must be of as many tokens but not the same, and "
                         "--answer and --wrong begin with different ones after both")
    for name in ("answer", "wrong"):
        whole = [encoding.eot_token, *encode(encoding, prompt + globals()[name])]
        only_token(name, whole[len(row[0]):], encoding)
    return as_contexts([row], ids[0])


def prediction(logits, contexts, n, at_all, at_none, encoding):
    """What a circuit of n nodes predicts, with logits (1, V), for the page."""
    m, of_all, of_none = (margin(row, contexts).item() for row in (logits, at_all, at_none))
    probabilities = logits[0, :encoding.n_vocab].softmax(0)
    top = probabilities.topk(5)
    return {
        "nodes": n,
        "m": m,
        "faithfulness": (m - of_none) / (of_all - of_none),
        "top": [[encoding.decode([i]), p] for i, p in zip(top.indices.tolist(),
                                                          top.values.tolist())],
    }


def run_prompt(target):
    """Write the graph of the prompt's circuit, and its page."""
    (dictionary,), config = load_rows(target)
    make_directory(out_dir)
    encoding = get_tokenizer(config["tokenizer"])
    contexts = prompt_contexts(encoding, config["block_size"]).to(target)
    at_all, clean = reads(dictionary, contexts.clean, contexts.last)
    held = held_reads(dictionary, contexts, clean, ablation if patch else "zero")
    gradients, = integrated_gradients(dictionary, contexts, clean, held, [contexts])
    scores = node_scores(dictionary, *differences(contexts, clean, held), gradients)
    ranked = ranks(scores)
    n = min(n_nodes, int((scores != 0).sum()))
    best = ranked.flatten().argsort()[:n]
    nodes = [Node(*place) for place in zip(*(part.tolist() for part in torch.unravel_index(
        best, scores.shape[1:])))]
    run = functools.partial(with_nodes, dictionary, contexts, held)
    at_none = run(ranked < 0)
    predictions = [prediction(run(ranked < i), contexts, i, at_all, at_none, encoding)
                   for i in range(n + 1)]
    predictions.append(prediction(at_all, contexts, "all", at_all, at_none, encoding))
    probability = at_all.softmax(1)[0, contexts.answer[0]].item()
    slug = re.sub(r"\W+", "-", dictionary.name)
    graph = make_graph(dictionary, contexts, clean, held, nodes, scores.flatten()[best], encoding,
                       probability, slug)
    write_graph(out_dir, graph, predictions, site)
    print(FAITHFULNESS)
    for shown in (*predictions[:-1:10], predictions[-1]):
        token, p = shown["top"][0]
        print(f"{shown['nodes']:>4} nodes: faithfulness {short(shown['faithfulness'])}, m "
              f"{shown['m']:.2f}, next {token!r} ({p:.0%})")
    print(f"open {os.path.join(out_dir, 'circuit.html')}")


def main():
    configure(
        globals(),
        choices={"ablation": ABLATIONS},
        at_least={"n_contexts": 4, "context_tokens": 2, "n_nodes": 1, "batch_size": 1},
    )
    check_settings()
    target = pick_device(device)
    if prompt:
        run_prompt(target)
    else:
        run_tasks(target)


if __name__ == "__main__":
    main()
