from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlpost.model.chat import ProcessedMedia
from vlpost.model.learner import FULL_DISTRIBUTION, batch_logprobs
from vlpost.model.packing import Weighted, pack, split_by_sequence, weigh
from vlpost.model.records import ImagePart, Message, TextPart, TrainSequence, VideoPart
from vlpost.model.vision import vision_pass

# A family is a prompt and its responses. Parts and responses name media by one capital letter; a medium in a response is what a tool
# returned, so its tokens are not trained.
CASES = {
    "text only": [(("What is 1 + 2?",), [(5, 6, 7), (8, 9), (10, 11, 12, 13)]), (("How many digits?",), [(20, 21)])],
    "one image": [(("A", "How many digits?"), [(5, 6, 7), (8, 9)])],
    "several images": [(("A", "and", "B", "and", "A", "数字?"), [(5, 6, 7), (8, 9)]), (("C",), [(30, 31)])],
    "video": [(("V", "What is the sum?"), [(5, 6), (8, 9, 10)])],
    "rows with and without images": [
        (("What is 1 + 2?",), [(5, 6), (7, 8)]),
        (("B", "sum"), [(5, 6), (7, 8)]),
        (("W", "then", "A"), [(5, 6), (7, 8)]),
        (("The sum",), [(9,)]),
    ],
    "ragged lengths, one token too": [(("A", "sum?"), [(5,), tuple(range(20, 60)), (6, 7), tuple(range(5, 20))])],
    "duplicate responses": [(("A", "sum?"), [(5, 6, 7), (5, 6, 7), (8, 9), (5, 6, 7)])],
    "responses that share first tokens": [(("A", "sum?"), [(5, 6, 7, 8), (5, 6, 7), (5, 6, 9), (5, 10), (5,)])],
    "two groups with one image": [(("A", "sum?"), [(5, 6), (7,)]), (("A", "How many?"), [(5, 6), (8, 9)])],
    "images inside the response": [(("A", "sum?"), [(5, 6, "B", 7, 8), (5, 6, "C", 7, 8), (5, 6, "B", 9), (10,)])],
}


@pytest.fixture(scope="module")
def media(make_image, make_video):
    return {
        "A": make_image(64, 64, seed=1),
        "B": make_image(96, 64, seed=2),
        "C": make_image(64, 64, seed=3),
        "V": make_video(4, 64, 64, seed=4),
        "W": make_video(3, 64, 96, seed=5),
    }


@pytest.fixture(scope="module")
def make_families(chat, media):
    def sequence(prompt, response):
        ids, trained, shown = list(prompt.token_ids), [False] * len(prompt.token_ids), list(prompt.media)
        for element in response:
            if isinstance(element, int):
                ids.append(element)
                trained.append(True)
                continue
            start, end = chat.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
            inserted = [start, *chat.processed(media[element]).placeholder_ids, end]
            ids += inserted
            trained += [False] * len(inserted)
            shown.append(media[element])
        return TrainSequence(place="row", token_ids=tuple(ids), trained=tuple(trained), media=tuple(shown), targets=None)

    def make(case):
        families = []
        for parts, responses in CASES[case]:
            message = Message(role="user", parts=tuple(media.get(part) or TextPart(text=part) for part in parts))
            prompt = chat.encode_prompt([message])
            families.append([sequence(prompt, response) for response in responses])
        return families

    return make


@pytest.fixture(scope="module")
def alone(hf_processor, chat):
    """Returns a function: log-probs of a sequence's trained tokens by transformers alone, one row, its own positions and vision inputs."""

    def run(model, sequence):
        ids = torch.tensor(sequence.token_ids)[None]
        images = [part.image for part in sequence.media if isinstance(part, ImagePart)]
        videos = [part for part in sequence.media if isinstance(part, VideoPart)]
        inputs = {}
        if images:
            inputs |= hf_processor.image_processor(images=images, return_tensors="pt")
        if videos:
            inputs |= hf_processor.video_processor(
                videos=[list(part.frames) for part in videos], do_sample_frames=False, return_tensors="pt"
            )
        kinds = torch.where(ids == chat.image_token_id, 1, torch.where(ids == chat.video_token_id, 2, 0))
        logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **inputs).logits[0]
        trained = torch.tensor(sequence.trained)
        return logits[:-1][trained[1:]].log_softmax(dim=-1).gather(-1, ids[0, trained][:, None])[:, 0]

    return run


@pytest.fixture(scope="module", params=CASES)
def case(request, make_families, make_plain_model, alone):
    """A case with the log-probs and gradients of transformers, one sequence at a time; loss = - sum of weight x log-prob."""
    weighted = weigh(make_families(request.param), "sequence")
    model = make_plain_model()
    logprobs = {}
    for member in [member for family in weighted for member in family]:
        values = alone(model, member.sequence)
        (-member.token_weight * values.sum()).backward()
        logprobs[id(member.sequence)] = values.detach()
    return SimpleNamespace(name=request.param, weighted=weighted, logprobs=logprobs, gradients=gradients_of(model))


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def forward(model, batch):
    return batch_logprobs(model, batch, FULL_DISTRIBUTION, vision=vision_pass(model.model, batch.vision, must_run=False))


def run_packed(model, batches):
    """Adds the gradients of the batches and returns the log-probs by sequence."""
    logprobs = {}
    model.train()
    for batch in batches:
        outputs = forward(model, batch)
        (batch.token_weights * -outputs.logprobs).sum().backward()
        for sequence, values in zip(batch.sequences, split_by_sequence(batch, outputs.logprobs.detach()), strict=True):
            logprobs[id(sequence)] = values
    return logprobs


def assert_same_gradients(found, expected, *, tolerance):
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * total, name
        assert (found[name] - gradient).norm() <= 10 * tolerance * gradient.norm() + 1e-9, name


def num_distinct_prefixes(family, media_source):
    prefixes = set()
    for sequence in family:
        unused = iter([(part, count) for part in sequence.media for count in [num_pads(media_source.processed(part), media_source)]])
        chain, part, left = (), None, 0
        for token in sequence.token_ids:
            if token in (media_source.image_token_id, media_source.video_token_id):
                if left == 0:
                    part, left = next(unused)
                left -= 1
                chain = (*chain, (token, part.digest))
            else:
                chain = (*chain, token)
            prefixes.add(chain)
    return len(prefixes)


def num_pads(processed, media_source):
    return sum(token in (media_source.image_token_id, media_source.video_token_id) for token in processed.placeholder_ids)


# ---------------------------------------------------------------- against transformers, one sequence at a time


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_one_by_one(case, checkpointing, chat, make_model):
    batches = pack(case.weighted, media=chat, token_budget=4096)
    assert len(batches) == 1
    assert len(batches[0].token_ids) == sum(num_distinct_prefixes([member.sequence for member in family], chat) for family in case.weighted)
    model = make_model()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer_calls = []
    model.model.language_model.layers[1].mlp.register_forward_pre_hook(lambda *_: layer_calls.append(1))

    logprobs = run_packed(model, batches)

    assert len(layer_calls) == (2 if checkpointing else 1)
    assert logprobs.keys() == case.logprobs.keys()
    for key, expected in case.logprobs.items():
        torch.testing.assert_close(logprobs[key], expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients_of(model), case.gradients, tolerance=1e-5)


def test_vision_parameters_have_a_gradient_only_if_the_batch_holds_images(case):
    of_vision = [name for name in case.gradients if "visual." in name]
    assert bool(of_vision) == (case.name != "text only")


# ---------------------------------------------------------------- how a step is cut


def test_the_gradient_does_not_depend_on_the_token_budget(make_families, chat, make_model):
    weighted = weigh(make_families("rows with and without images") + make_families("responses that share first tokens"), "sqrt")
    longest = max(len(member.sequence.token_ids) for family in weighted for member in family)
    expected, cuts = None, set()
    for budget in (4096, 120, longest):
        model = make_model()
        batches = pack(weighted, media=chat, token_budget=budget)
        cuts.add(len(batches))
        run_packed(model, batches)
        expected = expected or gradients_of(model)
        assert_same_gradients(gradients_of(model), expected, tolerance=1e-6)
    assert len(cuts) == 3
    assert min(cuts) == 1


def test_a_split_family_keeps_the_gradient_and_counts_what_it_computes_again(make_families, chat, make_model):
    weighted = weigh(make_families("ragged lengths, one token too"), "token")
    longest = max(len(member.sequence.token_ids) for member in weighted[0])
    prompt_tokens = len(weighted[0][0].sequence.token_ids) - 1
    whole, parts = (pack(weighted, media=chat, token_budget=budget) for budget in (4096, longest))
    assert (len(whole), len(parts)) == (1, 3)
    assert whole[0].num_recomputed_tokens == 0
    # Each later part computes the prompt again; the last one also token 5, which is the whole first response.
    assert sum(batch.num_recomputed_tokens for batch in parts) == 2 * prompt_tokens + 1
    assert sum(len(batch.token_ids) for batch in parts) - (2 * prompt_tokens + 1) == len(whole[0].token_ids)

    models = make_model(), make_model()
    run_packed(models[0], whole)
    run_packed(models[1], parts)
    assert_same_gradients(gradients_of(models[1]), gradients_of(models[0]), tolerance=1e-6)


def test_a_sequence_over_the_budget_is_refused(make_families, chat):
    weighted = weigh(make_families("one image"), "token")
    longest = max(len(member.sequence.token_ids) for member in weighted[0])
    with pytest.raises(
        ValueError, match=rf"a sequence of {longest} tokens exceeds the token budget of {longest - 1}: raise learner.token_budget"
    ):
        pack(weighted, media=chat, token_budget=longest - 1)
    assert pack(weighted, media=chat, token_budget=longest)


# ---------------------------------------------------------------- token weights


def plain_sequence(num_prompt, num_trained, first=1):
    ids = tuple(range(first, first + num_prompt + num_trained))
    return TrainSequence(place="row", token_ids=ids, trained=(False,) * num_prompt + (True,) * num_trained, media=(), targets=None)


@pytest.mark.parametrize("weighting", ["token", "sqrt", "sequence"])
@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=4).filter(lambda lengths: any(map(any, lengths)))
)
@settings(max_examples=30)
def test_weights_of_a_step_sum_to_one_and_follow_internvl(weighting, lengths):
    families = weigh([[plain_sequence(2, length) for length in family] for family in lengths], weighting)
    members = [member for family in families for member in family]
    assert [[member.sequence.num_trained_tokens for member in family] for family in families] == lengths
    assert sum(member.token_weight * member.sequence.num_trained_tokens for member in members) == pytest.approx(1.0, abs=1e-12)
    # InternVL2.5 (arXiv:2412.05271, eq. 3): the weight of token i is w_i / sum_j w_j over all tokens, w = 1 / x^0, 1 / x^0.5 or 1 / x^1.
    power = {"token": 0.0, "sqrt": 0.5, "sequence": 1.0}[weighting]
    per_token = [1 / length**power for family in lengths for length in family for _ in range(length)]
    found = [member.token_weight for member in members for _ in range(member.sequence.num_trained_tokens)]
    assert found == pytest.approx([weight / sum(per_token) for weight in per_token])


def test_weights_written_out():
    def weights(weighting):
        return [member.token_weight for member in weigh([[plain_sequence(1, 1), plain_sequence(1, 4)]], weighting)[0]]

    assert weights("token") == pytest.approx([1 / 5, 1 / 5])
    assert weights("sqrt") == pytest.approx([1 / 3, 1 / 6])
    assert weights("sequence") == pytest.approx([1 / 2, 1 / 8])


def test_a_family_that_is_one_row_weighs_as_one():
    family, alone = [plain_sequence(1, 3), plain_sequence(1, 6)], [plain_sequence(1, 9)]
    for weighting in ("token", "sqrt", "sequence"):
        of_family, of_alone = weigh([family, alone], weighting, unit="family")
        assert {member.token_weight for member in of_family} == {of_alone[0].token_weight}
        assert sum(m.token_weight * m.sequence.num_trained_tokens for m in (*of_family, *of_alone)) == pytest.approx(1.0)


# ---------------------------------------------------------------- the tree, without a model


class FakeMedia:
    """An image of w x 1 pixels is w placeholder tokens."""

    image_token_id = 100
    video_token_id = 101

    def processed(self, part):
        width = part.image.width
        return ProcessedMedia(pixel_values=torch.zeros(4 * width, 3), grid=(1, 2, 2 * width), placeholder_ids=(100,) * width)

    def positions(self, token_ids, media):
        return torch.arange(len(token_ids)).expand(3, -1)


IMAGES = tuple(ImagePart.from_image(Image.new("RGB", (width, 1), color)) for width, color in ((1, "red"), (2, "red"), (2, "blue")))


@st.composite
def sequences(draw):
    # Three token ids, so that prefixes are often shared; now and then an image.
    pieces = draw(st.lists(st.one_of(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from(IMAGES)), max_size=7))
    ids, media = [draw(st.integers(1, 2))], []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else [100] * piece.image.width
        media += [] if isinstance(piece, int) else [piece]
    trained = [False, *(token != 100 and draw(st.booleans()) for token in ids[1:])]
    return TrainSequence(place="row", token_ids=tuple(ids), trained=tuple(trained), media=tuple(media), targets=None)


step = st.lists(st.lists(sequences(), min_size=1, max_size=6), min_size=1, max_size=5)


def chain(batch, index):
    """Returns the token ids from the root to token `index`, along the segments' parents."""
    number = next(number for number, segment in enumerate(batch.segments) if segment.start <= index < segment.end)
    ids = batch.token_ids[batch.segments[number].start : index + 1].tolist()
    while (number := batch.segments[number].parent) >= 0:
        ids = batch.token_ids[batch.segments[number].start : batch.segments[number].end].tolist() + ids
    return tuple(ids)


@given(step, st.integers(15, 40))
@settings(max_examples=60)
def test_packing_of_random_trees(families, budget):
    weighted = [[Weighted(sequence=sequence, token_weight=0.01 * (i + 1)) for sequence in family] for i, family in enumerate(families)]
    given_ids = {id(member.sequence): member for family in weighted for member in family}
    batches = pack(weighted, media=FakeMedia(), token_budget=budget)

    packed = [id(sequence) for batch in batches for sequence in batch.sequences]
    assert sorted(packed) == sorted(given_ids)
    distinct = sum(num_distinct_prefixes(family, FakeMedia()) for family in families)
    assert sum(len(batch.token_ids) - batch.num_recomputed_tokens for batch in batches) == distinct
    for batch in batches:
        assert len(batch.token_ids) <= budget
        assert [segment.start for segment in batch.segments] == [0, *(segment.end for segment in batch.segments[:-1])]
        assert batch.segments[-1].end == len(batch.token_ids) == batch.positions.shape[1]
        assert all(segment.parent < number for number, segment in enumerate(batch.segments))
        ends = list(accumulate(sequence.num_trained_tokens for sequence in batch.sequences))
        for number, (sequence, end) in enumerate(zip(batch.sequences, ends, strict=True)):
            targets = [index for index, is_target in enumerate(sequence.trained) if is_target]
            rows = slice(end - len(targets), end)
            assert batch.sequence_ids[rows].tolist() == [number] * len(targets)
            assert batch.target_ids[rows].tolist() == [sequence.token_ids[index] for index in targets]
            assert batch.token_weights[rows].tolist() == pytest.approx([given_ids[id(sequence)].token_weight] * len(targets))
            for index, hidden_index in zip(targets, batch.hidden_index[rows].tolist(), strict=True):
                assert chain(batch, hidden_index) == sequence.token_ids[:index]
                assert batch.positions[0, hidden_index] == index - 1
        assert ends[-1] == len(batch.target_ids)


@given(step)
@settings(max_examples=40)
def test_every_distinct_prefix_stands_once(families):
    batches = pack(
        [[Weighted(sequence=s, token_weight=1.0) for s in family] for family in families], media=FakeMedia(), token_budget=10_000
    )
    assert len(batches) == 1
    assert len(batches[0].token_ids) == sum(num_distinct_prefixes(family, FakeMedia()) for family in families)
    assert batches[0].num_recomputed_tokens == 0


def test_the_example_of_the_docstring():
    family = [
        TrainSequence(place="row", token_ids=(7, 8, 3, last), trained=(False, False, True, True), media=(), targets=None) for last in (2, 4)
    ]
    (batch,) = pack(weigh([family], "token"), media=FakeMedia(), token_budget=64)
    assert batch.token_ids.tolist() == [7, 8, 3, 2, 4]
    assert [(segment.start, segment.end, segment.parent) for segment in batch.segments] == [(0, 3, -1), (3, 4, 0), (4, 5, 0)]
    assert batch.target_ids.tolist() == [3, 2, 3, 4]
    assert batch.hidden_index.tolist() == [1, 2, 1, 2]
    assert batch.token_weights.tolist() == [0.25] * 4
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1]
    assert batch.per_token(lambda sequence: [float(sequence.token_ids[-1])] * 2).tolist() == [2.0, 2.0, 4.0, 4.0]


def test_best_fit_fills_the_fullest_batch_that_has_room():
    families = [[plain_sequence(length - 1, 1, first=10 * length)] for length in (3, 4, 6, 5)]
    batches = pack(weigh(families, "token"), media=FakeMedia(), token_budget=9)
    assert [[len(sequence.token_ids) for sequence in batch.sequences] for batch in batches] == [[6, 3], [5, 4]]


def test_families_do_not_share_tokens_with_each_other():
    (batch,) = pack(weigh([[plain_sequence(2, 1)], [plain_sequence(2, 1)]], "token"), media=FakeMedia(), token_budget=9)
    assert batch.token_ids.tolist() == [1, 2, 3, 1, 2, 3]
    assert [segment.parent for segment in batch.segments] == [-1, -1]


# ---------------------------------------------------------------- vision inputs


def test_each_distinct_image_goes_through_the_tower_once(make_families, make_model, chat, media):
    weighted = weigh(make_families("several images") + make_families("two groups with one image"), "token")
    (batch,) = pack(weighted, media=chat, token_budget=4096)  # longest family first: A B A, then A, A, C
    patches = [chat.processed(media[name]).pixel_values for name in "ABC"]
    assert batch.vision is not None
    assert batch.vision.image_order == (0, 1, 0, 0, 0, 2)
    assert batch.vision.grid_thw.tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 4]]
    assert torch.equal(batch.vision.pixel_values, torch.cat(patches))

    model = make_model()
    tower_inputs = []
    model.model.visual.register_forward_pre_hook(lambda module, inputs: tower_inputs.append(inputs[0].shape[0]))
    forward(model, batch)
    assert tower_inputs == [sum(len(pixels) for pixels in patches)]


def test_a_text_batch_holds_no_vision_input(make_families, chat):
    (batch,) = pack(weigh(make_families("text only"), "token"), media=chat, token_budget=4096)
    assert batch.vision is None


def test_images_are_told_apart_by_their_pixels(make_image, chat):
    def sequence(part, token):
        ids = (*chat.processed(part).placeholder_ids, token)
        return TrainSequence(place="row", token_ids=(1, *ids), trained=(False,) * len(ids) + (True,), media=(part,), targets=None)

    def packed(*family):
        return pack(weigh([family], "token"), media=chat, token_budget=64)[0]

    same = packed(sequence(make_image(seed=7), 5), sequence(make_image(seed=7), 6))
    assert len(same.token_ids) == 1 + 4 + 2
    assert same.vision.image_order == (0,)
    other = packed(sequence(make_image(seed=7), 5), sequence(make_image(seed=8), 5))
    assert len(other.token_ids) == 1 + 2 * (4 + 1)
    assert other.vision.image_order == (0, 1)


@pytest.mark.parametrize(
    ("ids", "num_images", "words"),
    [
        ((1, 100, 2), 0, "a sequence holds more placeholders than its 0 images and videos need"),
        ((1, 100, 100, 100, 2), 1, "a sequence holds more placeholders than its 1 images and videos need"),
        ((1, 100, 2), 1, "a sequence holds fewer placeholders than its 1 images and videos need"),
        ((1, 2), 1, "a sequence holds fewer placeholders than its 1 images and videos need"),
    ],
)
def test_placeholders_and_media_must_match(ids, num_images, words):
    trained = (False,) * (len(ids) - 1) + (True,)
    sequence = TrainSequence(place="row", token_ids=ids, trained=trained, media=(IMAGES[1],) * num_images, targets=None)
    with pytest.raises(ValueError, match=words):
        pack(weigh([[sequence]], "token"), media=FakeMedia(), token_budget=64)
