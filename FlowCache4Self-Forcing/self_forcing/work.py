"""What a run does, derived once from its settings: chunks, ticks, FLOPs, bytes."""


def chunks_of(num_frames: int, *, size: int, is_first_alone: bool = False) -> list[range]:
    """Cut latent frames into chunks.

    Example: 7 frames in chunks of 3 with the first frame alone are 0..0, 1..3, 4..6.
    """
    starts = [*range(1, num_frames, size)] if is_first_alone else [*range(0, num_frames, size)]
    starts = [0, *starts] if is_first_alone else starts
    return [range(a, b) for a, b in zip(starts, [*starts[1:], num_frames], strict=True)]
