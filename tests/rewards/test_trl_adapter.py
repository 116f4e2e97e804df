"""Both directions with the real trl: our rewards in its trainer, its reward functions in our manager."""

import inspect

import pytest
from PIL import Image
from vlpost.model.nano import build_nano
from vlpost.model.records import DataError, Example, Group, ImagePart, Message, TextPart
from vlpost.rewards import RewardManager, RewardsConfig, as_trl, as_trl_components

PLUG_IN = """
from vlpost.rewards import Unavailable

def has_e(example, rollout):
    return Unavailable(reason="down") if "q" in rollout.text else float("e" in rollout.text)

def length(example, rollout):
    return float(len(rollout.text))

def none_for_text(completions, **kwargs):
    return [None for _ in completions]

def spread(example, rollouts):
    return [float(len(rollouts))] * len(rollouts)

def picture(example, rollout):
    (image,) = example.media
    return float(image.image.width + rollout.media[0].image.height)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "mine.py").write_text(PLUG_IN, encoding="utf-8")
    return folder


@pytest.fixture
def make_manager(folder):
    def make(components, **settings):
        config = RewardsConfig.model_validate({"components": components, "max_unavailable_frac": 1.0, **settings})
        return RewardManager(config, recipe_folder=folder, allow_code=False)

    return make


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random Qwen3 of two layers with the nano's tokenizer: text only, seconds on a CPU."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    nano = build_nano(tmp_path_factory.mktemp("nano"), size="s", corpus=["how many? 1 2 3 4 5"] * 9, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(nano, padding_side="left")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=448, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.pad_token_id
    return Qwen3ForCausalLM(config).float(), tokenizer


def train(tiny_model, reward_funcs, tmp_path, rows, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = tiny_model
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **options,
    )
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward_funcs, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


ROWS = [{"prompt": [{"role": "user", "content": f"how many? {n}"}], "answer": str(n), "task": "t"} for n in range(1, 5)]
WEIGHTED = {"length": {"use": "mine.py:length", "weight": 0.5, "tasks": ["t"]}, "answer": {"use": "count", "weight": 2.0}}


def test_our_manager_rewards_two_steps_of_trl(tiny_model, make_manager, tmp_path):
    seen = []
    with make_manager(WEIGHTED) as rewards:
        inner = as_trl(rewards)

        def reward(**arguments):
            returned = inner(**arguments)
            seen.append((arguments["completions"], returned))
            return returned

        logs = train(tiny_model, [reward], tmp_path, ROWS)
    assert len(logs) == len(seen) == 2
    for entry, (completions, returned) in zip(logs, seen, strict=True):
        lengths = [len(completion[0]["content"]) for completion in completions]
        assert returned == [0.5 * length for length in lengths]
        assert entry["reward"] == pytest.approx(sum(returned) / 4)
        # Our own summary is among trl's metrics.
        assert entry["reward/length"] == pytest.approx(sum(lengths) / 4)
        assert entry["reward/answer"] == 0.0
    assert any(value for _completions, returned in seen for value in returned)


def test_components_are_logged_one_by_one_and_add_up(tiny_model, make_manager, tmp_path):
    with make_manager(WEIGHTED) as rewards:
        functions = as_trl_components(rewards)
        assert [function.__name__ for function in functions] == ["reward_length", "reward_answer"]
        logs = train(tiny_model, functions, tmp_path, ROWS)
    assert len(logs) == 2
    for entry in logs:
        assert entry["reward"] == pytest.approx(entry["rewards/reward_length/mean"] + entry["rewards/reward_answer/mean"])


def test_trl_functions_train_the_same_through_our_manager(tiny_model, make_manager, tmp_path):
    from trl.rewards import think_format_reward

    with make_manager({"format": {"use": "trl.rewards:think_format_reward"}}) as rewards:
        ours = as_trl(rewards)
        compared = []

        def reward(**arguments):
            compared.append((ours(**arguments), think_format_reward(**arguments)))
            return compared[-1][0]

        train(tiny_model, [reward], tmp_path, ROWS)
    assert len(compared) == 2
    assert all(mine == theirs for mine, theirs in compared)


def test_trl_own_example_functions_run_in_our_manager(make_manager, make_group):
    components = {
        "format": {"use": "trl.rewards:think_format_reward", "weight": 0.5},
        "accuracy": {"use": "trl.rewards:accuracy_reward", "timeout_s": 30.0},
    }
    good, bad, text = "<think>a</think> $\\boxed{\\frac{1}{3}}$", "<think>a</think> $\\boxed{\\frac{1}{2}}$", "no"
    with make_manager(components, num_workers=1) as rewards:
        assert "trl" in rewards.describe()[0]
        (group,) = rewards.score([make_group("$\\frac{1}{3}$", good, bad, text)])
        (unreadable,) = rewards.score([make_group("", good)])
    assert [outcome.score.reward for outcome in group.judged] == [1.5, 0.5, 0.0]
    assert "gold" in group.judged[0].score.results["accuracy"].note or "solution" in group.judged[0].score.results["accuracy"].note
    # accuracy_reward says None where the answer cannot be read: it does not judge that row, and the others stand.
    assert unreadable.judged[0].score.reward == 0.5
    assert list(unreadable.judged[0].score.results) == ["format"]


def test_a_row_that_nobody_judges_is_unavailable_and_none(make_manager, make_group):
    with make_manager({"none": {"use": "mine.py:none_for_text"}}) as rewards:
        (group,) = rewards.score([make_group("1", "a")])
        assert as_trl(rewards)(prompts=["p"], completions=["c"]) == [None]
    assert group.unjudged[0].reasons == {
        "none": "the reward function returned None: it does not judge this row, and no other component does"
    }


def test_unavailable_is_none_in_every_component(make_manager):
    components = {
        "e": {"use": "mine.py:has_e"},
        "length": {"use": "mine.py:length", "weight": 0.5},
        "count": {"use": "count", "tasks": ["n"]},
    }
    arguments = {"prompts": ["p"] * 3, "completions": ["eee", "qqq", "aaa"]}
    with make_manager(components) as rewards:
        assert as_trl(rewards)(**arguments) == [2.5, None, 1.5]
        by_component = [function(**arguments) for function in as_trl_components(rewards)]
    assert by_component == [[1.0, None, 0.0], [1.5, None, 1.5], [None, None, None]]


def test_groups_are_the_rows_of_one_prompt(make_manager):
    with make_manager({"spread": {"use": "mine.py:spread"}}) as rewards:
        judged = as_trl(rewards)(prompts=["a", "a", "a", "b", "b"], completions=list("uvwxy"), answer=["1"] * 5)
        assert judged == [3.0, 3.0, 3.0, 2.0, 2.0]
        assert as_trl(rewards)(prompts=["a", "a"], completions=list("uv"), answer=["1", "2"]) == [1.0, 1.0]


@pytest.mark.parametrize("column", ["image", "images", "content"])
def test_images_reach_the_reward(column, make_manager):
    image = Image.new("RGB", (30, 40), "red")
    place = {"type": "image", "image": image} if column == "content" else {"type": "image"}
    prompt = [{"role": "user", "content": [place, {"type": "text", "text": "what?"}]}]
    columns = {"image": {"image": [image]}, "images": {"images": [[image]]}, "content": {}}[column]
    with make_manager({"picture": {"use": "mine.py:picture"}}) as rewards:
        assert as_trl(rewards)(prompts=[prompt], completions=[[{"role": "assistant", "content": "x"}]], **columns) == [70.0]
        if column == "images":
            plain = [{"role": "user", "content": "what?"}]
            assert as_trl(rewards)(prompts=[plain], completions=["x"], **columns) == [70.0]


def test_an_undecoded_image_is_named(make_manager):
    with make_manager({"picture": {"use": "mine.py:picture"}}) as rewards, pytest.raises(DataError, match="of type dict in trl's data set"):
        as_trl(rewards)(prompts=["p"], completions=["c"], image=[{"bytes": b""}])


def test_settings_alone_are_enough_without_plug_ins():
    config = RewardsConfig.model_validate({"components": {"answer": {"use": "count", "tasks": ["add"]}, "all": {"use": "exact"}}})
    reward = as_trl(config, prompt_suffix="<think>\n")
    columns = {"solution": [4, 4], "task": ["add", "other"], "trainer_state": object()}
    assert reward(prompts=["p", "p"], completions=["4</think>\\boxed{4}", "4"], **columns) == [2.0, 0.0]


FORMS = """
def plain(prompts, completions, solution, extra=None, scale: float = 1.0, **columns):
    assert completions == ["4"] and prompts == ["How much?"] and solution == ["12"], (prompts, completions)
    return [scale]

def chat(completions, prompts=None, metadata=None, answer=None):
    assert completions == [[{"role": "assistant", "content": "4"}]] and prompts == [[{"role": "user", "content": "How much?"}]]
    return [float(answer == ["12"])]

def wants(completions, difficulty, log_metric, log_extra):
    log_metric("difficulty", difficulty[0])
    log_extra("read", [f"hard {level}" for level in difficulty])
    return [level / 10 for level in difficulty]

def state(completions, trainer_state):
    return [trainer_state.global_step]

def looks(completions, images, prompts):
    return [float(image[0].width + len(prompt[0]["content"])) for image, prompt in zip(images, prompts)]

def booleans(completions, **kwargs):
    import numpy
    return [completion[0]["content"] == "4" for completion in completions] if len(completions) > 1 else numpy.array([2.5], dtype="float32")
"""


@pytest.fixture
def forms(tmp_path):
    (tmp_path / "forms.py").write_text(FORMS, encoding="utf-8")

    def make(function, **component):
        config = {"components": {"it": {"use": f"forms.py:{function}", **component}}, "max_unavailable_frac": 1.0}
        return RewardManager(RewardsConfig.model_validate(config), recipe_folder=tmp_path, allow_code=False)

    return make


def test_prompts_and_completions_have_trl_forms(forms, make_group):
    with forms("plain", completions="text", options={"scale": 3}) as rewards:
        assert rewards.score([make_group("12", "4")])[0].judged[0].score.reward == 3.0
    with forms("chat") as rewards:
        assert rewards.score([make_group("12", "4")])[0].judged[0].score.reward == 1.0


def test_metadata_are_columns_and_logs_become_metrics_and_notes(forms, make_rollout):
    prompt = (Message(role="user", parts=(TextPart(text="?"),)),)
    example = Example(id="a", messages=prompt, answer="1", task="t", source="s", metadata={"difficulty": 3})
    with forms("wants") as rewards:
        (group,) = rewards.score([Group(example=example, rollouts=(make_rollout("4"),))])
        result = group.judged[0].score.results["it"]
        assert (result.value, result.note, result.metrics) == (0.3, "read: hard 3", {"difficulty": 3.0})
        rewards.check_examples([example])
        with pytest.raises(DataError, match="asks for a column 'difficulty'"):
            rewards.check_examples([Example(id="b", messages=prompt, answer="1", task="t", source="s")])


def test_trl_functions_see_images(forms, make_rollout):
    part = ImagePart.from_image(Image.new("RGB", (30, 40)))
    example = Example(id="a", messages=(Message(role="user", parts=(part, TextPart(text="?"))),), answer="1", task="t", source="s")
    with forms("looks") as rewards:
        (group,) = rewards.score([Group(example=example, rollouts=(make_rollout("4"),))])
    assert group.judged[0].score.reward == 32.0


def test_booleans_and_arrays_count_as_numbers_as_in_trl(forms, make_group):
    with forms("booleans") as rewards:
        two, one = rewards.score([make_group("1", "4", "5"), make_group("1", "4", number=1)])
    assert [outcome.score.reward for outcome in (*two.judged, *one.judged)] == [1.0, 0.0, 2.5]


def test_what_only_the_trainer_has_is_refused_at_start(forms):
    with pytest.raises(ValueError, match="argument 'trainer_state' exists only inside trl's trainer"):
        forms("state")


def test_the_arguments_that_trl_gives_are_those_we_count_on():
    """If trl renames an argument, this fails before a user's function does."""
    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert source.count("prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs") == 2
    for name in ("trainer_state", "log_extra", "log_metric", "environments"):
        assert f'reward_kwargs["{name}"]' in source
