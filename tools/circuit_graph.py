"""
The graph of a prompt's circuit, for circuits.py: its nodes, the direct effects between them, a JSON
file in the format of circuit-tracer (its graph_models.py; Neuronpedia's graph-schema.json), and a
page of its own.

Direct effects are linear: the prompt's norms and attention patterns are frozen. A node writes w,
the change of its MLP's output between the node's ablated and its clean value; an embedding writes
its difference to the patched prompt's, or itself without one. Another node reads q . w of it, q
being the gradient of its code, as if it were active, by the residual stream, and the answer's node
with that of the metric. An edge sums the paths from one to the other that pass no third MLP and at
most one attention layer: the residual stream ("residual") and heads ("layer.head"). Its weight is
in units of the target's code, or of the metric.
"""
import json
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from data import write_json, write_text

N_EDGES = 12  # into a node, the largest
N_PATHS = 4  # that an edge names
N_RAISED = 3  # tokens that a caption names
LIKELY = 1e-4  # the mean probability over the prompt of a token that a caption may name


class Node(NamedTuple):
    layer: int  # -1: an embedding; n_layer + 1, as in circuit-tracer: the answer
    position: int
    feature: int  # among those of all levels; a token of an embedding or an answer


class Trace(NamedTuple):
    """What is frozen of a forward of one prompt of T tokens."""

    heads: list  # per layer the scale (T, d) of its first norm
    mlps: list  # per layer the scale (T, d) of its second norm
    last: Tensor  # the scale (T, d) of the final norm
    patterns: list  # per layer (H, T, T), of queries and keys
    likely: Tensor  # the mean probabilities (V,) of the next tokens


def attention_pattern(attn, x):
    """Attention probabilities (H, T, T) of normalised inputs x (T, d)."""
    T, C = x.shape
    q, k, _ = attn.c_attn(x).view(T, 3, attn.n_head, -1).permute(1, 2, 0, 3)  # (H, T, D)
    scores = q @ k.transpose(1, 2) / math.sqrt(C // attn.n_head)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


@torch.no_grad()
def trace(model, idx):
    """The Trace of idx (1, T)."""
    scales, outputs = {}, {}

    def keep(norm, inputs, output):
        x = inputs[0][0]  # (T, d)
        scales[norm] = norm.weight * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        outputs[norm] = output[0]

    norms = [model.ln_f]
    for block in model.blocks:
        norms += [block.ln_1, block.ln_2]
    handles = [norm.register_forward_hook(keep) for norm in norms]
    try:
        logits, _ = model(idx, n_logits=0)
    finally:
        for handle in handles:
            handle.remove()
    patterns = [attention_pattern(block.attn, outputs[block.ln_1]) for block in model.blocks]
    heads = [scales[block.ln_1] for block in model.blocks]
    mlps = [scales[block.ln_2] for block in model.blocks]
    return Trace(heads, mlps, scales[model.ln_f], patterns, logits[0].softmax(-1).mean(0))


def head_writes(attn, x):
    """What each head would write for a key's normalised x (U, d) at attention 1, (U, H, d)."""
    C = x.shape[1]
    values = (x @ attn.c_attn.weight[2 * C:].T).view(len(x), attn.n_head, -1)  # (U, H, D)
    out = attn.c_proj.weight.view(C, attn.n_head, -1)  # (d, H, D)
    return torch.einsum("uhe,dhe->uhd", values, out)


@torch.no_grad()
def node_writes(dictionary, nodes, clean, held):
    """What features write into the residual stream, by their ablation's effect, (U, d)."""
    writes = []
    for layer, position, feature in nodes:
        read = clean[layer].total[0, position]
        other = held[layer].values.expand_as(clean[layer].values)[0, position, feature]
        change = clean[layer].values[0, position, feature] - other
        mlp = dictionary.model.blocks[layer].mlp
        writes.append(mlp(read) - mlp(read - change * dictionary.atoms[layer][feature]))
    return torch.stack(writes)


@torch.no_grad()
def code_readings(dictionary, nodes, scales):
    """Gradients of features' codes by the residual stream before the second norm, (U, d)."""
    readings = []
    for layer, position, feature in nodes:
        sae = dictionary.model.saes()[layer]
        reading = scales[layer][position] * dictionary.atoms[layer][feature]
        if sae.forward_standardized:
            reading = reading * sae.standardization()[0][feature]
        readings.append(reading)
    return torch.stack(readings)


def embedding_sources(model, contexts, has_patch):
    """Nodes of the tokens whose embeddings differ from the ablated prompt's, and these (U, d)."""
    clean, patch = contexts.clean[0], contexts.patch[0]
    positions = torch.arange(len(clean), device=clean.device)
    if has_patch:
        positions = positions[clean != patch]
    writes = model.wte.weight[clean[positions]].detach()
    if has_patch:
        writes = writes - model.wte.weight[patch[positions]].detach()
    nodes = [Node(-1, int(i), int(clean[i])) for i in positions]
    return nodes, writes


@torch.no_grad()
def answer_reading(model, contexts, scale):
    """The answer's Node, and the metric's gradient by the last residual stream (1, d)."""
    rows = model.lm_head.weight
    token, other = int(contexts.answer[0]), int(contexts.wrong[0])
    direction = rows[token]
    if other >= 0:
        direction = direction - rows[other]
    last = int(contexts.last[0])
    return Node(len(model.blocks) + 1, last, token), (direction * scale[last])[None]


@torch.no_grad()
def direct_effects(model, traced, sources, writes, targets, readings):
    """
    {path: (U, V)} of sources, Nodes with writes (U, d), on targets, Nodes with readings (V, d).

    Paths are "residual" and "layer.head".
    """
    def column(nodes, name):
        return torch.tensor([getattr(node, name) for node in nodes], device=writes.device)

    start, end = column(sources, "layer")[:, None], column(targets, "layer")  # (U, 1), (V,)
    at, to = column(sources, "position"), column(targets, "position")
    here = (start < end) & (at[:, None] == to)
    effects = {"residual": (writes @ readings.T) * here}
    for layer, block in enumerate(model.blocks):
        moved = head_writes(block.attn, writes * traced.heads[layer][at])  # (U, H, d)
        products = torch.einsum("uhd,vd->huv", moved, readings)
        pattern = traced.patterns[layer][:, to][:, :, at].transpose(1, 2)  # (H, U, V)
        between = (start < layer) & (layer <= end)
        for head, effect in enumerate(products * pattern * between):
            effects[f"{layer}.{head}"] = effect
    return effects


def edges(effects, sources, targets):
    """The N_EDGES largest edges into each target: [source, target, weight, paths]."""
    names = list(effects)
    paths = torch.stack(list(effects.values()))  # (paths, U, V)
    weights = paths.sum(0)
    found = []
    for v, target in enumerate(targets):
        for u in weights[:, v].abs().argsort(descending=True)[:N_EDGES].tolist():
            if weights[u, v] == 0:
                break
            largest = paths[:, u, v].abs().argsort(descending=True)[:N_PATHS].tolist()
            told = [[names[p], paths[p, u, v].item()] for p in largest if paths[p, u, v] != 0]
            found.append([sources[u], target, weights[u, v].item(), told])
    return found


# -----------------------------------------------------------------------------
# files


def feature_name(sae, feature):
    """Level and number in it of a feature among all."""
    for level, where in enumerate(sae.level_slices):
        if feature < where.stop:
            return level, feature - where.start


def node_id(node):
    """circuit-tracer's name of a node."""
    return f"{'E' if node.layer < 0 else node.layer}_{node.feature}_{node.position}"


def viewer_node(node, kind, **more):
    """A node as circuit-tracer's viewer reads it; what else is in more it leaves alone."""
    layer = "E" if node.layer < 0 else str(node.layer)
    prefix = "L" if kind == "logit" else layer
    suffix = 0 if kind == "cross layer transcoder" else node.position
    return {
        "node_id": node_id(node),
        "feature": node.feature,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{prefix}_{node.feature}-{suffix}",
        "clerp": "",
        "influence": None,
        "activation": None,
        **more,
    }


@torch.no_grad()
def raised(model, write, likely, encoding):
    """The likely tokens whose logits a node raises most by the way straight to them."""
    logits = model.lm_head.weight @ (write * model.ln_f.weight)
    logits = logits.masked_fill(likely < LIKELY, -math.inf)[:encoding.n_vocab]
    return [encoding.decode([i]) for i in logits.topk(N_RAISED).indices.tolist()]


def feature_nodes(dictionary, nodes, writes, scores, clean, held, likely, encoding):
    """The features' nodes for the viewer, in the order of their scores (U,)."""
    shares = scores.abs().cumsum(0) / scores.abs().sum()
    found = []
    for rank, (node, write) in enumerate(zip(nodes, writes)):
        layer, position, feature = node
        level, number = feature_name(dictionary.model.saes()[layer], feature)
        tokens = " ".join(map(repr, raised(dictionary.model, write, likely, encoding)))
        paired = layer + feature  # viewers know a feature by Cantor's number of layer and feature
        found.append(viewer_node(
            node,
            "cross layer transcoder",
            feature=paired * (paired + 1) // 2 + feature,
            clerp=f"{layer}.{level}.{number} raises {tokens}",
            influence=shares[rank].item(),
            activation=clean[layer].values[0, position, feature].item(),
            ablated=held[layer].values.expand_as(clean[layer].values)[0, position, feature].item(),
            score=scores[rank].item(),
            rank=rank,
            name=[layer, level, number],
        ))
    return found


def make_graph(dictionary, contexts, clean, held, nodes, scores, encoding, probability, slug):
    """
    The graph of one prompt as circuit-tracer's JSON.

    contexts: of one row; clean, held: Reads; nodes: features, best first, with scores (U,).
    """
    model = dictionary.model
    traced = trace(model, contexts.clean)
    has_patch = not torch.equal(contexts.clean, contexts.patch)
    embeddings, sources = embedding_sources(model, contexts, has_patch)
    writes = node_writes(dictionary, nodes, clean, held)
    answer, reading = answer_reading(model, contexts, traced.last)
    readings = torch.cat([code_readings(dictionary, nodes, traced.mlps), reading])
    effects = direct_effects(model, traced, [*embeddings, *nodes], torch.cat([sources, writes]),
                             [*nodes, answer], readings)
    token = encoding.decode([answer.feature])
    shown = feature_nodes(dictionary, nodes, writes, scores, clean, held, traced.likely, encoding)
    shown += [viewer_node(node, "embedding", feature=node.position,
                          clerp=encoding.decode([node.feature])) for node in embeddings]
    shown.append(viewer_node(answer, "logit", token_prob=probability,
                             clerp=f'Output "{token}" (p={probability:.3f})'))
    links = []
    for source, target, weight, paths in edges(effects, [*embeddings, *nodes], [*nodes, answer]):
        links.append({"source": node_id(source), "target": node_id(target), "weight": weight,
                      "paths": paths})
    ids = contexts.clean[0].tolist()
    return {
        "metadata": {
            "slug": slug,
            "scan": slug,
            "transcoder_list": [],
            "prompt_tokens": [encoding.decode([i]) for i in ids],
            "prompt": encoding.decode(ids),
            "node_threshold": 1.0,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "",
                    "sg_pos": ""},
        "nodes": shown,
        "links": links,
    }


def write_graph(directory, graph, predictions, site):
    """circuit.json, and circuit.html with predictions, a list of dicts, and links to a site."""
    write_json(os.path.join(directory, "circuit.json"), graph)
    template = os.path.join(os.path.dirname(os.path.abspath(__file__)), "circuits.html")
    with open(template, encoding="utf-8") as file:
        page = file.read()
    content = json.dumps({"graph": graph, "predictions": predictions, "site": site})
    content = content.replace("</", "<\\/")  # a prompt may have a "</script>"
    write_text(os.path.join(directory, "circuit.html"), page.replace("CIRCUIT_JSON", content))
