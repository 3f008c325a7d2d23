"""Files appear complete or not at all, also where the disk is full."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from programs import ENVIRONMENT
from torch import nn

from wmgym.checkpoints import save_tensors
from wmgym.files import complete, write_text
from wmgym.run import Run
from wmgym.settings import described, function_of


@pytest.fixture
def little_room():
    """No file may become larger than 20 kB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def big_run() -> Run:
    model = nn.Linear(100, 100)
    return Run(model, None, torch.optim.AdamW(model.parameters()), {})


def save_run(path):
    big_run().save(path)


def save_weights(path):
    save_tensors(path, {"weight": torch.zeros(100, 100)})


def save_words(path):
    write_text(path, "words " * 10_000)


@pytest.mark.parametrize("save", [save_run, save_weights, save_words])
def test_a_full_disk_is_an_error_that_names_the_file(save, tmp_path, little_room):
    path = tmp_path / "file"
    path.write_text("what was there before")
    with pytest.raises(OSError, match=f"{path} cannot be written, is the disk full"):
        save(path)
    assert path.read_text() == "what was there before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_other_failures_are_passed_on(tmp_path):
    with pytest.raises(IsADirectoryError), complete(tmp_path / "file", RuntimeError):
        tmp_path.write_text("a folder")
    assert not list(tmp_path.iterdir())


def test_what_a_run_was_started_with_can_be_written_down(tmp_path):
    def local():
        pass

    values = {"path": tmp_path, "sizes": (1, 2.5), "on": True, "none": None, "kind": "R3"}
    assert described(values) == {**values, "path": str(tmp_path), "sizes": [1, 2.5]}
    assert described(test_other_failures_are_passed_on).endswith("are_passed_on")
    assert described(local).startswith(f"{__name__}:{local.__qualname__}#")
    assert described(lambda x: x + 1) == described(lambda x: x + 1)
    assert described(lambda x: x + 1) != described(lambda x: x + 2)

    def times(factor):
        return lambda x: factor * x

    assert described(times(1)) == described(times(1)) != described(times(2))


def test_functions_without_a_name_are_described_alike_by_every_process():
    line = (
        "from wmgym.settings import described; "
        "print(described(lambda n: n in {'R1', 'R2', 'R3', 'x', 'y', 'z'}))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", line],
            env=ENVIRONMENT | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1
    assert described(nn.Linear(1, 1)) == "torch.nn.modules.linear:Linear"
    assert function_of("wmgym.settings:described") is described
    for wrong in ("wmgym.settings:nothing", "no_such_module:f", "wmgym.settings:", ":f"):
        with pytest.raises(ValueError, match="give module:function"):
            function_of(wrong)


def test_functions_are_also_found_in_the_working_directory(tmp_path, monkeypatch):
    """The path of an installed command begins elsewhere."""
    (tmp_path / "module_of_a_user.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert function_of("module_of_a_user:double")(2) == 4
