"""
Reads and edits codes by nnsight, in a folder of export.py --export_format=hf.

tests/test_export.py runs it by the Python of another environment: nnsight_program.py FOLDER
EXPECTED, with what model.py gives in expected.pt. Prints "equal" after the last check.
"""
import sys

import torch
from nnsight import NNsight
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main():
    expected = torch.load(sys.argv[2])
    idx = expected["idx"]
    plain = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    model = NNsight(plain)
    (first, first_edit), (second, second_edit) = expected["edits"]
    saes = plain.saes()

    with model.trace(idx):
        layer = model.gpt.blocks[first].sae
        codes = saes[first].encode(layer.input)
        ids = codes[1].ids.save()
        values = codes[1].values.save()
        layer.output = saes[first].decode(saes[first].edit(codes, [first_edit]))
        layer = model.gpt.blocks[second].sae
        codes = saes[second].encode(layer.input)
        layer.output = saes[second].decode(saes[second].edit(codes, [second_edit]))
        logits = model.output.logits.save()
    assert torch.equal(ids, expected["codes"][first][1][0])
    assert torch.equal(values, expected["codes"][first][1][1])
    assert torch.equal(logits, expected["edited"])

    with model.trace(idx):  # the value of a line of forward, by nnsight's source tracing
        codes = model.gpt.blocks[second].sae.source.self_encode_0.output.save()
        logits = model.output.logits.save()
    assert torch.equal(codes[1].ids, expected["codes"][second][1][0])
    assert torch.equal(logits, expected["logits"])
    print("equal")


if __name__ == "__main__":
    main()
