"""Reading never runs code and never takes memory without bounds: crafted checkpoints, recipes, rows, images and model folders."""

import ast
import base64
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import vlpost.recipes
from PIL import Image
from vlpost.model.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from vlpost.model.records import MAX_IMAGE_BYTES, DataError, ImagePart
from vlpost.recipes.example_stream import read_jsonl
from vlpost.recipes.load import RecipeError, load_recipe

ROOT = Path(vlpost.recipes.__file__).parent.parent
FOLDERS = ("model", "rewards", "sft", "rl", "distill", "recipes")


class Program:
    """Pickles to a program that makes the folder `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """The folder that no test may find."""
    folder = tmp_path / "code-ran"
    yield folder
    assert not folder.exists(), "a file ran code"


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture
def bounded():
    """Asserts that the test has not raised this process's peak of memory by more than 600 MiB."""
    before = peak_mib()
    yield
    assert peak_mib() - before < 600


# ---------------------------------------------------------------- checkpoints


def write_checkpoint(root, step=1):
    return save_checkpoint(root, step, tensors={"model": {"w": torch.ones(3)}}, state={"step": step}, keep=2)


def seal(folder, **extra):
    """Writes a manifest that fits whatever the folder holds."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": files, **extra}))


PICKLES = ("model.pt", "optimizer.pkl", ".metadata", "rng_state.pth", "training_args.bin")


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_beside_a_checkpoint_is_never_opened(tmp_path, mark, name):
    folder = write_checkpoint(tmp_path / "run")
    (folder / name).write_bytes(pickle.dumps(Program(mark)))
    assert newest_checkpoint(tmp_path / "run") == folder
    assert load_checkpoint(folder).tensors["model"]["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_in_a_manifest_is_refused(tmp_path, mark, name):
    folder = write_checkpoint(tmp_path / "run")
    (folder / name).write_bytes(pickle.dumps(Program(mark)))
    seal(folder)
    with pytest.raises(CheckpointError, match=f"lists '{name}': a checkpoint holds state.json and .safetensors files"):
        load_checkpoint(folder)


def test_a_pickle_that_calls_itself_safetensors_is_refused(tmp_path, mark):
    folder = write_checkpoint(tmp_path / "run")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Program(mark)))
    seal(folder)
    with pytest.raises(CheckpointError, match="the manifest fits and a file cannot be read"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b'{"w": 1}',
        struct.pack("<Q", 99_000_000) + b"{",
        struct.pack("<Q", 78) + json.dumps({"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode().ljust(78),
        struct.pack("<Q", 78) + json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}).encode().ljust(78),
        struct.pack("<Q", 60_000) + b"[" * 60_000,
    ],
    ids=["length 2^63", "length 2^40", "length beyond the file", "shape 10^18", "offsets beyond the file", "nested"],
)
def test_a_safetensors_header_bomb_is_refused(tmp_path, bounded, content):
    folder = write_checkpoint(tmp_path / "run")
    (folder / "model.safetensors").write_bytes(content)
    seal(folder)
    with pytest.raises(CheckpointError, match="the manifest fits and a file cannot be read"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/passwd"])
def test_a_manifest_that_reaches_outside_its_folder_is_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "run")
    seal(folder, files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_nested_and_huge_json_is_refused(tmp_path, bounded, name):
    folder = write_checkpoint(tmp_path / "run")
    (folder / name).write_text("[" * 200_000)
    if name == "state.json":
        seal(folder)
    with pytest.raises(CheckpointError, match=r"cannot be read|is not JSON"):
        load_checkpoint(folder)
    with (folder / name).open("wb") as file:
        file.truncate(2**31)  # sparse: two GiB of zeros that take no room
    if name == "manifest.json":
        with pytest.raises(CheckpointError, match=r"manifest.json has 2147.5 MB, at most 67.1 MB are read"):
            load_checkpoint(folder)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir ['MARK']",
        "method: !!python/object/apply:os.mkdir ['MARK']",
        "method: !!python/object/new:os.mkdir ['MARK']",
        "method: !!python/name:os.mkdir",
        "!!python/object/apply:subprocess.check_call [[mkdir, 'MARK']]",
        "a: &a [1]\nb: *a",
        "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]),
        "[" * 100_000,
        "x" * 300_000,
        "<<: {method: sft}\n<<: {method: rl}",
    ],
    ids=["apply", "value", "new", "name", "subprocess", "alias", "billion laughs", "nested", "large", "merged twice"],
)
def test_a_recipe_runs_nothing_and_stays_small(tmp_path, mark, bounded, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("MARK", str(mark)))
    with pytest.raises(RecipeError, match=r"recipe.yaml"):
        load_recipe(path)
    with pytest.raises(RecipeError):
        load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"seed={text.replace('MARK', str(mark))}"])


def test_a_recipe_cannot_ask_for_remote_code():
    for key in ("common.model.trust_remote_code", "stages.sft.learner.trust_remote_code", "trust_remote_code"):
        with pytest.raises(RecipeError, match="trust_remote_code"):
            load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"{key}=true"])


# ---------------------------------------------------------------- rows and their images


def row_with(tmp_path, image):
    path = tmp_path / "rows" / "rows.jsonl"
    path.parent.mkdir(exist_ok=True)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    path.write_text(json.dumps({"id": "a", "messages": [{"role": "user", "content": content}], "answer": "1"}))
    return path


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width, height, *, rows=None):
    """Returns a small PNG of width x height black pixels."""
    packer = zlib.compressobj(9)
    line = bytes(1 + width // 8)
    squeezed = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", squeezed) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(9_000, 9_000), (12_000, 12_000), (100_000, 100_000)])
def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path, bounded, width, height):
    bomb = png_bomb(width, height, rows=min(height, 12_000))
    assert len(bomb) < 200_000
    url = "data:image/png;base64," + base64.b64encode(bomb).decode()
    with pytest.raises(DataError, match=r"rows.jsonl, line 1, data URL: the image cannot be decoded \(.*pixels"):
        read_jsonl(row_with(tmp_path, url), source="x")


def test_an_image_bomb_is_a_data_error_where_warnings_are_errors():
    with pytest.raises(DataError, match="cannot be decoded"):
        ImagePart.from_bytes(png_bomb(12_000, 12_000, rows=1), "here")


def test_compressed_text_in_an_image_is_bounded(tmp_path, bounded):
    bomb = zlib.compress(bytes(2**28), 9)
    plain = io.BytesIO()
    Image.new("RGB", (4, 4)).save(plain, format="PNG")
    content = plain.getvalue()
    header, rest = content[:33], content[33:]
    for kind, text in ((b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)):
        with pytest.raises(DataError, match="here: the image cannot be decoded"):
            ImagePart.from_bytes(header + chunk(kind, text) + rest, "here")


def test_an_image_that_is_a_program_for_ghostscript_is_not_opened(tmp_path, mark, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\nmkdir {mark}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) = showpage\n%%EOF\n"
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.png").write_bytes(program)
    with pytest.raises(DataError, match=r"a.png: the image cannot be decoded \(its format is unknown\)"):
        read_jsonl(row_with(tmp_path, "a.png"), source="x")


@pytest.mark.parametrize("path", ["../outside.png", "a/../../outside.png", "/dev/zero", "ABSOLUTE"])
def test_an_image_outside_the_folder_is_refused(tmp_path, path):
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    path = path.replace("ABSOLUTE", str(tmp_path / "outside.png"))
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: image .* lies outside the data file's folder; give a path below it"):
        read_jsonl(row_with(tmp_path, path), source="x")


def test_an_image_that_never_ends_is_refused(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    with (folder / "large.png").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    for name, words in (
        ("pipe", "neither a file nor a folder"),
        ("zero", "neither a file nor a folder"),
        ("large", "at most 268435456 are"),
    ):
        with pytest.raises(DataError, match=f"{name}.png: the image cannot be read .*{words}"):
            read_jsonl(row_with(tmp_path, f"{name}.png"), source="x")


def test_a_nested_row_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: not JSON"):
        read_jsonl(path, source="x")


# ---------------------------------------------------------------- model folders

LOAD = """
import json, sys
import torch
from vlpost.model.loading import load_model, load_processor
from vlpost.model.records import DataError

said = {}
for folder in sys.argv[1:]:
    for name, load in (("model", lambda folder: load_model(folder, dtype=torch.float32)), ("processor", load_processor)):
        try:
            load(folder)
            said[f"{folder}/{name}"] = "loaded"
        except DataError as error:
            said[f"{folder}/{name}"] = str(error)
print(json.dumps(said))
"""


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_code(folder, mark, *, is_known):
    """Puts code beside the model, and into its files the order to run it."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    change_json(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"})
    change_json(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.Processor", "AutoImageProcessor": "evil.Processor"})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    if not is_known:
        change_json(folder / "config.json", model_type="evil_vl", architectures=["EvilForConditionalGeneration"])
        change_json(folder / "processor_config.json", processor_class="EvilProcessor")
        change_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")


def test_code_and_pickles_in_a_model_folder_are_never_run(tmp_path, mark):
    from vlpost.model.nano import build_nano

    corpus = [f"What is {number} + {number + 3}? The sum of the digits is {2 * number + 3}." for number in range(30)]
    nano = build_nano(tmp_path / "nano", size="s", corpus=corpus, seed=3, vocab_size=384)
    folders = {name: tmp_path / name for name in ("known", "unknown", "pickled", "broken")}
    for folder in folders.values():
        shutil.copytree(nano, folder)
    with_code(folders["known"], mark, is_known=True)
    with_code(folders["unknown"], mark, is_known=False)
    for name, file in (("pickled", "pytorch_model.bin"), ("broken", "model.safetensors")):
        (folders[name] / "model.safetensors").unlink()
        (folders[name] / file).write_bytes(pickle.dumps(Program(mark)))
    # Somebody at the keyboard answers every question with yes.
    command = [sys.executable, "-c", LOAD, *map(str, folders.values())]
    done = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {key.removeprefix(f"{tmp_path}/"): text for key, text in json.loads(done.stdout.splitlines()[-1]).items()}
    assert len(said) == 8
    loaded = {"known/model", "known/processor", "pickled/processor", "broken/processor"}
    assert {key for key, text in said.items() if text == "loaded"} == loaded, "a known model needs no code that lies beside it"
    for key in said.keys() - loaded:
        assert f"no {key.split('/')[1]} can be loaded" in said[key]


# ---------------------------------------------------------------- the sources

FORBIDDEN_CALLS = {("torch", "load"), ("torch", "hub"), ("jit", "load"), ("os", "system"), ("os", "popen"), ("builtins", "eval")}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def source_faults(tree):
    """Returns a sentence for each place where reading a file could run code."""
    return [fault for node in ast.walk(tree) for check in (forbidden_name, forbidden_attribute, forbidden_option) for fault in check(node)]


def forbidden_name(node):
    names = [node.id] if isinstance(node, ast.Name) else []
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
    return [name for name in names if name.split(".")[0] in FORBIDDEN_NAMES]


def forbidden_attribute(node):
    if not isinstance(node, ast.Attribute):
        return []
    owner = ast.unparse(node.value).rpartition(".")[2]
    return [f"{owner}.{node.attr}"] if (owner, node.attr) in FORBIDDEN_CALLS else []


def forbidden_option(node):
    if not isinstance(node, ast.Call):
        return
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    for name in ("trust_remote_code", "allow_pickle", "shell"):
        if name in options and not (isinstance(options[name], ast.Constant) and options[name].value is False):
            yield name
    called = ast.unparse(node.func)
    if called.startswith("Auto") and called.endswith(".from_pretrained") and "trust_remote_code" not in options:
        yield f"{called} without trust_remote_code=False"


def test_no_source_reads_a_file_as_code():
    sources = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
    assert len(sources) > 40
    loaders = 0
    for path in sources:
        text = path.read_text(encoding="utf-8")
        loaders += text.count(".from_pretrained(")
        if path.name == "jail_main.py":  # runs programs, and only inside a jail: tests/test_layout.py sees that nothing imports it
            continue
        assert source_faults(ast.parse(text)) == [], path
    assert loaders >= 2


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust)",
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_a_line_that_could_run_code_is_named(line):
    assert len(source_faults(ast.parse(line))) == 1
