"""cayley.py as a library: what a user's own model may do with the layer."""
import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cayley import CayleySAE, Codes, Edit, Level, label_bits, plain_encode, sum_by_index
from model import GPT, GPTConfig

LEVELS = "5,4,0;9,5,16"


def small_sae():
    torch.manual_seed(0)
    return CayleySAE(32, LEVELS)


def statistics(sae):
    return {name: value.clone() for name, value in sae.state_dict().items() if name != "bias"}


# -----------------------------------------------------------------------------
# steering


@pytest.mark.parametrize("grad", [True, False])
def test_codes_can_be_changed_in_place(grad):
    """The README's snippet, with and without gradients."""
    sae = small_sae().double()
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=grad)
    codes = sae.encode(x)
    plain = sae.decode(codes)
    codes[1].values[..., 0] += 8
    steered = sae.decode(codes)
    first = codes[1].ids[..., 0]
    atoms = sae.atoms(1, first.flatten()).view(2, 7, 32)
    torch.testing.assert_close(steered - plain, 8 * atoms)
    if grad:
        (gradient,) = torch.autograd.grad(steered.sum(), x)
        (expected,) = torch.autograd.grad(sae(x).sum(), x)
        torch.testing.assert_close(gradient, expected)


def test_an_edit_is_a_tuple_with_names():
    sae = small_sae().eval()
    x = torch.randn(2, 7, 32)
    sae.edits = [Edit(level=1, feature=77, keep=1, add=8.0)]
    named = sae(x)
    sae.edits = [(1, 77, 1, 8.0)]
    assert torch.equal(sae(x), named)


def test_record_holds_every_forward_s_input_and_the_codes_that_were_handed_on():
    sae = small_sae().eval()
    sae.edits = [Edit(1, 77, 0, 5.0)]
    sae.record = []
    inputs = [torch.randn(3, 32), torch.randn(2, 5, 32)]
    outputs = [sae(x) for x in inputs]
    assert len(sae.record) == 2
    for record, x, output in zip(sae.record, inputs, outputs):
        assert torch.equal(record.x, x)
        assert torch.equal(sae.decode(record.codes), output)
    sae.record = None
    sae(inputs[0])


def test_recording_is_undone_at_its_end():
    torch.manual_seed(0)
    config = GPTConfig(8, 65, n_layer=2, n_head=2, n_embd=32, cayley_levels=LEVELS)
    model = GPT(config).eval()
    idx = torch.randint(65, (2, 8))
    with pytest.raises(ValueError, match="do not fit"):
        with model.recording():
            model(torch.zeros(1, 9, dtype=torch.int64))
    assert [sae.record for sae in model.saes()] == [None, None]
    with model.recording() as records:
        model(idx)
        model(idx)
    assert [len(layer) for layer in records] == [2, 2]
    _, codes = model.run_with_codes(idx)
    for layer, layer_codes in zip(records, codes):
        for recorded, code in zip(layer[-1].codes, layer_codes):
            assert torch.equal(recorded.values, code.values)


# -----------------------------------------------------------------------------
# statistics that nothing spoils


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_left_out_and_said(bad):
    sae = small_sae()
    sae(torch.randn(50, 32))
    sae.update_stats()
    before = statistics(sae)
    x = torch.randn(50, 32)
    x[7, 3] = bad
    sae(x)
    with pytest.warns(UserWarning, match="not finite"):
        sae.update_stats()
    assert torch.equal(sae.mean, before["mean"]) and torch.equal(sae.var, before["var"])
    assert sae.skipped_updates == 1
    sae(torch.randn(50, 32))
    sae.update_stats()
    assert sae.mean.isfinite().all() and not torch.equal(sae.mean, before["mean"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_keeps_its_statistics_in_float32(dtype):
    sae = small_sae().to(dtype)
    x = 100 * torch.randn(2, 600, 32).to(dtype)  # sums of squares far beyond float16
    output = sae(x)
    sae.update_stats()
    assert output.dtype == dtype and output.isfinite().all()
    assert sae.mean.dtype == sae.var.dtype == torch.float32
    assert sae.var.isfinite().all() and (sae.var > 1).all()
    assert sae.double().var.dtype == torch.float64


def test_statistics_are_float32_also_where_the_default_is_less():
    torch.set_default_dtype(torch.bfloat16)  # as transformers' from_config does it
    try:
        sae = small_sae()
    finally:
        torch.set_default_dtype(torch.float32)
    assert sae.bias.dtype == torch.bfloat16
    sums = [buffer for buffer in sae.buffers() if buffer.is_floating_point()]
    assert len(sums) == 5 and {buffer.dtype for buffer in sums} == {torch.float32}
    sae(torch.randn(2, 600, 32).bfloat16())
    sae.update_stats()
    assert (sae.mean != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_half_precision_does_not_round_the_statistics(dtype):
    sae = small_sae()
    sae.mean.fill_(1.0101)
    sae.var.fill_(70_000.0)  # infinite in float16
    before = sae.mean.clone(), sae.var.clone()
    sae.to(dtype)
    assert torch.equal(sae.mean, before[0]) and torch.equal(sae.var, before[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(reentrant):
    x = torch.randn(3, 40, 32, requires_grad=True)
    plain, recomputed = small_sae(), small_sae()
    plain(x).sum().backward()
    checkpoint(recomputed, x, use_reentrant=reentrant).sum().backward()
    for sae in (plain, recomputed):
        sae.update_stats()
    expected = statistics(plain)
    for name, value in statistics(recomputed).items():
        torch.testing.assert_close(value, expected[name])
    assert recomputed.active_counts.sum() == 3 * 40 * 9


# -----------------------------------------------------------------------------
# devices and errors


def test_sums_on_cuda_do_not_depend_on_the_order_of_additions():
    torch.manual_seed(0)
    features = torch.randint(50, (4000,))
    values = torch.randn(4000) * torch.rand(50)[features] ** 4
    sums = sum_by_index(values, features, 60)
    order = torch.randperm(4000)
    assert torch.equal(sum_by_index(values[order], features[order], 60), sums)
    exact = torch.zeros(60, dtype=torch.float64).index_add_(0, features, values.double())
    torch.testing.assert_close(sums, exact.float(), atol=1e-9, rtol=1e-7)
    tiny = 1e-30 * values
    torch.testing.assert_close(sum_by_index(tiny, features, 60) * 1e30, sums)
    assert not sum_by_index(0 * values, features, 60).any()
    assert not sum_by_index(values[:0], features[:0], 60).any()
    for bad in (float("nan"), float("inf")):
        values[7] = bad
        assert not sum_by_index(values, features, 60)[features[7]].isfinite()


def test_the_biases_gradient_is_that_of_indexing():
    torch.manual_seed(0)
    bias = torch.randn(50, requires_grad=True)
    features = torch.randint(50, (4000,))
    weight = torch.randn(4000)
    (expected,) = torch.autograd.grad((bias.double()[features] * weight).sum(), bias)
    torch.testing.assert_close(sum_by_index(weight, features, 50), expected)
    sums = torch.compile(sum_by_index, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(sums(weight, features, 50), expected)
    # and of a layer with as many features, all of them active
    sae = CayleySAE(32, "5,32,0").eval()
    x = torch.randn(20, 32)
    ids, values = sae.encode(x)[0]
    weight = torch.randn(20, 32)
    (expected,) = torch.autograd.grad((sae.bias.double()[ids] * weight).sum(), sae.bias)
    (gradient,) = torch.autograd.grad((values * weight).sum(), sae.bias)
    torch.testing.assert_close(gradient, expected)


def test_shapes_on_a_device_that_is_neither_cpu_nor_cuda():
    with torch.device("meta"):
        sae = CayleySAE(1024, "10,16,0;15,32,256")
        x = torch.randn(2, 7, 1024, requires_grad=True)
    codes = sae.encode(x)
    assert [code.ids.shape for code in codes] == [(2, 7, 16), (2, 7, 32)]
    output = sae(x)
    output.sum().backward()
    assert output.shape == x.shape == x.grad.shape and output.device.type == "meta"


@pytest.mark.parametrize("x, words", [
    (torch.zeros(3, 31), ["(3, 31)", "n_embd=32"]),
    (torch.zeros(32), ["(32,)", "(..., tokens, n_embd=32)"]),
    (torch.zeros(3, 64), ["(3, 64)", "n_embd=32"]),
])
def test_a_wrong_input_is_one_sentence(x, words):
    with pytest.raises(ValueError) as error:
        small_sae()(x)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("n_embd, levels, words", [
    (64, None, ["levels=None", "'10,16,0;15,32,256'"]),
    (64, 6, ["levels=6"]),
    (64, [], ["at least one"]),
    (64, "", ["''", "n,k,delta"]),
    (64, [(6, 4)], ["(6, 4)", "n,k,delta"]),
    (64, [(6, 4, None)], ["(6, 4, None)"]),
    (64.0, "6,4,0", ["n_embd=64.0", "power of two"]),
    ("64", "6,4,0", ["n_embd='64'", "power of two"]),
    (-64, "6,4,0", ["n_embd=-64", "power of two"]),
    (True, "6,4,0", ["n_embd=True", "power of two"]),
])
def test_a_wrong_argument_is_one_sentence(n_embd, levels, words):
    with pytest.raises(ValueError) as error:
        CayleySAE(n_embd, levels)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_levels_may_be_levels_or_triples():
    for levels in ([Level(6, 4, 0), Level(9, 5, 16)], [(6, 4, 0), (9, 5, 16)]):
        assert CayleySAE(64, levels).levels == CayleySAE(64, "6,4,0;9,5,16").levels


def in_forward_mode(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("differentiate", [
    lambda f, x: func.grad(lambda x: f(x).sum())(x),
    lambda f, x: func.vmap(func.grad(lambda x: f(x).sum()))(x[:, None]),
    lambda f, x: func.grad(lambda x: func.vmap(f)(x).sum())(x[:, None]),
    lambda f, x: func.jacrev(f)(x),
    lambda f, x: func.jvp(f, (x,), (x,)),
    in_forward_mode,
])
@pytest.mark.parametrize("only_decode", [False, True])
def test_derivatives_that_the_operators_lack_are_refused(differentiate, only_decode):
    """PyTorch would raise an obscure error in the first four, and give 0 in the others."""
    sae = small_sae().eval()
    x = torch.randn(3, 32)
    ids = [code.ids for code in sae.encode(x)]

    def function(x):
        if only_decode:
            level = Codes(ids[0][:len(x)], x[:, :4])
            return sae.decode([level])
        return sae(x)

    with pytest.raises(NotImplementedError, match="torch.autograd.functional.jacobian"):
        differentiate(function, x)


def test_derivatives_that_the_operators_have():
    """vmap, and torch.func.grad for what only reads the codes."""
    sae = small_sae().eval()
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(func.vmap(sae)(x[:, None]).squeeze(1), sae(x))
    jacobian = torch.autograd.functional.jacobian(lambda x: sae(x).sum(0), x)
    torch.testing.assert_close(jacobian.sum(0), torch.autograd.grad(sae(x).sum(), x)[0])
    probe = func.grad(lambda w: (sae(x.detach()) * w).sum())(torch.ones(32))
    torch.testing.assert_close(probe, sae(x).sum(0))


# -----------------------------------------------------------------------------
# what faults made by hand got past, see records/mutants


def test_labels_have_one_bit_at_least():
    with pytest.raises(ValueError, match="n=0: GF.2.10., for n_embd=1024, gives labels of 1 to 25"):
        label_bits(10, 0)


def test_scores_that_are_no_multiple_of_eight():
    """33 blocks of 2 features, of which the best is wanted."""
    torch.manual_seed(0)
    sae = CayleySAE(64, "6,33,0;7,1,2").double()
    x = torch.randn(20, 64, dtype=torch.float64)
    atoms = [sae.atoms(i, range(2**level.n)) for i, level in enumerate(sae.levels)]
    for code, expected in zip(sae.encode(x), plain_encode(sae, x, atoms)):
        assert torch.equal(code.ids, expected.ids)


@pytest.mark.parametrize("length", [1, 5, 8, 20])
def test_statistics_see_the_last_position(length):
    sae = small_sae()
    x = torch.zeros(3, length, 32)
    x[:, -1] = torch.randn(32)
    sae(x)
    sae.update_stats()
    assert (sae.mean != 0).any()


def test_finite_inputs_whose_squares_are_not_are_left_out():
    sae = small_sae()
    before = statistics(sae)
    sae(1e25 * torch.randn(50, 32))
    with pytest.warns(UserWarning, match="not finite"):
        sae.update_stats()
    assert torch.equal(sae.mean, before["mean"]) and torch.equal(sae.var, before["var"])


def test_a_feature_without_variance_has_a_finite_score():
    sae = small_sae()
    sae.var.zero_()
    assert sae(torch.randn(50, 32)).isfinite().all()


def test_autocast_reaches_the_output_and_not_the_statistics():
    x = torch.randn(2, 40, 32)
    plain, autocast = small_sae(), small_sae()
    plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast(x).dtype == torch.bfloat16
    for sae in (plain, autocast):
        sae.update_stats()
    torch.testing.assert_close(autocast.mean, plain.mean)
    torch.testing.assert_close(autocast.var, plain.var)
