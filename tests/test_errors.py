"""Every wrong invocation ends with status 1 and one line: the value, and what would be right."""
import gc
import shlex
import signal

import pytest
from conftest import ROOT, TINY, arguments, contents, run_here

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # train.py takes them
# A row: what is wrong on the command line, and words of the error line.
TRAIN = [
    ("--n_layers=2", "'n_layers'", "'n_layer'"),
    ("--batch_size=2.5", "batch_size=2.5 must be int"),
    ("--torch_compile=1", "torch_compile=1 must be bool"),
    ("--muon_lr=high", "muon_lr='high' must be float"),
    ("--muon_lr=-0.1", "muon_lr=-0.1", "at least 0"),
    ("--max_iters=-5", "max_iters=-5", "at least 1"),
    ("--eval_interval=0", "eval_interval=0", "at least 1"),
    ("--batch_size=0", "batch_size=0", "at least 1"),
    ("--n_layer=0", "n_layer=0", "at least 1"),
    ("--block_size=-1", "block_size=-1", "at least 1"),
    ("--block_size=0", "block_size=0", "at least 1"),
    ("--momentum=1.0", "momentum=1.0", "below 1"),
    ("--seed=1e20", "seed=1", "below 9223372036854775808"),
    ("--muon_lr=1e999", "muon_lr=inf", "finite"),
    ("--lr_schedule=step", "lr_schedule='step'", "'cosine'"),
    ("--dtype=float16", "dtype='float16'", "'bfloat16'"),
    ("--init_from=gpt2", "init_from='gpt2'", "'resume'"),
    ("--warmdown_frac=2.0", "warmdown_frac=2.0", "at most 1"),
    ("--device=cuda", "device='cuda'", "--device=cpu"),
    ("--device=tpu", "device='tpu'", "'cpu'"),
    ("--data_dir=nowhere", "nowhere/meta.json is missing", "prepare_fineweb.py"),
    ("--vocab_size=100", "vocab_size=100", "257"),
    ("--block_size=100000", "block_size + 1 = 100001"),
    ("--n_embd=48", "n_embd=48", "power of two"),
    ("--n_embd=8 --cayley_levels=3,2,0", "n_embd=8", "16 to 4096"),
    ("--n_head=5", "n_embd=32 is not a multiple of n_head=5"),
    ("--cayley_levels=5,4,0;8,6", "'8,6'", "n,k,delta"),
    ("--cayley_levels=5,4,0;8,40,16", "'8,40,16'", "1 to the 16"),
    ("--cayley_levels=5,40,0", "'5,40,0'", "1 to the 32"),
    ("--cayley_levels=6,4,0", "'6,4,0'", "= 5"),
    ("--cayley_levels=5,4,0;16,4,2048", "'16,4,2048'", "15 bits"),
    ("--cayley_levels=5,4,0;8,4,12", "'8,4,12'", "power of two"),
    ("--init_from=resume", "last.pt: no such checkpoint"),
    ("--out_dir=link", "out_dir='link'", "a link to nowhere", "choose another"),
    ("--out_dir=link/run", "out_dir='link/run'", "choose another"),
    ("--wandb_log=True", "wandb"),
]
SAMPLE = [
    ("--ckpt=nothing.pt", "nothing.pt: no such checkpoint"),
    ("--ckpt=.", "./ckpt.pt: no such checkpoint"),
    ("--temperature=1e-320", "temperature=1e-320", "0.001"),
    ("--temperature=1e400", "temperature=inf", "1000"),
    ("--seed=-1", "seed=-1", "at least 0"),
    (f"--ckpt={ROOT}/README.md", "README.md: not a readable checkpoint"),
    ("--start=" + "x" * 40, "41 tokens", "block_size=32"),
    ("--start=FILE:nothing.txt", "sample.py: nothing.txt: No such file or directory"),
    ("--compare", "--compare", "--steer or --ablate"),
    ("--temperature=-1", "temperature=-1", "at least 0"),
    ("--num_samples=0", "num_samples=0", "at least 1"),
    ("--temprature=1", "'temprature'", "'temperature'"),
    ("--num_samples=two", "num_samples='two' must be int"),
    ("--ckpt", "--ckpt needs a value"),
    ("--device=cuda", "device='cuda'", "--device=cpu"),
    ("ckpt.pt", "'ckpt.pt'", "--key=value"),
    ("--steer=1.1", "'1.1'", "layer.level.feature=+8"),
    ("--steer=1.1.3", "'1.1.3'", "layer.level.feature=+8"),
    ("--steer=1.1.3=+9999999", "'1.1.3=+9999999'", "1,000,000"),
    ("--steer=1.1.3=+nan", "'1.1.3=+nan'", "1,000,000"),
    ("--steer=1.1.3=inf", "'1.1.3=inf'", "1,000,000"),
    ("--steer=1.1.3=much", "'1.1.3=much'", "layer.level.feature=+8"),
    ("--steer=1.1.3=+-8", "'1.1.3=+-8'", "layer.level.feature=+8"),
    ("--ablate=2.0.0", "'2.0.0'", "2 layers"),
    ("--ablate=1.2.0", "'1.2.0'", "2 levels"),
    ("--ablate=1.1.256", "'1.1.256'", "256 features"),
]
TOO_FEW = "val_tokens=1000000000", "lower --val_tokens"
PREPARE = [
    ("--source=nowhere/*.jsonl --tokenizer=bytes", "nowhere/*.jsonl", "no such file"),
    ("--source=text.csv --tokenizer=bytes", "text.csv", ".parquet"),
    ("--source=python --tokenizer=gpt4", "tokenizer='gpt4'", "'bytes'"),
    ("--source=python --tokenizer=bytes --val_tokens=-1", "val_tokens=-1", "at least 0"),
    ("--source=python --tokenizer=bytes --tokens=0", "tokens=0", "at least 1"),
    ("--source=python --tokenizer=bytes --val_tokens=1e9", *TOO_FEW),
    ("--source=python --shard=4/4 --tokenizer=bytes", "shard='4/4'", "0 <= i < n"),
    ("--source=python --on-error=ignore", "on_error='ignore'", "'replace'"),
    ("--sorce=python", "'sorce'", "'source'"),
    ("--source=python --tokenizer=bytes --out_dir=link", "out_dir='link'", "a link to nowhere"),
    ("--verify=nowhere", "nowhere/meta.json is missing"),
]
EVALS = [
    ("--hellaswag=nothing.jsonl", "nothing.jsonl: no such file"),
    ("--n_windows=1", "n_windows=1", "at least 2"),
    ("--data_dir=nowhere", "nowhere/meta.json is missing"),
    ("--vs=nothing.pt", "nothing.pt: no such checkpoint"),
    (f"--lambada={ROOT}/README.md", "README.md, line 1: not JSON"),
    (f"--ppl={ROOT}/tests", "tests: no such file"),
    ("--limit=-1", "limit=-1", "at least 0"),
    ("--device=cpu:x", "device='cpu:x'", "cpu:number"),
    ("--ckpt=.", "./ckpt.pt: no such checkpoint"),
]
FEATURES = [
    ("--tokens=0", "tokens=0", "at least 1"),
    ("--text=nothing.txt", "nothing.txt: no such file"),
    ("--text=/dev/null", "/dev/null: no such file"),
    ("--out_dir=", "out_dir=''", "new directory"),
    ("--data_dir=nowhere", "nowhere/meta.json is missing"),
    (f"--out_dir={ROOT}/configs", "configs is there already", "another --out_dir"),
    ("--out_dir=link", "out_dir='link'", "a link to nowhere"),
]
EXPORT = [
    ("--export_format=onnx", "export_format='onnx'", "saelens"),
    (f"--out_dir={ROOT}/configs", "configs is there already", "another --out_dir"),
    ("--out_dir=link", "link is there already", "another --out_dir"),
]
TAX = [
    ("--config=nothing.py", "nothing.py: no such config"),
    ("--seeds=0", "seeds=0", "at least 1"),
    ("'--variant=k 4: cayley_levels'", "'cayley_levels'", "key=value"),
]
BENCH = [
    ("--section=speed", "section='speed'", "layer"),
    ("--dtype=fp8", "dtype='fp8'", "'bf16'"),
]
CONFIG = [
    ("n_layer = 'two'", "n_layer='two' must be int"),
    ("n_layer = (", "config", "never closed"),
    ("layers = 3", "'layers'", "'n_layer'"),
    ("n_layer = undefined", "'undefined'"),
    ("exit(0)", "SystemExit"),
]



@pytest.fixture
def fails(monkeypatch, capfd, tmp_path):
    """Run a script in this process with arguments that are wrong -> its one line of error."""

    def invoke(script, *command):
        name = script
        script = [str(ROOT / name)]
        if not (ROOT / name).exists():
            script = ["-m", f"tools.{name.removesuffix('.py')}"]
        monkeypatch.chdir(tmp_path)
        if not (tmp_path / "link").is_symlink():
            (tmp_path / "link").symlink_to("nowhere")
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        with pytest.raises(SystemExit) as end:
            run_here([*script, *map(str, command)])
        for number in STOPPING:
            signal.signal(number, handlers[number])
        gc.collect()  # what train.py holds to the end of its process, as the lock
        error = capfd.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith(name)]
        assert end.value.code == 1 and len(lines) == 1 and "Traceback" not in error, error
        return lines[0]

    return invoke


def check_words(line, words):
    missing = [word for word in words if word not in line]
    assert not missing, line


def of_scripts(**tables):
    """Rows of several scripts' tables for parametrize, (script, command, words)."""
    return [(f"{name}.py", row[0], row[1:]) for name, table in tables.items() for row in table]


@pytest.mark.parametrize("script, command, words", of_scripts(train=TRAIN))
def test_train(fails, data_dir, tmp_path, script, command, words):
    settings = {**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run"}
    check_words(fails(script, *arguments(settings), *shlex.split(command)), words)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("script, text, words", of_scripts(train=CONFIG))
def test_config_file(fails, tmp_path, script, text, words):
    (tmp_path / "c.py").write_text(text)
    check_words(fails(script, tmp_path / "c.py"), words)


@pytest.mark.parametrize(
    "script, command, words", of_scripts(sample=SAMPLE, evals=EVALS, features=FEATURES)
)
def test_scripts_that_read_a_checkpoint(fails, trained, script, command, words):
    ckpt = f"--ckpt={trained / 'ckpt.pt'}"
    check_words(fails(script, ckpt, "--device=cpu", *shlex.split(command)), words)
    assert not (trained / "evals.json").exists()


@pytest.mark.parametrize(
    "script, command, words",
    of_scripts(prepare_fineweb=PREPARE, bench=BENCH, tax=TAX, export=EXPORT),
)
def test_other_scripts(fails, tmp_path, script, command, words):
    extra = {
        "prepare_fineweb.py": [f"--out_dir={tmp_path / 'bins'}"],
        "tax.py": [f"--config={ROOT / 'configs/demo.py'}"],
    }
    check_words(fails(script, *extra.get(script, []), *shlex.split(command)), words)


@pytest.mark.parametrize("key, ours", [
    ("learning_rate", "'muon_lr' and 'adamw_lr'"),
    ("min_lr", "'muon_min_lr' and 'adamw_min_lr'"),
    ("compile", "'torch_compile'"),
    ("dropout", "there is no dropout here"),
])
def test_nanogpt_s_names_are_refused_with_ours(fails, tmp_path, key, ours):
    check_words(fails("train.py", f"--{key}=1"), [repr(key), ours])
    (tmp_path / "c.py").write_text(f"{key} = 1\n")
    check_words(fails("train.py", tmp_path / "c.py"), ["c.py", repr(key), ours])


def test_accumulation_must_be_a_multiple_of_the_ranks(fails, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = {**TINY, "data_dir": data_dir, "out_dir": tmp_path / "run"}
    line = fails("train.py", *arguments(settings))
    assert "gradient_accumulation_steps=4 is not a multiple of the 3 ranks" in line


LEVELS = "cayley_levels='5,4,0;8,6,16', not '5,4,0;8,6,32'"


@pytest.mark.parametrize("command, words", [
    ("", ["last.pt is there already", "--init_from=resume"]),
    ("--init_from=resume --n_layer=3", ["n_layer=2, not 3"]),
    ("--init_from=resume --cayley_levels=5,4,0;8,6,32", [LEVELS]),
])
def test_existing_run(fails, trained, data_dir, command, words):
    before = contents(trained)
    settings = {**TINY, "data_dir": data_dir, "out_dir": trained}
    check_words(fails("train.py", *arguments(settings), *shlex.split(command)), words)
    assert before == contents(trained)


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
        line = fails("train.py", *arguments(settings))
        check_words(line, ["last.pt: not a readable checkpoint", "ckpt.pt is there"])
