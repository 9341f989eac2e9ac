import pytest
import torch
import transformers
from packaging import version
from tiny import SHAPES, Kinds, tiny_model, tokens
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_on_a_gpu_is_that_on_the_cpu(shape):
    model = tiny_model(SHAPES[shape])
    ids, options = tokens(2, 70), {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(ids, **options)
    model.cuda()
    assert torch.equal(model.generate(ids.cuda(), **options).cpu(), expected)
    assert torch.equal(
        model.generate(ids.cuda(), num_beams=3, **options),
        model.generate(ids.cuda(), num_beams=3, use_cache=False, **options),
    )


# Two attention layers: with one the host prefetches the layer that it is reading.
OFFLOADED = [SHAPES["gka pure"], SHAPES["kla pure"]]
OFFLOADED += [Kinds(["full_attention", "linear_attention", "full_attention"], family) for family in ("gka", "kla")]


@pytest.mark.parametrize("kinds", OFFLOADED, ids=lambda kinds: f"{kinds.family} {len(kinds)}")
def test_an_offloaded_cache_gives_the_same(kinds):
    if "full_attention" in kinds and version.parse(transformers.__version__) < version.parse("5.20"):
        pytest.skip("the host's prefetch does not wait for its own offload before 5.20")
    model, ids = tiny_model(kinds).cuda(), tokens(2, 70).cuda()
    options = {"do_sample": False, "max_new_tokens": 12, "disable_compile": True}
    expected = model.generate(ids, **options)
    for kind in ("offloaded", "offloaded_static"):
        assert torch.equal(model.generate(ids, cache_implementation=kind, **options), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_assisted_decoding_on_a_gpu_is_greedy(shape):
    model, ids = tiny_model(SHAPES[shape]).cuda(), tokens(1, 7).repeat(1, 4).cuda()
    options = {"do_sample": False, "max_new_tokens": 30}
    if "sliding_attention" in SHAPES[shape] and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("older sliding-window layers of the host record one call at a time")
    draft = tiny_model(SHAPES["kla pure"], seed=1).cuda()
    draft.generation_config.num_assistant_tokens = 4
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=5, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_step(dtype, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="auto").train()
    ids = tokens(2, 70).cuda()
    loss = model(ids, labels=ids).loss
    loss.backward()
    exact = tiny_model()(ids.cpu(), labels=ids.cpu()).loss
    assert abs(loss.item() - exact.item()) < 0.03
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_run_where_their_inputs_are(shape, dtype):
    """On the second GPU while the first is the current one, as for the later layers of a spread model."""
    ids, found = tokens(2, 70), []
    for device in ("cuda:0", "cuda:1"):
        model = tiny_model(SHAPES[shape]).to(device, dtype).train()
        loss = model(ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        generated = model.eval().generate(ids.to(device), do_sample=False, max_new_tokens=8)
        found.append([loss.detach().cpu(), generated.cpu(), *(p.grad.cpu() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("structure", ["diagonal", "block", "kronecker", "low_rank", "full"])
def test_a_filter_on_a_gpu_is_that_on_the_cpu(structure):
    from hf_kalman.training import KalmanOptimizer

    torch.manual_seed(0)
    start, factors, gradients = torch.randn(6, 5), torch.randn(60, 1, 6, 5), torch.randn(60, 6, 5)
    found = []
    for device in ("cpu", "cuda"):
        weight = torch.nn.Parameter(start.clone().to(device))
        options = {"structure": structure, "rank": 3, "process_noise": 1e-4, "prior_steps": 4}
        optimizer = KalmanOptimizer([weight], None, **options)
        for factor, gradient in zip(factors, gradients, strict=True):
            optimizer.beliefs[weight].accumulate(factor)
            weight.grad = gradient.clone().to(device)
            optimizer.step()
        found.append(weight.detach().cpu())
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-4)


def test_adaptation_on_a_gpu_is_that_on_the_cpu():
    from hf_kalman.training import InnovationTuner

    losses = []
    for device in ("cpu", "cuda"):
        model = tiny_model(SHAPES["gka pure"]).to(device)
        tuner = InnovationTuner(model, ("head",), rule="least_squares", variance=1e-9)
        losses.append([tuner.step(tokens(2, 70).to(device)).loss for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
