"""Several processes, on one machine or many, that share the rows of one piece of work."""

import atexit
import logging
from typing import TypeVar

import torch
from lightning_fabric import Fabric

from ldm.util.cli import UserError

Value = TypeVar("Value")


class Ranks:
    """The processes, each of which runs the same program. Rows of tensors stay on the CPU.

    Args:
        fabric: launched; None is one process alone.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank, self.world = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)

    @property
    def first(self) -> bool:
        """Whether this process is the one that reads, writes and speaks."""
        return self.rank == 0

    def of_first(self, value: Value) -> Value:
        """The first process's value, in all."""
        return value if self._fabric is None else self._fabric.broadcast(value)

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in the order of the ranks, in all."""
        values = [value] * self.world
        if self._fabric is not None:
            torch.distributed.all_gather_object(values, value)
        return values

    def share(self, rows: range, batch_size: int) -> range:
        """Which rows of the next `world` batches are this process's."""
        start = min(rows.start + self.rank * batch_size, rows.stop)
        return range(start, min(start + batch_size, rows.stop))


def leave() -> None:
    """Ends the connection to the other processes, if there is one.

    To be done before the interpreter ends: gloo's threads abort a process that ends around them (pytorch#179291).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(devices: int, num_nodes: int, device: torch.device) -> tuple[Ranks, torch.device]:
    """The processes that flags ask for, and the device of this one.

    The first process starts the others of its machine (Lightning Fabric), or a cluster's launcher has.

    Raises:
        UserError: more devices than there are, or one device named and several asked for.
    """
    if devices == num_nodes == 1:
        return Ranks(), device
    if device.index is not None:
        raise UserError(f"--device: {device} is one device; with --devices and --num_nodes name its type alone")
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"--devices: {devices} are asked for, and there are {torch.cuda.device_count()} CUDA devices")
    fabric = Fabric(accelerator=device.type, strategy="ddp", devices=devices, num_nodes=num_nodes)
    fabric.launch()
    atexit.register(leave)
    if fabric.global_rank:
        logging.disable(logging.WARNING)  # one process speaks for all
    return Ranks(fabric), fabric.device
