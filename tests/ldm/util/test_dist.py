import json
import subprocess
import sys
import textwrap

import pytest
import torch

from ldm.util.cli import UserError
from ldm.util.config import ROOT
from ldm.util.dist import Ranks, launch


def ranks(rank, world):
    found = Ranks()
    found.rank, found.world = rank, world
    return found


@pytest.mark.parametrize("start, stop, batch_size, world", [(0, 10, 2, 3), (3, 4, 8, 4), (5, 29, 4, 2), (2, 2, 3, 2)])
def test_shares_are_the_next_batches_in_order(start, stop, batch_size, world):
    shares = [ranks(rank, world).share(range(start, stop), batch_size) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(start, min(start + batch_size * world, stop)))
    assert all(len(share) <= batch_size for share in shares)


def test_one_process_alone():
    alone, device = launch(1, 1, torch.device("cpu"))
    assert alone.first and alone.world == 1 and device == torch.device("cpu")
    assert alone.of_first("x") == "x" and alone.gather([1]) == [[1]]
    assert alone.share(range(3, 20), 4) == range(3, 7)


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match="--device: cuda:1 is one device"):
        launch(2, 1, torch.device("cuda:1"))
    with pytest.raises(UserError, match=r"--devices: 64 are asked for, and there are \d+ CUDA devices"):
        launch(64, 1, torch.device("cuda"))


def test_two_processes_make_the_rows_of_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import atexit, json, sys
            from pathlib import Path
            import torch
            from infusion.metrics.run.cache import Cache
            from ldm.util.dist import launch

            folder = Path(sys.argv[1])
            connected = lambda: str(torch.distributed.is_initialized())
            atexit.register(lambda: (folder / f"{ranks.rank}.end").write_text(connected()))  # the last of all
            ranks, device = launch(2, 1, torch.device("cpu"))
            assert connected() == "True"
            made = []

            def make(rows):
                made.append(list(rows))
                return {"square": torch.tensor([float(i * i) for i in rows])}

            cache = Cache(folder / "cache", ranks=ranks)
            cache.rows("stage", {}, 3, 2, make)
            rows = cache.rows("stage", {}, 11, 2, make)["square"].tolist()
            figures = cache.figures("figure", {}, lambda: {"rank": ranks.rank})
            said = {"made": made, "rows": rows, "figures": figures, "device": device.type}
            said["first"] = ranks.of_first(ranks.rank)
            (folder / f"{ranks.rank}.json").write_text(json.dumps(said))
            """
        )
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, program, tmp_path], check=True, timeout=120, env=environment, capture_output=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["made"] == [[0, 1], [3, 4], [7, 8]] and second["made"] == [[2], [5, 6], [9, 10]]
    assert first["rows"] == second["rows"] == [i * i for i in range(11)]
    assert first["figures"] == second["figures"] == {"rank": 0}
    assert second["first"] == 0 and second["device"] == "cpu"
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [(tmp_path / f"{rank}.end").read_text() for rank in range(2)] == ["False"] * 2
