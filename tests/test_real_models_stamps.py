"""How the loaders find what they need: packages, and pictures out of a .deb; without weights and without a network."""

from __future__ import annotations

import io
import tarfile

import pytest

from tests.real_models import data_lines, package_folder, share, stamps

PICTURE = f"./{stamps.INSIDE}/food/pear.png"


def ar(*members):
    """An ar archive as dpkg writes it, from (name, content)."""
    parts = [b"!<arch>\n"]
    for name, content in members:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        parts += [header, content, b"\n" * (len(content) % 2)]
    return b"".join(parts)


def tar_xz(*names):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:xz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"here"))
    return file.getvalue()


def deb(*names):
    return ar(("debian-binary", b"2.0"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar_xz(*names)))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("MONO_QUANT_FX_STAMPS", raising=False)
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(stamps.Path, "home", lambda: tmp_path)
    return tmp_path / ".cache" / "mono_quant_fx"


def test_a_missing_package_is_skipped_at_home_and_fails_in_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_weights is missing: pip install it"):
        package_folder("no_such_weights", "pip install it")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no_such_weights is missing: pip install it"):
        package_folder("no_such_weights", "pip install it")


@pytest.mark.parametrize("name", ["a", "bb"])
def test_an_ar_member_is_found_behind_members_of_odd_size(name):
    archive = ar(("first", b"odd"), ("second/", b"even"), (name, b"content"))
    assert stamps.ar_member(archive, "second") == b"even"
    assert stamps.ar_member(archive, name) == b"content"


@pytest.mark.parametrize("archive", [b"", b"PK\x03\x04 no ar", ar(("control.tar.xz", b"odd"))])
def test_an_archive_without_the_member_is_refused(archive):
    with pytest.raises(OSError, match=r"^no data\.tar\.xz in the archive$"):
        stamps.ar_member(archive, "data.tar.xz")


def test_pictures_alone_are_unpacked_and_a_second_time_changes_nothing(tmp_path):
    target = tmp_path / "cache" / "stamps"
    stamps.unpack(deb(PICTURE, "./usr/share/pear.ogg"), target)
    assert [p.name for p in target.rglob("*") if p.is_file()] == ["pear.png"]
    stamps.unpack(deb(PICTURE.replace("pear", "plum")), target)
    assert [p.name for p in target.rglob("*") if p.is_file()] == ["pear.png"]
    assert [p.name for p in target.parent.iterdir()] == ["stamps"]


@pytest.mark.parametrize("outside", ["../out.png", "/../out.png"])
def test_a_member_that_leads_outside_leaves_nothing_behind(tmp_path, outside):
    with pytest.raises(tarfile.FilterError):
        stamps.unpack(deb(PICTURE, outside), tmp_path / "cache" / "stamps")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "out.png").exists()


def test_another_file_than_the_pinned_one_is_refused(home, monkeypatch):
    monkeypatch.setattr(stamps.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(deb(PICTURE)))
    with pytest.raises(OSError, match=f"^sha256 is [0-9a-f]{{64}}, not {stamps.SHA256}$"):
        stamps.fetch()
    with pytest.raises(pytest.fail.Exception, match=r"tuxpaint-stamps-default .*is missing: unpack http"):
        stamps.folder()
    assert not home.exists()


def test_the_pinned_file_is_unpacked_once(home, monkeypatch):
    fetched = []
    monkeypatch.setattr(stamps, "fetch", lambda: fetched.append(1) or deb(PICTURE))
    assert stamps.folder() == stamps.folder() == home / "tuxpaint-stamps-2022.06.04-1" / stamps.INSIDE
    assert fetched == [1] and (stamps.folder() / "food" / "pear.png").read_bytes() == b"here"


def test_a_named_folder_is_used_and_never_filled(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MONO_QUANT_FX_STAMPS", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=f"{stamps.INSIDE} is missing: unpack http"):
        stamps.folder()
    (tmp_path / stamps.INSIDE).mkdir(parents=True)
    assert stamps.folder() == tmp_path / stamps.INSIDE
    assert not home.exists()


def test_texts_say_where_they_come_from_and_are_read_without_it():
    for file, count in (("nyt_snippets.txt", 103), ("movie_snippets.txt", 670)):
        lines = data_lines(file)
        assert len(lines) == count and all(line.strip() for line in lines)


def test_the_error_of_a_share():
    assert share(3, 4) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))
