"""Who may talk to the explorer: this machine's own pages, and no others."""

import pytest

from upweight.explorer.guard import LOOPBACK, Guard


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:1"])
def test_names_of_this_machine_pass(host):
    assert Guard(None, LOOPBACK).refusal({"host": host, "origin": f"http://{host}"}, "POST") == ""


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.example"},
        {"host": "localhost.evil.example:7860"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "127.0.0.1.nip.io"},
        {"host": "192.168.0.7:7860"},
        {"host": "[::1"},
        {"host": "localhost:7860", "origin": "http://localhost:3000"},
        {"host": "localhost:7860", "origin": "null"},
        {"host": "localhost:7860", "origin": "http://evil.example"},
        {"host": "localhost:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"host": "localhost:7860", "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_other_pages_are_refused(headers):
    assert Guard(None, LOOPBACK).refusal(headers, "GET")


def test_a_link_from_elsewhere_may_be_followed_but_not_post():
    followed = {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    guard = Guard(None, LOOPBACK)
    assert guard.refusal(followed, "GET") == "" and guard.refusal(followed, "POST")


def test_a_server_opened_to_a_network_admits_addresses_but_no_names():
    guard = Guard(None, LOOPBACK | {"lab"}, any_address=True)
    assert guard.refusal({"host": "192.168.0.7:7860"}, "GET") == guard.refusal({"host": "lab"}, "GET") == ""
    assert guard.refusal({"host": "evil.example"}, "GET")
