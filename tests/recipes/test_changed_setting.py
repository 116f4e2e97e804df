"""What differs between two recipes, and the words for it."""

from hypothesis import given
from hypothesis import strategies as st
from vlpost.recipes.changed_setting import ABSENT, first_change

nested = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)


def test_the_first_difference_is_named_with_the_keys_above_it():
    before = {"rl": {"num_steps": 3, "kl": None}, "seed": 0}
    change = first_change(before, {"rl": {"num_steps": 3, "kl": {"coef": 0.1}}, "seed": 1})
    assert change is not None
    assert str(change) == "rl.kl was None, is {'coef': 0.1}"
    assert str(first_change(before, {**before, "seed": 1})) == "seed was 0, is 1"
    assert first_change(before, {"seed": 0, "rl": {"kl": None, "num_steps": 3}}) is None


def test_a_key_that_one_of_them_lacks_differs_from_every_value():
    new = first_change({"validation": {}}, {"validation": {"pass_at": None}})
    assert new is not None
    assert new.before is ABSENT
    assert str(new) == "validation.pass_at was not there, is None"
    assert str(first_change({"validation": {"pass_at": None}}, {"validation": {}})) == "validation.pass_at was None, is not there"


@given(nested, nested)
def test_only_equal_settings_have_no_difference(one, other):
    assert (first_change(one, other) is None) == (one == other)
    assert (first_change(one, other) is None) == (first_change(other, one) is None)
