"""Push to a Hub on loopback, load elsewhere; the bundle; damaged and newer checkpoints."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from tiny import SHAPES, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from hf_kalman.hub import bundle as bundling
from hf_kalman.hub import check_checkpoint, push_to_hub, write_bundle
from hf_kalman.hub.check import CHECKSUMS

ROOT = Path(__file__).parents[2]
# What a process without this package, and without Triton, cannot import.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_kalman", "kalman_kernels", "kalman_conversion", "triton"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def hub():
    server = FakeHub()
    yield server
    server.close()


def run(code, hub, folder, **more):
    """A process of its own, whose Hub is the fake one."""
    (folder / "home").mkdir(exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_x",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    environment = {k: v for k, v in environment.items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, cwd=folder
    )
    return done


def saved(shape, folder, **fields):
    model = tiny_model(SHAPES[shape], **fields)
    model.save_pretrained(folder)
    ids = tokens(2, 20)
    generated = model.generate(ids, do_sample=False, max_new_tokens=8, num_beams=2)
    torch.save({"ids": ids, "logits": model(ids).logits, "generated": generated}, folder.parent / "expected.pt")
    return model


PUSH = """
import hf_kalman
from hf_kalman.hub import push_to_hub
report = push_to_hub({model!r}, "toy", max_shard_size="20KB"{more})
print(report.repo_id, sorted(report.files))
"""
LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
expected = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("me/toy"{more})
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
options = {{"do_sample": False, "max_new_tokens": 8}}
assert torch.equal(model.generate(expected["ids"], num_beams=2, **options), expected["generated"])
assert torch.equal(
    model.generate(expected["ids"], **options), model.generate(expected["ids"], use_cache=False, **options)
)
static = model.generate(expected["ids"], cache_implementation="static", disable_compile=True, **options)
assert torch.equal(static, model.generate(expected["ids"], **options))
lookup = model.generate(expected["ids"][:1], prompt_lookup_num_tokens=3, **options)
assert torch.equal(lookup, model.generate(expected["ids"][:1], **options))
head = AutoModelForSequenceClassification.from_pretrained("me/toy"{more})
head(expected["ids"][:1]).logits.sum().backward()
print(type(model).__module__, type(head).__module__)
"""


@pytest.mark.parametrize("shape", ["gka hybrid", "kla hybrid"])
def test_what_is_pushed_loads_elsewhere_bit_for_bit(shape, hub, tmp_path):
    saved(shape, tmp_path / "model")
    done = run(PUSH.format(model=str(tmp_path / "model"), more=""), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.private["me/toy"] and len(hub.commits["me/toy"]) == 1
    assert {"README.md", "config.json", CHECKSUMS, *(f"{name}.py" for name in bundling.FILES)} <= set(
        hub.repos["me/toy"]
    )
    # With the package, by the package.
    done = run("import hf_kalman\n" + LOAD.format(more=""), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0].startswith("hf_kalman.")
    # Without the package and without Triton, by the code that travelled.
    code = WITHOUT + LOAD.format(more=", trust_remote_code=True")
    code += "assert not any(name.split('.')[0] in ('hf_kalman', 'kalman_kernels') for name in sys.modules)\n"
    done = run(code, hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(name.startswith("transformers_modules.") for name in done.stdout.split()[-2:])
    # Installed, not imported: the package wins.
    done = run(LOAD.format(more=", trust_remote_code=True"), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2].startswith("hf_kalman.")


def test_in_a_virtual_environment_without_the_package(hub, tmp_path):
    """The libraries of this one by a path file, which does not pass editable installs on."""
    import transformers

    saved("gka hybrid", tmp_path / "model")
    done = run(PUSH.format(model=str(tmp_path / "model"), more=""), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (packages / "host.pth").write_text(str(Path(transformers.__file__).parents[1]) + "\n")
    code = textwrap.dedent("import importlib.util\nassert importlib.util.find_spec('hf_kalman') is None\n")
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home2"),
        "PATH": os.environ["PATH"],
        "HF_TOKEN": "x",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "python"), "-c", code + LOAD.format(more=", trust_remote_code=True")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_push_that_was_cut_off_goes_on(hub, tmp_path):
    """Shards that arrived are not sent again; nothing is committed before all are there."""
    saved("gka hybrid", tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    tiny_model(SHAPES["gka hybrid"]).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = len(list((tmp_path / "model").glob("*.safetensors")))
    assert shards > 2
    code = "import huggingface_hub.lfs as lfs\nlfs.http_backoff.__kwdefaults__.update(max_retries=0)\n"
    hub.drops = 100
    done = run(code + PUSH.format(model=str(tmp_path / "model"), more=""), hub, tmp_path)
    assert done.returncode != 0 and not hub.commits["me/toy"] and not hub.uploaded
    hub.drops = 0
    done = run(PUSH.format(model=str(tmp_path / "model"), more=""), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(hub.uploaded) == len(set(hub.uploaded)) == shards
    # As if the commit alone had been lost: nothing large travels again.
    hub.repos["me/toy"].clear()
    done = run(PUSH.format(model=str(tmp_path / "model"), more=""), hub, tmp_path)
    assert done.returncode == 0 and len(hub.uploaded) == shards
    assert len(hub.repos["me/toy"]) > shards


def test_a_second_push_changes_what_changed(hub, tmp_path):
    folder = tmp_path / "model"
    model = saved("gka hybrid", folder)
    for _ in range(2):
        done = run(PUSH.format(model=str(folder), more=""), hub, tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    assert hub.commits["me/toy"][1:] in ([], [[]])
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(folder)
    done = run(PUSH.format(model=str(folder), more=""), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.commits["me/toy"][-1] == [CHECKSUMS, "model.safetensors"]
    # In more shards: the single file must not stay.
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    done = run(PUSH.format(model=str(folder), more=""), hub, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.safetensors" not in hub.repos["me/toy"] and "model.safetensors.index.json" in hub.repos["me/toy"]


def test_our_card_is_not_overwritten_and_a_dry_run_sends_nothing(hub, tmp_path):
    saved("kla hybrid", tmp_path / "model")
    done = run(PUSH.format(model=str(tmp_path / "model"), more=", dry_run=True"), hub, tmp_path)
    assert done.returncode == 0 and not hub.requests
    assert "model.safetensors" in done.stdout and "README.md" in done.stdout
    code = f"""
    import hf_kalman
    from transformers import AutoModelForCausalLM
    from hf_kalman.hub import push_to_hub
    push_to_hub(AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}), "toy")
    """
    assert run(code, hub, tmp_path).returncode == 0
    card = hub.repos["me/toy"]["README.md"].decode()
    assert "Kalman Linear Attention (KLA)" in card and "More Information Needed" not in card


def test_an_adapter_travels_with_its_posterior(hub, tmp_path):
    peft = pytest.importorskip("peft")
    from hf_kalman.training import KalmanOptimizer

    saved("gka hybrid", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    optimizer = KalmanOptimizer([p for p in model.parameters() if p.requires_grad], 0.1, structure="block")
    with pytest.raises(ValueError, match="`base_model`"):
        push_to_hub(model, "adapter", dry_run=True)
    with pytest.raises(ValueError, match="`base_model` 'a/b' is for adapters"):
        push_to_hub(tmp_path / "base", "adapter", base_model="a/b", dry_run=True)
    report = push_to_hub(model, "adapter", optimizer=optimizer, base_model="someone/base", dry_run=True)
    assert {"adapter_model.safetensors", "kalman_posterior.safetensors", "README.md"} <= set(report.files)
    assert not any(name.endswith(".py") for name in report.files) and "config.json" not in report.files


def test_saving_with_the_package_copies_no_code(tmp_path):
    model = tiny_model()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    type(model.config).register_for_auto_class()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))


def test_the_bundle_is_reproducible_and_complete(tmp_path):
    assert bundling.bundle() == bundling.bundle()
    paths = write_bundle(tmp_path)
    assert sorted(p.name for p in paths) == sorted(f"{name}.py" for name in bundling.FILES)
    # Every module that the models need is in it: none is imported from the package but at the end, where it wins.
    for path in paths:
        text = path.read_text()
        before, _, after = text.partition("try:  # an installed package wins")
        assert not any(line.startswith(("from hf_kalman", "from kalman_kernels")) for line in before.splitlines())
        compile(text, path.name, "exec")
    listed = {module for modules in bundling.FILES.values() for module in modules}
    package = ROOT / "kernels" / "torch-ext" / "kalman_kernels"
    found = (p.relative_to(package.parent).with_suffix("") for p in package.rglob("*.py") if p.stem != "__init__")
    assert {".".join(path.parts) for path in found} <= listed


def test_a_name_that_two_modules_define_stays_two():
    text = bundling.bundle()["ops_hf_kalman.py"]
    assert "gka_op_IMPLEMENTATIONS = " in text and "kla_op_IMPLEMENTATIONS = " in text
    assert '"kalman_kernels::' not in text


def test_broken_checkpoints_say_what_to_do(tmp_path):
    folder = tmp_path / "model"
    tiny_model(SHAPES["gka hybrid"]).save_pretrained(folder, max_shard_size="20KB")
    assert len(check_checkpoint(folder)) > 2
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks \['{shard.name}'\].*again"):
        check_checkpoint(folder)
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(folder)
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"damaged: {shard.name}"):
        check_checkpoint(folder)
    shard.write_bytes(whole)
    (folder / CHECKSUMS).write_text(f"{'0' * 64}  {shard.name}\n")
    with pytest.raises(ValueError, match=f"{shard.name} is not what {CHECKSUMS} says"):
        check_checkpoint(folder)
    (folder / CHECKSUMS).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture_version": 99, "new_gate": True}))
    for load in (check_checkpoint, AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"`architecture_version` 99 .*\['new_gate'\].*[Uu]pgrade"):
            load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "kalman_of_tomorrow"}))
    with pytest.raises(ValueError, match="`model_type` 'kalman_of_tomorrow'.*upgrade"):
        check_checkpoint(folder)
    with pytest.raises(FileNotFoundError, match="checkpoint's folder"):
        check_checkpoint(tmp_path)


def test_bad_input_is_refused_before_anything_is_sent(hub, tmp_path):
    saved("gka hybrid", tmp_path / "model")
    for error, match, arguments, options in (
        (FileNotFoundError, "`model`", (tmp_path,), {}),
        (ValueError, "`model`", (3,), {}),
        (FileNotFoundError, "`figures`", (tmp_path / "model",), {"figures": ["none.png"]}),
        (ValueError, "`optimizer`", (tmp_path / "model",), {"optimizer": object()}),
    ):
        with pytest.raises(error, match=match):
            push_to_hub(*arguments, "toy", **options)
    with pytest.raises(ValueError, match="[Rr]epo id"):
        push_to_hub(tmp_path / "model", "a/b/c")
    assert not hub.requests
