"""Published files: over https and whole, or not at all."""

from __future__ import annotations

import io
import urllib.request
from http.client import HTTPMessage

import pytest

from dicom_node.errors import ModelRefused
from dicom_node.fetching import OnlyHttps, fetch

MEANT = "0" * 64


def nothing(done: int, total: int) -> None:
    """A progress that nobody watches."""


@pytest.mark.parametrize("url", ["http://host.example/model.bin", "file:///etc/hostname", "ftp://host.example/x"])
def test_only_https_is_fetched(tmp_path, url):
    with pytest.raises(ModelRefused, match="only https"):
        fetch(url, tmp_path / "model.bin", MEANT, nothing)

    assert list(tmp_path.iterdir()) == []


def sent_to(url):
    asked = urllib.request.Request("https://host.example/model.bin")
    return OnlyHttps().redirect_request(asked, io.BytesIO(), 302, "Found", HTTPMessage(), url)


def test_a_server_may_send_us_elsewhere_but_not_out_of_https():
    assert sent_to("https://other.example/model.bin").full_url == "https://other.example/model.bin"

    with pytest.raises(ModelRefused, match="only https"):
        sent_to("http://other.example/model.bin")
