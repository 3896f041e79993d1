"""
Loads a folder of export.py --export_format=hf where this repository can't be imported.

tests/test_export.py runs it by the Python of another environment: hf_program.py FOLDER EXPECTED,
with what model.py gives in expected.pt; without it for the tokenizer alone, whose ids are in
FOLDER/texts.json. Prints "equal" after the last check.
"""
import copy
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    StaticCache,
    pipeline,
)


def check_tokenizer(folder):
    """Ids of texts.json, and the text back from them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text, ids in json.loads((Path(folder) / "texts.json").read_text()):
        assert tokenizer(text).input_ids == ids, text
        assert tokenizer.decode(ids) == text, text
    assert tokenizer.padding_side == "left"
    return tokenizer


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def refuses(word, function, *arguments, **keywords):
    """Whether a call raises a ValueError that names word."""
    try:
        function(*arguments, **keywords)
    except ValueError as error:
        return word in str(error)
    return False


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
    for arguments in (
        {"attention_mask": holes},
        {"position_ids": padded},
        {"output_attentions": True},
        {"token_type_ids": padded},
        {"past_keys": None, "past_cache": 1},
    ):
        assert refuses(list(arguments)[-1], model, padded, **arguments), arguments
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # as generate() of other models would give them
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits, model(padded, attention_mask=mask).logits)


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
    sampling["use_cache"] = True
    text = model.generate(padded, attention_mask=mask, **sampling)
    for settings in (
        {"cache_implementation": "static"},
        {"assistant_model": copy.deepcopy(model)},
        {"prefill_chunk_size": 3},
    ):
        batch = (padded, mask)
        if "cache_implementation" not in settings:  # the others take one row
            batch = (padded[2:3], mask[2:3])
        again = model.generate(batch[0], attention_mask=batch[1], **sampling, **settings)
        assert torch.equal(again, text if len(again) > 1 else text[2:3]), settings


def check_caches(model, expected):
    """A cache by both of its names, dynamic and static; a text that outgrows block_size."""
    idx, logits = expected["idx"], expected["logits"]
    for name in ("cache", "past_key_values"):
        for cache in (None, StaticCache(model.config, max_cache_len=16)):
            first = model(idx[:, :5], use_cache=True, **{name: cache})
            cache = first.past_key_values
            assert cache is not None and int(cache.get_seq_length()) == 5
            last = model(idx[:, 5:], **{name: cache}).logits
            torch.testing.assert_close(last, logits[:, 5:])
            assert int(cache.get_seq_length()) == idx.shape[1]
    assert refuses("past_key_values", model, idx, cache=cache, past_key_values=cache)
    long = {"max_new_tokens": model.config.block_size, "eos_token_id": None}
    for use_cache in (True, False):
        assert refuses("block_size", model.generate, idx, use_cache=use_cache, **long)


def check_outputs(folder, model, expected):
    """Hidden states, tuples and embeddings as input, asked for where other models are asked."""
    idx, logits = expected["idx"], expected["logits"]
    talkative = load(folder, output_hidden_states=True)
    output = talkative(idx)
    assert torch.equal(output.logits, logits)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.get_output_embeddings()(output.hidden_states[-1]), logits)
    padded, mask = pad(expected["rows"])
    states = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
    for row, ours in zip(expected["rows"], zip(*states)):
        alone = model(row[None], output_hidden_states=True).hidden_states
        for state, state_alone in zip(ours, alone):
            torch.testing.assert_close(state[-len(row):], state_alone[0])
    output = model(idx, return_dict=False)
    assert type(output) is tuple and torch.equal(output[0], logits)
    embeds = model.get_input_embeddings()(idx)
    assert torch.equal(model(inputs_embeds=embeds).logits, logits)
    assert refuses("inputs_embeds", model, idx, inputs_embeds=embeds)
    terse = load(folder, return_dict=False, use_cache=False)
    traced = torch.jit.trace(terse, idx)
    assert torch.equal(traced(idx + 1)[0], model(idx + 1).logits)


def check_card(folder):
    """The card's own lines run, one block after the other, from the directory above."""
    lines = (Path(folder) / "README.md").read_text().split("## Limitations")[0].splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    "))
    namespace = {}
    exec(code, namespace)
    assert namespace["ids"][0, 0] == namespace["tokenizer"].eos_token_id
    assert namespace["logits"].isfinite().all()
    return namespace["UpdateStatistics"]()


def check_pipeline(folder, model, tokenizer):
    """Rows of different length, batched, give what each gives alone."""
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["def", "import os"]
    sampling = {"max_new_tokens": 5, "do_sample": False}
    together = generate(prompts, batch_size=2, **sampling)
    for prompt, text in zip(prompts, together):
        assert text == generate(prompt, **sampling)


def check_training(folder, expected):
    """Checkpointed gradients are the same; more tokens; no text's end is hidden as padding."""
    idx = expected["idx"]
    model = load(folder)
    for use_reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        model.zero_grad()
        model(idx, labels=idx).loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected["gradients"][name.removeprefix("gpt.")])
    assert refuses("use_cache", model, idx, use_cache=True)
    model.gradient_checkpointing_disable()
    model.eval()

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ends = [tokenizer("one" + tokenizer.eos_token), tokenizer("three" + tokenizer.eos_token)]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    labels = collate(ends)["labels"]
    assert (labels == tokenizer.eos_token_id).sum() == 2 and (labels == -100).sum() == 2

    tokenizer.add_tokens(["<new>"])
    before = model(idx).logits
    model.resize_token_embeddings(model.config.vocab_size + 3)
    assert torch.equal(model(idx).logits[..., :before.shape[-1]], before)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    new = tokenizer("<new>").input_ids[0]
    model.get_input_embeddings().weight.data[new] = 100 * model(
        idx[:1], output_hidden_states=True
    ).hidden_states[-1][0, -1].detach()
    assert model.generate(idx[:1], max_new_tokens=1, do_sample=False)[0, -1] == new
    model.save_pretrained(expected["resaved"])
    again = load(expected["resaved"])
    assert torch.equal(again(idx).logits, model(idx).logits)


def check_missing(folder, expected):
    """What a file lacks, or has in another size, is as in a new model, and the rest as it was."""
    damaged = Path(expected["resaved"]).with_name("damaged")
    shutil.copytree(folder, damaged)
    tensors = load_file(damaged / "model.safetensors")
    missing = ["gpt.blocks.0.sae.var", "gpt.blocks.1.sae.mean", "gpt.blocks.1.ln_2.weight",
               "gpt.blocks.1.mlp.c_proj.weight", "gpt.blocks.0.sae.bias"]
    for name in missing:
        del tensors[name]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    model = load(damaged, block_size=40, vocab_size=300, ignore_mismatched_sizes=True)
    state = model.state_dict()
    assert (state[missing[0]] == 1).all() and (state[missing[1]] == 0).all()
    assert (state[missing[2]] == 1).all() and (state[missing[4]] == 0).all()
    for name in ("wte", "wpe", "lm_head"):
        std = state[f"gpt.{name}.weight"].std()
        assert 0.018 < std < 0.022, (name, std)
    assert 0.009 < state[missing[3]].std() < 0.011  # 0.02 / sqrt(2 * 2 layers)
    for name, tensor in tensors.items():
        if name not in ("gpt.wte.weight", "gpt.wpe.weight"):
            assert torch.equal(state[name], tensor), name
    for sae in model.saes():
        for name, buffer in sae.named_buffers():
            assert buffer.isfinite().all() and buffer.dtype != torch.bfloat16, name
    assert model(expected["idx"]).logits.isfinite().all()
    narrow = AutoModelForCausalLM.from_config(
        model.config, trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    assert narrow.saes()[0].pending_xx.dtype == torch.float32


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


def check_model(folder, tokenizer, expected):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert transformers.__version__ in model.config.tested_with_transformers
    check_logits(model, expected)
    check_generation(model, expected)
    check_caches(model, expected)
    check_pipeline(folder, model, tokenizer)
    model.save_pretrained(expected["resaved"])
    check_codes(model, expected)
    again = load(expected["resaved"])
    assert torch.equal(again(expected["idx"]).logits, expected["logits"])
    narrow = load(folder, torch_dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and narrow.saes()[0].var.dtype == torch.float32
    assert narrow(expected["idx"]).logits.isfinite().all()
    model.train()
    model(expected["idx"])
    before = [sae.mean.clone() for sae in model.saes()]
    check_card(folder).on_optimizer_step(None, None, None, model=model)
    assert not any(torch.equal(sae.mean, mean) for sae, mean in zip(model.saes(), before))
    check_training(folder, expected)
    check_missing(folder, expected)
    check_outputs(folder, load(folder), expected)


def main():
    folder = sys.argv[1]
    assert importlib.util.find_spec("cayley") is None, "this must run elsewhere"
    tokenizer = check_tokenizer(folder)
    if len(sys.argv) > 2:
        check_model(folder, tokenizer, torch.load(sys.argv[2]))
    print("equal")


if __name__ == "__main__":
    main()
