"""`tool_target`: the fewest calls of the conversations that were right, rows dropped where none tells."""

import pytest
from pydantic import TypeAdapter, ValidationError
from vlpost.model.records import DataError, Example, Message, TextPart, ToolAnswer, ToolCall, Turn
from vlpost.recipes.curate_config import CurateRecipe, ToolTargetConfig
from vlpost.recipes.curate_registry import build_step
from vlpost.recipes.curate_step import Candidate, CuratedRow, StepContext


def conversation(num_calls, value, *, num_errors=0, ending="answered", model="m"):
    call = ToolCall(name="zoom", arguments="{}")
    answers = [ToolAnswer(text="", num_images=1, is_error=False)] * num_calls + [
        ToolAnswer(text="no", num_images=0, is_error=True)
    ] * num_errors
    turns = [Turn(text="", prompt_suffix="", words="", calls=(call,), answers=(answer,)) for answer in answers]
    turns.append(Turn(text="7", prompt_suffix="", words="7", calls=(), answers=()))
    return Candidate(
        text="7", prompt_suffix="", finish_reason="stop", num_tokens=1, model=model, seed=0, value=value, turns=tuple(turns), ending=ending
    )


def target(*candidates, tmp_path, **changes):
    message = Message(role="user", parts=(TextPart(text="?"),))
    example = Example(id="e", messages=(message,), answer="7", task="zoom", source="s", metadata={"kept": 1})
    config = ToolTargetConfig.model_validate({"use": "tool_target", "model": "m"} | changes)
    with build_step(config).step.open(StepContext(recipe_folder=tmp_path, output=tmp_path, seed=0)) as step:
        return step.run([CuratedRow(example=example, candidates=candidates)], shard=0)


@pytest.mark.parametrize(("quantile", "expected"), [(0.0, 1), (0.2, 1), (0.5, 2), (0.75, 3), (1.0, 5)])
def test_the_target_is_of_the_right_conversations(tmp_path, quantile, expected):
    tries = [conversation(3, 1.0), conversation(0, 0.0), conversation(1, 1.0), conversation(2, 1.0, num_errors=4), conversation(5, 1.0)]
    result = target(
        *tries, conversation(0, 1.0, model="other"), conversation(0, 1.0, ending="length"), tmp_path=tmp_path, quantile=quantile
    )
    (row,) = result.rows
    assert row.example.metadata == {"kept": 1, "target_calls": expected}
    assert row.notes == {"tool_target/solved": 4, "tool_target/tries": 6}
    assert result.histogram == {"target of tool calls": {str(expected): 1}}


def test_rows_that_nobody_solves_are_dropped_with_words(tmp_path):
    result = target(conversation(1, 0.0), conversation(1, 1.0), tmp_path=tmp_path, min_solved=2)
    assert result.rows == ()
    assert result.dropped == (("e", "number of calls unknown: 1 of 2 conversations are right, at least 2 must be"),)
    assert target(tmp_path=tmp_path).dropped == (("e", "no conversation of m: its number of calls is unknown"),)


def test_without_verify_it_stops(tmp_path):
    with pytest.raises(DataError, match="put a step with use: verify before tool_target"):
        target(conversation(1, None), tmp_path=tmp_path)


def test_the_model_must_have_written_before():
    recipe = {
        "method": "curate", "output": "o", "data": {"d": {"use": "handwriting", "tasks": {"zoom": 1.0}, "num_examples": 2}},
        "steps": {"target": {"use": "tool_target", "model": "m"}},
    }  # fmt: skip
    with pytest.raises(ValidationError, match=r"steps.target.model = 'm': no `generate` step before it has it"):
        TypeAdapter(CurateRecipe).validate_python(recipe)
