"""Settings of on-policy distillation: what goes together and what does not."""

import pytest
from pydantic import ValidationError
from vlpost.distill.config import OnPolicyDistillConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"support": {"name": "exact", "divergence": "jsd"}}, "divergence: jsd needs beta"),
        ({"support": {"name": "exact", "divergence": "forward", "beta": 0.5}}, "beta = 0.5 is of `divergence: jsd`; forward has none"),
        ({"support": {"name": "exact", "divergence": "jsd", "beta": 1.0}}, "less than 1"),
        ({"support": {"name": "exact", "divergence": "jsd", "beta": 0.0}}, "greater than 0"),
        ({"support": {"name": "sampled_token", "divergence": "reverse"}}, "Extra inputs are not permitted"),
        ({"prompts_per_step": 3, "num_mini_batches": 2}, "distill.prompts_per_step = 3 cannot be split"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        OnPolicyDistillConfig.model_validate({"num_steps": 1, "prompts_per_step": 4, **changes})


def test_the_default_is_the_exact_reverse_kl_on_text():
    config = OnPolicyDistillConfig(num_steps=1, prompts_per_step=4)
    assert (config.support.name, config.support.divergence, config.prompts, config.group_size) == ("exact", "reverse", "text", 1)
