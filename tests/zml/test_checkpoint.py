"""Checkpoints on disk: what goes in comes out, and what was damaged is noticed and named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zml.checkpoints import (
    DESCRIBED,
    JOB,
    LEDGER,
    NOW,
    QUICK,
    Array,
    Chunks,
    fill,
    make,
    numbers,
    registration,
    write_shard,
)
from zml import errors
from zml.checkpoint import (
    BadCheckpoint,
    Checkpoint,
    Entry,
    Manifest,
    Refused,
    Writer,
    entries,
    newest,
    prune,
    read,
    read_manifest,
    shard_metadata,
    to_drop,
    write_shard_file,
)
from zml.checkpoint.description import describe, understand
from zml.checkpoint.folder import entry
from zml.checkpoint.manifest import BadManifest, File, parse, render
from zml.checkpoint.tensors import BadTensors, TensorFile, header, parse_header
from zml.hyper import OPTIMIZERS, RULES, OptimizerSpec
from zml.layout import BadLayout, Layout, Registration

GOOD_HEADER = header([("0/w", (2, 3)), ("0/step", (1,)), ("1/w", ())], {"versions": "{}"})
GOOD_HEADER = GOOD_HEADER[0][8:], GOOD_HEADER[1]
GOOD_MANIFEST = render(
    Manifest(
        1,
        "step-000000003",
        3,
        0,
        "2026-02-02",
        "at the end",
        "00",
        7,
        {"job.json": File(3, "0123456789abcdef")},
    )
)
SEAL: dict[str, Any] = {"ledger": LEDGER, "job": JOB, "epoch": 1, "because": "at the end", "now": NOW}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def floats(of: Any) -> Array:
    return np.array(of, np.float32)


def same(checkpoint: Checkpoint, chunks: Chunks) -> bool:
    return checkpoint.holders.keys() == chunks.keys() and all(
        checkpoint.chunk(index).keys() == parts.keys()
        and all(checkpoint.chunk(index)[part].tobytes() == array.tobytes() for part, array in parts.items())
        for index, parts in chunks.items()
    )


# -- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_what_shards_wrote_is_read_back_to_the_bit_by_whoever_wants_it(root: Path, shards: int) -> None:
    chunks = numbers(registration(), seed=5)
    path = make(root, 1200, chunks=chunks, shards=shards)
    checkpoint, skipped = newest(root)
    assert (path.name, skipped) == ("step-000001200", [])
    assert checkpoint is not None and checkpoint.path == path
    assert same(checkpoint, chunks)
    assert checkpoint.registration == registration()
    assert checkpoint.registration.digest == checkpoint.manifest.layout == registration().digest
    assert (checkpoint.ledger, checkpoint.job) == (LEDGER, JOB)
    assert checkpoint.versions == dict.fromkeys(chunks, 6)
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.epoch, manifest.because) == (1200, 1, "at step 1200")
    assert (manifest.created, manifest.parameters) == ("2026-02-02T02:40:00+00:00", 26)
    assert sorted(manifest.files) == sorted(
        each.name for each in path.iterdir() if each.name != "MANIFEST.json"
    )
    assert (root / "LATEST").read_text() == "step-000001200\n"
    assert sorted(os.listdir(root)) == ["LATEST", "step-000001200"]


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = {
        "0/w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "0/step": floats([3.0]),
        "none": np.zeros((0, 4), np.float32),
        "point": np.array(2.5, np.float32),
        "\u00fcber": floats([1, 2]).tobytes(),
    }
    path = tmp_path / "shard-0000.safetensors"
    written = write_shard_file(path, tensors, shard_metadata({0: 9}))
    loaded = load_file(path)
    assert loaded.pop("\u00fcber").tolist() == [1.0, 2.0]
    del tensors["\u00fcber"]
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert loaded[name].dtype == np.float32 and np.array_equal(loaded[name], array), name
    with safe_open(path, "np") as file:
        assert file.metadata() == {"versions": '{"0": 9}'}
    assert written.bytes == path.stat().st_size
    assert os.listdir(tmp_path) == [path.name]


def test_what_the_library_writes_is_read_here(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {"b": floats([1, 2, 3]), "a": floats([[4], [5]])}
    save_file(tensors, tmp_path / "some.safetensors", {"format": "np"})
    file = TensorFile(tmp_path / "some.safetensors")
    assert file.metadata == {"format": "np"}
    assert {name: file.array(name).tolist() for name in file.tensors} == {
        n: a.tolist() for n, a in tensors.items()
    }


@pytest.mark.parametrize(
    "tensor",
    [np.zeros(2), np.zeros(2, np.int32), np.zeros((2, 2), np.float32).T, b"abc"],
    ids=["double", "int", "strided", "no floats"],
)
def test_only_float32_without_gaps_is_written(tmp_path: Path, tensor: Any) -> None:
    with pytest.raises(ValueError, match="x is no C-contiguous float32"):
        write_shard_file(tmp_path / "f", {"x": tensor}, {})
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_is_loaded_by_another_number_of_shards(root: Path) -> None:
    """Chunks come from whichever file has them: 3 shards wrote, and each of 1, 2 or 4 takes its part."""
    chunks = numbers(registration(4), seed=2)
    checkpoint = read(make(root, 1, model=registration(4), chunks=chunks, shards=3))
    for shards in (1, 2, 4):
        loaded: Chunks = {}
        for shard in range(shards):
            loaded |= {index: checkpoint.chunk(index) for index in chunks if index % shards == shard}
        assert {i: {p: a.tobytes() for p, a in parts.items()} for i, parts in loaded.items()} == {
            i: {p: a.tobytes() for p, a in parts.items()} for i, parts in chunks.items()
        }


def test_what_was_loaded_stays_when_the_checkpoint_is_deleted(root: Path) -> None:
    chunks = numbers(registration())
    checkpoint = read(make(root, 1, chunks=chunks))
    shutil.rmtree(root)
    assert same(checkpoint, chunks)


def test_a_parameter_is_put_together_from_its_chunks(root: Path) -> None:
    model = registration(4)
    chunks = numbers(model)
    checkpoint = read(make(root, 1, model=model, chunks=chunks, shards=3))
    slab = np.concatenate([chunks[i]["w"] for i in model.layout.groups[0].chunks])
    whole = checkpoint.parameter(0), checkpoint.parameter(1)
    assert np.array_equal(np.concatenate([each for each in whole if each is not None]), slab)
    assert checkpoint.parameter(3, "exp_avg") is None, "no chunk of it has such a state"
    assert checkpoint.parts == ["w", "exp_avg", "exp_avg_sq", "step", "stepped"]


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_layout_json_says_a_registration_without_loss(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3))
    shapes = st.lists(st.integers(0, 9), max_size=3)
    some = data.draw(st.lists(st.tuples(shapes, st.integers(0, groups)), max_size=8))
    called = data.draw(st.lists(names, min_size=len(some), max_size=len(some), unique=True))
    described = [(name, shape, group) for name, (shape, group) in zip(called, some, strict=True)]
    described.append(("x" * 30, [3], 0))
    optimizer = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    fixed = [key for key in OPTIMIZERS[optimizer] if RULES[key].fixed]
    numbers: st.SearchStrategy[Any] = st.fixed_dictionaries(
        {key: st.booleans() if RULES[key].boolean else st.floats(0, 1e30) for key in fixed}
    )
    spec = OptimizerSpec(optimizer, tuple(data.draw(numbers) for _ in range(groups)))
    before = Registration(
        Layout.build(described, groups, data.draw(st.integers(1, 50))), spec, data.draw(st.integers(1, 9))
    )
    after = understand(describe(before))
    assert (after, after.digest) == (before, before.digest)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_a_layout_or_refused(data: st.DataObject) -> None:
    good = bytearray(describe(registration()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        understand(bytes(good))
    except BadLayout:
        pass


# -- damage ------------------------------------------------------------------------------------------------


def test_every_changed_byte_of_every_file_is_noticed(root: Path) -> None:
    path = make(root, 3)
    unnoticed, tried = [], 0
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        with open(file, "r+b", buffering=0) as handle:
            for at in range(len(good)):
                for bit in range(8):  # among them what makes capitals, and other blanks
                    os.pwrite(handle.fileno(), bytes([good[at] ^ 1 << bit]), at)
                    tried += 1
                    try:
                        read(path)
                        unnoticed.append((file.name, at, bit))
                    except BadCheckpoint as error:
                        assert file.name == "MANIFEST.json" or error.file == file.name
                os.pwrite(handle.fileno(), good[at : at + 1], at)
    assert unnoticed == []
    assert tried > 20_000
    read(path)


def test_every_truncation_and_every_lost_file_is_noticed(root: Path) -> None:
    path = make(root, 3)
    unnoticed = []
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for size in [*range(len(good) - 1, -1, -1), None]:
            file.unlink() if size is None else os.truncate(file, size)
            for deep in (True, False):
                try:
                    read(path, deep)
                    unnoticed.append((file.name, size))
                except BadCheckpoint as error:
                    assert error.file == file.name
        file.write_bytes(good)
    assert unnoticed == []
    read(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_a_header_and_a_manifest_or_refused(data: st.DataObject) -> None:
    parse_header(*GOOD_HEADER)
    for good, check in ((GOOD_HEADER[0], lambda b: parse_header(b, GOOD_HEADER[1])), (GOOD_MANIFEST, parse)):
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(bad) - 1))
            some = st.sampled_from(
                [b"9", b"99999999999999999999", b"-", b"[", b"null", b'"', b"1e9"]
            ) | st.binary(max_size=3)
            bad[at : at + data.draw(st.integers(0, 3))] = data.draw(some)
        try:
            check(bytes(bad))
        except (BadTensors, BadManifest):
            pass


def test_a_manifest_in_other_words_is_refused_though_it_says_the_same(root: Path) -> None:
    data = (make(root, 3) / "MANIFEST.json").read_bytes()
    said = json.loads(data)
    twice = data.replace(b'"step": 3,', b'"step": 3,\n  "step": 3,')
    for other in (json.dumps(said).encode(), data + b"\n", data.replace(b"  ", b"\t"), twice):
        with pytest.raises(BadManifest, match="does not have the bytes"):
            parse(other)
    assert render(parse(data)) == data


def test_a_manifest_of_a_later_format_is_refused_by_its_number(root: Path) -> None:
    path = make(root, 3)
    later = render(read_manifest(path)).replace(b'"format": 1', b'"format": 2')
    (path / "MANIFEST.json").write_bytes(later)
    with pytest.raises(BadCheckpoint, match="is of format 2; this is zml's format 1"):
        read(path)


def test_a_reader_goes_back_to_the_newest_whole_one_and_says_what_it_skipped(root: Path) -> None:
    for step in (100, 200, 300, 400):
        make(root, step)
    (root / "step-000000400/MANIFEST.json").unlink()
    os.truncate(root / "step-000000300/ledger.json", 5)
    found, skipped = newest(root)
    assert found is not None and found.manifest.step == 200
    assert [tuple(each) for each in skipped] == [
        ("step-000000400", "MANIFEST.json is missing"),
        ("step-000000300", "ledger.json has 5 bytes, the manifest lists 37"),
    ]
    shutil.rmtree(root / "step-000000200")
    (root / "step-000000100/shard-0001.safetensors").write_bytes(b"")
    assert newest(root)[0] is None and len(newest(root)[1]) == 3
    assert newest(root / "nowhere") == (None, [])


def test_a_changed_tensor_is_found_by_reading_deep_only(root: Path) -> None:
    path = make(root, 3)
    file = path / "shard-0000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert read(path, deep=False).manifest.step == 3
    with pytest.raises(BadCheckpoint) as raised:
        read(path)
    assert (raised.value.code, raised.value.file) == (errors.BAD_CHECKPOINT, "shard-0000.safetensors")
    assert "step-000000003 is not usable: shard-0000.safetensors has changed" in raised.value.what


def test_who_loads_some_chunks_checks_their_files_only(root: Path) -> None:
    path = make(root, 3)
    file = path / "shard-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    checkpoint = read(path, deep=False)
    checkpoint.check([0, 2])
    with pytest.raises(BadCheckpoint, match=r"shard-0001.safetensors has changed"):
        checkpoint.check([0, 1])


# Damage that the hashes cover, because whoever wrote it meant it: the writer refuses to seal what no one could load.


def chunk_file(writer: Writer, tensors: Any, versions: dict[int, int], shard: int = 0) -> None:
    name = f"shard-{shard:04}.safetensors"
    writer.adopt(name, *write_shard_file(writer.folder / name, tensors, shard_metadata(versions), QUICK))


ONE = Registration(Layout.build([("p", (2, 3), 0), ("q", (1,), 0)], 1), OptimizerSpec("SGD", ({},)))
SEVEN = np.zeros(7, np.float32)


@pytest.mark.parametrize(
    ("tensors", "versions", "what"),
    [
        ({}, {}, "MANIFEST.json lists no file with chunk 0"),
        ({"0/momentum_buffer": SEVEN}, {0: 1}, "has no w of chunk 0"),
        ({"0/w": SEVEN[:6]}, {0: 1}, r"has 0/w of shape \(6,\), not \(7,\)"),
        ({"0/w": SEVEN, "0/step": SEVEN}, {0: 1}, r"has 0/step of shape \(7,\), not \(2,\)"),
        ({"0/w": SEVEN}, {}, "has chunk 0 among its tensors or its versions, but not among both"),
        ({"0/w": SEVEN}, {0: -1}, "has chunk 0 at version -1"),
        ({"0/w": SEVEN, "1/w": SEVEN}, {0: 1, 1: 1}, "has chunk 1 at version 1, of a model with 1 chunks"),
        ({"0/w": SEVEN, "00/w": SEVEN}, {0: 1}, "has a tensor '00/w', which is not called CHUNK/NAME"),
    ],
)
def test_what_could_not_be_loaded_is_not_sealed(
    root: Path, tensors: Any, versions: dict[int, int], what: str
) -> None:
    make(root, 1)
    with Writer(root, 2, QUICK) as writer:
        chunk_file(writer, tensors, versions)
        with pytest.raises(BadCheckpoint, match=what):
            writer.seal(ONE, **SEAL)
    assert sorted(os.listdir(root)) == ["LATEST", "step-000000001"]


@pytest.mark.parametrize("wrong", [{"job": {"loss": float("nan")}}, {"because": "\ud800"}, {"epoch": -1}])
def test_what_json_cannot_say_is_refused_before_anything_is_sealed(root: Path, wrong: dict[str, Any]) -> None:
    with Writer(root, 1, QUICK) as writer:
        fill(writer, numbers(registration()))
        with pytest.raises(ValueError):
            writer.seal(registration(), **SEAL | wrong)
    assert os.listdir(root) == []


def test_a_chunk_in_two_files_is_refused(root: Path) -> None:
    with Writer(root, 2, QUICK) as writer:
        chunk_file(writer, {"0/w": SEVEN}, {0: 1}, 0)
        chunk_file(writer, {"0/w": SEVEN}, {0: 1}, 1)
        with pytest.raises(
            BadCheckpoint, match=r"0001.safetensors has chunk 0, and so has shard-0000.safetensors"
        ):
            writer.seal(ONE, **SEAL)


# -- writing -----------------------------------------------------------------------------------------------


def test_the_same_step_again_is_another_checkpoint_and_the_newer(root: Path) -> None:
    first = make(root, 7, chunks=numbers(registration(), seed=1))
    later = numbers(registration(), seed=2)
    second = make(root, 7, chunks=later)
    assert (first.name, second.name) == ("step-000000007", "step-000000007.2")
    found = newest(root)[0]
    assert found is not None and found.path == second and same(found, later)
    assert same(read(first), numbers(registration(), seed=1))
    assert make(root, 6).name == "step-000000006" and (root / "LATEST").read_text() == "step-000000006\n"
    assert entries(root) == [Entry(6), Entry(7), Entry(7, 2)]


def test_only_its_own_names_are_checkpoints() -> None:
    assert entry("step-000000007.12") == Entry(7, 12) and entry(Entry(10**12).name) == Entry(10**12)
    for name in (
        "step-7",
        "step-000000007.1",
        "step-000000007.",
        ".step-000000007",
        "step-0000000007",
        "step-00000000x",
        "LATEST",
    ):
        assert entry(name) is None, name


def test_a_file_that_arrives_in_pieces_is_the_file_that_was_sent(root: Path) -> None:
    chunks = numbers(registration())
    with Writer(root, 1, QUICK) as writer:
        size, digest = write_shard(root / "sent", chunks, list(chunks))
        data = (root / "sent").read_bytes()
        (root / "sent").unlink()
        name = "shard-0000.safetensors"
        writer.piece(name, 0, data[:100])
        writer.piece(name, 50, data[50:80])  # sent again
        with pytest.raises(Refused, match="has 100 bytes, and the next piece begins at 101"):
            writer.piece(name, 101, data[101:])
        writer.piece(name, 60, data[60:])  # half of it is there
        with pytest.raises(Refused, match=f"came {size} bytes with xxh3 {digest}, not {size} with 00"):
            writer.adopt(name, size, "00")
        writer.adopt(name, size, digest)
        writer.adopt(name, size, digest)
        writer.piece(name, 0, data[:100])
        with pytest.raises(Refused, match="is complete with"):
            writer.piece(name, size, b"more")
        path = writer.seal(registration(), **SEAL)
        assert writer.over
    assert (path / name).read_bytes() == data and same(read(path), chunks)


def test_a_writer_refuses_what_is_not_so_and_goes_on(root: Path) -> None:
    chunks = numbers(registration())
    with Writer(root, 1, QUICK) as writer:
        for name in ("../x", ".x", "a/b", "", "MANIFEST.json", "x" * 101, "x\n"):
            with pytest.raises(Refused, match="cannot be called"):
                writer.write(name, b"")
        with pytest.raises(Refused, match=r"shard-0000.safetensors cannot be seen from here: No such file"):
            writer.adopt("shard-0000.safetensors", 1, "00")
        size, digest = write_shard(writer.folder / "shard-0000.safetensors", chunks, list(chunks))
        with pytest.raises(Refused, match=f"has {size} bytes here, not 1"):
            writer.adopt("shard-0000.safetensors", 1, "00")
        writer.adopt("shard-0000.safetensors", size, digest)
        writer.write("worker.json", b"{}")
        with pytest.raises(Refused, match=r"worker.json is complete already"):
            writer.write("worker.json", b"{}")
        path = writer.seal(registration(), **SEAL)
    assert read(path).file("worker.json") == path / "worker.json"
    assert read(path).file("worker.safetensors") is None


def test_a_file_whose_pieces_have_not_all_come_is_not_sealed(root: Path) -> None:
    with Writer(root, 1, QUICK) as writer:
        fill(writer, numbers(registration()))
        writer.piece("shard-0009.safetensors", 0, b"beginning")
        with pytest.raises(Refused, match=r"shard-0009.safetensors is not complete"):
            writer.seal(registration(), **SEAL)
    assert os.listdir(root) == []


def test_half_a_file_of_a_shard_that_began_twice_is_not_in_the_checkpoint(root: Path) -> None:
    with Writer(root, 1, QUICK) as writer:
        fill(writer, numbers(registration()))
        (writer.folder / ".shard-0000.safetensors.1234").write_bytes(b"half")
        path = writer.seal(registration(), **SEAL)
    assert sorted(os.listdir(path)) == sorted([*read(path).manifest.files, "MANIFEST.json"])


def test_a_writer_sweeps_what_the_dead_left_and_nothing_of_its_own_process(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(root, 1)
    with monkeypatch.context() as dead:
        dead.setattr("zml.checkpoint.writing.PROCESS", "deadbeef")
        left = Writer(root, 2, QUICK)
        left.piece("shard-0000.safetensors", 0, b"some")
        (left.folder / "folder").mkdir()
    (root / ".step-000000001.deadbeef00.dropped").mkdir()
    (root / ".somebody-elses").mkdir()
    alive = Writer(root, 3, QUICK)
    with Writer(root, 4, QUICK):
        there = sorted(os.listdir(root))
    assert [name for name in there if "deadbeef" in name] == []
    assert {alive.folder.name, ".somebody-elses", "step-000000001"} <= set(there)
    alive.abandon()
    alive.abandon()
    assert sorted(os.listdir(root)) == [".somebody-elses", "LATEST", "step-000000001"]


def test_a_shard_that_still_writes_for_an_abandoned_attempt_harms_no_other(root: Path) -> None:
    chunks = numbers(registration())
    gone = Writer(root, 1, QUICK)
    gone.abandon()
    with Writer(root, 1, QUICK) as writer:
        with pytest.raises(errors.ZmlError) as raised:
            write_shard(gone.folder / "shard-0000.safetensors", chunks, list(chunks))
        assert raised.value.code == errors.NOT_WRITTEN
        assert os.listdir(writer.folder) == []


# -- retention ---------------------------------------------------------------------------------------------


def steps(found: list[Entry]) -> list[int]:
    return [each.step for each in found]


def test_the_last_few_stay_and_one_of_every_so_many_steps() -> None:
    there = [Entry(step) for step in (300, 900, 1050, 1500, 2400, 2700, 3100, 3400)]
    assert steps(to_drop(there, 2, 1000, there)) == [300, 900, 1500, 2700]
    assert steps(to_drop(there, 2, 0, there)) == [300, 900, 1050, 1500, 2400, 2700]
    assert steps(to_drop(there, 0, 0, there)) == [300, 900, 1050, 1500, 2400, 2700, 3100]
    assert steps(to_drop(there, 0, 0, [Entry(900)])) == [300, 1050, 1500, 2400, 2700, 3100]
    assert steps(to_drop(there, 99, 0, there)) == []
    assert steps(to_drop(there, 0, 0, [])) == [], "where none is known to be whole, none goes"


some_entries = st.lists(st.builds(Entry, st.integers(0, 60), st.integers(1, 2)), unique=True)


@settings(max_examples=500, deadline=None)
@given(some_entries, st.integers(0, 5), st.integers(0, 30), st.data())
def test_retention_never_drops_the_last_nor_the_last_that_verified(
    there: list[Entry], last: int, every: int, data: st.DataObject
) -> None:
    verified = {each for each in there if data.draw(st.booleans())}
    drop = to_drop(there, last, every, verified)
    stay = sorted(set(there) - set(drop))
    assert set(drop) <= set(there)
    if there:
        assert stay[-1] == max(there)
    if verified:
        assert max(verified) in stay
    assert set(sorted(there)[len(there) - min(last, len(there)) :]) <= set(stay)
    assert to_drop(stay, last, every, verified & set(stay)) == [], "asked again, nothing more goes"


@settings(max_examples=40, deadline=None)
@given(bad=st.sets(st.integers(0, 4)), last=st.integers(0, 3))
def test_prune_leaves_the_newest_whole_one_whatever_is_damaged(
    tmp_path_factory: pytest.TempPathFactory, bad: set[int], last: int
) -> None:
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in range(5):
        make(root, step, shards=1)
        if step in bad:
            os.truncate(root / Entry(step).name / "job.json", 3)
    before = newest(root)[0]
    dropped = prune(root, last, disk=QUICK)
    after = newest(root)[0]
    assert (before is None) == (len(bad) == 5)
    if before is None:
        assert dropped == [] and after is None
    else:
        assert after is not None and after.path == before.path
        good = before.manifest.step
        assert steps(entries(root)) == [s for s in range(5) if s >= 5 - max(last, 1) or s == good]
    assert [name for name in os.listdir(root) if name.startswith(".")] == []
    shutil.rmtree(root)


def test_pruning_in_an_empty_place_does_nothing(root: Path) -> None:
    assert prune(root, 1) == []


def test_described_parameters_fill_more_than_one_chunk() -> None:
    """What the tests above rely on: a chunk with two segments, a parameter in two chunks, a chunk without state."""
    layout = registration().layout
    assert len(DESCRIBED) == 4 and len(layout.chunks) == 4
    assert [len(chunk.segments) for chunk in layout.chunks] == [1, 2, 1, 2]
