"""MP4 files that every browser plays: H.264, 4:2:0, index in front."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from haste_compile.errors import InputError


def write_mp4(path: Path, video: np.ndarray, *, fps: int, crf: int = 16) -> None:
    """Write float frames [F, H, W, 3] in [0, 1]; H and W even.

    Args:
        path: the file to write.
        video: the frames.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) to 51; 16 shows no loss to the eye.

    Raises:
        InputError: another shape or dtype, or an odd size, which 4:2:0 cannot hold.
    """
    is_video = video.ndim == 4 and video.shape[-1] == 3 and video.dtype.kind == "f"
    if not is_video or any(n % 2 for n in video.shape[1:3]):
        raise InputError(
            found=f"{video.dtype} {list(video.shape)}",
            wanted="float frames [F, H, W, 3] with even H and W",
            where=f"the video for {path.name}",
            fix="Generate at a width and height that are multiples of 16, as Wan asks anyway.",
        )
    frames = np.ascontiguousarray((video * 255.0).round().clip(0, 255).astype(np.uint8))
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> np.ndarray:
    """Every frame of a file, as uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
