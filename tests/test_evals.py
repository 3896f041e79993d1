"""evals.py against independent computations, and what sample.py reads."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import run_script

import sample
from cayley import Edit
from data import get_tokenizer
from model import GPT, GPTConfig
from tools import evals
from tools.evals import (
    code_scores,
    continuation_scores,
    hellaswag_scores,
    hellaswag_text,
    lambada_scores,
    loss_scores,
    mean_and_error,
    ratio_and_error,
    read_texts,
    text_scores,
    window_losses,
)

ENCODING = get_tokenizer("bytes")
BLOCK_SIZE = 64


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=BLOCK_SIZE,
        vocab_size=320,
        n_layer=2,
        n_head=2,
        n_embd=32,
        cayley_levels="5,4,0;8,6,16",
    )
    return GPT(config).eval()


def ids_of(text):
    return list(text.encode())


def log_probability(model, context, continuation):
    """One token at a time, without batches or padding; a context that is too long slides."""
    total = 0.0
    for i, token in enumerate(continuation):
        before = (context + continuation[:i])[-BLOCK_SIZE:]
        logits = model(torch.tensor([before]))[0][0, -1].double()
        total += logits.log_softmax(-1)[token].item()
    return total


# -----------------------------------------------------------------------------
# continuations

def test_continuation_scores_equal_one_by_one(model):
    texts = [
        ("The cat", " sat"),
        ("A much longer context here", " x"),
        ("Q", " an answer of some length"),
    ]
    pairs = [(ids_of(a), ids_of(b)) for a, b in texts]
    for (score, _), pair in zip(continuation_scores(model, pairs), pairs):
        assert score == pytest.approx(log_probability(model, *pair), abs=1e-3)
    context = pairs[0][0]
    greedy = []
    for _ in range(3):
        greedy.append(model(torch.tensor([context + greedy]))[0][0, -1].argmax().item())
    wrong = greedy[:2] + [(greedy[2] + 1) % 256]
    scores = continuation_scores(model, [(context, greedy), (context, wrong)])
    assert [all_greedy for _, all_greedy in scores] == [True, False]
    long = list(range(100))  # more than block_size: the start of the context is lost
    score, _ = continuation_scores(model, [(long, [5, 6])])[0]
    assert score == pytest.approx(log_probability(model, long[-63:], [5, 6]), abs=0.5)


def test_a_continuation_may_fill_the_block_and_no_more(model):
    whole = [7] * BLOCK_SIZE
    score, _ = continuation_scores(model, [([256], whole)])[0]
    assert score == pytest.approx(log_probability(model, [256], whole), abs=1e-3)
    with pytest.raises(ValueError, match="65 tokens: block_size=64"):
        continuation_scores(model, [([256], whole + [7])])


# -----------------------------------------------------------------------------
# HellaSwag and LAMBADA

def test_hellaswag_takes_the_ending_of_largest_log_probability_per_character(model):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        endings = ["".join(rng.choice(list("abcde "), rng.integers(3, 9))) for _ in range(4)]
        rows.append({"ctx": f"Item {i}", "endings": endings, "label": int(rng.integers(4))})
    correct = []
    for row in rows:
        context = [256] + ids_of(row["ctx"])
        values = []
        for ending in row["endings"]:
            score = log_probability(model, context, ids_of(" " + ending))
            values.append(score / len(ending))
        correct.append(int(np.argmax(values)) == row["label"])
    assert hellaswag_scores(model, ENCODING, rows)["accuracy"] == pytest.approx(np.mean(correct))


def test_hellaswag_rows_of_the_hub_are_cleaned():
    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix.",
        "ctx_b": "then you",
        "ctx": "unused",
        "endings": ["stir  it. [substeps] Wait.", "go", "run", "sit"],
    }
    cleaned = ["Baking: How to bake. Mix. Then you", "stir it. Wait.", "go", "run", "sit"]
    assert hellaswag_text(row) == cleaned
    row = {"ctx": "Baking: Mix. then you", "endings": ["stir", "b", "c", "d"]}
    assert hellaswag_text(row)[:2] == ["Baking: Mix. then you", "stir"]


def test_an_untrained_model_is_at_chance(model):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        endings = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(4)]
        rows.append({"ctx": f"Item {i}", "endings": endings, "label": str(rng.integers(4))})
    scores = hellaswag_scores(model, ENCODING, rows)
    assert abs(scores["accuracy"] - 0.25) < 4 * scores["standard_error"]


def test_lambada_asks_for_the_whole_last_word(model):
    rows = [{"text": "The end is near"}, {"text": "Once upon a time"}]
    scores = lambada_scores(model, ENCODING, rows)
    expected = [
        log_probability(model, [256] + ids_of("The end is"), ids_of(" near")),
        log_probability(model, [256] + ids_of("Once upon a"), ids_of(" time")),
    ]
    assert scores["perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-3)
    assert scores["accuracy"] == 0


def test_what_does_not_fit_in_the_block_is_counted_and_left_out(model):
    def item(n_characters, label=0):
        return {"ctx": "So", "endings": ["x" * n_characters, "a", "b", "c"], "label": label}

    fits = hellaswag_scores(model, ENCODING, [item(BLOCK_SIZE - 1), item(5)])
    assert (fits["items"], fits["unscorable"]) == (2, 0)
    both = hellaswag_scores(model, ENCODING, [item(BLOCK_SIZE), item(5), item(300)])
    assert (both["items"], both["unscorable"]) == (1, 2)
    alone = hellaswag_scores(model, ENCODING, [item(5)])
    assert both["accuracy"] == alone["accuracy"]
    none = hellaswag_scores(model, ENCODING, [item(300)])
    assert (none["accuracy"], none["items"], none["unscorable"]) == (None, 0, 1)

    rows = [{"text": "the " + "w" * BLOCK_SIZE}, {"text": "one two"}]
    scores = lambada_scores(model, ENCODING, rows)
    assert (scores["items"], scores["unscorable"]) == (1, 1)
    assert scores["perplexity"] == lambada_scores(model, ENCODING, rows[1:])["perplexity"]
    assert lambada_scores(model, ENCODING, rows[:1])["accuracy"] is None


# -----------------------------------------------------------------------------
# losses and text

def test_losses_and_bits_per_byte(model):
    windows = np.random.default_rng(0).integers(0, 256, (10, 17))
    losses = window_losses(model, windows)
    row = torch.from_numpy(windows[3:4])
    assert losses[3] == pytest.approx(model(row[:, :-1], row[:, 1:])[1].item(), abs=1e-5)
    scores = loss_scores(losses, windows, ENCODING)
    per_byte = np.mean(losses) / math.log(2)  # a byte a token
    assert scores["bits_per_byte"] == pytest.approx(per_byte)
    assert mean_and_error([1, 2, 3, 4]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))


def test_a_ratio_of_equal_counts_is_a_mean():
    sums, counts = [2.0, 4.0, 6.0, 8.0], [2, 2, 2, 2]
    assert ratio_and_error(sums, counts) == pytest.approx(mean_and_error([1, 2, 3, 4]))
    ratio, error = ratio_and_error([1, 2, 3], [1, 2, 3])  # whatever the counts: always 1
    assert (ratio, error) == (1, 0)


@pytest.mark.parametrize("length", [1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE + 40])
def test_every_token_of_a_text_is_scored_once_the_tail_too(model, length):
    text = "".join(np.random.default_rng(1).choice(list("ab c\n"), length))
    ids = [256] + ids_of(text)
    total = 0.0
    for start in range(1, len(ids), BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, len(ids))
        context = ids[max(0, end - 1 - BLOCK_SIZE):start]
        total += log_probability(model, context, ids[start:end])
    scores = text_scores(model, ENCODING, [text])
    assert scores["tokens"] == length
    assert scores["loss"] == pytest.approx(-total / length, abs=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / math.log(2))


def test_word_perplexity_counts_the_words_and_documents_stand_alone(model):
    texts = ["one two three", "four\nfive six seven " * 6]
    alone = [text_scores(model, ENCODING, [text]) for text in texts]
    both = text_scores(model, ENCODING, texts)
    total = sum(scores["loss"] * scores["tokens"] for scores in alone)
    assert both["loss"] * both["tokens"] == pytest.approx(total)
    assert both["texts"] == 2
    nats_per_word = alone[0]["loss"] * alone[0]["tokens"] / 3
    assert alone[0]["word_perplexity"] == pytest.approx(math.exp(nats_per_word))
    one_word = text_scores(model, ENCODING, ["x" * 900])
    assert one_word["word_perplexity"] is None  # exp(5000) is no float


def test_texts_of_the_hub_of_rows_and_of_a_file(monkeypatch, tmp_path):
    rows = [{"text": "a document"}, {"text": ""}, {"text": "another\r\n"}]
    asked = []

    def hub_rows(*dataset):
        asked.append(dataset)
        return rows

    monkeypatch.setattr(evals, "hub_rows", hub_rows)
    assert read_texts("hub") == ["a document", "another\r\n"]
    assert asked == [("NeelNanda/pile-10k", None, "train")]
    path = tmp_path / "pile.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_texts(str(path)) == ["a document", "another\r\n"]
    path = tmp_path / "text.txt"
    path.write_bytes(b"kept\r\nas it is\r")
    assert read_texts(str(path)) == ["kept\r\nas it is\r"]
    monkeypatch.setattr(evals, "limit", 1)
    assert read_texts("hub") == ["a document"]


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    def hub_rows(*dataset):
        raise RuntimeError("no route\nto the hub")

    monkeypatch.setattr(evals, "hub_rows", hub_rows)
    with pytest.raises(ValueError, match=r"^NeelNanda/pile-10k .* \(no route\): give a file$"):
        read_texts("hub")


# -----------------------------------------------------------------------------
# wrong rows

GOOD = {"ctx": "So", "endings": ["a", "b", "c", "d"], "label": 1}


@pytest.mark.parametrize("task, row, words", [
    ("hellaswag", {"ctx": "So", "label": 1}, "lacks endings"),
    ("hellaswag", {**GOOD, "endings": ["a", "b"]}, "must be a list of 4"),
    ("hellaswag", {**GOOD, "endings": "abcd"}, "must be a list of 4"),
    ("hellaswag", {**GOOD, "endings": [1, 2, 3, 4]}, "must be text"),
    ("hellaswag", {**GOOD, "label": 4}, "its label is 4"),
    ("hellaswag", {**GOOD, "label": ""}, "its label is ''"),
    ("hellaswag", {**GOOD, "activity_label": None}, "must be text"),
    ("hellaswag", ["So"], "not an object"),
    ("lambada", {"txt": "one two"}, "field text"),
    ("lambada", {"text": " "}, "field text"),
    ("lambada", {"text": 3}, "field text"),
    ("ppl", {"body": "one two"}, "field text"),
])
def test_a_wrong_row_in_the_middle_is_named(monkeypatch, tmp_path, task, row, words):
    good = GOOD if task == "hellaswag" else {"text": "one two"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in (good, good, row, good)))
    monkeypatch.setattr(evals, task, str(path))
    with pytest.raises(ValueError, match=rf"rows.jsonl: row 3: .*{words}"):
        evals.load_tasks(ENCODING, BLOCK_SIZE)


# -----------------------------------------------------------------------------
# codes

def test_code_scores_of_layers_whose_state_is_known(model):
    windows = np.random.default_rng(0).integers(0, 256, (160, 65))
    scores = code_scores(model, windows)
    for layer in scores["layers"]:
        for row, k, n in zip(layer["levels"], (4, 6), (32, 256)):
            assert row["active"] == k and sum(row["frequency_histogram"]) == n
            assert row["dead"] == row["frequency_histogram"][0] <= row["rare"] <= n
        assert sum(row["norm_share"] for row in layer["levels"]) == pytest.approx(1)
        assert 0 < layer["explained"] < 1
    windows = windows[:12]
    with torch.no_grad():
        # now layer 1's code can't matter, and layer 0's can
        model.blocks[1].mlp.c_proj.weight.zero_()
        model.blocks[0].mlp.c_proj.weight.mul_(50)
        model.blocks[0].sae.bias[7] = 1e4  # feature 7 of level 0 is always active
    losses = np.array(window_losses(model, windows))
    loss = losses.mean()
    scores = code_scores(model, windows)
    layers = scores["layers"]
    assert scores["loss"] == pytest.approx(loss) and scores["tokens"] == 12 * 64
    assert layers[1]["loss_dense"] == pytest.approx(loss) == layers[1]["loss_zero"]
    assert layers[1]["zero_minus_loss"] == pytest.approx(0, abs=1e-6)
    assert abs(layers[0]["loss_zero"] - loss) > 1e-3
    assert layers[0]["levels"][0]["frequency_histogram"][-1] >= 1
    assert np.mean(window_losses(model, windows)) == pytest.approx(loss)  # the code is back


def test_losses_without_the_code_are_paired_with_the_loss(model):
    windows = np.random.default_rng(0).integers(0, 256, (12, 65))
    with torch.no_grad():
        model.blocks[0].mlp.c_proj.weight.mul_(50)
    losses = np.array(window_losses(model, windows))
    layer = code_scores(model, windows)["layers"][0]
    for name, scale in (("dense", 1.0), ("zero", 0.0)):
        replaced = np.array(evals.replaced_losses(model, 0, scale, windows))
        assert layer[f"loss_{name}"] == pytest.approx(replaced.mean())
        assert layer[f"{name}_minus_loss"] == pytest.approx((replaced - losses).mean())
        error = (replaced - losses).std(ddof=1) / math.sqrt(12)
        assert layer[f"{name}_minus_loss_error"] == pytest.approx(error)


def test_explained_does_not_depend_on_the_batches(model, monkeypatch):
    windows = np.random.default_rng(0).integers(0, 256, (10, 65))
    windows[:5] = 3  # batches of different means
    idx = torch.from_numpy(windows[:, :-1])
    expected = model.explained(idx).tolist()
    for size in (3, 10):
        monkeypatch.setattr(evals, "batch_size", size)
        found = [layer["explained"] for layer in code_scores(model, windows)["layers"]]
        assert found == pytest.approx(expected, rel=1e-4)


def test_rare_is_not_told_of_too_few_tokens(model):
    windows = np.random.default_rng(0).integers(0, 256, (157, 65))
    few = code_scores(model, windows[:156])  # 9,984 tokens
    enough = code_scores(model, windows)  # 10,048
    assert all("rare" not in row for layer in few["layers"] for row in layer["levels"])
    assert all("rare" in row for layer in enough["layers"] for row in layer["levels"])


def test_an_interruption_leaves_the_model_whole(model, monkeypatch):
    windows = np.random.default_rng(0).integers(0, 256, (4, 65))
    saes = model.saes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evals.Replaced, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evals.evaluate(model, ENCODING, windows, {})
    assert model.saes() == saes and all(sae.record is None for sae in saes)


# -----------------------------------------------------------------------------
# sample.py

def test_an_edit_is_named_by_layer_level_and_feature(model):
    saes = model.saes()
    assert sample.parse_edit("1.0.7=+8", saes) == (1, Edit(level=0, feature=7, keep=1, add=8.0))
    assert sample.parse_edit("0.1.255=-2.5", saes) == (0, Edit(1, 255, 1, -2.5))
    assert sample.parse_edit("0.1.2=3", saes) == (0, Edit(1, 2, 0, 3.0))
    layer, ablation = sample.parse_edit("0.1.2", saes)
    assert isinstance(ablation, Edit) and ablation == (1, 2, 0, 0.0)


def test_a_prompt_of_a_file_keeps_its_newlines(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt.txt").write_bytes(b"one\r\ntwo\r")
    start = f"--start=FILE:{tmp_path / 'prompt.txt'}"
    arguments = [f"--ckpt={trained}", start, "--device=cpu", "--max_new_tokens=0"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    for name in ("ckpt", "start", "device", "max_new_tokens"):  # configure() sets them
        monkeypatch.setattr(sample, name, getattr(sample, name))
    sample.main()
    assert capsys.readouterr().out.startswith("one\r\ntwo\r\n---")


# -----------------------------------------------------------------------------
# the script

def test_the_script_and_the_paired_comparison(trained, data_dir, tmp_path):
    ckpt = tmp_path / "ckpt.pt"
    ckpt.write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "text.txt").write_text("Some text to score. " * 20)
    rows = ['{"text": "one two three"}\n', '{"text": "four five six"}\n']
    (tmp_path / "lambada.jsonl").write_text("".join(rows))
    arguments = [
        f"--ckpt={tmp_path}",  # its ckpt.pt
        f"--vs={trained / 'last.pt'}",
        "--n_windows=16",
        "--device=cpu",
        f"--ppl={tmp_path / 'text.txt'}",
        f"--lambada={tmp_path / 'lambada.jsonl'}",
    ]
    run = run_script("-m", "tools.evals", *arguments)
    assert run.returncode == 0, run.stderr
    scores = json.loads((tmp_path / "evals.json").read_text())
    assert set(scores) == {"val", "text", "lambada", "codes", "vs"}
    assert scores["lambada"]["items"] == 2 and scores["text"]["tokens"] == 400
    # best and last are the same weights here
    assert scores["vs"]["loss_difference"] == 0
    assert "below 0, ckpt is the better" in run.stdout
    assert len(scores["codes"]["layers"]) == 2
    assert scores["codes"]["loss"] == pytest.approx(scores["val"]["loss"])  # the same 16 windows


def test_the_difference_is_of_the_checkpoint_less_the_other(model):
    other = GPT(model.config)
    windows = torch.randint(257, (4, BLOCK_SIZE + 1)).numpy()
    scores = evals.evaluate(model, ENCODING, windows, {}, other)
    expected = np.mean(window_losses(model, windows)) - np.mean(window_losses(other, windows))
    assert scores["vs"]["loss_difference"] == pytest.approx(expected)


def test_a_smaller_run_does_not_replace_a_larger_one(trained, tmp_path):
    path = tmp_path / "evals.json"
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "lambada.jsonl").write_text('{"text": "one two three"}\n' * 2)
    lambada = f"--lambada={tmp_path / 'lambada.jsonl'}"

    def run(*words):
        result = run_script("-m", "tools.evals", f"--ckpt={tmp_path}", "--device=cpu", *words)
        assert result.returncode == 0, result.stderr
        return result.stdout, json.loads(path.read_text())

    said, first = run("--n_windows=16", lambada)
    words = "val 16 windows, lambada 2, codes 16 windows 5 times on cpu: about"
    assert said.startswith(words)
    assert first["val"]["windows"] == 16
    said, scores = run("--n_windows=4", lambada, "--limit=1")
    assert scores == first
    assert f"{path} keeps val of 16 windows, not these 4: --replace=True writes them" in said
    assert f"{path} keeps lambada of 2 items, not these 1" in said
    said, scores = run("--n_windows=20")
    assert scores["val"]["windows"] == 20 and scores["lambada"] == first["lambada"]
    said, scores = run("--n_windows=4", "--replace")
    assert scores["val"]["windows"] == 4 and scores["lambada"] == first["lambada"]

    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["model"]["wte.weight"][0] += 1
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    said, other = run("--n_windows=4")  # of other weights nothing is kept, and nothing is lost
    assert set(other) == {"val", "codes"} and "had scores of other weights" in said
    aside = tmp_path / f"evals.{first['val']['weights']}.json"
    assert json.loads(aside.read_text()) == scores


@pytest.mark.parametrize("content", ["[]", '{"val": 3}', "{"])
def test_a_file_in_the_way_of_evals_json_is_named_before_anything_runs(trained, tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "evals.json").write_text(content)
    result = run_script("-m", "tools.evals", f"--ckpt={tmp_path}", "--device=cpu")
    assert result.returncode == 1 and result.stdout == ""
    assert f"{tmp_path / 'evals.json'}: it is no file of scores, move it away" in result.stderr
    assert (tmp_path / "evals.json").read_text() == content
