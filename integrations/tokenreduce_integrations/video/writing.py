"""Clips to files: GIF by Pillow, anything else that FFmpeg writes by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from tokenreduce.errors import MediaError, MissingExtra

#: Files of these kinds move.
MOVING = {".gif", ".mp4", ".mkv", ".mov", ".webm"}


def write_clip(path: Path, pictures: Sequence[Image.Image], *, fps: float) -> None:
    """Write a clip.

    Args:
        path: a file of a kind in :data:`MOVING`.
        pictures: at least one; of one size.
        fps: pictures a second.

    Raises:
        MissingExtra: if PyAV is not installed, for other files than GIF.
        MediaError: if the file cannot be written.
    """
    try:
        if path.suffix.lower() == ".gif":
            first, *rest = pictures
            first.save(path, save_all=True, append_images=rest, duration=1000 / fps, loop=0)
            return
        _encode(path, pictures, fps)
    except (OSError, ValueError) as error:
        raise MediaError(
            f"{path}: the clip cannot be written: {error}. Give a .gif or .mp4 path in a folder "
            "that exists and may be written to."
        ) from error


def _encode(path: Path, pictures: Sequence[Image.Image], fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise MissingExtra(
            f"writing {path.suffix} files needs the package 'av'. Run: pip install "
            "'tokenreduce[video]', or give a .gif path."
        ) from error
    library: Any = av
    codec = "libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264"
    with library.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        # The pixel format that players know halves the colours' resolution in both directions.
        stream.width, stream.height = (side + side % 2 for side in pictures[0].size)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            whole = picture.convert("RGB").crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(library.VideoFrame.from_image(whole)))
        container.mux(stream.encode())
