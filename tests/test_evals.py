"""evals.py against independent computations."""
import json
import math

import numpy as np
import pytest
import torch

from conftest import ROOT, run_script, run_training
from evals import (code_scores, continuation_scores, hellaswag_scores, hellaswag_text, lambada_scores, loss_scores,
                   mean_and_error, window_losses)
from model import GPT, GPTConfig
from prepare_fineweb import get_tokenizer

ENCODING = get_tokenizer("bytes")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=2, n_head=2, n_embd=32, cayley_levels="5,4,0;8,6,16")).eval()


def log_probability(model, context, continuation):
    """One token at a time, without batches or padding."""
    total = 0.0
    for i, token in enumerate(continuation):
        logits = model(torch.tensor([context + continuation[:i]]))[0][0, -1].double()
        total += logits.log_softmax(-1)[token].item()
    return total


def test_continuation_scores_equal_one_by_one(model):
    pairs = [(ENCODING.encode_ordinary(a), ENCODING.encode_ordinary(b)) for a, b in
             (("The cat", " sat"), ("A much longer context here", " x"), ("Q", " an answer of some length"))]
    for (score, _), pair in zip(continuation_scores(model, pairs), pairs):
        assert score == pytest.approx(log_probability(model, *pair), abs=1e-3)
    context = pairs[0][0]
    greedy = []
    for _ in range(3):
        greedy.append(model(torch.tensor([context + greedy]))[0][0, -1].argmax().item())
    assert [g for _, g in continuation_scores(model, [(context, greedy), (context, greedy[:2] + [(greedy[2] + 1) % 256])])] == [True, False]
    long = [(list(range(100)), [5, 6])]  # more than block_size: the start of the context is lost
    assert continuation_scores(model, long)[0][0] == pytest.approx(log_probability(model, list(range(100))[-63:], [5, 6]), abs=0.5)


def test_hellaswag_takes_the_ending_of_largest_log_probability_per_character(model):
    rng = np.random.default_rng(0)
    rows = [{"ctx": f"Item {i}", "endings": ["".join(rng.choice(list("abcde "), rng.integers(3, 9))) for _ in range(4)],
             "label": int(rng.integers(4))} for i in range(12)]
    correct = []
    for row in rows:
        context = [256] + list(row["ctx"].encode())
        values = [log_probability(model, context, list((" " + ending).encode())) / len(ending) for ending in row["endings"]]
        correct.append(int(np.argmax(values)) == row["label"])
    assert hellaswag_scores(model, ENCODING, rows)["accuracy"] == pytest.approx(np.mean(correct))


def test_hellaswag_rows_of_the_hub_are_cleaned():
    row = {"activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix.", "ctx_b": "then you", "ctx": "unused",
           "endings": ["stir  it. [substeps] Wait.", "go", "run", "sit"]}
    assert hellaswag_text(row) == ["Baking: How to bake. Mix. Then you", "stir it. Wait.", "go", "run", "sit"]
    assert hellaswag_text({"ctx": "Baking: Mix. then you", "endings": ["stir", "b", "c", "d"]})[:2] == ["Baking: Mix. then you", "stir"]


def test_an_untrained_model_is_at_chance(model):
    rng = np.random.default_rng(0)
    endings = [["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(4)] for _ in range(400)]
    rows = [{"ctx": f"Item {i}", "endings": ending, "label": str(rng.integers(4))} for i, ending in enumerate(endings)]
    scores = hellaswag_scores(model, ENCODING, rows)
    assert abs(scores["accuracy"] - 0.25) < 4 * scores["standard_error"]


def test_lambada_asks_for_the_whole_last_word(model):
    rows = [{"text": "The end is near"}, {"text": "Once upon a time"}]
    scores = lambada_scores(model, ENCODING, rows)
    expected = [log_probability(model, [256] + list(b"The end is"), list(b" near")),
                log_probability(model, [256] + list(b"Once upon a"), list(b" time"))]
    assert scores["perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-3)
    assert scores["accuracy"] == 0


def test_losses_and_bits_per_byte(model):
    windows = np.random.default_rng(0).integers(0, 256, (10, 17))
    losses = window_losses(model, windows)
    assert losses[3] == pytest.approx(model(torch.from_numpy(windows[3:4, :-1]), torch.from_numpy(windows[3:4, 1:]))[1].item(), abs=1e-5)
    scores = loss_scores(losses, windows, ENCODING)
    assert scores["bits_per_byte"] == pytest.approx(np.mean(losses) / math.log(2))  # a byte a token
    assert mean_and_error([1, 2, 3, 4]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))


def test_code_scores_of_layers_whose_state_is_known(model):
    windows = np.random.default_rng(0).integers(0, 256, (12, 65))
    scores = code_scores(model, windows)
    for layer in scores["layers"]:
        for level, row, k, n in zip((0, 1), layer["levels"], (4, 6), (32, 256)):
            assert row["active"] == k and sum(row["frequency_histogram"]) == n
            assert row["dead"] == row["frequency_histogram"][0] <= row["rare"] <= n
        assert sum(row["norm_share"] for row in layer["levels"]) == pytest.approx(1)
        assert 0 < layer["explained"] < 1
    with torch.no_grad():
        model.blocks[1].mlp.c_proj.weight.zero_()  # now this layer's code can't matter, and the other's can
        model.blocks[0].mlp.c_proj.weight.mul_(50)
        model.blocks[0].sae.bias[7] = 1e4  # feature 7 of level 0 is always active
    loss = np.mean(window_losses(model, windows))
    layers = code_scores(model, windows)["layers"]
    assert layers[1]["loss_dense"] == pytest.approx(loss) == layers[1]["loss_zero"]
    assert abs(layers[0]["loss_zero"] - loss) > 1e-3 and math.isnan(layers[1]["loss_recovered"])
    zero, dense = layers[0]["loss_zero"], layers[0]["loss_dense"]
    assert layers[0]["loss_recovered"] == pytest.approx((zero - loss) / (zero - dense))
    assert layers[0]["levels"][0]["frequency_histogram"][-1] >= 1
    assert np.mean(window_losses(model, windows)) == pytest.approx(loss)  # the code is back in its place


def test_the_script_and_the_paired_comparison(trained, data_dir, tmp_path):
    ckpt = tmp_path / "ckpt.pt"
    ckpt.write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "text.txt").write_text("Some text to score. " * 20)
    (tmp_path / "lambada.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n')
    run = run_script(ROOT / "evals.py", f"--ckpt={ckpt}", f"--vs={trained / 'last.pt'}", "--n_windows=16", "--device=cpu",
                     f"--ppl={tmp_path / 'text.txt'}", f"--lambada={tmp_path / 'lambada.jsonl'}")
    assert run.returncode == 0, run.stderr
    scores = json.loads((tmp_path / "evals.json").read_text())
    assert set(scores) == {"val", "text", "lambada", "codes", "vs"} and scores["lambada"]["items"] == 2
    assert scores["vs"]["loss_difference"] == 0 and len(scores["codes"]["layers"]) == 2  # best and last are the same weights here


def test_training_ends_with_evals(trained, data_dir, tmp_path):
    (tmp_path / "lambada.jsonl").write_text('{"text": "one two three"}\n')
    args = f"--n_windows=16 --lambada={tmp_path / 'lambada.jsonl'}"
    run = run_training(data_dir, tmp_path / "run", max_iters=2, eval_interval=2, final_evals=True, final_evals_args=args)
    assert run.returncode == 0, run.stderr
    scores = json.loads((tmp_path / "run" / "evals.json").read_text())
    assert scores["lambada"]["items"] == 1 and f"lambada: accuracy {scores['lambada']['accuracy']:.4g}" in run.stdout
    again = run_script(ROOT / "evals.py", f"--ckpt={tmp_path / 'run' / 'last.pt'}", *args.split())  # the same by hand
    assert again.returncode == 0 and json.loads((tmp_path / "run" / "evals.json").read_text()) == scores
