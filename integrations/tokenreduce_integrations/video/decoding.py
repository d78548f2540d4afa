"""Frames of a video file at regular times, decoded one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenreduce.errors import MediaError, MissingExtra

if TYPE_CHECKING:
    import numpy as np

#: A file whose pictures end this much before its stated duration is taken for truncated.
TOLERATED_SECONDS, TOLERATED_SHARE = 2.0, 0.1


class VideoFile:
    """A video file; it is opened anew for each pass over its frames.

    Args:
        path: any file that FFmpeg reads.

    Raises:
        MissingExtra: if PyAV is not installed.
        MediaError: if the file cannot be read, or holds no pictures.
    """

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError as error:
            raise MissingExtra(
                "reading video files needs the package 'av'. Run: pip install 'tokenreduce[video]'"
            ) from error
        self._av: Any = av
        self.path = path
        with self._open() as (container, _):
            #: Seconds that the container states, or None.
            self.duration = None if container.duration is None else container.duration / 1e6

    def frames(self, fps: float) -> Iterator[np.ndarray]:
        """``(height, width, 3)`` RGB at times 0, 1 / fps, 2 / fps, ... from the first picture on.

        At each of these times it is the latest picture that is not later, so that files of variable
        frame rate give frames at a constant one. One picture is held at a time.

        Raises:
            MediaError: if decoding fails, or the pictures end long before the stated duration.
        """
        shown: Any = None
        first = 0.0
        count = 0
        with self._open() as (container, stream):
            stream.thread_type = "AUTO"
            for picture in container.decode(stream):
                if picture.time is None:
                    continue
                if shown is None:
                    first = picture.time
                while shown is not None and first + count / fps < picture.time:
                    yield shown.to_ndarray(format="rgb24")
                    count += 1
                shown = picture
            if shown is None:
                raise MediaError(f"{self.path}: holds no picture that can be decoded.")
            while first + count / fps <= shown.time:
                yield shown.to_ndarray(format="rgb24")
                count += 1
        end = shown.time - first
        if self.duration and self.duration - end > max(
            TOLERATED_SECONDS, TOLERATED_SHARE * self.duration
        ):
            raise MediaError(
                f"{self.path}: its pictures end at {end:.1f} s of {self.duration:.1f} s; the file "
                "is truncated or damaged. Cut it to what is there: ffmpeg -i FILE -c copy CUT.mp4"
            )

    def count(self, fps: float) -> int:
        """How many pictures :meth:`frames` will give, without decoding them.

        By the times of the pictures, else by the stated duration; 0 if the file states neither.

        Raises:
            MediaError: if the file cannot be read.
        """
        first, last = math.inf, -math.inf
        with self._open() as (container, stream):
            for packet in container.demux(stream):
                if packet.pts is not None:
                    time = float(packet.pts * stream.time_base)
                    first, last = min(first, time), max(last, time)
        if last < first:
            return round((self.duration or 0) * fps)
        count = int((last - first) * fps)
        while first + count / fps <= last:
            count += 1
        return count

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        errors = (self._av.error.FFmpegError, OSError, ValueError)
        try:
            with self._av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise MediaError(
                        f"{self.path}: holds no pictures, only sound or text. Give a video file."
                    )
                yield container, container.streams.video[0]
        except MediaError:
            raise
        except errors as error:
            raise MediaError(
                f"{self.path}: cannot be decoded: {error}. Check that it plays: ffplay FILE"
            ) from error
