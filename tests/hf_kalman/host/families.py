"""The models that the host's common tests run on: one tester per family and shape, as the host's tests expect them."""

import torch
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

import hf_kalman as hk

# The host decides by class name which model gets which labels.
for family, name in (("kalman_gka", "GKA"), ("kalman_kla", "KLA")):
    modeling_auto.MODEL_MAPPING_NAMES[family] = f"{name}Model"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] = f"{name}ForCausalLM"
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[family] = f"{name}ForSequenceClassification"
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES[family] = f"{name}ForTokenClassification"
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES[family] = f"{name}ForQuestionAnswering"

OWN = {
    "GKA": {"solver": "cg", "solver_iterations": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "KLA": {"linear_state_size": 4},
}
LAYERS = {"pure": ["linear_attention"] * 2, "hybrid": ["linear_attention", "full_attention"]}


class HostTester:
    """What the host's mixins ask of a `model_tester`."""

    batch_size, seq_length, vocab_size, num_labels, num_choices, type_sequence_label_size = 13, 7, 99, 3, 4, 2
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 40
    is_training = True

    def __init__(self, parent, family, shape):
        self.parent = parent
        self.family = family
        self.layer_types = LAYERS[shape]
        self.config_class = getattr(hk, f"{family}Config")
        self.base_model_class = getattr(hk, f"{family}Model")
        self.causal_lm_class = getattr(hk, f"{family}ForCausalLM")
        self.sequence_classification_class = getattr(hk, f"{family}ForSequenceClassification")
        self.token_classification_class = getattr(hk, f"{family}ForTokenClassification")
        self.question_answering_class = getattr(hk, f"{family}ForQuestionAnswering")

    @property
    def all_model_classes(self):
        return (
            self.base_model_class,
            self.causal_lm_class,
            self.sequence_classification_class,
            self.token_classification_class,
            self.question_answering_class,
        )

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=len(self.layer_types),
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            layer_types=list(self.layer_types),
            num_labels=self.num_labels,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **OWN[self.family],
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}
