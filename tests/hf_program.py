"""
Loads a folder of export.py --export_format=hf where this repository can't be imported.

tests/test_export.py runs it by the Python of another environment: hf_program.py FOLDER EXPECTED,
with what model.py gives in expected.pt; without it for the tokenizer alone, whose ids are in
FOLDER/texts.json. Prints "equal" after the last check.
"""
import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def check_tokenizer(folder):
    """Ids of texts.json, and the text back from them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text, ids in json.loads((Path(folder) / "texts.json").read_text()):
        assert tokenizer(text).input_ids == ids, text
        assert tokenizer.decode(ids) == text, text
    assert tokenizer.padding_side == "left"
    return tokenizer


def check_logits(model, expected):
    """Bit for bit, alone, padded, and their gradients."""
    idx, rows = expected["idx"], expected["rows"]
    assert torch.equal(model(idx).logits, expected["logits"])
    assert torch.equal(model(idx, logits_to_keep=3).logits, expected["logits"][:, -3:])
    padded, mask = pad(rows)
    for use_cache in (False, True):
        logits = model(padded, attention_mask=mask, use_cache=use_cache).logits
        for row, ours, theirs in zip(rows, expected["row_logits"], logits):
            assert torch.equal(theirs[-len(row):], ours)
    loss = model(idx, labels=idx).loss
    loss.backward()
    torch.testing.assert_close(loss, expected["loss"])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected["gradients"][name.removeprefix("gpt.")])
    holes = mask.clone()
    holes[0, -2] = 0
    for arguments in ({"attention_mask": holes}, {"position_ids": padded}):
        try:
            model(padded, **arguments)
        except ValueError as error:
            assert list(arguments)[0] in str(error)
        else:
            raise AssertionError(f"{arguments} is taken")


def pad(rows):
    """Rows of ids on the right of (B, T), and the mask of where they are."""
    T = max(map(len, rows))
    padded = torch.stack([torch.cat([torch.zeros(T - len(row)).long(), row]) for row in rows])
    mask = torch.stack([torch.arange(T) >= T - len(row) for row in rows]).long()
    return padded, mask


def check_generation(model, expected):
    """Greedy text, with and without cache, one row and several of different length."""
    padded, mask = pad(expected["rows"])
    for use_cache in (True, False):
        sampling = {"do_sample": False, "max_new_tokens": 8, "use_cache": use_cache}
        sampling["eos_token_id"] = None  # ours goes on behind end of text as well
        text = model.generate(padded, attention_mask=mask, **sampling)
        beams = model.generate(padded, attention_mask=mask, num_beams=3, **sampling)
        for i, (row, ours) in enumerate(zip(expected["rows"], expected["generated"])):
            assert torch.equal(text[i, -8 - len(row):], ours)
            alone = row.unsqueeze(0)
            assert torch.equal(model.generate(alone, **sampling)[0], ours)
            beam = model.generate(alone, num_beams=3, **sampling)[0]
            assert torch.equal(beams[i, -len(beam):], beam)


def check_codes(model, expected):
    """Codes are read and edited, and training folds statistics, as in model.py."""
    logits, codes = model.run_with_codes(expected["idx"])
    assert torch.equal(logits, expected["logits"])
    for layer, ours in zip(codes, expected["codes"]):
        for code, (ids, values) in zip(layer, ours):
            assert torch.equal(code.ids, ids) and torch.equal(code.values, values)
    for layer, edit in expected["edits"]:
        model.saes()[layer].edits.append(edit)
    assert torch.equal(model(expected["idx"]).logits, expected["edited"])
    for sae in model.saes():
        sae.edits.clear()
    model.train()
    model(expected["idx"])
    for sae, mean in zip(model.saes(), expected["means"]):
        sae.update_stats()
        assert torch.equal(sae.mean, mean)
    model.eval()


def check_model(folder, expected):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    check_logits(model, expected)
    check_generation(model, expected)
    model.save_pretrained(expected["resaved"])
    check_codes(model, expected)
    again = AutoModelForCausalLM.from_pretrained(expected["resaved"], trust_remote_code=True)
    assert torch.equal(again(expected["idx"]).logits, expected["logits"])
    narrow = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    assert narrow.dtype == torch.bfloat16 and narrow.saes()[0].var.dtype == torch.float32
    assert narrow(expected["idx"]).logits.isfinite().all()


def main():
    folder = sys.argv[1]
    assert importlib.util.find_spec("cayley") is None, "this must run elsewhere"
    check_tokenizer(folder)
    if len(sys.argv) > 2:
        check_model(folder, torch.load(sys.argv[2]))
    print("equal")


if __name__ == "__main__":
    main()
