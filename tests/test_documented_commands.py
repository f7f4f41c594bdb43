"""The commands of README and of the tutorials do what they say: their options exist, and they run.

Every fenced block of bash is taken apart into commands. A command is run in a folder with small data, or NOT_RUN gives
the reason why it is not. Commands that train are run by the slow test alone; the other test puts a run that was trained
before in the place of theirs, so that the commands after them can be run. The commands of other pages, of configs and
of docstrings are not run, but their files, options and config keys must exist.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bfsys import cli
from bfsys.config import load_config
from bfsys.errors import UserError
from tests.conftest import REPOSITORY

PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs" / "tutorials").glob("*.md")),
    REPOSITORY / "docs" / "export.md",
]
OTHER_FILES = sorted(
    {*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "configs").rglob("*.yaml")}
    - {*PAGES}
    | {*(REPOSITORY / "tools").rglob("*.py")}
)
FENCED = re.DOTALL | re.MULTILINE
LINE_OF_COMMAND = re.compile(r"^(?: {4}|#   )(?:\$ )?((?:python|bfsys|deepspeed|torchrun|srun|chrt) .+)$", re.MULTILINE)
KEY_AND_VALUE = re.compile(r"[a-z_]+(\.\w+)*=")
EXPLANATIONS = sorted((REPOSITORY / "docs" / "explanation").glob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)

INSTALLS, CLUSTER, SERVER = "it installs packages", "it needs a SLURM cluster", "it is a server, which does not end"
BIG_DATA = "it needs the published datasets"
NOT_RUN = {
    "make quickstart": f"{INSTALLS} and trains for minutes; test_quickstart.py runs it",
    "make test": "it runs this test",
    "source .venv/bin/activate": INSTALLS,
    "tensorboard --logdir runs": SERVER,
    "bfsys serve runs/quickstart": f"{SERVER}; tests/serve runs it",
    "python -m http.server --bind 127.0.0.1 --directory examples/browser 8080": SERVER,
    "npm install --prefix examples/browser": INSTALLS,
    "bfsys fetch speech_commands data/speech_commands": "it downloads 2 GB",
    "deepspeed bfsys/train.py configs/joint.yaml": BIG_DATA,
    "python launchers/local.py --ranks 2 configs/joint.yaml": BIG_DATA,
    "bfsys plan configs/joint.yaml --ranks 16 --gpu h100": BIG_DATA,
    "python launchers/slurm.py --nodes 8 configs/joint.yaml": CLUSTER,
    "python launchers/slurm.py --nodes 2-8 --grow configs/joint.yaml": CLUSTER,
    "srun --nodes 1 --gpus-per-node 1 --time 10 bfsys check-gpu": f"{CLUSTER} with GPUs",
    "bfsys slurm --nodes 2 --gpus-per-node 8 --cpus-per-task 13 --time 60 --dry-run configs/joint.yaml": CLUSTER,
    "bfsys slurm --nodes 2 --gpus-per-node 8 --cpus-per-task 13 --time 10 configs/joint.yaml name=first train.steps=50 "
    "optim.warmup_steps=5": CLUSTER,
    "bfsys slurm status runs/first": CLUSTER,
    "bfsys slurm logs runs/first --follow": CLUSTER,
    "bfsys slurm --nodes 2-8 --grow --gpus-per-node 8 --cpus-per-task 13 --time 720 configs/joint.yaml": CLUSTER,
    "bfsys slurm stop runs/joint": CLUSTER,
    "bfsys slurm --nodes 4 --gpus-per-node 8 --cpus-per-task 13 --time 720 configs/joint.yaml": CLUSTER,
}
# Parts of commands that are replaced before they run, to save time.
REPLACED = {
    "deepspeed bfsys/train.py": "deepspeed --num_accelerators 1 bfsys/train.py",
    "--ranks 2 ": "--ranks 1 ",
    "bfsys launch configs": "bfsys launch --ranks 1 configs",
    "--sweep train.seed=0,1,2 configs/small.yaml": "--sweep train.seed=0,1 configs/small.yaml "
    "data.sources.0.path=data/shards/mine",
}
REPLACED_IN_THE_FAST_TEST = {
    "--format safetensors torch onnx": "--format safetensors",
    "--format onnx": "--format safetensors",
    "exported": "exported --format safetensors",
    "--split val": "--split val --limit 4",
    "001.jpg --encode": "001.jpg",  # the run that replaces others was trained on files as stored
    "001.wav --encode": "001.wav",
}
# Settings of every training. They replace those of the config and the command line.
TINY = {
    "model.size": "custom", "model.dim": "16", "model.layers": "2", "model.heads": "2", "model.window": "8",
    "model.shift": "4", "model.merge_after": "[0]", "model.max_tokens": "4096", "train.steps": "4",
    "train.precision": "fp32", "optim.warmup_steps": "1", "data.batch_samples": "8", "data.lanes": "2",
}  # fmt: skip
TRAIN = ("fit", "train", "launch")
SCRIPTS = {
    "bfsys/train.py": "train", "launchers/local.py": "launch", "launchers/slurm.py": "slurm", "tools/pack.py": "pack",
    "tools/inspect_shards.py": "inspect", "tools/plan_run.py": "plan", "tools/encode.py": "encode",
    "tools/make_key.py": "make-key",
}  # fmt: skip


def commands_of(page: Path) -> list[str]:
    """The commands of a page's bash blocks, in order, without comments."""
    lines = "".join(BLOCK.findall(page.read_text())).replace("\\\n", " ").splitlines()
    without_comments = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines)
    return [" ".join(line.split()) for line in without_comments if line]


def as_bfsys(words: list[str]) -> tuple[str, list[str]] | None:
    """(name, arguments) of the bfsys command that a line calls, in any form; None for other commands."""
    if "bfsys" in words[:8]:
        place = words.index("bfsys") + 1
        return words[place], words[place + 1 :]
    if words[:2] == ["python", "-m"] and words[2].startswith("bfsys."):
        return words[2].removeprefix("bfsys."), words[3:]
    for place, word in enumerate(words):
        if word in SCRIPTS:
            return SCRIPTS[word], words[place + 1 :]
    return None


def parse(name: str, arguments: list[str]) -> argparse.Namespace:
    is_of_jobs = name == "slurm" and arguments[0] in cli.OF_SLURM_JOBS
    parser = cli.parser_of(cli.module_of("slurm_jobs" if is_of_jobs else name), f"bfsys {name}")
    return parser.parse_intermixed_args(arguments) if name in cli.INTERMIXED else parser.parse_args(arguments)


def check_options(command: str) -> None:
    """Check a command. Raises SystemExit for an unknown option, UserError for an unknown key of a config."""
    call = as_bfsys(shlex.split(command))
    if call is None:
        return
    args = parse(*call)
    if "config" in args:
        load_config(REPOSITORY / args.config, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_config_keys_exist(page: Path) -> None:
    for command in commands_of(page):
        check_options(command)


def commands_in(file: Path) -> list[str]:
    """The lines of a page, of a config's comments or of a docstring that are commands."""
    text = file.read_text()
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text), clean=False) or ""
    if file.suffix == ".md":  # fenced as well as indented
        text = re.sub(
            r"^```\w*\n(.*?)^```", lambda block: "    " + block[1].replace("\n", "\n    "), text, flags=FENCED
        )
    lines = LINE_OF_COMMAND.findall(re.sub(r"\\\n[ #]*", "", text))
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def check_parts(command: str) -> None:
    """Check options and config keys like `check_options`, also of benchmarks. CONFIG stands for any config."""
    words = shlex.split(command)
    if benchmark := next((word for word in words if word.startswith("tools/bench/")), ""):
        source, arguments = (REPOSITORY / benchmark).read_text(), words[words.index(benchmark) + 1 :]
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == []
        for config in [word for word in arguments if word.endswith(".yaml")]:
            load_config(REPOSITORY / config, [word for word in arguments if KEY_AND_VALUE.match(word)])
    elif {"CONFIG", "t.yaml"} & set(words):
        parse(*as_bfsys(words))
    else:
        check_options(command)


@pytest.mark.parametrize("file", OTHER_FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_commands_that_are_not_run_have_options_that_exist(file: Path) -> None:
    for command in commands_in(file):
        check_parts(command)


def test_commands_in_all_kinds_of_files_are_found(tmp_path: Path) -> None:
    files = {
        "page.md": "bfsys is a name\n```bash\nbfsys a \\\n  b   # c\n```\n\n    python d\n",
        "config.yaml": "#   bfsys a \\\n#       b",
        "tool.py": '"""Do it.\n\n    python d\n"""\nbfsys = 1\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert [commands_in(tmp_path / name) for name in files] == [["bfsys a b", "python d"], ["bfsys a b"], ["python d"]]


def test_a_wrong_option_of_a_benchmark_is_found() -> None:
    check_parts("python tools/bench/bench_plan.py --samples 1000")
    with pytest.raises(AssertionError, match="--sample"):
        check_parts("python tools/bench/bench_plan.py --sample 1000")
    with pytest.raises(UserError, match=r"train\.stepps"):
        check_parts("python tools/bench/baselines.py configs/small.yaml train.stepps=3")


def test_a_wrong_option_and_a_wrong_key_are_found() -> None:
    with pytest.raises(SystemExit):
        check_options("bfsys predict runs/x file --topp 3")
    with pytest.raises(UserError, match=r"train\.stepps"):
        check_options("deepspeed bfsys/train.py configs/small.yaml train.stepps=3")


def test_commands_that_are_not_run_are_documented() -> None:
    documented = {command for page in PAGES for command in commands_of(page)}
    assert set(NOT_RUN) - documented == set()


def tiny(command: str, more: dict[str, str]) -> list[str]:
    """The words of a command after the replacements, with the settings of TINY if it trains from a config."""
    for old, new in {**REPLACED, **more}.items():
        command = command.replace(old, new)
    words = shlex.split(command)
    call = as_bfsys(words)
    if call and call[0] in ("train", "launch"):
        words = [word for word in words if word.partition("=")[0] not in TINY]
        words += [f"{key}={value}" for key, value in TINY.items()]
    return words


@pytest.fixture
def workplace(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with small versions of the files that pages mention."""
    for name in ("bfsys", "configs", "launchers", "tools"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(
        REPOSITORY / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("node_modules", "model")
    )
    rng = np.random.default_rng(0)
    for path in [f"{folder}/{name}/{i:03}.jpg" for folder in ("photos", "new_photos") for name in ("cat", "dog")
                 for i in range(1, 13)] + ["photo.tif", "data/digits/val/image/seen_3/000026.tif"]:  # fmt: skip
        picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / path)
    digits = [f"data/digits/{split}/speech/heard_{digit}/{i:06}.wav" for split in ("train", "val") for digit in (3, 7)
              for i in range(4, 12)]  # fmt: skip
    for path in [*digits, "clip.wav", *(f"recordings/{word}/{i:03}.wav" for word in ("yes", "no") for i in range(8))]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(tmp_path / path), "wb") as file:
            file.setparams((1, 1, 8000, 0, "NONE", ""))
            file.writeframes(rng.integers(100, 150, 200, dtype=np.uint8).tobytes())
    (tmp_path / "runs").mkdir()
    shutil.copytree(finished_run, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_do_not_train(page: Path, workplace: Path, finished_run: Path) -> None:
    for command in commands_of(page):
        words = tiny(command, REPLACED_IN_THE_FAST_TEST)
        call = as_bfsys(words)
        if command in NOT_RUN:
            continue
        if call is None:  # the slow test runs it
            assert words[0] == "python", f"{command}: neither a command of bfsys, nor in NOT_RUN"
            assert (workplace / words[1]).is_file()
        elif call[0] in TRAIN and "--dry-run" not in call[1]:
            put_in_place(call, finished_run)
        else:
            assert cli.call(*call) in (None, 0), command


def put_in_place(call: tuple[str, list[str]], finished_run: Path) -> None:
    """Replace the run of a training command by a run that was trained before."""
    args = parse(*call)
    if getattr(args, "sweep", None):
        return
    name = args.folder.name if call[0] == "fit" else load_config(args.config, args.overrides).name
    if not Path("runs", name).exists():
        shutil.copytree(finished_run, Path("runs", name))


@pytest.mark.parametrize("page", EXPLANATIONS, ids=lambda page: page.name)
def test_code_in_explanations_prints_what_it_says(page: Path, capsys: pytest.CaptureFixture) -> None:
    code = "".join(PYTHON.findall(page.read_text()))
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path, workplace: Path) -> None:
    shutil.rmtree(workplace / "data")
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    digits = ["python", "tools/quickstart/make_digits.py", "data/digits"]
    packing = [["bfsys", "pack", "data/digits", "data/shards", "--name", kind, "--subdir", kind]
               for kind in ("image", "speech")]  # fmt: skip
    before = [digits, *packing] if "data/digits" in page.read_text() else []  # make quickstart is not run
    for words in [*before, *(tiny(command, {}) for command in commands_of(page) if command not in NOT_RUN)]:
        if words[0] == "bfsys":
            words = [sys.executable, "-m", *words]
        done = subprocess.run(words, cwd=workplace, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
