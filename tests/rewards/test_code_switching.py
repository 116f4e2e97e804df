"""The penalty for language mixing: what is mixed, what is not, whose language counts, and that hostile text costs little."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from vlpost.model.records import Example, Message, Rollout, TextPart
from vlpost.rewards.code_switching import code_switching, find_mixing, named_languages, response_parts, text_languages, wanted_languages
from vlpost.rewards.language_masks import masked, prompt_spans
from vlpost.rewards.language_scripts import SCRIPTS, visible_characters, words
from vlpost.rewards.language_sentences import MAX_PIECE_CHARS, is_title, label_latin, sentences

HELD_OUT = yaml.safe_load(Path(__file__).with_name("language_held_out.yaml").read_text(encoding="utf-8"))
ENGLISH = (
    "The picture shows a small house. We count the windows on the left side and then those on the right side. There are seven of them."
)
CHINESE = "图里有一座小房子。我们先数左边的窗户，再数右边的窗户。一共有七个。"


def example(*turns, role="user"):
    return Example(
        id="row", messages=tuple(Message(role=role, parts=(TextPart(text=turn),)) for turn in turns), answer="", task="t", source="s"
    )


def rollout(text, prompt_suffix=""):
    return Rollout(
        token_ids=(1, 2),
        sampled=(False, True),
        sampler_logprobs=(0.0, -0.5),
        media=(),
        text=text,
        prompt_suffix=prompt_suffix,
        finish_reason="stop",
        policy_version=0,
    )


def value(prompt, text, suffix="", **options):
    return code_switching(example(prompt), rollout(text, suffix), **options).value


# ---------------------------------------------------------------- what is mixed


@pytest.mark.parametrize("language", [name for name in HELD_OUT["planted"] if name != "en"])
def test_one_foreign_sentence_among_many_is_found_and_shown(language):
    planted = HELD_OUT["planted"][language][0]
    result = code_switching(example("How many windows does the house have?"), rollout(f"{ENGLISH} {planted} {ENGLISH}"))
    assert result.value == -1.0
    assert planted[:8] in result.note
    assert 0.01 < result.metrics["foreign_frac"] < 0.5
    assert result.metrics["num_spans"] >= 1


@pytest.mark.parametrize("language", ["en", "ru", "ja", "ko", "ar"])
def test_one_foreign_sentence_in_a_chinese_text_is_found(language):
    assert value("图里有几扇窗户？", f"{CHINESE}{HELD_OUT['planted'][language][0]}{CHINESE}") == -1.0


@pytest.mark.parametrize(("prompt", "text"), [("How many windows are there?", ENGLISH), ("图里有几扇窗户？", CHINESE)])
def test_a_clean_text_costs_nothing(prompt, text):
    result = code_switching(example(prompt), rollout(text))
    assert (result.value, result.note, result.metrics["foreign_frac"], result.metrics["num_spans"]) == (0.0, "", 0.0, 0.0)


def test_thinking_and_answer_are_judged_apart():
    text = f"{CHINESE}</think>\n\n{ENGLISH}"
    result = code_switching(example("How many windows are there?"), rollout(text, "<think>\n"))
    assert result.value == -1.0
    assert result.note.startswith("thinking: 100.0% of the words are foreign")
    assert value("How many windows are there?", text, "<think>\n", judge="answer") == 0.0
    assert value("图里有几扇窗户？", text, "<think>\n", judge="thinking") == 0.0
    assert value("图里有几扇窗户？", text, "<think>\n", judge="answer") == -1.0
    # A long clean answer does not dilute a short mixed thinking part.
    assert value("How many?", f"{HELD_OUT['planted']['zh'][0]}</think>" + ENGLISH * 200, "<think>\n") == -1.0


@pytest.mark.parametrize(
    ("text", "suffix", "parts"),
    [
        ("a</think>b", "<think>\n", {"thinking": "a", "answer": "b"}),
        ("<think>a</think>b", "", {"thinking": "<think>a", "answer": "b"}),
        ("cut off", "<think>\n", {"thinking": "cut off"}),
        ("cut off", "<think>\n\n</think>\n\n", {"answer": "cut off"}),
        ("plain", "", {"answer": "plain"}),
    ],
)
def test_parts_of_a_response(text, suffix, parts):
    assert response_parts(rollout(text, suffix)) == parts


def test_the_size_of_the_penalty_and_the_share_are_options():
    text = f"{ENGLISH} {HELD_OUT['planted']['zh'][0]}"
    assert value("How many windows are there?", text, penalty=-0.25) == -0.25
    assert value("How many windows are there?", text, max_foreign_frac=0.9) == 0.0


def test_two_foreign_words_are_a_slip_and_three_are_mixing():
    assert find_mixing("The answer is да нет.", wanted=frozenset({"en"})).foreign_words == 2
    assert value("What is the answer?", "The answer is да нет.") == 0.0
    assert value("What is the answer?", "The answer is да нет да.") == -1.0


# ---------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    "text",
    [
        "Run this:\n```python\nprint('你好，世界，再见')  # 先计算总和然后打印\n```\nThen read the last line.",
        "The formula $\\text{Fläche des Dreiecks ist}$ gives the area.",
        "The sign says “欢迎光临本店，请进来看看” above the door.",
        "The city of Beijing (北京) lies in the north of the country.",
        "See https://zh.wikipedia.org/wiki/三角形的面积公式 for the details.",
        "Friedrich Schiller and Johann Wolfgang von Goethe stand on the left of the statue.",
    ],
)
def test_code_formulas_quotations_names_and_addresses_are_no_language(text):
    assert value("What do you see in the picture?", text) == 0.0


@pytest.mark.parametrize("text", ["用 Python 的 numpy 库计算即可得到结果。", "Attention Is All You Need 提出了这种方法，我们来实现。"])
def test_terms_and_titles_in_latin_letters_are_ordinary_chinese(text):
    assert value("怎么实现这种方法？", text) == 0.0


def test_a_whole_english_clause_in_chinese_is_mixing_also_in_capitals():
    clause = "so we have to count all of the windows again"
    assert value("图里有几扇窗户？", f"{CHINESE}{clause}。") == -1.0
    assert value("图里有几扇窗户？", f"{CHINESE}{' '.join([clause] * 3).title()}。") == -1.0


def test_what_the_prompt_wrote_may_be_repeated():
    prompt = "What does 今天的天气非常好我们去公园 mean?"
    assert value(prompt, "It begins with 今天的天气非常好 and ends with a place.") == 0.0
    assert value("What does the sign mean?", "It begins with 今天的天气非常好 and ends with a place.") == -1.0


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Answer in Chinese. How many windows are there?", CHINESE, 0.0),
        ("How many windows? 请用中文回答", CHINESE, 0.0),
        ("图里有几扇窗户？请用英文回答。", ENGLISH, 0.0),
        ("Wie viele Fenster hat das Haus? Bitte antworte auf Englisch.", ENGLISH, 0.0),
        ("Do not use Chinese. How many windows are there?", CHINESE, -1.0),
        ("Translate the sign in the picture.", CHINESE, 0.0),
        ("How many windows are there?", CHINESE, -1.0),
        ("12 + 7 = ?", CHINESE, 0.0),
        ("12 + 7 = ?", f"{CHINESE}{HELD_OUT['planted']['ru'][0]}", -1.0),
    ],
)
def test_the_prompt_says_which_languages_are_wanted(prompt, text, expected):
    assert value(prompt, text) == expected


def test_the_recipe_may_say_it_instead():
    assert value("How many windows are there?", CHINESE, language="zh") == 0.0
    assert value("How many windows are there?", ENGLISH, language="zh") == -1.0
    assert value("How many windows are there?", CHINESE, allowed_languages=("zh",)) == 0.0
    words = "красный синий зелёный"
    assert value("Which one is it?", f"It is the {words} one.") == -1.0
    assert value("Which one is it?", f"It is the {words} one.", allowed_terms=("КРАСНЫЙ синий зелёный",)) == 0.0


def test_wanted_languages_of_several_turns():
    turns = (Message(role="system", parts=(TextPart(text="Antworte auf Deutsch."),)), *example("What do you see on the left?").messages)
    row = Example(id="r", messages=turns, answer="", task="t", source="s")
    assert wanted_languages(row, language=None, allowed=()) == {"en", "de"}
    assert wanted_languages(row, language="fr", allowed=("it",)) == {"fr", "de", "it"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Answer in French, please", {"fr"}),
        ("avoid german", set()),
        ("never mind. use Korean", {"ko"}),
        ("不要用英文，用日语", {"ja"}),
        ("Translate this.", set(SCRIPTS)),
        ("Translate this to Thai.", {"th"}),
        ("nothing", set()),
    ],
)
def test_named_languages(text, named):
    assert named_languages(text) == named


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("How much?", {"en"}),
        ("これは何ですか", {"ja"}),
        ("这是什么", {"zh"}),
        ("이것은 무엇입니까", {"ko"}),
        ("x^2 + 4 = 8", set()),
        ("Was ist das Ergebnis der folgenden Rechnung?", {"de"}),
    ],
)
def test_languages_of_a_prompt(text, languages):
    assert text_languages(text) == languages


# ---------------------------------------------------------------- words, sentences, masks


def test_words_are_counted_in_word_equivalents():
    assert [(word.text, word.script, word.weight) for word in words("It's 你好 привет สวัสดี α")] == [
        ("It's", "Latin", 1.0),
        ("你", "Han", 0.5),
        ("好", "Han", 0.5),
        ("привет", "Cyrillic", 1.0),
        ("สวัสดี", "Thai", pytest.approx(1.2)),
    ]


def test_invisible_characters_hide_nothing():
    spaced = "\u200b".join("это предложение написано по-русски")
    assert visible_characters(spaced) == "это предложение написано по-русски"
    assert value("What is it?", f"{ENGLISH} {spaced}") == -1.0


def test_titles():
    def title(text):
        return is_title(list(words(text)))

    assert title("Learning to See in the Dark")
    assert not title("we learn to see in the dark")
    assert not title("Learning to see things")
    assert not title("A " * 13)


def test_a_label_needs_both_votes():
    def label(text):
        return label_latin(list(words(text)), wanted=frozenset({"en"}))

    assert label("und dann zählen wir die roten Kugeln") == "de"
    assert label("red green blue") is None
    # No word holds these together: a label that is not nearly sure is none.
    assert label("Veo cuatro gatos negros") is None
    assert label("Talvez exista outra pessoa ali") == "pt"
    assert label("we count the red balls") == "en"


@given(st.text(max_size=3000))
def test_sentences_cover_the_text_in_short_pieces(text):
    spans = list(sentences(text))
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(0 < end - start <= MAX_PIECE_CHARS for start, end in spans)


@given(st.text(alphabet='a$\\([])`"“”「」\n{}x 你', max_size=400), st.booleans())
def test_masking_keeps_the_length_and_only_blanks(text, quotes):
    blanked = masked(text, copied=prompt_spans("a x a x 你"), quotes=quotes)
    assert len(blanked) == len(text)
    assert all(after in (before, " ") for before, after in zip(text, blanked, strict=True))


@given(st.text(max_size=400), st.text(max_size=400))
def test_any_prompt_and_response_have_a_verdict(prompt, text):
    result = code_switching(example(prompt), rollout(text))
    assert result.value in (0.0, -1.0)
    assert 0.0 <= result.metrics["foreign_frac"] <= 1.0
    assert (result.value < 0.0) == bool(result.note)


@given(st.sampled_from(["en", "zh"]), st.randoms(use_true_random=False), st.integers(1, 8))
@settings(max_examples=30)
def test_more_foreign_sentences_are_never_cheaper(carrier, random, count):
    clean = HELD_OUT["carrier"][carrier]
    foreign = random.sample(HELD_OUT["planted"]["ru"], count)
    fewer = find_mixing(" ".join([*clean, *foreign[:-1]]), wanted=frozenset({carrier}))
    more = find_mixing(" ".join([*clean, *foreign]), wanted=frozenset({carrier}))
    assert more.foreign_words > fewer.foreign_words


def test_nothing_is_imported_before_the_first_verdict():
    program = "import sys; import vlpost.rewards.code_switching; print([m for m in ('py3langid', 'regex', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
