"""Every pipeline class that diffusers exports, what it makes of what, and which of them are left out, and why."""

from __future__ import annotations

import inspect
from typing import Literal, cast

import diffusers
from diffusers import DiffusionPipeline

Kind = Literal["text-to-image", "text-to-video", "image-to-image", "image-to-video"]

PICTURES = ("image", "images", "control_image", "input_images", "cond_image", "example_image", "gligen_images")
"""Arguments that take a picture."""

CLIPS = ("video", "control_video", "conditioning_frames", "pose_video")
"""Arguments that take a clip."""

PICTURE_OPTIONAL = frozenset(
    f"{name}Pipeline"
    for name in (
        *("AnyFlow", "AnyFlowFAR", "BriaFibo2", "Cosmos2_5_PredictBase", "Cosmos3Omni", "DreamLite", "DreamLiteMobile"),
        *("Flux2", "Flux2Klein", "Flux2KleinKV", "GlmImage", "Helios", "HeliosPyramid", "Kandinsky6TI2VA"),
        *("LTXCondition", "LTXI2VLongMultiPrompt", "OmniGen", "QwenImage21", "StableCascadeCombined", "UniDiffuser"),
        *("WanVACE", "ZImageOmni"),
    )
)
"""Pipelines that take a picture or a clip, and make one from a text alone as well."""

_PART = "a part of a pipeline: it makes embeddings, or takes them"
_STATE = "an editing session: its calls depend on earlier ones"

LEFT_OUT: dict[str, str] = {
    "AnimateDiffSparseControlNetPipeline": "takes a clip",
    "AudioLDM2Pipeline": "makes sound",
    "AudioLDMPipeline": "makes sound",
    "AceStepPipeline": "makes sound",
    "DiffusionGemmaPipeline": "makes text",
    "EasyAnimateInpaintPipeline": "takes a clip",
    "FluxPriorReduxPipeline": _PART,
    "IFImg2ImgSuperResolutionPipeline": "takes a picture at two sizes",
    "IFInpaintingSuperResolutionPipeline": "takes a picture at two sizes",
    "KandinskyImg2ImgPipeline": _PART,
    "KandinskyInpaintPipeline": _PART,
    "KandinskyPipeline": _PART,
    "KandinskyPriorPipeline": _PART,
    "KandinskyV22ControlnetImg2ImgPipeline": _PART,
    "KandinskyV22ControlnetPipeline": _PART,
    "KandinskyV22Img2ImgPipeline": _PART,
    "KandinskyV22InpaintPipeline": _PART,
    "KandinskyV22Pipeline": _PART,
    "KandinskyV22PriorEmb2EmbPipeline": _PART,
    "KandinskyV22PriorPipeline": _PART,
    "LEditsPPPipelineStableDiffusion": _STATE,
    "LEditsPPPipelineStableDiffusionXL": _STATE,
    "LLaDA2Pipeline": "makes text",
    "LTX2VideoDiffusionDecodePipeline": _PART,
    "LongCatAudioDiTPipeline": "makes sound",
    "MarigoldDepthPipeline": "measures depth",
    "MarigoldIntrinsicsPipeline": "measures surfaces",
    "MarigoldNormalsPipeline": "measures surfaces",
    "MusicLDMPipeline": "makes sound",
    "RePaintPipeline": "takes no text; unconditional",
    "SanaWMLTX2Refiner": _PART,
    "ShapEImg2ImgPipeline": "makes 3D objects",
    "ShapEPipeline": "makes 3D objects",
    "StableAudio3AudioToAudioPipeline": "makes sound",
    "StableAudio3InpaintPipeline": "makes sound",
    "StableAudio3Pipeline": "makes sound",
    "StableAudioPipeline": "makes sound",
    "StableCascadeDecoderPipeline": _PART,
    "StableCascadePriorPipeline": _PART,
    "StableDiffusionDiffEditPipeline": "takes latents that an earlier call has made",
    "StableDiffusionLDM3DPipeline": "makes a picture together with its depth",
    "StableDiffusionPix2PixZeroPipeline": "takes latents that an earlier call has made",
    "VisualClozeGenerationPipeline": "takes a grid of pictures",
    "VisualClozePipeline": "takes a grid of pictures",
    "WuerstchenDecoderPipeline": _PART,
    "WuerstchenPriorPipeline": _PART,
}
"""Keyed by class name; pipelines for neither text nor pictures are recognised by their arguments."""


def exported() -> list[str]:
    """The names of every pipeline class of the installed diffusers."""
    return [name for name in dir(diffusers) if _is_pipeline(name)]


def _is_pipeline(name: str) -> bool:
    found = getattr(diffusers, name) if name[0].isupper() and "Flax" not in name and "Onnx" not in name else None
    is_class = inspect.isclass(found) and issubclass(found, DiffusionPipeline)
    return is_class and found is not DiffusionPipeline and "__call__" in vars(found) | vars(found.__mro__[1])


def arguments(name: str) -> list[str]:
    """The names of the arguments of the pipeline's call."""
    return list(inspect.signature(getattr(diffusers, name).__call__).parameters)


def left_out(name: str) -> str | None:
    """Why the pipeline is not tried; ``None`` for one that is."""
    takes = arguments(name)
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    if "prompt" not in takes and not set(takes) & set(PICTURES):
        return "takes a clip" if set(takes) & set(CLIPS) else "takes neither a text nor a picture"
    return "takes a clip" if set(takes) & set(CLIPS) and name not in PICTURE_OPTIONAL else None


def kind(name: str) -> Kind:
    """The pipeline's input and output kinds; a pipeline with an optional picture counts as text input."""
    takes = set(arguments(name))
    source = "image" if takes & set(PICTURES) and name not in PICTURE_OPTIONAL else "text"
    is_clip = takes & {"num_frames", "video_length", "num_videos_per_prompt", "frame_window_size"}
    target = "video" if is_clip or "Video" in name else "image"
    return cast(Kind, f"{source}-to-{target}")
