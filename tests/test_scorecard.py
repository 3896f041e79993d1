"""
scorecard.py: planted codes score 1 and shuffled labels chance, the numbers are scikit-learn's,
splicing and steering do what they say, and the command goes on where it stopped. labels.py: what is
labelled, by example.
"""
import csv
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT, arguments, run_script
from torch.nn import functional as F

from cayley import Edit
from model import GPT, GPTConfig
from tools import labels, probing, scorecard, topk_sae

TINY_CARD = dict(
    sae_tokens=20_000,
    label_tokens=60_000,
    fit_tokens=4096,
    score_tokens=4096,
    causal_tokens=128,
    n_windows=16,
    device="cpu",
)


@pytest.fixture(scope="module")
def models():
    """A small Cayley model and a dense one."""
    made = []
    for levels in ("5,4,0;8,6,16", ""):
        torch.manual_seed(0)
        config = GPTConfig(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=32,
                           cayley_levels=levels)
        model = GPT(config).eval().requires_grad_(False)
        for p in model.parameters():
            if p.dim() == 2:
                p *= 5  # so that what an MLP reads matters
        made.append(model)
    return made


def idx_of(*shape):
    return np.random.default_rng(0).integers(0, 257, shape)


def with_python_label(source, name):
    """The characters of a source that have a label, without spaces and newlines."""
    values = labels.python_labels(source.encode())[:, list(labels.PYTHON).index(name)]
    return "".join(c for c, value in zip(source, values) if value and not c.isspace())


# -----------------------------------------------------------------------------
# labels.py

SOURCE = '''"""Doc."""
import os.path  # note
def f(a, b=(1, [2])):
    """Inner."""
    x = a.name + f"s{a}"
    return x
'''


@pytest.mark.parametrize("name, expected", [
    ("docstring", ['"""Doc."""', '"""Inner."""']),
    ("string", ['f"s{a}"']),
    ("comment", ["#note"]),
    ("keyword", ["import", "def", "return"]),
    ("name being defined", ["f"]),
    ("attribute", ["name"]),
    ("import line", ["import", "os.path"]),
    ("number", ["1", "2"]),
    ("operator", ["=", "=", "+"]),
    ("line start", ["import", "def", "x", "return"]),
    ("in brackets", ["a,", "b=(1,", "[2])"]),
    ("in two brackets", ["1,", "[2]"]),
    ("assigned value", ["a.name", "+", 'f"s{a}"']),
])
def test_labels_of_python(name, expected):
    assert with_python_label(SOURCE, name) == "".join(expected)


def test_characters_of_several_bytes_and_other_texts():
    source = "é = 'ü'  # ß\n"
    values = labels.python_labels(source.encode())
    column = values[:, list(labels.PYTHON).index("string")]
    assert column.sum() == len("'ü'".encode())
    assert (labels.python_labels(b"this is no Python\n") == labels.UNKNOWN).all()


def words_encoding():
    """Words, each with the space before it, and single bytes, as tokens."""
    ranks = {bytes([i]): i for i in range(256)}
    for word in (" in", " The", "The", " said", " Paris", " going", " wal", "ked"):
        for end in range(2, len(word) + 1):  # every step of joining bytes is a token
            ranks.setdefault(word[:end].encode(), len(ranks))
    return tiktoken.Encoding("words", pat_str=r" ?\w+|\W", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def test_labels_of_english():
    encoding = words_encoding()
    text = 'The said "in Paris (The) 7", The going\nThe walked.'
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(text)])
    names, values = labels.label_stream(ids, encoding)
    texts = [""] + [encoding.decode([i]) for i in ids[1:].tolist()]

    def with_label(name):
        return [t for t, value in zip(texts, values[:, names.index(name)]) if value]

    assert with_label("digit") == ["7"]
    assert with_label("sentence start") == ["The", "The"]
    assert with_label("line start") == ["The", "The"]
    assert with_label("capitalised inside a sentence") == [" Paris", "The", " The"]
    assert "".join(with_label("in brackets")) == "The)"
    assert "".join(with_label("in quotes")) == 'in Paris (The) 7"'
    assert with_label("word in -ing") == [" going"]
    assert "".join(with_label("word in -ed")) == " walked"
    assert "ked" in "".join(with_label("word continued"))
    assert with_label("first letter p") == [" Paris"]
    assert not values[0].any()


# -----------------------------------------------------------------------------
# sparse probing

N = 2000


def planted(seed=0, noise_features=30):
    """Truth (N, 3), documents, and Tables whose features 0, 1, 2 are active just where it holds."""
    rng = np.random.default_rng(seed)
    truth = rng.random((N, 3)) < [0.1, 0.3, 0.05]
    values = (rng.random((N, noise_features)) < 0.1) * rng.normal(size=(N, noise_features))
    values[:, :3] = truth * (1 + rng.random((N, 3))) * [1, -1, 1]  # feature 1 is negative
    ids = np.broadcast_to(np.arange(noise_features), values.shape)
    return truth, np.arange(N) // 200, probing.Table(ids, values, noise_features)


def test_planted_codes_are_found_on_either_side():
    fit_truth, _, fit = planted(0)
    truth, documents, score = planted(1)
    probes, one = probing.probe_one(fit, score, fit_truth, truth, documents)
    assert [(probe.feature, probe.sign) for probe in probes] == [(0, 1), (1, -1), (2, 1)]
    five = probing.probe_some(fit, score, fit_truth, truth, documents)
    for outcomes in (one, five):
        for found in outcomes:
            numbers = probing.metrics(found.confusion.sum(0), found.histogram.sum(0))
            assert (numbers > 0.99).all()


def test_shuffled_labels_are_at_chance():
    fit_truth, _, fit = planted(0)
    truth, documents, score = planted(1)
    rng = np.random.default_rng(2)
    fit_truth, truth = rng.permutation(fit_truth), rng.permutation(truth)
    probes, one = probing.probe_one(fit, score, fit_truth, truth, documents)
    five = probing.probe_some(fit, score, fit_truth, truth, documents)
    for outcomes in (one, five):
        for found, share in zip(outcomes, truth.mean(0)):
            f1, balanced, auc = probing.metrics(found.confusion.sum(0), found.histogram.sum(0))
            assert f1 < 2 * share / (1 + share) + 0.03  # of saying yes always
            assert abs(balanced - 0.5) < 0.06 and abs(auc - 0.5) < 0.06


def test_best_feature_and_threshold_are_those_of_trying_all():
    truth, _, table = planted(3)
    rng = np.random.default_rng(30)
    truth = truth ^ (rng.random(truth.shape) < 0.1)
    probes = probing.best_features(table, truth)
    for label, probe in enumerate(probes):
        best = 0.0
        for feature in range(table.n_features):
            rows, values = table.feature(feature)
            for sign in (1, -1):
                for threshold in np.unique(sign * values):
                    if threshold <= 0:
                        continue
                    predicted = np.zeros(N, dtype=bool)
                    predicted[rows] = sign * values >= threshold
                    both = (predicted & truth[:, label]).sum()
                    best = max(best, 2 * both / (predicted.sum() + truth[:, label].sum()))
        rows, values = table.feature(probe.feature)
        predicted = np.zeros(N, dtype=bool)
        predicted[rows] = probe.sign * values >= probe.threshold
        both = (predicted & truth[:, label]).sum()
        assert 2 * both / (predicted.sum() + truth[:, label].sum()) == pytest.approx(best)


def test_dense_and_sparse_tables_say_the_same():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 7)).astype(np.float32)
    weights = rng.random((50, 2))
    dense = probing.Table(None, values, 7)
    sparse = probing.Table(np.broadcast_to(np.arange(7), values.shape), values, 7)
    np.testing.assert_allclose(dense.sums(weights), sparse.sums(weights), rtol=1e-6)
    np.testing.assert_array_equal(dense.column(3), sparse.column(3))
    np.testing.assert_array_equal(dense.at(np.array([7, 2])), sparse.at(np.array([7, 2])))
    truth = rng.random((50, 1)) < 0.4
    expected = values[truth[:, 0]].mean(0) - values[~truth[:, 0]].mean(0)
    differences = probing.mean_differences(sparse, truth)
    np.testing.assert_allclose(differences[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_numbers_are_those_of_scikit_learn():
    reason = "scikit-learn, the oracle of these numbers, is not installed"
    sk = pytest.importorskip("sklearn.metrics", reason=reason)
    linear = pytest.importorskip("sklearn.linear_model", reason=reason)
    rng = np.random.default_rng(0)
    y = rng.random(N) < 0.2
    scores = np.round((rng.normal(size=N) + y) * 10).clip(-40, 40)  # with ties
    predicted = scores > 5
    found = probing.outcome(scores, predicted, y, np.arange(N) // 100)
    numbers = probing.metrics(found.confusion.sum(0), found.histogram.sum(0))
    expected = [sk.f1_score(y, predicted), sk.balanced_accuracy_score(y, predicted),
                sk.roc_auc_score(y, scores)]
    np.testing.assert_allclose(numbers, expected, rtol=1e-12)

    precision, recall, thresholds = sk.precision_recall_curve(y, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    (best,), (threshold,) = probing.best_cut(scores, y[:, None], np.array([y.sum()]))
    assert best == pytest.approx(f1.max())
    assert threshold == thresholds[f1[:-1].argmax()]

    x = rng.normal(size=(N, 5)) * [1, 5, 0.2, 1, 1] + y[:, None] * [1, 0, 0.1, -1, 0]
    weights, intercept = probing.logistic(x, y)
    model = linear.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(weights, model.coef_[0], rtol=1e-4, atol=1e-5)
    assert intercept == pytest.approx(model.intercept_[0], rel=1e-4)


def test_the_current_token_is_read_off_its_rates():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, N)
    truth = (ids == 3)[:, None]
    rates = probing.token_rates(ids, truth, 32)
    assert rates[3, 0] > 0.9 and rates[4, 0] < 0.1
    (found,) = probing.probe_token(rates, ids, ids, truth, truth, np.zeros(N, dtype=int))
    assert probing.metrics(found.confusion.sum(0), found.histogram.sum(0))[0] == 1


# -----------------------------------------------------------------------------
# the card


def probing_result(seed, shuffled):
    fit_truth, _, fit = planted(0)
    truth, documents, score = planted(seed)
    if shuffled:
        truth = np.random.default_rng(seed).permutation(truth)
    sides = fit, score, fit_truth, truth, documents
    return {"one": probing.stacked(probing.probe_one(*sides)[1]),
            "five": probing.stacked(probing.probe_some(*sides))}


def card_rows(cayley, reference, monkeypatch):
    monkeypatch.setattr(scorecard, "RESAMPLES", 100)
    documents = (np.arange(N) // 200).reshape(10, 200)
    data = scorecard.Data(None, [], None, scorecard.Labelled(None, None, documents), None, None, {})
    rows = scorecard.make_rows(
        [{(0, "Cayley"): [cayley], (0, scorecard.REFERENCE): [reference]}], data)
    return {row["name"]: row for row in rows}


def test_swapped_arms_swap_the_table(monkeypatch):
    good, bad = probing_result(1, False), probing_result(1, True)
    one = card_rows(good, bad, monkeypatch)
    other = card_rows(bad, good, monkeypatch)
    for number in ("one_f1", "five_f1", "one_auc", "five_balanced_accuracy"):
        for key in ("mean", "interval"):
            assert one["Cayley"][number][key] == other[scorecard.REFERENCE][number][key]
            assert other["Cayley"][number][key] == one[scorecard.REFERENCE][number][key]
        difference = one["Cayley"][number]["difference"]
        assert difference == pytest.approx(-other["Cayley"][number]["difference"])
        low, high = one["Cayley"][number]["difference_interval"]
        assert 0.1 < low <= difference <= high


def test_a_row_without_a_number_has_no_difference():
    nothing = np.full(5, np.nan)
    number = scorecard.summary([[np.arange(5.0)]], [[nothing]])
    assert "difference" not in number and scorecard.against_reference(number) == ""
    assert scorecard.summary([[nothing]], None) is None


def test_a_fit_that_diverges_is_said(models, monkeypatch):
    x = iter(lambda: [torch.randn(1024, 32)], None)
    monkeypatch.setattr(scorecard, "shuffled_inputs", lambda *arguments: x)
    monkeypatch.setattr(scorecard, "sae_tokens", 20 * 1024)
    monkeypatch.setattr(scorecard, "sae_lr", 1e30)
    with pytest.raises(ValueError, match="sae_lr=1e[+]30: the fit of an SAE diverged"):
        scorecard.fitted_saes(models[1], None, [(0, "TopK")], 64, 4, seed=0)


def test_spread_is_over_training_seeds_and_not_over_saes():
    runs = [[np.full(3, 1.0), np.full(3, 3.0)], [np.full(3, 4.0), np.full(3, 4.0)]]
    number = scorecard.summary(runs, None)
    assert number["mean"] == 3 and number["over_seeds"] == pytest.approx(math.sqrt(2))
    assert number["interval"] == [3, 3]


def test_the_picture_is_svg_with_every_row(monkeypatch):
    rows = list(card_rows(probing_result(1, False), probing_result(1, True), monkeypatch).values())
    text = scorecard.chart(rows)
    tree = ElementTree.fromstring(text)
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Cayley", scorecard.REFERENCE} <= set(texts)
    assert "prefers-color-scheme:dark" in text


# -----------------------------------------------------------------------------
# post-hoc SAEs


@pytest.mark.parametrize("kind", ["TopK", "Matryoshka"])
def test_a_planted_dictionary_is_recovered(kind):
    torch.manual_seed(0)
    d, n_features, k = 24, 48, 3
    atoms = F.normalize(torch.randn(n_features, d), dim=1)

    def batches():
        while True:
            ids = torch.rand(512, n_features).topk(k).indices
            weights = 1 + torch.rand(512, k)
            yield [(weights[..., None] * atoms[ids]).sum(1)]

    prefixes = (12, 24) if kind == "Matryoshka" else ()
    sae = topk_sae.TopKSAE(d, n_features, k, prefixes)
    topk_sae.fit_saes([sae], batches(), 700, [3e-3])
    cosines = F.normalize(sae.W_dec, dim=1) @ atoms.T
    assert cosines.max(0).values.mean() > 0.9
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(n_features), atol=1e-5)


def test_a_spliced_sae_that_is_the_identity_changes_nothing(models):
    dense = models[1]
    sae = topk_sae.TopKSAE(32, 64, 64)
    both_signs = torch.cat([torch.eye(32), -torch.eye(32)])
    for rows in (sae.W_enc, sae.W_dec):
        rows.data.copy_(both_signs)
    windows = idx_of(6, 17)
    plain = scorecard.losses(dense, windows, {}, dense, 4)
    spliced = scorecard.losses(dense, windows, {0: sae, 1: sae}, dense, 4)
    torch.testing.assert_close(spliced, plain, rtol=1e-5, atol=1e-6)
    sae.W_dec.data[0] = 0
    broken = scorecard.losses(dense, windows, {1: sae}, dense, 4)
    assert (broken[:, 1] > 1e-7).all()  # the KL sees it
    again = scorecard.losses(dense, windows, {}, dense, 4)  # and the model is as it was
    assert torch.equal(again, plain)


# -----------------------------------------------------------------------------
# causal


@pytest.mark.parametrize("kl_of", [
    lambda a: 0.003 * a**2,
    lambda a: 50 * a**2,
    lambda a: 0.2 * math.tanh(a / 1000),
    lambda a: 0.0 if a < 3 else (a - 3) ** 4,
], ids=["flat", "steep", "saturating", "late"])
def test_the_search_hits_its_kl(kl_of):
    assert kl_of(scorecard.match_kl(kl_of)) == pytest.approx(0.1, rel=0.02)


def test_the_search_gives_up_where_the_kl_is_out_of_reach():
    assert scorecard.match_kl(lambda a: 0.05 * math.tanh(a)) is None
    assert scorecard.match_kl(lambda a: 0.0) is None


def stage_of(model, layer=0):
    fit, score = idx_of(4, 16), idx_of(4, 16)
    rates = torch.rand(320, 2, generator=torch.Generator().manual_seed(0))
    next_labels = np.random.default_rng(1).random((4, 16, 2)) < 0.3
    return scorecard.Stage(model, layer, fit, score, rates, next_labels)


def test_the_rest_of_a_model_is_the_model(models):
    for model in models:
        idx = idx_of(3, 16)
        site, logits = scorecard.site_of(model, 1, idx)
        rest = scorecard.logits_after(model, 1, site.residual, site.mlp_input)
        torch.testing.assert_close(rest, logits)
        torch.testing.assert_close(logits, model(torch.from_numpy(idx), n_logits=0)[0])


def test_the_gradient_direction_steers_and_beats_others(models):
    stage = stage_of(models[1])
    for label, effect in enumerate(stage.gradient_effects):
        assert effect.mean() > 0
        others = [stage.steer(direction)[:, label].mean() for direction in torch.eye(32)[:8]]
        assert effect.mean() > max(others)


def test_a_feature_that_writes_the_gradient_is_chosen_by_its_effect(models):
    """Feature 5 is the first label's gradient, the other way round; 7 half the second one's."""
    stage = stage_of(models[1])
    arm = scorecard.coordinates_arm(models[1])
    arm.atoms = 1e-3 * arm.atoms
    arm.atoms[5] = -3 * stage.gradients[0]
    arm.atoms[7] = stage.gradients[1] / 2
    probes = [probing.Probe(0, 1, 0.0), probing.Probe(1, 1, 0.0)]
    scores = scorecard.causal_scores(arm, stage, probes)
    torch.testing.assert_close(scores["by_effect"], scores["gradient"])
    assert (scores["steer"].mean(0) < scores["gradient"].mean(0)).all()


def test_taking_a_feature_out_is_the_edit_that_ablates_it(models):
    cayley = models[0]
    stage = stage_of(cayley)
    sae = cayley.blocks[0].sae
    arm = scorecard.cayley_arm("Cayley", cayley, sae)
    table = scorecard.encoded(arm, stage.site.x.flatten(0, 1))
    feature = int(table.counts()[32:].argmax()) + 32  # a leaf
    contribution = torch.from_numpy(table.column(feature)).view(4, 16, 1) * arm.atoms[feature]
    sums = stage.ablate(contribution, 1)
    sae.edits = [Edit(1, feature - 32, 0.0, 0.0)]
    try:
        _, logits = scorecard.site_of(cayley, 0, idx_of(4, 16))
    finally:
        sae.edits = []
    fall = (stage.before - stage.label_probabilities(logits))[..., 1]
    inside = stage.next_labels[..., 1]
    torch.testing.assert_close(sums[:, 0], (fall * inside).sum(1), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(sums[:, 3], (fall.abs() * ~inside).sum(1), rtol=1e-3, atol=1e-7)
    assert sums[:, 2].sum() == inside.sum() and sums[:, 1].sum() > 0


# -----------------------------------------------------------------------------
# rows


def test_untrained_codes_are_standardised_by_what_they_read(models):
    cayley, dense = models
    x = torch.randn(500, 32) @ torch.randn(32, 32) + 3
    arm = scorecard.untrained_arm(dense, cayley.config, x)
    table = scorecard.encoded(arm, x)
    raw = x @ arm.atoms.T
    z = (raw - raw.mean(0)) / raw.std(0, correction=0)
    counts = table.counts()
    assert counts.sum() == 500 * 10  # 4 and 6 active
    for feature in (0, 31, 32 + int(counts[32:].argmax())):
        rows, values = table.feature(feature)
        np.testing.assert_allclose(values, z[rows, feature], rtol=1e-3, atol=1e-3)


def test_levels_are_parts_of_the_whole(models):
    cayley = models[0]
    sae = cayley.blocks[1].sae
    x = torch.randn(100, 32)
    whole = scorecard.encoded(scorecard.cayley_arm("a", cayley, sae), x)
    for level, where in enumerate(sae.level_slices):
        arm = scorecard.cayley_arm("b", cayley, sae, level)
        part = scorecard.encoded(arm, x)
        np.testing.assert_array_equal(part.counts(), whole.counts()[where])
        assert arm.atoms.shape == (2 ** sae.levels[level].n, 32)


# -----------------------------------------------------------------------------
# absorption


def test_absorption_of_one_token_by_hand():
    cosines = np.array([0.9, 0.5, 0.3, 0.05, 0.0])

    def at(codes, projection, main=(0,)):
        parts = np.array(codes) * cosines
        return probing.word_absorption(parts, cosines, np.array(main), projection)

    assert at([1, 0, 0, 0, 0], 0.9) == (0.0, False)  # the main feature does it all
    assert at([0, 1, 1, 0, 0], 1.0) == (1.0, True)  # it is silent, and the absorber has 0.5
    assert at([0, 0, 1, 0, 0], 1.0) == (0.0, False)  # 0.3 is below 0.4 of the projection
    fraction, full = at([0.5, 1, 0, 0, 0], 1.0)  # main 0.45, absorber 0.5
    assert fraction == pytest.approx(0.5 / 0.95) and not full
    assert at([0, 0, 0, 10, 0], 1.0) == (0.0, True)  # cosine 0.05: full but no fraction


def test_absorption_of_a_planted_hierarchy():
    rng = np.random.default_rng(0)
    d, n = 16, 3000
    letters = rng.integers(0, 4, n)
    kind = rng.random(n) < 0.04  # few words of a letter have a feature of their own
    atoms = torch.eye(d)[:8].clone()
    atoms[4:] = F.normalize(torch.eye(d)[:4] + torch.eye(d)[4:8], dim=1)  # the letter and the kind

    def table(absorbed):
        codes = np.zeros((n, 8), dtype=np.float32)
        codes[np.arange(n), letters] = 2
        codes[kind, :4] = 0 if absorbed else codes[kind, :4]
        codes[kind, 4 + letters[kind]] = 3
        ids = np.broadcast_to(np.arange(8), codes.shape)
        return probing.Table(ids, codes, 8), torch.from_numpy(codes) @ atoms

    scores = {}
    for absorbed in (True, False):
        codes, x = table(absorbed)
        scores[absorbed] = probing.absorption(atoms, codes, codes, x, x, letters, letters)
    for score in scores.values():
        assert score["letters"] == 4 and score["probe_f1"] > 0.95
    assert scores[True]["full"] == pytest.approx(kind.mean(), abs=0.01)
    assert scores[True]["fraction"] == pytest.approx(kind.mean(), abs=0.01)
    assert scores[False]["full"] == 0 and scores[False]["fraction"] < scores[True]["fraction"]


# -----------------------------------------------------------------------------
# the command


def run_scorecard(cayley, twin, out_dir, **settings):
    settings = {**TINY_CARD, "ckpt": cayley, "dense": twin, "out_dir": out_dir, **settings}
    return run_script("-m", "tools.scorecard", *arguments(settings))


def test_the_command_goes_on_where_it_stopped(trained, twin, tmp_path):
    out_dir = tmp_path / "card"
    result = run_scorecard(trained, twin, out_dir)
    assert result.returncode == 0, result.stderr
    for name in ("Cayley, level 1", "TopK SAE on Cayley's input", "random model", "always yes"):
        assert f"| {name} |" in result.stdout
    card = json.loads((out_dir / "scorecard.json").read_text())
    losses = {row["name"]: row for row in card["losses"]}
    assert max(len(line) for line in result.stdout.splitlines() if line.startswith("|")) <= 100
    assert "Layer 1, Cayley beside the TopK SAE on dense: undecided in" in result.stdout
    assert card["header"]["intervals"].startswith("over 2 documents")  # which tell nobody apart
    assert losses["dense"]["minus_dense"] == 0 and losses["dense"]["kl"] == pytest.approx(0)
    assert losses["dense, TopK SAE in all layers"]["kl"] > 0
    ElementTree.parse(out_dir / "scorecard.svg")
    with open(out_dir / "scorecard.csv", newline="") as file:
        table = {(row["row"], row["number"]): row["mean"] for row in csv.DictReader(file)}
    f1 = next(row for row in card["rows"] if row["name"] == "Cayley")["five_f1"]["mean"]
    assert float(table["Cayley", "five_f1"]) == f1
    assert float(table["Cayley", "loss"]) == losses["Cayley"]["loss"]

    parts = sorted((out_dir / "parts").glob("*/*.pt"))
    kept, lost = parts[::2], parts[1::2]
    times = [path.stat().st_mtime_ns for path in kept]
    for path in lost[1:]:
        path.unlink()
    content = bytearray(lost[0].read_bytes())
    content[len(content) // 2] ^= 1
    lost[0].write_bytes(content)  # a damaged part is computed again
    again = run_scorecard(trained, twin, out_dir)
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert all(path.exists() for path in lost)
    assert json.loads((out_dir / "scorecard.json").read_text()) == card
    assert again.stdout == result.stdout


def test_labels_of_a_file(data_dir, tmp_path):
    from data import Windows, get_tokenizer
    n = 2000
    values = {}
    for split in ("train", "val"):
        ids = scorecard.read_stream(Windows(str(data_dir), split, 32), n)[:n]
        values[split] = np.stack([ids == ord("e"), ids == ord(" ")], 1).astype(np.int8)
    values["val"][:500] = labels.UNKNOWN
    path = tmp_path / "mine.npz"
    np.savez(path, names=["e", "space"], **values)
    scorecard.labels = str(path)
    try:
        for split in ("train", "val"):
            windows = Windows(str(data_dir), split, 32)
            names, found = scorecard.labelled(windows, split, get_tokenizer("bytes"), n, n,
                                              np.random.default_rng(0))
            assert names == ["e", "space"]
            np.testing.assert_array_equal(found.labels[..., 0], found.windows == ord("e"))
            assert len(found.windows) == ((n - 1) // 32 if split == "train" else (n - 513) // 32)
    finally:
        scorecard.labels = ""


@pytest.mark.parametrize("arrays, message", [
    (dict(names=["a"], train=[[0.7]]), "train must hold the integers 1, 0 and -1, not .*0.7"),
    (dict(names=["a"], train=[[1], [2]]), "train must hold the integers 1, 0 and -1, not .*2"),
    (dict(names=["a", "a"], train=[[1, 0]]), "different labels"),
    (dict(names=["a"], train=[1, 0]), r"train is \(2,\), it must be \(tokens, 1\)"),
    (dict(names="a", train=[[1]]), "labels must be an .npz"),
    (dict(names=["a"]), "labels must be an .npz"),
])
def test_labels_of_a_file_that_make_no_sense(tmp_path, arrays, message):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
        scorecard.user_labels(str(path), "train", 10)


def test_labels_that_are_no_npz(tmp_path):
    path = tmp_path / "mine.npz"
    for content in (b"", b"text", b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="labels must be an .npz"):
            scorecard.user_labels(str(path), "train", 10)


@pytest.mark.parametrize("settings, message", [
    (dict(ckpt="a", dense=""), "give the dense twin's checkpoint"),
    (dict(ckpt="a", dense="a,b"), "1 checkpoints in --ckpt and 2 in --dense"),
    (dict(dense="a", sae_lr=math.nan), "sae_lr=nan: must be above 0"),
    (dict(dense="a", sae_lr=math.inf), "sae_lr=inf: must be above 0 and finite"),
    (dict(ckpt="a,b", dense="c,c"), "dense='c,c': write different checkpoints"),
    (dict(ckpt="a,", dense="c"), "ckpt='a,': write different checkpoints"),
])
def test_impossible_settings(monkeypatch, settings, message):
    for key, value in settings.items():
        monkeypatch.setattr(scorecard, key, value)
    with pytest.raises(ValueError, match=message):
        scorecard.check_settings()


@pytest.mark.parametrize("text", ["2", "-1", "one"])
def test_layers_that_are_not_there(monkeypatch, text):
    monkeypatch.setattr(scorecard, "layers", text)
    with pytest.raises(ValueError, match=f"layers='{text}'"):
        scorecard.chosen_layers(2)


@pytest.mark.parametrize("settings, message", [
    ({}, "no such checkpoint"),
    ({"seeds": 0}, "seeds=0: must be at least 1"),
])
def test_a_mistake_is_one_line(tmp_path, settings, message):
    nothing = tmp_path / "nothing"
    result = run_scorecard(nothing, nothing, tmp_path / "card", **settings)
    assert result.returncode == 1 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_checkpoints_that_make_no_pair(trained, twin, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="it has no CayleySAE"):
        scorecard.load_pair(str(twin), str(twin), cpu)
    with pytest.raises(ValueError, match="it is no dense model"):
        scorecard.load_pair(str(trained), str(trained), cpu)
    (tmp_path / "copy.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    monkeypatch.setattr(scorecard, "ckpt", f"{trained},{tmp_path / 'copy.pt'}")
    monkeypatch.setattr(scorecard, "dense", f"{twin},{twin}")
    with pytest.raises(ValueError, match="ckpt=.*two of these files are the same"):
        scorecard.load_pairs(cpu)
    checkpoint = torch.load(twin / "ckpt.pt", weights_only=True)
    torch.save({**checkpoint, "data": "other"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="were trained on different data"):
        scorecard.load_pair(str(trained), str(tmp_path / "other.pt"), cpu)


# -----------------------------------------------------------------------------
# records/scorecard


def run_record(name, *words, **settings):
    settings = arguments({**TINY_CARD, **settings})
    return run_script(ROOT / "records" / "scorecard" / name, *words, *settings)


def test_a_table_of_variants(trained, twin):
    result = run_record("variants.py", f"mine: {trained}", dense=twin)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert [(row["variant"], row["row"]) for row in rows] == [
        ("mine", "Cayley"), ("mine", "Cayley, level 0"), ("mine", "Cayley, level 1"),
        ("10 of 288", "TopK SAE on dense"),
    ]
    dense_losses = {round(float(row["val_loss"]) - float(row["minus_dense"]), 3) for row in rows}
    assert len(dense_losses) == 1
    assert all(0 < float(row["one_f1"]) <= 1 for row in rows)


@pytest.mark.parametrize("name, words, settings, message", [
    ("variants.py", [], {}, "name: cayley.pt"),
    ("variants.py", ["cayley.pt"], {}, "name: cayley.pt"),
    ("variants.py", ["mine: {run}"], {"layers": "0,1"}, "layers='0,1': name one layer"),
    ("variants.py", ["mine: {run}"], {"dense": ""}, "dense=''"),
    ("sae_lr.py", [], {}, "tokens,lr,batch"),
    ("sae_lr.py", ["20000,1e-3,0"], {}, "batch=0"),
    ("sae_lr.py", ["20000,-1,64"], {}, "sae_lr=-1.0"),
    ("sae_lr.py", ["20,1e-3,64"], {}, "sae_tokens=20"),
])
def test_the_record_s_scripts_refuse(trained, twin, name, words, settings, message):
    words = [word.format(run=trained) for word in words]
    result = run_record(name, *words, **{"ckpt": trained, "dense": twin, **settings})
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1
