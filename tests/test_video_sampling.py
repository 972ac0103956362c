# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Which frames are sampled from a video, at which true times, by either decoder, from whatever is given."""

import functools
import http.server
import io
import logging
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import is_torchcodec_usable
from video_files import (
    frame_numbers,
    numbered_frames,
    write_audio,
    write_bad_index,
    write_cut_off,
    write_damaged,
    write_header_only,
    write_live,
    write_pictures,
    write_size_change,
    write_trimmed,
    write_two_streams,
    write_video,
)

from d2vlm_hf.model import video_processing_d2vlm as processing
from d2vlm_hf.model.video_decoding_d2vlm import DecoderFailure, PyAvReader, TorchcodecReader
from d2vlm_hf.model.video_processing_d2vlm import SampledVideo, flatten_videos, frame_period, sample_video
from d2vlm_hf.model.video_sources_d2vlm import EncodedFile


needs_torchcodec = pytest.mark.skipif(
    not is_torchcodec_usable("video"), reason="torchcodec cannot decode here (not installed, or no FFmpeg)"
)
DECODERS = [pytest.param("torchcodec", marks=needs_torchcodec), "pyav"]

NTSC = Fraction(30000, 1001)
VFR_TIMES = [0, 0.1, 0.2, 0.3, 1.0, 1.1, 2.5, 2.6, 2.7, 3.9]
TENTHS = [i / 10 for i in range(40)]
# Name -> seconds at which each frame appears, and duration.
TRUE_TIMES = {
    "cfr": (TENTHS, 4.0),
    "ntsc": ([i / NTSC for i in range(90)], float(90 / NTSC)),
    "vfr": (VFR_TIMES, 3.9 + 3.9 / 9),  # the header is silent on the last frame: it stays as long as the mean one
    "late": (TENTHS[:20], 2.0),  # shown from 0.7 s on; times count from there
    "turned": (TENTHS, 4.0),
    "ten_bit": (TENTHS, 4.0),
    "one": ([0.0], 0.1),
    "live": (TENTHS, 4.0),
    "fragmented": (TENTHS, 4.0),
    "mpegts": (TENTHS, 4.0),
    "two_streams": (TENTHS[:30], 3.0),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        "cfr": write_video(folder / "cfr.mp4"),
        "ntsc": write_video(folder / "ntsc.mp4", 90, NTSC),
        "vfr": write_video(folder / "vfr.mp4", times=VFR_TIMES),
        "late": write_video(folder / "late.mp4", times=[0.7 + t for t in TENTHS[:20]]),
        "turned": write_video(folder / "turned.mp4", rotation=90),
        "ten_bit": write_video(folder / "ten_bit.mp4", pix_fmt="yuv420p10le"),
        "one": write_video(folder / "one.mp4", 1),
        "live": write_live(folder / "live.mkv"),
        "fragmented": write_video(
            folder / "fragmented.mp4", container_options={"movflags": "empty_moov+frag_keyframe"}
        ),
        "mpegts": write_video(folder / "mpegts.ts"),
        "two_streams": write_two_streams(folder / "two.mp4"),
    }


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def frames_on_screen(times: list[float], duration: float, fps: float) -> list[int]:
    """The sampling rule in plain Python: numbers of the frames on screen at 0, 1/fps, 2/fps, ..., none twice."""
    shown, k = [], 0
    while k == 0 or k / fps < duration - 1e-4:
        number = max(i for i, time in enumerate(times) if time <= k / fps + 1e-6)
        if number not in shown:
            shown.append(number)
        k += 1
    return shown


# The rule


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("fps", [0.5, 1, 2.0, 7.3, 50])
@pytest.mark.parametrize("name", TRUE_TIMES)
def test_frames_on_screen_come_with_their_own_times(videos, name, fps, decoder):
    times, duration = TRUE_TIMES[name]
    sampled = sample_video(videos[name], fps=fps, decoder=decoder)
    expected = frames_on_screen(times, duration, fps)
    frames = sampled.frames.rot90(-1, (2, 3)) if name == "turned" else sampled.frames
    assert frame_numbers(frames) == expected
    np.testing.assert_allclose(sampled.times, [float(times[i]) for i in expected], atol=1e-3)
    assert sampled.times.dtype == np.float64
    assert sampled.frames.dtype == torch.uint8
    assert sampled.duration == pytest.approx(duration, abs=2e-3)
    assert sampled.skipped == 0


@pytest.mark.parametrize("fps", [1.0, 8.0, None])
@pytest.mark.parametrize("name", TRUE_TIMES)
@needs_torchcodec
def test_both_decoders_give_the_same(videos, name, fps):
    one, other = (sample_video(videos[name], fps=fps, decoder=decoder) for decoder in ("torchcodec", "pyav"))
    assert other.decoder == "pyav"
    assert one.decoder == "torchcodec" or name == "mpegts"  # in which torchcodec 0.13 cannot seek
    np.testing.assert_array_equal(one.times, other.times)
    assert (one.duration, one.fps, one.skipped) == pytest.approx((other.duration, other.fps, other.skipped), abs=1e-9)
    if name == "ten_bit":
        assert (one.frames.float() - other.frames.float()).abs().mean() <= 4
    else:
        assert torch.equal(one.frames, other.frames)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_slow_file_gives_each_frame_once(videos, decoder):
    sampled = sample_video(videos["cfr"], fps=25.0, decoder=decoder)
    assert frame_numbers(sampled.frames) == list(range(40))
    assert sampled.fps == pytest.approx(10.0)
    assert sampled.period == pytest.approx(0.1)
    regular = sample_video(videos["cfr"], fps=4.0, decoder=decoder)
    assert regular.fps == 4.0
    assert regular.period == 0.25


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_frame(videos, decoder):
    sampled = sample_video(videos["vfr"], fps=None, decoder=decoder)
    assert frame_numbers(sampled.frames) == list(range(10))
    np.testing.assert_allclose(sampled.times, VFR_TIMES, atol=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_frame_stands_for_one_sampling_step(videos, decoder):
    sampled = sample_video(videos["one"], fps=2.0, decoder=decoder)
    assert (len(sampled.frames), sampled.times.tolist(), sampled.fps, sampled.period) == (1, [0.0], 2.0, 0.5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_long_videos_are_thinned_evenly_with_one_warning(videos, decoder, caplog):
    sampled = sample_video(videos["cfr"], fps=2.0, max_frames=5, decoder=decoder)
    np.testing.assert_allclose(sampled.times, [0.0, 0.8, 1.6, 2.4, 3.2])
    assert frame_numbers(sampled.frames) == [0, 8, 16, 24, 32]
    assert sampled.fps == pytest.approx(5 / 4.0)
    (warning,) = warnings_in(caplog)
    assert "max_frames=5" in warning
    assert "fps=1.25" in warning


@pytest.mark.parametrize(("fps", "max_frames"), [(2.0, 8), (1.0, 4), (100.0, 40), (None, 40)])
def test_videos_that_fit_are_not_thinned(videos, fps, max_frames, caplog):
    assert len(sample_video(videos["cfr"], fps=fps, max_frames=max_frames).times) == max_frames
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_display_rotation_is_applied(videos, decoder):
    upright, turned = (sample_video(videos[name], decoder=decoder).frames for name in ("cfr", "turned"))
    assert turned.shape[-2:] == (64, 48)
    assert torch.equal(turned, upright.rot90(1, (2, 3)))


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_hidden_by_an_edit_list_do_not_count(videos, tmp_path, decoder):
    sampled = sample_video(write_trimmed(tmp_path / "trimmed.mp4", videos["cfr"], 0.65), fps=2.0, decoder=decoder)
    assert frame_numbers(sampled.frames) == [7, 12, 17, 22, 27, 32, 37]
    np.testing.assert_allclose(sampled.times, np.arange(7) / 2, atol=1e-3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_that_changes_its_size(tmp_path, decoder):
    sampled = sample_video(write_size_change(tmp_path / "change.ts"), fps=1.0, decoder=decoder)
    assert sampled.frames.shape == (4, 3, 48, 64)
    assert frame_numbers(sampled.frames) == [0, 10, 0, 10]


# How it is done


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_transformed_in_small_chunks(videos, monkeypatch, decoder):
    monkeypatch.setattr(processing, "CHUNK_BYTES", 3 * 64 * 48 * 3)  # three frames
    chunks = []

    def halve(frames):
        chunks.append(tuple(frames.shape))
        return frames[:, :, ::2, ::2]

    sampled = sample_video(videos["cfr"], fps=2.0, decoder=decoder, frame_transform=halve)
    assert chunks == [(3, 3, 48, 64), (3, 3, 48, 64), (2, 3, 48, 64)]
    whole = sample_video(videos["cfr"], fps=2.0, decoder=decoder).frames
    assert torch.equal(sampled.frames, whole[:, :, ::2, ::2])


@pytest.mark.parametrize("decoder", DECODERS)
def test_repeated_frames_are_not_piled_up(tmp_path, monkeypatch, decoder):
    reader_class = {"torchcodec": TorchcodecReader, "pyav": PyAvReader}[decoder]
    read_all, sizes = reader_class.read, []

    def watched(self, *args):
        for frames, times in read_all(self, *args):
            sizes.append(len(frames))
            yield frames, times

    monkeypatch.setattr(processing, "CHUNK_BYTES", 4 * 64 * 48 * 3)
    monkeypatch.setattr(reader_class, "read", watched)
    path = write_video(tmp_path / "slides.mp4", times=[0, 10, 20])
    sampled = sample_video(path, fps=5.0, decoder=decoder)  # 150 times, 3 frames
    assert frame_numbers(sampled.frames) == [0, 1, 2]
    assert max(sizes) <= 4


@pytest.mark.parametrize("decoder", DECODERS)
def test_threads_change_nothing(videos, decoder):
    one, two = (sample_video(videos["ntsc"], fps=5.0, decoder=decoder, num_threads=n) for n in (1, 2))
    assert torch.equal(one.frames, two.frames)


def read(path: str, times: list[float]) -> tuple[PyAvReader, list[int]]:
    reader = PyAvReader(EncodedFile(path, path))
    chunks = list(reader.read(np.array(times) + reader.begin, 1.0, 1e9))
    reader.close()
    return reader, frame_numbers(torch.cat([frames for frames, _ in chunks]))


def test_pyav_seeks_only_where_it_pays(videos, tmp_path):
    near, numbers = read(videos["cfr"], [0.0, 1.0, 2.0])
    assert numbers == [0, 10, 20]
    assert not near._sought
    far, numbers = read(write_video(tmp_path / "long.mp4", 200), [0.0, 7.3, 19.9])
    assert numbers == [0, 73, 199]
    assert far._sought


write_mpeg = functools.partial(write_video, rate=25, codec="mpeg2video", container_format="mpeg")  # no index


@pytest.mark.parametrize("write", [write_pictures, write_mpeg])
def test_pyav_starts_over_where_seeking_fails_or_lands_too_late(tmp_path, write):
    reader, numbers = read(write(tmp_path / "video", count=200), [0.0, 73 / 25, 199 / 25])
    assert numbers == [0, 73, 199]
    assert not reader._can_seek


def test_frames_without_times_are_left_out(tmp_path):
    path = write_video(
        tmp_path / "video.mpg", 100, rate=25, container_format="mpeg"
    )  # only some H.264 packets have any
    sampled = sample_video(path, fps=None)
    assert 0 < len(sampled.times) < 50
    assert (np.diff(sampled.times) > 0).all()


# Sources


def as_bytes(path):
    return Path(path).read_bytes()


def as_decoder(path):
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path)


class OneWay:
    """A file object that can only be read on, such as the answer of a server."""

    def __init__(self, path):
        self.read = io.BytesIO(as_bytes(path)).read


FILE_SOURCES = {
    "path": str,
    "Path": Path,
    "bytes": as_bytes,
    "bytearray": lambda path: bytearray(as_bytes(path)),
    "BytesIO": lambda path: io.BytesIO(as_bytes(path)),
    "one way": OneWay,
    "dict with bytes": lambda path: {"bytes": as_bytes(path), "path": "gone.mp4"},
    "dict with path": lambda path: {"bytes": None, "path": path},
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", FILE_SOURCES)
def test_files_can_be_given_in_many_ways(videos, name, decoder):
    sampled = sample_video(FILE_SOURCES[name](videos["vfr"]), fps=1.0, decoder=decoder)
    assert frame_numbers(sampled.frames) == [0, 4, 5, 8, 9]
    assert sampled.decoder == decoder


@needs_torchcodec
def test_an_open_decoder_has_its_own_times(videos):
    sampled = sample_video(as_decoder(videos["late"]), fps=2.0)
    assert frame_numbers(sampled.frames) == [0, 5, 10, 15]
    np.testing.assert_allclose(sampled.times, [0, 0.5, 1.0, 1.5], atol=1e-9)
    assert sampled.decoder == "torchcodec"


@needs_torchcodec
def test_a_decoder_may_give_channels_last(videos):
    from torchcodec.decoders import VideoDecoder

    sampled = sample_video(VideoDecoder(videos["cfr"], dimension_order="NHWC"), fps=2.0)
    assert torch.equal(sampled.frames, sample_video(videos["cfr"], fps=2.0, decoder="pyav").frames)


def as_pictures(folder: Path, count: int = 40) -> list[str]:
    paths = [folder / f"frame_{i}.png" for i in range(count)]  # 10 comes after 2, whatever the alphabet says
    for path, pixels in zip(paths, numbered_frames(count), strict=True):
        Image.fromarray(pixels).save(path)
    (folder / "notes.txt").write_text("not a frame")
    return [str(path) for path in paths]


FRAME_SOURCES = {
    "THWC array": lambda frames: frames,
    "TCHW tensor": lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
    "float tensor": lambda frames: torch.from_numpy(frames / 255),
    "reversed view": lambda frames: frames[::-1].copy()[::-1],
    "list of arrays": list,
    "list of pictures": lambda frames: [Image.fromarray(pixels) for pixels in frames],
}


@pytest.mark.parametrize("name", FRAME_SOURCES)
def test_frames_can_be_given_in_many_ways(name):
    frames = numbered_frames(40)
    sampled = sample_video(FRAME_SOURCES[name](frames), fps=2.0, video_fps=10)
    assert frame_numbers(sampled.frames) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert torch.equal(sampled.frames, torch.from_numpy(frames[::5]).permute(0, 3, 1, 2))
    assert sampled.times.tolist() == [0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert (sampled.duration, sampled.fps, sampled.decoder, sampled.skipped) == (4.0, 2.0, "frames", 0)


def test_frame_folders_and_lists_of_picture_files(tmp_path):
    paths = as_pictures(tmp_path)
    for source in (tmp_path, str(tmp_path), paths):
        assert frame_numbers(sample_video(source, fps=2.0, video_fps=10).frames) == [0, 5, 10, 15, 20, 25, 30, 35]


def test_given_times_are_kept():
    times = [5.0, 5.25, 5.5, 7.0, 9.0, 9.25]
    sampled = sample_video(numbered_frames(6), fps=1.0, timestamps=times)
    assert frame_numbers(sampled.frames) == [0, 2, 3, 4]
    assert sampled.times.tolist() == [5.0, 5.5, 7.0, 9.0]
    assert sampled.duration == 4.25 + 0.25  # the last frame stays as long as the median one
    single = sample_video(numbered_frames(1), fps=4.0, timestamps=[3.0])
    assert (single.times.tolist(), single.period) == ([3.0], 0.25)


@pytest.fixture
def server(videos):
    """A server on localhost: `/video` answers with a file, `/short` promises more than it sends."""
    content = as_bytes(videos["cfr"])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/video", "/short") else 404)
            self.send_header("Content-Length", str(len(content) + (self.path == "/short")))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_urls_are_fetched(server, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert frame_numbers(sample_video(f"{server}/video", decoder=decoder).frames) == [0, 10, 20, 30]
    assert list(tmp_path.iterdir()) == []


def test_urls_that_cannot_be_fetched(server):
    with pytest.raises(ValueError, match=r"/gone could not be fetched: .*404.* Check the address"):
        sample_video(f"{server}/gone")
    with pytest.raises(ValueError, match=r"could not be fetched whole: \d+ of \d+ bytes arrived"):
        sample_video(f"{server}/short")


def test_nested_videos_are_listed():
    frames, picture = numbered_frames(3), Image.new("RGB", (8, 8))
    assert flatten_videos("a.mp4") == ["a.mp4"]
    assert flatten_videos([["a.mp4"], ["b.mp4", b"c"]]) == ["a.mp4", "b.mp4", b"c"]
    assert flatten_videos([picture, picture]) == [[picture, picture]]
    assert flatten_videos([["0.png", "1.png"], {"path": "a.mp4"}]) == [["0.png", "1.png"], {"path": "a.mp4"}]
    assert len(flatten_videos(np.stack([frames, frames]))) == 2
    assert [len(video) for video in flatten_videos([frames, list(frames)])] == [3, 3]
    assert flatten_videos([]) == []


# Damage


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("decoder", DECODERS)
def test_damaged_packets_are_stepped_over_with_one_warning(tmp_path, decoder, threads, caplog):
    path = write_damaged(tmp_path / "damaged.mp4", [20, 23])
    sampled = sample_video(path, fps=2.0, decoder=decoder, num_threads=threads)
    assert frame_numbers(sampled.frames) == [0, 5, 10, 15, 19, 25, 30, 35]
    np.testing.assert_allclose(sampled.times, [0, 0.5, 1, 1.5, 1.9, 2.5, 3, 3.5])
    assert sampled.skipped == 2
    (warning,) = warnings_in(caplog)
    assert "is damaged: 2 packet(s) do not decode; 1 sampled time(s) show the nearest frame that does" in warning


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_first_frame_that_does_not_decode_is_replaced_by_the_next_key_frame(tmp_path, decoder):
    path = write_damaged(tmp_path / "damaged.mp4", [0, 1, 2, 3, 4], gop=5)
    sampled = sample_video(path, fps=1.0, decoder=decoder)
    assert frame_numbers(sampled.frames) == [5, 10, 20, 30]
    np.testing.assert_allclose(sampled.times, [0.5, 1, 2, 3])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_time_without_any_frame_is_an_error(tmp_path, decoder):
    path = write_damaged(tmp_path / "damaged.mp4", range(13, 35))
    message = r"damaged.mp4 has no frame to show at 2.000 s: .* nearest that does is at 1.200 s \(22 damaged packets\)"
    with pytest.raises(ValueError, match=message):
        sample_video(path, fps=2.0, decoder=decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_nothing_decodes(tmp_path, decoder):
    path = write_damaged(tmp_path / "damaged.mp4", range(40))
    with pytest.raises(ValueError, match=r"has no frame to show at 0.000 s: .* and no other does either"):
        sample_video(path, decoder=decoder)


@needs_torchcodec
def test_an_open_decoder_names_the_time_too(tmp_path):
    decoder = as_decoder(write_damaged(tmp_path / "damaged.mp4", [20]))
    message = r"The VideoDecoder cannot give all frames that were asked for: decoding fails at or soon after 2.000 s"
    with pytest.raises(ValueError, match=message):
        sample_video(decoder, fps=2.0)


class Hole:
    """A decoder that steps over what does not decode without a word, as torchcodec does with some files."""

    class metadata:
        num_frames, codec, width, height = 40, "h264", 64, 48
        begin_stream_seconds, end_stream_seconds, duration_seconds_from_header = 0.0, 4.0, 4.0
        average_fps_from_header = 10.0

    def get_frames_at(self, indices):
        raise RuntimeError("no such frame")

    def get_frames_played_at(self, seconds):
        class Batch:
            data = torch.zeros(len(seconds), 3, 48, 64, dtype=torch.uint8)
            pts_seconds = torch.ceil(seconds - 1e-3)

        return Batch


def test_frames_later_than_asked_for_are_refused():
    with pytest.raises(ValueError, match=r"the frame at 0.500 s does not decode"):
        sample_video(Hole(), fps=2.0)
    with pytest.raises(ValueError, match=r"decoding fails at or soon after frame 0 \(no such frame\)"):
        sample_video(Hole(), fps=None)


@pytest.mark.parametrize("fps", [2.0, None])
@pytest.mark.parametrize("decoder", DECODERS)
def test_of_a_cut_off_file_what_decodes_is_used_with_one_warning(tmp_path, decoder, fps, caplog):
    path = write_cut_off(tmp_path / "cut.mp4", 0.6, index_in_front=True, b_frames=0)
    sampled = sample_video(path, fps=fps, decoder=decoder)
    numbers = frame_numbers(sampled.frames)
    assert 1.0 < sampled.duration < 3.0
    assert numbers == list(range(0, numbers[-1] + 1, 5 if fps else 1))
    (warning,) = warnings_in(caplog)
    assert f"it ends at {sampled.duration:.2f} s, but 4.00 s were announced. What decodes is used." in warning


@pytest.mark.parametrize("share", [0.45, 0.6, 0.75, 0.85])
def test_the_last_frames_of_a_cut_off_file_may_be_missing(tmp_path, share):
    path = write_cut_off(tmp_path / "cut.mp4", share, index_in_front=True, b_frames=6)  # frames stored in odd order
    sampled = sample_video(path, fps=None)
    numbers = frame_numbers(sampled.frames)
    assert numbers[:-6] == list(range(len(numbers) - 6))  # only near the end frames are left out
    np.testing.assert_allclose(sampled.times, np.array(numbers) / 10)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_file_whose_index_breaks_off_is_used_up_to_there(tmp_path, decoder, caplog):
    sampled = sample_video(write_bad_index(tmp_path / "index.mp4", 24), fps=None, decoder=decoder)
    assert frame_numbers(sampled.frames) == list(range(24))
    assert len(warnings_in(caplog)) == 1


# Decoders


def test_pyav_takes_over_with_one_warning_where_torchcodec_does_not_work(videos, monkeypatch, caplog):
    monkeypatch.setattr(processing, "is_torchcodec_usable", lambda decode: False)
    logging.Logger.warning_once.cache_clear()
    assert [sample_video(videos["cfr"]).decoder for _ in range(2)] == ["pyav", "pyav"]
    (warning,) = warnings_in(caplog)
    assert "torchcodec cannot decode videos here, so PyAV does" in warning
    with pytest.raises(ValueError, match=r"decoder='torchcodec' cannot be had: .* or leave `decoder` out"):
        sample_video(videos["cfr"], decoder="torchcodec")


def test_frames_need_no_decoder(monkeypatch, caplog):
    monkeypatch.setattr(processing, "is_torchcodec_usable", lambda decode: False)
    logging.Logger.warning_once.cache_clear()
    sample_video(numbered_frames(2), video_fps=1)
    assert warnings_in(caplog) == []


@needs_torchcodec
def test_torchcodec_is_the_first_choice_and_needs_no_pyav(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert sample_video(videos["cfr"]).decoder == "torchcodec"
    assert frame_numbers(sample_video(videos["vfr"], fps=1.0).frames) == [0, 4, 5, 8]  # its end is torchcodec's then


def test_pyav_missing(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"PyAV cannot be loaded .* Run `pip install av`"):
        sample_video(videos["cfr"], decoder="pyav")


@needs_torchcodec
def test_what_torchcodec_cannot_read_is_left_to_pyav(videos, tmp_path):
    with pytest.raises(DecoderFailure, match=r"Invalid data"):
        TorchcodecReader(EncodedFile(b"nothing", "<7 bytes>"))
    (tmp_path / "notes.txt").write_text("hello\n" * 100)
    with pytest.raises(DecoderFailure, match=r"it finds no video frames \(codec ansi\)"):
        TorchcodecReader(EncodedFile(str(tmp_path / "notes.txt"), "notes.txt"))
    assert sample_video(videos["mpegts"], decoder="torchcodec").decoder == "pyav"


# Bad input


def bad_files(folder: Path) -> dict[str, str]:
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("hello, world\n" * 1000)
    (folder / "notes.txt").write_text("hello, world\n" * 1000)
    (folder / "folder").mkdir()
    return {
        "gone": str(folder / "gone.mp4"),
        "empty": str(folder / "empty.mp4"),
        "text": str(folder / "text.mp4"),
        "notes": str(folder / "notes.txt"),
        "folder": str(folder / "folder"),
        "audio": write_audio(folder / "audio.m4a"),
        "header": write_header_only(folder / "header.mp4"),
        "no_index": write_cut_off(folder / "no_index.mp4", 0.6, index_in_front=False),
    }


BAD_FILES = {
    "gone": r"gone.mp4 does not exist: no video file is there. Check the path",
    "folder": r"folder is a folder without pictures \(.bmp, .*\), so it is no frame folder. Give the video file",
    "notes": r"holds no video: FFmpeg finds only text in it. Give a file that has a video stream",
    "empty": r"is empty \(0 bytes\): the recording or download did not finish",
    "text": r"is not a video that FFmpeg can read \(.*\). Check that it is the file you meant",
    "audio": r"holds no video: FFmpeg finds only audio in it",
    "header": r"holds no video frames with times: its header describes a video, but nothing .* follows",
    "no_index": r"is a cut-off MP4 or MOV file: its index \(moov\), without which no frame is found, is missing",
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_bad_files(tmp_path, decoder, videos):
    files = bad_files(tmp_path)
    for name, message in BAD_FILES.items():
        with pytest.raises(ValueError, match=message):
            sample_video(files[name], decoder=decoder)
    for name in ("empty", "text", "audio", "header", "no_index"):
        for source in (as_bytes(files[name]), io.BytesIO(as_bytes(files[name]))):
            with pytest.raises(ValueError, match=BAD_FILES[name]):
                sample_video(source, decoder=decoder)
        with open(files[name], "rb") as file, pytest.raises(ValueError, match=BAD_FILES[name]):
            sample_video(file, decoder=decoder)
    assert len(sample_video(videos["cfr"], decoder=decoder).times) == 4  # the next request is unharmed


FRAMES = numbered_frames(4)
BAD_CALLS = [
    ({"fps": 0}, r"fps=0 is no sampling rate: frames are 1/fps seconds apart. Give a positive number"),
    ({"fps": -1.0}, r"fps=-1.0 is no sampling rate"),
    ({"fps": float("nan")}, r"fps=nan is no sampling rate"),
    ({"fps": "1"}, r"fps='1' is no sampling rate"),
    ({"max_frames": 0}, r"max_frames=0 leaves nothing to look at: .* Give a whole number from 1 on"),
    ({"max_frames": 2.5}, r"max_frames=2.5 leaves nothing to look at"),
    ({"decoder": "decord"}, r"decoder='decord' is unknown: there are 'torchcodec', 'pyav' and None"),
    (
        {"video_fps": 10, "path": "cfr"},
        r"cfr.mp4 came with video_fps or timestamps, but a video file has its own times",
    ),
    ({"source": FRAMES}, r"came with neither video_fps and timestamps: frames alone do not say when they were shown"),
    ({"source": FRAMES, "video_fps": 1, "timestamps": [0, 1, 2, 3]}, r"came with both video_fps and timestamps"),
    ({"source": FRAMES, "video_fps": 0}, r"video_fps=0 is no frame rate: times are frame number / video_fps"),
    (
        {"source": FRAMES, "timestamps": [0, 1, 2]},
        r"timestamps has shape \(3,\), but <array .*> has 4 frames: each frame",
    ),
    ({"source": FRAMES, "timestamps": [0, 1, 1, 2]}, r"timestamps\[2\] = 1.0 does not come after the time before it"),
    ({"source": FRAMES, "timestamps": [0, 1, float("nan"), 2]}, r"timestamps\[2\] = nan does not come after"),
    ({"source": FRAMES[0], "video_fps": 1}, r"<array of shape \(48, 64, 3\)> is no video: expected are 4 dimensions"),
    ({"source": FRAMES[..., :2], "video_fps": 1}, r"<array of shape \(4, 48, 64, 2\)> is no video"),
    ({"source": FRAMES[:0], "video_fps": 1}, r"holds no frames: there is nothing to sample. Give at least one frame"),
    ({"source": FRAMES.astype(int), "video_fps": 1}, r"has dtype torch.int64, which does not say what white is"),
    ({"source": FRAMES.astype(float), "video_fps": 1}, r"has values from 0 to 255; float frames must lie in \[0, 1\]"),
    (
        {"source": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "video_fps": 1},
        r"mixes frame sizes: frame 1 .*. Resize the frames to one size",
    ),
    ({"source": ["gone.png"], "video_fps": 1}, r"gone.png is no picture that can be read: .* Replace or remove it"),
    ({"source": {"url": "x"}}, r'dict has neither "bytes" nor "path", but the keys \[\'url\'\]: there is nothing'),
    ({"source": 7}, r"A video cannot be given as int: nothing says how to read frames from it. Give a path"),
    ({"source": []}, r"A video cannot be given as list"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_calls(videos, call, message):
    call = dict(call)
    source = call.pop("source") if "source" in call else videos[call.pop("path", "cfr")]
    with pytest.raises(ValueError, match=message):
        sample_video(source, **call)


def test_frame_period():
    assert frame_period([0.0, 3.0], fps=2.0) == 0.5
    assert frame_period(np.array([0.0, 1.0, 2.0, 7.0])) == 1.0
    sampled = SampledVideo(torch.zeros(1, 3, 2, 2), np.zeros(1), duration=9.0, fps=0.25, decoder="frames", skipped=0)
    assert sampled.period == 4.0
    with pytest.raises(ValueError, match=r"1 frame time\(s\) without fps define no period: .* Pass fps"):
        frame_period([3.0])
