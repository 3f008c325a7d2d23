"""The command line: `wmgym COMMAND`; `wmgym --help` lists the commands.

The options of a command are the fields of a dataclass, of what it configures wherever there is one;
`wmgym COMMAND --help` explains them. Commands that measure something write a JSON report with their
own command line, the seed, the machine and the version in it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import select
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import wmgym
from wmgym.data.episodes import Split
from wmgym.extras import MissingExtraError


def _demo() -> None:
    """Imagine, score and film reference, noisy and random actions on what ships with wmgym."""
    from wmgym.demo import DemoConfig, demo

    demo(_options(DemoConfig), print)


def _record() -> None:
    """Record demonstrations of a LIBERO suite with the scripted experts (extra `libero`)."""
    from wmgym.experts.recorder import RecordConfig, record

    print(f"recorded {record(_options(RecordConfig))}")


def _train() -> None:
    """Train a world on demonstrations; resumes when the run's folder holds a checkpoint."""
    from wmgym.worlds.train import TrainConfig, train

    _training(train, TrainConfig)


def _train_tokenizer() -> None:
    """Train the published world's tokenizer; resumes when the run's folder holds a checkpoint."""
    from wmgym.worlds.tokens.train_tokenizer import PRESETS, TokenizerTraining, train_tokenizer

    _training(train_tokenizer, TokenizerTraining, PRESETS)


def _train_dynamics() -> None:
    """Train the published world's dynamics over a frozen tokenizer; resumes likewise."""
    from wmgym.worlds.tokens.train_dynamics import PRESETS, DynamicsTraining, train_dynamics

    _training(train_dynamics, DynamicsTraining, PRESETS)


def _diagnose() -> None:
    """Tell in which convention of actions a published world was trained."""
    from wmgym.worlds.tokens.diagnose import DiagnosisConfig, diagnose, summary

    config = _options(DiagnosisConfig)
    figures = diagnose(config)
    print(summary(figures))
    _report(config.out, figures, config.seed)


def _audit() -> None:
    """Compare imagined with real rewards, chunk by chunk (extra `libero`)."""
    from wmgym.audit import AuditConfig, audit, plot
    from wmgym.checkpoints import model_folder
    from wmgym.worlds.checkpoints import load_world

    config = _options(AuditConfig)
    target = config.out or _beside(model_folder("world", config.world), "audit.json")
    figures = audit(load_world(config.world), config)
    chunks = figures.pop("chunks")
    _report(target, figures, config.seed)
    plot({**figures, "chunks": chunks}, target.with_suffix(".png"))
    for name, value in figures.items():
        print(f"{name:24s} {value}")


def _bench() -> None:
    """Imagined control steps per second against LIBERO's own, in one run (extra `libero`)."""
    from wmgym.bench import BenchConfig, bench

    config = _options(BenchConfig)
    figures = bench(config)
    if config.out is not None:
        _report(config.out, figures, config.seed)
    for name, value in figures.items():
        print(f"{name:24s} {value}")


def _sft() -> None:
    """Train a policy on demonstrations; resumes when the run's folder holds a checkpoint."""
    from wmgym_agents.sft import PRESETS, SFTConfig, sft

    _training(sft, SFTConfig, PRESETS)


def _rft() -> None:
    """Fine-tune a policy in imagination with GRPO; resumes like `sft`."""
    from wmgym_agents.grpo import PRESETS, GRPOConfig, grpo

    _training(grpo, GRPOConfig, PRESETS)


def _experiment() -> None:
    """Fine-tune a policy in several ways and compare them in LIBERO; resumes (extra `libero`)."""
    from wmgym_agents.experiment import ExperimentConfig, experiment

    _log_to_stderr()
    experiment(_options(ExperimentConfig), _command(), print)


def _bench_published() -> None:
    """Measure the published world against Hugging Face's generate (extra `vla`)."""
    from wmgym.bench_published import BenchPublishedConfig, bench_published

    config = _options(BenchPublishedConfig)
    figures = bench_published(config, print)
    for dtypes in figures.values():
        for dtype, told in dtypes.items():
            print(dtype)
            for name, way in told["ways"].items():
                shown = "  ".join(f"{part} {value:.2f}" for part, value in way.items())
                print(f"  {name:10s} {shown}")
            for name, value in told.items():
                if "speedup" in name or "same" in name:
                    print(f"  {name:36s} {value}")
    if config.out is not None:
        _report(config.out, figures, config.seed)


def _bench_rft() -> None:
    """Measure an RFT step at the published size, with random weights (extra `vla`)."""
    from wmgym_agents.bench import BenchRFTConfig, bench_rft

    config = _options(BenchRFTConfig)
    figures = bench_rft(config)
    for name, value in figures["steps"][-1].items():
        print(f"{name:24s} {value:.4f}")
    print(f"peak memory {figures['peak_memory_gib']} GiB, parameters {figures['parameters']}")
    if config.out is not None:
        _report(config.out, figures, config.seed)


def _evaluate() -> None:
    """Measure how often a policy solves its tasks in LIBERO; resumes (extra `libero`)."""
    from wmgym_agents.evaluate import PAGE, REPORT, EvaluationConfig, evaluate, report

    _log_to_stderr()
    config = _options(EvaluationConfig)
    figures = report(config, evaluate(config), _command())
    for setting, rate in figures["settings"].items():
        share = 100 * rate["successes"] / rate["episodes"]
        low, high = (100 * bound for bound in rate["interval"])
        episodes = f"{rate['successes']} of {rate['episodes']}"
        broken = f", {rate['errors']} broke off" if rate["errors"] else ""
        print(f"{setting:24s} {share:5.1f} %  [{low:.1f}, {high:.1f}]  {episodes}{broken}")
    print(f"wrote {config.out / REPORT} and {config.out / PAGE}")


def _compare() -> None:
    """Compare evaluations of policies on the same episodes, pair by pair."""
    from wmgym_agents.compare import CompareConfig, compare, table

    config = _options(CompareConfig)
    figures = compare(config, _command())
    print(table(figures))
    for name, count in figures["left_out"].items():
        if count:
            print(f"{name}: {count} episodes left out, which another one has not played")
    print(f"wrote {config.out} and {config.out.with_suffix('.html')}")


@dataclass(frozen=True)
class Score:
    """Score a world's pictures on held-out episodes, or on those it was trained on."""

    data: tuple[Path, ...]
    """Folders of LeRobot v3 or RLDS datasets."""
    world: str = "libero-small"
    """Name or folder of the world."""
    out: Path | None = None
    """The report; without, report.json in the world's folder, or here for a shipped world, and
    report-SPLIT.json for another split."""
    windows: int = 200
    """Windows per dataset."""
    horizon: int = 8
    """Control steps imagined open loop; past the world's own horizon it goes on from its frames."""
    split: Split = "held_out"
    """Episodes that windows are chosen of."""
    seed: int = 0
    """Seed of the choice of windows."""

    def run(self) -> None:
        """Scores the world and writes the report."""
        from wmgym.checkpoints import model_folder
        from wmgym.worlds.checkpoints import load_world
        from wmgym.worlds.evaluate import METRICS, evaluate

        folder = model_folder("world", self.world)
        report = "report.json" if self.split == "held_out" else f"report-{self.split}.json"
        target = self.out or _beside(folder, report)
        figures = evaluate(
            load_world(folder),
            self.data,
            windows=self.windows,
            horizon=self.horizon,
            seed=self.seed,
            split=self.split,
        )
        _report(target, {"split": self.split, **figures}, self.seed)
        for name, scores in {"all": figures, **figures["datasets"]}.items():
            print(name)
            for prefix in ("", "copy_", "tokenizer_"):
                row = "  ".join(f"{m} {scores[prefix + m]:.4f}" for m in METRICS)
                print(f"  {prefix.rstrip('_') or 'world':10s} {row}")


@dataclass(frozen=True)
class Report:
    """Print the README's tables from committed reports."""

    world: str = "libero-small"
    """Name or folder of the world."""

    def run(self) -> None:
        """Prints Markdown tables: pictures, audit, speeds, memory, and the experiment."""
        from wmgym_agents.compare import overview

        from wmgym.assets import asset_path
        from wmgym.checkpoints import model_folder
        from wmgym.reports import (
            audit_table,
            memory_table,
            published_table,
            quality_table,
            speed_table,
        )

        folder = model_folder("world", self.world)
        published = asset_path("reports", "bench_published.json")
        tables = (
            quality_table(folder),
            audit_table(folder),
            speed_table(asset_path("reports", "bench_small.json")),
            published_table(published),
            memory_table(published),
            *(
                overview(json.loads(path.read_text()))
                for path in sorted(asset_path("reports").glob("experiment*.json"))
            ),
        )
        print("\n\n".join(tables))


@dataclass(frozen=True)
class ImportPolicy:
    """Make a policy of a folder of the released VLA-RFT (extra `vla`)."""

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]]
    """The folder, such as a copy of VLA-RFT/Base-Libero-Object: config.json, model.safetensors,
    dataset_statistics.json, tokenizer, action_head--*.pt and the two projectors."""
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """The new folder, which every --policy and --init-from takes."""
    suite: str | None = None
    """Whose statistics to use, where the folder has those of several."""

    def run(self) -> None:
        """Reads every tensor, strictly, and writes the policy."""
        from wmgym_agents.published import load_published

        if self.out.exists():
            raise FileExistsError(f"{self.out} exists: choose another folder, or remove it")
        policy = load_published(self.source, self.suite)
        policy.save_pretrained(self.out, version=wmgym.__version__, imported=str(self.source))
        print(f"imported {self.out}")


@dataclass(frozen=True)
class Subset:
    """Copy some episodes of a LeRobot v3 dataset into a smaller one, without re-encoding."""

    data: Path
    """The dataset."""
    out: Path
    """The new dataset."""
    per_task: int = 5
    """Training episodes of every task, the successful ones first; held-out ones are all kept."""
    wrist: bool = False
    """Keep the wrist camera."""
    sim_states: bool = True
    """Keep the simulator states, which an audit needs."""

    def run(self) -> None:
        """Copies."""
        from wmgym.data import LeRobotDataset, subset
        from wmgym.data.selection import representative

        chosen = representative(LeRobotDataset(self.data).episodes, self.per_task)
        subset(self.data, self.out, chosen, keep_sim_states=self.sim_states, keep_wrist=self.wrist)
        print(f"{len(chosen)} episodes in {self.out}")


@dataclass(frozen=True)
class Convert:
    """Turn an RLDS dataset into a LeRobot v3 one, or back; resumes."""

    data: Path
    """The dataset, of either format."""
    out: Path
    """The new dataset, of the other; as RLDS it is called like this folder."""
    wrist: bool = True
    """Keep the wrist camera, where there is one."""
    quality: int = 95
    """Quality of the JPEGs in RLDS, 1 to 100."""

    def run(self) -> None:
        """Converts."""
        from wmgym.data import convert_dataset

        out = convert_dataset(self.data, self.out, wrist=self.wrist, quality=self.quality)
        print(f"wrote {out}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": _demo,
    "record": _record,
    "train": _train,
    "train-tokenizer": _train_tokenizer,
    "train-dynamics": _train_dynamics,
    "diagnose": _diagnose,
    "score": Score,
    "audit": _audit,
    "sft": _sft,
    "rft": _rft,
    "import-policy": ImportPolicy,
    "evaluate": _evaluate,
    "compare": _compare,
    "experiment": _experiment,
    "bench": _bench,
    "bench-published": _bench_published,
    "bench-rft": _bench_rft,
    "report": Report,
    "subset": Subset,
    "convert": Convert,
}
"""What a name runs: a function, or a class whose fields are the options."""


def _beside(world: Path, name: str) -> Path:
    """Where a report of a world goes by default: never among the files that ship."""
    from wmgym.assets import asset_path

    shipped = asset_path() in world.resolve().parents
    return Path(name) if shipped else world / name


def _report(path: Path, figures: dict[str, Any], seed: int) -> None:
    from wmgym.reports import write_report

    write_report(path, figures, command=_command(), seed=seed)
    print(f"wrote {path}")


def _training(
    train: Callable[[Any], Path], kind: type[Any], presets: dict[Any, Any] | None = None
) -> None:
    _log_to_stderr()
    print(f"trained {train(_options(kind, presets))}")


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def _command() -> str:
    return shlex.join(["wmgym", *sys.argv[1:]])


def _options(kind: type[Any], presets: dict[Any, Any] | None = None) -> Any:
    """The options on the command line, as what they configure.

    Args:
        kind: A dataclass.
        presets: Changed defaults by name; `--preset NAME`, else the first, chooses among them.
    """
    name, *given = sys.argv[1:]
    read = functools.partial(
        tyro.cli,
        prog=f"wmgym {name}",
        description=COMMANDS[name].__doc__,
        args=given,
        config=(tyro.conf.AvoidSubcommands,),  # of several shapes, that of the defaults
    )
    if presets is None:
        return read(kind)
    words = [part for word in given for part in word.split("=", 1)]
    chosen = words[words.index("--preset") + 1 :][:1] if "--preset" in words else []
    preset = chosen[0] if chosen and chosen[0] in presets else next(iter(presets))
    needed = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    explained = tyro.conf.arg(help="Chooses the defaults of all other options.")
    named: Any = Literal[tuple(presets)]
    both = dataclasses.make_dataclass(
        kind.__name__,
        [
            ("preset", Annotated[named, explained], dataclasses.field(default=preset)),
            (
                "options",
                Annotated[kind, tyro.conf.arg(name="")],
                dataclasses.field(default=kind(**needed, **presets[preset])),
            ),
        ],
    )
    return read(both).options


def _usage() -> str:
    lines = [f"  {name:15s} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: wmgym COMMAND [--help] [OPTIONS]", "", *lines])


def main() -> None:
    """Entry point of the command `wmgym`."""
    try:
        try:
            _run(sys.argv[1] if len(sys.argv) > 1 else "")
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):  # another pipe
            sys.exit(f"wmgym: {error}")
        # Whoever reads the output, `head` say, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except FileExistsError as error:
        sys.exit(f"wmgym: {error.filename} is a file" if error.filename else f"wmgym: {error}")
    except (ValueError, ArithmeticError, OSError, NotImplementedError, MissingExtraError) as error:
        sys.exit(f"wmgym: {error}")
    except KeyboardInterrupt:
        sys.exit("wmgym: interrupted; long jobs go on from their last checkpoint")


def _run(name: str) -> None:
    """Runs a command by its name."""
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        print(f"wmgym {wmgym.__version__}")
    elif name in COMMANDS:
        command = COMMANDS[name]
        _options(command).run() if isinstance(command, type) else command()
    else:
        print(f"{_usage()}\n\nwmgym: no such command: {name!r}", file=sys.stderr)
        sys.exit(2)
