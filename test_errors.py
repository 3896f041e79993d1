"""Every wrong invocation ends with status 1 and one line that names the value and what would be right."""
import runpy
import sys

import pytest

from conftest import ROOT, TINY

TRAIN = [
    (dict(n_layers=2), ["'n_layers'", "'n_layer'"]),
    (dict(batch_size=2.5), ["batch_size=2.5 must be int"]),
    (dict(compile=1), ["compile=1 must be bool"]),
    (dict(muon_lr="high"), ["muon_lr='high' must be float"]),
    (dict(muon_lr=-0.1), ["muon_lr=-0.1", "not be negative"]),
    (dict(max_iters=-5), ["max_iters=-5", "at least 1"]),
    (dict(eval_interval=0), ["eval_interval=0", "at least 1"]),
    (dict(batch_size=0), ["batch_size=0", "at least 1"]),
    (dict(n_layer=0), ["n_layer=0", "at least 1"]),
    (dict(block_size=-1), ["block_size=-1", "at least 1"]),
    (dict(lr_schedule="step"), ["lr_schedule='step'", "'cosine'"]),
    (dict(dtype="float16"), ["dtype='float16'", "'bfloat16'"]),
    (dict(init_from="gpt2"), ["init_from='gpt2'", "'resume'"]),
    (dict(warmdown_frac=2.0), ["warmdown_frac=2.0", "0 to 1"]),
    (dict(device="cuda"), ["device='cuda'", "--device=cpu"]),
    (dict(device="tpu"), ["device='tpu'", "'cpu'"]),
    (dict(data_dir="nowhere"), ["nowhere/meta.json is missing", "prepare_fineweb.py"]),
    (dict(vocab_size=100), ["vocab_size=100", "257"]),
    (dict(block_size=100_000), ["block_size + 1 = 100001"]),
    (dict(n_embd=48), ["n_embd=48", "power of two"]),
    (dict(n_embd=8, cayley_levels="3,2,0"), ["n_embd=8", "16 to 4096"]),
    (dict(n_head=5), ["n_embd=32 is not a multiple of n_head=5"]),
    (dict(cayley_levels="5,4,0;8,6"), ["'8,6'", "n,k,delta"]),
    (dict(cayley_levels="5,4,0;8,40,16"), ["'8,40,16'", "1 to the 16"]),
    (dict(cayley_levels="5,40,0"), ["'5,40,0'", "1 to the 32"]),
    (dict(cayley_levels="6,4,0"), ["'6,4,0'", "= 5"]),
    (dict(cayley_levels="5,4,0;16,4,2048"), ["'16,4,2048'", "15 bits"]),
    (dict(cayley_levels="5,4,0;8,4,12"), ["'8,4,12'", "power of two"]),
    (dict(init_from="resume"), ["last.pt: no such checkpoint"]),
    (dict(wandb_log=True), ["wandb"]),
    (dict(final_evals=True, final_evals_args="--lambada=nothing.jsonl"), ["nothing.jsonl: no such file"]),
    (dict(final_evals=True, final_evals_args="--lambda=hub"), ["'lambda'", "'lambada'"]),
]
SAMPLE = [
    (["--ckpt=nothing.pt"], ["nothing.pt: no such checkpoint"]),
    (["--ckpt=" + str(ROOT / "README.md")], ["README.md: not a readable checkpoint"]),
    (["--start=" + "x" * 40], ["41 tokens", "block_size=32"]),
    (["--start=FILE:nothing.txt"], ["nothing.txt"]),
    (["--temperature=-1"], ["temperature=-1", "not be negative"]),
    (["--num_samples=0"], ["num_samples=0", "at least 1"]),
    (["--temprature=1"], ["'temprature'", "'temperature'"]),
    (["--num_samples=two"], ["num_samples='two' must be int"]),
    (["--ckpt"], ["--ckpt needs a value"]),
    (["--device=cuda"], ["device='cuda'", "--device=cpu"]),
    (["ckpt.pt"], ["'ckpt.pt'", "--key=value"]),
    (["--steer=1.1"], ["'1.1'", "layer.level.feature=+8"]),
    (["--steer=1.1.3"], ["'1.1.3'", "layer.level.feature=+8"]),
    (["--ablate=2.0.0"], ["'2.0.0'", "2 layers"]),
    (["--ablate=1.2.0"], ["'1.2.0'", "2 levels"]),
    (["--ablate=1.1.256"], ["'1.1.256'", "256 features"]),
]
PREPARE = [
    (["--source=nowhere/*.jsonl", "--tokenizer=bytes"], ["nowhere/*.jsonl", "no such file"]),
    (["--source=text.csv", "--tokenizer=bytes"], ["text.csv", ".parquet"]),
    (["--source=python", "--tokenizer=gpt4"], ["tokenizer='gpt4'", "'bytes'"]),
    (["--source=python", "--tokenizer=bytes", "--val_tokens=-1"], ["val_tokens=-1", "at least 0"]),
    (["--source=python", "--tokenizer=bytes", "--tokens=0"], ["tokens=0", "at least 1"]),
    (["--source=python", "--tokenizer=bytes", "--val_tokens=1e9"], ["val_tokens=1000000000", "lower --val_tokens"]),
    (["--source=python", "--shard=4/4", "--tokenizer=bytes"], ["shard='4/4'", "0 <= i < n"]),
    (["--source=python", "--on-error=ignore"], ["on_error='ignore'", "'replace'"]),
    (["--sorce=python"], ["'sorce'", "'source'"]),
    (["--verify=nowhere"], ["nowhere/meta.json is missing"]),
]
EVALS = [
    (["--hellaswag=nothing.jsonl"], ["nothing.jsonl: no such file"]),
    (["--n_windows=1"], ["n_windows=1", "at least 2"]),
    (["--data_dir=nowhere"], ["nowhere/meta.json is missing"]),
    (["--vs=nothing.pt"], ["nothing.pt: no such checkpoint"]),
    (["--lambada=" + str(ROOT / "README.md")], ["README.md: not a .jsonl file"]),
]
FEATURES = [
    (["--tokens=0"], ["tokens=0", "at least 1"]),
    (["--text=nothing.txt"], ["nothing.txt: no such file"]),
    (["--data=nowhere"], ["nowhere/meta.json is missing"]),
    (["--out=" + str(ROOT / "configs")], ["configs is there already", "another --out"]),
]
EXPORT = [
    (["--format=onnx"], ["format='onnx'", "saelens"]),
    (["--out=" + str(ROOT / "configs")], ["configs is there already", "another --out"]),
]
TAX = [
    (["--config=nothing.py"], ["nothing.py: no such config"]),
    (["--seeds=0"], ["seeds=0", "at least 1"]),
    (["--variant=k 4: cayley_levels"], ["'cayley_levels'", "key=value"]),
]
BENCH = [(["--section=speed"], ["section='speed'", "layer"]), (["--dtype=fp8"], ["dtype='fp8'", "'bf16'"])]
CONFIG = [("n_layer = 'two'", ["n_layer='two' must be int"]), ("n_layer = (", ["config", "never closed"]),
          ("layers = 3", ["'layers'", "'n_layer'"]), ("n_layer = undefined", ["'undefined'"])]


@pytest.fixture
def fails(monkeypatch, capfd, tmp_path):
    """Run a script in this process with arguments that are wrong -> its one line of error."""
    def invoke(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        error = capfd.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith(script)]
        assert exit.value.code == 1 and len(lines) == 1 and "Traceback" not in error, error
        return lines[0]
    return invoke


def words_in(line, words):
    return [word for word in words if word not in line]


@pytest.mark.parametrize("settings, words", TRAIN, ids=lambda value: str(value))
def test_train(fails, data_dir, tmp_path, settings, words):
    settings = {**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run", **settings}
    assert not words_in(fails("train.py", *[f"--{key}={value}" for key, value in settings.items()]), words)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("text, words", CONFIG, ids=lambda value: str(value))
def test_config_file(fails, tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    assert not words_in(fails("train.py", tmp_path / "c.py"), words)


@pytest.mark.parametrize("script, arguments, words", [("sample.py", *row) for row in SAMPLE] +
                         [("evals.py", *row) for row in EVALS] + [("features.py", *row) for row in FEATURES], ids=lambda value: str(value))
def test_scripts_that_read_a_checkpoint(fails, trained, script, arguments, words):
    assert not words_in(fails(script, f"--ckpt={trained / 'ckpt.pt'}", "--device=cpu", *arguments), words)
    assert not (trained / "evals.json").exists()


@pytest.mark.parametrize("script, arguments, words", [("prepare_fineweb.py", *row) for row in PREPARE] +
                         [("bench.py", *row) for row in BENCH] + [("tax.py", *row) for row in TAX] +
                         [("export.py", *row) for row in EXPORT], ids=lambda value: str(value))
def test_other_scripts(fails, tmp_path, script, arguments, words):
    extra = {"prepare_fineweb.py": [f"--out={tmp_path / 'bins'}"], "tax.py": [f"--config={ROOT / 'configs/demo.py'}"]}.get(script, [])
    assert not words_in(fails(script, *extra, *arguments), words)


def test_accumulation_must_be_a_multiple_of_the_ranks(fails, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = {**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run"}
    line = fails("train.py", *[f"--{key}={value}" for key, value in settings.items()])
    assert "gradient_accumulation_steps=4 is not a multiple of the 3 ranks" in line


@pytest.mark.parametrize("settings, words", [
    (dict(), ["last.pt is there already", "--init_from=resume"]),
    (dict(init_from="resume", n_layer=3), ["n_layer=2, not 3"]),
    (dict(init_from="resume", cayley_levels="5,4,0;8,6,32"), ["cayley_levels='5,4,0;8,6,16', not '5,4,0;8,6,32'"]),
], ids=lambda value: str(value))
def test_existing_run(fails, trained, data_dir, settings, words):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    settings = {**TINY, "data_dir": data_dir, "out_dir": trained, **settings}
    assert not words_in(fails("train.py", *[f"--{key}={value}" for key, value in settings.items()]), words)
    assert before == {path.name: path.read_bytes() for path in trained.iterdir()}


def test_damaged_checkpoint_is_refused_and_the_other_offered(fails, trained, data_dir, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    whole = (trained / "last.pt").read_bytes()
    (run / "ckpt.pt").write_bytes(whole)
    settings = {**TINY, "data_dir": data_dir, "out_dir": run, "init_from": "resume"}
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    for damaged in (whole[:len(whole) // 2], bytes(altered), b""):
        (run / "last.pt").write_bytes(damaged)
        line = fails("train.py", *[f"--{key}={value}" for key, value in settings.items()])
        assert "last.pt: not a readable checkpoint" in line and "ckpt.pt is there" in line
