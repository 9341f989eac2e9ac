import pytest
import torch
from tiny import SHAPES, tiny_model, tokens
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
