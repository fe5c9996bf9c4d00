"""What is wrong with a JPEG although it decodes: damaged data, or too many scans."""

from __future__ import annotations

import simplejpeg

from dinov2_core.data.decoding import MAX_PIXELS

MAX_SCANNED_PIXELS = 12 * MAX_PIXELS
"""Pixels times scans: 12 scans of the largest image, 89 of one of 12 megapixels. Each takes 1 to 6
nanoseconds; encoders make about ten scans."""

_DAMAGE = ("Corrupt JPEG data", "Inconsistent progression sequence")
_START, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"


def has_too_many_scans(content: bytes, *, num_pixels: int) -> bool:
    """Whether content is a JPEG that costs seconds; found without decoding.

    Args:
        content: Any file.
        num_pixels: Width times height.
    """
    if not content.startswith(_START):
        return False
    return content.count(_START_OF_SCAN) * num_pixels > MAX_SCANNED_PIXELS


def is_damaged_jpeg(content: bytes) -> bool:
    """Whether content is a JPEG about whose data libjpeg warns while it decodes.

    Pillow ignores the warnings and gives shifted, gray or striped pixels. libjpeg notices 97 to
    100 % of losses or zeros of 100 bytes, but only 30 to 60 % of the single flipped bits that
    change the image: valid codes may follow them.
    """
    if not content.startswith(_START):
        return False
    try:
        # An eighth of the size: all data are read, hardly any pixels computed.
        simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=1)
    except ValueError as warning:
        return str(warning).startswith(_DAMAGE)
    return False
