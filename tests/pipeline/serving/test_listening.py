import socket

import pytest

from pipeline.config import ServeConfig
from pipeline.errors import UserError
from pipeline.serving.listening import free_port, url
from tests import ports


def test_a_port_in_use_and_a_foreign_host_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{taken}.*in use.*--port"):
            free_port(ServeConfig(port=taken))
    with pytest.raises(UserError, match=r"192\.0\.2\.1:8000"):
        free_port(ServeConfig(host="192.0.2.1"))
    port = ports.free_port()
    assert free_port(ServeConfig(port=port)) == port
    assert free_port(ServeConfig(port=0)) > 0


def test_an_address_of_six_is_bracketed() -> None:
    assert url(ServeConfig(host="::1", port=80)) == "http://[::1]:80"
