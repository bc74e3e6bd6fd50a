"""All that is asked of the DeepSpeed package; nothing else imports it.

Its engine with saves, the process group, sharded weights, and the exchange of heads for sequence parallelism.
"""

from __future__ import annotations

import datetime
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.errors import EngineError
from pavdm_dist.train.zero_refusals import check_known


def join_group(timeout_seconds: float, device_type: str) -> bool:
    """Starts ``torch.distributed`` through DeepSpeed from the launcher's variables; nothing is compiled.

    Args:
        timeout_seconds: of a collective.
        device_type: ``cuda`` or ``cpu``.

    Returns:
        Whether the group is new; False where it was there already.

    Raises:
        EngineError: the processes could not be connected within that time.
    """
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # On CPUs DeepSpeed would compile a shared-memory collective at start-up (a minute, needs a compiler).
    operations = getattr(getattr(deepspeed, "ops", None), "__compatible_ops__", None)
    if operations is not None and device_type == "cpu":
        operations["deepspeed_shm_comm"] = False
    # DeepSpeed calls them by names that torch has just renamed, at every step.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    if torch.distributed.is_initialized() and deepspeed.comm.is_initialized():
        return False
    try:
        deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:  # torch has no finer type for a head that is not there
        where = " ".join(f"{name}={os.environ[name]}" for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EngineError(f"the processes could not be connected ({where}): {reason}") from error
    return True


class ZeroEngine:
    """A model and its optimizer under ZeRO.

    Args:
        model: on its device.
        optimizer: over its parameters; None = the one that the settings' ``optimizer`` block names.
        settings: DeepSpeed's.
        waits: at stage 0, whether a step waits for the gradients' norm, so that one that is no number moves nothing;
            otherwise it is told like every other, when nothing need wait for it, and those weights must not be kept.

    Attributes:
        module: the model.
        optimizer: DeepSpeed's, around the given one.
        trains_all: whether no parameter stays as it is.

    Raises:
        ConfigError: settings that DeepSpeed does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        settings: Mapping[str, Any],
        waits: bool = True,
    ) -> None:
        import deepspeed

        self._stage, self._waits, self._clip = settings["zero_optimization"]["stage"], waits, 0.0
        if self._stage == 0 and not waits:  # DeepSpeed's own clipping copies two numbers to the device and waits
            self._clip, settings = settings["gradient_clipping"], {**settings, "gradient_clipping": 0.0}
        self.trains_all = all(parameter.requires_grad for parameter in model.parameters())
        tables = {name: value.clone() for name, value in model.named_buffers()}
        check_known(settings)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=None if optimizer is not None else [p for p in model.parameters() if p.requires_grad],
            config=settings,
        )
        # In bfloat16 DeepSpeed rounds these too, which would move every position and the null text.
        for name, value in model.named_buffers():
            value.data = tables[name].to(value.device)
        self.module, self.optimizer = self._engine.module, self._engine.optimizer
        if self._stage in (1, 2) and getattr(self.optimizer, "cpu_offload", None) is False:
            _clip_without_waiting(self.optimizer)

    def forward(self, *inputs: Any) -> Any:
        """What the model gives for ``inputs``."""
        return self._engine(*inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside are not trained on."""
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one of the accumulated parts."""
        self._engine.backward(loss)

    def step(self) -> Tensor | float | None:
        """After every part's backward pass; the last part's takes the optimizer's step.

        Returns:
            After the last part the gradient's norm before clipping, over all processes, which its device may still be
            computing; None after the others, and where DeepSpeed was told not to compute it. With one that is no
            number no step is taken, but in bfloat16 at stages 1 and 2, and at stage 0 where it is not waited for: those
            weights must not be kept.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        norm: Tensor | float | None = None
        if last and self._stage == 0:
            # DeepSpeed tells no norm at this stage, and would step with whatever is there.
            trained = [p for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if self._clip:
                torch.nn.utils.clip_grads_with_norm_(trained, self._clip, norm)
            if self._waits:
                norm = float(norm)
                if not math.isfinite(norm):
                    return norm
        self._engine.step()
        told = self._engine.get_global_grad_norm() if last else None
        return norm if told is None else told

    def save(self, root: str | Path, tag: str, step: int) -> Exception | None:
        """Writes ``root/tag``, without naming it the latest; every process must call it.

        Returns:
            What kept this process from writing its files, if anything did: the others must not be left waiting.
        """
        with _noting_faults(self._engine) as faults:
            # Frozen weights come from the model that was begun with.
            about = {"client_state": {"step": step}, "exclude_frozen_parameters": not self.trains_all}
            self._engine.save_checkpoint(str(root), tag=tag, save_latest=False, **about)
        return faults[0] if faults else None

    def load(self, root: str | Path, tag: str) -> int | None:
        """Reads ``root/tag``; the number of steps done, None where nothing was read. Every process must call it."""
        path, state = self._engine.load_checkpoint(str(root), tag=tag, load_module_strict=self.trains_all)
        # Saving in this mode loses files at stage 3; the next checkpoint is an ordinary one again.
        self._engine._config.load_universal_checkpoint = False
        return None if path is None else int(state["step"])

    def destroy(self) -> None:
        """Takes DeepSpeed's hooks off the model; the engine is of no more use."""
        self._engine.destroy()


def _clip_without_waiting(optimizer: Any) -> None:
    """Replaces two methods of DeepSpeed's optimizer of stages 1 and 2, where moments lie on the device.

    On a GPU its own launch three kernels for every gradient, in float64, and wait for the norm between the backward
    pass and the step: a sixth of a step of a model of a thousand tensors. In other types than bfloat16 it still waits,
    to leave out a step whose norm is no number. The norm is rounded elsewhere, and no more.
    """
    optimizer.scaled_global_norm = partial(_norm_of_gradients, optimizer)
    optimizer.unscale_and_clip_grads = partial(_clip, optimizer)


def _norm_of_gradients(optimizer: Any, norm_type: float = 2) -> Tensor:
    """L2 norm of all gradients over all processes, each of which holds those of its own part."""
    assert norm_type == 2 and optimizer.loss_scale == 1
    parts = [part for group in optimizer.averaged_gradients.values() for part in group or ()]
    total = torch.zeros((), device=optimizer.device)
    if parts:
        total += torch.stack(torch._foreach_norm(parts, dtype=torch.float32)).square().sum()
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt()


def _clip(optimizer: Any, gradients: list[Tensor], norm: Tensor) -> None:
    """Makes gradients smaller where their norm is above what is allowed; of one that is no number nothing is left."""
    if optimizer.clip_grad > 0:
        scale = (optimizer.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)


@contextmanager
def _noting_faults(engine: Any) -> Iterator[list[Exception]]:
    """Files that cannot be written are noted, and DeepSpeed goes on to where its processes wait for each other."""
    faults: list[Exception] = []

    def noting(write: Callable[..., Any]) -> Callable[..., None]:
        def call(*given: Any, **more: Any) -> None:
            try:
                write(*given, **more)
            except (OSError, RuntimeError) as error:  # torch's writer has no finer type for a full disk
                faults.append(error)

        return call

    writer = engine.checkpoint_engine
    writer.save, engine._copy_recovery_script = noting(writer.save), noting(engine._copy_recovery_script)
    try:
        yield faults
    finally:  # the methods of their classes again
        del writer.save, engine._copy_recovery_script


def foreign_names(path: Path) -> list[str]:
    """What a ``.pt`` file would import besides tensors, plain data and DeepSpeed's own records; nothing is run.

    DeepSpeed unpickles its files whatever is in them, so this is asked first.
    """
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # of the old format, torn, or with instructions that tensors need not
        return [f"what cannot be looked at ({error})"]
    return [name for name in found if not _is_record(name)]


def _is_record(name: str) -> bool:
    module, _, cls = name.rpartition(".")
    if not module.startswith(("deepspeed.runtime.", "deepspeed.utils.", "deepspeed.checkpoint.")):
        return False
    try:
        found = getattr(import_module(module), cls)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and found.__module__ == module


def loading_universal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an engine that is to load what :func:`to_universal` wrote."""
    return {**settings, "checkpoint": {**settings.get("checkpoint", {}), "load_universal": True}}


def to_universal(root: Path, tag: str, target: str) -> str | None:
    """Lays the checkpoint ``root/tag`` out for any number of processes; what went wrong, if anything did."""
    shutil.rmtree(root / target, ignore_errors=True)
    words = ["--input_folder", str(root / tag), "--output_folder", str(root / target), "--inject_missing_state"]
    # The converter must not take itself for one of our processes.
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", *words],
        env={**alone, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def sharded_building(settings: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Modules that are made inside are sharded as they are made (stage 3)."""
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=settings)


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Makes sharded parameters whole on every process, and shards what the first one wrote into them again."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0) if parameters else nullcontext()


def readable(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Makes parameters whole on every process where they are sharded (stage 3); nothing may be written to them."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether this process holds a part of the parameter's float32 master only."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def stays(parameter: nn.Parameter) -> bool:
    """Whether this process' part of a parameter's master lies in one place from step to step (stages 1 and 2)."""
    return hasattr(parameter, "_hp_mapping")


def whole_shape(value: Tensor) -> torch.Size:
    """Of a whole parameter or buffer, also where only a part of it is here."""
    return getattr(value, "ds_shape", value.shape)


def local_part(parameter: nn.Parameter) -> tuple[int, Tensor]:
    """This process' part of a parameter's float32 master: where it starts in the flattened parameter, and a view.

    Stage 0 has no other master than the parameter, which is whole everywhere.
    """
    if hasattr(parameter, "ds_id"):  # stage 3
        from deepspeed.utils import safe_get_local_fp32_param

        part = safe_get_local_fp32_param(parameter).flatten()
        start = torch.distributed.get_rank() * part.numel()
        return start, part[: max(min(part.numel(), whole_shape(parameter).numel() - start), 0)]
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, torch.empty(0, device=parameter.device)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment()
    return 0, parameter.detach().flatten()


def exchanging_heads(attend: Callable[..., Tensor], group: Any) -> Callable[..., Tensor]:
    """DeepSpeed-Ulysses: ``attend`` over all tokens for a share of the heads, called with a share of the tokens.

    Args:
        attend: ``(query, key, value, *more)`` -> output, all but ``more`` ``[rows, tokens, heads, head_dim]``.
        group: the processes that the tokens lie on, in equal parts; they divide the heads.

    Returns:
        The same for this process' tokens and all heads. Every process of the group must call it.
    """
    from deepspeed.sequence.layer import DistributedAttention

    exchange = DistributedAttention(attend, group, scatter_idx=2, gather_idx=1)
    rows_dim, rotary = 0, None
    return lambda query, key, value, *more: exchange(query, key, value, rows_dim, rotary, *more)
