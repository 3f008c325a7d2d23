"""The command line: `wmgym demo | record | train | evaluate | audit | bench | report | subset`.

Every command is a dataclass; its fields are the options and `wmgym COMMAND --help` explains them.
Commands that measure something write a JSON report with their own command line, the seed, the
machine and the version in it.
"""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from wmgym.extras import MissingExtraError


@dataclass(frozen=True)
class Demo:
    """Imagine, score and film reference, noisy and random actions on what ships with wmgym."""

    world: str = "libero-small"
    """Name or folder of the world."""
    suite: str = "libero_object"
    """LIBERO suite."""
    out: Path = Path("demo")
    """Folder of the videos."""
    seed: int = 0
    """Seed of starts and noise."""

    def run(self) -> None:
        """Prints the table and writes the videos."""
        from wmgym.demo import DemoConfig, demo

        demo(DemoConfig(world=self.world, suite=self.suite, out=self.out, seed=self.seed), print)


@dataclass(frozen=True)
class Record:
    """Record demonstrations of a LIBERO suite with the scripted experts (extra `libero`)."""

    suite: str
    """LIBERO suite, e.g. libero_object."""
    out: Path
    """Folder of the LeRobot v3 dataset."""
    tasks: tuple[int, ...] = ()
    """Task ids; all without."""
    episodes: int = 26
    """Takes of every task from training initial states."""
    held_out: int = 3
    """Takes of every task from held-out initial states."""
    misses: int = 2
    """Takes of every task that miss their grasp."""
    image_size: int = 128
    """Height and width of the images, pixels."""
    fast_rendering: bool = True
    """Simplified meshes and no mirror images: see the README."""
    seed: int = 0
    """Seed of everything random."""
    workers: int = 2
    """Processes."""

    def run(self) -> None:
        """Records, or goes on with an interrupted recording."""
        from wmgym.experts.recorder import RecordConfig, record

        config = RecordConfig(
            suite=self.suite,
            out=self.out,
            tasks=self.tasks,
            episodes=self.episodes,
            held_out=self.held_out,
            misses=self.misses,
            image_size=self.image_size,
            fast_rendering=self.fast_rendering,
            seed=self.seed,
            workers=self.workers,
        )
        print(f"recorded {record(config)}")


@dataclass(frozen=True)
class Train:
    """Train a world on demonstrations; resumes when the run's folder holds a checkpoint."""

    data: tuple[Path, ...]
    """Folders of LeRobot v3 datasets."""
    out: Path
    """Folder of the run; the finished world is in its subfolder `world`."""
    init_from: str | None = None
    """World to go on from: a shipped name or a folder."""
    steps: int = 20_000
    """Optimizer steps."""
    batch_size: int = 16
    """Windows per step, over all processes."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    warmup: int = 500
    """Steps of linear warm-up."""
    lead: int = 3
    """Most chunks imagined before the one trained on; 0 trains on recorded frames only."""
    seed: int = 0
    """Seed of the weights and of the windows."""
    device: str = "auto"
    """auto, cpu or cuda."""
    bfloat16: bool = True
    """Matrix products in bfloat16."""

    def run(self) -> None:
        """Trains."""
        from wmgym.worlds.train import TrainConfig, train

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        folder = train(
            TrainConfig(
                data=self.data,
                out=self.out,
                init_from=self.init_from,
                steps=self.steps,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                warmup=self.warmup,
                lead=self.lead,
                seed=self.seed,
                device=self.device,
                bfloat16=self.bfloat16,
            )
        )
        print(f"trained {folder}")


@dataclass(frozen=True)
class Evaluate:
    """Score a world's pictures on held-out episodes."""

    data: tuple[Path, ...]
    """Folders of LeRobot v3 datasets with held-out initial states."""
    world: str = "libero-small"
    """Name or folder of the world."""
    out: Path | None = None
    """The report; without, report.json in the world's folder, or here for a shipped world."""
    windows: int = 200
    """Windows per dataset."""
    horizon: int = 8
    """Control steps imagined open loop; past the world's own horizon it goes on from its frames."""
    seed: int = 0
    """Seed of the choice of windows."""

    def run(self) -> None:
        """Scores the world and writes the report."""
        from wmgym.worlds.checkpoints import load_model, world_folder
        from wmgym.worlds.evaluate import METRICS, evaluate
        from wmgym.worlds.latent_world import LatentWorld

        folder = world_folder(self.world)
        target = self.out or _beside(folder, "report.json")
        world = LatentWorld(load_model(folder), name=folder.name)
        figures = evaluate(
            world, self.data, windows=self.windows, horizon=self.horizon, seed=self.seed
        )
        _report(target, figures, self.seed)
        for name, scores in {"all": figures, **figures["datasets"]}.items():
            print(name)
            for prefix in ("", "copy_", "tokenizer_"):
                row = "  ".join(f"{m} {scores[prefix + m]:.4f}" for m in METRICS)
                print(f"  {prefix.rstrip('_') or 'world':10s} {row}")


@dataclass(frozen=True)
class Audit:
    """Compare imagined with real rewards, chunk by chunk (extra `libero`)."""

    data: tuple[Path, ...]
    """Folders of LeRobot v3 datasets with held-out episodes and simulator states."""
    world: str = "libero-small"
    """Name or folder of the world."""
    out: Path | None = None
    """The report, with plots beside it as PNG; without, audit.json in the world's folder, or here
    for a shipped world."""
    work: Path = Path("runs/audit")
    """Real rollouts are kept here and not repeated."""
    starts: int = 300
    """Held-out starts per dataset."""
    seed: int = 0
    """Seed of starts and noise."""
    workers: int = 2
    """Simulator processes."""

    def run(self) -> None:
        """Audits the world, writes the report and the plots."""
        from wmgym.audit import AuditConfig, audit, plot
        from wmgym.worlds.checkpoints import load_world, world_folder

        config = AuditConfig(
            data=self.data,
            out=self.work,
            starts=self.starts,
            seed=self.seed,
            workers=self.workers,
        )
        target = self.out or _beside(world_folder(self.world), "audit.json")
        figures = audit(load_world(self.world), config)
        target.parent.mkdir(parents=True, exist_ok=True)
        plot(figures, target.with_suffix(".png"))
        del figures["chunks"]
        _report(target, figures, self.seed)
        for name, value in figures.items():
            print(f"{name:24s} {value}")


@dataclass(frozen=True)
class Bench:
    """Imagined control steps per second against LIBERO's own, in one run (extra `libero`)."""

    world: str = "libero-small"
    """Name or folder of the world."""
    suite: str = "libero_object"
    """LIBERO suite."""
    num_envs: int = 64
    """Imagined environments."""
    group_size: int = 16
    """Environments that share a start and its reference."""
    action_chunk: int = 8
    """Control steps per step of the imagined environments."""
    dtype: str = "bfloat16"
    """float32 or bfloat16."""
    repeats: int = 5
    """Repeats; the median is reported."""
    out: Path | None = None
    """The report; none is written without."""
    seed: int = 0
    """Seed of starts and actions."""

    def run(self) -> None:
        """Measures and prints both rates and their ratio."""
        from wmgym.bench import BenchConfig, bench

        figures = bench(
            BenchConfig(
                world=self.world,
                suite=self.suite,
                num_envs=self.num_envs,
                group_size=self.group_size,
                action_chunk=self.action_chunk,
                dtype=self.dtype,
                repeats=self.repeats,
                seed=self.seed,
            )
        )
        if self.out is not None:
            _report(self.out, figures, self.seed)
        for name, value in figures.items():
            print(f"{name:24s} {value}")


@dataclass(frozen=True)
class Report:
    """Print the README's tables of a shipped world from its committed reports."""

    world: str = "libero-small"
    """Name or folder of the world."""

    def run(self) -> None:
        """Prints three Markdown tables: pictures, audit, speed."""
        from wmgym.assets import asset_path
        from wmgym.reports import audit_table, quality_table, speed_table
        from wmgym.worlds.checkpoints import world_folder

        folder = world_folder(self.world)
        tables = (
            quality_table(folder),
            audit_table(folder),
            speed_table(asset_path("reports", "bench_small.json")),
        )
        print("\n\n".join(tables))


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


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Record, tyro.conf.subcommand("record")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Subset, tyro.conf.subcommand("subset")]
)


def _beside(world: Path, name: str) -> Path:
    """Where a report of a world goes by default: never among the files that ship."""
    from wmgym.assets import asset_path

    shipped = asset_path() in world.resolve().parents
    return Path(name) if shipped else world / name


def _report(path: Path, figures: dict[str, Any], seed: int) -> None:
    from wmgym.reports import write_report

    write_report(path, figures, command=shlex.join(["wmgym", *sys.argv[1:]]), seed=seed)
    print(f"wrote {path}")


def main() -> None:
    """Entry point of the command `wmgym`."""
    command: Any = tyro.cli(Command, prog="wmgym", description=__doc__)
    try:
        command.run()
    except (ValueError, ArithmeticError, OSError, NotImplementedError, MissingExtraError) as error:
        sys.exit(f"wmgym: {error}")
    except KeyboardInterrupt:
        sys.exit("wmgym: interrupted; long jobs go on where they stopped when started again")
