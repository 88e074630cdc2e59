"""Where images come from: data URLs, files and hosts that the operator named. In place of vLLM's media connector.

    image_url --data: --> bytes --+
              --file: within --allowed-local-media-path --> bytes --+--picture_of, on a thread--> Image, or a 400
              --http(s): a host of --allowed-media-domains --> bytes --+

vLLM's takes any host where none is named, follows redirects to others, and decodes without a bound of its own; its
errors become 500, 422 or 501. Reading and decoding happen on threads of this module, few of them, so that neither the
loop that streams use waits nor memory grows with the number of clients. Contract: vllm/multimodal/media/connector.py.
"""

import asyncio
import base64
import binascii
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import aiohttp
import requests
import vllm.envs as envs
from PIL import Image
from vllm.connections import HTTPConnection, MediaDownloadSizeExceededError, global_http_connection
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from pomarium.cluster.engine.images.pictures import MOST_BYTES, PictureError, picture_of
from pomarium.worker.vision.families import MAX_LONGEST_EDGE

DECODERS = 2
"""Images that are decoded at once: each may take 400 MB for a moment."""
_NAME = "http"
"""Under which vLLM looks for the connector by default (VLLM_MEDIA_CONNECTOR)."""
_EDGE = "longest_edge"


def install() -> None:
    """Have vLLM load media through this. Calling it again changes nothing."""
    MEDIA_CONNECTOR_REGISTRY.register(_NAME)(PictureConnector)


@cache
def _decoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(DECODERS, "images")


class PictureConnector(MediaConnector):
    """See the module. Raises VLLMValidationError, which is 400 over HTTP, for whatever is wrong with an image."""

    def __init__(
        self,
        media_io_kwargs: dict[str, dict[str, Any]] | None = None,
        connection: HTTPConnection = global_http_connection,
        *,
        allowed_local_media_path: str = "",
        allowed_media_domains: list[str] | None = None,
    ) -> None:
        """Arguments as vLLM's. media_io_kwargs: {"image": {"longest_edge": pixels}}, which images/sight.py sets."""
        super().__init__(
            {},
            connection,
            allowed_local_media_path=allowed_local_media_path,
            allowed_media_domains=allowed_media_domains,
        )
        given = (media_io_kwargs or {}).get("image", {})
        edge = given.get(_EDGE, MAX_LONGEST_EDGE)
        strange = (media_io_kwargs or {}).keys() - {"image"} or given.keys() - {_EDGE}
        if strange or not isinstance(edge, int) or not 1 <= edge <= MAX_LONGEST_EDGE:
            _refuse("media_io_kwargs is not supported: leave it out.")
        self._edge = edge

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """The image at `image_url`."""
        return self._decoded(self._fetched(image_url) if _is_web(image_url) else self._read(image_url))

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Image.Image:
        """The image at `image_url`, read and decoded on a thread."""
        data = await self._fetched_async(image_url) if _is_web(image_url) else None
        loop = asyncio.get_running_loop()

        def load() -> Image.Image:
            return self._decoded(self._read(image_url) if data is None else data)

        return await loop.run_in_executor(_decoders(), load)

    def fetch_audio(self, audio_url: str) -> NoReturn:
        """Refused."""
        _refuse_modality("audio")

    async def fetch_audio_async(self, audio_url: str) -> NoReturn:
        """Refused."""
        _refuse_modality("audio")

    def fetch_video(self, video_url: str, **options: Any) -> NoReturn:
        """Refused."""
        _refuse_modality("video")

    async def fetch_video_async(self, video_url: str, **options: Any) -> NoReturn:
        """Refused."""
        _refuse_modality("video")

    def _decoded(self, data: bytes) -> Image.Image:
        try:
            return picture_of(data, self._edge)
        except PictureError as error:
            raise VLLMValidationError(str(error), parameter="image_url") from error

    def _read(self, url: str) -> bytes:
        """Of a data URL or a file's."""
        scheme = url[:5].lower()
        if scheme == "data:":
            return _data(url)
        if scheme != "file:":
            _refuse("An image_url begins with data:, http:, https: or file:, and this one does not.")
        return self._file(url)

    def _file(self, url: str) -> bytes:
        folder = self.allowed_local_media_path
        if folder is None:
            _refuse(
                "No files are read here: send the image in a data: URL (the operator sets --allowed-local-media-path)."
            )
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path)).resolve()
            if parts.netloc not in ("", "localhost") or folder not in path.parents:
                _refuse("The file is not in the folder whose images are read (--allowed-local-media-path).")
            if not path.is_file():
                _refuse("There is no such file in the folder whose images are read.")
            with path.open("rb") as opened:
                return opened.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            raise VLLMValidationError(
                f"The file is not read: {type(error).__name__}.", parameter="image_url"
            ) from error

    def _host_allowed(self, url: str) -> None:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            host = None
        if not host or host not in self.allowed_media_domains:
            _refuse(
                f"No images are fetched from {host or 'there'}: send the image in a data: URL (the operator names "
                "hosts with --allowed-media-domains)."
            )

    def _fetched(self, url: str) -> bytes:
        self._host_allowed(url)
        try:
            data: bytes = self.connection.get_bytes(
                url, timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT, allow_redirects=False, max_bytes=MOST_BYTES
            )
        except (OSError, ValueError, MediaDownloadSizeExceededError, requests.exceptions.RequestException) as error:
            raise _not_fetched(error) from error
        return data

    async def _fetched_async(self, url: str) -> bytes:
        self._host_allowed(url)
        try:
            data: bytes = await self.connection.async_get_bytes(
                url, timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT, allow_redirects=False, max_bytes=MOST_BYTES
            )
        except (OSError, ValueError, TimeoutError, MediaDownloadSizeExceededError, aiohttp.ClientError) as error:
            raise _not_fetched(error) from error
        return data


def _is_web(url: str) -> bool:
    return url[:5].lower() == "http:" or url[:6].lower() == "https:"


def _data(url: str) -> bytes:
    kind, comma, text = url[5:].partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        _refuse("An image in a data: URL is written data:image/png;base64,... and this one is not.")
    if len(text) > MOST_BYTES * 4 // 3 + 4:
        _refuse(f"An image has more than {MOST_BYTES} bytes: send a smaller one.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise VLLMValidationError("An image's data: URL is not valid base64.", parameter="image_url") from error


def _not_fetched(error: Exception) -> VLLMValidationError:
    said = f"HTTP status {error.status}" if isinstance(error, aiohttp.ClientResponseError) else type(error).__name__
    if isinstance(error, MediaDownloadSizeExceededError):
        said = f"it has more than {MOST_BYTES} bytes"
    return VLLMValidationError(f"An image could not be fetched: {said}.", parameter="image_url")


def _refuse_modality(modality: str) -> NoReturn:
    _refuse(f"This model takes images, no {modality}: leave it out.")


def _refuse(sentence: str) -> NoReturn:
    raise VLLMValidationError(sentence, parameter="image_url")
