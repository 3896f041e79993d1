"""
Screenshots of a site of features.py, and how long a search takes at the published recipe's size.

    python records/features_site/shots.py SITE OUT_DIR

Needs chromium and chromedriver. The search is timed in a copy of the site whose tables are made up:
12 layers of 1,024 + 32,768 features, GPT-2's vocabulary size, captions drawn at random.
"""
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2]))
from browser import Browser  # noqa: E402  the paths come first

from tools.features import save, saved  # noqa: E402

SHOTS = {  # name: (address, color scheme, width, height)
    "text": ("#/text/0+3/302/0.1.265", "light", 1200, 820),
    "text_phone_dark": ("#/text/0/302/0.1.265", "dark", 390, 844),
    "front": ("#/", "light", 1200, 920),
    "front_phone": ("#/", "light", 390, 844),
    "feature": ("#/0/1/265", "light", 1200, 1690),
    "feature_dark": ("#/2/0/47", "dark", 1200, 1730),
    "table_dark": ("#/2/1", "dark", 1200, 700),
    "search": ("#/search/in%20self", "light", 1200, 600),
}
QUERIES = [
    "e",
    "word12",
    "word",
    "after word7",
    "in w",
    "first in line",
    "raises word7",
    "nothing at all",
]


def take(browser, site, out_dir):
    for name, (address, scheme, width, height) in SHOTS.items():
        browser.emulate(scheme, (width, height))
        browser.go("about:blank")
        browser.go(f"file://{site}/index.html{address}")
        done = "!document.querySelector('main').innerText.includes(' …')"
        browser.wait(f"document.querySelector('h1') && {done}")
        (out_dir / f"{name}.png").write_bytes(browser.screenshot())
    assert browser.errors() == []


def made_up_table(rng, n):
    return {
        "count": [rng.randrange(5000) for _ in range(n)],
        "mean": [1.5] * n,
        "max": [9.5] * n,
        "kind": rng.choices(range(7), k=n),
        "says": [rng.randrange(4) for _ in range(n)],
        "share": [rng.randrange(20, 101) for _ in range(n)],
        "tokens": [rng.sample(range(50257), 4) for _ in range(n)],
        "raises": [rng.sample(range(50257), 3) for _ in range(n)],
    }


def time_search(browser, site, copy):
    """Milliseconds for each query, and seconds for the first, which reads all tables."""
    rng = random.Random(0)
    copy.mkdir()
    shutil.copy(site / "index.html", copy)
    described = saved(site, "site")
    described["layers"] = 12
    described["levels"] = [{"n": 10, "k": 16, "m": 10}, {"n": 15, "k": 32, "m": 8}]
    save(copy, "site", described)
    save(copy, "vocab", [f" word{i}" for i in range(50257)])
    save(copy, "words", [f"word{i}" for i in range(50000)])
    save(copy, "labels", {})
    save(copy, "pages", [])
    for layer in range(12):
        for level, n in enumerate((1024, 32768)):
            table = made_up_table(rng, n)
            for i, kind in enumerate(table["kind"]):
                if kind in (0, 1, 2, 5):
                    table["says"][i] = rng.randrange(50000)
            save(copy, f"{layer}/{level}/table", table)
            save(copy, f"{layer}/{level}/measured", {})
    browser.go("about:blank")
    start = time.monotonic()
    browser.go(f"file://{copy}/index.html#/search/e")
    browser.wait("document.querySelector('#found')")
    print(f"the first search, which reads all tables: {time.monotonic() - start:.1f} s")
    for query in QUERIES:
        times = []
        for _ in range(5):
            browser.run("location.hash = '#/search/'")
            browser.wait("document.title.trim() == 'Search:'")
            browser.run(f"location.hash = '#/search/' + encodeURIComponent('{query}')")
            browser.wait(f"document.title == 'Search: {query}'")
            times.append(float(browser.run("document.querySelector('#found').dataset.ms")))
        found = browser.run("document.querySelector('#found').innerText.split(' of ')[0]")
        median = sorted(times)[2]
        print(f"{query!r}: {found} features, median {median:.0f} ms, most {max(times):.0f}")


def main(site, out_dir):
    site, out_dir = Path(site).resolve(), Path(out_dir)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        browser = Browser(Path(directory) / "profile", (1200, 900))
        take(browser, site, out_dir)
        time_search(browser, site, Path(directory) / "large")
        browser.close()


main(*sys.argv[1:])
