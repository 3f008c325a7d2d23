"""TFDS's side of the cross-check, run as a program of its own: TensorFlow takes seconds to import.

`tfds_program.py read FOLDER OUT.npz` dumps what TFDS reads of a version folder, every feature of
every episode under `<episode>/<feature>`; pictures twice, decoded accurately and by default.
`tfds_program.py write OUT` lets TFDS write a dataset of the published specification, and dumps what
it was given to `OUT/given.npz` and what it reads to `OUT/read.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

LENGTHS = (7, 4, 5)
CAMERAS = ("image", "wrist_image")


def read(folder: str, out: str) -> None:
    builder = tfds.builder_from_directory(folder)
    present = builder.info.features["steps"].feature["observation"]
    skipped = {c: tfds.decode.SkipDecoding() for c in CAMERAS if c in present}
    found: dict[str, np.ndarray] = {}
    episodes = builder.as_dataset(
        split="train",
        decoders={"steps": {"observation": skipped}},
        read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    for number, episode in enumerate(tfds.as_numpy(episodes)):
        found[f"{number}/file_path"] = np.array(episode["episode_metadata"]["file_path"])
        steps = list(episode["steps"])
        for name in steps[0]:
            if name != "observation":
                found[f"{number}/{name}"] = np.stack([step[name] for step in steps])
        for name in steps[0]["observation"]:
            values = [step["observation"][name] for step in steps]
            if name in skipped:
                for method in ("INTEGER_ACCURATE", ""):
                    decoded = [tf.io.decode_jpeg(v, dct_method=method).numpy() for v in values]
                    found[f"{number}/{name}/{method}"] = np.stack(decoded)
            else:
                found[f"{number}/{name}"] = np.stack(values)
    np.savez(out, **found)


def episode(number: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([5, number])
    coarse = rng.integers(0, 256, (2, length, 32, 32, 3), dtype=np.uint8)
    images = coarse.repeat(8, 2).repeat(8, 3)
    return {
        "image": images[0],
        "wrist_image": images[1],
        "state": rng.normal(size=(length, 8)).astype(np.float32),
        "joint_state": rng.normal(size=(length, 7)).astype(np.float32),
        "action": rng.uniform(-1, 1, (length, 7)).astype(np.float32),
    }


class LiberoGoal(tfds.core.GeneratorBasedBuilder):
    """A dataset of the published specification."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        f = tfds.features
        camera = f.Image(shape=(256, 256, 3), dtype=np.uint8, encoding_format="jpeg")
        steps = {
            "observation": f.FeaturesDict(
                {
                    "image": camera,
                    "wrist_image": camera,
                    "state": f.Tensor(shape=(8,), dtype=np.float32),
                    "joint_state": f.Tensor(shape=(7,), dtype=np.float32),
                }
            ),
            "action": f.Tensor(shape=(7,), dtype=np.float32),
            "discount": f.Scalar(dtype=np.float32),
            "reward": f.Scalar(dtype=np.float32),
            "is_first": f.Scalar(dtype=np.bool_),
            "is_last": f.Scalar(dtype=np.bool_),
            "is_terminal": f.Scalar(dtype=np.bool_),
            "language_instruction": f.Text(),
        }
        features = f.FeaturesDict(
            {
                "steps": f.Dataset(steps),
                "episode_metadata": f.FeaturesDict({"file_path": f.Text()}),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: object) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, length in enumerate(LENGTHS):
            given = episode(number, length)
            steps = [
                {
                    "observation": {
                        k: given[k][i] for k in ("image", "wrist_image", "state", "joint_state")
                    },
                    "action": given["action"][i],
                    "discount": 1.0,
                    "reward": float(i == length - 1),
                    "is_first": i == 0,
                    "is_last": i == length - 1,
                    "is_terminal": i == length - 1,
                    "language_instruction": "turn on the stove",
                }
                for i in range(length)
            ]
            yield str(number), {"steps": steps, "episode_metadata": {"file_path": f"{number}"}}


def write(out: str) -> None:
    LiberoGoal(data_dir=out).download_and_prepare()
    given = {
        f"{number}/{name}": value
        for number, length in enumerate(LENGTHS)
        for name, value in episode(number, length).items()
    }
    np.savez(Path(out) / "given.npz", **given)
    read(str(Path(out) / "libero_goal" / "1.0.0"), str(Path(out) / "read.npz"))


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
