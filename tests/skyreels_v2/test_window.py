import pytest

from flowcache.errors import UserError
from skyreels_v2.window import (
    Segment,
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
    assert cut_segments(97, base=97, overlap=None) == [Segment(0, 25, 0)]


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


@pytest.mark.parametrize(
    ("num_frames", "options", "chunks", "num_given"),
    [
        (12, {"chunk_frames": 5}, "0-5 5-10 10-12", 0),
        # upstream drops the image at a block size above 1; here chunks are counted from its end
        (25, {"chunk_frames": 5, "num_prefix": 1}, "0-1 1-6 6-11 11-16 16-21 21-25", 1),
        (12, {"chunk_frames": 3, "num_prefix": 5}, "0-3 3-5 5-8 8-11 11-12", 2),
        (12, {"chunk_frames": 5, "num_prefix": 1, "has_end": True}, "0-1 12-13 1-6 6-11 11-12", 2),
    ],
    ids=["a short last one", "a start image", "a prefix in chunks", "an end image"],
)
def test_a_window_is_cut_into_chunks(
    num_frames: int, options: dict[str, int], chunks: str, num_given: int
):
    window = cut_window(num_frames, **options)
    assert " ".join(f"{chunk.start}-{chunk.stop}" for chunk in window.chunks) == chunks
    assert window.num_frames == num_frames + options.get("has_end", 0)
    assert (window.num_prefix, window.num_given) == (options.get("num_prefix", 0), num_given)
    assert window.generated == range(num_given, len(window.chunks))


def test_chunks_are_described_by_their_sizes():
    window = cut_window(12, chunk_frames=5)
    assert describe(window) == "3 chunks (2 of 5, 1 of 2 latent frames)"
