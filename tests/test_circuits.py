"""
circuits.py: planted circuits are found, scores are finite differences, interventions keep and hold
what they say, and the graph and its page tell what the model does. tasks.py: its rules, by example.
"""
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import run_script

from data import get_tokenizer
from model import GPT, GPTConfig
from tools import attribution, circuit_graph, circuits, tasks
from tools.attribution import CayleyFeatures, Coordinates, Neurons, SAEFeatures
from tools.topk_sae import TopKSAE

ENCODING = get_tokenizer("bytes")
T = 12


def make_model(levels, n_layer=2):
    """A small model whose MLPs and attention matter."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=320, n_layer=n_layer, n_head=2, n_embd=32,
                       cayley_levels=levels)
    model = GPT(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p *= 8
    for sae in model.saes():
        sae.var.fill_(0.5)
        sae.bias.normal_(std=0.1)
    return model


def make_contexts(n=3):
    """Random prompts, of T and T - 2 tokens, which differ in the fourth token."""
    generator = torch.Generator().manual_seed(1)
    clean, patch = torch.randint(256, (2, n, T), generator=generator)
    patch = torch.where(torch.arange(T) == 3, patch, clean)
    answer, wrong = torch.randint(256, (2, n), generator=generator)
    last = torch.tensor([T - 1] * (n - 1) + [T - 3])
    return tasks.Contexts(clean, patch, last, answer, wrong)


def fitted(d, n_features, k, n=2):
    torch.manual_seed(2)
    return [TopKSAE(d, n_features, k).eval().requires_grad_(False) for _ in range(n)]


def exact_saes(d):
    """SAEs whose features are the coordinates, raised by 100 so that none is negative."""
    saes = fitted(d, d, d)
    for sae in saes:
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
        sae.b_dec.fill_(-100)
    return saes


CAYLEY = make_model("5,4,0;8,6,16")
DENSE = make_model("")
DICTIONARIES = {
    "cayley": CayleyFeatures("cayley", CAYLEY),
    "neurons": Neurons("neurons", DENSE),
    "coordinates": Coordinates("coordinates", DENSE),
    "sae": SAEFeatures("sae", DENSE, fitted(32, 64, 5), keeps_error=True),
    "no errors": SAEFeatures("no errors", DENSE, fitted(32, 64, 5), keeps_error=False),
    "exact": SAEFeatures("exact", DENSE, exact_saes(32), keeps_error=True),
}
WHOLE = [name for name in DICTIONARIES if name != "no errors"]


def prepared(dictionary, contexts, how="patch"):
    """clean, held, and the shape of the nodes."""
    _, clean = attribution.reads(dictionary, contexts.clean, contexts.last)
    means = attribution.mean_reads(dictionary, [contexts])
    held = attribution.held_reads(dictionary, contexts, clean, how, means)
    n_features = clean[0].values.shape[-1]
    return clean, held, (len(contexts.clean), len(clean), T, n_features + 1)


def scores_of(dictionary, contexts, how="patch"):
    clean, held, _ = prepared(dictionary, contexts, how)
    gradients, = attribution.integrated_gradients(dictionary, contexts, clean, held, [contexts])
    parts = attribution.differences(contexts, clean, held)
    return attribution.node_scores(dictionary, *parts, gradients)


# -----------------------------------------------------------------------------
# runs

@pytest.mark.parametrize("how", circuits.ABLATIONS)
@pytest.mark.parametrize("name", WHOLE)
def test_with_every_node_kept_it_is_the_model_bit_for_bit(name, how):
    dictionary, contexts = DICTIONARIES[name], make_contexts()
    _, held, shape = prepared(dictionary, contexts, how)
    logits = attribution.with_nodes(dictionary, contexts, held, torch.ones(shape, dtype=torch.bool))
    expected, _ = dictionary.model(contexts.clean, n_logits=0)
    assert torch.equal(logits, expected[torch.arange(3), contexts.last])


@pytest.mark.parametrize("how", circuits.ABLATIONS)
@pytest.mark.parametrize("name", DICTIONARIES)
def test_with_no_node_kept_layers_read_what_is_held(name, how):
    dictionary, contexts = DICTIONARIES[name], make_contexts()
    _, held, shape = prepared(dictionary, contexts, how)
    logits = attribution.with_nodes(dictionary, contexts, held,
                                    torch.zeros(shape, dtype=torch.bool))
    expected = attribution.forward(dictionary, contexts.clean, contexts.last,
                                   lambda layer, total: held[layer].total.expand_as(total))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)


def test_what_is_held():
    dictionary, contexts = DICTIONARIES["sae"], make_contexts()
    _, patched = attribution.reads(dictionary, contexts.patch, contexts.last)
    _, held, _ = prepared(dictionary, contexts, "patch")
    assert torch.equal(held[1].values, patched[1].values)
    _, held, _ = prepared(dictionary, contexts, "zero")
    assert not held[1].values.any() and not held[1].error.any()
    _, held, _ = prepared(dictionary, contexts, "mean")
    real = torch.arange(T) <= contexts.last[:, None]
    torch.testing.assert_close(held[1].values[0, 0], patched[1].values[real].mean(0))


def test_one_node_kept_changes_its_value_alone():
    dictionary, contexts = DICTIONARIES["cayley"], make_contexts()
    clean, held, shape = prepared(dictionary, contexts)
    feature = int((clean[0].values[0, 3] - held[0].values[0, 3]).abs().argmax())
    keep = torch.zeros(shape, dtype=torch.bool)
    keep[:, 0, 3, feature] = True
    atom = dictionary.atoms[0][feature]

    def change(layer, total):
        total = held[layer].total.clone()
        if layer == 0:
            move = clean[0].values[:, 3, feature] - held[0].values[:, 3, feature]
            total[:, 3] += move[:, None] * atom
        return total

    expected = attribution.forward(dictionary, contexts.clean, contexts.last, change)
    logits = attribution.with_nodes(dictionary, contexts, held, keep)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_without_errors_every_feature_is_not_the_model():
    dictionary, contexts = DICTIONARIES["no errors"], make_contexts()
    _, held, shape = prepared(dictionary, contexts)
    everything = torch.ones(shape, dtype=torch.bool)
    logits = attribution.with_nodes(dictionary, contexts, held, everything)
    everything[..., -1] = False
    other = attribution.with_nodes(DICTIONARIES["sae"], contexts, held, everything)
    assert torch.equal(logits, other)
    expected, _ = DENSE(contexts.clean, n_logits=0)
    assert not torch.allclose(logits, expected[torch.arange(3), contexts.last], atol=1e-2)


def test_an_unpermuted_dictionary_is_the_circuit():
    dictionary, contexts = DICTIONARIES["cayley"], make_contexts()
    _, held, shape = prepared(dictionary, contexts)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    same = [torch.arange(shape[-1] - 1)] * 2
    logits = attribution.with_permuted(dictionary, contexts, held, same, keep)
    expected = attribution.with_nodes(dictionary, contexts, held, keep)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    turned = [p.roll(1) for p in same]
    logits = attribution.with_permuted(dictionary, contexts, held, turned, keep)
    assert not torch.allclose(logits, expected, atol=1e-2)


# -----------------------------------------------------------------------------
# scores

@pytest.mark.parametrize("name, how", [
    ("cayley", "patch"), ("cayley", "zero"), ("neurons", "patch"), ("sae", "patch"),
    ("coordinates", "mean"),
])
def test_scores_are_finite_differences(name, how, monkeypatch):
    monkeypatch.setattr(attribution, "STEPS", 2)
    dictionary, contexts = DICTIONARIES[name], make_contexts()
    scores = scores_of(dictionary, contexts, how)
    clean, held, _ = prepared(dictionary, contexts, how)
    values, _ = attribution.differences(contexts, clean, held)
    for layer in range(2):
        node = int(scores[0, layer, ..., :-1].abs().flatten().argmax())
        position, feature = divmod(node, scores.shape[-1] - 1)
        atom = torch.zeros_like(clean[layer].values[:1, :1])
        atom[..., feature] = 1
        atom = dictionary.combine(layer, atom)[0, 0]
        expected = 0
        for share in (0, 0.5):
            line = torch.lerp(clean[layer].total, held[layer].total.expand_as(clean[layer].total),
                              share)
            m = []
            for step in (1e-2, -1e-2):
                total = line.clone()
                total[:, position] += step * atom

                def change(at, current, layer=layer, total=total):
                    return total if at == layer else current

                logits = attribution.forward(dictionary, contexts.clean, contexts.last, change)
                m.append(attribution.margin(logits, contexts)[0].item())
            expected += (m[0] - m[1]) / 2e-2 / 2
        expected *= values[layer][0, position, feature].item()
        assert scores[0, layer, position, feature].item() == pytest.approx(expected, rel=0.05)


def test_a_layers_scores_add_up_to_its_ablation(monkeypatch):
    monkeypatch.setattr(attribution, "STEPS", 400)
    dictionary, contexts = DICTIONARIES["sae"], make_contexts()
    clean, held, _ = prepared(dictionary, contexts)
    scores = scores_of(dictionary, contexts)
    expected, _ = attribution.reads(dictionary, contexts.clean, contexts.last)
    for layer in range(2):
        def change(at, total, layer=layer):
            return held[layer].total if at == layer else total

        ablated = attribution.forward(dictionary, contexts.clean, contexts.last, change)
        effect = attribution.margin(expected, contexts) - attribution.margin(ablated, contexts)
        torch.testing.assert_close(scores[:, layer].sum((1, 2)), effect, rtol=0.02, atol=0.02)


def test_an_exact_sae_is_the_dense_row():
    contexts = make_contexts()
    dense, exact = DICTIONARIES["coordinates"], DICTIONARIES["exact"]
    scores, other = scores_of(dense, contexts), scores_of(exact, contexts)
    torch.testing.assert_close(other[..., :-1], scores[..., :-1], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(other[..., -1], torch.zeros_like(other[..., -1]), atol=1e-3, rtol=0)
    keep = attribution.ranks(scores) < 20
    logits = []
    for dictionary in (dense, exact):
        _, held, _ = prepared(dictionary, contexts)
        logits.append(attribution.with_nodes(dictionary, contexts, held, keep))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-2)


def test_ranks_are_by_size():
    scores = torch.tensor([[[1.0, -3.0], [0.0, 2.0]], [[0.0, 0.0], [5.0, 0.0]]])
    assert attribution.ranks(scores)[0].tolist() == [[2, 0], [3, 1]]
    assert attribution.ranks(scores)[1, 1, 0] == 0


def test_margin_without_a_wrong_answer_is_the_log_probability():
    contexts = make_contexts()._replace(wrong=torch.tensor([-1, 5, -1]))
    logits = torch.randn(3, 320)
    m = attribution.margin(logits, contexts)
    answer = int(contexts.answer[0])
    torch.testing.assert_close(m[0], logits[0].log_softmax(0)[answer])
    torch.testing.assert_close(m[1], logits[1, contexts.answer[1]] - logits[1, 5])


# -----------------------------------------------------------------------------
# planted circuits

def planted():
    """
    A model of one layer whose MLP reads three features of level 0, and a context in which they are
    active in the clean prompt's last token and not in the patched one's.
    """
    model = make_model("5,8,0", n_layer=1)
    contexts = make_contexts(1)
    contexts = contexts._replace(last=torch.tensor([3]))  # the token that differs
    dictionary = CayleyFeatures("planted", model)
    clean, held, _ = prepared(dictionary, contexts)
    gained = (clean[0].values[0, 3] != 0) & (held[0].values[0, 3] == 0)
    planted = gained.nonzero().flatten()[:3].tolist()
    assert len(planted) == 3
    mlp = model.blocks[0].mlp
    mlp.c_fc.weight.zero_()
    mlp.c_fc.weight[:3] = dictionary.atoms[0][planted]
    mlp.c_proj.weight.zero_()
    direction = model.lm_head.weight[contexts.answer[0]] - model.lm_head.weight[contexts.wrong[0]]
    mlp.c_proj.weight[:, :3] = (direction / direction.norm())[:, None]
    return dictionary, contexts, planted


def test_a_planted_circuit_is_found():
    dictionary, contexts, features = planted()
    scores = scores_of(dictionary, contexts)
    ranks = attribution.ranks(scores)
    nodes = (ranks < 3).nonzero().tolist()
    assert sorted(nodes) == [[0, 0, 3, feature] for feature in sorted(features)]
    assert (scores.abs() > 1e-4).sum() == 3
    _, held, _ = prepared(dictionary, contexts)
    m = {}
    for name, keep in {"all": ranks >= 0, "none": ranks < 0, "circuit": ranks < 3,
                       "complement": ranks >= 3, "two": ranks < 2}.items():
        logits = attribution.with_nodes(dictionary, contexts, held, keep)
        m[name] = attribution.margin(logits, contexts).item()
    span = m["all"] - m["none"]
    assert abs(span) > 0.1
    assert (m["circuit"] - m["none"]) / span == pytest.approx(1, abs=1e-3)
    assert (m["complement"] - m["none"]) / span == pytest.approx(0, abs=1e-3)
    assert abs((m["two"] - m["none"]) / span - 1) > 0.02


def test_the_graph_has_the_planted_circuit():
    dictionary, contexts, features = planted()
    clean, held, _ = prepared(dictionary, contexts)
    scores = scores_of(dictionary, contexts)
    nodes = [circuit_graph.Node(0, 3, feature) for feature in features]
    graph = circuit_graph.make_graph(dictionary, contexts, clean, held, nodes,
                                     scores[0, 0, 3, features], ENCODING, 0.5, "planted")
    answer = graph["nodes"][-1]["node_id"]
    weights = {link["source"]: link for link in graph["links"] if link["target"] == answer}
    for feature in features:
        link = weights[f"0_{feature}_3"]
        assert link["paths"] == [["residual", link["weight"]]]
    # what the MLP writes adds up in the metric, before the norm's scale changes
    hidden = torch.nn.functional.gelu(clean[0].total[0, 3] @ dictionary.atoms[0][features].T)
    scale = circuit_graph.trace(dictionary.model, contexts.clean).last[3]
    difference = (dictionary.model.lm_head.weight[contexts.answer[0]]
                  - dictionary.model.lm_head.weight[contexts.wrong[0]])
    expected = hidden * ((difference * scale) @ (difference / difference.norm()))
    found = torch.tensor([weights[f"0_{feature}_3"]["weight"] for feature in features])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# -----------------------------------------------------------------------------
# direct effects

def test_direct_effects_add_up_to_what_a_layer_reads():
    """With heads of layer 0 silent no path has two heads, so that the effects are all there is."""
    model = make_model("5,4,0;8,6,16")
    model.blocks[0].attn.c_proj.weight.zero_()
    contexts = make_contexts(1)
    dictionary = CayleyFeatures("", model)
    _, clean = attribution.reads(dictionary, contexts.clean, contexts.last)
    traced = circuit_graph.trace(model, contexts.clean)
    embedded = model.wte(contexts.clean[0]) + model.wpe(torch.arange(T))
    written = model.blocks[0].mlp(clean[0].total[0])
    sources = [circuit_graph.Node(layer, i, 0) for layer in (-1, 0) for i in range(T)]
    active = clean[1].values[0, 9].nonzero().flatten().tolist()
    targets = [circuit_graph.Node(1, 9, feature) for feature in active]
    readings = circuit_graph.code_readings(dictionary, targets, traced.mlps)
    effects = circuit_graph.direct_effects(model, traced, sources, torch.cat([embedded, written]),
                                           targets, readings)
    total = torch.stack(list(effects.values())).sum((0, 1))
    sae = model.saes()[1]
    shift = sae.standardization()[1] + sae.bias
    torch.testing.assert_close(total, clean[1].values[0, 9, active] - shift[active], rtol=1e-3,
                               atol=1e-3)
    by_head = effects["1.0"].abs().sum()
    assert by_head > 0 and effects["0.1"].abs().sum() == 0
    assert not effects["1.0"][T + 10:].any(), "attention looks back"


# -----------------------------------------------------------------------------
# tasks

DOCUMENT = '''def f(a, b):
    if a == 'one':
        return [1, 2]
    print(a)
    g("two")
    return '{'
'''


def told(name):
    """The ends of an Example's prompts after their last new line, and its answers."""
    return [(clean.rsplit("\n", 1)[-1], patch.rsplit("\n", 1)[-1], *ends)
            for clean, patch, *ends in tasks.TASKS[name](DOCUMENT)]


def test_rules_in_documents():
    assert told("quote") == [("    if a == 'one", "    if a == \"one", "'", '"'),
                             ('    g("two', "    g('two", '"', "'"),
                             ("    return '{", "    return \"{", "'", '"')]
    assert ("        return [1, 2", "        return (1, 2", "]", ")") in told("bracket")
    assert ("    print(a", "    print[a", ")", "]") in told("bracket")
    clean, patch, *ends = next(tasks.indent(DOCUMENT))
    assert clean.endswith("def f(a, b):\n") and patch.endswith("def f(a, b))\n")
    assert ends == ["    if", "if"]
    assert any(clean.endswith("    print(a)\n    ") and patch.endswith("print(a:\n    ")
               and ends == ["g", "    g"] for clean, patch, *ends in tasks.indent(DOCUMENT))


@pytest.mark.parametrize("name", ["bracket_counting", "else_elif", "fstring_brace", "for_while",
                                  "while_return_true", "set_or_string", "ioi", "greater_than"])
def test_contexts_from_templates(name):
    choice, test = tasks.make_contexts(name, [], ENCODING, 8, 64)
    rows = [tuple(ids) for side in (choice, test) for ids in side.clean.tolist()]
    assert len(set(rows)) == 16, "disjoint, each once"
    for side in (choice, test):
        assert (side.answer != side.wrong).all()
        for clean, patch, last in zip(side.clean, side.patch, side.last):
            assert not torch.equal(clean[:last + 1], patch[:last + 1])
            assert torch.equal(clean[last + 1:], patch[last + 1:])
        assert side.answer.unique(return_counts=True)[1].max() <= 4, "no answer is often right"


def test_continuations_part_after_what_they_share():
    example = tasks.Example("x = [[1", "x =  [1", "]]\n", "]\n")
    clean, patch, answer, wrong = tasks.tokenized(example, ENCODING, 64)
    assert ENCODING.decode(clean) == "<|endoftext|>x = [[1]"
    assert ENCODING.decode([answer]) + ENCODING.decode([wrong]) == "]\n"
    assert len(tasks.tokenized(example, ENCODING, 5)[0]) == 5
    assert tasks.tokenized(example._replace(patch="x = [1"), ENCODING, 64) is None
    assert tasks.tokenized(example._replace(wrong="]"), ENCODING, 64) is None


def test_too_few_contexts_are_told():
    with pytest.raises(ValueError, match="quote: 3 contexts fit"):
        tasks.make_contexts("quote", [DOCUMENT], ENCODING, 8, 64)


# -----------------------------------------------------------------------------
# numbers

def test_areas_under_the_curve():
    shares = np.array(circuits.FRACTIONS)
    m = {"all": np.full(4, 3.0), "none": np.full(4, 1.0), "nodes": np.full(4, 50)}
    m |= {"nonsense all": m["all"], "nonsense none": m["none"], "every node": m["all"],
          "joint": m["all"], "singles": np.tile(1 + 0.1 * np.ones(10), (4, 1))}
    m["fractions"] = np.tile(1 + 2 * shares, (4, 1))
    for name in circuits.CONTROLS + ("best",):
        m[name] = np.tile(1 + 2 * np.linspace(0, 1, len(circuits.SIZES)), (4, 1))
    numbers = circuits.summary(m)
    assert numbers["CPR"]["value"] == pytest.approx((1 - 1e-6) / 2)
    assert numbers["CMD"]["value"] == pytest.approx(0.999 - (1 - 1e-6) / 2)
    assert numbers["best"]["value"][-1] == 1
    assert numbers["joint - singles"]["value"] == pytest.approx(1 - 10 * 0.05)


def test_intervals_are_over_contexts():
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    found = circuits.with_interval(circuits.resamples(200) @ values)
    assert found["value"] == pytest.approx(values.mean())
    error = values.std() / 200**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize("how", circuits.ABLATIONS)
def test_a_task_in_numbers(how, monkeypatch):
    monkeypatch.setattr(circuits, "LEAST_ACCURACY", 0)
    monkeypatch.setattr(attribution, "STEPS", 2)
    for key, value in {"n_contexts": 4, "context_tokens": 10, "ablation": how}.items():
        monkeypatch.setattr(circuits, key, value)
    names = ("cayley", "sae", "no errors")
    rows = [DICTIONARIES[name] for name in names]
    result = circuits.run_task("fstring_brace", rows, [], ENCODING, "cpu")
    assert [row["name"] for row in result["rows"]] == list(names)
    lines = circuits.table(result)
    assert max(map(len, lines)) <= 100
    for row in result["rows"][:2]:
        assert row["every node"]["value"] == pytest.approx(1, abs=1e-3)
        assert row["fractions"]["value"][-1] == pytest.approx(1, abs=1e-2)
    written = circuits.csv_rows(result)
    assert ["fstring_brace", "cayley", "best", 10] in [row[:4] for row in written]
    picture = ElementTree.fromstring(circuits.chart([result]))
    assert len(picture.findall("{*}polyline")) == 3
    monkeypatch.setattr(circuits, "LEAST_ACCURACY", 1.1)
    result = circuits.run_task("fstring_brace", rows, [], ENCODING, "cpu")
    assert not result["rows"] and "left out" in circuits.table(result)[-1]


# -----------------------------------------------------------------------------
# the command

@pytest.fixture(scope="module")
def site(trained, tmp_path_factory):
    """The out_dir of a prompt's circuit."""
    directory = tmp_path_factory.mktemp("circuit") / "out"
    result = run_script("-m", "tools.circuits", f"--ckpt={trained}", f"--out_dir={directory}",
                        "--prompt=x = 'a</script>", "--patch=x = \"a</script>", "--answer='",
                        '--wrong="', "--n_nodes=12", "--site=../features")
    assert result.returncode == 0, result.stderr
    sizes = re.findall(r"^ *(\w+) nodes: faithfulness", result.stdout, re.MULTILINE)
    assert sizes == ["0", "10", "all"]
    return directory


def test_the_graph_is_of_circuit_tracers_format(site):
    graph = json.loads((site / "circuit.json").read_text())
    needed = {"slug", "scan", "prompt_tokens", "prompt", "transcoder_list"}
    assert needed <= graph["metadata"].keys()
    assert {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"} == graph["qParams"].keys()
    types = {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
             "jsNodeId": str, "clerp": str, "token_prob": float, "is_target_logit": bool}
    for node in graph["nodes"]:
        assert all(type(node[key]) is kind for key, kind in types.items()), node
    kinds = [node["feature_type"] for node in graph["nodes"]]
    assert kinds.count("cross layer transcoder") == 12 and kinds.count("logit") == 1
    names = [node["node_id"] for node in graph["nodes"]]
    assert len(set(names)) == len(names)
    for link in graph["links"]:
        assert link["source"] in names and link["target"] in names
        assert type(link["weight"]) is float
    assert "".join(graph["metadata"]["prompt_tokens"]) == "<|endoftext|>x = 'a</script>"


class Tags(HTMLParser):
    """The tags and attributes of a page, and the text of its scripts."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


def test_the_page_stands_alone(site):
    page = (site / "circuit.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not {"link", "img", "iframe"} & set(tags.tags)
    assert not {"src", "href"} & {name for name, _ in tags.attributes}
    content = json.loads(tags.scripts[0])
    assert content["graph"] == json.loads((site / "circuit.json").read_text())
    assert [p["nodes"] for p in content["predictions"]] == [*range(13), "all"]
    assert content["predictions"][-1]["faithfulness"] == 1
    addresses = page.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in addresses.replace(json.dumps(content["graph"]["metadata"]["prompt"]), "")


def test_the_page_in_a_browser(browser, site):
    browser.go(f"file://{site}/circuit.html")
    circles = "document.querySelectorAll('circle').length"
    assert browser.wait("document.querySelector('#prompt').textContent").endswith("'a</script>")
    assert browser.run(circles) == 12 + 2, "with the quote's embedding and the answer"
    move = ("(() => { const slider = document.querySelector('#nodes'); slider.value = 3; "
            "slider.dispatchEvent(new Event('input')); return true })()")
    browser.run(move)
    assert browser.run(circles) == 3 + 2
    assert browser.run("document.querySelector('#count').textContent") == "3 of 12"
    assert "faithfulness" in browser.run("document.querySelector('#faithful').textContent")
    best = json.loads((site / "circuit.json").read_text())["nodes"][0]
    circle = f"document.querySelector('circle[data-id=\"{best['node_id']}\"]')"
    browser.run(f"{circle}.dispatchEvent(new Event('click'))")
    details = browser.wait("document.querySelector('#details').innerText")
    assert ".".join(map(str, best["name"])) in details and "Moves" in details
    layer, level, number = best["name"]
    assert browser.run("document.querySelector('#details a').getAttribute('href')") == (
        f"../features/index.html#/{layer}/{level}/{number}")
    assert browser.errors() == []


def test_a_task_that_the_model_cannot_do_is_left_out(trained, tmp_path):
    result = run_script("-m", "tools.circuits", f"--ckpt={trained}", f"--out_dir={tmp_path}",
                        "--task=else_elif,agreement_simple", "--n_contexts=4",
                        "--context_tokens=16")
    assert result.returncode == 0, result.stderr
    assert "left out, below 75% accuracy: run 5,4,0;8,6,16" in result.stdout
    assert "left out: task=agreement_simple: 0 contexts fit the tokenizer 'bytes'" in result.stdout
    assert json.loads((tmp_path / "circuits.json").read_text())["tasks"][0]["rows"] == []


@pytest.mark.parametrize("arguments, told", [
    ([], "give either --task or --prompt"),
    (["--task=quotes"], "task='quotes': the tasks are quote, bracket"),
    (["--task=quote", "--patch=a"], "belong to --prompt"),
    (["--prompt=a"], "--prompt needs --answer"),
    (["--prompt=a", "--answer=b", "--patch=c"], "--patch and --wrong belong together"),
    (["--prompt=a", "--answer=b", "--patch=cc", "--wrong=d"], "must be of as many tokens"),
    (["--prompt=a", "--answer=bc"], "answer='bc': 2 tokens, and a circuit is of one: --answer='b'"),
    (["--prompt=a", "--answer=b", "--patch=c", "--wrong=dd"], "wrong='dd': 2 tokens"),
    (["--prompt=a", "--answer=bcd", "--patch=c", "--wrong=bd"], "answer='bcd': 2 tokens"),
    (["--prompt=a", "--answer=b", "--out_dir=/dev/null"], "out_dir='/dev/null': it can't be made"),
    (["--prompt=" + 40 * "a", "--answer=b"], "the prompt has 41 tokens with end of text"),
    (["--task=quote", "--saes=x.pt"], "saes=x.pt: they are of the dense twin"),
    (["--task=quote", "--ablation=resample"], "ablation='resample': must be one of 'patch'"),
])
def test_refused_settings(trained, arguments, told):
    result = run_script("-m", "tools.circuits", f"--ckpt={trained}", *arguments)
    assert result.returncode == 1 and told in result.stderr, result.stderr
