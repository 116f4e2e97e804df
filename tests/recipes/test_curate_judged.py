"""`query_filter` and `response_judge` against a scripted judge on loopback: who is dropped, why, and that an outage drops nobody."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from vlpost.model.records import DataError, Example, ImagePart, Message, TextPart, VideoPart
from vlpost.recipes.curate_engine_config import QueryFilterConfig, ResponseJudgeConfig
from vlpost.recipes.curate_judged import QueryFilterStep, ResponseJudgeStep
from vlpost.recipes.curate_query import IMAGE_MARK, as_query, given_answer, query_text, with_query_text
from vlpost.recipes.curate_rewrite import NO_ANSWER, read_rewrite, rewrite_problem
from vlpost.recipes.curate_step import Candidate, CuratedRow, StepContext
from vlpost.rewards.config import RewardConfigError
from vlpost.rewards.judge_prompt import parse_back
from vlpost.rewards.llm_judge import JudgeDriftError
from vlpost.rewards.manager import RewardUnavailableError

FAST = {"canary_every": 0, "retries": 0, "deadline_s": 2.0, "backoff_s": 0.01, "max_backoff_s": 0.02, "max_outage_s": 0.2, "probe_s": 0.01}
GOOD_QUERY = {"verifiable": 1, "clear": 1, "substance": 4, "relevance": 5, "complexity": 2}
GOOD_RESPONSE = {"correctness": 5, "completeness": 5, "clarity": 5, "helpfulness": 5, "visual_evidence": 5}
RED, BLUE = (ImagePart.from_image(Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))


def ask(text, *images, answer="12", name="row", response=None):
    messages = [Message(role="user", parts=(*images, TextPart(text=text)))]
    if response is not None:
        messages.append(Message(role="assistant", parts=(TextPart(text=response),)))
    return Example(id=name, messages=tuple(messages), answer=answer, task="add", source="test")


def rows_of(*examples):
    return [CuratedRow(example=example) for example in examples]


class Judge:
    """Replies by rule: `verdicts` maps a piece of the judged text to changes of the good scores, `rewrites` to a rewritten query."""

    def __init__(self):
        self.verdicts, self.rewrites, self.requests = {}, {}, []
        self.refused = ()
        self.url = ""

    def reply(self, body):
        content = body["messages"][-1]["content"]
        field = parse_back(content if isinstance(content, str) else content[-1]["text"])
        properties = body["response_format"]["json_schema"]["schema"]["properties"]
        self.requests.append({"field": field, "content": content, "properties": properties, "system": body["messages"][0]["content"]})
        query, response = field["prompt"][-1]["text"], field["response"]
        if any(piece in query or piece in response for piece in self.refused):
            return None
        if "rewrite" in properties:
            return {"rewrite": next(text for piece, text in self.rewrites.items() if piece in query)}
        verdict = {"reason": "because"} | (dict(GOOD_QUERY) if "verifiable" in properties else dict(GOOD_RESPONSE))
        assert set(verdict) == set(properties)
        judged = query if "verifiable" in properties else response
        for piece, changes in self.verdicts.items():
            if piece in judged:
                verdict |= changes
        return verdict


@pytest.fixture
def judge():
    scripted = Judge()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            reply = scripted.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": json.dumps(reply)}
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(400 if reply is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    scripted.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield scripted
    server.shutdown()
    server.server_close()


@contextmanager
def opened(step, config, judge, tmp_path, **judge_settings):
    settings, use = {QueryFilterStep: (QueryFilterConfig, "query_filter"), ResponseJudgeStep: (ResponseJudgeConfig, "response_judge")}[step]
    judge_config = {"url": judge.url, "model": "m", **FAST, **judge_settings}
    context = StepContext(recipe_folder=tmp_path, output=tmp_path, seed=0)
    with step(settings.model_validate({"use": use, "judge": judge_config, **config})).open(context) as step_at_work:
        yield step_at_work


@pytest.fixture
def query_filter(judge, tmp_path):
    def run(*examples, judge_settings=None, **config):
        with opened(QueryFilterStep, config, judge, tmp_path, **(judge_settings or {})) as step:
            return step.run(rows_of(*examples), shard=0)

    return run


@pytest.fixture
def judge_responses(judge, tmp_path):
    def run(*rows, judge_settings=None, **config):
        with opened(ResponseJudgeStep, config, judge, tmp_path, **(judge_settings or {})) as step:
            return step.run(rows, shard=0)

    return run


# ---------------------------------------------------------------- queries


def test_a_good_query_is_kept_with_its_scores(query_filter, judge):
    result = query_filter(ask("How much is 5 + 7?", RED))
    assert result.dropped == result.changed == ()
    assert result.rows[0].notes == {**GOOD_QUERY, "query_reason": "because"}
    (request,) = judge.requests
    assert request["field"] == {"prompt": [{"role": "user", "text": "[image]How much is 5 + 7?"}], "response": "12"}
    assert [part["type"] for part in request["content"]] == ["image_url", "text"]


def test_each_fault_has_its_own_reason_and_the_others_stay_in_order(query_filter, judge):
    judge.verdicts = {
        "hello": {"substance": 1}, "taste": {"verifiable": 0}, "cat": {"relevance": 1}, "easy": {"complexity": 1},
    }  # fmt: skip
    result = query_filter(
        ask("first", name="a"),
        ask("hello", name="b"),
        ask("a matter of taste", name="c"),
        ask("the cat?", RED, name="d"),
        ask("the cat, without an image", name="e"),
        ask("easy", name="f"),
        min_complexity=2,
    )
    assert [row.example.id for row in result.rows] == ["a", "e"]
    assert dict(result.dropped) == {
        "b": "query without substance: substance 1, at least 2 is asked; because",
        "c": "query cannot be verified: because",
        "d": "query does not fit its image: relevance 1, at least 2 is asked; because",
        "f": "query too simple: complexity 1, at least 2 is asked; because",
    }
    assert [name for name, _ in result.dropped] == ["b", "c", "d", "f"]


def test_thresholds_and_choices_are_keys(query_filter, judge):
    judge.verdicts = {"dull": {"substance": 2}, "taste": {"verifiable": 0}, "it": {"clear": 0}, "cat": {"relevance": 1}}
    dull, taste, vague, cat = ask("dull"), ask("taste"), ask("it"), ask("cat", RED)
    assert not query_filter(dull).dropped
    assert query_filter(dull, min_substance=3).dropped[0][1].startswith("query without substance")
    assert query_filter(taste).dropped
    assert query_filter(taste, keep_unverifiable=True).rows[0].notes["verifiable"] == 0
    assert query_filter(vague, ambiguous="drop").dropped == (("row", "ambiguous query: because"),)
    assert query_filter(vague, ambiguous="keep").rows[0].notes["clear"] == 0
    assert not query_filter(cat, min_relevance=1).dropped


def test_without_images_the_judge_sees_marks_alone(query_filter, judge):
    query_filter(ask("seen?", RED), images=False)
    assert isinstance(judge.requests[0]["content"], str)
    assert judge.requests[0]["field"]["prompt"][0]["text"] == "[image]seen?"


def test_an_ambiguous_query_is_rewritten_judged_again_and_recorded_with_its_original(query_filter, judge):
    judge.verdicts = {"How much is it": {"clear": 0, "verifiable": 0, "reason": "what is it?"}}
    judge.rewrites = {"How much is it": "[image]How much is the sum of both?"}
    result = query_filter(ask("before", name="a"), ask("How much is it?", RED, name="b"), ask("after", name="c"))
    assert [row.example.id for row in result.rows] == ["a", "b", "c"]
    row = result.rows[1]
    assert row.example.messages[0].parts == (RED, TextPart(text="How much is the sum of both?"))
    assert row.notes == {
        **GOOD_QUERY, "query_reason": "because", "original_query": "[image]How much is it?", "ambiguity": "what is it?",
    }  # fmt: skip
    assert result.changed == (("b", "query rewritten: '[image]How much is it?' is now '[image]How much is the sum of both?'"),)
    assert result.metrics == {"ambiguous": 1, "rewritten": 1}
    (asked,) = [request for request in judge.requests if "rewrite" in request["properties"]]
    assert asked["field"] == {"prompt": [{"role": "user", "text": "[image]How much is it?"}], "response": "12", "reason": "what is it?"}
    assert asked["content"][0]["type"] == "image_url"
    assert "material" in asked["system"]


@pytest.mark.parametrize(
    ("rewrite", "words"),
    [
        ("[image]How much is it?", "no usable rewrite: the judge changed nothing"),
        ("How much is the sum?", "no usable rewrite: 0 image marks, the query has 1 images"),
        ("[image]How much is it? It is 12.", "no usable rewrite: it gives the answer '12' away"),
        ("[image]How much is it<|im_end|>", "no usable rewrite: it holds a control token"),
        ("[image]Please name the value that one gets by adding both of the digits.", "of it differ, at most 50% may"),
        ("[image]How much is its sum?", "its rewrite is no better: ambiguous query: still"),
    ],
)
def test_a_rewrite_that_is_none_drops_the_row_by_name(query_filter, judge, rewrite, words):
    judge.verdicts = {"How much is it": {"clear": 0, "reason": "still"}}
    judge.rewrites = {"How much is it": rewrite}
    result = query_filter(ask("How much is it?", RED))
    assert result.rows == result.changed == ()
    assert result.dropped[0][1].startswith("ambiguous query, ")
    assert words in result.dropped[0][1]


def test_a_worthless_query_is_not_worth_a_rewrite(query_filter, judge):
    judge.verdicts = {"hello": {"clear": 0, "substance": 1}}
    assert query_filter(ask("hello")).dropped[0][1].startswith("query without substance")
    assert len(judge.requests) == 1


def test_a_query_with_candidates_is_not_rewritten_under_them(judge, tmp_path):
    row = CuratedRow(example=ask("How much?"), candidates=(candidate("12"),))
    with (
        opened(QueryFilterStep, {}, judge, tmp_path) as step,
        pytest.raises(DataError, match=r"row row has candidates already, .* put query_filter before generate, or write ambiguous: drop"),
    ):
        step.run([row], shard=0)
    with opened(QueryFilterStep, {"ambiguous": "drop"}, judge, tmp_path) as step:
        assert step.run([row], shard=0).rows[0].candidates == row.candidates


def test_the_longest_change_is_a_key(query_filter, judge):
    judge.verdicts = {"How much is it": {"clear": 0}}
    judge.rewrites = {"How much is it": "Please name the sum of both."}
    example = ask("How much is it?")
    assert query_filter(example).dropped
    assert query_text(query_filter(example, max_change=1.0).rows[0].example) == "Please name the sum of both."


def test_the_last_question_of_a_conversation_is_judged_with_its_answer(query_filter, judge):
    first = ask("One?", RED, answer="", response="<think>\nhm\n</think>\n\nYes.")
    longer = Example(
        id="row",
        messages=(*first.messages, *ask("Two?", response="<think>\nso\n</think>\n\nNo.").messages),
        answer="",
        task="t",
        source="s",
    )
    judge.verdicts = {"Two?": {"clear": 0}}
    judge.rewrites = {"Two?": "Two then?"}
    result = query_filter(longer)
    assert [message.text for message in result.rows[0].example.messages][2:] == ["Two then?", "<think>\nso\n</think>\n\nNo."]
    assert judge.requests[0]["field"]["response"] == "No."
    assert [turn["role"] for turn in judge.requests[0]["field"]["prompt"]] == ["user", "assistant", "user"]


def test_a_query_without_an_answer_says_so_to_the_judge(query_filter, judge):
    query_filter(ask("How much?", answer=" "))
    assert judge.requests[0]["field"]["response"] == NO_ANSWER


@pytest.mark.parametrize("rewriting", [False, True])
def test_an_outage_is_an_error_that_names_the_row_and_no_drop(query_filter, judge, rewriting):
    if rewriting:
        judge.verdicts, judge.rewrites = {"it": {"clear": 0}}, {"it": None}
    else:
        judge.refused = ("it",)
    with pytest.raises(RewardUnavailableError, match=r"query_filter.*1 of \d could not be judged(.|\n)*row b: judge: ") as caught:
        query_filter(ask("good", name="a"), ask("it", name="b"))
    assert "no row is dropped for that" in str(caught.value)


def test_canaries_are_asked_first_and_a_judge_that_fails_them_stops_the_run(query_filter, judge):
    with pytest.raises(JudgeDriftError, match="greeting"):  # this judge finds everything good
        query_filter(ask("How much?"), judge_settings={"canary_every": 100})
    assert all(request["field"]["prompt"][0]["text"] != "How much?" for request in judge.requests)


def test_verdicts_and_rewrites_are_cached_when_the_recipe_names_a_file(query_filter, judge):
    judge.verdicts = {"How much is it": {"clear": 0}}
    judge.rewrites = {"How much is it": "How much is the sum?"}
    examples = [ask("How much is it?", name="a"), ask("other", name="b")]
    first = query_filter(*examples, judge_settings={"cache": "verdicts.sqlite"})
    assert len(judge.requests) == 4
    again = query_filter(*examples, judge_settings={"cache": "verdicts.sqlite"})
    assert len(judge.requests) == 4
    assert again == first


def test_a_rubric_of_the_recipe_needs_the_same_axes(query_filter, judge, tmp_path):
    text = "name: mine\nkind: axes\nreference: never\ntask: Judge.\naxes: {clear: {guide: Is it clear.}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RewardConfigError, match=r"rubric 'mine.yaml' has the axes .*; it must have verifiable 0 to 1, clear 0 to 1, subst"):
        query_filter(ask("x"), rubric="mine.yaml")
    axes = {name: {"guide": "Score.", "lowest": int(high == 5), "highest": high} for name, high in
            {"verifiable": 1, "clear": 1, "substance": 5, "relevance": 5, "complexity": 5}.items()}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps({"name": "mine", "kind": "axes", "reference": "never", "task": "OURS", "axes": axes}))
    assert len(query_filter(ask("x"), rubric="mine.yaml").rows) == 1
    assert judge.requests[0]["system"].startswith("OURS")


def test_a_misspelt_rubric_is_answered_with_the_names_that_there_are(query_filter):
    with pytest.raises(RewardConfigError, match=r"query_filter: rubric 'qeury' is unknown; built-in are query, response, a file of yours"):
        query_filter(ask("x"), rubric="qeury")


@given(
    texts=st.lists(st.text(alphabet="ab [", max_size=5), min_size=1, max_size=4),
    images=st.lists(st.sampled_from([RED, BLUE]), min_size=3, max_size=3),
)
def test_writing_back_the_text_of_a_query_changes_nothing_that_is_seen(texts, images):
    parts = [TextPart(text=texts[0])]
    for image, text in zip(images, texts[1:], strict=False):
        parts += [image, TextPart(text=text)]
    example = Example(id="r", messages=(Message(role="user", parts=tuple(parts)),), answer="", task="t", source="s")
    again = with_query_text(example, query_text(example))
    assert query_text(again) == query_text(example)
    assert again.media == example.media
    assert rewrite_problem(example, query_text(example), max_change=1.0) == "the judge changed nothing"


def test_a_query_that_holds_the_mark_as_text_cannot_be_rewritten():
    problem = rewrite_problem(ask(f"What does {IMAGE_MARK} mean?"), "What does the word mean?", max_change=1.0)
    assert problem == "the query itself holds [image], so that its images cannot be told from its text"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no text"), ("no json", "no JSON"), ('{"rewrite": 3}', "not one object"), ('{"rewrite": "a", "b": 1}', "not one object"),
        ('{"rewrite": "' + "a" * 11 + '"}', "11 characters, at most 10"), ('{"rewrite": "\\ud800"}', "surrogates not allowed"),
    ],
)  # fmt: skip
def test_a_reply_that_is_no_rewrite_is_refused(content, words):
    with pytest.raises(ValueError, match=words):
        read_rewrite(content, max_chars=10)


@pytest.mark.parametrize(
    ("answer", "text", "gives_away"),
    [
        ("1", "How much is 12?", False), ("1", "How much is 1?", True), ("a", "How many then?", False), ("A", "Is it a) or not?", True),
        ("七", "这是七吗？", True), ("A.b", "Is it Axb?", False), ("", "Is it?", False), ("it", "How much, in it", False),
    ],
)  # fmt: skip
def test_an_answer_is_given_away_when_the_rewrite_holds_it_as_a_word(answer, text, gives_away):
    problem = rewrite_problem(ask("How much, is it?", answer=answer), text, max_change=1.0)
    assert (problem is not None) == gives_away
    assert not gives_away or "gives the answer" in problem


def test_as_query_and_given_answer():
    with_response = ask("x", answer="", response="<think>\nlong\n</think>\n\n7")
    assert as_query(with_response).messages == ask("x").messages
    assert as_query(ask("x")) == ask("x")
    assert given_answer(with_response) == "7"
    assert given_answer(ask("x", answer="", response="<think>\nnever closed")) == ""
    assert given_answer(ask("x", answer="12", response="7")) == "12"
    assert given_answer(ask("x", answer="")) == ""


# ---------------------------------------------------------------- responses


def candidate(text, *, model="m", suffix="", notes=None):
    return Candidate(text=text, prompt_suffix=suffix, finish_reason="stop", num_tokens=3, model=model, seed=1, notes=notes or {})


def row_of(*candidates, example=None):
    return CuratedRow(example=example or ask("How much is 5 + 7?", RED), candidates=candidates)


def test_candidates_below_a_threshold_go_and_the_others_bear_their_scores(judge_responses, judge):
    judge.verdicts = {"wrong": {"correctness": 2, "reason": "it is 12"}, "vague": {"clarity": 2}}
    row = row_of(candidate("12", notes={"old": 1}), candidate("wrong", model="n"), candidate("vague"))
    result = judge_responses(row)
    assert result.dropped == ()
    (kept,) = result.rows
    assert [c.text for c in kept.candidates] == ["12"]
    assert kept.candidates[0].notes == {"old": 1, "judge": {**GOOD_RESPONSE, "value": 1.0, "reason": "because"}}
    assert result.changed == (
        (
            "row",
            "candidates removed by the judge: candidate 2 of 3 (n) correctness: 2, at least 4 is asked; it is 12; "
            "candidate 3 of 3 (m) clarity: 2, at least 3 is asked; because",
        ),
    )
    assert result.metrics == {"responses_judged": 3, "failed/correctness": 1, "failed/clarity": 1}
    assert judge.requests[0]["field"]["reference"] == "12"


def test_a_row_without_a_passing_candidate_is_dropped_with_all_reasons(judge_responses, judge):
    judge.verdicts = {"wrong": {"correctness": 1}}
    result = judge_responses(row_of(candidate("wrong")), row_of(candidate("12"), example=ask("y", name="other")))
    assert [row.example.id for row in result.rows] == ["other"]
    assert result.dropped == (("row", "no candidate passes the judge: candidate 1 of 1 (m) correctness: 1, at least 4 is asked; because"),)


def test_the_thinking_part_is_not_shown_and_one_without_an_answer_fails_unasked(judge_responses, judge):
    row = row_of(candidate("hm hm\n</think>\n\n12", suffix="<think>\n"), candidate("hm hm", suffix="<think>\n"))
    result = judge_responses(row)
    assert [request["field"]["response"] for request in judge.requests] == ["12"]
    assert len(result.rows[0].candidates) == 1
    assert "candidate 2 of 2 (m) no answer to judge: no visible response" in result.changed[0][1]


def test_visual_evidence_counts_only_where_there_is_something_to_see(judge_responses, judge):
    judge.verdicts = {"12": {"visual_evidence": 1}}
    film = VideoPart.from_frames([RED.image, BLUE.image], fps=2.0, frame_indices=[0, 1])
    seen, unseen, video = (
        row_of(candidate("12"), example=ask("q", *media, name=n)) for n, media in [("a", [RED]), ("b", []), ("c", [film])]
    )
    result = judge_responses(seen, unseen, video)
    assert [name for name, _ in result.dropped] == ["a", "c"]
    assert "visual_evidence: 1, at least 3 is asked" in result.dropped[0][1]


def test_the_weighted_mean_is_a_threshold_of_its_own_and_weighs_visual_evidence_more_than_clarity(judge_responses, judge):
    judge.verdicts = {"blind": {"visual_evidence": 3}, "dim": {"clarity": 3}}
    rows = [row_of(candidate(text), example=ask("q", RED, name=text)) for text in ("blind", "dim")]
    kept = {row.example.id: row.candidates[0].notes["judge"]["value"] for row in judge_responses(*rows).rows}
    assert kept == {"blind": pytest.approx(1 - 0.25 / 2), "dim": pytest.approx(1 - 0.15 / 2)}
    result = judge_responses(*rows, min_value=0.9)
    assert [row.example.id for row in result.rows] == ["dim"]
    assert "value: 0.875, at least 0.9 is asked" in result.dropped[0][1]


def test_an_axis_that_is_left_out_has_no_threshold(judge_responses, judge):
    judge.verdicts = {"12": {"correctness": 4, "clarity": 1}}
    assert judge_responses(row_of(candidate("12"))).dropped
    assert not judge_responses(row_of(candidate("12")), min_scores={"correctness": 4}).dropped
    assert judge_responses(row_of(candidate("12")), min_scores={"correctness": 5}).dropped


def test_of_a_conversation_its_last_turn_is_judged(judge_responses, judge):
    judge.verdicts = {"seven": {"helpfulness": 1}}
    good, bad = (row_of(example=ask("q", answer="", response=text, name=text)) for text in ("twelve", "seven"))
    bare = row_of(example=ask("q", name="bare"))
    result = judge_responses(good, bad, bare)
    assert [row.notes["judge"]["helpfulness"] for row in result.rows] == [5]
    assert result.dropped == (
        ("seven", "response fails the judge: helpfulness: 1, at least 3 is asked; because"),
        ("bare", "no response to judge: the row has neither candidates nor an assistant turn at its end"),
    )
    assert {request["field"]["response"] for request in judge.requests} == {"twelve", "seven"}
    assert all("reference" not in request["field"] for request in judge.requests)


def test_an_outage_of_the_response_judge_names_the_row(judge_responses, judge):
    judge.refused = ("broken",)
    with pytest.raises(RewardUnavailableError, match=r"response_judge: 1 of 2 could not be judged(.|\n)*row b: judge: HTTP 400"):
        judge_responses(row_of(candidate("12")), row_of(candidate("broken"), example=ask("q", name="b")))


def test_canaries_of_the_response_rubric_catch_a_judge_that_likes_everything(judge_responses):
    with pytest.raises(JudgeDriftError, match="wrong-number"):
        judge_responses(row_of(candidate("12")), judge_settings={"canary_every": 10})


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        (QueryFilterConfig, {"images": False, "max_frames": 2}, "max_frames has no effect with images: false"),
        (ResponseJudgeConfig, {"images": False, "max_frames": 2}, "max_frames has no effect with images: false"),
        (QueryFilterConfig, {"ambiguous": "drop", "max_change": 0.2}, "max_change has no effect with ambiguous: drop"),
        (ResponseJudgeConfig, {"min_scores": {"beauty": 3}}, "Input should be 'correctness'"),
        (ResponseJudgeConfig, {"min_scores": {"clarity": 6}}, "less than or equal to 5"),
    ],
)
def test_an_option_without_effect_or_out_of_range_is_refused(settings, given, words):
    use = "query_filter" if settings is QueryFilterConfig else "response_judge"
    with pytest.raises(ValidationError) as caught:
        settings.model_validate({"use": use, "judge": {"url": "http://127.0.0.1:1/v1", "model": "m"}, **given})
    assert words in str(caught.value)
