"""The DeepSpeed engine, its optimizer and its processes, set up so that nothing is compiled."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pavdm_dist.config import TrainConfig
from pavdm_dist.train.optimizer import MuonAdamW

# Weight matrices between hidden states; tables, embeddings, the first and the last layer are no such maps.
INNER = re.compile(r"(blocks\.|layers\.|t_block\.).*weight$")


@dataclass(frozen=True)
class World:
    """The processes that train together, as ``torchrun`` or DeepSpeed's launcher started them; one without either."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The first process' ``value``, on every process: what the clock decides must be decided once."""
        if self.size == 1:
            return value
        told = torch.tensor(value)
        torch.distributed.broadcast(told, 0)
        return int(told)


def join_world() -> World:
    """Starts ``torch.distributed`` through DeepSpeed, without compiling anything."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On CPUs DeepSpeed would compile a shared-memory collective at start-up (a minute, needs a compiler).
    operations = getattr(getattr(deepspeed, "ops", None), "__compatible_ops__", None)
    if operations is not None:
        operations["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size())


def start_engine(model: nn.Module, config: TrainConfig, world: World) -> Any:
    """A DeepSpeed engine over ``world``; ``config.data.batch_size`` is that of all processes together."""
    import deepspeed

    o = config.optimizer
    named = dict(model.named_parameters())
    matrices = {name for name, value in named.items() if value.ndim == 2 and INNER.search(name)}
    optimizer = MuonAdamW(
        [named[name] for name in named if name in matrices],
        [named[name] for name in named if name not in matrices],
        o.lr,
        (o.betas[0], o.betas[1]),
        o.weight_decay,
        o.matrix_ratio,
    )
    settings = {
        "train_micro_batch_size_per_gpu": config.data.batch_size // world.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": o.grad_clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 0},
        **config.deepspeed,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
