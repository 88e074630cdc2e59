"""A tiny model that sees, served: images in every protocol, a batch and the prefix cache; bad ones harm nobody."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from picture_files import claimed, data_url, picture, png
from serve_process import Server
from vision_models import write_seeing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL = "tiny"
TOKENS = 8
LEAST_MIB = 300
"""By which a server's processes may grow while bad images come; one that was decoded would take more."""
LIMITS = ["--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(8 << 20)]
GOOD = data_url(png(picture(40, 30)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "allowed").mkdir()
    (folder / "allowed" / "in.png").write_bytes(png(picture(40, 30)))
    (folder / "out.png").write_bytes(png(picture(40, 30)))
    write_seeing("idefics3", folder / MODEL)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(
        folder,
        [*LIMITS, "--enable-prompt-tokens-details", "--allowed-local-media-path", str(folder / "allowed")],
        {"VLLM_METAL_MULTIMODAL_MODE": "multimodal-native"},
    )
    try:
        server.ensure(str(folder / MODEL))
        yield server
    finally:
        server.end()


def chat(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "look"}, *parts]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": 0,
        **changes,
    }


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=120, headers={"x-api-key": "none"})


def answered(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def cached(answer: Any) -> int:
    """Tokens of the prompt that were found in the cache."""
    return int((answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def test_the_same_image_in_every_protocol_and_in_a_batch(server: Server, folder: Path) -> None:
    """One text; and from the second request on the image is found in the prefix cache."""
    first = answered(post(server, "chat/completions", chat(image(GOOD))))
    text = first["choices"][0]["message"]["content"]
    again = answered(post(server, "chat/completions", chat(image(f"file://{folder}/allowed/in.png"))))
    assert again["choices"][0]["message"]["content"] == text
    assert again["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] > 36
    assert cached(first) == 0
    assert cached(again) >= 32
    other = answered(post(server, "chat/completions", chat(image(data_url(png(picture(40, 30, 5)))))))
    assert cached(other) == 0
    assert other["choices"][0]["message"]["content"] != text

    content = [{"type": "input_text", "text": "look"}, {"type": "input_image", "image_url": GOOD, "detail": "auto"}]
    asked = {"input": [{"role": "user", "content": content}], "max_output_tokens": TOKENS, "temperature": 0}
    response = answered(post(server, "responses", {"model": MODEL, **asked}))
    assert response["output"][-1]["content"][0]["text"] == text

    source = {"type": "base64", "media_type": "image/png", "data": GOOD.partition(",")[2]}
    parts = [{"type": "text", "text": "look"}, {"type": "image", "source": source}]
    messages = {"messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS, "temperature": 0}
    message = answered(post(server, "messages", {"model": MODEL, **messages}))
    assert message["content"][0]["text"] == text

    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat(image(GOOD))}
    (folder / "in.jsonl").write_text(json.dumps(line) + "\n")
    client = server.client()
    with (folder / "in.jsonl").open("rb") as opened:
        uploaded = client.files.create(file=opened, purpose="batch")
    batch = client.batches.create(input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status not in ("completed", "failed"):
        time.sleep(0.3)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None, batch
    result = json.loads(client.files.content(batch.output_file_id).text)
    assert result["response"]["body"]["choices"][0]["message"]["content"] == text


BAD = {
    "truncated": ([image(data_url(png(picture(64, 64))[:-40]))], "damaged"),
    "20,000 x 20,000": ([image(data_url(claimed(20_000, 20_000)))], "too large"),
    "a bomb": ([image(data_url(claimed(10_000, 10_000)))], "10000 x 10000 pixels"),
    "100 images": ([image(GOOD)] * 100, "at most 8 images"),
    "a file outside": ([image("file:///etc/hostname")], "not in the folder"),
    "a host": ([image("http://127.0.0.1:1/a.png")], "fetched from 127.0.0.1"),
    "audio": ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], "no audio"),
    "video": ([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}], "no video"),
    "a name without an image": ([{"type": "image_url", "image_url": None, "uuid": "x"}], "uuid"),
}


def test_bad_images_are_400_and_others_are_served(server: Server) -> None:
    """While another's answer streams; and no process grows by what is claimed."""
    pieces: list[str] = []

    def stream() -> None:
        body = chat(image(GOOD), stream=True, max_tokens=300, ignore_eos=True)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=300) as response:
            pieces.extend(line for line in response.iter_lines() if line.startswith("data:"))

    before = sum(process.memory_info().rss for process in server.processes())
    streaming = threading.Thread(target=stream)
    streaming.start()
    for name, (parts, said) in BAD.items():
        for changes in ({}, {"stream": True}) if name == "truncated" else ({},):
            refused = post(server, "chat/completions", chat(*parts, **changes))
            assert refused.status_code == 400, (name, refused.text)
            message = refused.json()["error"]["message"]
            assert said in message, (name, message)
            assert "\n" not in message, (name, message)
    streaming.join()
    assert pieces[-1].endswith("[DONE]"), pieces[-3:]
    assert "error" not in pieces[-2]
    grown = sum(process.memory_info().rss for process in server.processes()) - before
    assert grown < LEAST_MIB << 20
    answered(post(server, "chat/completions", chat(image(GOOD))))
