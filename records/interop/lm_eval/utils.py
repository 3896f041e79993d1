"""The rows of hellaswag_local.yaml: the harness' own cleaning, on rows that have ctx whole."""
from lm_eval.tasks.hellaswag.utils import preprocess

MAX_BYTES = 255  # the harness ends at an ending longer than the model's context: 256 bytes here


def process_docs(dataset):
    def process(row):
        return {
            "query": preprocess(row["ctx"]),
            "choices": [preprocess(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }

    def fits(row):
        return max(len(choice.encode()) for choice in row["choices"]) <= MAX_BYTES

    return dataset.map(process).filter(fits)
