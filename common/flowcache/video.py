"""Read clips and pictures, write clips: the names that scripts import, wherever the code lies."""

from flowcache.runtime.video import VideoWriter, probe, read_image, read_video, stream_video

__all__ = ["VideoWriter", "probe", "read_image", "read_video", "stream_video"]
