"""The pipelines that are called as diffusers': against diffusers' own, on the demo checkpoint."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

import flowcache.diffusers
from flowcache.errors import UserError
from flowcache.wan.unipc import SIGMA_MAX
from skyreels_v2.diffusers_pipeline import (
    SkyReelsV2FlowCacheImageToVideoPipeline,
    SkyReelsV2FlowCachePipeline,
    SkyReelsV2FlowCacheVideoToVideoPipeline,
)
from skyreels_v2.released import DEMO

pytestmark = pytest.mark.numeric

TEXT_LEN = 24
"""Prompt tokens of the demo."""
TOLERANCE = 2e-5
"""Of the largest latent: float32 rounding, which some steps of guidance enlarge; 0.9e-5 found."""
FRAME_TOLERANCE = 5e-5
"""Of pixels in 0..1, which the decoder makes of such latents; 2.7e-5 found."""
CALL: dict[str, Any] = {
    "prompt": "a red circle moving right on a black background",
    "negative_prompt": "",
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "addnoise_condition": 0,
    "ar_step": 0,
}
PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
).resize((64, 64))
CLIP = [PICTURE.rotate(4 * number) for number in range(12)]


class ReleasedGrid(UniPCMultistepScheduler):
    """diffusers' solver on the noise levels of the released code."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any):
        sigmas = np.linspace(SIGMA_MAX, 0.0, (num_inference_steps or 0) + 1)[:-1]
        super().set_timesteps(sigmas=sigmas, device=device)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def reference() -> SkyReelsV2DiffusionForcingPipeline:
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(DEMO, dtype=torch.float32)
    pipe.scheduler = ReleasedGrid.from_config(pipe.scheduler.config, flow_shift=5.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def vanilla() -> Any:
    pipe = SkyReelsV2FlowCachePipeline.from_pretrained(DEMO, preset="vanilla")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_same(reference: Any, own: Any, **call: Any):
    """Compare the latents of both pipelines, and their frames."""
    given = {**CALL, **call}
    for output_type in ("latent", "np"):
        theirs, ours = (
            torch.as_tensor(pipe(**given, **more, generator=seeded(), output_type=output_type)[0])
            for pipe, more in ((reference, {"max_sequence_length": TEXT_LEN}), (own, {}))
        )
        is_latent = output_type == "latent"
        if "video" in call and not is_latent:  # diffusers shows what it continues twice
            num_given = len(call["video"])
            again = num_given + call["overlap_history"]
            theirs = torch.cat([theirs[:, :num_given], theirs[:, again:]], dim=1)
        assert theirs.shape == ours.shape
        limit = TOLERANCE * float(theirs.abs().max()) if is_latent else FRAME_TOLERANCE
        assert float((theirs - ours).abs().max()) <= limit


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({}, id="synchronous"),
        pytest.param({"ar_step": 2}, id="asynchronous"),
        pytest.param({"guidance_scale": 1.0, "fps": 16}, id="one branch, 16 fps"),
    ],
)
def test_full_attention_without_reuse_equals_diffusers(
    reference: Any, vanilla: Any, call: dict[str, Any]
):
    more = {**call, "negative_prompt": ""}
    own = {"causal_block_size": 1}
    check_same(reference, lambda **given: vanilla(**given, **own), **more)


@pytest.mark.parametrize("last", [None, PICTURE.rotate(90)], ids=["start", "start and end"])
def test_image_to_video_equals_diffusers(reference: Any, vanilla: Any, last: Any):
    own = SkyReelsV2FlowCacheImageToVideoPipeline.from_pipe(vanilla, causal_block_size=1)
    own.set_progress_bar_config(disable=True)
    theirs = SkyReelsV2DiffusionForcingImageToVideoPipeline(**reference.components)
    theirs.set_progress_bar_config(disable=True)
    check_same(theirs, own, image=PICTURE, last_image=last)


def test_video_to_video_equals_diffusers(reference: Any, vanilla: Any):
    own = SkyReelsV2FlowCacheVideoToVideoPipeline.from_pipe(vanilla, causal_block_size=1)
    own.set_progress_bar_config(disable=True)
    theirs = SkyReelsV2DiffusionForcingVideoToVideoPipeline(**reference.components)
    theirs.set_progress_bar_config(disable=True)
    check_same(theirs, own, video=CLIP, overlap_history=9, base_num_frames=17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_equals_from_pretrained_bit_for_bit(dtype: torch.dtype):
    # as the published script loads it
    vae = AutoencoderKLWan.from_pretrained(DEMO / "vae", dtype=torch.float32)
    theirs = SkyReelsV2DiffusionForcingPipeline.from_pretrained(DEMO, vae=vae, dtype=dtype)
    made = []
    for pipe in (
        SkyReelsV2FlowCachePipeline.from_pretrained(DEMO, torch_dtype=dtype),
        SkyReelsV2FlowCachePipeline.from_pipe(theirs),
    ):
        assert pipe.dtype == dtype
        pipe.set_progress_bar_config(disable=True)
        made.append(pipe(**{**CALL, "ar_step": 1}, generator=seeded()).frames)
    assert np.array_equal(made[0], made[1])


def test_from_pipe_copies_no_weight(reference: Any):
    own = SkyReelsV2FlowCachePipeline.from_pipe(reference)
    theirs = reference.transformer.patch_embedding.weight
    assert own.components.dit.patch_embedding.weight.data_ptr() == theirs.data_ptr()


def test_a_flowcache_preset_reuses_and_its_shift_is_the_schedulers(vanilla: Any):
    pipe = SkyReelsV2FlowCachePipeline.from_pipe(vanilla, preset="flowcache_fast")
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "num_inference_steps": 10, "ar_step": 3, "causal_block_size": 2}
    frames = pipe(**call, generator=seeded()).frames
    assert frames.shape == (1, 17, 64, 64, 3)
    assert pipe.stats is not None
    assert pipe.stats.num_reused > 0
    config = pipe.scheduler.config
    pipe.scheduler = UniPCMultistepScheduler.from_config(config, flow_shift=3.0)
    assert not np.array_equal(pipe(**call, generator=seeded()).frames, frames)


def test_every_form_of_output_holds_the_same_frames(vanilla: Any):
    call = {**CALL, "num_frames": 5, "num_inference_steps": 2, "causal_block_size": 2}

    def made(**more: Any) -> Any:
        return vanilla(**call, **more, generator=seeded())

    frames = made().frames
    (as_tuple,) = made(return_dict=False)
    assert np.array_equal(as_tuple, frames)
    as_tensor = made(output_type="pt").frames
    assert np.array_equal(as_tensor.permute(0, 1, 3, 4, 2).numpy(), frames)
    pictures = made(output_type="pil").frames
    assert [len(video) for video in pictures] == [5]
    assert np.array_equal(np.asarray(pictures[0][0]), (frames[0, 0] * 255).round().astype(np.uint8))
    assert made(output_type="latent").frames.shape == (1, 16, 2, 8, 8)


def test_several_videos_are_those_of_single_calls(vanilla: Any):
    """diffusers refuses them for a model that is shown the frame rate, as the demo."""
    short = {**CALL, "num_frames": 5, "num_inference_steps": 2}
    prompts = [CALL["prompt"], "a blue square on a gray background"]
    alone = [
        vanilla(**{**short, "prompt": prompt}, generator=seeded(number)).frames[0]
        for number, prompt in enumerate(prompts)
    ]
    generators = [seeded(0), seeded(1)]
    together = vanilla(**{**short, "prompt": prompts}, generator=generators).frames
    assert np.array_equal(together, np.stack(alone))
    noise = torch.randn(2, 16, 2, 8, 8, generator=seeded(4))
    of_noise = vanilla(**short, num_videos_per_prompt=2, latents=noise).frames
    drawn = vanilla(**short, num_videos_per_prompt=2, generator=seeded(4)).frames
    assert np.array_equal(of_noise, drawn)
    assert not np.array_equal(drawn[0], drawn[1])


def test_without_a_generator_the_noise_is_pytorchs_own(vanilla: Any):
    call = {**CALL, "num_frames": 5, "num_inference_steps": 2}
    seeded_frames = vanilla(**call, generator=seeded(5)).frames
    torch.manual_seed(5)
    assert np.array_equal(vanilla(**call).frames, seeded_frames)
    assert not np.array_equal(vanilla(**call).frames, seeded_frames)


SHORT = {**CALL, "num_inference_steps": 3, "ar_step": 2, "causal_block_size": 3}
"""Chunks of 3 and 2 latent frames; five ticks."""


def test_a_callback_sees_every_step_and_the_timestep_of_every_frame(vanilla: Any):
    seen: list[tuple[int, list[int], torch.Tensor]] = []

    def see(pipe: Any, step: int, timestep: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        assert set(given) == {"latents", "prompt_embeds"}
        assert given["prompt_embeds"].shape == (1, TEXT_LEN, 64)
        assert pipe.num_timesteps == 5
        seen.append((step, timestep.tolist(), given["latents"].clone()))
        return given

    wanted = ["latents", "prompt_embeds"]
    more: dict[str, Any] = {"generator": seeded(), "output_type": "latent"}
    plain = vanilla(**SHORT, **more)[0]
    more = {**more, "generator": seeded(), "callback_on_step_end_tensor_inputs": wanted}
    latents = vanilla(**SHORT, **more, callback_on_step_end=see)[0]
    assert torch.equal(latents, plain)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    times = [time for _, time, _ in seen]
    assert times[0] == [999] * 5
    assert times[1] == [times[1][0]] * 3 + [999] * 2
    assert times[4] == [0] * 3 + [times[2][0]] * 2
    assert torch.equal(seen[-1][2], latents)


def test_a_callback_changes_noisy_latents_alone(vanilla: Any):
    def zero(_pipe: Any, step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(given["latents"])} if step == 3 else {}

    more: dict[str, Any] = {"output_type": "latent"}
    plain = vanilla(**SHORT, **more, generator=seeded())[0]
    changed = vanilla(**SHORT, **more, generator=seeded(), callback_on_step_end=zero)[0]
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])  # clean after the third tick
    assert not torch.equal(changed[:, :, 3:], plain[:, :, 3:])


def test_an_interrupted_call_returns_the_clean_frames(vanilla: Any):
    def stop_at(number: int) -> Callable[..., dict[str, Any]]:
        def stop(pipe: Any, step: int, _time: Any, _given: Any) -> dict[str, Any]:
            pipe._interrupt = step == number
            return {}

        return stop

    whole = vanilla(**SHORT, generator=seeded()).frames
    part = vanilla(**SHORT, generator=seeded(), callback_on_step_end=stop_at(3)).frames
    assert np.array_equal(part, whole[:, :9])
    with pytest.raises(UserError, match="before the first chunk was clean"):
        vanilla(**SHORT, callback_on_step_end=stop_at(1))


def test_a_long_video_has_all_its_frames(vanilla: Any):
    call = {**CALL, "num_inference_steps": 2, "base_num_frames": 9, "overlap_history": 5}
    assert vanilla(**call, generator=seeded()).frames.shape == (1, 17, 64, 64, 3)
    latents = vanilla(**call, generator=seeded(), output_type="latent").frames
    assert latents.shape == (1, 16, 5, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_framez": 17}, "unknown argument 'num_framez', did you mean num_frames?"),
        ({"prompt": None}, "give prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt must be a text or a list of texts"),
        ({"prompt_embeds": torch.zeros(1, TEXT_LEN, 64)}, "prompt or prompt_embeds, not both"),
        ({"height": 60}, "height"),
        ({"num_inference_steps": 0}, "num_steps"),
        ({"output_type": "gif"}, "output_type 'gif' is none of"),
        ({"attention_kwargs": {"scale": 1.0}}, "attention_kwargs are not supported"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be of latents"),
        ({"max_sequence_length": 512}, "max_sequence_length is 512, the model's is 24"),
        ({"latents": torch.zeros(1, 16, 2, 8, 8)}, r"latents must be \[1, 16, 5, 8, 8\]"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 videos"),
        ({"negative_prompt": ["a", "b"]}, "1 prompts, but 2 negative prompts"),
        ({"overlap_history": 33, "num_frames": 121}, "overlap_history 33"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(vanilla: Any, call: dict[str, Any], message: str):
    given = {**CALL, **call}
    if "overlap_history" in call:
        given["base_num_frames"] = 17
    with pytest.raises(UserError, match=message) as error:
        vanilla(**given)
    assert "\n" not in str(error.value)


def test_a_wrong_picture_or_model_is_one_clear_line(vanilla: Any, small_i2v: Any):
    of_image = SkyReelsV2FlowCacheImageToVideoPipeline.from_pipe(vanilla)
    of_video = SkyReelsV2FlowCacheVideoToVideoPipeline.from_pipe(vanilla)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: of_image("start.png", **CALL), "image is no picture"),
        (lambda: of_image(None, **CALL), "give image"),
        (lambda: of_video(CLIP[:3], **CALL, overlap_history=9), "video has 3 frames"),
        (lambda: SkyReelsV2FlowCachePipeline.from_pretrained("nowhere"), "nowhere"),
        (lambda: SkyReelsV2FlowCachePipeline.from_pretrained(small_i2v), "image-to-video model"),
        (lambda: SkyReelsV2FlowCachePipeline.from_pretrained(DEMO, preset="none"), "none"),
        (lambda: SkyReelsV2FlowCachePipeline.from_pretrained(DEMO, cache_dir="x"), "cache_dir"),
        (lambda: SkyReelsV2FlowCachePipeline.from_pretrained(DEMO, torch_dtype="x"), "torch_dtype"),
        (lambda: SkyReelsV2FlowCachePipeline.from_pipe(torch.nn.Linear(1, 1)), "takes a pipeline"),
        (lambda: vanilla.to("nonsense"), "nonsense"),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_changes_nothing(vanilla: Any):
    for move in (vanilla.to, vanilla.enable_model_cpu_offload):
        with pytest.raises(UserError):
            move("cuda:99")
    assert vanilla.device == torch.device("cpu")
    assert "offload" not in vanilla.settings


def test_a_scheduler_of_another_kind_is_refused(vanilla: Any):
    pipe = SkyReelsV2FlowCachePipeline.from_pipe(vanilla)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="UniPCMultistepScheduler for flow_prediction"):
        pipe(**CALL)


def test_a_changed_prompt_is_refused(vanilla: Any):
    def change(_pipe: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": given["prompt_embeds"] * 2}

    with pytest.raises(UserError, match="cannot change prompt_embeds in the middle"):
        vanilla(
            **CALL,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )


def test_an_unknown_name_lists_the_pipelines():
    with pytest.raises(AttributeError, match="use SkyReelsV2FlowCacheImageToVideoPipeline"):
        _ = flowcache.diffusers.WanFlowCachePipeline
