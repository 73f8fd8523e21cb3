import importlib
import logging
import os
import signal
import subprocess
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from flowcache.errors import UserError
from flowcache.runtime.ending import Ending, Stopped
from flowcache.runtime.video import (
    BACKGROUND,
    Pixels,
    Probe,
    Timed,
    VideoWriter,
    at_rate,
    check_ffmpeg,
    image_size,
    probe,
    read_image,
    read_video,
    stream_video,
    to_uint8,
)

HEIGHT, WIDTH = 48, 64


def smooth_clip(num_frames: int) -> Pixels:
    """Make a clip that H.264 keeps well: a gradient whose colours drift."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    frames = [
        np.stack([rows * 4, columns * 3, np.full_like(rows, 40 + 4 * t)], axis=-1)
        for t in range(num_frames)
    ]
    return np.stack(frames).astype(np.uint8)


def write(path: Path, frames: Pixels, **options: Any) -> Path:
    with VideoWriter(path, fps=24, size=(HEIGHT, WIDTH), **options) as writer:
        writer.append(frames[:2])
        writer.append(torch.from_numpy(frames[2:]))
    return writer.path


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_written_video_has_its_frames_rate_size_and_colours(tmp_path: Path):
    frames = smooth_clip(25)
    path = write(tmp_path / "new folder" / "ü clip.mp4", frames)
    assert probe(path) == Probe(num_frames=25, fps=24.0, height=HEIGHT, width=WIDTH)
    read, fps = read_video(path)
    assert fps == 24.0
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 2
    assert files(path.parent) == ["ü clip.mp4"]


def test_primary_colours_survive_the_codec(tmp_path: Path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    frames = np.zeros((5, HEIGHT, WIDTH, 3), np.uint8)
    for frame, colour in zip(frames, colours, strict=True):
        frame[:] = colour
    read, _ = read_video(write(tmp_path / "a.mp4", frames))
    assert np.abs(read.astype(int) - frames).max() <= 4


@pytest.mark.parametrize(
    ("error", "num_frames", "keeps_partial"),
    [
        (KeyboardInterrupt(), 9, True),
        (RuntimeError("out of memory"), 9, True),
        (Stopped(signal.SIGTERM, "interrupted"), 2, True),
        (KeyboardInterrupt(), 0, True),  # before the first frame
        (KeyboardInterrupt(), 2, False),  # a video that is made again
    ],
)
def test_an_interrupted_video_keeps_its_frames_under_another_name(
    tmp_path: Path,
    error: BaseException,
    num_frames: int,
    keeps_partial: bool,
    caplog: pytest.LogCaptureFixture,
):
    path = tmp_path / "clip.mp4"
    writer = VideoWriter(path, fps=24, size=(HEIGHT, WIDTH), keeps_partial=keeps_partial)
    with pytest.raises(type(error)), caplog.at_level(logging.WARNING), writer:
        writer.append(smooth_clip(num_frames) if num_frames else smooth_clip(1)[:0])
        raise error
    partial = tmp_path / "clip.partial.mp4"
    is_kept = num_frames > 0 and keeps_partial
    assert writer.partial_path == (partial if is_kept else None)
    assert files(tmp_path) == (["clip.partial.mp4"] if is_kept else [])
    if is_kept:
        said = str(error) if isinstance(error, Stopped) else caplog.text
        assert f"kept the first {num_frames} frames in {partial}" in said
        assert probe(partial).num_frames == num_frames


def test_what_killed_processes_left_of_that_name_goes_after_a_day(tmp_path: Path):
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    running, gone = os.getppid(), ended.pid
    old = [f".clip.{running}.part.mp4", f".clip.{gone}.part.mp4", f".clip.b.{gone}.part.mp4"]
    for name in [*old, f".other.{gone}.part.mp4", ".clip.x.part.mp4"]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    for number in (gone, running):  # what was just written may be another machine's
        (tmp_path / f".new.{number}.part.mp4").touch()
    before = files(tmp_path)
    for name in ("clip", "new"):
        with VideoWriter(tmp_path / f"{name}.mp4", fps=24, size=(HEIGHT, WIDTH)) as writer:
            writer.append(smooth_clip(1))
    kept = [name for name in before if name != f".clip.{gone}.part.mp4"]
    assert files(tmp_path) == sorted([*kept, "clip.mp4", "new.mp4"])


def test_a_second_interruption_does_not_replace_the_first_partial_video(tmp_path: Path):
    for num_frames in (4, 6):
        with (
            pytest.raises(KeyboardInterrupt),
            VideoWriter(tmp_path / "clip.mp4", fps=24, size=(HEIGHT, WIDTH)) as writer,
        ):
            writer.append(smooth_clip(num_frames))
            raise KeyboardInterrupt
    assert probe(tmp_path / "clip.partial.mp4").num_frames == 4
    assert probe(tmp_path / "clip.partial-001.mp4").num_frames == 6


def test_a_signal_while_frames_are_encoded_loses_none_of_them(tmp_path: Path):
    with (
        pytest.raises(Stopped, match="kept the first 6 frames"),
        Ending(),
        VideoWriter(tmp_path / "clip.mp4", fps=24, size=(HEIGHT, WIDTH)) as writer,
    ):
        encoder = writer._encoder
        clip = smooth_clip(6)

        class Signalled:
            """Passes frames on; the third one meets a signal."""

            def send(self, frame: Any) -> None:
                if frame is not None and np.array_equal(frame, clip[2]):
                    os.kill(os.getpid(), signal.SIGTERM)
                encoder.send(frame)

            def close(self) -> None:
                encoder.close()

        writer._encoder = cast(Any, Signalled())
        writer.append(clip)
        pytest.fail("the signal was lost")
    assert probe(tmp_path / "clip.partial.mp4").num_frames == 6


def test_a_video_can_be_published_after_what_lies_next_to_it(tmp_path: Path):
    writer = VideoWriter(tmp_path / "clip.mp4", fps=24, size=(HEIGHT, WIDTH), publishes=False)
    with Ending() as ending:
        with writer:
            writer.append(smooth_clip(3))
        assert files(tmp_path) == [f".clip.{os.getpid()}.part.mp4"]
        assert len(ending.unfinished) == 1
        writer.publish()
        assert not ending.unfinished
    assert files(tmp_path) == ["clip.mp4"]


def test_a_video_that_is_never_published_is_kept_as_a_partial_one(tmp_path: Path):
    with pytest.raises(ValueError, match="no room for the JSON"), Ending():
        with VideoWriter(
            tmp_path / "clip.mp4", fps=24, size=(HEIGHT, WIDTH), publishes=False
        ) as writer:
            writer.append(smooth_clip(3))
        raise ValueError("no room for the JSON")
    assert files(tmp_path) == ["clip.partial.mp4"]


def test_an_existing_file_is_kept_unless_overwriting_is_allowed(tmp_path: Path):
    path = write(tmp_path / "clip.mp4", smooth_clip(3))
    with pytest.raises(UserError, match=r"clip\.mp4 exists"):
        write(path, smooth_clip(5))
    assert probe(path).num_frames == 3
    write(path, smooth_clip(5), overwrite=True)
    assert probe(path).num_frames == 5


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path):
    with VideoWriter(tmp_path / "clip.mp4", fps=24, size=(HEIGHT, WIDTH)) as writer:
        writer.append(smooth_clip(3))
        assert not (tmp_path / "clip.mp4").exists()
        (tmp_path / "clip.mp4").write_text("from another run")
    assert writer.path == tmp_path / "clip-001.mp4"
    assert (tmp_path / "clip.mp4").read_text() == "from another run"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.mp4", {"size": (47, 64)}, "must be even .* got 47 x 64"),
        ("a.mp4", {"size": (0, 64)}, "must be even .* got 0 x 64"),
        ("a.mp4", {"fps": 0}, "fps must be above 0, got 0"),
        ("a.mp4", {"fps": float("nan")}, "fps must be above 0, got nan"),
        ("a.avi", {}, "written as .mp4, not .avi"),
        ("a" * 250 + ".mp4", {}, "at most 240 bytes"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_frame(
    tmp_path: Path, name: str, options: dict[str, Any], said: str
):
    settings: dict[str, Any] = {"fps": 24, "size": (HEIGHT, WIDTH), **options}
    with pytest.raises(UserError, match=said):
        VideoWriter(tmp_path / name, **settings)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        np.zeros((1, WIDTH, HEIGHT, 3), np.uint8),
    ],
)
def test_frames_of_another_kind_are_refused(tmp_path: Path, frames: Any):
    with (
        pytest.raises(ValueError, match=r"must be uint8 \[T, 48, 64, 3\]"),
        VideoWriter(tmp_path / "a.mp4", fps=24, size=(HEIGHT, WIDTH)) as writer,
    ):
        writer.append(frames)


def test_a_video_without_frames_is_an_error(tmp_path: Path):
    with (
        pytest.raises(UserError, match="no frame was written"),
        VideoWriter(tmp_path / "a.mp4", fps=24, size=(HEIGHT, WIDTH)),
    ):
        pass


def test_reading_can_stop_early_and_scale(tmp_path: Path):
    frames = smooth_clip(12)
    path = write(tmp_path / "a.mp4", frames)
    read, _ = read_video(path, max_frames=5, size=(24, 32))
    assert read.shape == (5, 24, 32, 3)
    assert np.abs(read.mean(axis=(1, 2)) - frames[:5].mean(axis=(1, 2))).max() < 2


def test_what_is_not_a_video_is_named_in_one_line(tmp_path: Path):
    video = write(tmp_path / "whole.mp4", smooth_clip(8)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(video[: len(video) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("a story\n" * 50)
    (tmp_path / "notes.txt").write_text("a story\n" * 50)  # ffmpeg would draw it as a video
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    expected = {
        "cut.mp4": "not a video",
        "empty.mp4": "the file is empty",
        "text.mp4": "not a video",
        "notes.txt": "not a video",
        "image.png": "not a video",
        "missing.mp4": "no such file",
        ".": "a folder",
    }
    for name, said in expected.items():
        for read in (read_video, probe):
            with pytest.raises(UserError) as caught:
                read(tmp_path / name)
            assert str(caught.value).startswith(f"{tmp_path / name}: {said}")
            assert "\n" not in str(caught.value)


def test_another_rate_takes_the_frames_that_ffmpeg_would():
    def places(num_frames: int, *, fps: int, target: int) -> list[int]:
        frames = [Timed(n, Fraction(n, fps), Fraction(n + 1, fps)) for n in range(num_frames)]
        return list(at_rate(frames, target))

    assert places(10, fps=24, target=24) == list(range(10))
    # from ffmpeg -vf fps=24 on a counted video of 30 frames per second
    assert places(10, fps=30, target=24) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert places(4, fps=12, target=24) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert places(1, fps=60, target=24) == [0]
    assert places(0, fps=60, target=24) == []


@pytest.fixture(scope="module")
def ffmpeg() -> Callable[..., Path]:
    """Return a function that has ffmpeg write a file, and returns the file."""

    def write(*arguments: str | Path) -> Path:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        quiet = ["-y", "-loglevel", "error"]
        subprocess.run([program, *quiet, *map(str, arguments)], check=True, timeout=60)
        return Path(arguments[-1])

    return write


EXACT = ("-c:v", "libx264rgb", "-crf", "0")
"""Every frame with its pixels as they are."""


def source(**options: int) -> list[str]:
    """A test picture that counts its frames."""
    return ["-f", "lavfi", "-i", f"testsrc={':'.join(f'{k}={v}' for k, v in options.items())}"]


def test_a_variable_rate_is_brought_to_another_as_by_the_filter_of_ffmpeg(
    tmp_path: Path, ffmpeg: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    # a second at 30, then three at 10 frames per second
    dropped = "select='lt(t,1)+gte(t,1)*not(mod(n,3))'"
    options = ("-vf", f"scale=64:64,{dropped}", "-fps_mode", "vfr", *EXACT)
    variable = ffmpeg(*source(rate=30, duration=4), *options, tmp_path / "variable.mp4")
    for fps in (24, 8, 50):
        constant = ffmpeg("-i", variable, "-vf", f"fps={fps}", *EXACT, tmp_path / "constant.mp4")
        expected, _ = read_video(constant)
        with caplog.at_level(logging.INFO):
            frames, rate = read_video(variable, fps=fps)
        assert rate == fps
        assert np.array_equal(frames, expected)
        assert caplog.messages.pop() == f"{variable}: 15.2542 frames per second are read as {fps}"


def test_of_several_video_streams_the_default_one_is_read_and_probed(
    tmp_path: Path, ffmpeg: Callable[..., Path]
):
    preview, film = source(rate=5, duration=1), source(rate=24, duration=3)
    made = ("-filter_complex", "[0]scale=32:32,setsar=1[a];[1]scale=96:64,setsar=1[b]")
    made += ("-map", "[a]", "-map", "[b]")
    for order, expected in (
        (("-disposition:v:0", "0", "-disposition:v:1", "default"), Probe(72, 24, 64, 96)),
        (("-disposition:v:0", "default", "-disposition:v:1", "0"), Probe(5, 5, 32, 32)),
        (("-disposition:v:0", "0", "-disposition:v:1", "0"), Probe(72, 24, 64, 96)),
    ):
        path = ffmpeg(*preview, *film, *made, *EXACT, *order, tmp_path / "two.mkv")
        frames, fps = read_video(path)
        assert probe(path) == Probe(len(frames), fps, *frames.shape[1:3]) == expected
        assert len(list(stream_video(path)[1])) == expected.num_frames


@pytest.mark.parametrize(("angle", "turns"), [(0, 0), (90, 1), (180, 2), (270, 3), (-90, 3)])
def test_a_turned_phone_s_video_is_upright(
    tmp_path: Path, ffmpeg: Callable[..., Path], angle: int, turns: int
):
    plain = ffmpeg(*source(rate=5, duration=1), "-vf", "scale=48:32", *EXACT, tmp_path / "a.mp4")
    turned = ffmpeg(
        *("-display_rotation", str(angle), "-i", plain, "-c", "copy", tmp_path / "b.mp4")
    )
    frames = read_video(turned)[0]
    assert np.array_equal(frames, np.rot90(read_video(plain)[0], turns, axes=(1, 2)))
    found = probe(turned)
    assert (found.height, found.width) == frames.shape[1:3]


def test_pixels_that_are_not_square_are_read_as_they_are_shown(
    tmp_path: Path, ffmpeg: Callable[..., Path]
):
    clip = source(rate=5, duration=1)
    wide = ffmpeg(*clip, "-vf", "scale=48:32,setsar=2/1", *EXACT, tmp_path / "wide.mp4")
    high = ffmpeg(*clip, "-vf", "scale=48:32,setsar=1/2", *EXACT, tmp_path / "high.mp4")
    plain = ffmpeg(*clip, "-vf", "scale=48:32,setsar=1/1", *EXACT, tmp_path / "plain.mp4")
    for path, width in ((wide, 96), (high, 24), (plain, 48)):
        frames = read_video(path)[0]
        assert frames.shape == (5, 32, width, 3)
        assert probe(path) == Probe(5, 5, 32, width)
    # every second column of the doubled picture is about the stored one
    off = np.abs(read_video(wide)[0][:, :, ::2].astype(float) - read_video(plain)[0])
    assert off.mean() < 12
    assert ffmpeg(*clip, "-vf", "scale=48:32,setsar=9/1", *EXACT, tmp_path / "odd.mp4").exists()
    with pytest.raises(UserError, match=r"its pixels are 9 times as wide as high, but must be 1/8"):
        probe(tmp_path / "odd.mp4")


def test_transparent_frames_are_put_over_white(tmp_path: Path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[2:6, 2:6] = (255, 0, 0, 255)
    frames = [Image.fromarray(np.roll(pixels, shift, axis=0)) for shift in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], disposal=2)
    read = read_video(tmp_path / "a.gif")[0]
    assert read.shape == (3, 8, 8, 3)
    assert read[:, 0, 0].tolist() == [[255] * 3] * 3
    assert read[:, 4, 4].tolist() == [[255, 0, 0]] * 3


def test_only_the_frames_that_are_returned_are_kept(tmp_path: Path):
    path = write(tmp_path / "a.mp4", smooth_clip(40))
    whole = read_video(path)[0]
    assert np.array_equal(read_video(path, last=5)[0], whole[-5:])
    assert np.array_equal(read_video(path, max_frames=7, last=5)[0], whole[2:7])
    frame_bytes = whole[0].nbytes
    tracemalloc.start()
    read_video(path, last=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # two kept, two stacked, and those on the way: far from forty
    assert peak < 12 * frame_bytes


def test_a_file_without_video_or_with_a_missing_part_is_named_in_one_line(
    tmp_path: Path, ffmpeg: Callable[..., Path], caplog: pytest.LogCaptureFixture
):
    audio = ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "audio.mp4")
    for read in (read_video, probe, stream_video):
        with pytest.raises(UserError, match=r"audio\.mp4: holds no video stream$"):
            read(audio)
    whole = ffmpeg(*source(rate=24, duration=4), "-c:v", "mpeg2video", tmp_path / "whole.mkv")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    num_frames = len(read_video(cut)[0])
    assert 0 < num_frames < 96
    assert len(caplog.messages) <= 1  # what can be read is used, and damage is a warning
    cut.write_bytes(whole.read_bytes()[:600])
    with pytest.raises(UserError, match=r"cut\.mkv: (holds no frame|not a video)"):
        read_video(cut)


def test_what_is_not_an_image_is_named_in_one_line(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    png = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    broken = bytearray(png)
    broken[30] ^= 0xFF  # inside the checksum of the header
    (tmp_path / "broken.png").write_bytes(broken)
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    expected = {
        "cut.png": "not an image that can be read",
        "broken.png": "not an image that can be read",
        "text.png": "not an image that can be read",
        "empty.png": "the file is empty",
        "missing.png": "no such file",
    }
    for name, said in expected.items():
        with pytest.raises(UserError) as caught:
            (read_image if name != "text.png" else image_size)(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {said}")
        assert "\n" not in str(caught.value)


def test_float_pixels_are_clamped_scaled_and_cut_off():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    pixels = values.view(1, 1, 1, 1, 6).expand(2, 3, 4, 1, 6)
    converted = to_uint8(pixels)
    assert converted.shape == (2, 4, 1, 6, 3)
    assert converted.dtype == torch.uint8
    assert converted[1, 2, 0, :, 1].tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(pixels[0].bfloat16()).shape == (4, 1, 6, 3)


def test_colours_move_to_the_last_axis_in_order():
    pixels = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    assert to_uint8(pixels).flatten().tolist() == [0, 127, 255]


def test_ffmpeg_is_checked_by_encoding(monkeypatch: pytest.MonkeyPatch):
    check_ffmpeg()
    for program in ("/nonexistent/ffmpeg", "/bin/false"):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
        with pytest.raises(UserError, match="ffmpeg does not work"):
            check_ffmpeg()


def test_a_stream_gives_the_frames_of_the_whole_video(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8))
    size, frames = stream_video(path)
    assert size == (32, 48)
    assert np.array_equal(np.stack(list(frames)), read_video(path)[0])


def test_a_stream_of_damaged_data_ends_with_the_frame_it_broke_at(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    with VideoWriter(path, fps=24, size=(64, 96)) as writer:
        writer.append(np.concatenate([np.roll(noise, shift, axis=2) for shift in range(49)]))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = random.bytes(400)
    path.write_bytes(data)
    _, frames = stream_video(path)
    with pytest.raises(UserError, match=r"clip\.mp4: broken after frame \d+$"):
        list(frames)


def test_scripts_import_reading_and_writing_from_one_public_place():
    public = importlib.import_module("flowcache.video")
    assert public.read_video is read_video
    assert public.probe is probe
    assert public.VideoWriter is VideoWriter


# Pictures -----------------------------------------------------------------------------------------


RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
"""Grey values from 0 to 252."""


def save(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(
        Image.fromarray(RAMP).convert("RGB"), *profiles, outputMode="LAB"
    )
    assert image is not None
    return image


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("8 bits.png", Image.fromarray(RAMP)),
        ("16 bits.png", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("16 bits.tif", Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ("32 bits.tif", Image.fromarray(RAMP.astype(np.int32) * 257)),
        ("32 bits of bytes.tif", Image.fromarray(RAMP.astype(np.int32))),
        ("0 to 1.tif", Image.fromarray(RAMP.astype(np.float32) / 255)),
        ("0 to 255.tif", Image.fromarray(RAMP.astype(np.float32))),
        ("0 to 65535.tif", Image.fromarray(RAMP.astype(np.float32) * 257)),
        ("palette.png", Image.fromarray(RAMP).quantize(64)),
        ("grey with alpha.png", Image.fromarray(RAMP).convert("LA")),
        ("colour with alpha.png", Image.fromarray(RAMP).convert("RGBA")),
        ("print colours.tif", Image.fromarray(RAMP).convert("RGB").convert("CMYK")),
        ("video colours.jpg", Image.fromarray(RAMP).convert("RGB").convert("YCbCr")),
        ("lab.tif", lab()),
    ],
)
def test_every_colour_model_shows_the_same_ramp(tmp_path: Path, name: str, image: Image.Image):
    read = read_image(save(tmp_path / name, image))
    assert read.mode == "RGB"
    shown = np.asarray(read).astype(int)
    # one level of 255 for rounding; JPEG and Lab lose up to three more
    assert np.abs(shown - RAMP[..., None]).max() <= 4


def test_black_and_white_pixels_stay_black_and_white(tmp_path: Path):
    bits = Image.fromarray(RAMP > 127)
    assert set(np.unique(np.asarray(read_image(save(tmp_path / "bits.png", bits))))) == {0, 255}


@pytest.mark.parametrize("value", [-1.0, 70000.0])
def test_grey_values_of_no_known_range_are_refused(tmp_path: Path, value: float):
    pixels = RAMP.astype(np.float32)
    pixels[3, 5] = value
    path = save(tmp_path / "a.tif", Image.fromarray(pixels))
    with pytest.raises(UserError, match=r"a\.tif: its grey values are .*, but must be in 0\.\.1"):
        read_image(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_with_a_value_that_is_no_number_is_refused(tmp_path: Path, value: float):
    pixels = RAMP.astype(np.float32)
    pixels[3, 5] = value
    path = save(tmp_path / "a.tif", Image.fromarray(pixels))
    with pytest.raises(UserError, match=r"a\.tif: holds values that are not finite"):
        read_image(path)


def transparent(hidden: tuple[int, int, int]) -> Image.Image:
    """A red square; around it nothing is seen, whatever colour is stored there."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[2:6, 2:6] = (255, 0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "palette.png", "colour key.png"])
def test_transparency_is_put_over_white_whatever_colour_is_hidden(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    image = transparent((0, 255, 0))
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    if name == "palette.png":
        image = image.quantize(4)
    if name == "colour key.png":
        image, options = image.convert("RGB"), {"transparency": (0, 255, 0)}
    image.save(tmp_path / name, **options)
    with caplog.at_level(logging.INFO):
        shown = np.asarray(read_image(tmp_path / name))
    assert tuple(shown[0, 0]) == BACKGROUND
    assert tuple(shown[4, 4]) == (255, 0, 0)
    assert caplog.messages == [f"{tmp_path / name}: its transparent pixels are shown over white"]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path):
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 51))  # 51 / 255 = one fifth
    shown = read_image(save(tmp_path / "a.png", image)).getpixel((0, 0))
    assert shown == (204, 224, 244)


def test_of_an_animated_image_the_first_frame_is_read(tmp_path: Path):
    first, *others = [Image.new("RGB", (8, 8), name) for name in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        first.save(tmp_path / name, save_all=True, append_images=others, lossless=True)
        assert read_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_those_of_the_upright_image(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        picture = Image.new("RGB", (6, 4))
        picture.putpixel((0, 0), (250, 10, 20))
        picture.save(tmp_path / name, exif=exif)
        size = image_size(tmp_path / name)
        assert size == ((6, 4) if orientation >= 5 else (4, 6))
        image = read_image(tmp_path / name)
        assert (image.size, image.mode) == (size[::-1], "RGB")
        if orientation == 6 and name == "a.png":  # turned by 90 degrees clockwise
            assert image.getpixel((3, 0)) == (250, 10, 20)
