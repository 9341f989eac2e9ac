"""The host library's own common tests, of exactly the installed version, on every family and shape.

`host/fetch.py` gets them (part of `make test`); `host/README.md` has the table of skips and overrides.
"""

import sys
import unittest
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "host"
sys.path.insert(0, str(HERE))
from fetch import folder  # noqa: E402

if not folder().exists():
    pytest.skip("run `python tests/hf_kalman/host/fetch.py` first, as `make test` does", allow_module_level=True)
sys.path.insert(0, str(folder()))

from families import HostTester  # noqa: E402
from host_tests import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402
from host_tests.test_configuration_common import ConfigTester  # noqa: E402
from host_tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin  # noqa: E402
from host_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# Warnings of the host are not this project's to turn into errors.
pytestmark = pytest.mark.filterwarnings("default")


# The host runs these for a few of its own models; here for every one.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
# First words of the reasons for skipping, from the table.
LISTED = [row.split("|")[1].strip() for row in (HERE / "README.md").read_text().splitlines() if row.startswith("|")]


class Common(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    model_tester = None

    def setUp(self):
        self.model_tester = HostTester(self, self.family, self.shape)
        self.all_model_classes = self.model_tester.all_model_classes
        self.has_attentions = self.shape == "hybrid"
        if self.shape == "pure" and "rope_scaling" in self._testMethodName:
            self.skipTest("No attention layer, no positions")

    def skipTest(self, reason):
        """Skips are counted: one that is not in the table fails."""
        assert any(reason.startswith(listed) for listed in LISTED), f"not in {HERE.name}/README.md: {reason}"
        super().skipTest(reason)

    def test_attention_outputs(self):
        # The host counts one attention map per layer; here there is one per attention layer.
        self.model_tester.num_hidden_layers = self.model_tester.layer_types.count("full_attention")
        super().test_attention_outputs()

    def test_config(self):
        ConfigTester(self, config_class=self.model_tester.config_class).run_common_tests()


class GKAPureTest(Common, unittest.TestCase):
    family, shape = "GKA", "pure"


class GKAHybridTest(Common, unittest.TestCase):
    family, shape = "GKA", "hybrid"


class KLAPureTest(Common, unittest.TestCase):
    family, shape = "KLA", "pure"


class KLAHybridTest(Common, unittest.TestCase):
    family, shape = "KLA", "hybrid"
