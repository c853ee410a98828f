"""Where the pictures of a prompt come from: files, data: URLs, hosts that are allowed; limits; and which class loads a checkpoint."""

import base64
import io
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from transformers import AutoConfig

from ivg.errors import PromptError
from ivg.models.images import ImageReader
from ivg.models.processor import can_read_images, image_class
from ivg.settings.images import ImagesConfig
from ivg.types import Prompt

Pillow = pytest.importorskip("PIL.Image")


def png(width=4, height=3):
    file = io.BytesIO()
    Pillow.new("RGB", (width, height), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


def prompt(*sources):
    parts = [{"type": "image_url", "image_url": {"url": source}} for source in sources]
    return Prompt.of([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}])


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def content(reader, source):
    return reader.read(prompt(source)).images[0].data


def refusal(reader, *sources):
    with pytest.raises(PromptError) as caught:
        reader.read(prompt(*sources))
    return str(caught.value)


@contextmanager
def web(answer):
    """A host at 127.0.0.1: ``answer(handler)`` writes what it says."""

    class Handler(BaseHTTPRequestHandler):
        do_GET = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler, body, status=200, **headers):
    handler.send_response(status)
    for name, value in {"content-length": len(body), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def test_files_and_data_urls(tmp_path):
    (tmp_path / "a b.png").write_bytes(png())
    reader = ImageReader()
    for source in (
        str(tmp_path / "a b.png"),
        f"file://{tmp_path}/a%20b.png",
        data_url(png()),
        data_url(png()).replace(";base64,", ";base64,\n"),
    ):
        assert content(reader, source) == png()
    assert content(reader, "data:,a%20b") == b"a b"
    found = reader.read(prompt(data_url(png())))
    assert reader.read(found) is found
    assert reader.decode(found.images[0]).size == (4, 3)
    assert found != prompt(data_url(png()))
    assert found == found.without_data
    assert found.without_data.images[0].data is None
    assert len(found.images[0].source) < 10
    assert content(reader, found.images[0].plain["url"]) == png()
    assert found != reader.read(prompt(data_url(png(5, 3))))


@pytest.mark.parametrize("source", ["data:image/png;base64,abc", "data:image/png;base64,ä", "data:nothing"])
def test_data_urls_that_are_none(source):
    assert "is no data: URL" in refusal(ImageReader(), source)


def test_files_that_are_no_pictures(tmp_path):
    reader = ImageReader()
    assert refusal(reader, str(tmp_path / "nothing.png")).startswith(f"no picture at {tmp_path}")
    assert refusal(reader, str(tmp_path)).startswith("no picture at ")
    assert refusal(reader, "/dev/zero").startswith("no picture at /dev/zero")
    assert refusal(reader, "a\0b").startswith("no picture at ")
    with pytest.raises(PromptError, match="is no picture that Pillow can read"):
        reader.decode(reader.read(prompt(data_url(b"no picture"))).images[0])
    with pytest.raises(PromptError, match="is no picture that Pillow can read"):
        reader.decode(reader.read(prompt(data_url(png()[:40]))).images[0])


def test_limits(tmp_path):
    (tmp_path / "p.png").write_bytes(png(200, 200) + b"x" * 2000)
    small = ImageReader(ImagesConfig(max_bytes=1024, max_pixels=11, max_images=2))
    assert "larger than 1024 bytes" in refusal(small, str(tmp_path / "p.png"))
    assert "larger than 1024 bytes" in refusal(small, data_url(b"x" * 1025))
    assert "larger than 1024 bytes" in refusal(small, data_url(b"x" * 9999))
    assert refusal(small, *["a"] * 3) == "the prompt has 3 pictures\n  expected at most 2 (images.max_images)"
    with pytest.raises(PromptError, match="has 4 x 3 pixels"):
        small.decode(small.read(prompt(data_url(png()))).images[0])


def test_clients_read_only_files_that_they_may(tmp_path):
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    for folder in (allowed, tmp_path):
        (folder / "p.png").write_bytes(png())
    (allowed / "link.png").symlink_to(tmp_path / "p.png")
    assert "may not read" in refusal(ImageReader(local=False), str(allowed / "p.png"))
    reader = ImageReader(ImagesConfig(allowed_local_media_path=str(allowed)), local=False)
    assert content(reader, str(allowed / "p.png")) == png()
    assert content(reader, data_url(png())) == png()
    for source in (tmp_path / "p.png", allowed / "link.png", allowed / ".." / "p.png", tmp_path / "nothing", "/etc/passwd"):
        assert "may not read" in refusal(reader, str(source))


def test_hosts_are_refused_unless_they_are_allowed():
    with web(lambda handler: send(handler, png())) as port:
        url = f"http://127.0.0.1:{port}/p.png"
        assert refusal(ImageReader(), url).startswith("pictures from 127.0.0.1 are not allowed here")
        assert refusal(ImageReader(ImagesConfig(allowed_media_domains=("example.com",))), url).startswith("pictures from 127.0.0.1")
        for allowed in ("127.0.0.1", "*"):
            assert content(ImageReader(ImagesConfig(allowed_media_domains=(allowed,))), url) == png()
    assert "not allowed" in refusal(ImageReader(ImagesConfig(allowed_media_domains=("good.org",))), "https://good.org@evil.org/p.png")


def test_redirects_lead_to_allowed_hosts_only():
    def answer(handler):
        where = {"/out": "http://localhost:1/p.png", "/file": "file:///etc/passwd", "/in": "/p.png"}.get(handler.path)
        send(handler, b"" if where else png(), 302 if where else 200, **({"location": where} if where else {}))

    with web(answer) as port:
        reader = ImageReader(ImagesConfig(allowed_media_domains=("127.0.0.1",)))
        assert content(reader, f"http://127.0.0.1:{port}/in") == png()
        assert refusal(reader, f"http://127.0.0.1:{port}/out").startswith("pictures from localhost are not allowed")
        assert "file:///etc/passwd" in refusal(reader, f"http://127.0.0.1:{port}/file")


def test_hosts_that_fail():
    limits = ImagesConfig(allowed_media_domains=("127.0.0.1",), max_bytes=2000, timeout=0.5)
    hang = threading.Event()

    def answer(handler):
        if handler.path == "/slow":
            hang.wait(5)
        send(handler, b"x" * 5000, 404 if handler.path == "/none" else 200)

    with web(answer) as port:
        reader = ImageReader(limits)
        assert "larger than 2000 bytes" in refusal(reader, f"http://127.0.0.1:{port}/large")
        assert "404" in refusal(reader, f"http://127.0.0.1:{port}/none")
        assert refusal(reader, f"http://127.0.0.1:{port}/slow").startswith("cannot fetch the picture")
        hang.set()
    assert refusal(reader, f"http://127.0.0.1:{port}/gone").startswith("cannot fetch the picture")


@pytest.mark.parametrize(
    ("kind", "wanted", "name"),
    [
        ("llama", True, "AutoModelForCausalLM"),
        ("llava", False, "AutoModelForImageTextToText"),
        ("qwen2_vl", False, "AutoModelForImageTextToText"),
        ("gemma3", False, "AutoModelForCausalLM"),
        ("gemma3", True, "AutoModelForImageTextToText"),
        ("llama4", False, "AutoModelForCausalLM"),
        ("llama4", True, "AutoModelForImageTextToText"),
    ],
)
def test_the_class_that_loads_a_checkpoint(kind, wanted, name):
    config = AutoConfig.for_model(kind)
    assert image_class(config, wanted=wanted).__name__ == name
    assert can_read_images(config) == (kind != "llama")
