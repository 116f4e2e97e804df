import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from vlpost.model import checkpoint
from vlpost.model.checkpoint import (
    CheckpointError,
    export_model,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def save(root, step, *, value=None, keep=2):
    weights = {"weight": torch.full((40,), float(step if value is None else value))}
    return save_checkpoint(root, step, tensors={"model": weights}, state={"step": step}, keep=keep)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def folders(root):
    return sorted(path.name for path in root.iterdir())


# ---- round trip


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        tensor = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
        random_bits = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)  # nan payloads and denormals too
        tensor = random_bits.view(dtype).reshape(shape)
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    loaded = load_checkpoint(save_checkpoint(root, 3, tensors={"model": {"a.b": tensor}}, state={}, keep=1))
    assert loaded.step == 3
    again = loaded.tensors["model"]["a.b"]
    assert (again.dtype, again.shape, bits(again)) == (tensor.dtype, tensor.shape, bits(tensor))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_state_comes_back_equal(tmp_path, state):
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    assert load_checkpoint(save_checkpoint(root, 0, tensors={}, state=state, keep=1)).state == state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"order": (1, 2)}, r"state\.order is a tuple"),
        ({"seen": {"rows": {1, 2}}}, r"state\.seen\.rows is a set"),
        ({"by_step": {3: "x"}}, r"state\.by_step: key 3 is a int"),
        ({"losses": [0.5, float("nan")]}, r"state\.losses\[1\] = nan"),
        ({"best": float("-inf")}, r"state\.best = -inf"),
        ({"weights": torch.zeros(2)}, r"state\.weights is a Tensor"),
    ],
)
def test_state_that_json_would_change_is_refused_before_anything_is_written(tmp_path, state, words):
    with pytest.raises(CheckpointError, match=words):
        save_checkpoint(tmp_path / "run", 1, tensors={}, state=state, keep=1)
    assert not (tmp_path / "run").exists()


def test_tied_sliced_and_transposed_tensors_keep_their_values(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "embed": nn.Parameter(table),
        "head": table,
        "slice": table[1:, ::2],
        "turned": table.T,
        "conj": torch.tensor([1 + 2j]).conj(),
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors={"model": tensors, "empty": {}}, state={}, keep=1)).tensors
    assert loaded["empty"] == {}
    assert loaded["model"].keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(loaded["model"][name], tensor), name
    assert loaded["model"]["embed"].data_ptr() != loaded["model"]["head"].data_ptr()


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    path = save(tmp_path, 1)
    load_checkpoint(path).tensors["model"]["weight"].fill_(99)
    assert find_damage(path) is None


@pytest.mark.parametrize(
    ("stem", "name", "tensor", "words"),
    [
        ("../model", "w", torch.zeros(1), "file name"),
        (".hidden", "w", torch.zeros(1), "file name"),
        ("model", "__metadata__", torch.zeros(1), "choose another"),
        ("model", "w", torch.zeros(1, device="meta"), "model/w is on the meta device"),
        ("model", "w", torch.zeros(2).to_sparse(), "model/w is torch.sparse_coo"),
    ],
)
def test_tensors_that_cannot_be_saved_are_named(tmp_path, stem, name, tensor, words):
    with pytest.raises(CheckpointError, match=words):
        save_checkpoint(tmp_path, 1, tensors={stem: {name: tensor}}, state={}, keep=1)
    assert folders(tmp_path) == []


# ---- retention and steps


def test_the_newest_are_kept_and_leftovers_swept(tmp_path):
    (tmp_path / ".partial-step-000009").mkdir(parents=True)
    (tmp_path / ".partial-step-000009" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".deleted-step-000001").mkdir()
    (tmp_path / "notes").mkdir()
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert folders(tmp_path) == ["notes", "step-000006", "step-000008"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000008"


@pytest.mark.parametrize("step", [4, 3])
def test_steps_only_go_up(tmp_path, step):
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=rf"step {step} cannot be saved beside the whole checkpoint step-000004.*another folder"):
        save(tmp_path, step)
    assert load_checkpoint(tmp_path / "step-000004").state == {"step": 4}


def test_a_damaged_checkpoint_does_not_stand_in_the_way_of_the_resumed_run(tmp_path, caplog):
    save(tmp_path, 2)
    (save(tmp_path, 4) / "state.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000002"
    save(tmp_path, 3, keep=1)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000003"
    save(tmp_path, 4, keep=1)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000004"
    assert folders(tmp_path) == [".torn-step-000004", "step-000004"]
    assert "moved to .torn-step-000004: state.json is missing" in caplog.text


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (1, 0)])
def test_senseless_numbers_are_refused(tmp_path, step, keep):
    with pytest.raises(CheckpointError, match=rf"step = {step}, keep = {keep}"):
        save(tmp_path, step, keep=keep)


def test_large_steps_sort_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-1000000"


# ---- damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "file missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "file truncated": (lambda f: os.truncate(f / "model.safetensors", 10), "model.safetensors has 10 bytes, the manifest says"),
    "file empty": (lambda f: os.truncate(f / "state.json", 0), "state.json has 0 bytes"),
    "byte flipped": (lambda f: flip(f / "model.safetensors"), "model.safetensors has another SHA-256"),
    "byte flipped in state": (lambda f: flip(f / "state.json"), "state.json has another SHA-256"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read (No such file or directory)"),
    "manifest truncated": (lambda f: os.truncate(f / "manifest.json", 30), "manifest.json is not JSON"),
    "manifest empty": (lambda f: os.truncate(f / "manifest.json", 0), "manifest.json is not JSON"),
    "manifest binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json is not JSON"),
    "manifest too deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is not JSON"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json lists no files"),
    "manifest of another step": (lambda f: edit_manifest(f, lambda m: m.update(step=7)), "manifest.json is of step 7"),
    "hash gone": (lambda f: edit_manifest(f, lambda m: m["files"]["state.json"].pop("sha256")), "state.json has another SHA-256"),
    "path outside": (lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": {}})), "'../x', which lies outside the folder"),
    "folder empty": (lambda f: [path.unlink() for path in f.iterdir()], "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_skipped_with_words(tmp_path, caplog, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    spoil, words = DAMAGES[damage]
    spoil(newest)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == tmp_path / "step-000001"
    assert f"checkpoint {newest} skipped: " in caplog.text
    assert words in caplog.text
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(newest)


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") is None
    flip(save(tmp_path, 1) / "state.json")
    assert newest_checkpoint(tmp_path) is None


# ---- kill -9

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from vlpost.model.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

torch.set_num_threads(1)
root = Path(sys.argv[1])
rng = random.Random(20)

def tensors(step):
    return {"model": {"weight": torch.full((20_000,), float(step))}, "optimizer": {"weight/exp_avg": torch.arange(20_000) + step}}

def save_for_ever(acknowledge):
    newest = newest_checkpoint(root)
    step = load_checkpoint(newest).step if newest else 0
    while True:
        step += 1
        save_checkpoint(root, step, tensors=tensors(step), state={"step": step}, keep=2)
        os.write(acknowledge, step.to_bytes(4, "big"))

kills = partial = acknowledged = 0
while kills < 20:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(writer)
    os.close(writer)
    acknowledged = int.from_bytes(os.read(reader, 4), "big")  # the child is at work
    time.sleep(rng.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while record := os.read(reader, 4):
        acknowledged = int.from_bytes(record, "big")
    os.close(reader)
    kills += 1
    partial += any(root.glob(".partial-*"))
    found = newest_checkpoint(root)
    assert found is not None and found.name == max(path.name for path in root.glob("step-*")), (found, sorted(root.iterdir()))
    checkpoint = load_checkpoint(found)
    assert acknowledged <= checkpoint.step <= acknowledged + 1, (checkpoint.step, acknowledged)
    assert checkpoint.state == {"step": checkpoint.step}
    for stem, named in tensors(checkpoint.step).items():
        for name, tensor in named.items():
            assert torch.equal(checkpoint.tensors[stem][name], tensor)
print(json.dumps({"kills": kills, "partial": partial, "steps": acknowledged}))
"""


def test_kill_9_never_loses_an_acknowledged_checkpoint(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout)
    assert summary["kills"] == 20
    assert summary["partial"] > 0, "no kill hit the middle of a save: the test tested nothing"
    assert summary["steps"] >= 20


EVERY_POINT = """
import json, logging, os, signal, sys
from pathlib import Path
import torch
from vlpost.model.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

torch.set_num_threads(1)
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("vlpost.model.checkpoint").addHandler(handler)

def save(root, step):
    save_checkpoint(root, step, tensors={"model": {"w": torch.full((9,), step)}}, state={"step": step}, keep=2)

def kill_at(point):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}:
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

newest, point, finished = [], 0, False
while not finished:
    point += 1
    root = Path(sys.argv[1]) / str(point)
    for step in (1, 2):
        save(root, step)
    child = os.fork()
    if child == 0:
        kill_at(point)
        save(root, 3)
        os._exit(0)
    finished = os.waitpid(child, 0)[1] == 0
    newest.append(load_checkpoint(newest_checkpoint(root)).state["step"])
    save(root, 4)
    assert sorted(path.name for path in root.iterdir()) == [f"step-00000{newest[-1]}", "step-000004"], sorted(root.iterdir())
print(json.dumps({"newest": newest, "warnings": warnings}))
"""


def test_a_kill_before_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    run = subprocess.run([sys.executable, "-c", EVERY_POINT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout)
    newest = summary["newest"]
    assert newest == sorted(newest), "once the new checkpoint is there it stays"
    assert newest.count(2) >= 10
    assert newest.count(3) >= 5, "kills during the retention and the run without a kill"
    assert summary["warnings"] == [], "no torn checkpoint is ever to be seen"


# ---- full disk

FULL = """
import resource, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from vlpost.model import checkpoint
from vlpost.model.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint

root, how = Path(sys.argv[1]), sys.argv[2]

def save(step, size):
    return save_checkpoint(root, step, tensors={"model": {"w": torch.full((size,), step, dtype=torch.uint8)}}, state={}, keep=2)

save(1, 500_000)
if how == "tmpfs":
    try:
        save(2, 8_000_000)
    except CheckpointError as error:
        print(error)
    assert sorted(path.name for path in root.iterdir()) == ["step-000001"]
else:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
checkpoint.shutil = SimpleNamespace(**{**vars(shutil), "disk_usage": lambda _: SimpleNamespace(free=10**12)})  # others fill it meanwhile
try:
    save(2, 8_000_000)
except CheckpointError as error:
    print(error)
assert sorted(path.name for path in root.iterdir()) == ["step-000001"], sorted(root.iterdir())
assert newest_checkpoint(root) == root / "step-000001"
assert load_checkpoint(root / "step-000001").tensors["model"]["w"].tolist() == [1] * 500_000
save(3, 400_000)
assert newest_checkpoint(root) == root / "step-000003"
"""


def can_mount_tmpfs():
    mount = "mount -t tmpfs -o size=1m tmpfs /mnt"
    try:
        return subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# A file size limit stops the write itself on every machine; a real full disk stands beside it where a user may mount one.
@pytest.mark.parametrize("how", ["limit", "tmpfs"] if can_mount_tmpfs() else ["limit"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_words(tmp_path, how):
    command = [sys.executable, "-c", FULL, str(tmp_path), how]
    if how == "tmpfs":
        command = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=3m tmpfs {tmp_path} && exec "$@"', "sh", *command]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    fault = {"limit": "File too large", "tmpfs": "No space left on device"}[how]
    assert fault in said[-1]
    assert "step 2 could not be saved" in said[-1]
    assert "8.8 MB needed" in said[-1]
    assert "the previous checkpoint step-000001 is intact" in said[-1]
    if how == "tmpfs":
        assert "step 2 needs 8.8 MB on disk and 2.6 MB are free; nothing was written" in said[0]


def test_too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1_050_000))
    with pytest.raises(
        CheckpointError, match=r"step 2 needs 1\.1 MB on disk and 1\.1 MB are free; nothing was written.*step-000001 is intact.*`keep`"
    ):
        save_checkpoint(tmp_path, 2, tensors={"model": {"w": torch.zeros(1_000_000, dtype=torch.uint8)}}, state={}, keep=1)
    save_checkpoint(tmp_path, 2, tensors={"model": {"w": torch.zeros(950_000, dtype=torch.uint8)}}, state={}, keep=1)


@pytest.mark.parametrize("call", range(4))
def test_a_disk_that_reports_its_fault_at_a_sync_is_no_success(tmp_path, monkeypatch, call):
    save(tmp_path, 1)
    calls = []
    fsync = os.fsync

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 2)
    assert folders(tmp_path) == ["step-000001"]
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000002"


# ---- export


class Files:
    """Stands for a model or processor: `save_pretrained` writes these files."""

    def __init__(self, **contents):
        self.contents = contents

    def save_pretrained(self, save_directory):
        for name, content in self.contents.items():
            (Path(save_directory) / name.replace("__", ".")).write_text(content)


def a_model(content="1"):
    return Files(config__json="{}", model__safetensors=content)


def a_processor():
    return Files(tokenizer_config__json="{}", tokenizer__json="{}", processor_config__json="{}", chat_template__jinja="x")


def test_an_export_is_replaced_whole(tmp_path):
    folder = export_model(tmp_path / "final", model=a_model("1"), processor=a_processor())
    assert export_model(folder, model=a_model("2"), processor=a_processor()) == folder
    assert (folder / "model.safetensors").read_text() == "2"
    assert find_damage(folder) is None
    assert folders(tmp_path) == ["final"]
    flip(folder / "tokenizer.json")
    assert find_damage(folder) == "tokenizer.json has another SHA-256 than the manifest says"
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(folder)


def test_an_export_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="an exported model, not a checkpoint"):
        load_checkpoint(export_model(tmp_path / "final", model=a_model(), processor=a_processor()))


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("tokenizer_config__json", "the tokenizer missing"),
        ("processor_config__json", "the processor missing"),
        ("chat_template__jinja", "the chat template missing"),
        ("config__json", "the model's configuration missing"),
        ("model__safetensors", "the weights missing"),
    ],
)
def test_files_that_were_not_written_are_named_and_nothing_is_replaced(tmp_path, lost, words):
    folder = export_model(tmp_path / "final", model=a_model("1"), processor=a_processor())
    model, processor = a_model("2"), a_processor()
    for part in (model, processor):
        part.contents.pop(lost, None)
    with pytest.raises(CheckpointError, match=words):
        export_model(folder, model=model, processor=processor)
    assert (folder / "model.safetensors").read_text() == "1"
    assert folders(tmp_path) == ["final"]


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not an export and is not replaced"):
        export_model(tmp_path, model=a_model(), processor=a_processor())
    assert folders(tmp_path) == ["thesis.tex"]


class FullDisk:
    def save_pretrained(self, save_directory):
        (Path(save_directory) / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_export_leaves_the_earlier_one(tmp_path):
    folder = export_model(tmp_path / "final", model=a_model("1"), processor=a_processor())
    with pytest.raises(CheckpointError, match=r"could not be exported \(.*No space left on device\).*earlier export is untouched"):
        export_model(folder, model=FullDisk(), processor=a_processor())
    assert (folder / "model.safetensors").read_text() == "1"
    assert folders(tmp_path) == ["final"]


def test_an_export_killed_between_its_renames_is_put_back(tmp_path):
    export_model(tmp_path / "final", model=a_model("1"), processor=a_processor()).rename(tmp_path / ".old-final")
    with pytest.raises(CheckpointError, match="No space left"):
        export_model(tmp_path / "final", model=FullDisk(), processor=a_processor())
    assert (tmp_path / "final" / "model.safetensors").read_text() == "1"


def test_a_real_model_and_processor_come_back_equal(tmp_path):
    from vlpost.model.loading import load_model, load_processor
    from vlpost.model.nano import build_nano

    source = build_nano(tmp_path / "nano", size="s", corpus=["How many legs has a cat? 4"], seed=0)
    model, processor = load_model(source, dtype=torch.bfloat16), load_processor(source)
    folder = export_model(tmp_path / "export", model=model, processor=processor)
    assert find_damage(folder) is None
    again = load_model(folder, dtype=torch.bfloat16).state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    assert load_processor(folder).apply_chat_template(messages) == processor.apply_chat_template(messages)
