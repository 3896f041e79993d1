"""features.py: what it counts is what the model does, and the site works in a real browser."""
import json
import os
import re
import shlex
import shutil
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments, run_here, run_script

from data import get_tokenizer
from model import GPT, GPTConfig
from tools import features


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=16,
        vocab_size=320,
        n_layer=2,
        n_head=2,
        n_embd=32,
        cayley_levels="5,4,0;8,6,16",
    )
    return GPT(config).eval()


def test_best_contexts_are_the_largest_one_a_window():
    rng = np.random.default_rng(0)
    for n_offered in (1, 5, 30, 120):
        refs = np.sort(rng.permutation(200)[:n_offered])
        keys = rng.random(n_offered, dtype=np.float32)
        best = {}
        for key, ref in zip(keys, refs):
            if key > best.get(ref // 4, (-1, 0))[0]:
                best[ref // 4] = key, ref
        expected = sorted(best.values(), reverse=True)[:3]
        found = features.best_in_windows(keys, refs // 4, 3)
        assert refs[found].tolist() == [ref for _, ref in expected]
        np.testing.assert_array_equal(keys[found], np.float32([key for key, _ in expected]))


def dense_codes(model, windows):
    """Per layer and level the codes of all features, (windows, T, features)."""
    layers = []
    for codes in model.run_with_codes(torch.from_numpy(windows))[1]:
        layers.append([])
        for c, level in zip(codes, model.saes()[0].levels):
            zeros = torch.zeros(*windows.shape, 2**level.n)
            layers[-1].append(zeros.scatter(-1, c.ids, c.values).numpy())
    return layers


@torch.no_grad()
def test_counts_contexts_and_neighbours_are_those_of_the_codes(model):
    windows = np.random.default_rng(0).integers(0, 257, (20, 16))
    readers, _ = features.read(model, windows, np.full(257, 5))
    for row, per_level in zip(readers, dense_codes(model, windows)):
        flat = [(codes != 0).reshape(windows.size, -1) for codes in per_level]
        for reader, codes in zip(row, per_level):
            np.testing.assert_array_equal(reader.counts, (codes != 0).sum((0, 1)))
            sums = reader.steer * reader.counts
            np.testing.assert_allclose(sums, codes.sum((0, 1)), rtol=1e-4)
            np.testing.assert_array_equal(reader.histogram.sum(1), reader.counts)
            per_window = codes.max(1)  # (windows, features)
            np.testing.assert_allclose(reader.range[:, 1].clip(0), per_window.max(0), rtol=1e-5)
            active, active_codes = reader.active()
            near = list(zip(*[features.neighbours(reader, other, active, windows.size)
                              for other in row]))
            for feature in np.flatnonzero(reader.counts)[::7]:
                window, position = divmod(reader.contexts[feature, 0], 16)
                largest = per_window[:, feature].max()
                assert codes[window, position, feature] == pytest.approx(largest)
                start, end = reader.start[feature, 0], reader.end[feature, 0]
                tokens, shades = active[feature], active_codes[feature]
                told = features.context(reader, feature, 0, tokens, shades)
                assert told[:4] == [window, position, start - 16 * window, end - 16 * window]
                around = codes[window, start - 16 * window:end - 16 * window, feature]
                at = np.flatnonzero(around) + start - 16 * window
                np.testing.assert_array_equal(told[4][::2], at)
                np.testing.assert_allclose(told[4][1::2], around[around != 0], atol=0.005)
                inside = (tokens >= start) & (tokens < end)
                np.testing.assert_allclose(shades[inside], around[around != 0], rtol=1e-5)
                window, position = divmod(reader.sample[feature, 0], 16)
                assert reader.sample_codes[feature, 0] == pytest.approx(
                    codes[window, position, feature]
                )
                values = codes[..., feature][codes[..., feature] != 0]
                if len(values) > 1:
                    expected, _ = np.histogram(values.astype(np.float64), 20)
                    assert np.abs(reader.histogram[feature] - expected).sum() <= 2  # at edges
                for other, found in zip(row, near[feature]):
                    check_neighbours(reader, feature, other, flat, found)


def check_neighbours(reader, feature, other, flat, found):
    """Rows of neighbours against Pearson's correlation of columns of 0 and 1."""
    own = flat[reader.level][:, feature]
    others = flat[other.level]
    both = (own[:, None] & others).sum(0)
    varies = (others.std(0) > 0) & (own.std() > 0)
    expected = np.full(others.shape[1], -1.0)
    for i in np.flatnonzero(varies):
        expected[i] = np.corrcoef(own, others[:, i])[0, 1]
    if other is reader:
        expected[feature] = -1
    best = np.sort(expected)[::-1][:features.N_NEAR]
    told = [correlation for *_, correlation in found]
    np.testing.assert_allclose(told, best[best > 0], atol=1e-3)
    for level, i, together, correlation in found:
        assert (level, together) == (other.level, both[i])
        assert correlation == pytest.approx(expected[i], abs=1e-3)


def test_contexts_have_their_characters_where_their_window_does(monkeypatch):
    monkeypatch.setattr(features, "BEFORE", 40)
    monkeypatch.setattr(features, "AFTER", 20)
    rng = np.random.default_rng(0)
    T = 64
    lengths = rng.choice([0, 1, 1, 2, 9], 5 * T)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    refs = np.arange(5 * T)
    start, end = features.context_bounds(ends, refs, T)
    window = refs // T * T
    assert ((start >= window) & (start <= refs) & (end > refs) & (end <= window + T)).all()
    characters = ends[end] - ends[start]
    assert (characters >= np.minimum(60, ends[window + T] - ends[window])).all()
    assert (characters <= 60 + 3 * 9).all(), "the token's own and what those at the ends need"


def test_contexts_at_quantiles_are_those_of_the_sorted_codes():
    codes = np.array([[5.0, 1, 4, 2, 3, 9, 8, 7, 6, 0], [3, 2, 1, 0, 0, 0, 0, 0, 0, 0]])
    present = np.array([[True] * 10, [True] * 2 + [False] * 8])
    slots = features.quantile_slots(codes, present)
    assert codes[0, slots[0]].tolist() == [9, 7, 5, 3, 1]
    assert sorted(slots[1][slots[1] >= 0].tolist()) == [0, 1], "each once"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use in jvp
def test_logit_effects_are_the_derivative_where_gelu_is_at_its_slopes(model):
    """
    On a single token the mean slopes are that token's: the effect is the derivative through the
    block's MLP.
    """
    _, slopes = features.read(model, np.array([[65]]), np.ones(257, dtype=int))
    _, codes = model.run_with_codes(torch.tensor([[65]]))
    mlp_input = model.blocks[1].sae.decode(codes[1])[0]
    atom = model.blocks[1].sae.atoms(1, [77])
    written = torch.func.jvp(model.blocks[1].mlp, (mlp_input,), (atom,))[1]
    logits = ((written * model.ln_f.weight) @ model.wte.weight[:257].T)[0]
    effects = features.first_order(model, 1, 1, [77], slopes[1], torch.arange(257))
    ids, values = features.extremes(effects, torch.arange(257))
    np.testing.assert_allclose(values[0], logits[ids[0]].detach(), rtol=1e-3, atol=1e-6)
    assert ids[0, 0] == logits.argmax() and ids[0, -1] == logits.argmin()


@torch.no_grad()
def run_steered(model, idx, layer, window, position, change):
    """Log-probabilities and each layer's output at a token, with its MLP input changed there."""
    def steer(module, inputs, output):
        output = output.clone()
        output[window, position] += change
        return output

    after = []
    hooks = [model.blocks[layer].sae.register_forward_hook(steer)]
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda module, inputs, out: after.append(out)))
    logits, _ = model(idx, n_logits=0)
    for hook in hooks:
        hook.remove()
    outputs = torch.stack([x[window, position] for x in after])
    return logits[window, position, :257].log_softmax(-1), outputs


@torch.no_grad()
def test_measured_effects_are_those_of_the_whole_model(model, monkeypatch):
    """At all active tokens of some features, one forward of the whole model for each."""
    monkeypatch.setattr(features, "MEASURED_TOKENS", 10**6)  # all of them
    monkeypatch.setattr(features, "ROWS", 7)
    windows = np.random.default_rng(0).integers(0, 257, (11, 16))
    readers, _ = features.read(model, windows, np.ones(257, dtype=int))
    features.measure(model, windows, readers, 257)
    idx = torch.from_numpy(windows)
    for layer, level, rank in ((0, 1, 0), (1, 0, 3), (0, 0, 20)):
        reader = readers[layer][level]
        feature = int(np.argsort(-reader.counts)[rank])
        codes = dense_codes(model, windows)[layer][level][..., feature]
        change = codes.sum() / (codes != 0).sum()
        change = change * model.blocks[layer].sae.atoms(level, [feature])[0]
        changes = []
        lengths = []
        for window, position in np.argwhere(codes != 0):
            old, before = run_steered(model, idx, layer, window, position, 0)
            new, after = run_steered(model, idx, layer, window, position, change)
            changes.append(new - old)
            lengths.append((after - before).norm(dim=-1)[layer:])
        slot = reader.effects.slots[feature]
        assert reader.effects.tokens[slot] == len(changes)
        expected = torch.stack(changes).mean(0)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(reader.effects.changes[slot], expected, rtol=1e-3, atol=1e-5)
        expected = torch.stack(lengths).mean(0)
        torch.testing.assert_close(reader.effects.lengths[slot], expected, rtol=1e-3, atol=1e-5)


def test_captions_say_what_contexts_have_in_common():
    encoding = get_tokenizer("bytes")
    text = b"return qx;\nqy = 17\nif qz: return\nwhile qv: qu A+B-C*D/E.F,G\n" * 3
    windows = np.frombuffer(text, dtype=np.uint8).astype(np.int64).reshape(3, -1)
    candidates, words = features.caption_candidates(windows, encoding)
    flat = windows.ravel()
    where = {
        "token": np.flatnonzero(flat == ord("q")),
        "after": np.flatnonzero(flat == ord("q")) + 1,
        "before": np.flatnonzero(flat == ord(":")) - 1,
        "line": np.flatnonzero(flat == ord("\n"))[[0, 1, 2, 4, 5, 6]] + 2,  # inside a window
        "word": np.concatenate([i + np.arange(6) for i in np.flatnonzero(flat == ord("r"))[:1]]),
        "mixed": np.flatnonzero(flat == ord("A"))[0] + np.arange(0, 14, 2),
    }
    refs = np.full((7, 20), -1)
    for row, found in enumerate(where.values()):
        refs[row, :len(found[:20])] = found[:20]
    kinds, says, shares = features.captions(refs, candidates)
    told = [features.CAPTIONS[kind] for kind in kinds[:6]]
    assert told == ["token", "after", "before", "line", "word", "mixed"]
    assert (says[0], says[1], says[2]) == (ord("q"), ord("q"), ord(":"))
    assert says[3] == 1, "second in line"
    assert words[says[4]] == "return"
    assert (shares[[0, 1, 2, 3, 4]] == 100).all() and shares[5] < 100 * features.LEAST_SHARE
    assert kinds[6] == -1, "never active"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_a_text_of_any_length_is_read_to_its_end(model, tmp_path, length):
    """Each token's codes are those of a window that holds the tokens before it."""
    encoding = get_tokenizer("bytes")
    ids = np.random.default_rng(length).integers(0, 256, length).tolist()
    features.write_text_page(str(tmp_path), model, encoding, ids)
    pages = []
    for layer in (0, 1):
        pages.append(features.saved(tmp_path, f"text/{layer}"))
    assert len(pages[0]) == len(pages[1]) == length
    read = [encoding.eot_token] + ids
    for i in range(length):
        start = max(0, (i + 1) // 8 * 8 - 8)  # windows begin half a block of 16 apart
        _, codes = model.run_with_codes(torch.tensor([read[start:i + 2]]))
        for layer, page in enumerate(pages):
            assert sorted(page[i][1][0]) == sorted(codes[layer][1].ids[0, -1].tolist())


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ('{"0.1": "x"}', "'0.1'"),
        ('{"2.0.0": "x"}', "'2.0.0'"),
        ('{"0.1.256": "x"}', "'0.1.256'"),
        ('{"0.1.255": 3}', "0.1.255 is 3"),
    ],
)
def test_labels_by_hand_that_fit_no_feature_are_refused(model, tmp_path, text, words):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        features.read_labels(tmp_path / "labels.json", model.saes())


# -----------------------------------------------------------------------------
# in a browser, by the WebDriver protocol

TEXT = "def main(): <b>\n    return 'é'"  # é is two tokens of one character


@pytest.fixture(scope="module")
def site(trained, data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    (directory / "text.txt").write_text(TEXT + "left out")
    (directory / "labels.json").write_text(json.dumps({"1.0.3": "a <b> by hand"}))
    settings = {
        "ckpt": os.path.relpath(trained),
        "out_dir": directory / "site",
        "tokens": 20000,
        "text": directory / "text.txt",
        "text_tokens": len(TEXT.encode()),
        "labels": directory / "labels.json",
        "n_measured": 16,
        "device": "cpu",
    }
    result = run_script("-m", "tools.features", *arguments(settings))
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr, "a log has no bars"
    assert "20,000 of " in result.stdout, "it says how much is read"
    assert sorted(os.listdir(directory / "site")) == ["data", "index.html"]
    assert f"its first {len(TEXT.encode())} of {len(TEXT.encode()) + 8} tokens" in result.stdout
    return directory / "site"


def test_the_site_in_a_browser(browser, site):
    table = features.saved(site, "1/1/table")
    most = int(np.argmax(table["count"]))
    browser.go(f"file://{site}/index.html#/1/1")
    rows = "[...document.querySelectorAll('tbody tr')].map(row => +row.dataset.id)"
    assert browser.wait(rows)[0] == most, "sorted by frequency at first"
    browser.run("[...document.querySelectorAll('th button')][0].click()")
    browser.run("[...document.querySelectorAll('th button')][0].click()")
    assert browser.wait(rows)[:3] == [0, 1, 2], "and then by number"

    browser.press("/")  # the search has the focus
    for key in str(most):
        browser.press(key)
    found = f"document.activeElement.id == 'search' && {rows}.length < 50 && {rows}"
    assert most in browser.wait(found)
    browser.run(f"document.querySelector('tr[data-id=\"{most}\"] a').focus()")
    browser.press("\ue007")  # Enter
    assert browser.wait(f"document.querySelector('h1').innerText == 'Feature 1.1.{most}'")
    n_contexts = features.n_top + len(features.QUANTILES)
    assert browser.run("document.querySelectorAll('.context').length") == n_contexts
    assert browser.run("document.querySelectorAll('.context u').length") == n_contexts
    shaded = browser.run("document.querySelectorAll('.context [style]').length")
    assert shaded >= features.n_top, "tokens are shaded"
    assert browser.run("document.querySelectorAll('section').length") == 3
    assert "measured" in browser.run("document.querySelector('section').innerText")
    links = browser.run("[...document.querySelectorAll('main a')].map(a => a.hash)")
    assert f"#/1/0/{most >> 3}" in links, "its parent's page"
    browser.press("\ue00c")  # Escape
    assert browser.wait("document.querySelector('h1').innerText == 'Layer 1, level 1'")

    browser.run("location.hash = '#/9/9'")
    told = "document.querySelector('main').innerText.includes('no feature')"
    assert "layers 0 to 1" in browser.wait(f"{told} && document.body.innerText")
    assert browser.errors() == []


def test_the_page_of_a_text(browser, site):
    browser.go(f"file://{site}/index.html#/text")
    pieces = "document.querySelectorAll('.tokens [role=button]')"
    assert browser.wait(f"{pieces}.length") == len(TEXT), "bytes of one character are together"
    shown = browser.run("document.querySelector('.tokens').textContent")
    assert shown == TEXT, "text is never HTML"
    assert "the other 8 are left out" in browser.run("document.body.innerText")
    features_shown = "document.querySelectorAll('.tree li').length"
    assert browser.run(features_shown) == 4 + 6, "all active features of the token, once each"
    browser.press("\ue014")  # to the right
    assert browser.wait("location.hash == '#/text/0/1'")
    assert browser.wait(features_shown) == 4 + 6

    browser.run("document.querySelector('.node button').click()")
    browser.wait("location.hash.split('/').length == 5 && document.querySelector('.note')")
    key = browser.run("location.hash.split('/')[4]")
    codes = features.saved(site, "text/0")
    where = [key in {f"0.0.{i}" for i in token[0][0]} for token in codes]
    note = browser.run("document.querySelector('.note').innerText")
    assert f"fires at {sum(where)} of {len(where)} tokens" in note
    marked = browser.run(f"[...{pieces}].map(piece => piece.style.background != '')")
    assert marked[:len(TEXT) - 2] == where[:len(TEXT) - 2]
    browser.run("document.querySelectorAll('.chips a')[1].click()")
    both = "document.querySelectorAll('.columns h2').length == 2"
    assert browser.wait(f"{both} && {features_shown}") == 2 * (4 + 6)
    assert browser.errors() == []


def test_the_front_page_finds_features_by_caption_token_and_label(browser, site):
    table = features.saved(site, "0/1/table")
    browser.go(f"file://{site}/index.html")
    assert browser.wait("document.querySelectorAll('.cards dt').length") == 10
    assert browser.run("document.querySelectorAll('.bars').length") == 2, "a histogram a level"
    browser.press("/")
    for key in "by hand":
        browser.press(key)
    results = "[...document.querySelectorAll('tbody tr td a')].map(a => a.hash)"
    assert browser.wait(f"document.querySelector('#found') && {results}") == ["#/1/0/3"]
    assert browser.run("document.querySelector('.byhand').innerText") == "a <b> by hand"

    kinds = np.array(table["kind"])
    says = np.array(table["says"])
    letter = next(i for i in says[kinds == 1] if chr(i).isalpha())
    same = np.flatnonzero((kinds == 1) & np.isin(says, [letter, letter ^ 32]))  # and its capital
    browser.run(f"location.hash = '#/search/after%20{chr(letter)}'")
    asked = f"document.title == 'Search: after {chr(letter)}'"
    found = browser.wait(f"{asked} && {results}.length && {results}")
    assert {link for link in found if link.startswith("#/0/1/")} == {f"#/0/1/{i}" for i in same}
    browser.run("location.hash = '#/random'")
    browser.wait("/^#.[01].[01].[0-9]+$/.test(location.hash)")
    browser.wait("document.querySelector('h1').innerText.startsWith('Feature')")
    context = "document.querySelector('.context')"
    text = browser.run(f"{context}.querySelector('u').innerText")
    browser.run(f"{context}.click()")
    browser.wait("document.querySelector('h1').innerText.startsWith('Window')")
    assert browser.run("document.querySelector('mark').innerText") in (text, "\n")
    assert browser.errors() == []


HEADING = "document.querySelector('h1')?.innerText"
RESULTS = "[...document.querySelectorAll('tbody tr td a')].map(a => a.hash)"


def type_text(browser, text):
    for key in text:
        browser.press(key)


def test_one_returns_to_where_one_came_from(browser, site):
    browser.go("about:blank")
    browser.go(f"file://{site}/index.html#/0/0/3")
    browser.wait(f"{HEADING} == 'Feature 0.0.3'")
    browser.press("\ue00c")  # Escape
    assert browser.wait(f"{HEADING} == 'Layer 0, level 0'"), "up, as there is no page before it"
    browser.press("\ue00c")
    assert browser.wait(f"{HEADING} == 'Features of a sparse GPT'")

    browser.run("location.hash = '#/1/1/37'")
    browser.wait(f"{HEADING} == 'Feature 1.1.37'")
    browser.press("/")
    type_text(browser, "by hand")
    browser.wait(f"document.title == 'Search: by hand' && {RESULTS}.length == 1")
    browser.press("\ue00c")
    assert browser.wait(f"{HEADING} == 'Feature 1.1.37'"), "typing has left the page before it"
    assert browser.run("document.getElementById('find').value") == ""

    browser.press("/")
    type_text(browser, "by hand")
    browser.wait(f"document.title == 'Search: by hand' && {RESULTS}.length == 1")
    browser.press("\ue007")  # Enter takes a single hit
    assert browser.wait(f"{HEADING} == 'Feature 1.0.3'")
    browser.press("\ue00c")
    assert browser.wait("document.title == 'Search: by hand'")
    browser.press("\ue00c")
    assert browser.wait(f"{HEADING} == 'Feature 1.1.37'")
    browser.press("\ue00c")
    assert browser.wait(f"{HEADING} == 'Features of a sparse GPT'")
    assert browser.errors() == []


def test_a_context_opens_and_is_in_the_file_of_its_feature(browser, site, trained, data_dir):
    table = features.saved(site, "1/1/table")
    most = int(np.argmax(table["count"]))
    browser.emulate("light", (360, 700))
    browser.go(f"file://{site}/index.html#/1/1/{most}")
    browser.wait(f"{HEADING} == 'Feature 1.1.{most}'")
    lines = "[...document.querySelectorAll('.line')]"
    left = "line.querySelector('.before > span').getBoundingClientRect().left"
    hidden = f"{lines}.filter(line => {left} < line.getBoundingClientRect().left).length"
    heights = f"{lines}.map(line => line.offsetHeight)"
    assert browser.run(hidden) > 0 and max(browser.run(heights)) < 50, "one line of each"
    text = browser.run("document.querySelector('.context').textContent")
    browser.run(f"{lines}.forEach(line => line.querySelector('button').click())")
    assert browser.run("document.querySelector('.line button').ariaExpanded") == "true"
    assert browser.run(hidden) == 0 and max(browser.run(heights)) > 50, "all of it"

    href = browser.run("document.getElementById('file').href")
    file = json.loads(unquote(href.removeprefix("data:application/json,")))
    page = features.saved(site, f"1/1/{most // features.CHUNK}")[most % features.CHUNK]
    assert file["feature"] == f"1.1.{most}" and file["active"] == table["count"][most]
    measured = features.saved(site, "1/1/measured")[str(most)]
    assert [row["by"] for row in file["measured"]["tokens"]] == measured["by"]
    assert [row["by"] for row in file["estimated"]["tokens"]] == page["by"]
    assert sum(measured["moved"]["counts"]) >= 20, "the tokens that the data have"
    context = file["contexts"][0]
    assert context["codes"][context["at"]] == max(context["codes"]) == table["max"][most]
    joined = "".join(x if isinstance(x, str) else "�" for x in context["tokens"])
    assert text.startswith(joined.replace("\n", "↵")), "with all of it"
    start = context["token"] - context["at"]
    tokens = np.fromfile(data_dir / "train_000000.bin", dtype=np.uint16)
    ids = tokens[start:start + len(context["tokens"])].tolist()
    words = features.saved(site, "vocab")
    assert [words[i] for i in ids] == context["tokens"], "where it lies in the data"
    assert context["file"] == f"{data_dir.name}/train_000000.bin"
    near = [row["feature"] for row in file["nearest"]]
    shown = browser.run("[...document.querySelectorAll('section')].at(-1).innerText")
    assert near and all(name in shown for name in near)
    assert browser.errors() == []


def test_search_by_the_token_that_is_raised(browser, site):
    words = features.saved(site, "vocab")
    raising = set()
    for layer in (0, 1):
        for level in (0, 1):
            table = features.saved(site, f"{layer}/{level}/table")
            measured = features.saved(site, f"{layer}/{level}/measured")
            for i, ids in enumerate(table["raises"]):
                if row := measured.get(str(i)):
                    ids = [token for token, by in zip(row["ids"][:3], row["by"]) if by > 0]
                if any(words[token] in ("z", "Z") for token in ids):
                    raising.add(f"#/{layer}/{level}/{i}")
    assert 0 < len(raising) <= 200
    browser.go(f"file://{site}/index.html#/search/raises%20z")
    found = browser.wait(f"document.title == 'Search: raises z' && {RESULTS}.length && {RESULTS}")
    assert set(found) == raising
    assert browser.errors() == []


def test_the_steer_command_can_be_pasted(site):
    command = features.saved(site, "site")["command"] + " --steer 1.1.37=+8 --compare"
    program, *command = shlex.split(command)
    assert program == "python"
    result = run_script(*command, "--num_samples=1", "--max_new_tokens=5", "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert "=== steered" in result.stdout


def test_the_steer_command_is_shown(browser, site):
    browser.go(f"file://{site}/index.html#/1/1/37")
    shown = browser.wait("document.querySelector('#steer')?.innerText")
    command = features.saved(site, "site")["command"]
    assert shown == f"{command} --steer 1.1.37=+8 --compare"


def test_another_tool_adds_a_page(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    features.save(tmp_path / "site", "circuits/0", [[1, 0, 3]])
    script = """loaded("circuits.page", async parts => {
      const [[layer, level, id]] = await load(`circuits/${parts[0]}`)
      await loadTables(layer)
      show(h("h1", {}, "A circuit"), captioned(layer, level, id))
    })"""
    for _ in range(2):  # the second replaces the first
        features.add_page(tmp_path / "site", "circuits", "Circuits", script)
    browser.go(f"file://{tmp_path}/site/index.html#/circuits/0")
    assert browser.wait(f"{HEADING} == 'A circuit'")
    assert browser.run("document.querySelector('main .byhand').innerText") == "a <b> by hand"
    links = browser.run("[...document.querySelectorAll('nav a')].map(a => a.innerText)")
    assert links.count("Circuits") == 1
    browser.run("location.hash = '#/0/0'")
    assert browser.wait(f"{HEADING} == 'Layer 0, level 0'")
    assert browser.errors() == []


def test_the_front_page_is_there_while_the_rest_is_computed(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    described = features.saved(site, "site") | {"unfinished": True}
    features.save(tmp_path / "site", "site", described)
    for path in tmp_path.glob("site/data/1/*/*.js"):
        if path.stem in ("table", "measured"):
            path.unlink()
    for path in tmp_path.glob("site/data/0/*/measured.js"):
        path.unlink()
    browser.go(f"file://{tmp_path}/site/index.html")
    assert "being computed" in browser.wait("document.querySelector('.note')?.innerText")
    browser.run("location.hash = '#/1/1'")
    assert browser.wait("document.querySelector('main').innerText.includes('computed yet')")
    assert len(browser.errors()) == 1, "the one file that isn't there"
    features.save(tmp_path / "site", "1/1/table", features.saved(site, "1/1/table"))
    browser.run("location.hash = '#/0/0/3'")
    assert browser.wait(f"{HEADING} == 'Feature 0.0.3'")
    assert "Not measured yet" in browser.run("document.querySelector('.note').innerText")
    browser.run("location.hash = '#/1/1'")
    assert browser.wait(f"{HEADING} == 'Layer 1, level 1'"), "it has come meanwhile"
    assert browser.errors() == []


def test_every_page_fits_a_phone_in_the_dark(browser, site):
    browser.emulate("dark", (360, 700))
    for page in ("#/", "#/1/1", "#/1/1/37", "#/text/0+1/20/0.0.3", "#/search/e", "#/data/1/20"):
        browser.go("about:blank")
        browser.go(f"file://{site}/index.html{page}")
        done = "!document.querySelector('main').innerText.includes(' …')"
        browser.wait(f"document.querySelector('h1') && {done}")
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert browser.run(fits), f"{page}: a phone's width is enough"
        back = browser.run("getComputedStyle(document.body).backgroundColor")
        assert back == "rgb(20, 23, 27)", "dark where the system is"
        keys = "[...document.querySelectorAll('.keys')].map(keys => getComputedStyle(keys).display)"
        assert set(browser.run(keys)) <= {"none"}, "no keys where there is no keyboard"
    assert browser.errors() == []


def test_a_site_without_measured_effects(trained, tmp_path):
    settings = {"ckpt": trained, "out_dir": tmp_path / "site", "tokens": 640, "n_measured": 0}
    result = run_script("-m", "tools.features", *arguments(settings), "--device=cpu")
    assert result.returncode == 0, result.stderr
    summary = features.saved(tmp_path / "site", "site")["summary"]
    assert {row["measured"] for layer in summary for row in layer} == {0}
    assert {row["correlation"] for layer in summary for row in layer} == {None}
    for file in (tmp_path / "site").rglob("*.js"):
        assert str(trained.parent) not in file.read_text(), "a path of this machine"


def test_an_existing_site_stays(trained, site):
    before = (site / "index.html").stat().st_mtime_ns
    command = ["-m", "tools.features", f"--ckpt={trained / 'ckpt.pt'}", f"--out_dir={site}"]
    result = run_script(*command)
    assert result.returncode == 1
    assert f"{site} is there already" in result.stderr
    assert (site / "index.html").stat().st_mtime_ns == before


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*.*")}


@pytest.mark.filterwarnings("ignore:'tools.features' found in sys.modules")  # imported above
def test_an_interrupted_run_goes_on(trained, tmp_path, monkeypatch, capfd):
    """The site is that of an uninterrupted run; another checkpoint's codes are not gone on with."""
    settings = {"ckpt": trained, "tokens": 1600, "n_measured": 4, "device": "cpu"}
    command = ["-m", "tools.features", *arguments(settings)]
    run_script(*command, f"--out_dir={tmp_path / 'whole'}").check_returncode()
    command.append(f"--out_dir={tmp_path / 'site'}")
    monkeypatch.chdir(ROOT)
    batches = 0

    def run_with_codes(model, *args, **kwargs):
        nonlocal batches
        batches += 1
        if batches == 4:
            raise KeyboardInterrupt
        return original(model, *args, **kwargs)

    original = GPT.run_with_codes
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "run_with_codes", run_with_codes)
        with pytest.raises(KeyboardInterrupt):
            run_here(command)
    assert "with 48% of the codes" in capfd.readouterr().err, "24 of 50 windows"
    with open(tmp_path / "site/codes.bin", "ab") as file:
        file.write(b"half a record")
    result = run_script(*command[:-1], f"--out_dir={tmp_path / 'site'}", "--tokens=3200")
    assert result.returncode == 1
    assert "site was begun with another checkpoint or other tokens" in result.stderr
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    assert "24 of 50 windows are read already" in result.stdout
    assert files(tmp_path / "site") == files(tmp_path / "whole")
