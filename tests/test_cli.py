"""The command line: help, reports, and one line for whatever goes wrong."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys

import pytest
from wmgym_agents.bench import BenchRFTConfig
from wmgym_agents.compare import CompareConfig
from wmgym_agents.evaluate import EvaluationConfig
from wmgym_agents.experiment import ExperimentConfig
from wmgym_agents.grpo import GRPOConfig
from wmgym_agents.sft import SFTConfig

from wmgym import cli
from wmgym.audit import AuditConfig
from wmgym.bench import BenchConfig
from wmgym.bench_published import BenchPublishedConfig
from wmgym.checkpoints import shipped
from wmgym.data import LeRobotDataset
from wmgym.demo import DemoConfig
from wmgym.experts.recorder import RecordConfig
from wmgym.worlds.checkpoints import load_model
from wmgym.worlds.tokens.diagnose import DiagnosisConfig
from wmgym.worlds.tokens.train_dynamics import DynamicsTraining
from wmgym.worlds.tokens.train_tokenizer import TokenizerTraining
from wmgym.worlds.train import TrainConfig

OPTIONS = {
    "demo": DemoConfig,
    "record": RecordConfig,
    "train": TrainConfig,
    "train-tokenizer": TokenizerTraining,
    "train-dynamics": DynamicsTraining,
    "diagnose": DiagnosisConfig,
    "score": cli.Score,
    "audit": AuditConfig,
    "sft": SFTConfig,
    "rft": GRPOConfig,
    "import-policy": cli.ImportPolicy,
    "evaluate": EvaluationConfig,
    "compare": CompareConfig,
    "experiment": ExperimentConfig,
    "bench": BenchConfig,
    "bench-published": BenchPublishedConfig,
    "bench-rft": BenchRFTConfig,
    "report": cli.Report,
    "subset": cli.Subset,
    "convert": cli.Convert,
}


@pytest.fixture
def wmgym(monkeypatch, capsys):
    """Runs a command line in this process: exit code (or message), stdout, stderr."""

    def run(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["wmgym", *map(str, arguments)])
        try:
            cli.main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_help_names_every_command(wmgym):
    code, out, _ = wmgym("--help")
    assert code == 0
    assert OPTIONS.keys() == cli.COMMANDS.keys()
    for name, command in cli.COMMANDS.items():
        assert f"{name:15s} {command.__doc__}" in out
    code, _, printed = wmgym("evalute")
    assert code == 2
    assert out in printed
    assert "no such command: 'evalute'" in printed


@pytest.mark.parametrize("name", OPTIONS)
def test_help_of_a_command_names_every_option(name, wmgym):
    code, out, _ = wmgym(name, "--help")
    assert code == 0
    for field in dataclasses.fields(OPTIONS[name]):
        positional = "Positional" in str(field.type)
        assert positional or field.name.replace("_", "-") in out


def test_a_preset_of_the_policy_has_the_options_of_its_encoder(wmgym):
    for preset, option in (("small", "buckets"), ("vla-adapter", "tokenizer")):
        for words in (("--preset", preset), (f"--preset={preset}",)):
            code, out, _ = wmgym("sft", *words, "--help")
            assert code == 0
            assert f"--policy.encoder.{option}" in out
            assert "--preset {small,vla-adapter}" in out


def test_a_preset_chooses_the_defaults_and_options_change_them(wmgym, monkeypatch):
    given = []
    module = importlib.import_module("wmgym_agents.grpo")
    monkeypatch.setattr(module, "grpo", given.append)
    line = ("--policy", "x", "--out", "y", "--members", 3, "--reward", "toy:SIZE")
    for words in ((), ("--preset=small",)):
        assert wmgym("rft", *line, *words)[0] == 0
    assert [config.noise for config in given] == ["sigma_net", "noise_head"]
    assert {(config.members, config.reward) for config in given} == {(3, "toy:SIZE")}
    for words, said in (
        (("--preset", "large"), "published"),
        (("--noise", "none"), "noise_head"),
    ):
        code, _, printed = wmgym("rft", *line[:6], *words)
        assert code == 2
        assert said in printed
    assert "reward='R4': allowed are R1" in wmgym("rft", *line[:6], "--reward", "R4")[0]


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "wmgym"]
    options = {"capture_output": True, "text": True, "timeout": 120}
    shown = subprocess.run([*command, "--help"], check=True, **options)
    assert "evaluate" in shown.stdout
    missing = [*command, "subset", "--data", tmp_path / "absent", "--out", tmp_path / "out"]
    failed = subprocess.run(missing, **options)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("wmgym: ")
    assert failed.stderr.count("\n") == 1
    assert str(tmp_path / "absent") in failed.stderr


# --- commands -----------------------------------------------------------------------------------


def test_the_version_is_told(wmgym):
    code, out, _ = wmgym("--version")
    assert code in (0, None)
    assert out == f"wmgym {cli.wmgym.__version__}\n"


def test_a_file_in_the_place_of_a_folder_is_named(wmgym, tiny_dataset, tmp_path):
    (tmp_path / "out").write_text("")
    code, *_ = wmgym("train", "--data", tiny_dataset, "--out", tmp_path / "out")
    assert code == f"wmgym: {tmp_path / 'out'} is a file"


def test_a_reader_that_has_seen_enough_is_no_error():
    for line in (["--help"], ["record", "--help"], ["report"]):
        program = subprocess.Popen(
            [sys.executable, "-m", "wmgym", *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        program.stdout.close()
        assert program.stderr.read() == ""
        assert program.wait() == 1


def test_subset_copies_what_was_asked_for(wmgym, tiny_dataset, tmp_path):
    out = tmp_path / "small"
    code, printed, _ = wmgym("subset", "--data", tiny_dataset, "--out", out, "--per-task", 1)
    assert code == 0
    assert printed == f"4 episodes in {out}\n"
    dataset = LeRobotDataset(out)
    assert [info.init_state_id for info in dataset.episodes] == [0, 25, 40, 41]
    assert dataset.read(0).sim_states is not None
    assert dataset.keys.wrist_image is None
    kept = tmp_path / "wrist"
    options = ("--per-task", 0, "--wrist", "--no-sim-states")
    assert wmgym("subset", "--data", tiny_dataset, "--out", kept, *options)[0] == 0
    assert LeRobotDataset(kept).read(0, wrist=True).wrist_images is not None
    assert LeRobotDataset(kept).read(0).sim_states is None


def test_score_writes_a_report_that_can_be_made_again(wmgym, tiny_dataset, tiny_world, tmp_path):
    report = tmp_path / "report.json"
    line = ("score", "--data", tiny_dataset, "--world", tiny_world, "--out", report)
    options = ("--windows", 3, "--seed", 4)
    code, printed, _ = wmgym(*line, *options)
    assert code == 0
    assert f"wrote {report}" in printed
    figures = json.loads(report.read_text())
    assert figures["seed"] == 4
    assert figures["command"] == " ".join(map(str, ("wmgym", *line, *options)))
    assert figures["datasets"]["tiny"]["windows"] == 3
    for name in ("psnr", "ssim", "lpips", "mse"):
        for prefix in ("", "copy_", "tokenizer_"):
            assert prefix + name in figures
            assert len(figures["per_step"][prefix + name]) == 8
    for shown in ("tiny", "world", "copy", "tokenizer", f"psnr {figures['psnr']:.4f}"):
        assert shown in printed


def test_score_reports_beside_the_world(wmgym, tiny_dataset, tiny_world):
    code, _, _ = wmgym("score", "--data", tiny_dataset, "--world", tiny_world, "--windows", 1)
    assert code == 0
    report = tiny_world / "report.json"
    assert json.loads(report.read_text())["version"]
    report.unlink()


def test_train_goes_on_from_a_world(wmgym, tiny_dataset, tiny_world, tmp_path):
    options = (
        "--init-from",
        tiny_world,
        "--steps",
        2,
        "--lead",
        1,
        "--batch-size",
        2,
        "--device",
        "cpu",
    )
    line = ("train", "--data", tiny_dataset, "--out", tmp_path / "run", *options)
    code, printed, _ = wmgym(*line)
    assert code == 0
    assert f"trained {tmp_path / 'run' / 'world'}" in printed
    assert load_model(tmp_path / "run" / "world").config == load_model(tiny_world).config


# --- errors -------------------------------------------------------------------------------------


WRONG = {
    "unknown world": ("score --data DATA --world nothing", str(shipped("world"))),
    "no world": ("score --data DATA --world EMPTY", "config.json"),
    "no data": ("score --data EMPTY --world WORLD", "info.json"),
    "out exists": ("subset --data DATA --out EMPTY", "exists"),
    "negative": ("subset --data DATA --out NEW --per-task -1", "per_task=-1"),
    "no such device": ("train --data DATA --out NEW --init-from WORLD --device tpu", "'tpu'"),
    "diverging": (
        "train --data DATA --out NEW --init-from WORLD --learning-rate 1e30 --lead 1 --warmup 0",
        "lower learning_rate",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_said_in_one_line(name, wmgym, tiny_dataset, tiny_world, tmp_path):
    (tmp_path / "empty").mkdir()
    paths = {"DATA": tiny_dataset, "WORLD": tiny_world}
    paths |= {"EMPTY": tmp_path / "empty", "NEW": tmp_path / "new"}
    line, reason = WRONG[name]
    code, _, _ = wmgym(*(paths.get(word, word) for word in line.split()))
    assert isinstance(code, str)
    assert code.startswith("wmgym: ")
    assert reason in code
    assert "\n" not in code


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "usage: wmgym"),
        ("dance", "no such command: 'dance'"),
        ("subset", "--out"),
        ("bench --num-envs many", "many"),
        ("record --suite libero_kitchen --out x", "suite='libero_kitchen'"),
        ("train --data x --out x --steps 0", "must be >= 1"),
    ],
)
def test_wrong_usage_exits_with_two(line, reason, wmgym):
    code, _, printed = wmgym(*line.split())
    assert code == 2
    assert reason in printed


def test_an_interruption_ends_without_a_traceback(wmgym, tiny_dataset, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Subset, "run", interrupted)
    code, _, _ = wmgym("subset", "--data", tiny_dataset, "--out", tmp_path / "x")
    assert str(code).startswith("wmgym: interrupted")
