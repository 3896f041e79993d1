"""features.py: what it counts is what the model does, and the site works in a real browser."""
import json
import shutil
import tempfile

import numpy as np
import pytest
import torch
from browser import Browser
from conftest import ROOT, arguments, run_script

import features
from data import get_tokenizer
from model import GPT, GPTConfig


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
    lists, offered = features.BestContexts(7, 3), []
    for batch in range(5):
        n = 40
        keys = rng.random(n, dtype=np.float32)
        row = rng.integers(0, 7, n), keys, batch * 40 + rng.permutation(40)
        lists.add(*row, row[2] // 4)
        offered += zip(*(part.tolist() for part in row))
    for feature in range(7):
        best = {}
        for f, key, ref in offered:
            if f == feature and key > best.get(ref // 4, (-1, 0))[0]:
                best[ref // 4] = key, ref
        expected = sorted(best.values(), reverse=True)[:3]
        assert lists.refs[feature].tolist() == [ref for _, ref in expected]
        np.testing.assert_array_equal(lists.keys[feature], np.float32([key for key, _ in expected]))


@torch.no_grad()
def test_counts_contexts_and_neighbours_are_those_of_the_codes(model):
    windows = np.random.default_rng(0).integers(0, 257, (20, 16))
    readers, _ = features.read(model, windows)
    levels = model.saes()[0].levels
    dense = []  # per layer and level (windows, T, features)
    for codes in model.run_with_codes(torch.from_numpy(windows))[1]:
        zeros = [torch.zeros(*windows.shape, 2**level.n) for level in levels]
        dense.append([z.scatter(-1, c.ids, c.values).numpy() for z, c in zip(zeros, codes)])
    for row, per_level in zip(readers, dense):
        for reader, codes in zip(row, per_level):
            np.testing.assert_array_equal(reader.counts, (codes != 0).sum((0, 1)))
            np.testing.assert_allclose(reader.sums, codes.sum((0, 1)), rtol=1e-4)
            np.testing.assert_array_equal(reader.histogram.sum(1), reader.counts)
            per_window = codes.max(1)  # (windows, features)
            np.testing.assert_allclose(reader.top.keys[:, 0].clip(0), per_window.max(0), rtol=1e-5)
            for feature in np.flatnonzero(reader.counts)[::7]:
                window, position = divmod(reader.refs[feature, 0], 16)
                largest = per_window[:, feature].max()
                assert codes[window, position, feature] == pytest.approx(largest)
                around = range(position - features.BEFORE, position + features.AFTER + 1)
                near = [codes[window, p, feature] if 0 <= p < 16 else 0 for p in around]
                np.testing.assert_allclose(reader.shades[feature, 0].astype(float), near, atol=5e-3)
                window, position = divmod(reader.random.refs[feature, 0], 16)
                other = per_level[1 - reader.level][window, position]
                assert set(reader.beside[feature, 0]) == set(np.flatnonzero(other))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use in jvp
def test_logit_effects_are_the_derivative_where_gelu_is_at_its_slopes(model):
    """
    On a single token the mean slopes are that token's: the effect is the derivative through the
    block's MLP.
    """
    _, slopes = features.read(model, np.array([[65]]))
    _, codes = model.run_with_codes(torch.tensor([[65]]))
    mlp_input = model.blocks[1].sae.decode(codes[1])[0]
    atom = model.blocks[1].sae.atoms(1, [77])
    written = torch.func.jvp(model.blocks[1].mlp, (mlp_input,), (atom,))[1]
    logits = ((written * model.ln_f.weight) @ model.wte.weight[:257].T)[0]
    ids, values = features.logit_effects(model, 1, 1, [77], slopes[1], 257)
    np.testing.assert_allclose(values[0], logits[ids[0]].detach(), rtol=1e-3, atol=1e-6)
    assert ids[0, 0] == logits.argmax() and ids[0, -1] == logits.argmin()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_a_text_of_any_length_is_read_to_its_end(model, tmp_path, length):
    """Each token's codes are those of a window that holds the tokens before it."""
    encoding = get_tokenizer("bytes")
    ids = np.random.default_rng(length).integers(0, 256, length).tolist()
    features.write_text_page(str(tmp_path), model, encoding, ids)
    pages = []
    for layer in (0, 1):
        text = (tmp_path / f"data/text/{layer}.js").read_text()
        pages.append(json.loads(text[text.index(",") + 1:-1]))
    assert len(pages[0]) == len(pages[1]) == length
    read = [encoding.eot_token] + ids
    for i in range(length):
        start = max(0, (i + 1) // 8 * 8 - 8)  # windows begin half a block of 16 apart
        _, codes = model.run_with_codes(torch.tensor([read[start:i + 2]]))
        for layer, page in enumerate(pages):
            assert sorted(page[i][1][0]) == sorted(codes[layer][1].ids[0, -1].tolist())


# -----------------------------------------------------------------------------
# in a browser, by the WebDriver protocol

@pytest.fixture(scope="module")
def site(trained, data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    (directory / "text.txt").write_text("def main(): <b>\n    return 1")
    settings = {
        "ckpt": trained / "ckpt.pt",
        "out_dir": directory / "site",
        "tokens": 20000,
        "text": directory / "text.txt",
        "device": "cpu",
    }
    result = run_script(ROOT / "features.py", *arguments(settings))
    assert result.returncode == 0, result.stderr
    assert "counting: 100%" in result.stderr and not (directory / "site.partial").exists()
    return directory / "site"


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is not here: apt-get install chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.close()


def test_the_site_in_a_browser(browser, site):
    table = (site / "data/1/1/table.js").read_text()
    table = json.loads(table.removeprefix('loaded("1/1/table",').removesuffix(")"))
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
    n_contexts = features.n_top + features.SHOWN_RANDOM
    assert browser.run("document.querySelectorAll('.context').length") == n_contexts
    assert browser.run("document.querySelectorAll('.context u').length") == n_contexts
    shaded = browser.run("document.querySelectorAll('.context [style]').length")
    assert shaded >= features.n_top
    assert browser.run("document.querySelectorAll('section').length") == 3
    links = browser.run("[...document.querySelectorAll('main a')].map(a => a.hash)")
    assert f"#/1/0/{most >> 3}" in links, "its parent's page"
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert browser.run(fits), "a phone's width is enough"
    browser.press("\ue00c")  # Escape
    assert browser.wait("document.querySelector('h1').innerText == 'Layer 1, level 1'")

    browser.run("location.hash = '#/text'")
    text = "def main(): <b>\n    return 1"
    assert browser.wait("document.querySelectorAll('.tokens button').length") == len(text)
    shown = browser.run("document.querySelector('.tokens').textContent")
    assert shown == text, "text is never HTML"
    features_shown = "document.querySelectorAll('.tree li').length"
    assert browser.run(features_shown) == 4 + 6, "all active features of the token, once each"
    browser.press("\ue014")  # to the right
    assert browser.wait("location.hash == '#/text/0/1'")
    assert browser.wait(features_shown) == 4 + 6

    browser.run("location.hash = '#/9/9'")
    told = "document.querySelector('main').innerText.includes('no feature')"
    assert "layers 0 to 1" in browser.wait(f"{told} && document.body.innerText")
    assert browser.errors() == []


def test_an_existing_site_stays(trained, site):
    before = (site / "index.html").stat().st_mtime_ns
    command = [ROOT / "features.py", f"--ckpt={trained / 'ckpt.pt'}", f"--out_dir={site}"]
    result = run_script(*command)
    assert result.returncode == 1
    assert f"{site} is there already" in result.stderr
    assert (site / "index.html").stat().st_mtime_ns == before
