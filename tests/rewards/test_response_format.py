"""The verifier of form: each kind of constraint on texts that meet it and texts that do not, in English and Chinese."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlpost.model.records import DataError
from vlpost.rewards import text_units
from vlpost.rewards.format_constraints import constraints_of, kinds
from vlpost.rewards.response_format import MAX_RESPONSE_CHARS, REWARDS, check_format_answer, response_format
from vlpost.rewards.result import RewardResult, Unavailable


@pytest.fixture(scope="module")
def row(make_example):
    def make(*constraints):
        return replace(make_example(), metadata={"constraints": list(constraints)})

    return make


@pytest.fixture(scope="module")
def judge(row, make_rollout):
    def value(constraint, text, **options):
        return response_format(row(constraint), make_rollout(text), **options).value

    return value


GERMAN = "Das ist der Zug, und er ist nicht pünktlich. Wie wird das mit den Kindern auf der Fahrt?"  # codespell:ignore ist
FRENCH = "Le train est dans la gare et les enfants ne sont pas là. Nous avons une heure de plus pour le voir."
SPANISH = "El tren está en la estación y los niños no son muy altos, pero es como se ve en una imagen del libro."
ITALIAN = "Il treno è nella stazione e non sono i bambini che si vedono con la nonna, ma anche una parte del libro."
PORTUGUESE = "O trem não está na estação e as crianças são como uma imagem do livro, mas com mais cor e em um quadro."
ENGLISH = "The train is in the station and the children are not there, but it was late and you have to wait for it."

CASES = [
    # kind and options, a response that meets it, one that does not
    ({"kind": "words", "exactly": 4}, "One two three four.", "One two three."),
    ({"kind": "words", "at_most": 3}, "我爱你。", "我爱你们。"),
    ({"kind": "words", "at_least": 4}, "3 只 cat 跑", "cat cat-cat"),
    ({"kind": "words", "exactly": 4}, "हम ट्रेन देखते हैं", "हम ट्रेन"),
    ({"kind": "sentences", "exactly": 2}, "Dr. Smith has 3.5 dogs. Really?", "One. Two. Three."),
    ({"kind": "sentences", "exactly": 3}, "今天很好。你呢？我也好！", "今天很好，你呢，我也好。"),
    ({"kind": "sentences", "at_least": 2}, "A title\n\nA sentence", "... ! ?"),
    ({"kind": "paragraphs", "exactly": 2}, "one\nline\n\n \n\ntwo", "one\ntwo"),
    ({"kind": "divided_parts", "exactly": 2}, "one\n***\ntwo", "one *** two"),
    ({"kind": "characters", "at_most": 5}, "ab cd e", "abcdef"),
    ({"kind": "characters", "exactly": 3}, "我 爱你", "我爱你。"),
    ({"kind": "bullets", "exactly": 2}, "So:\n* one\n- two", "-5\n---\n* one"),
    ({"kind": "bullets", "at_least": 2}, "• 苹果\n• 梨", "• 苹果，• 梨"),
    ({"kind": "numbered_items", "exactly": 3}, "1. a\n2) b\n(3) c", "1. a\n3. b\n5. c"),
    ({"kind": "numbered_items", "exactly": 2}, "一、苹果\n二、梨", "一苹果\n二梨"),
    ({"kind": "highlights", "at_least": 2}, "*one* and **two words**", "* one\n* two *"),
    ({"kind": "placeholders", "exactly": 2}, "Dear [name], 【地址】", "[a](b) [ ] []"),
    ({"kind": "capital_words", "at_most": 2}, "NASA and ESA", "NASA, ESA and I"),
    ({"kind": "keywords", "words": ["cat", "red  dog"]}, "A Cat saw a red\ndog.", "A category, a red dog."),
    ({"kind": "keywords", "words": ["苹果", "AI"]}, "用AI画苹果", "用AIR画苹果"),
    ({"kind": "forbidden_words", "words": ["art"]}, "the start", "the Art."),
    ({"kind": "forbidden_words", "words": ["苹果"]}, "我吃梨", "青苹果汁"),
    ({"kind": "keyword_count", "word": "dog", "exactly": 2}, "Dog, dog and dogs", "dog dog dog"),
    ({"kind": "letter_count", "letter": "e", "at_most": 2}, "Eel", "eeel"),
    ({"kind": "letter_count", "letter": "的", "at_least": 2}, "我的你的", "我的"),
    ({"kind": "sections", "exactly": 2}, "Section 1\na\n## SECTION 2: b", "Section 1\nSection 1 again"),
    ({"kind": "sections", "marker": "章", "at_least": 2}, "第一章 起\n第十二章 终", "在第一章和第二章里"),
    ({"kind": "title"}, "<<A poem>>\nso it goes", "<< >>\nso it goes"),
    ({"kind": "title"}, "《春》\n花开了", "春\n花开了"),
    ({"kind": "postscript"}, "Dear all.\n\nP.S. Bring cake.", "P.S. Bring cake."),
    ({"kind": "postscript", "marker": "附言"}, "你好。\n附言：带蛋糕", "你好。附言：带蛋糕"),
    ({"kind": "postscript", "marker": "P.P.S"}, "Hi.\n\nP.S. Cake.\nP. P. S. And tea", "Hi.\n\nP.S. Cake."),
    ({"kind": "quotation"}, '"All of it."', '"One" and "two'),
    ({"kind": "quotation"}, "「全部」", "「」"),
    ({"kind": "starts_with", "text": "My answer"}, "my  ANSWER is 3", "So my answer is 3"),
    ({"kind": "ends_with", "text": "Any other questions?"}, '"So.\nAny other questions?"', "Any other questions? No."),
    ({"kind": "ends_with", "text": "谢谢"}, "好的，谢谢", "谢谢你"),
    ({"kind": "paragraph_start", "number": 2, "word": "weep"}, "a\n\n**Weep** now", "weep\n\nweeping"),
    ({"kind": "case", "form": "upper"}, "ALL 3 CAPITAL", "ALL but one"),
    ({"kind": "case", "form": "lower"}, "no capital", "我爱你"),
    ({"kind": "no_commas"}, "a、b", "a，b"),
    ({"kind": "json_format"}, '```json\n{"a": 1}\n```', '{"a": 1,}'),
    ({"kind": "language", "code": "zh"}, "我们在 Paris 看火车，然后回家吃饭。", "私たちは電車を見ました。"),
    ({"kind": "language", "code": "ja"}, "私たちは電車を見ました。", "我们看火车。"),
    ({"kind": "language", "code": "ko"}, "우리는 기차를 봅니다", "we see 기차"),
    ({"kind": "language", "code": "ru"}, "Мы видим поезд", "My vidim poezd"),
    ({"kind": "language", "code": "ar"}, "نحن نرى القطار", "123"),
    ({"kind": "language", "code": "hi"}, "हम ट्रेन देखते हैं", "हम the train in the station"),
    ({"kind": "language", "code": "en"}, ENGLISH, GERMAN),
    ({"kind": "language", "code": "de"}, GERMAN, ENGLISH),
    ({"kind": "language", "code": "fr"}, FRENCH, ITALIAN),
    ({"kind": "language", "code": "es"}, SPANISH, PORTUGUESE),
    ({"kind": "language", "code": "it"}, ITALIAN, SPANISH),
    ({"kind": "language", "code": "pt"}, PORTUGUESE, SPANISH),
    ({"kind": "language", "code": "en"}, "It is the cat.", "xyzzy plugh frotz"),
    ({"kind": "two_responses"}, "one\n******\ntwo", "one\n******\n one"),
    ({"kind": "two_responses"}, "******一******二", "一******二******三"),
    ({"kind": "repeat_prompt"}, "How much?\nTwelve.", "How much?"),
    ({"kind": "repeat_prompt", "prompt": "说一说 春天"}, "说一说 春天：花开了", "春天花开了"),
    ({"kind": "choose_one", "options": ["My answer is yes", "My answer is no"]}, "My answer is NO.", "My answer is yes. My answer is no."),
    ({"kind": "choose_one", "options": ["yes", "yes and no"]}, "Yes and no", "Yes and no, yes"),
    ({"kind": "choose_one", "options": ["是", "否"]}, "答案：否", "是否"),
]


@pytest.mark.parametrize(("constraint", "met", "unmet"), CASES)
def test_a_constraint_is_met_or_not(judge, constraint, met, unmet):
    assert judge(constraint, met) == 1.0
    assert judge(constraint, unmet) == 0.0


def test_every_kind_is_tried_above():
    assert {constraint["kind"] for constraint, _met, _unmet in CASES} == set(kinds())
    assert len(kinds()) == 28


@pytest.mark.parametrize("constraint", [constraint for constraint, _met, _unmet in CASES])
def test_an_empty_response_meets_nothing(judge, make_rollout, row, constraint):
    assert judge(constraint, " \n") == 0.0
    assert response_format(row(constraint), make_rollout("thoughts", prompt_suffix="<think>")).value == 0.0
    assert judge(constraint, "x" * (MAX_RESPONSE_CHARS + 1)) == 0.0


def test_only_the_visible_part_is_counted(judge):
    assert judge({"kind": "words", "exactly": 1}, "<think>one two, three</think>\nfour") == 1.0
    assert judge({"kind": "keywords", "words": ["three"]}, "<think>one two, three</think>\nfour") == 0.0


def test_the_value_is_the_share_met_and_the_note_names_the_rest(row, make_rollout):
    example = row(
        {"kind": "words", "at_most": 2}, {"kind": "words", "at_least": 3}, {"kind": "no_commas"}, {"kind": "case", "form": "lower"}
    )
    judged = response_format(example, make_rollout("One, two"))
    assert judged == RewardResult(
        value=0.25,
        note="not met: [1] words, [2] no_commas, [3] case",
        metrics={"words": 0.5, "no_commas": 0.0, "case": 0.0},
    )
    assert response_format(example, make_rollout("One, two"), credit="all").value == 0.0
    assert response_format(row({"kind": "no_commas"}), make_rollout("One"), credit="all").value == 1.0


def test_loose_forgives_chatter_around_the_form_and_stars(judge):
    chatter = 'Sure, here it is:\n"one two"\nI hope it helps'
    for constraint, text in (({"kind": "quotation"}, chatter), ({"kind": "starts_with", "text": "Answer"}, "**Answer**: 3")):
        assert judge(constraint, text) == 0.0
        assert judge(constraint, text, loose=True) == 1.0
    assert judge({"kind": "quotation"}, "one two", loose=True) == 0.0


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        (None, r"metadata.constraints is missing; .*kind: words"),
        ([], "at least 1 item"),
        ({"kind": "words"}, "metadata.constraints = "),
        ([{"kind": "wrods", "at_most": 3}], r"constraints\[0\].kind = 'wrods': no such kind \(did you mean 'words'\?\); there are words, "),
        ([{"at_most": 3}], r"constraints\[0\].kind is missing"),
        ([{"kind": "title"}, {"kind": "words", "at_most": "3"}], r"constraints\[1\].at_most = '3': Input should be a valid integer"),
        ([{"kind": "words", "at_most": -1}], r"constraints\[0\].at_most = '-1': Input should be greater"),
        ([{"kind": "words"}], "no bound: write at_least, at_most or exactly"),
        ([{"kind": "words", "at_least": 0}], "met by everything"),
        ([{"kind": "words", "at_least": 5, "at_most": 3}], "no response could meet it"),
        ([{"kind": "words", "exactly": 5, "at_most": 3}], "exactly stands alone"),
        ([{"kind": "title", "text": "x"}], r"constraints\[0\].text = 'x': Extra inputs"),
        ([{"kind": "keywords", "words": []}], r"constraints\[0\].words"),
        ([{"kind": "keywords", "words": [" "]}], r"constraints\[0\].words\[0\]"),
        ([{"kind": "language", "code": "xx"}], r"constraints\[0\].code = 'xx': Input should be 'zh', "),
        ([{"kind": "case", "form": {1, 2}}], "is no plain JSON"),
        ([{"kind": "title"}] * 51, "at most 50 items"),
    ],
)
def test_constraints_that_cannot_be_read_are_refused_and_unavailable(make_example, make_rollout, constraints, words):
    example = replace(make_example(), metadata={} if constraints is None else {"constraints": constraints})
    with pytest.raises(DataError, match=f"example 'add-0': .*{words}"):
        check_format_answer(example)
    judged = response_format(example, make_rollout("x"))
    assert isinstance(judged, Unavailable)
    assert "example 'add-0'" in judged.reason


def test_there_is_no_gold_response_and_the_summary_says_so():
    assert REWARDS["format"].gold_response is None
    assert "no gold response" in REWARDS["format"].summary


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Mr. J. R. Smith met Mrs. Jones at 3.15 p.m. in the U.S. yesterday.", 1),
        ('He said "No!" and left. "Why?" I asked.', 4),
        ("Wait... what?! Yes.", 3),
        ("1. Eat.\n2. Sleep.", 2),
        ("The answer is A.\n\nNext", 2),
        ("他说：“好。”然后走了。", 2),
        ("So am I. Go.", 2),
        ("", 0),
    ],
)
def test_sentences_end_where_readers_end_them(text, count):
    assert text_units.num_sentences(text) == count


def test_numerals_are_read():
    written = ("7", "十", "十二", "二十", "三十五", "一百", "一百二十", "九")
    assert [text_units.numeral(text) for text in written] == [7, 10, 12, 20, 35, 100, 120, 9]


_PIECES = [
    "a",
    "B",
    "我",
    " ",
    "\n",
    "\n\n",
    "*",
    "**",
    "[",
    "]",
    "<<",
    ">>",
    "1.",
    "，",
    ",",
    ".",
    "。",
    '"',
    "“",
    "”",
    "P.S.",
    "******",
    "{",
    "}",
]


@pytest.fixture(scope="module")
def all_kinds(row):
    return row(*(constraint for constraint, _met, _unmet in CASES[:50])), row(*(constraint for constraint, _met, _unmet in CASES[50:]))


@given(st.text() | st.lists(st.sampled_from(_PIECES)).map("".join), st.booleans())
def test_no_text_makes_any_kind_raise(all_kinds, make_rollout, text, loose):
    for example in all_kinds:
        judged = response_format(example, make_rollout(text), loose=loose)
        assert isinstance(judged, RewardResult)
        assert 0.0 <= judged.value <= 1.0


@given(st.text(alphabet="ab .。\n!?我C", max_size=60), st.text(alphabet="ab .。\n!?我C", max_size=60))
def test_counts_of_paragraphs_put_together_add_up(first, second):
    together = f"{first}\n\n{second}"
    for count in (text_units.num_words, text_units.num_sentences, text_units.num_characters, text_units.num_capital_words):
        assert count(together) == count(first) + count(second)
    assert len(text_units.paragraphs(together)) == len(text_units.paragraphs(first)) + len(text_units.paragraphs(second))


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "a",
            " ",
            "\n",
            ".",
            "!)",
            "*",
            "* ",
            "**a",
            "[",
            "[a",
            "[ ",
            "<",
            "<<",
            "<<a",
            "《",
            "《a",
            "1.\n",
            "1. a\n",
            "。",
            "。”",
            '"',
            "'",
        ),
        *(
            "```\n",
            "P.S.\n",
            "P.S. ",
            "******",
            "a ",
            "I. ",
            "red ",
            "red dog",
            "Section 1\n",
            "第",
            "第一",
            "一、\n",
            "\t",
            "\u2028",
            "I ",
            "{",
        ),
        *("我", "é", "e.g. ", "- ", "\n \n", "Section ", "#", "# > * "),
    ],
)
def test_100_kb_of_one_thing_are_judged(all_kinds, make_rollout, piece):
    text = piece * (100_000 // len(piece))
    for example in all_kinds:
        assert 0.0 <= response_format(example, make_rollout(f"x{text}y")).value < 1.0


def test_constraints_are_read_once_for_equal_metadata(row):
    one, two = row({"kind": "title"}), row({"kind": "title"})
    assert constraints_of(one) is constraints_of(two)
