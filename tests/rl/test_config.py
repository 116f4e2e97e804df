import warnings

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError
from vlpost.rl.config import (
    GrpoConfig,
    GspoConfig,
    KlLossConfig,
    KlRewardConfig,
    PolicyLossConfig,
    ReinforceConfig,
    RlConfig,
    SapoConfig,
)

BASE = {"num_steps": 5, "prompts_per_step": 4, "group_size": 2}


def refused(values, words):
    with pytest.raises(ValidationError) as caught:
        RlConfig.model_validate(BASE | values)
    assert words in str(caught.value)


def test_the_defaults_are_the_papers():
    config = RlConfig.model_validate(BASE)
    assert config.policy_loss == SapoConfig(name="sapo", tau_pos=1.0, tau_neg=1.05)
    assert (config.num_mini_batches, config.normalize_by, config.scale_advantages) == (2, "planned", "std")
    assert config.kl is None


@pytest.mark.parametrize("group_size", [1, 0, -2])
def test_a_group_has_at_least_two(group_size):
    refused({"group_size": group_size}, "greater than or equal to 2")


@pytest.mark.parametrize(("prompts", "parts", "fine"), [(4, 1, True), (4, 2, True), (4, 4, True), (4, 3, False), (4, 8, False)])
def test_mini_batches_divide_the_prompts(prompts, parts, fine):
    values = {"prompts_per_step": prompts, "num_mini_batches": parts}
    if fine:
        assert RlConfig.model_validate(BASE | values).num_mini_batches == parts
    else:
        refused(values, f"rl.prompts_per_step = {prompts} cannot be split into rl.num_mini_batches = {parts} equal parts")


@pytest.mark.parametrize(("tau_pos", "tau_neg"), [(1.0, 0.95), (1.2, 1.05)])
def test_gates_the_wrong_way_round_are_warned_about(tau_pos, tau_neg):
    with pytest.warns(UserWarning, match=rf"policy_loss\.tau_neg = {tau_neg} is below tau_pos = {tau_pos}: the paper's runs are unstable"):
        SapoConfig(tau_pos=tau_pos, tau_neg=tau_neg)


@pytest.mark.parametrize("tau_neg", [1.0, 1.05, 2.0])
def test_gates_the_right_way_round_are_not(tau_neg):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SapoConfig(tau_neg=tau_neg).tau_neg == tau_neg


@pytest.mark.parametrize(
    ("name", "settings"), [("sapo", SapoConfig), ("grpo", GrpoConfig), ("gspo", GspoConfig), ("reinforce", ReinforceConfig)]
)
def test_the_name_picks_the_loss(name, settings):
    assert type(TypeAdapter(PolicyLossConfig).validate_python({"name": name})) is settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy_loss": {"name": "ppo"}}, "'sapo', 'grpo', 'gspo', 'reinforce'"),
        ({"policy_loss": {"name": "sapo", "tau_pos": 0.0}}, "greater than 0"),
        ({"policy_loss": {"name": "sapo", "tau_neg": float("inf")}}, "finite number"),
        ({"policy_loss": {"name": "grpo", "clip_low": 1.0}}, "less than 1"),
        ({"policy_loss": {"name": "grpo", "tau_pos": 1.0}}, "Extra inputs are not permitted"),
        ({"policy_loss": {"name": "reinforce", "clip_low": 0.1}}, "Extra inputs are not permitted"),
        ({"kl": {"in": "advantage", "coef": 0.1}}, "'loss', 'reward'"),
        ({"kl": {"estimator": "k2", "coef": 0.1}}, "Unable to extract tag using discriminator 'in_' | 'in'"),
        ({"kl": {"in": "loss", "coef": 0.1}}, "Field required"),
        ({"kl": {"in": "loss", "estimator": "k2"}}, "Field required"),
        ({"kl": {"in": "loss", "estimator": "k4", "coef": 0.1}}, "'exact', 'k2' or 'k3'"),
        ({"kl": {"in": "reward", "estimator": "k4", "coef": 0.1}}, "'k1'"),
        ({"kl": {"in": "loss", "estimator": "k2", "coef": 0.0}}, "greater than 0"),
        ({"kl": {"in": "loss", "estimator": "k2", "coef": float("inf")}}, "finite number"),
        ({"kl": {"in": "reward", "coef": -0.1}}, "greater than 0"),
        ({"kl": {"in": "reward", "coef": 0.1, "beta": 0.1}}, "Extra inputs are not permitted"),
        ({"kl": {"in_": "reward", "coef": 0.1}}, "Field required"),
        ({"importance_cap": 0.5}, "greater than or equal to 1"),
        ({"importance_cap": float("nan")}, "finite number"),
        ({"normalize_by": "tokens"}, "'planned' or 'signal'"),
        ({"scale_advantages": "max"}, "'std' or 'none'"),
        ({"num_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(values, words):
    refused(values, words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{in: loss, estimator: exact, coef: 0.05}", ("loss", "exact", 0.05, KlLossConfig)),
        ("{in: loss, estimator: k2, coef: 0.001}", ("loss", "k2", 0.001, KlLossConfig)),
        ("{in: loss, estimator: k3, coef: 0.04}", ("loss", "k3", 0.04, KlLossConfig)),
        ("{in: reward, estimator: k1, coef: 0.02}", ("reward", "k1", 0.02, KlRewardConfig)),
        ("{in: reward, coef: 0.02}", ("reward", "k1", 0.02, KlRewardConfig)),
    ],
)
def test_a_divergence_term_goes_into_the_loss_or_the_reward(text, expected):
    config = RlConfig.model_validate(BASE | {"kl": yaml.safe_load(text)})
    assert (config.kl.in_, config.kl.estimator, config.kl.coef, type(config.kl)) == expected
    # What is dumped bears the recipe's own keys, at every level and without being told to.
    dumped = config.model_dump(mode="json")
    assert dumped["kl"] == {"in": expected[0], "estimator": expected[1], "coef": expected[2]}
    assert config.kl.model_dump() == dumped["kl"]
    assert RlConfig.model_validate(dumped) == config
    assert RlConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("kl", "words"),
    [
        (
            {"in": "loss", "estimator": "k1"},
            "as a loss k1 does nothing, the mean of its gradient is zero (arXiv:2506.09477); use exact, k2 or k3 here, "
            "or k1 with `in: reward`",
        ),
        (
            {"in": "reward", "estimator": "exact"},
            "only k1 has the policy gradient of KL(policy, reference): exact does not depend on the token that was drawn",
        ),
        (
            {"in": "reward", "estimator": "k2"},
            "k2 charges a token for being likelier than in the reference and for being less likely alike",
        ),
        (
            {"in": "reward", "estimator": "k3"},
            "k3 has that of KL(policy, reference) - KL(reference, policy), which is about zero near the reference; "
            "use k1 here, or k3 with `in: loss` (arXiv:2510.01555)",
        ),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_an_estimator_in_the_wrong_place_is_refused_with_the_reason(kl, words):
    refused({"kl": {**kl, "coef": 0.1}}, words)
