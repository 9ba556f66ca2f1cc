"""lrq_jax.huge_pages: who is restarted, with what, and that it happens once."""

import os
import subprocess
import sys

import pytest

from lrq_jax import huge_pages


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What would be started, on a machine that gives huge pages on request."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    policy = tmp_path / "enabled"
    policy.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_POLICY", policy)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("LRQ_HUGE_PAGES", raising=False)
    return calls


def test_the_same_command_is_started_with_one_variable_more(started, monkeypatch):
    monkeypatch.setenv("OTHER", "kept")
    huge_pages.restart_with_huge_pages()
    ((program, command, environment),) = started
    assert (program, command) == (sys.executable, sys.orig_argv)
    assert environment == {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_other_tunables_are_kept(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    huge_pages.restart_with_huge_pages()
    assert started[0][2]["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    assert huge_pages.requested("glibc.malloc.hugetlb=0") == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize(
    "reason", ["asked for", "refused", "off", "everybody", "nobody", "no policy", "musl", "old"]
)
def test_nothing_is_started_where_nothing_is_gained(reason, started, monkeypatch, tmp_path):
    policy, libraries = tmp_path / "enabled", {"musl": ("", ""), "old": ("glibc", "2.31")}
    if reason in libraries:
        monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: libraries[reason])
    if reason in ("asked for", "refused"):
        value = int(reason == "asked for")
        monkeypatch.setenv("GLIBC_TUNABLES", f"glibc.malloc.hugetlb={value}")
    if reason == "off":
        monkeypatch.setenv("LRQ_HUGE_PAGES", "0")
    if reason == "everybody":
        policy.write_text("[always] madvise never\n")
    if reason == "nobody":
        policy.write_text("always madvise [never]\n")
    if reason == "no policy":
        policy.unlink()
    huge_pages.restart_with_huge_pages()
    assert started == []


@pytest.mark.parametrize(
    ("policy", "tunables", "expected"),
    [
        ("always [madvise] never", "glibc.malloc.check=1:glibc.malloc.hugetlb=1", True),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", False),
        ("always [madvise] never", "", False),
        ("[always] madvise never", "", True),
        ("always madvise [never]", "glibc.malloc.hugetlb=1", False),
        (None, "glibc.malloc.hugetlb=1", False),
    ],
)
@pytest.mark.usefixtures("started")
def test_who_gets_huge_pages(tmp_path, policy, tunables, expected):
    if policy is None:
        (tmp_path / "enabled").unlink()
    else:
        (tmp_path / "enabled").write_text(policy + "\n")
    assert huge_pages.given(tunables) == expected


def test_old_libraries_give_no_huge_pages_on_request(started, monkeypatch):
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.31"))
    assert not huge_pages.given("glibc.malloc.hugetlb=1")


def test_a_failed_start_is_said_and_the_program_goes_on(started, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no such file")

    monkeypatch.setattr(os, "execve", refuse)
    huge_pages.restart_with_huge_pages()
    printed = capsys.readouterr()
    assert "no such file" in printed.out + printed.err


def test_a_program_is_restarted_once_with_its_arguments(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from lrq_jax import huge_pages\n"
        "print('started', os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "huge_pages._on_request = lambda: True\n"
        "huge_pages.restart_with_huge_pages()\n"
        "print(sys.argv[1:], os.getpid())\n"
    )
    removed = ("GLIBC_TUNABLES", "LRQ_HUGE_PAGES")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    command = [sys.executable, str(program), "--a=b c", "d"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=120)
    assert output.splitlines() == [
        "started None",
        "started glibc.malloc.hugetlb=1",
        f"['--a=b c', 'd'] {process.pid}",
    ]
