"""The package as a Hub kernel, through the `kernels` library: loaded beside the installed one, and put into models."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_kalman  # noqa: F401
import kalman_kernels
from hf_kalman.hub import use_kernel, write_kernel

kernels = pytest.importorskip("kernels")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel")
    write_kernel(folder)
    return folder


def model(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        f"kalman_{family}",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_loaded_kernel_computes_what_the_package_computes(repository):
    loaded = kernels.get_local_kernel(repository)
    assert loaded is not kalman_kernels and loaded.gated_kalmanet is not kalman_kernels.gated_kalmanet
    torch.manual_seed(0)
    query, key = torch.nn.functional.normalize(torch.randn(2, 1, 70, 2, 16), dim=-1)
    value, log_decay = torch.randn(1, 70, 2, 16), -0.1 * torch.rand(1, 70, 2)
    found = []
    for package in (kalman_kernels, loaded):
        own = [t.clone().requires_grad_() for t in (query, key, value, log_decay)]
        outputs, state = package.gated_kalmanet(*own)
        (outputs.square().sum() + state.key_gram.sum()).backward()
        found.append([outputs.detach(), *state, *(t.grad for t in own)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["gka", "kla"])
def test_a_model_is_served_by_it(family, repository):
    own, ids = model(family), torch.randint(1, 61, (2, 40))
    expected, generated = own(ids, labels=ids), own.generate(ids, do_sample=False, max_new_tokens=6)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in own.parameters()]
    own.zero_grad()
    served = use_kernel(own.train(), repository, training=True)
    exchanged = [m for m in served.modules() if hasattr(m, "kernel_layer_name")]
    assert exchanged and all(m.forward.__func__.__module__.startswith("_kalman_kernels_") for m in exchanged)
    output = served(ids, labels=ids)
    assert torch.equal(output.logits, expected.logits)
    output.loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(served.parameters(), gradients, strict=True))
    use_kernel(served.eval(), repository)
    assert torch.equal(served.generate(ids, do_sample=False, max_new_tokens=6), generated)


def test_what_cannot_be_done_is_said(repository, monkeypatch):
    with pytest.raises(FileExistsError, match="holds a build"):
        write_kernel(repository)
    with pytest.raises(ValueError, match="none of the layers"):
        use_kernel(torch.nn.Linear(2, 2), repository)
    monkeypatch.setitem(__import__("sys").modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        use_kernel(model("gka"), repository)


def test_the_metadata_are_valid(repository):
    rust = pytest.importorskip("kernels._rust")
    build = rust.Build.open(ROOT)
    assert "Cpu" in repr(build.general) and "Cuda" in repr(build.general)
    for variant in ("torch-cpu", "torch-cuda"):
        metadata = rust.Metadata.read_from_file(repository / "build" / variant / "metadata.json")
        assert str(metadata.name) == "kalman-kernels" and metadata.version == 1


def test_the_snippet_of_the_card(repository):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CARD.md").read_text(), re.DOTALL)[1]
    exec(code.replace("path/of/this/repository", str(repository)), {})
