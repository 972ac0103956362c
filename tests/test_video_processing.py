# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""From videos to pixel values: sizes, packing, options, saving, and life without torchvision or the package."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.dynamic_module_utils import get_imports
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.processing_utils import ProcessorMixin
from video_files import frame_numbers, numbered_frames, write_video

from d2vlm_hf.model import video_processing_d2vlm as processing
from d2vlm_hf.model.video_processing_d2vlm import D2VLMVideoProcessor, sample_video
from d2vlm_hf.model.video_transforms_d2vlm import center_crop_frames, pack_frames, resize_frames, resized_size


MODEL_FOLDER = Path(processing.__file__).parent
TRAVELLING = [
    "video_decoding_d2vlm.py",
    "video_processing_d2vlm.py",
    "video_sources_d2vlm.py",
    "video_transforms_d2vlm.py",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    """A landscape and a portrait file of 4 and 2 seconds."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / "wide.mp4", 40), write_video(folder / "tall.mp4", 20, size=(48, 80))]


@pytest.fixture
def processor() -> D2VLMVideoProcessor:
    return D2VLMVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


# Resize, crop, normalise


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (240, 320, (224, 298)),  # 298.67, rounded down
        (320, 240, (298, 224)),
        (1080, 1920, (224, 398)),
        (224, 224, (224, 224)),
        (100, 333, (224, 745)),
        (90, 160, (224, 398)),
    ],
)
def test_the_shorter_side_goes_to_size(height, width, expected):
    assert resized_size(height, width, SizeDict(shortest_edge=224)) == expected
    assert resized_size(height, width, SizeDict(height=7, width=9)) == (7, 9)


def bilinear_weights(size: int, new_size: int) -> np.ndarray:
    """Antialiased bilinear interpolation along one side, by the definition: a triangle as wide as the scale."""
    scale = size / new_size
    support = max(scale, 1.0)
    weights = np.zeros((new_size, size))
    for i in range(new_size):
        center = (i + 0.5) * scale
        for j in range(size):
            weights[i, j] = max(0.0, 1.0 - abs(j + 0.5 - center) / support)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width", "new"), [(40, 61, (16, 24)), (13, 9, (32, 22)), (50, 50, (50, 25))])
def test_resize_is_antialiased_bilinear_rounded_to_grey_levels(height, width, new):
    frames = noise(3, height, width)
    resized = resize_frames(frames, *new)
    exact = bilinear_weights(height, new[0]) @ frames.numpy().astype(float) @ bilinear_weights(width, new[1]).T
    assert resized.dtype == torch.uint8
    assert np.abs(resized.numpy() - exact).max() <= 0.5 + 1e-3
    for frame, small in zip(frames, resized, strict=True):
        picture = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(new[::-1], Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(picture).astype(int) - small.permute(1, 2, 0).numpy()).max() <= 1


def test_resize_is_the_same_in_parts(monkeypatch):
    frames = noise(5, 30, 40)
    whole = resize_frames(frames, 12, 16)
    monkeypatch.setattr("d2vlm_hf.model.video_transforms_d2vlm.RESIZE_BYTES", 1)
    assert torch.equal(resize_frames(frames, 12, 16), whole)
    assert resize_frames(frames, 30, 40) is frames


@pytest.mark.parametrize(("size", "crop", "start"), [(10, 4, 3), (9, 4, 2), (11, 4, 4), (7, 4, 2), (4, 4, 0)])
def test_the_crop_is_in_the_middle(size, crop, start):
    rows = torch.arange(size).view(1, 1, size, 1).expand(1, 3, size, 4)
    assert center_crop_frames(rows, crop, 4)[0, 0, :, 0].tolist() == list(range(start, start + crop))
    columns = rows.transpose(2, 3)
    assert center_crop_frames(columns, 4, crop)[0, 0, 0].tolist() == list(range(start, start + crop))


def test_pixel_values_against_plain_arithmetic(videos):
    processor = D2VLMVideoProcessor(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 22})
    frames = sample_video(videos[0], fps=2.0).frames
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    small = resize_frames(frames, 24, 32)[:, :, 2:22, 5:27].numpy() / 255
    expected = (small - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    values = processor(videos[0], fps=2.0)["pixel_values_videos"]
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.numpy(), expected, atol=2e-6)


def test_steps_can_be_switched_off(videos):
    off = D2VLMVideoProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    assert torch.equal(off(videos[0])["pixel_values_videos"], sample_video(videos[0]).frames.float())
    scaled = off(videos[0], do_rescale=True)["pixel_values_videos"]
    torch.testing.assert_close(scaled, sample_video(videos[0]).frames / 255)
    exact = off(videos[0], do_resize=True, size={"height": 10, "width": 12})["pixel_values_videos"]
    assert exact.shape == (4, 3, 10, 12)


# Packing


def test_frames_of_all_videos_are_packed_one_after_the_other(processor, videos):
    batch = processor(videos, fps=2.0)
    assert set(batch) == {"pixel_values_videos", "num_frames"}
    assert batch["pixel_values_videos"].shape == (12, 3, 32, 32)
    assert batch["num_frames"].tolist() == [8, 4]
    assert batch["num_frames"].dtype == torch.int64
    single = [processor(video, fps=2.0)["pixel_values_videos"] for video in videos]
    assert torch.equal(batch["pixel_values_videos"], torch.cat(single))


def test_videos_decoded_at_once_keep_their_order(processor, videos):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        many = processor([videos[i % 2] for i in range(7)], fps=3.0)
    finally:
        torch.set_num_threads(threads)
    assert many["num_frames"].tolist() == [12, 6, 12, 6, 12, 6, 12]
    wide, tall = (processor(video, fps=3.0)["pixel_values_videos"] for video in videos)
    assert torch.equal(many["pixel_values_videos"], torch.cat([wide, tall] * 3 + [wide]))


def test_metadata_is_asked_for(processor, videos):
    first, second = processor(videos, fps=2.0, max_frames=5, return_metadata=True)["video_metadata"]
    np.testing.assert_allclose(first["timestamps"], [0, 0.8, 1.6, 2.4, 3.2])
    np.testing.assert_allclose(second["timestamps"], [0, 0.5, 1.0, 1.5])
    assert (first["fps"], first["duration"], first["skipped_packets"]) == (1.25, 4.0, 0)
    assert (second["fps"], second["duration"], second["skipped_packets"]) == (2.0, 2.0, 0)
    assert first["decoder"] in ("torchcodec", "pyav")


def test_times_of_frames(processor):
    frames = numbered_frames(20)
    both = processor([frames, frames[:10]], fps=2.0, video_fps=[10, 5], return_metadata=True)["video_metadata"]
    assert [video["timestamps"].tolist() for video in both] == [[0, 0.5, 1, 1.5], [0, 0.4, 1.0, 1.4]]
    same = processor([frames, frames[:10]], video_fps=10)
    assert same["num_frames"].tolist() == [2, 1]
    times = [3.0, 4.0, 7.0]
    for timestamps in (times, [times], np.array(times), torch.tensor([times])):
        (video,) = processor(frames[:3], timestamps=timestamps, return_metadata=True)["video_metadata"]
        assert video["timestamps"].tolist() == times
    mixed = processor([frames[:3], frames[:2]], timestamps=[times, [0.0, 9.0]])
    assert mixed["num_frames"].tolist() == [3, 2]


def test_files_and_frames_together(processor, videos):
    batch = processor([videos[0], numbered_frames(20)], video_fps=[None, 10])
    assert batch["num_frames"].tolist() == [4, 2]
    wide = processor(videos[0])["pixel_values_videos"]
    assert torch.equal(batch["pixel_values_videos"][:4], wide)


def test_every_frame_without_sampling(processor, videos):
    assert processor(videos, do_sample_frames=False)["num_frames"].tolist() == [40, 20]


def test_numpy_is_returned_if_asked_for(processor, videos):
    batch = processor(videos, return_tensors="np", return_metadata=True)
    assert isinstance(batch["pixel_values_videos"], np.ndarray)
    assert batch["num_frames"].tolist() == [4, 2]
    assert len(batch["video_metadata"]) == 2


def test_a_long_video_of_large_frames_is_never_in_memory_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(processing, "CHUNK_BYTES", 2 * 320 * 240 * 3)
    sizes = []

    def resize(frames, *size):
        sizes.append(len(frames))
        return resize_frames(frames, *size)

    monkeypatch.setattr(processing, "resize_frames", resize)
    processor = D2VLMVideoProcessor(size=16, crop_size=16)
    assert processor(write_video(tmp_path / "large.mp4", 41, size=(320, 240)), fps=10)["num_frames"].tolist() == [41]
    assert sizes == [2] * 20 + [1]
    kept = processor._shrink(
        noise(1, 240, 320), {"do_resize": False, "do_center_crop": True, "crop_size": SizeDict(8, 8)}
    )
    assert kept.untyped_storage().nbytes() == 8 * 8 * 3  # and not a view of the whole frame


# Options


def test_options_of_one_call_do_not_stay(processor, videos):
    before = processor.to_dict()
    processor(videos[0], fps=5.0, max_frames=3, size={"shortest_edge": 40}, crop_size=36, decoder="pyav")
    assert processor.to_dict() == before
    assert processor(videos[0])["pixel_values_videos"].shape == (4, 3, 32, 32)
    assert processor(videos[0], fps=None, max_frames=None)["num_frames"].tolist() == [4]


def test_defaults_are_the_paper_s():
    processor = D2VLMVideoProcessor()
    assert (processor.fps, processor.max_frames) == (1.0, 512)
    assert dict(processor.size) == {"shortest_edge": 224}
    assert dict(processor.crop_size) == {"height": 224, "width": 224}
    assert processor.model_input_names == ["pixel_values_videos", "num_frames"]


BAD_OPTIONS = [
    ({"fps": 0}, r"fps=0 is no sampling rate"),
    ({"max_frames": 0}, r"max_frames=0 leaves nothing to look at"),
    ({"num_frames": 8}, r"num_frames=8 is not an option of D2VLMVideoProcessor: it samples by time"),
    ({"frames": 8}, r"frames is no option of D2VLMVideoProcessor and would do nothing. The options are crop_size, de"),
    ({"size": {"longest_edge": 8}}, r"size=.* cannot be resized to: it says neither how long the shorter side is"),
    (
        {"crop_size": 99},
        r"crop_size 99 x 99 is larger than the frames, which are 32 x 42 \(height x width\): nothing fills",
    ),
    ({"videos": []}, r"No video was given: the list of videos is empty"),
    ({"video_fps": [1, 2]}, r"video_fps has 2 entries for 1 video\(s\): each video has its own"),
    ({"timestamps": [[0, 1], [0, 1]]}, r"timestamps has 2 entries for 1 video\(s\)"),
    (
        {"do_resize": False, "do_center_crop": False, "videos": "both"},
        r"2 sizes, \[\(48, 64\), \(80, 48\)\] \(height x width\), and cannot be packed into one tensor",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(processor, videos, options, message):
    options = dict(options)
    given = options.pop("videos", videos[0])
    with pytest.raises(ValueError, match=message):
        processor(videos if given == "both" else given, **options)


def test_bad_options_are_refused_when_they_are_set():
    with pytest.raises(ValueError, match="fps=-1 is no sampling rate"):
        D2VLMVideoProcessor(fps=-1)
    with pytest.raises(ValueError, match="num_frames=8 is not an option"):
        D2VLMVideoProcessor(num_frames=8)


def test_one_bad_video_is_named(processor, videos, tmp_path):
    with pytest.raises(ValueError, match=r"gone.mp4 does not exist"):
        processor([videos[0], str(tmp_path / "gone.mp4"), videos[1]])


def test_pack_frames_by_itself():
    packed = pack_frames([noise(2, 4, 4), noise(1, 4, 4, seed=1)], None, None)
    assert torch.equal(packed, torch.cat([noise(2, 4, 4), noise(1, 4, 4, seed=1)]).float())


# Saving, and the rest of transformers


def test_saved_and_loaded_again(processor, videos, tmp_path):
    processor.fps = 2.0
    processor.save_pretrained(tmp_path)
    again = D2VLMVideoProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert torch.equal(again(videos)["pixel_values_videos"], processor(videos)["pixel_values_videos"])
    assert D2VLMVideoProcessor.from_pretrained(tmp_path, fps=4.0).fps == 4.0
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "processor_config.json").write_text(
        json.dumps({"video_processor": json.loads(processor.to_json_string())})
    )
    assert D2VLMVideoProcessor.from_pretrained(nested).to_dict() == processor.to_dict()
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert not {"video_fps", "timestamps", "decoder", "device"} & set(saved)
    assert str(tmp_path) not in json.dumps(saved)


def test_nothing_optional_is_imported_openly():
    allowed = {"torch", "transformers", "numpy", "huggingface_hub", *sys.stdlib_module_names}
    for name in TRAVELLING:
        assert set(get_imports(MODEL_FOLDER / name)) <= allowed


LOAD_AS_A_STRANGER = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed
sys.modules["d2vlm_hf"] = None
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder, video = sys.argv[1:]
cls = get_class_from_dynamic_module("video_processing_d2vlm.D2VLMVideoProcessor", folder)
batch = cls.from_pretrained(folder)(video, decoder="pyav", return_metadata=True)
print(tuple(batch["pixel_values_videos"].shape), batch["video_metadata"][0]["timestamps"].tolist())
"""


def test_the_saved_code_works_without_the_package_and_torchvision(processor, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(D2VLMVideoProcessor, "_auto_class", None)
    D2VLMVideoProcessor.register_for_auto_class("AutoVideoProcessor")
    processor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == TRAVELLING
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoVideoProcessor": "video_processing_d2vlm.D2VLMVideoProcessor"}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD_AS_A_STRANGER, str(tmp_path), videos[0]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(4, 3, 32, 32) [0.0, 1.0, 2.0, 3.0]", done.stderr


class VideoOnlyProcessor(ProcessorMixin):
    """The smallest processor of transformers around ours."""

    def __init__(self, video_processor):
        super().__init__(video_processor)

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def test_options_reach_it_through_a_processor_of_transformers(processor, videos):
    whole = VideoOnlyProcessor(processor)
    batch = whole(videos=videos, fps=2.0, max_frames=6, return_metadata=True)
    assert isinstance(batch, BatchFeature)
    assert batch["num_frames"].tolist() == [6, 4]
    assert [video["fps"] for video in batch["video_metadata"]] == [1.5, 2.0]
    frames = numbered_frames(20)
    batch = whole(videos=[frames], videos_kwargs={"timestamps": [i / 4 for i in range(20)], "fps": 1.0})
    assert batch["num_frames"].tolist() == [5]
    assert "video_metadata" not in batch


def test_true_frames_come_out_of_the_whole_chain(videos):
    """What is packed shows the frames that the times say."""
    plain = D2VLMVideoProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    batch = plain(videos[0], fps=3.0, return_metadata=True)
    (video,) = batch["video_metadata"]
    numbers = frame_numbers(batch["pixel_values_videos"].to(torch.uint8))
    assert numbers == [math.floor(10 * k / 3 + 1e-9) for k in range(12)]
    np.testing.assert_allclose(video["timestamps"], np.array(numbers) / 10)
