"""The GPT, its sampling, and the optimizers."""
import math

import pytest
import torch
from conftest import interrupted_stream

import model as model_module
from checkpoint import load_checkpoint
from model import GPT, DecodingStep, GPTConfig, KVCache
from muon import CLASSIC, POLAR_EXPRESS, Muon, MuonAdamW, orthogonalize
from tools.account import train_settings

SMALL = dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=64)


def small_gpt(levels="6,4,0;9,5,16", **overrides):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, "cayley_levels": levels, **overrides}))


def test_reference_parameter_count():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.get_num_params() == 202_531_840
    assert sum(sae.bias.numel() for sae in model.saes()) == 405_504


@pytest.mark.parametrize("levels", ["6,4,0;9,5,16", ""])
def test_a_later_token_never_changes_an_earlier_logit(levels):
    model = small_gpt(levels).eval()
    idx = torch.randint(65, (2, 32))
    changed = idx.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 65
    logits, changed_logits = model(idx, idx)[0], model(changed, idx)[0]
    torch.testing.assert_close(logits[:, :20], changed_logits[:, :20])
    assert (logits[:, 20:] - changed_logits[:, 20:]).abs().amax((0, 2)).gt(1e-4).all()


def test_loss_starts_at_ln_vocab_and_falls():
    model = small_gpt()
    optimizer = MuonAdamW(model, 0.02, 0.005)
    idx = torch.randint(65, (4, 33))
    losses = []
    for _ in range(30):
        losses.append(model(idx[:, :-1], idx[:, 1:])[1])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        for sae in model.saes():
            sae.update_stats()
    assert losses[0].item() == pytest.approx(math.log(65), abs=0.2)
    assert losses[-1].item() < 2


def test_logits_beside_a_loss_cost_its_compiled_backward_nothing():
    """An output with a gradient would have torch.compile add zeros of its size to the loss's."""
    model = small_gpt()
    idx = torch.randint(65, (2, 32))
    logits, loss = model(idx, idx)
    assert not logits.requires_grad and loss.requires_grad
    torch.testing.assert_close(logits, model(idx, n_logits=0)[0])


def test_whole_model_compiles_without_graph_breaks():
    model = small_gpt()
    idx = torch.randint(65, (2, 32))
    loss = model(idx, idx)[1]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(idx, idx)[1]
    compiled.backward()
    torch.testing.assert_close(compiled, loss, atol=1e-5, rtol=1e-5)
    assert all(p.grad is not None for p in model.parameters())


# -----------------------------------------------------------------------------
# sampling

@pytest.mark.parametrize("levels", ["6,4,0;9,5,16", ""])
@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 5)])
def test_same_text_with_and_without_the_cache(levels, temperature, top_k):
    model = small_gpt(levels)
    prompt = torch.randint(65, (3, 7))
    texts = []
    for use_cache in (True, False):
        sampling = dict(temperature=temperature, top_k=top_k, use_cache=use_cache)
        generator = torch.Generator().manual_seed(1)
        texts.append(model.generate(prompt, 100, generator=generator, **sampling))
    assert torch.equal(*texts) and texts[0].shape == (3, 107)
    assert torch.equal(texts[0][:, :7], prompt) and model.training


def test_cache_read_in_pieces_gives_the_logits_of_one_pass():
    model = small_gpt().eval()
    idx = torch.randint(65, (2, 30))
    cache = KVCache(model.config, 2, idx.device, torch.float32)
    for piece in idx.split([10, 1, 12, 7], 1):
        logits, _ = model(piece, cache=cache)
    torch.testing.assert_close(logits, model(idx)[0])


# What a CUDA graph replays runs here as it is, without the graph; test_cuda.py has both.

@pytest.mark.parametrize("levels", ["6,4,0;9,5,16", ""])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.7, "top_k": 5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_text_by_decoding_steps(monkeypatch, levels, sampling, dtype):
    model = small_gpt(levels).to(dtype)
    prompt = torch.randint(65, (3, 7))
    expected = model.generate(
        prompt, 100, use_cache=False, generator=torch.Generator().manual_seed(1), **sampling
    )
    steps = []

    class CountedStep(DecodingStep):
        def __call__(self, token):
            steps.append(token)
            return super().__call__(token)
    monkeypatch.setattr(model_module, "STATIC_DEVICES", ("cpu",))
    monkeypatch.setattr(model_module, "DecodingStep", CountedStep)
    text = model.generate(prompt, 100, generator=torch.Generator().manual_seed(1), **sampling)
    assert torch.equal(text, expected)
    assert len(steps) == 100 - 1 - 5  # all but the first token and 5 refills of the cache


def test_decoding_steps_give_the_logits_of_one_pass_in_any_dtype():
    model = small_gpt().eval()
    idx = torch.randint(65, (2, 20))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model.to(dtype)
        expected, _ = model(idx, n_logits=0)
        cache = KVCache(model.config, 2, idx.device, dtype)
        model(idx[:, :5], cache=cache)
        step = DecodingStep(model, cache)
        with torch.no_grad():
            logits = torch.cat([step(token) for token in idx[:, 5:].split(1, 1)], 1)
        assert logits.dtype == dtype
        assert (logits - expected[:, 5:]).norm() < tolerance * expected.norm()


def test_edits_records_and_hooks_may_begin_between_tokens(monkeypatch):
    """By decoding steps as by forwards."""
    model = small_gpt()
    prompt = torch.randint(65, (1, 4))
    texts = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(model_module, "STATIC_DEVICES", devices)
        texts.append(interrupted_stream(model, prompt, (1, 3, 1, 40.0)))
    assert torch.equal(*texts)
    plain = model.generate(prompt, 24, temperature=0)[:, 4:]
    assert torch.equal(plain[:, :6], texts[0][:, :6]) and not torch.equal(plain, texts[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["bias", "mean", "var"])
def test_biases_and_statistics_may_change_between_tokens(name):
    """A decoding step, which computes what follows from them once, gives a forward's logits."""
    model = small_gpt().eval()
    idx = torch.randint(65, (2, 8))
    caches = [KVCache(model.config, 2, idx.device, torch.float32) for _ in range(2)]
    for cache in caches:
        model(idx[:, :4], cache=cache)
    step = DecodingStep(model, caches[0])
    for place in range(4, 8):
        token = idx[:, place:place + 1]
        logits = step(token)
        torch.testing.assert_close(logits, model(token, cache=caches[1])[0])
        for sae in model.saes():
            getattr(sae, name)[place::3] += 3


def test_greedy_takes_the_most_likely_token_and_padding_is_never_sampled():
    model = small_gpt()
    prompt = torch.randint(65, (2, 5))
    token = next(model.stream(prompt, 1, temperature=0))
    assert torch.equal(token[:, 0], model.eval()(prompt)[0][:, -1].argmax(-1))
    assert model.generate(prompt, 60, n_tokens=3)[:, 5:].max() < 3


def test_model_errors(tmp_path):
    model = small_gpt()
    with pytest.raises(ValueError, match="33 tokens do not fit in block_size=32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match="n_embd=64 is not a multiple of n_head=3"):
        small_gpt(n_head=3)
    with pytest.raises(ValueError, match="n_layer=0"):
        small_gpt(n_layer=0)
    with pytest.raises(ValueError, match="nothing.pt: no such checkpoint"):
        load_checkpoint(str(tmp_path / "nothing.pt"))
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="bad.pt: not a readable checkpoint"):
        load_checkpoint(str(tmp_path / "bad.pt"))
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    lacks = "foreign.pt: not a checkpoint of train.py, it lacks config, model_args"
    with pytest.raises(ValueError, match=lacks):
        load_checkpoint(str(tmp_path / "foreign.pt"))


def test_a_checkpoint_with_code_is_refused(tmp_path):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return open, (str(marker), "w")
    torch.save({"model": Attack(), "model_args": {}, "config": {}}, tmp_path / "attack.pt")
    with pytest.raises(ValueError, match="attack.pt: not a readable checkpoint"):
        load_checkpoint(str(tmp_path / "attack.pt"))
    assert not marker.exists()


# -----------------------------------------------------------------------------
# optimizers

@pytest.mark.parametrize("coefficients, low", [(POLAR_EXPRESS, 0.8), (CLASSIC, 0.6)])
@pytest.mark.parametrize("shape", [(192, 768), (768, 192), (3, 100, 400)])
def test_orthogonalize_moves_singular_values_to_one(coefficients, low, shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    X = orthogonalize(G, coefficients).float()
    values = torch.linalg.svdvals(X)
    assert low < values.min() and values.max() < 1.2
    # the same singular vectors: near the polar factor U V^T
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert (X * (U @ V)).sum() / X.norm() / (U @ V).norm() > 0.98


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (96, 96)])
def test_agrees_with_torch_muon(shape):
    """torch.optim.Muon has the classic triple and no splits: there both are the same up to bf16."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    rates = dict(lr=0.1, weight_decay=0.1)
    optimizers = (
        Muon([ours], coefficients=CLASSIC, **rates),
        torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="original", **rates),
    )
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone(), theirs.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
        update, expected = ours.detach() - before[0], theirs.detach() - before[1]
        assert (update - expected).norm() < 0.04 * expected.norm()


def test_step_on_a_cpu_is_its_plain_definition_in_float64():
    """The classic triple; to float32's precision, that a CPU's steps have, and not bf16's."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(96, 32))
    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5, coefficients=CLASSIC)
    expected, average = p.detach().double(), torch.zeros(96, 32, dtype=torch.double)
    for _ in range(3):
        p.grad = torch.randn(96, 32)
        average = 0.9 * average + 0.1 * p.grad.double()
        X = 0.1 * p.grad.double() + 0.9 * average
        X = X / X.norm()
        for a, b, c in CLASSIC:
            X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 3**0.5 * X
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), expected, atol=1e-5, rtol=1e-5)


def test_split_matrices_are_orthogonalized_separately():
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.zeros(3 * 64, 64))
    parts = [torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)]
    sizes = torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(64)[:, None]
    stacked.grad = torch.randn(3 * 64, 64) * sizes
    for part, grad in zip(parts, stacked.grad.chunk(3)):
        part.grad = grad.clone()
    Muon([stacked], lr=1.0, splits={stacked: 3}).step()
    Muon(parts, lr=1.0).step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in parts]))


def test_every_parameter_has_one_optimizer():
    model = small_gpt()
    optimizer = MuonAdamW(model, 0.02, 0.003)
    muon = {id(p) for p in optimizer.muon.param_groups[0]["params"]}
    adamw = {id(p) for p in optimizer.adamw.param_groups[0]["params"]}
    assert muon == {id(p) for p in model.blocks.parameters() if p.dim() == 2} and not muon & adamw
    assert muon | adamw == {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="Muon takes 2D parameters"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def changed_by_a_step(rates, gradient, weight_decay=0.0):
    """Names of the parameters that a step changes whose gradients are a constant times theirs."""
    model = small_gpt()
    for p in model.parameters():
        torch.nn.init.normal_(p)
        p.grad = gradient * p.detach()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MuonAdamW(model, 0.5, 0.5, weight_decay=weight_decay)
    optimizer.set_lr(*rates)
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    matrices = [name for name, p in model.blocks.named_parameters("blocks") if p.dim() == 2]
    return changed, matrices, [name for name in before if name not in matrices]


def test_rates_and_weight_decay_reach_the_parameters_they_are_for():
    changed, matrices, others = changed_by_a_step((0.1, 0.0), gradient=1)
    assert changed == matrices
    changed, matrices, others = changed_by_a_step((0.0, 0.1), gradient=1)
    assert changed == others
    changed, matrices, others = changed_by_a_step((0.1, 0.1), gradient=0, weight_decay=0.1)
    assert changed == matrices


def test_each_matrix_of_a_batch_is_orthogonalized_by_its_own_norm():
    torch.manual_seed(0)
    G = torch.randn(3, 64, 256) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    for matrix, alone in zip(orthogonalize(G), G):
        torch.testing.assert_close(matrix, orthogonalize(alone), atol=0.02, rtol=0)


def test_each_rank_loads_its_own_share(monkeypatch):
    stored = [torch.full((8, 4), float(i)) for i in range(5)]
    for rank, expected in enumerate([[0, 1], [2, 3], [4]]):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        optimizer = Muon([torch.nn.Parameter(torch.zeros(8, 4)) for _ in stored], lr=0.1)
        optimizer.load_state_dict({"momentum": stored})
        assert optimizer.momentum[8, 4][:, 0, 0].tolist() == expected


def test_muon_calls_its_closure_and_passes_over_what_has_no_gradient():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 4)) for _ in range(3)]
    alone = torch.nn.Parameter(weights[0].detach().clone())
    optimizer = Muon(weights, lr=0.1, weight_decay=0.1)
    of_alone = Muon([alone], lr=0.1, weight_decay=0.1)
    before = weights[1].detach().clone()

    def closure_of(optimizer, p):
        def closure():
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss
        return closure
    for _ in range(3):
        expected = of_alone.step(closure_of(of_alone, alone))
        assert optimizer.step(closure_of(optimizer, weights[0])) == expected
    assert torch.equal(weights[1], before)
    torch.testing.assert_close(weights[0], alone)


# -----------------------------------------------------------------------------
# the schedule

def learning_rates(**settings):
    """train.py's get_lr with these settings."""
    return train_settings([f"--{key}={value}" for key, value in settings.items()])["get_lr"]


def test_reference_schedule():
    get_lr = learning_rates()
    lr = [get_lr(it, 1.2e-2, 1.5e-4) for it in (0, 100, 200, 1271, 12716)]
    assert lr == pytest.approx([0, 0.6e-2, 1.2e-2, 1.2e-2, 1.5e-4])
    middle = (12716 + 1271.6) / 2
    assert get_lr(middle, 1.2e-2, 1.5e-4) == pytest.approx((1.2e-2 + 1.5e-4) / 2)
    factors = [[(get_lr(it, lr, low) - low) / (lr - low) for it in (300, 5000, 12000)]
               for lr, low in ((1.2e-2, 1.5e-4), (3e-4, 1e-5))]
    assert factors[0] == pytest.approx(factors[1])  # in lockstep, whatever the rates
    get_lr = learning_rates(lr_schedule="cosine")
    cosine = [get_lr(it, 1, 0.1) for it in (200, (200 + 12716) / 2, 12716)]
    assert cosine == pytest.approx([1, 0.55, 0.1])
    get_lr = learning_rates(lr_schedule="constant")
    assert [get_lr(it, 1, 0.1) for it in (100, 200, 12716)] == pytest.approx([0.5, 1, 1])


# -----------------------------------------------------------------------------
# codes and interventions

def test_run_with_codes_is_the_forward_and_says_what_it_read():
    model = small_gpt().eval()
    idx = torch.randint(65, (2, 10))
    inputs = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda mlp, args: inputs.append(args[0]))
    logits, codes = model.run_with_codes(idx)
    torch.testing.assert_close(logits, model(idx, idx)[0])
    assert len(codes) == 2 and [level.ids.shape for level in codes[0]] == [(2, 10, 4), (2, 10, 5)]
    for block, layer_codes, mlp_input in zip(model.blocks, codes, inputs):
        torch.testing.assert_close(block.sae.decode(layer_codes), mlp_input)


def test_edits_change_the_mlp_input_by_exactly_the_atom_times_the_change():
    model = small_gpt().eval()
    sae, inputs = model.blocks[0].sae, []
    model.blocks[0].mlp.register_forward_pre_hook(lambda mlp, args: inputs.append(args[0]))
    idx = torch.randint(65, (2, 10))
    _, codes = model.run_with_codes(idx)
    feature = codes[0][1].ids[0, 4, 2].item()  # active at one token at least, not at all of them
    old = codes[0][1].values.masked_fill(codes[0][1].ids != feature, 0).sum(-1)
    assert (old != 0).any() and (old == 0).any()
    atom = sae.atoms(1, [feature])[0]
    steered = (1, 8.0, torch.full_like(old, 8.0))
    ablated = (0, 0.0, -old)
    set_to_5 = (0, 5.0, 5.0 - old)
    for keep, add, change in (steered, ablated, set_to_5):
        sae.edits = [(1, feature, keep, add)]
        model(idx)
        torch.testing.assert_close(inputs[-1] - inputs[0], change[..., None] * atom)
    sae.edits = []
    model(idx)
    assert torch.equal(inputs[-1], inputs[0])
