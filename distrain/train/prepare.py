"""From a config to a run that can start: everything is checked, laid out and sized before the first process.

``distrain train`` does this in the launching process, without torch; each worker finds what was decided in the run's
folder.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distrain.core.checks import check_run
from distrain.core.config import RunConfig, nested
from distrain.core.errors import ConfigError, Problem, raise_if
from distrain.planners.memory import MemoryEstimate, estimate, gib
from distrain.planners.parallel_plan import ParallelPlan
from distrain.planners.stages import stage_layers, stage_params

from .machine import Machine
from .plan import layout_of
from .pretrained import check_pretrained
from .sequences.settings import SequenceSettings, check_sequences


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked config, its layout, and what it will take."""

    config: RunConfig
    plan: ParallelPlan
    machine: Machine
    memory: MemoryEstimate
    sequences: SequenceSettings | None

    @property
    def plan_path(self) -> Path:
        """Where ``write`` puts the plan."""
        return Path(self.config.run_dir) / "plan.json"

    def write(self) -> Path:
        """Leave plan and resolved config in the run's folder; returns the config's path.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        path = Path(self.config.run_dir) / "config.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(nested(self.config), indent=1) + "\n")
            self.plan.save(self.plan_path)
        except OSError as error:
            got = f"{error.filename or path}: {error.strerror}"
            hint = "--set run_dir=ANOTHER/FOLDER"
            raise ConfigError("run_dir cannot be written to", got=got, hint=hint) from None
        return path

    def to_dict(self) -> dict[str, Any]:
        """Plan, parameter counts and memory, ready for JSON."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "num_params": self.config.model.shape().num_params,
            "stage_params": list(self._stage_params()),
            "memory": asdict(self.memory),
            "cluster": asdict(self.machine.cluster),
            "assumed": list(self.machine.assumed),
            "sequence": asdict(self.sequences) if self.sequences else None,
        }

    def describe(self) -> list[str]:
        """The same for people."""
        shape, degrees, plan = self.config.model.shape(), self.plan.degrees, self.plan
        cluster, per_stage = self.machine.cluster, self._stage_params()
        micro_batches = "planned" if self.sequences and self.sequences.is_planned else str(plan.micro_batches)
        worst = self.memory.ranks[self.memory.worst_rank]
        parts = {
            "parameters": worst.parameters_bytes,
            "gradients": worst.gradients_bytes,
            "optimizer": worst.optimizer_bytes,
            "activations": worst.activations_bytes,
            "logits": worst.logits_bytes,
            "buffers": worst.buffers_bytes,
        }
        return [
            f"model    {shape.num_params:,} parameters, {shape.num_layers} layers, d {shape.d_model};"
            f" {min(per_stage):,} to {max(per_stage):,} a stage, {max(per_stage) // degrees.tp:,} a rank and stage",
            f"layout   {plan.world_size} ranks = tp {degrees.tp} x pp {degrees.pp} x dp {degrees.dp}, {plan.schedule},"
            f" {degrees.vpp} stages a rank, {micro_batches} micro-batches, {plan.data}",
            *([f"sequence {self.sequences.describe()}"] if self.sequences else []),
            f"cluster  {cluster.num_nodes} nodes x {cluster.devices_per_node} {cluster.device.name}",
            f"device   {gib(self.memory.peak_bytes)} of {gib(self.memory.device_limit_bytes)} on the worst rank: "
            + ", ".join(f"{name} {gib(size)}" for name, size in parts.items()),
            f"host     {gib(self.memory.host_bytes)} of {gib(self.memory.host_limit_bytes)} a node",
            *(f"assumed  {text}" for text in self.machine.assumed),
            *(f"because  {text}" for text in plan.reasons),
        ]

    def _stage_params(self) -> tuple[int, ...]:
        shape = self.config.model.shape()
        return stage_params(shape, stage_layers(shape.num_layers, self.plan.degrees.num_stages))


def prepare(config: RunConfig, *, world_size: int, here: bool) -> Prepared:
    """Check, lay out and size a run on ``world_size`` ranks of this machine (``here``) or of ``[cluster]``.

    Raises:
        ConfigError: everything that is impossible, at once, a lack of memory included.
        InfeasibleError: ``parallel = "auto"`` and no layout fits.
    """
    raise_if(check_all(config, world_size))
    machine = Machine.of(config, world_size=world_size, here=here)
    plan = layout_of(config, world_size, cluster=machine.cluster)
    sequences, data = SequenceSettings.of(config, plan), config.data
    micro_batches = sequences.counted_micro_batches(plan) if sequences else plan.micro_batches
    memory = estimate(
        config.model.shape(),
        plan.degrees,
        schedule=plan.schedule,
        data=plan.data,
        micro_batch_size=data.global_batch // (plan.degrees.dp * plan.micro_batches),
        seq_len=data.seq_len,
        micro_batches=micro_batches,
        dtype=config.train.dtype,
        optimizer=config.optimizer.name,
        cluster=machine.cluster,
        activations=config.activations.mode,
        packed_tokens=sequences.packed_tokens(data, micro_batches=micro_batches) if sequences else None,
    )
    raise_if(memory.problems())
    return Prepared(config, plan, machine, memory, sequences)


def check_all(config: RunConfig, world_size: int) -> list[Problem]:
    """Everything that keeps ``config`` from running on ``world_size`` ranks, files that it names included."""
    problems = [*check_run(config, world_size), *check_sequences(config, world_size)]
    return [*problems, *check_pretrained(config.model)]
