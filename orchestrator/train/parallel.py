"""How ranks share a model: each holds all of it, or each holds a part of every parameter (FSDP2).

`shard` cuts every parameter over all ranks, `hybrid` over the ranks of a node, with a copy on every node. A
rank's share of the global batch stays the same, so losses and gradients are those of the replicated engine up to the
order of sums. Optimizer, moving averages and checkpoints work on a rank's own rows as plain tensors.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from itpn_core.compiling import blocks
from itpn_core.errors import ConfigError
from itpn_core.models.layers import ConcatMerge, ConvMerge
from itpn_core.task import Task, TaskOutput
from orchestrator.checkpoint.pieces import Piece, piece_of
from orchestrator.checkpoint.store import Together
from orchestrator.train.config import TrainConfig
from orchestrator.train.context import RunContext

BIAS_TABLE = "relative_position_bias_table"


class Parallel(Protocol):
    """What the engine needs to know about where parameters are."""

    trainable: list[tuple[str, nn.Parameter]]
    """What this rank updates, by name: whole parameters or its rows of them."""
    pieces: dict[str, Piece]
    """Parameters of which this rank holds a part only; {} = it holds all of them."""
    together: Together | None
    """The ranks that write a checkpoint together; None where rank 0 writes it alone."""

    def start(self, start: Callable[[Any], None]) -> None:
        """Lets `start` change the whole task before a new run's first step; equal on all ranks afterwards."""

    def begin(self) -> None:
        """After the state is what the first step begins with."""

    def forward(self, images_B3HW: Tensor, targets: Any, keys_B: Tensor) -> TaskOutput:
        """The task's forward pass; its backward pass sums gradients over ranks."""

    def accumulating(self) -> AbstractContextManager[Any]:
        """A backward pass in here keeps its gradients on the rank; a later one outside sums them up."""

    def take_gradients(self) -> None:
        """Gives the tensors of `trainable` their gradients."""

    def total_norm(self, norm: Tensor) -> Tensor:
        """The norm of all gradients, from that of this rank's."""

    def drop_gradients(self) -> None:
        """Frees all gradients."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up a task's persistent state, of the `pieces` this rank's rows."""

    def whole(self) -> AbstractContextManager[Any]:
        """The task with all its weights on every rank, for looking and measuring. Collective."""


class Replicated:
    """Every rank holds all weights; gradients are averaged by DistributedDataParallel.

    Args:
        task: what is trained.
        device: where it is.
        world: number of ranks.
    """

    together: Together | None = None

    def __init__(self, task: Task, device: torch.device, world: int) -> None:
        self._task = task
        self._device = device
        self._world = world
        self._model: nn.Module = task
        self.trainable = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
        self.pieces: dict[str, Piece] = {}

    def start(self, start: Callable[[Any], None]) -> None:
        """As `Parallel.start`; `begin` makes ranks equal."""
        start(self._task)

    def begin(self) -> None:
        """Wraps the task for gradient averaging, which also copies rank 0's tensors; one rank needs no wrapper."""
        if self._world == 1:
            return
        # Buffers are equal by construction (statistics are computed once and broadcast): no broadcast a step.
        # Newer torch has a new name for the option.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        self._model = DistributedDataParallel(
            self._task,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **buffers,
        )

    def forward(self, images_B3HW: Tensor, targets: Any, keys_B: Tensor) -> TaskOutput:
        """As `Parallel.forward`."""
        output: TaskOutput = self._model(images_B3HW, targets, keys_B)
        return output

    def accumulating(self) -> AbstractContextManager[Any]:
        """As `Parallel.accumulating`."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    def take_gradients(self) -> None:
        """They are there already."""

    def total_norm(self, norm: Tensor) -> Tensor:
        """It is the norm already."""
        return norm

    def drop_gradients(self) -> None:
        """As `Parallel.drop_gradients`."""
        for _, parameter in self.trainable:
            parameter.grad = None

    def load(self, state: dict[str, Tensor]) -> None:
        """As `Parallel.load`."""
        self._task.load_persistent_state(state)

    def whole(self) -> AbstractContextManager[Any]:
        """The task itself."""
        return nullcontext(self._task)


class Writers:
    """The ranks that write a checkpoint together (`orchestrator.checkpoint.store.Together`).

    Args:
        mesh: how parameters are cut; of replicas, the first writes.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        # A group of its own: its calls come from the writing threads, beside those of the training.
        self._group: Any = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.parts = mesh.size(mesh.ndim - 1)
        self.index = mesh.get_local_rank(mesh.ndim - 1)
        self.writes = mesh.ndim == 1 or mesh.get_local_rank(0) == 0

    def gather(self, value: Any) -> list[Any]:
        """As `Together.gather`."""
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, value, group=self._group)
        return found


class Sharded:
    """Every rank holds its rows of every parameter; a block's are gathered while it computes (`fully_shard`).

    Args:
        task: what is trained; its parameters are cut in place.
        mesh: one axis, or (copies, parts of a copy).
    """

    def __init__(self, task: Task, mesh: DeviceMesh) -> None:
        self._twin = twin(task)
        for unit in units(task):
            fully_shard(unit, mesh=mesh)
        # What belongs to no block stays gathered from `prepare` to the end of the backward pass.
        fully_shard(task, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(task, "prepare")
        self._task: Any = task
        self._cut: dict[str, Any] = dict(task.named_parameters())
        self._rows = {name: p.to_local().detach() for name, p in self._cut.items()}
        axis = mesh.ndim - 1
        self._shards = mesh.get_group(axis)
        index, parts = mesh.get_local_rank(axis), mesh.size(axis)
        self.pieces = {name: piece_of(tuple(p.shape), index, parts) for name, p in self._cut.items()}
        # Aliases of the rows: fused AdamW and the averages see plain tensors.
        self.trainable = [(name, nn.Parameter(self._rows[name])) for name, p in self._cut.items() if p.requires_grad]
        self.together: Together | None = Writers(mesh)

    def start(self, start: Callable[[Any], None]) -> None:
        """As `Parallel.start`: changes the whole task, takes rank 0's tensors, cuts them."""
        with self.whole() as task:
            start(task)
            state: dict[str, Tensor] = task.persistent_state()
            for tensor in task.state_dict().values():
                dist.broadcast(tensor, 0)
            for name, piece in self.pieces.items():
                state[name] = state[name][piece.start : piece.start + piece.rows]
            self.load(state)

    def begin(self) -> None:
        """Nothing: the parameters are cut already."""

    def forward(self, images_B3HW: Tensor, targets: Any, keys_B: Tensor) -> TaskOutput:
        """As `Parallel.forward`."""
        output: TaskOutput = self._task(images_B3HW, targets, keys_B)
        return output

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """As `Parallel.accumulating`."""
        self._task.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._task.set_requires_gradient_sync(True)

    def take_gradients(self) -> None:
        """As `Parallel.take_gradients`."""
        for name, rows in self.trainable:
            gradient = self._cut[name].grad
            rows.grad = None if gradient is None else gradient.to_local()

    def total_norm(self, norm: Tensor) -> Tensor:
        """As `Parallel.total_norm`; squares are summed in float64, whose range they cannot leave."""
        square = norm.double().square()
        dist.all_reduce(square, group=self._shards)
        return square.sqrt().to(norm.dtype)

    def drop_gradients(self) -> None:
        """As `Parallel.drop_gradients`."""
        for name, rows in self.trainable:
            rows.grad = self._cut[name].grad = None

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """As `Parallel.load`.

        Raises:
            ValueError: a parameter has another number of rows.
        """
        state = dict(state)
        for name, rows in self._rows.items():
            if name not in state:
                continue  # the task will say so
            if state[name].shape != rows.shape:
                raise ValueError(f"parameter {name!r} has {tuple(state[name].shape)} on this rank, not {rows.shape}")
            rows.copy_(state[name])
            state[name] = self._cut[name]  # so the task finds it in place
        self._task.load_persistent_state(state)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """As `Parallel.whole`: a plain task of the same class, whose memory is given back afterwards."""
        with torch.no_grad():
            state = self._task.persistent_state()
            state |= {name: p.full_tensor() for name, p in self._cut.items()}
            for name, parameter in self._twin.named_parameters():
                parameter.data = torch.empty_like(state[name])
            self._twin.load_persistent_state(state)
        del state
        self._twin.train(self._task.training)
        try:
            yield self._twin
        finally:
            _empty(self._twin)


def _empty(task: nn.Module) -> None:
    for parameter in task.parameters():
        parameter.data = parameter.data.new_empty(0)


def twin(task: Task) -> Task:
    """A copy of a task without memory for its parameters; a frozen teacher is shared."""
    teacher = getattr(task, "teacher", None)
    copied = copy.deepcopy(task, {} if teacher is None else {id(teacher): teacher})
    _empty(copied)
    return copied


def units(task: nn.Module) -> list[nn.Module]:
    """Blocks that are gathered one by one: those whose parameters nobody reads but their own forward pass.

    Left out, so gathered with the rest of the model: parts of the fusion head, whose layers the student calls itself;
    merges, which return a view (FSDP warns of those); blocks with a table of relative biases, which the trunk reads;
    the stage in which tokens are dropped or gathered.
    """
    reduced = {id(b) for m in task.modules() if getattr(m, "is_reduced", False) for b in getattr(m, "stage3", ())}
    return [
        block
        for block in blocks(task)
        if not isinstance(block, nn.Sequential | ConcatMerge | ConvMerge)
        and id(block) not in reduced
        and not any(name.endswith(BIAS_TABLE) for name, _ in block.named_parameters())
    ]


def open_mesh(config: TrainConfig, run: RunContext) -> DeviceMesh | None:
    """The ranks as `train.parallel` arranges them; None where each holds everything. Collective.

    Raises:
        ConfigError: the ranks cannot be arranged that way.
    """
    if config.parallel == "replicate" or run.world == 1:
        return None
    if config.parallel == "shard":
        return init_device_mesh(run.device.type, (run.world,), mesh_dim_names=("shard",))
    parts = config.shard_ranks or _ranks_of_a_node(run)
    if run.world % parts:
        allowed = f"hybrid needs copies of equal size, and {run.world} workers are no multiple of {parts}"
        hint = "Take another cluster.workers, set train.shard_ranks to a divisor, or take train.parallel=shard."
        raise ConfigError("train.shard_ranks", config.shard_ranks, allowed, hint)
    shape = (run.world // parts, parts)
    return init_device_mesh(run.device.type, shape, mesh_dim_names=("copy", "shard"))


def _ranks_of_a_node(run: RunContext) -> int:
    counts = [0] * run.world
    dist.all_gather_object(counts, run.local_world)
    if len(set(counts)) > 1:
        allowed = f"hybrid cannot follow the nodes, as they have {', '.join(map(str, sorted(set(counts))))} workers"
        hint = "Set it to the number of workers that share one copy, or take train.parallel=shard."
        raise ConfigError("train.shard_ranks", 0, allowed, hint)
    return run.local_world


def whole_gradients(task: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name, put together where they are cut. Collective then."""
    found: dict[str, Tensor] = {}
    for name, parameter in task.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
    return found
