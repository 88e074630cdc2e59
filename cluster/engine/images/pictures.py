"""Bytes that a client sent -> a picture of bounded size, or one sentence. Pure, but for Pillow.

    bytes --Pillow reads the header--> format, width, height --bounds--> decoded, upright, RGB --resized--> Image

What is claimed is looked at before anything is decoded: a file of some kilobytes may stand for gigapixels. The first
resize of the model's own processing is done here, so that no request holds a large picture while it waits; that
processing then finds nothing to resize (transformers/models/idefics3, get_resize_output_image_size).
"""

import struct
import zlib
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from pomarium.worker.vision.families import MAX_LONGEST_EDGE

MOST_BYTES = 20 << 20
"""Of an image's file."""
MOST_PIXELS = 1 << 25
"""33.5 million: a camera's, which take 100 MB as RGB while they are resized."""
MOST_SIDES = 200
"""Times that one side may be as long as the other."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Whose decoders are used; of an animation the first frame counts. Others of Pillow's run programs, or are rarely
looked after."""
_BACKGROUND = (255, 255, 255)
_DAMAGED: tuple[type[Exception], ...] = (
    *(OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError),
    *(AssertionError, struct.error, zlib.error),
)
"""What Pillow's readers of formats and of EXIF raise for damaged files."""


class PictureError(ValueError):
    """What is wrong with an image, as a sentence for the client."""


def picture_of(data: bytes, longest_edge: int = MAX_LONGEST_EDGE) -> Image.Image:
    """The picture in `data`, RGB, transparent parts white, its longer side `longest_edge` pixels.

    Raises:
        PictureError: it is none, too large, or damaged.
    """
    if len(data) > MOST_BYTES:
        raise PictureError(f"An image has {len(data)} bytes, and may have {MOST_BYTES}: send a smaller one.")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            return _resized(_rgb(ImageOps.exif_transpose(image)), longest_edge)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, which lies above ours
        raise PictureError(f"An image is too large: it may have {MOST_PIXELS} pixels.") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"An image is of no kind that is read: send {', '.join(FORMATS[:-1])} or BMP.") from error
    except _DAMAGED as error:
        raise PictureError(f"An image is damaged: {' '.join(str(error).split())[:200]}.") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise PictureError(
            f"An image has {width} x {height} pixels, and may have {MOST_PIXELS}: send it smaller, models see no more."
        )
    if max(width, height) > MOST_SIDES * min(width, height):
        raise PictureError(f"An image has {width} x {height} pixels: a side may be {MOST_SIDES} times the other.")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        behind = Image.new("RGB", image.size, _BACKGROUND)
        behind.paste(image, mask=image.getchannel("A"))
        return behind
    return image.convert("RGB")


def _resized(image: Image.Image, longest_edge: int) -> Image.Image:
    width, height = size_for(*image.size, longest_edge)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def size_for(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """Width and height with the longer side `longest_edge`, the other in proportion and even.

    Of its own result it gives the same, where `longest_edge` is no less than MOST_SIDES, as in all releases.
    """
    longest_edge = min(longest_edge, MAX_LONGEST_EDGE)
    ratio = width / height
    if width >= height:
        other = int(longest_edge / ratio)
        return longest_edge, max(1, other + other % 2)
    other = int(longest_edge * ratio)
    return max(1, other + other % 2), longest_edge
