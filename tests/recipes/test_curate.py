"""`vlpost curate`: the pipeline from rows to a data set, killed, changed, and read again."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError
from vlpost.model.records import DataError, Example, ImagePart, Message, TextPart, ToolCall, VideoPart, VlpostError
from vlpost.recipes import curate as curate_module
from vlpost.recipes.curate import CurateError, curate
from vlpost.recipes.curate_config import CurateRecipe
from vlpost.recipes.curate_fingerprint import step_key
from vlpost.recipes.curate_output import summarise, write_data_set
from vlpost.recipes.curate_reader import read_data_set
from vlpost.recipes.curate_registry import BuiltStep
from vlpost.recipes.curate_rows import as_conversations, read_keys, read_shard, rows_hash, write_shard
from vlpost.recipes.curate_step import Candidate, CuratedRow, RowKey, StepContext, StepResult
from vlpost.recipes.data_config import CuratedData
from vlpost.recipes.example_stream import RowStream, fingerprint, open_stream, read_jsonl
from vlpost.recipes.load import RecipeError, load_recipe
from vlpost.recipes.run import main

STEPS = {
    "verify": {"use": "verify", "rewards": {"components": {"answer": {"use": "count"}}}, "min_value": 1.0},
    "rules": {"use": "response_filter", "max_foreign_frac": None},
    "dedupe": {"use": "dedupe", "min_similarity": 0.9},
    "clean": {"use": "decontaminate", "against": {"exam": {"use": "jsonl", "path": "exam.jsonl"}}},
    "mix": {"use": "mix", "shares": {"count": 1, "add": 1}, "by": "task"},
    "split": {"use": "split", "shares": {"train": 0.8, "test": 0.2}},
}


def image(number):
    tiles = np.random.default_rng(number).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((32, 32), Image.Resampling.NEAREST)


def write_rows(folder, num_rows):
    """Writes conversations of which every step has something to drop, and an evaluation set."""
    rows = []
    for number in range(num_rows):
        shown = number // 2 if number % 11 == 0 else number
        path = folder / f"{shown}.png"
        if number % 3 == 0 and not path.exists():
            image(shown).save(path)
        content = [
            {"type": "text", "text": f"Row {shown}: how many {'blue' if number % 2 else 'red'} things number {shown * 7} are there?"}
        ]
        if path.exists():
            content.append({"type": "image", "image": path.name})
        response = "4" if number % 7 == 0 else "I will just guess. <answer>3</answer>" if number % 13 == 0 else "3"
        rows.append(
            {
                "id": f"row-{number}",
                "answer": "3",
                "task": "add" if number % 5 == 0 else "count",
                "metadata": {"number": number},
                "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": response}],
            }
        )
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    exam = [{"id": f"e{number}", "messages": [rows[number]["messages"][0]], "answer": "3"} for number in range(0, num_rows, 17)]
    (folder / "exam.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in exam))


def recipe_of(folder, *, output="out", steps=None, **settings):
    steps = json.loads(json.dumps(STEPS if steps is None else steps))
    if "clean" in steps:
        steps["clean"]["against"]["exam"]["path"] = str(folder / "exam.jsonl")
    values = {
        "method": "curate", "output": str(folder / output), "rows": "conversations", "shard_rows": 20, "steps": steps,
        "data": {"made": {"use": "jsonl", "path": str(folder / "rows.jsonl")}},
    }  # fmt: skip
    return CurateRecipe.model_validate(values | settings)


def outcome(output):
    """Returns all that a run leaves behind, seconds left out: counts, reasons, and every row with its pixels."""
    manifest = json.loads((output / "manifest.json").read_text())
    steps = [{key: value for key, value in step.items() if key != "seconds"} for step in manifest["steps"]]
    rows = {path.name: pq.read_table(path).to_pylist() for path in sorted((output / "data").iterdir())}
    return steps, rows, (output / "dropped.jsonl").read_text(), manifest["content"]


@pytest.fixture
def made(tmp_path):
    write_rows(tmp_path, 90)
    return tmp_path


def run(recipe):
    return curate(recipe, recipe_folder=recipe.output.parent, allow_code=False)


# ---------------------------------------------------------------- rows


def varied_row():
    parts = (TextPart(text="看 <|im_start|> \u2028 "), ImagePart.from_image(image(1)), TextPart(text=""), ImagePart.from_image(image(2)))
    video = VideoPart.from_frames([image(3), image(4)], fps=2.5, frame_indices=[0, 7], time_format="clock")
    messages = (
        Message(role="system", parts=(TextPart(text="Be kind"),), tools=('{"name": "zoom"}',)),
        Message(role="user", parts=parts),
        Message(
            role="assistant", parts=(TextPart(text="<think>\na</think>b"),), tool_calls=(ToolCall(name="zoom", arguments='{"label": "7"}'),)
        ),
        Message(role="user", parts=(video, ImagePart.from_image(image(1)))),
    )
    example = Example(id="a/1", messages=messages, answer="3", task="t", source="s", metadata={"n": [1, None, {"x": 0.1}]})
    candidate = Candidate(
        text="c",
        prompt_suffix="<think>\n",
        finish_reason="length",
        num_tokens=3,
        model="m",
        seed=2**62,
        value=0.1,
        notes={"judge": {"a": 1}},
    )
    return CuratedRow(example=example, candidates=(candidate, candidate), notes={"complexity": 3})


@pytest.mark.parametrize("decode", [True, False])
def test_rows_come_back_from_a_shard_as_they_were(tmp_path, decode):
    rows = (varied_row(), CuratedRow(example=Example(id="b", messages=(), answer="", task="", source="")))
    write_shard(tmp_path / "shard.parquet", rows, pixels={})
    shard = read_shard(tmp_path / "shard.parquet", decode=decode)
    assert shard.rows == rows
    for before, after in zip(rows[0].example.media, shard.rows[0].example.media, strict=True):
        if isinstance(before, ImagePart):
            assert ImagePart.from_image(after.image).digest == before.digest
        else:
            again = VideoPart.from_frames(after.frames, fps=after.fps, frame_indices=after.frame_indices, time_format=after.time_format)
            assert again.digest == before.digest
    write_shard(tmp_path / "again.parquet", shard.rows, pixels=shard.pixels)
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "shard.parquet").read_bytes()
    digests = tuple(part.digest for part in rows[0].example.media)
    assert next(read_keys(tmp_path / "shard.parquet")) == RowKey(id="a/1", source="s", task="t", digests=digests)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.parquet", "shard.parquet"]


def test_the_hash_of_rows_sees_every_field():
    row = varied_row()
    hashes = {rows_hash([row])}
    example = row.example
    for changed in (
        CuratedRow(example=example, candidates=row.candidates[:1], notes=row.notes),
        CuratedRow(example=example, candidates=row.candidates, notes={}),
        CuratedRow(example=Example(**{name: getattr(example, name) for name in ("messages", "answer", "task", "source")}, id="x")),
        CuratedRow(
            example=Example(id="a/1", messages=example.messages[:2], answer="3", task="t", source="s", metadata=example.metadata),
            candidates=row.candidates, notes=row.notes,
        ),
    ):  # fmt: skip
        hashes.add(rows_hash([changed]))
    assert len(hashes) == 5


def test_what_is_not_plain_json_is_refused_by_name():
    row = CuratedRow(example=Example(id="a", messages=(), answer="", task="", source="", metadata={"x": float("nan")}))
    with pytest.raises(DataError, match="row 'a' holds what is not plain JSON"):
        rows_hash([row])


def test_conversations_have_whole_think_blocks():
    query = Example(id="q", messages=(Message(role="user", parts=(TextPart(text="?"),)),), answer="3", task="t", source="s")
    candidates = tuple(
        Candidate(text=f"{n}</think>3", prompt_suffix="<think>\n", finish_reason="stop", num_tokens=1, model="m", seed=n) for n in range(3)
    )
    rows = as_conversations(CuratedRow(example=query, candidates=candidates), max_per_query=2)
    assert [(row.example.id, row.example.messages[-1].text) for row in rows] == [
        ("q#0", "<think>\n0</think>3"), ("q#1", "<think>\n1</think>3"),
    ]  # fmt: skip
    assert rows[1].notes["candidate"] == {"model": "m", "seed": 1, "value": None, "notes": {}}


# ---------------------------------------------------------------- the whole


def test_a_data_set_its_card_and_its_reasons(made, capsys):
    output = run(recipe_of(made))
    steps, rows, dropped, _ = outcome(output)
    assert [step["name"] for step in steps] == ["read", *STEPS]
    for before, after in pairwise(steps):
        assert after["rows_in"] == before["rows_out"]
        assert after["rows_in"] - after["rows_out"] == sum(found["count"] for found in after["dropped"].values())
    assert all(step["dropped"] for step in steps[1:-1]), "each filter has found something"
    assert len(dropped.splitlines()) == 90 - steps[-1]["rows_out"]
    written = [row for of_file in rows.values() for row in of_file]
    assert len(written) == steps[-1]["rows_out"] > 10
    assert {name.partition("-")[0] for name in rows} == {"train", "test"}
    row = next(row for row in written if len(row["messages"][0]["content"]) == 2)
    number = json.loads(row["metadata"])["number"]
    with Image.open(io.BytesIO(row["messages"][0]["content"][1]["image"]["bytes"])) as opened:
        assert ImagePart.from_image(opened).digest == ImagePart.from_image(image(number)).digest
    card = (output / "README.md").read_text()
    assert "| verify | `verify` | 90 |" in card
    assert "path: data/train-*.parquet" in card
    assert "| response is wrong |" in card
    printed = capsys.readouterr().out
    assert "verify, shard 4: 10 rows in" in printed
    for step in steps[1:]:
        heads = [f"{head} {found['count']}" for head, found in step["dropped"].items()]
        more = [f"{len(heads) - 3} other reasons"] if len(heads) > 3 else []
        said = f"; dropped: {', '.join(heads[:3] + more)}" if heads else ""
        assert f"\n{step['name']}: {step['rows_in']} rows in, {step['rows_out']} out, 5 shards{said}\n" in printed


def test_the_data_set_is_read_again_as_training_data(made):
    output = run(recipe_of(made, rows="conversations"))
    data = CuratedData.model_validate({"use": "curated", "path": str(output), "split": "test"})
    stream = open_stream(data, seed=0, with_solution=True)
    assert isinstance(stream, RowStream)
    source = {row.id: row for row in read_jsonl(made / "rows.jsonl", source="rows")}
    assert len(stream.rows) > 0
    assert fingerprint(stream.rows) == fingerprint([source[row.id] for row in stream.rows])
    with pytest.raises(DataError, match=r"ends with an assistant message: rows: queries and write: rows make rows without"):
        open_stream(data, seed=0, with_solution=False)
    with pytest.raises(DataError, match=r"there is no split 'exam'; there are test, train"):
        open_stream(data.model_copy(update={"split": "exam"}), seed=0, with_solution=True)
    path = next((output / "data").glob("test-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"is not what manifest.json says it is"):
        open_stream(data, seed=0, with_solution=True)
    (output / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no whole data set of `vlpost curate`"):
        open_stream(data, seed=0, with_solution=True)


def test_videos_and_candidates_are_read_again(tmp_path):
    row = varied_row()
    (tmp_path / "steps").mkdir()
    write_shard(tmp_path / "steps" / "shard.parquet", [row], pixels={})
    recipe = recipe_of(tmp_path, output=".")
    summary = summarise(recipe, [("read", "read", [])])
    write_data_set(recipe, summary, shards=[tmp_path / "steps" / "shard.parquet"])
    (again,) = read_data_set(tmp_path, split="train", with_solution=False)
    assert again == row.example
    candidates = json.loads(pq.read_table(tmp_path / "data" / "train-00000.parquet")["candidates"][0].as_py())
    assert candidates[0]["seed"] == 2**62
    assert candidates[0]["notes"] == {"judge": {"a": 1}}


def test_conversations_that_were_cut_off_are_counted_where_a_person_looks(tmp_path, capsys):
    query = Example(id="q", messages=(Message(role="user", parts=(TextPart(text="?"),)),), answer="3", task="t", source="s")
    candidates = tuple(
        Candidate(text="3", prompt_suffix="", finish_reason=reason, num_tokens=1, model="m", seed=0)
        for reason in ("length", "stop", "length")
    )
    (tmp_path / "steps").mkdir()
    write_shard(tmp_path / "steps" / "shard.parquet", [CuratedRow(example=query, candidates=candidates)], pixels={})
    for update, words in (({}, "2 conversations end"), ({"max_per_query": 2}, "1 conversations end"), ({"write": "rows"}, None)):
        recipe = recipe_of(tmp_path, output=".").model_copy(update={"write": "conversations", **update})
        write_data_set(recipe, summarise(recipe, [("read", "read", [])]), shards=[tmp_path / "steps" / "shard.parquet"])
        for text in (capsys.readouterr().out, (tmp_path / "README.md").read_text()):
            assert (f"{words} where the token budget cut them off" in text) if words else ("cut" not in text)


def test_the_card_tells_datasets_which_file_is_of_which_split(made):
    output = run(recipe_of(made))
    head = yaml.safe_load((output / "README.md").read_text().split("---")[1])
    found = {
        entry["split"]: sum(pq.read_metadata(path).num_rows for path in output.glob(entry["path"]))
        for entry in head["configs"][0]["data_files"]
    }
    assert set(found) == {"train", "test"}
    assert sum(found.values()) == outcome(output)[0][-1]["rows_out"]


def test_what_is_whole_is_not_done_again_and_a_changed_step_is(made, capsys):
    run(recipe_of(made))
    first = outcome(made / "out")
    capsys.readouterr()
    run(recipe_of(made))
    printed = capsys.readouterr().out
    assert "the data set is whole, nothing was left to do" in printed
    assert "shard 0" not in printed
    steps = json.loads(json.dumps(STEPS))
    steps["rules"]["guesses"] = "keep"
    run(recipe_of(made, steps=steps))
    printed = capsys.readouterr().out
    assert "rules: changed (guesses: drop -> keep); it is done again" in printed
    assert "verify, shard" not in printed
    assert "rules, shard 0" in printed
    assert "split, shard 0" in printed
    assert outcome(made / "out") != first
    run(recipe_of(made))
    assert outcome(made / "out") == first


def test_a_step_that_comes_to_the_same_rows_leaves_later_shards_alone(made, capsys):
    run(recipe_of(made))
    capsys.readouterr()
    steps = json.loads(json.dumps(STEPS))
    steps["verify"]["min_value"] = 0.5
    run(recipe_of(made, steps=steps))
    printed = capsys.readouterr().out
    assert "verify: changed (min_value: 1.0 -> 0.5)" in printed
    assert "verify, shard 0" in printed
    assert "rules, shard" not in printed


def test_a_changed_data_file_is_read_again_and_shorter_data_leave_no_shard_behind(made, capsys):
    run(recipe_of(made))
    lines = (made / "rows.jsonl").read_text().splitlines(keepends=True)
    (made / "rows.jsonl").write_text("".join(lines[:45]))
    capsys.readouterr()
    run(recipe_of(made))
    assert "read: changed (the seed, a file that it names, or the version of vlpost)" in capsys.readouterr().out
    assert len(list((made / "out" / "steps" / "00-read").glob("shard-*.parquet"))) == 3
    changed = outcome(made / "out")
    run(recipe_of(made, output="fresh"))
    assert outcome(made / "fresh") == changed


@pytest.mark.parametrize("damage", ["cut", "lost manifest", "other bytes", "half a manifest"])
def test_a_damaged_shard_is_done_again(made, damage):
    run(recipe_of(made))
    first = outcome(made / "out")
    shard = made / "out" / "steps" / "03-dedupe" / "shard-00002.parquet"
    manifest = shard.with_suffix(".json")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif damage == "lost manifest":
        manifest.unlink()
    elif damage == "other bytes":
        shard.write_bytes(shard.read_bytes()[:-60] + bytes(60))
    else:
        manifest.write_text(manifest.read_text()[:100])
    shutil.rmtree(made / "out" / "data")
    run(recipe_of(made))
    assert outcome(made / "out") == first


def test_shards_of_another_size_give_the_same_rows(made):
    run(recipe_of(made))
    run(recipe_of(made, output="other", shard_rows=7))
    rows = [
        sorted((row["id"], row["notes"]) for of_file in outcome(made / name)[1].values() for row in of_file) for name in ("out", "other")
    ]
    assert rows[0] == rows[1]


def test_a_step_that_left_the_recipe_leaves_the_folder(made):
    run(recipe_of(made))
    fewer = {name: step for name, step in STEPS.items() if name != "rules"}
    run(recipe_of(made, steps=fewer))
    names = sorted(path.name for path in (made / "out" / "steps").iterdir())
    assert names == ["00-read", "01-verify", "02-dedupe", "03-clean", "04-mix", "05-split"]


def test_several_data_sets_are_read_one_after_another(made):
    data = {name: {"use": "jsonl", "path": str(made / "rows.jsonl"), "source": name} for name in ("one", "two")}
    steps = {"mix": {"use": "mix", "shares": {"one": 1, "two": 1}, "num_rows": 40}}
    rows = outcome(run(recipe_of(made, data=data, steps=steps)))[1]
    ids = [row["id"] for of_file in rows.values() for row in of_file]
    assert len(ids) == len(set(ids)) == 40
    assert sum(row_id.startswith("one/row-") for row_id in ids) == 20


def test_a_histogram_is_exact_over_all_shards_printed_and_drawn(made, monkeypatch, capsys):
    def answered(rows):
        """Gives row n the pass rate (n modulo 5) / 4."""
        return StepResult(
            rows=tuple(
                replace(
                    row,
                    candidates=tuple(
                        Candidate(
                            text="", prompt_suffix="", finish_reason="stop", num_tokens=1, model="m", seed=0,
                            value=float(place < row.example.metadata["number"] % 5),
                        )
                        for place in range(4)
                    ),
                )
                for row in rows
            )
        )  # fmt: skip

    real = curate_module.build_step

    def build(config):
        if config.use == "dedupe":
            return BuiltStep(step=Faulty(answered), settings={"use": "made"}, order="any", decode=False)
        return real(config)

    monkeypatch.setattr(curate_module, "build_step", build)
    steps = {
        "generate": {
            "use": "generate",
            "models": {"m": {"path": "a/b", "sampler": {"max_response_tokens": 1, "max_model_len": 64}}},
        },
        "difficulty": {"use": "difficulty", "models": {"m": {"min_solved": 1, "max_pass_rate": 0.9}}},
    }
    recipe = recipe_of(made, steps=steps)
    made_steps = {"generate": recipe_of(made, steps={"x": {"use": "dedupe"}}).steps["x"], "difficulty": recipe.steps["difficulty"]}
    output = run(recipe.model_copy(update={"steps": made_steps}))
    step = outcome(output)[0][-1]
    assert step["histogram"] == {"pass rate of m": {f"{solved}/4": 18 for solved in range(5)}}
    assert {head: found["count"] for head, found in step["dropped"].items()} == {"too hard for m": 18, "too easy for m": 18}
    card = (output / "README.md").read_text()
    bars = [f"{solved}/4       18 {'#' * 40}" for solved in range(5)]
    assert "\n".join(bars) in card
    assert "![pass rate of m](plots/difficulty-0.png)" in card
    with Image.open(output / "plots" / "difficulty-0.png") as drawn:
        assert drawn.format == "PNG"
        assert len(drawn.convert("RGB").getcolors(2**20)) > 2
    printed = capsys.readouterr().out
    assert all(bar in printed for bar in bars)


def test_bad_rows_are_counted_with_their_reasons_also_when_reading_goes_on_after_a_kill(made, monkeypatch):
    lines = (made / "rows.jsonl").read_text().splitlines()
    for place in (0, 5, 29, 30, 31, 89):
        lines[place] = lines[place].replace('"user"', '"usher"')
    (made / "rows.jsonl").write_text("\n".join(lines))
    bad = {"made": {"use": "jsonl", "path": str(made / "rows.jsonl"), "bad_rows": "drop"}}
    run(recipe_of(made, data=bad, output="whole"))
    read = outcome(made / "whole")[0][0]
    assert (read["rows_in"], read["rows_out"]) == (90, 84)
    assert sum(found["count"] for found in read["dropped"].values()) == 6
    assert all(head.startswith("bad row, ") for head in read["dropped"])
    real, written = curate_module._write, []

    def fail_on_third(*arguments, **settings):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(curate_module, "_write", fail_on_third)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(made, data=bad))
    monkeypatch.undo()
    run(recipe_of(made, data=bad))
    assert outcome(made / "out") == outcome(made / "whole")
    with pytest.raises(DataError, match="usher"):
        run(recipe_of(made, output="strict"))


# ---------------------------------------------------------------- what is refused


def test_two_runs_in_one_folder(made):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.flock(f, fcntl.LOCK_EX)\nprint('held', flush=True)\n"
         "sys.stdin.read()", str(made / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(CurateError, match=r"another `vlpost curate` works in this folder; wait for it, or give another output"):
            run(recipe_of(made, output="."))
    finally:
        holder.communicate()


def test_data_without_an_end(made):
    data = {"made": {"use": "handwriting", "tasks": {"add": 1.0}}}
    with pytest.raises(DataError, match=r"data.made: use = 'handwriting' has no last row as it stands; give num_examples"):
        run(recipe_of(made, data=data, rows="queries"))


def test_a_mix_of_the_training_kind(made):
    part = {"share": 1, "data": {"use": "jsonl", "path": str(made / "rows.jsonl")}}
    with pytest.raises(DataError, match=r"data.made: use = 'mix' repeats rows; name its parts as data sets of their own"):
        run(recipe_of(made, data={"made": {"use": "mix", "parts": {"a": part}}}))


class Faulty:
    """A step that does with the rows what it is told."""

    def __init__(self, result):
        self.result = result

    def open(self, context):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def run(self, rows, *, shard):
        return self.result(rows)


@pytest.mark.parametrize(
    "result",
    [
        lambda rows: StepResult(rows=tuple(rows[1:])),
        lambda rows: StepResult(rows=tuple(rows), dropped=((rows[0].example.id, "x"),)),
        lambda rows: StepResult(rows=tuple(rows[::-1])),
        lambda rows: StepResult(rows=tuple(rows[1:]), dropped=((rows[0].example.id, "x"), (rows[0].example.id, "y"))),
        lambda rows: StepResult(rows=tuple(rows[1:]), dropped=(("another", "x"),)),
    ],
)
def test_a_step_that_loses_or_invents_rows_is_stopped(made, monkeypatch, result):
    monkeypatch.setattr(
        curate_module, "build_step", lambda config: BuiltStep(step=Faulty(result), settings={"use": "x"}, order="any", decode=False)
    )
    with pytest.raises(CurateError, match=r"step verify, shard 0: 20 rows in, .* do not add up row by row, or their order has changed"):
        run(recipe_of(made))
    assert not (made / "out" / "steps" / "01-verify" / "shard-00000.json").exists()


def test_an_error_of_a_step_names_the_shard_and_the_shards_before_it_stay(made, monkeypatch, capsys):
    seen = []

    def fail_on_third(rows):
        seen.append(rows)
        if len(seen) == 3:
            raise VlpostError("the judge is down")
        return StepResult(rows=tuple(rows))

    monkeypatch.setattr(
        curate_module, "build_step", lambda config: BuiltStep(step=Faulty(fail_on_third), settings={"use": "x"}, order="any", decode=False)
    )
    only = recipe_of(made, steps={"verify": STEPS["verify"]})
    with pytest.raises(CurateError, match=r"step verify, shard 2: the judge is down\nWhole shards are kept; the same command goes on"):
        run(only)
    run(only)
    assert len(seen) == 6, "two shards, the one that failed, and the three that were left"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("steps.read={use: dedupe}", "a step is called 'read'"),
        ("steps.more={use: split, shares: {a: 0.5, b: 0.5}}", "steps split and more both split"),
        ("steps.more={use: difficulty, models: {m: {min_solved: 1}}}", "steps.more.models names 'm': no `generate` step before it has it"),
        ("max_per_query=2", "max_per_query has no effect with write: rows"),
        ("write=conversations", "write: conversations writes candidates, and no step generates any"),
        ("steps.dedupe.nearr=true", "steps.dedupe.nearr: unknown key; did you mean 'near'?"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(made, change, words):
    path = made / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(made).model_dump(mode="json", exclude_unset=True)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [change])
    assert words in str(caught.value)


def test_candidates_that_were_found_wrong_are_not_written_for_sft():
    model = {"path": "a/b", "sampler": {"max_response_tokens": 1, "max_model_len": 64}}
    verify = {"use": "verify", "rewards": {"components": {"answer": {"use": "count"}}}}
    steps = {"generate": {"use": "generate", "models": {"m": model}}}
    recipe = {"method": "curate", "output": "out", "data": {"a": {"use": "jsonl", "path": "a.jsonl"}}, "write": "conversations"}
    with pytest.raises(ValidationError, match=r"candidates that 'again' finds wrong, for SFT to learn; give it min_value, or where"):
        CurateRecipe.model_validate(recipe | {"steps": {**steps, "verify": verify, "again": verify}})
    for allowed in ({}, {"verify": verify | {"min_value": 1.0}}, {"verify": verify, "again": verify | {"min_value": 0.5}}):
        assert CurateRecipe.model_validate(recipe | {"steps": {**steps, **allowed}}).write == "conversations"


@pytest.mark.parametrize("row", ["", '{"messages": []}'])
def test_a_data_set_without_a_row_is_named_by_check(made, capsys, row):
    (made / "empty.jsonl").write_text(row)
    path = made / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(made).model_dump(mode="json", exclude_unset=True)))
    empty = f"data.other={{use: jsonl, path: {made / 'empty.jsonl'}, bad_rows: drop}}"
    assert main(["check", str(path), empty]) == 1
    assert "vlpost: data.other: there is no row that can be used; give at least one" in capsys.readouterr().err


def test_the_command_line(made, capsys):
    path = made / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(made).model_dump(mode="json", exclude_unset=True)))
    assert main(["check", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "data made: its first row is row-0" in printed
    assert "step verify: reward answer" in printed
    assert main(["curate", str(path), "shard_rows=50"]) == 0
    assert (made / "out" / "README.md").exists()
    assert main(["run", str(path)]) == 1
    assert "method is 'curate'; use `vlpost curate`" in capsys.readouterr().err


# ---------------------------------------------------------------- kill -9

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from vlpost.recipes.curate import curate
from vlpost.recipes.curate_config import CurateRecipe

recipe = CurateRecipe.model_validate_json(sys.stdin.read())
chance = random.Random(int(sys.argv[1]))

def start():
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        curate(recipe, recipe_folder=recipe.output.parent, allow_code=False)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

kills, whole_runs = 0, 0
while kills < 20:
    child = start()
    deadline = time.monotonic() + chance.uniform(0.0, float(sys.argv[2]))
    ended = 0
    while time.monotonic() < deadline and not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if ended:  # from the start again: there must be something to kill
        assert status == 0, status
        whole_runs += 1
        recipe.output.rename(recipe.output.with_name(f"{recipe.output.name}-{whole_runs}"))
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
assert os.waitpid(start(), 0)[1] == 0
print(json.dumps({"kills": kills, "whole_runs": whole_runs}))
"""


def test_killed_at_twenty_random_moments_and_resumed(tmp_path):
    write_rows(tmp_path, 450)
    recipe = recipe_of(tmp_path, output="killed", shard_rows=30)
    started = time.monotonic()
    run(recipe_of(tmp_path, shard_rows=30))
    whole_s = time.monotonic() - started
    seed = random.SystemRandom().randrange(10**6)
    killer = subprocess.run(
        [sys.executable, "-c", KILLER, str(seed), str(whole_s / 6)],
        input=recipe.model_dump_json(exclude_unset=True), capture_output=True, text=True, cwd=tmp_path,
        env=dict(os.environ),
    )  # fmt: skip
    assert killer.returncode == 0, (seed, killer.stderr)
    told = json.loads(killer.stdout)
    assert told["kills"] == 20
    expected = outcome(tmp_path / "out")
    outputs = [path for path in Path(tmp_path).iterdir() if path.name.startswith("killed")]
    assert len(outputs) == told["whole_runs"] + 1
    for output in outputs:
        assert outcome(output) == expected, (seed, output.name)


# ---------------------------------------------------------------- the hash of a step


def key_of(folder, settings, seed=0):
    return step_key(settings, StepContext(recipe_folder=folder, output=folder / "out", seed=seed))


def test_the_key_of_a_step_sees_settings_seed_and_the_files_that_they_name(tmp_path):
    (tmp_path / "rubric.yaml").write_text("one")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    (tmp_path / "own.py").write_text("a = 1")
    settings = {"rubric": "rubric.yaml", "path": str(tmp_path / "model"), "rewards": [{"use": "own.py:reward"}], "n": 1}
    keys = [key_of(tmp_path, settings)]
    assert key_of(tmp_path, dict(reversed(settings.items()))) == keys[0]
    keys += [key_of(tmp_path, settings, seed=1), key_of(tmp_path, settings | {"n": 2})]
    for path, text in (("rubric.yaml", "two"), ("own.py", "a = 2"), ("model/weights", "12"), ("model/more", "")):
        (tmp_path / path).write_text(text)
        keys.append(key_of(tmp_path, settings))
    assert len(set(keys)) == 7


def test_what_a_run_writes_itself_and_what_is_no_file_does_not_change_a_key(tmp_path):
    settings = {
        "cache": str(tmp_path / "verdicts.sqlite"),
        "separator": "/",
        "dots": "..",
        "long": "a/" * 3000,
        "zero": "a/\0",
        "model": "m.4",
    }
    before = key_of(tmp_path, settings)
    (tmp_path / "verdicts.sqlite").write_bytes(b"1")
    (tmp_path / "something").write_bytes(b"1")
    assert key_of(tmp_path, settings) == before
