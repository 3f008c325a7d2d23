from __future__ import annotations

import subprocess
import sys

import wmgym.data


def test_importing_loads_neither_video_nor_tables_nor_torch():
    code = (
        "import sys, wmgym.data; "
        "heavy = {'av', 'pyarrow', 'torch', 'PIL', 'safetensors'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_exported_name_exists():
    for name in wmgym.data.__all__:
        assert getattr(wmgym.data, name).__name__ == name
