"""
lm-evaluation-harness' samples against evals.py, item by item.

    PYTHONPATH=. python records/interop/lm_eval/compare.py --ckpt=CKPT --samples=DIRECTORY

samples: what lm_eval --log_samples --output_path wrote, of the tasks in this directory. Prints, for
each task, how many decisions agree and the largest difference of a log-probability.
"""
import glob
import json
import os

from checkpoint import load_model
from configurator import configure
from data import encode, get_tokenizer, read_json_lines
from tools import evals

# settings, see configurator.py
ckpt = "out/ckpt.pt"
samples = "samples"


def hellaswag_row(model, encoding, row):
    """Log-probabilities of the four endings, and the chosen one."""
    context, *endings = evals.hellaswag_text(row)
    context_ids = [encoding.eot_token] + encode(encoding, context)
    pairs = [(context_ids, encode(encoding, " " + ending)) for ending in endings]
    log_probs = [score for score, _ in evals.continuation_scores(model, pairs)]
    normed = [score / max(1, len(ending)) for score, ending in zip(log_probs, endings)]
    return log_probs, normed.index(max(normed)) == int(row["label"])


def lambada_row(model, encoding, row):
    """Log-probability of the last word, and whether it is the most likely one."""
    context, _, word = row["text"].rstrip().rpartition(" ")
    context_ids = [encoding.eot_token] + encode(encoding, context)
    pairs = [(context_ids, encode(encoding, " " + word))]
    ((score, greedy),) = evals.continuation_scores(model, pairs)
    return [score], greedy


def compare(task, score_row, metric, model, encoding):
    """Print one line: items, agreeing decisions, the largest difference of a log-probability."""
    (path,) = glob.glob(os.path.join(samples, "**", f"samples_{task}_*.jsonl"), recursive=True)
    agree = right = theirs_right = items = 0
    largest = 0.0
    for sample in read_json_lines(path):
        log_probs, correct = score_row(model, encoding, sample["doc"])
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert len(theirs) == len(log_probs), "another number of endings"
        largest = max([largest] + [abs(a - b) for a, b in zip(theirs, log_probs)])
        agree += bool(sample[metric]) == correct
        right += correct
        theirs_right += bool(sample[metric])
        items += 1
    print(json.dumps({"task": task, "items": items, "same decision": agree, "right here": right,
                      "right there": theirs_right, "largest difference, nats": largest}))


def main():
    configure(globals())
    evals.batch_size = 1  # as lm_eval with --batch_size 1
    model, config = load_model(ckpt)
    encoding = get_tokenizer(config["tokenizer"])
    for kind in ("local", "plain"):
        compare(f"hellaswag_{kind}", hellaswag_row, "acc_norm", model, encoding)
        compare(f"lambada_{kind}", lambada_row, "acc", model, encoding)


if __name__ == "__main__":
    main()
