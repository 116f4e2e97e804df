import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen3VLForConditionalGeneration
from vlpost.model.positions import mrope_positions

TEXT, IMAGE, VIDEO = 5, 1000, 1001
MERGE = 2


@pytest.fixture(scope="module")
def rope_index(nano_folder):
    """Returns transformers' own function for one sequence: (token_ids, image_grids, video_grids) -> positions [3, T]."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(nano_folder))

    def run(token_ids, image_grids, video_grids):
        ids = torch.tensor(token_ids)[None]
        positions, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=torch.where(ids == IMAGE, 1, torch.where(ids == VIDEO, 2, 0)),
            image_grid_thw=torch.tensor(image_grids) if image_grids else None,
            video_grid_thw=torch.tensor(video_grids) if video_grids else None,
        )
        return positions[:, 0]

    return run


def ours(token_ids, image_grids, video_grids):
    return mrope_positions(
        token_ids, image_grids=image_grids, video_grids=video_grids, image_token_id=IMAGE, video_token_id=VIDEO, merge_size=MERGE
    )


text = st.integers(1, 6).map(lambda length: ("text", length))
side = st.integers(1, 5).map(lambda merged: MERGE * merged)
image = st.tuples(st.just("image"), side, side)
video = st.tuples(st.just("video"), st.integers(1, 4), side, side)


def write(pieces):
    """Returns token ids and grids as Qwen3-VL's processor writes the pieces: a start and an end token around each run of placeholders."""
    ids, image_grids, video_grids = [], [], []
    for kind, *numbers in pieces:
        if kind == "text":
            ids += [TEXT] * numbers[0]
            continue
        t, h, w = (1, *numbers) if kind == "image" else numbers
        for _ in range(t):
            ids += [TEXT, *[IMAGE if kind == "image" else VIDEO] * (h * w // MERGE**2), TEXT]
        (image_grids if kind == "image" else video_grids).append((t, h, w))
    return ids, image_grids, video_grids


@given(st.lists(st.one_of(text, image, video), min_size=1, max_size=6))
@settings(max_examples=120)
def test_equal_to_transformers(rope_index, pieces):
    written = write(pieces)
    positions = ours(*written)
    assert positions.dtype == torch.int64
    assert positions.shape == (3, len(written[0]))
    assert torch.equal(positions, rope_index(*written))


def test_text_counts_up_in_all_rows():
    assert ours([TEXT] * 4, [], []).tolist() == [[0, 1, 2, 3]] * 3


def test_an_image_written_out():
    # Two tokens of text, an image of 2 x 3 merged tokens, one token of text.
    positions = ours([TEXT, TEXT, *[IMAGE] * 6, TEXT], [(1, 4, 6)], [])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


def test_a_video_is_one_block_a_temporal_patch():
    positions = ours([TEXT, VIDEO, VIDEO, TEXT, VIDEO, VIDEO], [], [(2, 2, 4)])
    assert positions.tolist() == [[0, 1, 1, 3, 4, 4], [0, 1, 1, 3, 4, 4], [0, 1, 2, 3, 4, 5]]


def test_neighbouring_images_without_text_between_them():
    assert ours([IMAGE, IMAGE, IMAGE], [(1, 2, 2), (1, 2, 4)], []).tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("token_ids", "image_grids", "video_grids", "words"),
    [
        ([TEXT, IMAGE], [], [], "placeholder at token 1 has no image or video: more placeholders than media"),
        ([TEXT, VIDEO, TEXT, VIDEO], [], [(1, 2, 2)], "placeholder at token 3 has no image or video"),
        ([IMAGE, IMAGE, TEXT], [(1, 2, 2)], [], "placeholder at token 1 has no image"),
        ([IMAGE, IMAGE, TEXT], [(1, 2, 6)], [], "placeholders from token 0: 2 in the sequence, 3 by the image grids"),
        ([VIDEO], [(1, 2, 2)], [], "placeholder at token 0 has no image or video"),
        ([TEXT], [(1, 2, 2)], [], "more images or video frames than placeholders"),
        ([TEXT, VIDEO, TEXT], [], [(2, 2, 2)], "more images or video frames than placeholders"),
    ],
)
def test_counts_that_do_not_agree_are_refused(token_ids, image_grids, video_grids, words):
    with pytest.raises(ValueError, match=words):
        ours(token_ids, image_grids, video_grids)
