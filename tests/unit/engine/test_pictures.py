"""Images from clients: what becomes of good ones, and one sentence for each that is bad, before it takes memory."""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_files import claimed, data_url, picture, png
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    _resize_output_size_rescale_to_max_len,
)
from vision_models import LONGEST, released_tiles
from vllm.exceptions import VLLMValidationError

from pomarium.cluster.engine.images import connector, sight
from pomarium.cluster.engine.images.connector import PictureConnector
from pomarium.cluster.engine.images.pictures import MOST_BYTES, MOST_SIDES, PictureError, picture_of, size_for
from pomarium.cluster.engine.images.sight import SightFacts, obstacle
from pomarium.cluster.engine.intake import pictures as intake

SIDES = st.tuples(st.integers(1, 5000), st.integers(1, 5000)).filter(lambda s: max(s) <= MOST_SIDES * min(s))


@pytest.mark.parametrize("size", [(40, 30), (31, 9), (9, 31), (7, 7), (300, 20), (32, 32)], ids=str)
def test_the_first_resize_is_transformers_own(size: tuple[int, int]) -> None:
    """So the model's own processing of what is kept gives the same tiles as of what was sent."""
    sent = picture(*size)
    want, rows, columns = released_tiles(sent)
    got, got_rows, got_columns = released_tiles(picture_of(png(sent), LONGEST))
    np.testing.assert_array_equal(got, want)
    assert (got_rows, got_columns) == (rows, columns)


@given(SIDES, st.sampled_from([364, 1456, 2048, 4096]))
def test_sizes_are_transformers_and_stay(sides: tuple[int, int], edge: int) -> None:
    width, height = size_for(*sides, edge)
    assert _resize_output_size_rescale_to_max_len(sides[1], sides[0], max_len=edge) == (height, width)
    assert size_for(width, height, edge) == (width, height)


def test_kinds_of_pictures() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert picture_of(png(clear), 8).getpixel((0, 0)) == (255, 255, 255)
    palette = picture(8, 8).quantize(4)
    for image, kind in ((palette, "PNG"), (picture(8, 8).convert("CMYK"), "JPEG"), (palette, "GIF")):
        assert (picture_of(png(image, kind), 16).mode, picture_of(png(image, kind), 16).size) == ("RGB", (16, 16))
    turned = Image.Exif()
    turned[0x0112] = 6
    out = io.BytesIO()
    picture(16, 8).save(out, "JPEG", exif=turned)
    assert picture_of(out.getvalue(), 16).size == (8, 16)


BAD = {
    "truncated": (png(picture(64, 64))[:-40], "damaged"),
    "half a header": (png(picture(64, 64))[:20], "damaged|no kind that is read"),
    "20,000 x 20,000": (claimed(20_000, 20_000), "too large"),
    "6,000 x 6,000": (claimed(6_000, 6_000), "6000 x 6000 pixels, and may have 33554432"),
    "a bomb that does not say so": (claimed(5_000, 5_000), "damaged"),
    "a strip": (claimed(30_000, 3), "a side may be 200 times the other"),
    "nothing": (b"", "no kind that is read"),
    "text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no kind that is read"),
    "a TIFF": (png(picture(8, 8), "TIFF"), "no kind that is read"),
    "too many bytes": (bytes(MOST_BYTES + 1), "bytes, and may have"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_without_being_decoded(name: str) -> None:
    data, said = BAD[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PictureError, match=said) as caught:
        picture_of(data)
    assert "\n" not in str(caught.value)
    if name != "a bomb that does not say so":  # which may be decoded, and is within the bound
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_where_images_may_come_from(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "in.png").write_bytes(png(picture(8, 8)))
    (tmp_path / "out.png").write_bytes(png(picture(8, 8)))
    (allowed / "link.png").symlink_to(tmp_path / "out.png")
    named = PictureConnector(
        {"image": {"longest_edge": 32}}, allowed_local_media_path=str(allowed), allowed_media_domains=["here.example"]
    )
    assert named.fetch_image(f"file://{allowed}/in.png").size == (32, 32)
    assert named.fetch_image(data_url(png(picture(8, 8)))).size == (32, 32)
    plain = PictureConnector()
    for one, url, said in (
        (named, f"file://{tmp_path}/out.png", "not in the folder"),
        (named, f"file://{allowed}/../out.png", "not in the folder"),
        (named, f"file://{allowed}/link.png", "not in the folder"),
        (named, f"file://elsewhere{allowed}/in.png", "not in the folder"),
        (named, f"file://{allowed}/none.png", "no such file"),
        (named, "https://there.example/a.png", "fetched from there.example.*--allowed-media-domains"),
        (named, "http://here.example@there.example/a.png", "fetched from there.example"),
        (plain, "http://127.0.0.1/a.png", "fetched from 127.0.0.1"),
        (plain, f"file://{allowed}/in.png", "--allowed-local-media-path"),
        (plain, "ftp://here.example/a.png", "begins with data:"),
        (plain, "data:image/png;base64,%%%", "not valid base64"),
        (plain, "data:image/png,abc", "written data:image/png;base64"),
        (plain, data_url(b"text"), "no kind that is read"),
    ):
        with pytest.raises(VLLMValidationError, match=said):
            one.fetch_image(url)
    with pytest.raises(VLLMValidationError, match="no audio"):
        plain.fetch_audio("data:audio/wav;base64,")
    with pytest.raises(VLLMValidationError, match="media_io_kwargs is not supported"):
        PictureConnector({"image": {"image_mode": None}})


class Redirecting:
    """What vLLM's connection is asked, without a network."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    def get_bytes(self, url: str, **options: object) -> bytes:
        self.asked.append({"url": url, **options})
        return b"<html>moved</html>"


def test_redirects_are_not_followed() -> None:
    connection = Redirecting()
    one = PictureConnector({}, connection, allowed_media_domains=["here.example"])  # type: ignore[arg-type]
    with pytest.raises(VLLMValidationError, match="no kind that is read"):
        one.fetch_image("https://here.example/a.png")
    assert connection.asked[0]["allow_redirects"] is False
    assert connection.asked[0]["max_bytes"] == MOST_BYTES


def test_vllm_takes_this_connector() -> None:
    connector.install()
    assert isinstance(connector.MEDIA_CONNECTOR_REGISTRY.load("http"), PictureConnector)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"library": False}, sight.NOT_INSTALLED),
        ({"stages": 2}, "--stages"),
        ({"paged": False}, "VLLM_METAL_USE_PAGED_ATTENTION"),
        ({"options": ("--mm-processor-kwargs",)}, "--mm-processor-kwargs"),
        ({"own_scheduler": False}, "--scheduler-cls"),
        ({"tower": "there is none"}, "there is none"),
    ],
)
def test_what_stands_in_the_way_of_images(changes: dict[str, object], said: str | None) -> None:
    found = obstacle(SightFacts(**changes))  # type: ignore[arg-type]
    assert found is None if said is None else said in str(found)


IMAGE = "data:image/png;base64," + "A" * 1000


@pytest.mark.parametrize(
    ("fields", "chars"),
    [
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}]}, len(IMAGE)),
        ({"messages": [{"content": [{"type": "image_url", "image_url": IMAGE}]}]}, len(IMAGE)),
        ({"input": [{"content": [{"type": "input_image", "image_url": IMAGE}]}]}, len(IMAGE)),
        ({"input": [{"output": [{"type": "input_image", "image_url": IMAGE}]}]}, len(IMAGE)),
        ({"messages": [{"content": [{"type": "image", "source": {"type": "base64", "data": "A" * 9}}]}]}, 9),
        ({"messages": [{"content": [{"type": "tool_result", "content": [
            {"type": "image", "source": {"data": "A" * 9}}]}]}]}, 9),
        ({"messages": [{"content": [{"type": "text", "text": IMAGE}]}]}, 0),
        ({"messages": [{"content": IMAGE}]}, 0),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}]}]}, 0),
        ({"tools": [{"type": "image_url", "image_url": {"url": IMAGE}}]}, 0),
        ({"messages": [{"content": [{"type": ["image_url"], "image_url": {"url": IMAGE}}]}]}, 0),
        ({"messages": {"content": 1}, "input": 3}, 0),
    ],
)  # fmt: skip
def test_images_are_no_text_and_nothing_else_is_an_image(fields: dict[str, object], chars: int) -> None:
    assert intake.chars_of(fields) == chars
