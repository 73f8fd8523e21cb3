import pytest

from flowcache.errors import UserError
from skyreels_v2.window import (
    cut_segments,
    cut_window,
    describe,
    latent_frames,
    pixel_frames,
)


@pytest.mark.parametrize(
    ("pixels", "latents"), [(1, 1), (5, 2), (97, 25), (121, 31), (177, 45), (257, 65), (1457, 365)]
)
def test_four_frames_make_a_latent_after_the_first(pixels: int, latents: int):
    assert latent_frames(pixels) == latents
    assert pixel_frames(latents) == pixels


@pytest.mark.parametrize(
    ("num_frames", "sizes"),
    [
        (97, [25]),
        (177, [25, 25]),
        (257, [25, 25, 25]),
        (377, [25, 25, 25, 25, 15]),
        (737, [25] * 9),
        (1457, [25] * 18),
        (101, [25, 6]),
    ],
)
def test_long_videos_are_cut_into_the_published_segments(num_frames: int, sizes: list[int]):
    segments = cut_segments(num_frames, base=97, overlap=17)
    assert [segment.num_frames for segment in segments] == sizes
    assert [segment.index for segment in segments] == list(range(len(sizes)))
    assert [segment.prefix_pixels for segment in segments] == [0] + [17] * (len(sizes) - 1)
    assert sum(segment.new_pixels for segment in segments) == num_frames


def test_every_length_is_made_exactly():
    for num_frames in range(1, 400, 4):
        for base, overlap in ((97, 17), (97, 37), (21, 5), (5, 1)):
            segments = cut_segments(num_frames, base=base, overlap=overlap)
            assert sum(segment.new_pixels for segment in segments) == num_frames
            assert all(segment.new_pixels > 0 for segment in segments)
            assert max(segment.num_frames for segment in segments) <= latent_frames(base)


def test_a_short_video_needs_no_overlap():
    (segment,) = cut_segments(97, base=97, overlap=None)
    assert (segment.num_frames, segment.prefix_pixels, segment.new_pixels) == (25, 0, 97)


@pytest.mark.parametrize(
    ("num_frames", "sizes"), [(97, [25]), (177, [25, 25]), (21, [6]), (101, [25, 6])]
)
def test_an_extended_video_starts_every_segment_with_known_frames(
    num_frames: int, sizes: list[int]
):
    segments = cut_segments(num_frames, base=97, overlap=17, continues_video=True)
    assert [segment.num_frames for segment in segments] == sizes
    assert {segment.prefix_pixels for segment in segments} == {17}
    assert sum(segment.new_pixels for segment in segments) == num_frames - 17


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 98}, "num_frames must be 4 n . 1, .* not 98; use 97 or 101"),
        ({"num_frames": 0}, "num_frames must be 4 n . 1, .* not 0; use 1 or 5"),
        ({"base": 96}, "base_num_frames must be 4 n . 1, .* not 96; use 93 or 97"),
        ({"overlap": 16}, "overlap_history must be 4 n . 1, .* not 16; use 13 or 17"),
        ({"overlap": None}, "give overlap_history, 17 or 37 frames are recommended"),
        ({"overlap": 97}, "overlap_history 97 must be below base_num_frames 97"),
        (
            {"num_frames": 17, "continues_video": True},
            "num_frames 17 counts the 17 frames of overlap_history, too",
        ),
    ],
)
def test_counts_that_dont_fit_are_named_in_one_line(settings: dict[str, object], message: str):
    arguments = {"num_frames": 177, "base": 97, "overlap": 17, **settings}
    num_frames = arguments.pop("num_frames")
    with pytest.raises(UserError, match=message) as error:
        cut_segments(num_frames, **arguments)
    assert "\n" not in str(error.value)


def test_a_window_is_cut_into_chunks_the_last_of_which_may_be_short():
    window = cut_window(12, chunk_frames=5)
    assert window.chunks == (range(5), range(5, 10), range(10, 12))
    assert (window.num_frames, window.num_prefix, window.num_given) == (12, 0, 0)
    assert window.generated == range(3)
    assert describe(window) == "3 chunks (2 of 5, 1 of 2 latent frames)"


def test_a_start_image_is_a_chunk_of_its_own_whatever_the_chunk_size():
    """Upstream drops the image at a block size above 1; here chunks are counted from its end."""
    window = cut_window(25, chunk_frames=5, num_prefix=1)
    assert window.chunks == (
        range(1),
        range(1, 6),
        range(6, 11),
        range(11, 16),
        range(16, 21),
        range(21, 25),
    )
    assert window.num_given == 1
    assert list(window.generated) == [1, 2, 3, 4, 5]


def test_a_prefix_longer_than_a_chunk_is_given_in_chunks():
    window = cut_window(12, chunk_frames=3, num_prefix=5)
    assert window.chunks == (range(3), range(3, 5), range(5, 8), range(8, 11), range(11, 12))
    assert window.num_given == 2


def test_an_end_image_is_the_last_frame_and_given_before_what_is_denoised():
    window = cut_window(12, chunk_frames=5, num_prefix=1, has_end=True)
    assert window.chunks == (range(1), range(12, 13), range(1, 6), range(6, 11), range(11, 12))
    assert (window.num_frames, window.num_prefix, window.num_given) == (13, 1, 2)
    assert list(window.generated) == [2, 3, 4]
